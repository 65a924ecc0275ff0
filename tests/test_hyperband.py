"""hyperband.py: schedule, samplers, search, log, executors, command line. Nothing is timed."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import pytest

import hyperband
from hyperband import Choice, IntUniform, LogUniform, Rung, SearchError, Uniform, replay, search

SPACE = {"x": Uniform(0, 1), "rate": LogUniform(1e-3, 1), "k": IntUniform(1, 8)}
SCHEDULE = [[Rung(5, 1), Rung(2, 3), Rung(2, 9)], [Rung(4, 3), Rung(1, 9)]]  # 14 trials


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


@pytest.mark.parametrize("eta", [2, 3, 4, 5, 10])
def test_brackets_are_algorithm_1(eta):
    # The powers, and a step beside them, are where floating logarithms go wrong.
    powers = [eta**s for s in range(1, 20) if eta**s < 10**6]
    for most in [*range(1, 250), *powers, *(power - 1 for power in powers)]:
        assert hyperband.brackets(most, eta) == algorithm_1(most, eta), most
    assert hyperband.bracket(1, 27, eta) == hyperband.brackets(27, eta)[-2]


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (Uniform(-1, 3), [2.3776874061001925, 2.03181761176121, 0.68228632332338]),
        (LogUniform(1e-4, 1e-1), [0.034140160192072944, 0.018787249753397028]),
        (IntUniform(3, 6), [6, 6, 4, 4, 5, 4]),
        (Choice(["a", "b", None]), [None, None, "b", "a", "b", "b"]),
    ],
)
def test_a_seed_draws_the_same_for_ever(sampler, drawn):
    rng = random.Random(0)
    assert [sampler.sample(rng) for _ in drawn] == drawn
    assert eval(repr(sampler)) == sampler


@pytest.mark.parametrize(("low", "high"), [(1e-300, 1e300), (0.1, 0.1), (1e-4, 0.3), (1, 3)])
def test_ranges_reach_their_ends_and_no_further(low, high):
    first, middle, last = (SimpleNamespace(random=lambda u=u: u) for u in (0.0, 0.5, 1 - 2**-53))
    for sampler in (Uniform(low, high), LogUniform(low, high)):
        assert sampler.sample(first) == low <= sampler.sample(last) <= high
    geometric = math.sqrt(low) * math.sqrt(high)
    assert LogUniform(low, high).sample(middle) == pytest.approx(geometric, rel=1e-13)
    for n in (1, 3, 49, 2**53):
        assert [IntUniform(-2, n - 3).sample(rng) for rng in (first, last)] == [-2, n - 3]
    assert Choice("abc").sample(last) == "c"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hyperband.brackets(3.0), "max_resource must be an integer from 1 to 1000000, not"),
        (lambda: hyperband.brackets(10**7), "max_resource must be"),
        (lambda: hyperband.bracket(3, 26), "s must be an integer from 0 to 2, not 3"),
        (lambda: Uniform(1, 0), "low <= high"),
        (lambda: LogUniform(math.nan, 1), "low <= high"),
        (lambda: LogUniform(0, 1), "0 < low"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(SearchError, match=words):
        call()


def number_of(folder):
    return int(re.fullmatch(r"trial-(\d{4})(-rung-\d)?", folder.name)[1])


def loss_of(number, configuration, resource):
    """Nothing for the second trial, nor for the seventh on its second rung: they fail."""
    if number == 1 or (number, resource) == (6, 9):
        return None
    return configuration["x"] + configuration["rate"] / resource


def walk(configuration, previous, resource, folder):
    """Keep the state in the folder, and fail where it is lost or another's."""
    state = folder / "state.json"
    owner, epochs = json.loads(state.read_text()) if state.exists() else (configuration, 0)
    assert owner == configuration and previous <= epochs <= resource
    state.write_text(json.dumps([configuration, resource]))
    return loss_of(number_of(folder), configuration, resource)


def halving(schedule, seed):
    """Successive halving, plainly: its trials without seconds and errors, and the best."""
    rng, numbers, trials = random.Random(seed), itertools.count(), []
    for b, rungs in enumerate(schedule):
        alive = [
            (0.0, next(numbers), {name: sampler.sample(rng) for name, sampler in SPACE.items()})
            for _ in range(rungs[0][0])
        ]
        for i, (n, r) in enumerate(rungs):
            done = [(b, i, k, drawn, r, loss_of(k, drawn, r)) for _, k, drawn in alive[:n]]
            trials += done
            alive = sorted((t[5], t[2], t[3]) for t in done if t[5] is not None)
    good = [t for t in trials if t[5] is not None]
    return trials, min(good, key=lambda t: (-t[4], t[5], t[2]))


def short(result):
    return [t[:6] for t in result.trials], result.best[:6]


def records(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def names(folder):
    return [path.name for path in folder.iterdir()]


spawn = functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize("retrain", [False, True])
@pytest.mark.parametrize("make", [nullcontext, lambda: ThreadPoolExecutor(4), lambda: spawn(2)])
def test_search_is_successive_halving_whatever_runs_it(make, retrain, tmp_path):
    log, place, seen = tmp_path / "new" / "log.jsonl", tmp_path / "state", []
    keep = {"log": log, "folder": place, "on_trial": lambda *reported: seen.append(reported)}
    with make() as executor:
        result = search(walk, SPACE, SCHEDULE, 4, **keep, retrain=retrain, executor=executor)
    assert short(result) == halving(SCHEDULE, 4)
    assert seen == [(trial, False) for trial in result.trials]
    assert records(log) == [trial._asdict() for trial in result.trials]
    last = f"-rung-{result.best.rung}" if retrain else ""
    assert names(place) == [f"trial-{result.best.trial:04d}{last}"]
    assert replay(log, SPACE, SCHEDULE, 4, retrain) == result


def test_a_brackets_losers_leave_the_disk(tmp_path):
    counts = {}  # of the folders at the first trial of a bracket
    search(
        *(walk, SPACE, SCHEDULE, 4),
        folder=tmp_path,
        on_trial=lambda trial, _: counts.setdefault(trial.bracket, len(names(tmp_path))),
    )
    assert counts[1] == 2  # the best of the bracket before, and its own


def script(losses):
    """An objective with losses by (trial, resource), or by trial; an exception is raised."""

    def objective(configuration, previous, resource, folder):
        number = number_of(folder)
        objective.calls.append((number, previous, resource))
        loss = losses.get((number, resource), losses.get(number, 0.0))
        if isinstance(loss, BaseException):
            raise loss
        return loss

    objective.calls = []
    return objective


@pytest.mark.parametrize("retrain", [False, True])
def test_a_tie_goes_to_the_earlier_trial_and_the_largest_resource_decides(retrain):
    losses = {0: 0.5, 1: 0.2, 2: 0.2, 3: 0.2, (1, 4): 0.9, (2, 4): 0.9, 4: 0.1, (4, 4): 0.9}
    objective, schedule = script(losses), [[Rung(4, 1), Rung(2, 4)], [Rung(1, 4)], [Rung(1, 3)]]
    best = search(objective, SPACE, schedule, retrain=retrain).best
    assert objective.calls == [
        *((number, 0, 1) for number in range(4)),
        *((1, 1 - retrain, 4), (2, 1 - retrain, 4)),
        *((4, 0, 4), (5, 0, 3)),
    ]
    assert (best.trial, best.loss) == (1, 0.9)  # trial 5 has 0 at less


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-math.inf, "the loss is -inf"),
        (math.nan, "the loss is nan"),
        (ValueError("two\nlines, \udcff"), r"ValueError('two\nlines, \udcff')"),
        ("text", """ValueError("could not convert string to float: 'text'")"""),
    ],
)
def test_a_failed_trial_is_logged_and_never_goes_on(bad, error, tmp_path):
    log, schedule = tmp_path / "log", [[Rung(3, 1), Rung(3, 2), Rung(2, 3)]]
    result = search(script({0: bad, (2, 2): bad, 1: 5.0}), SPACE, schedule, log=log)
    assert [(t.trial, t.error) for t in result.trials] == [
        *((0, error), (1, None), (2, None)),
        *((2, error), (1, None)),
        (1, None),
    ]
    assert replay(log, SPACE, schedule) == result


def test_where_all_fail_the_search_says_so():
    objective = script(dict.fromkeys(range(3), ZeroDivisionError("why")))
    with pytest.raises(SearchError, match=r"^all 3 trials failed; the first: ZeroDivisionError"):
        search(objective, SPACE, [[Rung(3, 1), Rung(1, 2)]])


def test_an_objective_gets_a_copy_of_what_is_logged():
    space = {"v": Choice([(0,)])}  # a list in the log, hence for the objective
    result = search(lambda c, *_: c["v"].append(1) or 0.0, space, [[Rung(2, 1), Rung(1, 2)]])
    assert [t.configuration for t in result.trials] == [{"v": [0]}] * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The lines of a finished search's log, and its result."""
    log = tmp_path_factory.mktemp("finished") / "log.jsonl"
    result = search(walk, SPACE, SCHEDULE, 4, log=log)
    return log.read_bytes().splitlines(keepends=True), result


def dying(at):
    """`walk`, interrupted in the middle of call number `at`."""
    calls = itertools.count()

    def objective(configuration, previous, resource, folder):
        if next(calls) == at:
            walk(configuration, previous, (previous + resource + 1) // 2, folder)
            raise KeyboardInterrupt
        return walk(configuration, previous, resource, folder)

    return objective


@pytest.mark.parametrize("retrain", [False, True])
def test_killed_anywhere_a_search_goes_on(retrain, finished, tmp_path):
    lines, result = finished
    for k, line in enumerate(lines):
        log, seen = tmp_path / f"log-{k}", []
        keep = {"log": log, "folder": tmp_path / f"state-{k}", "retrain": retrain}
        with pytest.raises(KeyboardInterrupt):
            search(dying(k), SPACE, SCHEDULE, 4, **keep)
        with log.open("ab") as file:
            file.write(line[: (1, 40, -1)[k % 3]])  # what a kill leaves of a line
        left = log.read_bytes()
        with pytest.raises(SearchError, match="the log ends before the search does"):
            replay(log, SPACE, SCHEDULE, 4, retrain)
        assert log.read_bytes() == left and left.count(b"\n") == k
        keep["on_trial"] = lambda trial, replayed, seen=seen: seen.append(replayed)
        again = search(walk, SPACE, SCHEDULE, 4, **keep)
        assert short(again) == short(result)
        assert records(log) == [trial._asdict() for trial in again.trials]
        assert seen == [n < k for n in range(len(lines))]
        assert len(names(keep["folder"])) == 1


def test_a_full_disk_ends_the_search_and_fails_no_trial(tmp_path):
    log, losses = tmp_path / "log", {2: OSError(28, "No space left on device")}
    with pytest.raises(OSError, match="No space"):
        search(script(losses), SPACE, [[Rung(4, 1)]], log=log)
    assert [record["trial"] for record in records(log)] == [0, 1]


def exits_once(configuration, previous, resource, folder):
    """Trial 2 takes its process along, the first time."""
    if number_of(folder) == 2 and not (folder / "been here").exists():
        (folder / "been here").touch()
        os._exit(1)
    return walk(configuration, previous, resource, folder)


def test_a_dead_worker_ends_the_search_which_then_goes_on(finished, tmp_path):
    keep = {"log": tmp_path / "log", "folder": tmp_path / "state"}
    with spawn(1) as pool, pytest.raises(SearchError, match=r"BrokenProcessPool.+ goes on"):
        search(exits_once, SPACE, SCHEDULE, 4, **keep, executor=pool)
    assert len(records(keep["log"])) == 2
    assert short(search(exits_once, SPACE, SCHEDULE, 4, **keep)) == short(finished[1])


def test_an_interrupt_waits_for_no_trial():
    begun, leave, ended = threading.Event(), threading.Event(), []

    def objective(configuration, previous, resource, folder):
        if number_of(folder) > 0:
            begun.set()
            assert leave.wait(60)
        ended.append(number_of(folder))
        assert begun.wait(60)
        return 0.0

    def on_trial(trial, replayed):
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt) as caught:
            search(objective, SPACE, [[Rung(9, 1)]], executor=pool, on_trial=on_trial)
        assert ended == [0]
        leave.set()
    assert {*ended} <= {0, 1, 2}  # two workers: the others were cancelled
    assert caught.traceback  # kept, so that no garbage collection did the cancelling


def edited(lines, number, **changes):
    record = json.loads(lines[number - 1]) | changes
    return [*lines[: number - 1], json.dumps(record).encode() + b"\n", *lines[number:]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [*lines[:2], b"not json \xff\n"], "line 3 is damaged; remove it and what"),
        (lambda lines: [b"[]\n"], "line 1 is damaged"),
        (lambda lines: [*lines, b"another file's text"], "line 15 is damaged"),
        (lambda lines: edited(lines, 2, crc32="00"), "line 2 is damaged"),
        (lambda lines: edited(lines, 2, loss="low"), "line 2 is damaged"),
        (lambda lines: edited(lines, 2, loss=math.inf), "line 2 is damaged"),
        (lambda lines: edited(lines, 2, configuration={"x": 0.5}), "line 2 has"),
        # The worst of the first rung made the best: another trial should have gone on.
        (lambda lines: edited(lines, 1, loss=-1.0), "line 6 has .* belongs to another search"),
        (lambda lines: [*lines, lines[-1]], "line 15 belongs to another search"),
    ],
)
def test_a_bad_log_is_refused_and_left_alone(damage, words, finished, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(damage(finished[0])))
    before = log.read_bytes()
    for go in (functools.partial(search, walk, log=log), functools.partial(replay, log)):
        with pytest.raises(SearchError, match=f"^{re.escape(str(log))}: {words}"):
            go(space=SPACE, schedule=SCHEDULE, seed=4)
        assert log.read_bytes() == before
    assert names(tmp_path) == ["log"]


def test_alone_in_an_empty_folder_it_prints_table_1_of_the_paper(tmp_path):
    shutil.copy(hyperband.__file__, tmp_path)
    # -I -S: nothing but the standard library can be imported.
    command = [sys.executable, "-I", "-S", "hyperband.py", "81", "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        " s   epochs  retraining  n@r: n configurations up to r epochs each",
        " 4      297         405  81@1 -> 27@3 -> 9@9 -> 3@27 -> 1@81",
        " 3      276         363  34@3 -> 11@9 -> 3@27 -> 1@81",
        " 2      279         351  15@9 -> 5@27 -> 1@81",
        " 1      324         378  8@27 -> 2@81",
        " 0      405         405  5@81",
    ]


def test_without_arguments_the_posters_bracket_is_printed(capsys):
    assert hyperband.main([]) == hyperband.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert hyperband.__doc__ in out
    assert " 3      117         162  27@1 -> 9@3 -> 3@9 -> 3@27\n" in out


def test_a_closed_pipe_leaves_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, hyperband.__file__, "81"]
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert run.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0"], "max_resource must be an integer from 1"),
        (["81", "1"], "eta must be an integer from 2"),
        (["8.1"], "'8.1'; expected"),
        (["81", "3", "1"], "3 were given; expected"),
    ],
)
def test_bad_arguments_cost_one_line(arguments, words, capsys):
    assert hyperband.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"hyperband.py: error: .*{words}.*\n", err)
