"""hyperband.py: schedule, samplers, search, log, executors. The standard library, nothing timed."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from fractions import Fraction
from pathlib import Path

import pytest

import hyperband
from hyperband import Choice, IntUniform, LogUniform, Rung, SearchError, Uniform, search

SPACE = {"x": Uniform(0, 1), "rate": LogUniform(1e-3, 1), "k": IntUniform(1, 8)}
# Nine lines, two brackets; the second is larger than all that came before it.
SHORT = [[Rung(2, 1), Rung(1, 3)], [Rung(4, 1), Rung(2, 3)]]
LAST = 1 - 2**-53  # the largest value that Random.random gives


# ---------------------------------------------------------------------------------- schedule


def algorithm_1(most, eta):
    """Algorithm 1 of Li et al. 2018, line by line in exact fractions."""
    s_max = max(s for s in range(most.bit_length() + 1) if Fraction(eta) ** s <= most)
    budget = (s_max + 1) * most
    schedule = []
    for s in reversed(range(s_max + 1)):
        n = math.ceil(Fraction(budget, most) * Fraction(eta**s, s + 1))
        r = most * Fraction(1, eta**s)
        schedule.append([(n // eta**i, math.floor(r * eta**i)) for i in range(s + 1)])
    return schedule


@pytest.mark.parametrize("eta", range(2, 11))
def test_brackets_are_algorithm_1(eta):
    for most in range(1, 1201):
        schedule = hyperband.brackets(most, eta)
        assert schedule == algorithm_1(most, eta), most
        assert schedule[0] == hyperband.bracket(len(schedule) - 1, most, eta)
        assert all(type(number) is int for rung in schedule[0] for number in rung)


@pytest.mark.parametrize(
    ("most", "eta", "count"),
    [
        (1, 3, 1),
        (2, 3, 1),
        (242, 3, 5),
        (243, 3, 6),
        (244, 3, 6),
        (999, 10, 3),
        (1000, 10, 4),
        (125, 5, 4),
        (10**60, 10, 61),
        (10**60 - 1, 10, 60),
        (3**200, 3, 201),
        (3**200 - 1, 3, 200),
    ],
)
def test_no_bracket_is_lost_to_rounding(most, eta, count):
    schedule = hyperband.brackets(most, eta)
    assert len(schedule) == count
    assert [len(rungs) for rungs in schedule] == list(range(count, 0, -1))
    assert all(rungs[-1].resource == most for rungs in schedule)
    if most > 1200:
        assert schedule == algorithm_1(most, eta)


def test_the_whole_table_of_81_and_3():
    assert hyperband.brackets(81) == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]
    assert hyperband.bracket(2, 81, eta=3) == [Rung(15, 9), Rung(5, 27), Rung(1, 81)]


def test_the_paper_27_bracket_prunes_where_the_poster_does_not():
    assert hyperband.bracket(3, 27) == [(27, 1), (9, 3), (3, 9), (1, 27)]
    assert hyperband.POSTER_BRACKET == [(27, 1), (9, 3), (3, 9), (3, 27)]


@pytest.mark.parametrize(
    ("rungs", "continuing", "retraining"),
    [
        (hyperband.POSTER_BRACKET, 117, 162),
        ([Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(1, 27)], 81, 108),
        ([Rung(5, 81)], 405, 405),
        ([Rung(4, 2), Rung(4, 2)], 8, 16),
    ],
)
def test_total_resource(rungs, continuing, retraining):
    assert hyperband.total_resource(rungs) == continuing
    assert hyperband.total_resource(rungs, retrain=True) == retraining


@pytest.mark.parametrize("value", [True, 3.0, "3", None, Fraction(3)])
@pytest.mark.parametrize("name", ["max_resource", "eta"])
def test_schedule_refuses_what_is_no_integer(name, value):
    arguments = {"max_resource": 9, "eta": 3} | {name: value}
    for function in (hyperband.brackets, functools.partial(hyperband.bracket, 0)):
        with pytest.raises(TypeError, match=f"^{name} must be an integer, not "):
            function(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("max_resource", 0, 1), ("max_resource", -1, 1), ("eta", 1, 2), ("eta", 0, 2), ("eta", -3, 2)],
)
def test_schedule_refuses_what_is_too_small(name, value, least):
    arguments = {"max_resource": 9, "eta": 3} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} must be at least {least}, not {value}$"):
        hyperband.brackets(**arguments)


@pytest.mark.parametrize("s", [-1, 3, 100])
def test_bracket_refuses_s_out_of_range(s):
    with pytest.raises(ValueError, match=f"s must be 0 to 2 for max_resource 26, not {s}"):
        hyperband.bracket(s, 26)


# ------------------------------------------------------------------------------ search space


class Fixed:
    """A generator whose next number is known."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (
            Uniform(-1, 3),
            [
                *(2.3776874061001925, 2.03181761176121, 0.68228632332338),
                *(0.035667001171853396, 1.045098885474434, 0.6197365498016572),
            ],
        ),
        (
            LogUniform(1e-4, 1e-1),
            [
                *(0.034140160192072944, 0.018787249753397028, 0.0018268998599127644),
                *(0.0005980675662697351, 0.0034184101089156415, 0.0016398435363483169),
            ],
        ),
        (IntUniform(3, 6), [6, 6, 4, 4, 5, 4]),
        (Choice(["a", "b", None]), [None, None, "b", "a", "b", "b"]),
    ],
)
def test_a_seed_draws_the_same_everywhere(sampler, drawn):
    """Checked with Python 3.11, 3.12 and 3.13."""
    rng = random.Random(0)
    again = [sampler.sample(rng) for _ in drawn]
    assert again == drawn
    assert list(map(type, again)) == list(map(type, drawn))


@pytest.mark.parametrize("low", [1e-300, 1e-4, 0.1, 1.0, 3])
@pytest.mark.parametrize("ratio", [1, 1.5, 10, 1e12])
@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.9, LAST])
def test_samplers_against_their_formula(low, ratio, u):
    high = low * ratio
    value = LogUniform(low, high).sample(Fixed(u))
    assert type(value) is float
    assert low <= value <= high
    assert value == pytest.approx(low * ratio**u, rel=1e-13)
    value = Uniform(low, high).sample(Fixed(u))
    assert type(value) is float
    assert low <= value <= high
    assert value == pytest.approx(low + (high - low) * u, rel=1e-13)


def test_a_range_of_floats_is_never_left():
    rng = random.Random(5)
    for _ in range(1500):
        low, high = sorted(rng.choice((rng.uniform(-1, 1), rng.gauss(0, 1e-9))) for _ in range(2))
        assert low <= Uniform(low, high).sample(Fixed(LAST)) <= high
        assert Uniform(low, high).sample(Fixed(0.0)) == low
        low, high = sorted((math.exp(700 * low), math.exp(700 * high)))
        assert low <= LogUniform(low, high).sample(Fixed(LAST)) <= high
        assert LogUniform(low, high).sample(Fixed(0.0)) == low


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 10, 49, 1000, 2**31, 2**53])
def test_integers_reach_both_ends_and_no_further(n):
    for low in (-3, 0, 17):
        sampler = IntUniform(low, low + n - 1)
        assert sampler.sample(Fixed(0.0)) == low
        assert sampler.sample(Fixed(LAST)) == low + n - 1
    if n <= 1000:
        choice = Choice(range(n))
        assert choice.sample(Fixed(0.0)) == 0
        assert choice.sample(Fixed(LAST)) == n - 1


@pytest.mark.parametrize(
    ("sampler", "position"),
    [
        (Uniform(-2, 6), lambda value: (value + 2) / 8),
        (LogUniform(1e-4, 1e-1), lambda value: (math.log10(value) + 4) / 3),
        (IntUniform(-5, 4), lambda value: (value + 5) / 10),
        (Choice("abcdefghij"), lambda value: "abcdefghij".index(value) / 10),
    ],
)
def test_tenths_are_as_likely(sampler, position):
    rng = random.Random(1)
    n = 5000
    counts = Counter(int(10 * position(sampler.sample(rng)) + 1e-9) for _ in range(n))
    assert sorted(counts) == list(range(10))
    chi_squared = sum((count - n / 10) ** 2 / (n / 10) for count in counts.values())
    assert chi_squared < 27.88  # 0.1 % of fair samplers exceed this with 9 degrees of freedom


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice([]),
        lambda: Choice(()),
        lambda: Uniform(1, 0),
        lambda: IntUniform(1, 0),
        lambda: LogUniform(1, 0.5),
        lambda: LogUniform(0, 1),
        lambda: LogUniform(-1, 1),
        lambda: Uniform(math.nan, 1),
        lambda: Uniform(0, math.nan),
        lambda: Uniform(-math.inf, 0),
        lambda: LogUniform(1, math.inf),
        lambda: Uniform(math.inf, math.inf),
        lambda: Uniform(-1e308, 1e308),  # the width overflows
    ],
)
def test_samplers_refuse_an_empty_or_endless_range(make):
    with pytest.raises(ValueError, match=r"at least one value|need finite|low above 0"):
        make()


@pytest.mark.parametrize("ends", [(0.5, 3), (1, 3.0), ("1", "3")])
def test_int_uniform_refuses_what_is_no_integer(ends):
    with pytest.raises(TypeError):
        IntUniform(*ends)


# ------------------------------------------------------------------------- search, in this process


class Script:
    """Losses by (trial, resource), or by trial; an exception is raised. Records every call."""

    def __init__(self, losses):
        self.losses = losses
        self.calls = []  # trial, previous, resource, folder's name, its files, folders beside it
        self.configurations = []

    def __call__(self, configuration, previous, resource, folder):
        trial = number(folder)
        here = sorted(path.name for path in folder.iterdir())
        beside = sorted(path.name for path in folder.parent.iterdir())
        self.calls.append((trial, previous, resource, folder.name, here, beside))
        self.configurations.append(configuration)
        (folder / f"reached-{resource}").touch()
        loss = self.losses.get((trial, resource), self.losses.get(trial))
        if isinstance(loss, BaseException):
            raise loss
        return loss


def number(folder):
    return int(re.fullmatch(r"trial-(\d+)(-rung-\d+)?", folder.name)[1])


def smooth(configuration, previous, resource, folder):
    """A loss of the configuration alone, best at x = 0.3, less with more resource."""
    return (configuration["x"] - 0.3) ** 2 + configuration["k"] / 100 + 1 / (10 + resource)


class Walk:
    """Keeps its state in the folder, so that a state lost or taken from another changes the loss.

    Dies in the middle of call number `dies`, counted from 0.
    """

    def __init__(self, dies=None):
        self.dies = dies
        self.calls = []

    def __call__(self, configuration, previous, resource, folder):
        self.calls.append((number(folder), resource))
        state = folder / "state.json"
        epochs, value = json.loads(state.read_text()) if state.exists() else (0, 1.0)
        assert previous <= epochs <= resource
        for epoch in range(epochs, resource):
            if len(self.calls) - 1 == self.dies and epoch >= (previous + resource) // 2:
                raise KeyboardInterrupt
            value = value * (1 - configuration["rate"] / 2) + configuration["x"] / (epoch + 1)
            state.write_text(json.dumps([epoch + 1, value]))
        return value


def without_seconds(trials):
    return [trial._replace(seconds=0) for trial in trials]


def records(log):
    """The log's lines without the two fields that differ from run to run."""
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    for record in kept:
        assert record.pop("seconds") >= 0
        assert re.fullmatch("[0-9a-f]{8}", record.pop("crc32"))
    return kept


def folders(place):
    return sorted(path.name for path in place.iterdir())


def test_the_calls_of_a_search_exactly(tmp_path):
    schedule = [[Rung(5, 1), Rung(2, 4), Rung(1, 9)], [Rung(3, 4), Rung(1, 9)]]
    # Trials 1, 2 and 4 tie on the first rung; 1 and 2, the earlier ones, go on, and tie again.
    losses = {0: 0.5, 1: 0.2, 2: 0.2, 3: 0.9, 4: 0.2, (1, 4): 0.4, (2, 4): 0.4, (1, 9): 0.35}
    losses |= {5: 0.8, 6: 0.7, 7: 0.6, (7, 9): 0.35}
    objective = Script(losses)
    seen = []
    result = search(
        objective, SPACE, schedule, 3, folder=tmp_path, on_trial=lambda *a: seen.append(a)
    )
    first = [f"trial-{n:04d}" for n in range(5)]
    assert objective.calls == [
        (0, 0, 1, "trial-0000", [], first[:1]),
        (1, 0, 1, "trial-0001", [], first[:2]),
        (2, 0, 1, "trial-0002", [], first[:3]),
        (3, 0, 1, "trial-0003", [], first[:4]),
        (4, 0, 1, "trial-0004", [], first[:5]),
        (1, 1, 4, "trial-0001", ["reached-1"], first[1:3]),
        (2, 1, 4, "trial-0002", ["reached-1"], first[1:3]),
        (1, 4, 9, "trial-0001", ["reached-1", "reached-4"], first[1:2]),
        (5, 0, 4, "trial-0005", [], ["trial-0001", "trial-0005"]),
        (6, 0, 4, "trial-0006", [], ["trial-0001", "trial-0005", "trial-0006"]),
        (7, 0, 4, "trial-0007", [], ["trial-0001", "trial-0005", "trial-0006", "trial-0007"]),
        (7, 4, 9, "trial-0007", ["reached-4"], ["trial-0001", "trial-0007"]),
    ]
    assert [trial[:3] for trial in result.trials] == [
        *((0, 0, n) for n in range(5)),
        *((0, 1, 1), (0, 1, 2), (0, 2, 1)),
        *((1, 0, n) for n in (5, 6, 7)),
        (1, 1, 7),
    ]
    assert [t.configuration for t in result.trials] == objective.configurations
    assert [t.resource for t in result.trials] == [call[2] for call in objective.calls]
    assert [t.loss for t in result.trials] == [
        *(0.5, 0.2, 0.2, 0.9, 0.2, 0.4, 0.4, 0.35, 0.8, 0.7, 0.6, 0.35)
    ]
    assert all(t.error is None and t.seconds >= 0 for t in result.trials)
    assert seen == [(trial, False) for trial in result.trials]
    # Both brackets' winners tie: the earlier one, and its folder, stay.
    assert result.best == result.trials[7]
    assert folders(tmp_path) == ["trial-0001"]
    assert folders(tmp_path / "trial-0001") == ["reached-1", "reached-4", "reached-9"]
    assert result.resource == 5 * 1 + 2 * 3 + 1 * 5 + 3 * 4 + 1 * 5


def test_survivors_stand_in_the_order_of_their_losses():
    objective = Script({0: 4, 1: 3, 2: 2, 3: 1, 4: 5})
    search(objective, SPACE, [[Rung(5, 1), Rung(3, 2), Rung(1, 3)]])
    assert [call[0] for call in objective.calls] == [0, 1, 2, 3, 4, 3, 2, 1, 3]


def test_a_tie_goes_to_the_earlier_trial_even_if_it_ran_later():
    objective = Script({0: 3, 1: 2, 2: 1, (0, 2): 5, (1, 2): 5, (2, 2): 5})
    search(objective, SPACE, [[Rung(3, 1), Rung(3, 2), Rung(2, 3)]])
    assert [call[0] for call in objective.calls] == [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_configurations_are_drawn_in_order_from_the_seed(seed):
    space = {"z": Uniform(0, 1), "a": Choice("xyz"), "m": IntUniform(0, 9)}
    schedule = [[Rung(6, 1), Rung(2, 3)], [Rung(3, 3)]]
    result = search(lambda c, *_: c["z"], space, schedule, seed)
    rng = random.Random(seed)
    drawn = {n: {name: space[name].sample(rng) for name in "zam"} for n in range(9)}
    assert {t.trial: t.configuration for t in result.trials} == drawn
    assert all(list(t.configuration) == ["z", "a", "m"] for t in result.trials)
    # The best of Rung(2, 3) and of the second bracket's Rung(3, 3).
    best = min([min(range(6), key=lambda n: drawn[n]["z"]), 6, 7, 8], key=lambda n: drawn[n]["z"])
    assert (result.best.trial, result.best.resource) == (best, 3)


@pytest.mark.parametrize("retrain", [False, True])
def test_the_poster_flow(retrain, tmp_path):
    objective = Script({n: (n * 11) % 27 for n in range(27)} | {(5, 27): -1.0})
    result = search(objective, SPACE, [hyperband.POSTER_BRACKET], folder=tmp_path, retrain=retrain)
    rank = {(n * 11) % 27: n for n in range(27)}
    confirmed = [(rank[place], 27) for place in range(3)]  # the same three: nothing is pruned
    assert [(call[0], call[2]) for call in objective.calls] == [
        *((n, 1) for n in range(27)),
        *((rank[place], 3) for place in range(9)),
        *((rank[place], 9) for place in range(3)),
        *confirmed,
    ]
    assert result.resource == (162 if retrain else 117)
    before = {1: 0, 3: 1, 9: 3, 27: 9}
    for _, previous, resource, _, here, _ in objective.calls:
        if retrain:
            assert (previous, here) == (0, [])
        else:
            assert previous == before[resource]
            assert here == sorted(f"reached-{r}" for r in before if r < resource)
    assert rank[1] == 5  # which the last rung lifts from the second place to the first
    assert (result.best.trial, result.best.loss, result.best.resource) == (5, -1.0, 27)
    assert folders(tmp_path) == ["trial-0005-rung-3" if retrain else "trial-0005"]


def test_retraining_removes_every_folder_after_its_rung(tmp_path):
    objective = Script({n: n for n in range(4)})
    schedule = [[Rung(2, 1), Rung(1, 2)], [Rung(2, 2)]]
    search(objective, SPACE, schedule, folder=tmp_path, retrain=True)
    assert [call[5] for call in objective.calls] == [
        ["trial-0000"],
        ["trial-0000", "trial-0001"],
        ["trial-0000-rung-1"],
        ["trial-0000-rung-1", "trial-0002"],
        ["trial-0000-rung-1", "trial-0002", "trial-0003"],
    ]
    assert folders(tmp_path) == ["trial-0000-rung-1"]


def test_a_temporary_folder_is_used_and_removed():
    objective = Script({0: 1, 1: 0})
    places = set()
    result = search(
        lambda c, p, r, folder: places.add(folder.parent) or objective(c, p, r, folder),
        SPACE,
        [[Rung(2, 1), Rung(1, 3)]],
    )
    assert objective.calls[2][:5] == (1, 1, 3, "trial-0001", ["reached-1"])
    assert result.best.trial == 1
    (place,) = places
    assert not place.exists()


def test_hyperband_finds_the_best_of_what_it_drew():
    # The loss orders configurations alike at every resource, so each bracket keeps its best.
    schedule = hyperband.brackets(27)
    result = search(smooth, SPACE, schedule, 11)
    configurations = {t.trial: t.configuration for t in result.trials}
    assert len(configurations) == sum(rungs[0].configurations for rungs in schedule) == 49
    best = min(configurations, key=lambda n: (smooth(configurations[n], 0, 27, None), n))
    assert result.best.trial == best
    assert result.best.loss == smooth(configurations[best], 0, 27, None)
    assert result.resource == sum(map(hyperband.total_resource, schedule))
    assert len(result.trials) == sum(rung.configurations for rungs in schedule for rung in rungs)


def test_best_is_at_the_largest_resource_not_the_lowest_loss():
    schedule = [[Rung(2, 1), Rung(1, 4)], [Rung(2, 3)]]
    result = search(Script({0: 0.1, 1: 0.2, (0, 4): 0.9, 2: 0.3, 3: 0.01}), SPACE, schedule)
    assert (result.best.trial, result.best.resource, result.best.loss) == (0, 4, 0.9)


BAD = [
    (math.nan, "the loss is nan"),
    (math.inf, "the loss is inf"),
    (-math.inf, "the loss is -inf"),
    (ValueError("two\nlines\t here"), "ValueError: two lines here"),
    (RuntimeError(), "RuntimeError:"),
    (StopIteration(3), "StopIteration: 3"),
    (BrokenExecutor("the objective's own"), "BrokenExecutor: the objective's own"),
    ("text", "ValueError: could not convert string to float: 'text'"),
    (UnicodeError("\udcff é"), "UnicodeError: \udcff é"),
]


@pytest.mark.parametrize(("bad", "error"), BAD)
@pytest.mark.parametrize("threads", [False, True])
def test_a_failing_trial_is_logged_and_never_promoted(bad, error, threads, tmp_path):
    # Trials 0 and 3 fail at once, 2 on the second rung; the rungs hold fewer than they allow.
    losses = {0: bad, 1: 3.0, 2: 1.0, 3: bad, (2, 3): bad}
    schedule = [[Rung(4, 1), Rung(3, 3), Rung(2, 9)]]
    log, place = tmp_path / "log", tmp_path / "state"
    arguments = (SPACE, schedule, 0)
    with ThreadPoolExecutor(2) as pool:
        objective = Script(losses)
        executor = pool if threads else None
        result = search(objective, *arguments, log=log, folder=place, executor=executor)
    expected = [(0, 1), (1, 1), (2, 1), (3, 1), (2, 3), (1, 3), (1, 9)]
    assert [(t.trial, t.resource) for t in result.trials] == expected
    assert sorted(call[:3:2] for call in objective.calls) == sorted(expected)
    failed = {(0, 1), (3, 1), (2, 3)}
    for t in result.trials:
        assert t.error == (error if (t.trial, t.resource) in failed else None)
        assert (t.loss is None) == ((t.trial, t.resource) in failed)
    assert result.best == result.trials[-1]
    assert folders(place) == ["trial-0001"]
    again = search(Script({}), *arguments, log=log, folder=place)
    assert again == result  # all replayed, errors too
    assert folders(place) == ["trial-0001"]


def test_the_search_ends_early_where_nobody_survives():
    schedule = [[Rung(3, 1), Rung(1, 9)], [Rung(2, 3)]]
    losses = {0: 2.0, 1: 1.0, 2: 3.0, (1, 9): math.nan, 3: math.nan, 4: math.nan}
    result = search(Script(losses), SPACE, schedule)
    # At 9 and at 3 all failed.
    assert (result.best.trial, result.best.resource, result.best.loss) == (1, 1, 1.0)
    assert len(result.trials) == 6


def test_a_search_where_all_fail_says_so(tmp_path):
    objective = Script(dict.fromkeys(range(6), ZeroDivisionError("why")))
    with pytest.raises(
        SearchError, match=r"^all 6 trials failed; the first: ZeroDivisionError: why$"
    ):
        search(objective, SPACE, SHORT, log=tmp_path / "log")
    assert [record["trial"] for record in records(tmp_path / "log")] == list(range(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("threads", [False, True])
def test_an_interrupt_passes_through(error, threads, tmp_path):
    with ThreadPoolExecutor(1) as pool, pytest.raises(type(error)):
        executor = pool if threads else None
        search(Script({0: 1, 1: error, 2: 2}), SPACE, [[Rung(3, 1)]], log=tmp_path / "log",
               executor=executor)  # fmt: skip
    assert [record["trial"] for record in records(tmp_path / "log")] == [0]


@pytest.mark.parametrize(
    "schedule",
    [
        [],
        [[]],
        [[Rung(1, 1)], []],
        [[Rung(1, 1), Rung(2, 3)]],
        [[Rung(2, 3), Rung(1, 1)]],
        [[Rung(3, 1)], [Rung(0, 1)]],
        [[Rung(3, 0)]],
        [[Rung(3, 1), Rung(0, 3)]],
    ],
)
def test_search_refuses_an_unfit_schedule(schedule):
    with pytest.raises(ValueError, match=r"a schedule needs|must have|must not grow"):
        search(lambda *_: pytest.fail("evaluated"), SPACE, schedule)


@pytest.mark.parametrize(
    ("values", "error"), [([math.nan], ValueError), ([object()], TypeError), ([{1}], TypeError)]
)
def test_what_the_log_cannot_hold_is_refused_before_a_trial(values, error):
    with pytest.raises(error):
        search(lambda *_: pytest.fail("evaluated"), {"v": Choice(values)}, [[Rung(1, 1)]])


@pytest.mark.parametrize("executor", [4, "threads"])
def test_search_refuses_what_is_no_executor(executor):
    with pytest.raises(TypeError, match="executor must be"):
        search(smooth, SPACE, SHORT, executor=executor)


def test_an_objective_cannot_change_what_is_logged():
    def objective(configuration, *_):
        configuration["v"].append(1)
        configuration["w"] = 2
        return 0

    values = [0]
    result = search(objective, {"v": Choice([values])}, [[Rung(2, 1), Rung(1, 2)]])
    assert [t.configuration for t in result.trials] == [{"v": [0]}] * 3
    assert values == [0]


# -------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("retrain", [False, True])
@pytest.mark.parametrize(
    "schedule", [SHORT, [[Rung(5, 1), Rung(2, 3), Rung(2, 9)]]], ids=["short", "poster"]
)
def test_killed_at_every_line(schedule, retrain, tmp_path):
    whole, once = tmp_path / "whole.jsonl", Walk()
    result = search(once, SPACE, schedule, 4, log=whole, retrain=retrain)
    assert all(t.error is None for t in result.trials)
    for k in range(len(once.calls)):
        log, place = tmp_path / f"{k}.jsonl", tmp_path / f"state-{k}"
        keep = {"log": log, "folder": place, "retrain": retrain}
        first, second = Walk(dies=k), Walk()
        with pytest.raises(KeyboardInterrupt):
            search(first, SPACE, schedule, 4, **keep)
        assert records(log) == records(whole)[:k] if k else not log.exists()
        seen = []
        again = search(
            second, SPACE, schedule, 4, **keep, on_trial=lambda *a, seen=seen: seen.append(a)
        )
        assert first.calls == once.calls[: k + 1]
        assert second.calls == once.calls[k:]
        assert records(log) == records(whole)
        assert without_seconds(again.trials) == without_seconds(result.trials)
        assert without_seconds([again.best]) == without_seconds([result.best])
        assert again.resource == result.resource
        assert seen == [(trial, n < k) for n, trial in enumerate(again.trials)]
        last = f"-rung-{result.best.rung}" if retrain else ""
        assert folders(place) == [f"trial-{result.best.trial:04d}{last}"]


def test_killed_before_every_line_of_one_search(tmp_path):
    keep = {"log": tmp_path / "log", "folder": tmp_path / "state"}
    whole = Walk()
    result = search(whole, SPACE, SHORT, 4)
    calls = []
    for n in range(len(whole.calls)):  # each run gets one line further
        objective = Walk(dies=1)
        if n + 1 < len(whole.calls):
            with pytest.raises(KeyboardInterrupt):
                search(objective, SPACE, SHORT, 4, **keep)
        else:
            again = search(objective, SPACE, SHORT, 4, **keep)
        calls.append(objective.calls[0])
    assert calls == whole.calls
    assert without_seconds(again.trials) == without_seconds(result.trials)


def finished_log(path, **changes):
    """Write the log of a whole search; return its lines and the result."""
    result = search(smooth, **({"space": SPACE, "schedule": SHORT, "seed": 4} | changes), log=path)
    return path.read_bytes().splitlines(keepends=True), result


def test_a_log_cut_at_every_byte_of_its_last_two_lines(tmp_path):
    log = tmp_path / "log"
    lines, result = finished_log(log)
    content, whole = b"".join(lines), records(log)
    assert len(lines) == 9
    for cut in range(sum(map(len, lines[:-2])), len(content) + 1):
        log.write_bytes(content[:cut])
        seen = []
        again = search(
            smooth, SPACE, SHORT, 4, log=log, on_trial=lambda *a, seen=seen: seen.append(a)
        )
        complete = content[:cut].count(b"\n")
        assert [replayed for _, replayed in seen] == [n < complete for n in range(9)]
        assert again.trials[:complete] == result.trials[:complete]  # seconds too
        assert records(log) == whole


def test_a_line_is_what_the_documentation_says(tmp_path):
    import zlib

    lines, result = finished_log(tmp_path / "new" / "folder" / "log")
    for line, trial in zip(lines, result.trials, strict=True):
        record = json.loads(line)
        assert list(record) == [*hyperband.Trial._fields, "crc32"]
        assert [record[name] for name in trial._fields] == list(trial)
        body = line[: line.index(b', "crc32"')] + b"}"
        assert int(record["crc32"], 16) == zlib.crc32(body)
    assert b"\r" not in b"".join(lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 5}, 1),
        ({"space": SPACE | {"k": IntUniform(1, 9)}}, None),
        ({"space": {"y" if name == "x" else name: s for name, s in SPACE.items()}}, 1),
        ({"space": SPACE | {"more": Choice([0])}}, 1),
        ({"space": {name: SPACE[name] for name in ("k", "rate", "x")}}, 1),
        ({"schedule": [[Rung(2, 2), Rung(1, 3)], SHORT[1]]}, 1),
        ({"schedule": [[Rung(2, 1), Rung(1, 4)], SHORT[1]]}, 3),
        ({"schedule": [[Rung(3, 1), Rung(1, 3)], SHORT[1]]}, 3),
        ({"schedule": [[Rung(2, 1)], SHORT[1]]}, 3),
        ({"schedule": [SHORT[0], [Rung(3, 1), Rung(2, 3)]]}, 7),
    ],
)
def test_the_log_of_another_search_is_refused(changes, line, tmp_path):
    log = tmp_path / "log"
    lines, _ = finished_log(log)
    if line is None:  # the first trial whose integer differs between the two ranges
        ranges = (1, 8), (1, 9)
        draws = [random.Random(4) for _ in ranges]
        for line in range(1, 7):  # noqa: B007
            drawn = [
                [rng.random(), rng.random(), IntUniform(*ends).sample(rng)]
                for rng, ends in zip(draws, ranges, strict=True)
            ]
            if drawn[0] != drawn[1]:
                break
        line += line > 2  # the third line is a second rung's
    arguments = {"space": SPACE, "schedule": SHORT, "seed": 4} | changes
    with pytest.raises(SearchError, match=rf"log: line {line} \(.*belongs to another search"):
        search(lambda *_: pytest.fail("evaluated"), **arguments, log=log)
    assert log.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, False), ("1", 1)])
def test_values_of_different_types_differ(one, other, tmp_path):
    arguments = {"schedule": [[Rung(1, 1)]], "log": tmp_path / "log"}
    search(lambda *_: 0, {"v": Choice([one])}, **arguments)
    with pytest.raises(SearchError, match=r"line 1 .*belongs to another search"):
        search(lambda *_: 0, {"v": Choice([other])}, **arguments)


def test_every_json_value_is_replayed(tmp_path):
    values = [(1, 2), [3, {"a": None}], "é\udcff", 1e300, 10**40, True, 0.1, -0.0]
    space = {f"v{n}": Choice([value]) for n, value in enumerate(values)}
    arguments = (space, [[Rung(1, 1)]])
    first = search(lambda *_: 0, *arguments, log=tmp_path / "log")
    again = search(lambda *_: pytest.fail("evaluated"), *arguments, log=tmp_path / "log")
    assert again == first
    assert first.best.configuration["v0"] == [1, 2]


@pytest.mark.parametrize("retrain", [False, True])
def test_a_log_with_too_many_lines_is_refused(retrain, tmp_path):
    log = tmp_path / "log"
    lines, _ = finished_log(log)
    with pytest.raises(SearchError, match="log has 9 lines, but this search only 3 trials"):
        search(smooth, SPACE, SHORT[:1], 4, log=log, retrain=retrain)
    assert log.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [lines[0], b"\n", *lines[1:]], 2),
        (lambda lines: [b"\n"], 1),
        (lambda lines: [*lines[:2], b"not json\n"], 3),
        (lambda lines: [b"[]\n"], 1),
        (lambda lines: [b"7\n"], 1),
        (lambda lines: [b"{}\n"], 1),
        (lambda lines: [b"[" * 100_000 + b"\n"], 1),
        (lambda lines: [b"\xff\n"], 1),
        (lambda lines: [lines[0], lines[1].replace(b", ", b",  ", 1)], 2),
        (lambda lines: [lines[0], lines[1].replace(b"\n", b"\r\n")], 2),
        (lambda lines: [re.sub(rb', "crc32".*', b"}", lines[0])], 1),
        (lambda lines: [re.sub(rb'"loss": 0', b'"loss": 9', lines[0])], 1),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0]], 1),
        (lambda lines: [lines[0], lines[1] + b"rubbish"], 3),
        (lambda lines: [b"one line of something else, without a newline"], 1),
    ],
)
def test_a_damaged_log_is_refused_and_left_alone(damage, line, tmp_path):
    log = tmp_path / "log"
    content = b"".join(damage(finished_log(log)[0]))
    log.write_bytes(content)
    with pytest.raises(SearchError, match=f"log: line {line} is damaged"):
        search(lambda *_: pytest.fail("evaluated"), SPACE, SHORT, 4, log=log)
    assert log.read_bytes() == content


@pytest.mark.parametrize("swap", [(0, 1), (2, 3), (7, 8)])
def test_lines_out_of_order_are_refused(swap, tmp_path):
    log = tmp_path / "log"
    lines, _ = finished_log(log)
    a, b = swap
    lines[a], lines[b] = lines[b], lines[a]
    log.write_bytes(b"".join(lines))
    with pytest.raises(SearchError, match=rf"line {a + 1} .*belongs to another search"):
        search(smooth, SPACE, SHORT, 4, log=log)


def test_a_flipped_bit_never_changes_the_result(tmp_path):
    log = tmp_path / "log"
    lines, result = finished_log(log)
    content, whole = b"".join(lines), records(log)
    rng = random.Random(0)
    end = len(content)
    bits = {rng.randrange(8 * end) for _ in range(300)} | set(range(8 * end - 96, 8 * end))
    outcomes = Counter()
    for bit in sorted(bits):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        log.write_bytes(flipped)
        replayed = []
        try:
            again = search(
                smooth, SPACE, SHORT, 4, log=log,
                on_trial=lambda t, old, replayed=replayed: old and replayed.append(t),
            )  # fmt: skip
        except SearchError as error:
            assert re.search(r"line \d+ is damaged", str(error))
            assert log.read_bytes() == flipped
            outcomes["refused"] += 1
        else:
            assert bit // 8 == end - 1  # the last newline: that line alone runs again
            assert replayed == result.trials[:-1]
            assert without_seconds(again.trials) == without_seconds(result.trials)
            assert records(log) == whole
            outcomes["repaired"] += 1
    assert outcomes == {"refused": len(bits) - 8, "repaired": 8}


# --------------------------------------------------------------------------------- executors

WIDE = [[Rung(6, 1), Rung(3, 3), Rung(2, 9)], [Rung(3, 3)]]


class Died(BaseException):
    """What kills a worker of `Brittle`."""


class Brittle(Executor):
    """Workers played by turns, without processes: who raises Died takes all others along.

    As in ProcessPoolExecutor every future that is not done breaks, whoever caused it, and nothing
    more can be submitted. The trials of one turn end in the reverse order.
    """

    def __init__(self, workers, eager=False):
        self.workers, self.eager = workers, eager
        self.queue, self.broken, self.open, self.futures = [], False, True, []

    def submit(self, function, *arguments):
        assert self.open, "submitted after shutdown"
        if self.broken:
            raise BrokenExecutor("broken before")
        future = Turn()
        future.owner = self
        self.futures.append(future)
        self.queue.append((future, function, arguments))
        if self.eager and len(self.queue) > self.workers:
            self.turn()
        return future

    def turn(self):
        batch, self.queue = self.queue[: self.workers], self.queue[self.workers :]
        lost = []
        for future, function, arguments in reversed(batch):
            try:
                outcome = None if self.broken else function(*arguments)
            except Died:
                self.broken = True
            except BaseException as error:
                future.set_exception(error)
                continue
            if self.broken:
                lost.append(future)
            else:
                future.set_result(outcome)
        if self.broken:
            lost += [future for future, *_ in self.queue]
            self.queue = []
            for future in lost:
                future.set_exception(BrokenExecutor("a worker died"))

    def shutdown(self, wait=True, *, cancel_futures=False):
        assert wait
        self.open = False


class Turn(Future):
    def exception(self, timeout=None):
        while not self.done():
            self.owner.turn()
        return super().exception()

    def result(self, timeout=None):
        self.exception()
        return super().result()


class Makes:
    """Makes executors and remembers them."""

    def __init__(self, make):
        self.make, self.made = make, []

    def __call__(self):
        assert not any(executor.open for executor in self.made), "two at once"
        self.made.append(self.make())
        return self.made[-1]


class Deadly:
    """`smooth`, but trials in `always` kill their worker, those in `once` the first time."""

    def __init__(self, always=(), once=()):
        self.always, self.once, self.runs = set(always), set(once), Counter()

    def __call__(self, configuration, previous, resource, folder):
        call = number(folder), resource
        self.runs[call] += 1
        if call in self.always or (call in self.once and self.runs[call] == 1):
            raise Died
        return smooth(configuration, previous, resource, folder)


def inline(failed=(), schedule=WIDE, **arguments):
    """The same search in this process, where the trials in `failed` raise."""

    def objective(configuration, previous, resource, folder):
        if (number(folder), resource) in failed:
            raise RuntimeError
        return smooth(configuration, previous, resource, folder)

    return search(objective, SPACE, schedule, 7, **arguments)


def same_but_errors(trials, expected, error):
    """Equal, apart from seconds and what is said of the failed ones."""
    assert [t[:6] for t in trials] == [t[:6] for t in expected]
    for trial in trials:
        assert (trial.error is None) == (trial.loss is not None)
        assert trial.error is None or re.fullmatch(error, trial.error), trial.error


ALONE = "its worker died as it ran alone: Broken(Executor|ProcessPool): .+"


@pytest.mark.parametrize(("workers", "eager"), [(1, False), (2, True), (4, False)])
def test_a_dead_worker_fails_only_its_own_trial(workers, eager, tmp_path):
    every = [(t.trial, t.resource) for t in inline().trials]
    cases = [{call} for call in every]
    cases += [set(pair) for pair in itertools.combinations(every[:4], 2)] + [set(every[:5])]
    for case, always in enumerate(cases):
        expected = inline(always)
        objective, log = Deadly(always), tmp_path / f"{case}.jsonl"
        make, seen = Makes(lambda: Brittle(workers, eager)), []
        result = search(
            objective, SPACE, WIDE, 7, executor=make, log=log,
            on_trial=lambda t, old, seen=seen, log=log: seen.append((t, len(records(log)))),
        )  # fmt: skip
        same_but_errors(result.trials, expected.trials, ALONE)
        assert {(t.trial, t.resource) for t in result.trials if t.error} == always
        assert result.best[:6] == expected.best[:6]
        assert seen == [(t, n) for n, t in enumerate(result.trials, 1)]
        assert all(objective.runs[call] == 2 for call in always) or len(always) > 1
        assert not any(executor.open for executor in make.made)
        # Resumed without any executor, nothing runs again.
        again = search(lambda *_: pytest.fail("evaluated"), SPACE, WIDE, 7, log=log)
        assert again == result


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_trial_whose_worker_dies_once_succeeds(workers):
    expected = inline()
    every = [(t.trial, t.resource) for t in expected.trials]
    for call in every:
        objective, make = Deadly(once={call}), Makes(lambda: Brittle(workers))
        result = search(objective, SPACE, WIDE, 7, executor=make)
        assert without_seconds(result.trials) == without_seconds(expected.trials)
        assert objective.runs[call] == 2
        assert not any(executor.open for executor in make.made)


@pytest.mark.parametrize(
    ("workers", "submitted"), [(1, [9, 1, 7]), (2, [9, 1, 1, 7]), (3, [9, 1, 1, 6])]
)
def test_the_others_go_side_by_side_again_after_the_culprit(workers, submitted):
    make = Makes(lambda: Brittle(workers))
    search(Deadly(always={(1, 1)}), SPACE, [[Rung(9, 1)]], 7, executor=make)
    # All at once; 0 alone, if it was lost; 1 alone, caught; the rest at once. Of three workers
    # the third had ended trial 2 before 1 died.
    assert [len(executor.futures) for executor in make.made] == submitted


def test_one_executor_serves_a_whole_search_where_nobody_dies():
    make = Makes(lambda: Brittle(3))
    search(smooth, SPACE, WIDE, 7, executor=make)
    assert [len(executor.futures) for executor in make.made] == [14]


def test_no_executor_is_made_for_a_search_that_is_only_replayed(tmp_path):
    finished_log(tmp_path / "log")
    search(smooth, SPACE, SHORT, 4, log=tmp_path / "log", executor=lambda: pytest.fail("made one"))


def test_an_executor_that_was_given_fails_all_that_is_left_and_stays_open():
    executor = Brittle(1)
    result = search(
        Deadly(always={(1, 1)}), SPACE, [[Rung(3, 1), Rung(1, 3)]], 7, executor=executor
    )
    assert [(t.trial, t.loss is None) for t in result.trials] == [
        *((0, False), (1, True), (2, True)),
        (0, True),
    ]
    died = "its worker died, or another: BrokenExecutor: "
    assert [t.error for t in result.trials[1:3]] == [died + "a worker died"] * 2
    assert result.trials[3].error == died + "broken before"
    assert (result.best.trial, result.best.resource) == (0, 1)
    assert executor.open


def test_an_executor_that_never_works_says_so():
    def broken():
        executor = Brittle(1)
        executor.broken = True
        return executor

    with pytest.raises(SearchError, match=r"all 3 trials failed.*its worker died.*broken before"):
        search(smooth, SPACE, [[Rung(3, 1)]], executor=broken)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("where", ["objective", "on_trial"])
def test_an_interrupt_cancels_what_waits(where, made):
    def on_trial(trial, replayed):
        if where == "on_trial" and trial.trial == 1:
            raise KeyboardInterrupt

    make = Makes(lambda: Brittle(1))
    interrupt = KeyboardInterrupt() if where == "objective" else 1.0
    objective = Script({0: 1.0, 1: interrupt, 2: 1.0, 3: 1.0})
    executor = make if made else make()
    with pytest.raises(KeyboardInterrupt) as caught:
        search(objective, SPACE, [[Rung(4, 1)]], executor=executor, on_trial=on_trial)
    (executor,) = make.made
    assert [future.cancelled() for future in executor.futures] == [False, False, True, True]
    assert [call[0] for call in objective.calls] == [0, 1]
    assert executor.open != made
    assert caught.traceback  # kept, so that no garbage collection did the cancelling


def test_an_interrupt_waits_for_what_runs():
    """So that nothing writes to a trial's folder any more, a temporary one's removal included."""
    running, ended, leave = threading.Event(), threading.Event(), threading.Event()

    def objective(configuration, previous, resource, folder):
        if number(folder) == 0:
            running.wait(60)
            threading.Timer(0.05, leave.set).start()
            raise KeyboardInterrupt
        running.set()
        leave.wait(60)
        (folder / "state").touch()
        ended.set()
        return 0.0

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            search(objective, SPACE, [[Rung(2, 1)]], executor=pool)
        assert ended.is_set()


def test_trials_are_logged_as_they_end_in_the_order_of_the_schedule(tmp_path):
    """Each trial waits for its successor to end, the last for none: the order is reversed."""
    log, ended, order, lines = tmp_path / "log", [threading.Event() for _ in range(5)], [], []

    def objective(configuration, previous, resource, folder):
        trial = number(folder)
        if trial < 4 and not ended[trial + 1].wait(60):
            return math.nan
        order.append(trial)
        ended[trial].set()
        return float(-trial)

    with ThreadPoolExecutor(5) as pool:
        result = search(
            objective, SPACE, [[Rung(5, 1)]], log=log, executor=pool,
            on_trial=lambda *_: lines.append(len(records(log))),
        )  # fmt: skip
    assert order == [4, 3, 2, 1, 0]
    assert [t.trial for t in result.trials] == [0, 1, 2, 3, 4]
    assert [record["loss"] for record in records(log)] == [0, -1, -2, -3, -4]
    assert lines == [1, 2, 3, 4, 5]


def test_a_trial_is_logged_while_later_ones_still_run(tmp_path):
    logged = threading.Event()

    def objective(configuration, previous, resource, folder):
        return 0.0 if number(folder) == 0 or logged.wait(60) else math.nan

    with ThreadPoolExecutor(2) as pool:
        result = search(
            objective, SPACE, [[Rung(3, 1)]], log=tmp_path / "log", executor=pool,
            on_trial=lambda *_: records(tmp_path / "log") and logged.set(),
        )  # fmt: skip
    assert [t.loss for t in result.trials] == [0, 0, 0]


# Real processes. Spawned ones: forking a process that has threads is an error from Python 3.12 on.

spawn = functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))


def sleepy(configuration, previous, resource, folder):
    """The later the trial, the sooner it ends; it keeps state, and one in four fails."""
    trial = number(folder)
    time.sleep(max(0, 6 - trial) * 0.01)
    if trial % 4 == 3:
        raise ValueError(f"trial {trial}")
    return Walk()(configuration, previous, resource, folder)


def killed_always(configuration, previous, resource, folder):
    """Trial 1 is killed whenever it runs."""
    if number(folder) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return Walk()(configuration, previous, resource, folder)


def killed_once(configuration, previous, resource, folder):
    """Trial 1 is killed in the middle of its first run."""
    if number(folder) == 1:
        try:
            (folder.parent / "killed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return Walk()(configuration, previous, resource, folder)


def exits(configuration, previous, resource, folder):
    """Trial 0 leaves its process without a word."""
    if number(folder) == 0:
        os._exit(0)
    return 1.0


@pytest.mark.parametrize("retrain", [False, True])
def test_processes_and_threads_change_nothing(retrain, tmp_path):
    def run(name, executor):
        log, place = tmp_path / f"{name}.jsonl", tmp_path / name
        result = search(
            sleepy, SPACE, WIDE, 7, log=log, folder=place, executor=executor, retrain=retrain
        )
        assert folders(place) == folders(tmp_path / "inline")
        return without_seconds(result.trials), result.best[:6], result.resource, records(log)

    expected = run("inline", None)
    assert [r["trial"] for r in expected[3] if r["error"]] == [3, 7]
    with ThreadPoolExecutor(3) as pool:
        assert run("threads", pool) == expected
    assert run("made-threads", functools.partial(ThreadPoolExecutor, 2)) == expected
    with spawn(1) as pool:
        assert run("one", pool) == expected
    with spawn(2) as pool:
        assert run("two", pool) == expected
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("objective", "failed"), [(killed_always, [1]), (killed_once, []), (exits, [0])]
)
def test_a_killed_process_harms_no_other_trial(objective, failed, tmp_path):
    log, place = tmp_path / "log", tmp_path / "state"
    schedule = [[Rung(4, 1), Rung(1, 3)]]
    executor = functools.partial(spawn, 2)
    result = search(objective, SPACE, schedule, 7, log=log, folder=place, executor=executor)

    def harmless(configuration, previous, resource, folder):
        if number(folder) in failed:
            raise RuntimeError
        return 1.0 if objective is exits else Walk()(configuration, previous, resource, folder)

    expected = search(harmless, SPACE, schedule, 7)
    same_but_errors(result.trials, expected.trials, ALONE)
    assert [t.trial for t in result.trials if t.error] == failed
    assert [record["error"] for record in records(log)] == [t.error for t in result.trials]
    assert not multiprocessing.active_children()


def test_a_process_pool_that_was_given_and_broke_does_not_end_the_search(tmp_path):
    with (
        spawn(1) as pool,
        pytest.raises(SearchError, match=r"all 2 trials failed.*BrokenProcessPool"),
    ):
        search(exits, SPACE, [[Rung(2, 1)]], log=tmp_path / "log", executor=pool)
    assert len(records(tmp_path / "log")) == 2


# ------------------------------------------------------------------------------ command line


def command(folder, *arguments):
    shutil.copy(hyperband.__file__, folder)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["81", "3"],
            [
                "s=4: 81@1 -> 27@3 -> 9@9 -> 3@27 -> 1@81   "
                "(297 epochs continuing, 405 retraining)",
                "s=3: 34@3 -> 11@9 -> 3@27 -> 1@81   (276 epochs continuing, 363 retraining)",
                "s=2: 15@9 -> 5@27 -> 1@81   (279 epochs continuing, 351 retraining)",
                "s=1: 8@27 -> 2@81   (324 epochs continuing, 378 retraining)",
                "s=0: 5@81   (405 epochs continuing, 405 retraining)",
            ],
        ),
        (
            ["poster"],
            ["s=3: 27@1 -> 9@3 -> 3@9 -> 3@27   (117 epochs continuing, 162 retraining)"],
        ),
        (["2"], ["s=0: 1@2   (2 epochs continuing, 2 retraining)"]),
    ],
)
def test_command_line_alone_in_an_empty_folder(arguments, lines, tmp_path):
    run = command(tmp_path, "hyperband.py", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == lines
    assert folders(tmp_path) == ["hyperband.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["0"], ["-3"], ["81", "1"], ["81", "-1"], ["81", "3.0"], ["8.1"], ["Poster"]),
        *(["81", "3", "3"], ["--what"], [""], ["9" * 5000], ["81", "²"]),
    ],
)
def test_bad_arguments_cost_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        hyperband.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("hyperband.py: error: ")
    assert err.count("\n") == 1


def test_bad_arguments_give_status_2(tmp_path):
    run = command(tmp_path, "hyperband.py", "81", "1")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "hyperband.py: error: eta must be at least 2, not 1\n"


def test_the_standard_library_alone_is_loaded(tmp_path):
    code = "import sys; old = set(sys.modules); import hyperband; print(*set(sys.modules) - old)"
    run = command(tmp_path, "-c", code)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "hyperband" in loaded
    # multiprocessing calls __main__ that too.
    assert loaded - {"hyperband", "__mp_main__"} <= sys.stdlib_module_names


def test_the_code_in_the_module_docstring_runs():
    result = search(
        lambda configuration, *_: configuration["learning_rate"],
        {"learning_rate": LogUniform(1e-4, 1e-1)},
        hyperband.brackets(27),
        seed=0,
    )
    assert result.best.loss == min(t.loss for t in result.trials)
    assert Path(hyperband.__file__).name == "hyperband.py"


def test_a_full_disk_ends_the_search_and_fails_no_trial(tmp_path):
    def objective(configuration, previous, resource, folder):
        calls.append(resource)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return configuration["x"]

    calls, log = [], tmp_path / "log.jsonl"
    schedule, space = [[Rung(4, 1)]], {"x": Uniform(0, 1)}
    with pytest.raises(OSError, match="No space left"):
        search(objective, space, schedule, log=log)
    assert len(log.read_text().splitlines()) == 2
    assert len(search(objective, space, schedule, log=log).trials) == 4
    assert len(calls) == 3 + 2


def test_a_result_that_cannot_come_back_fails_its_trial():
    class Broken(Executor):
        def submit(self, function, *arguments):
            future = Future()
            if arguments[1]["x"] > 0.5:
                future.set_exception(ModuleNotFoundError("No module named 'torch'"))
            else:
                future.set_result(function(*arguments))
            return future

    space = {"x": Uniform(0, 1)}
    result = search(lambda c, *_: c["x"], space, [[Rung(9, 1)]], executor=Broken())
    failed = [trial for trial in result.trials if trial.error]
    assert {t.error for t in failed} == {"ModuleNotFoundError: No module named 'torch'"}
    assert all((t.configuration["x"] > 0.5) == (t in failed) for t in result.trials)
    assert 0 < len(failed) < 9
