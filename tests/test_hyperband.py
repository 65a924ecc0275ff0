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

import numpy as np
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


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (Uniform(-1, 3), [2.3776874061001925, 2.03181761176121, 0.68228632332338]),
        (LogUniform(1e-4, 1e-1), [0.0341402, 0.0187872, 0.0018269, 0.000598068, 0.00341841]),
        (IntUniform(3, 6), [6, 6, 4, 4, 5, 4]),
        (Choice(["a", "b", None]), [None, None, "b", "a", "b", "b"]),
    ],
)
def test_a_seed_draws_the_same_for_ever(sampler, drawn):
    rng = random.Random(0)
    assert [sampler.sample(rng) for _ in drawn] == drawn
    assert eval(repr(sampler)) == sampler


@pytest.mark.parametrize(("low", "high"), [(1e-300, 1e300), (1, 3), (0.12345678, 0.12345678)])
def test_ranges_reach_their_ends_and_no_further(low, high):
    first, middle, last = (SimpleNamespace(random=lambda u=u: u) for u in (0.0, 0.5, 1 - 2**-53))
    close = functools.partial(pytest.approx, rel=5e-6, abs=0)
    for sampler in (Uniform(low, high), LogUniform(low, high)):
        lowest, highest = sampler.sample(first), sampler.sample(last)
        assert (lowest, highest) == (close(low), close(high))
        assert low <= lowest <= highest <= high
    assert LogUniform(low, high).sample(middle) == close(math.sqrt(low) * math.sqrt(high))
    for n in (1, 3, 49, 2**53):
        assert [IntUniform(-2, n - 3).sample(rng) for rng in (first, last)] == [-2, n - 3]
    assert Choice("abc").sample(last) == "c"


NO_BOUNDS = (0, math.inf), (0, math.nan), (1, 0), ("0", "1"), (0, 10**400), (np.zeros((2, 2)), 1)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (Uniform, [*NO_BOUNDS, (-math.inf, 0), (None, 1), (-1e308, 1e308)]),
        (LogUniform, [*NO_BOUNDS, (0, 1), (-1, 1)]),
        (IntUniform, [*NO_BOUNDS, (1.5, 4), (False, 4), (np.int64(1), 4)]),
        (Choice, [([],), ({1, 2},), ({1: 2},), (3,), (np.zeros((2, 2)),), ([np.int64(8)],)]),
        (Choice, [([math.nan],), ([0, -math.inf],), ([{1}],), (b"",)]),
        (hyperband.brackets, [(3.0,), ("3",), (0,), (10**6 + 1,), (10**5000,), (3, 1), (3, None)]),
    ],
)
def test_bad_arguments_are_refused_in_one_line(function, calls):
    for arguments in calls:
        with pytest.raises(SearchError, match=r"^.+$"):
            function(*arguments)


def number_of(folder):
    return int(re.fullmatch(r"trial-(\d{4})-[0-9a-f]{8}(-rung-\d)?", folder.name)[1])


def loss_of(number, configuration, resource):
    """Return a loss with ties; none for the second trial, and the seventh on its second rung."""
    if number == 1 or (number, resource) == (6, 9):
        return None
    return {1: configuration["x"], 3: configuration["k"] // 2, 9: configuration["k"] // 4}[resource]


def walk(configuration, previous, resource, folder):
    """Keep the state in the folder, and fail where it is lost or another's."""
    state = folder / "state.json"
    owner, epochs, finished = [configuration, 0, 0]
    if state.exists():
        owner, epochs, finished = json.loads(state.read_text())
    assert owner == configuration and finished == previous <= epochs <= resource
    state.write_text(json.dumps([configuration, resource, resource]))
    loss = loss_of(number_of(folder), configuration, resource)
    configuration.clear()  # which is a copy
    return loss


def halving(schedule, seed):
    """Return the trials, without seconds and errors, and the best: successive halving, plainly."""
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


spawn = functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize(("seed", "retrain"), [(1, False), (11, True)])  # have ties of all kinds
@pytest.mark.parametrize("make", [nullcontext, lambda: ThreadPoolExecutor(4), lambda: spawn(2)])
def test_search_is_successive_halving_whatever_runs_it(make, seed, retrain, tmp_path):
    log, place, seen = tmp_path / "new" / "log.jsonl", tmp_path / "state", []
    keep = {"log": log, "folder": place, "on_trial": lambda *reported: seen.append(reported)}
    with make() as executor:
        result = search(walk, SPACE, SCHEDULE, seed, **keep, retrain=retrain, executor=executor)
    assert short(result) == halving(SCHEDULE, seed)
    assert seen == [(trial, False) for trial in result.trials]
    assert records(log) == [trial._asdict() for trial in result.trials]
    assert replay(log, SPACE, SCHEDULE, seed) == result
    [left] = place.iterdir()
    assert number_of(left) == result.best.trial
    assert left.name.endswith(f"-rung-{result.best.rung}") == retrain


def test_the_log_says_why_a_trial_failed(tmp_path):
    outcomes = [-math.inf, math.nan, ValueError("two\nlines, \udcff"), "text", 0.5]

    def objective(configuration, previous, resource, folder):
        outcome = outcomes[number_of(folder)]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    log, schedule, space = tmp_path / "log", [[Rung(5, 1)]], {"x": Choice([(1, "tuple")])}
    result = search(objective, space, schedule, log=log)
    assert [trial.error for trial in result.trials] == [
        "the loss is -inf",
        "the loss is nan",
        r"ValueError('two\nlines, \udcff')",
        """ValueError("could not convert string to float: 'text'")""",
        None,
    ]
    assert replay(log, space, schedule) == result
    for empty in [], [[]]:
        with pytest.raises(SearchError, match=r"^a schedule has at least one bracket"):
            search(objective, space, empty)
    with pytest.raises(SearchError, match=r"^all 3 trials failed; the first: the loss is -inf$"):
        search(objective, space, [[Rung(3, 1), Rung(1, 2)]])


def dying(at):
    """Return `walk`, interrupted in the middle of call number `at`."""
    calls = itertools.count()

    def objective(configuration, previous, resource, folder):
        if next(calls) == at:
            state = [configuration, previous + 1, previous]
            (folder / "state.json").write_text(json.dumps(state))
            raise KeyboardInterrupt
        return walk(configuration, previous, resource, folder)

    return objective


@pytest.mark.parametrize("retrain", [False, True])
def test_killed_anywhere_a_search_goes_on(retrain, tmp_path):
    for k in range(14):
        log, seen = tmp_path / f"log-{k}", []
        keep = {"log": log, "folder": tmp_path / f"state-{k}", "retrain": retrain}
        with pytest.raises(KeyboardInterrupt):
            search(dying(k), SPACE, SCHEDULE, 1, **keep)
        with log.open("ab") as file:
            file.write((b"{", b'{"bracket": 0, "ru', b'{"bracket": 0}')[k % 3])  # a cut line
        left = log.read_bytes()
        with pytest.raises(SearchError, match="the log ends before the search does"):
            replay(log, SPACE, SCHEDULE, 1)
        assert log.read_bytes() == left and left.count(b"\n") == k
        keep["on_trial"] = lambda trial, replayed, seen=seen: seen.append(replayed)
        again = search(walk, SPACE, SCHEDULE, 1, **keep)
        assert short(again) == halving(SCHEDULE, 1)
        assert records(log) == [trial._asdict() for trial in again.trials]
        assert seen == [n < k for n in range(14)]
        assert len([*keep["folder"].iterdir()]) == 1


@pytest.mark.parametrize("log", [None, "new.jsonl"])
def test_a_new_search_refuses_the_folder_of_another(log, tmp_path):
    search(walk, SPACE, SCHEDULE, 1, folder=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SearchError, match=r"^.+ holds trials of another search: remove .+$"):
        search(walk, SPACE, SCHEDULE, 1, folder=tmp_path, log=log and tmp_path / log)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_seed_gets_no_state_of_a_search_killed_in_its_first_trial(tmp_path):
    keep = {"log": tmp_path / "log", "folder": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        search(dying(0), SPACE, SCHEDULE, 1, **keep)
    assert short(search(walk, SPACE, SCHEDULE, 5, **keep)) == halving(SCHEDULE, 5)


def test_a_full_disk_ends_the_search_and_fails_no_trial(tmp_path):
    def objective(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        search(objective, SPACE, SCHEDULE, log=tmp_path / "log")
    assert records(tmp_path / "log") == []


def dies_in_a_worker(configuration, previous, resource, folder):
    if number_of(folder) == 2 and multiprocessing.parent_process():
        os._exit(1)
    return walk(configuration, previous, resource, folder)


def test_a_dead_worker_ends_the_search_which_then_goes_on(tmp_path):
    keep = {"log": tmp_path / "log", "folder": tmp_path / "state"}
    with spawn(1) as pool, pytest.raises(SearchError, match="run again: BrokenProcessPool"):
        search(dies_in_a_worker, SPACE, SCHEDULE, 1, **keep, executor=pool)
    assert len(records(keep["log"])) == 2
    assert short(search(dies_in_a_worker, SPACE, SCHEDULE, 1, **keep)) == halving(SCHEDULE, 1)


def test_an_interrupt_waits_for_no_trial():
    leave, ended = threading.Event(), []

    def objective(configuration, previous, resource, folder):
        assert number_of(folder) == 0 or leave.wait(60)
        ended.append(number_of(folder))
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
        (lambda lines: [*lines[:2], b"not json \xff\n"], ": line 3 is damaged: remove it"),
        (lambda lines: [*lines, b"another file's text"], ": line 15 is damaged"),
        (lambda lines: edited(lines, 2, loss="low"), ": line 2 is damaged"),
        (lambda lines: edited(lines, 2, loss=math.inf), ": line 2 is damaged"),
        (lambda lines: edited(lines, 2, configuration={"x": 0.5}), ": line 2 has "),
        # With this loss, trial 0 would have been the first of the second rung.
        (lambda lines: edited(lines, 1, loss=-1.0), r": line 6 has \(0, 1, 3, .* not \(0, 1, 0,"),
        (lambda lines: [*lines, lines[-1]], ": line 15 is not of this search"),
    ],
)
def test_a_bad_log_is_refused_and_left_alone(damage, words, tmp_path):
    log = tmp_path / "log"
    search(walk, SPACE, SCHEDULE, 1, log=log)
    log.write_bytes(b"".join(damage(log.read_bytes().splitlines(keepends=True))))
    before = log.read_bytes()
    for go in (functools.partial(search, walk, log=log), functools.partial(replay, log)):
        with pytest.raises(SearchError, match=f"^{re.escape(str(log))}{words}"):
            go(space=SPACE, schedule=SCHEDULE, seed=1)
        assert log.read_bytes() == before
    assert [*tmp_path.iterdir()] == [log]


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
    assert " 3      117         162  27@1 -> 9@3 -> 3@9 -> 3@27\n" in capsys.readouterr().out


BAD_WORDS = ["0", "9 1", "8.1", "²", "9 3 1", "81 >/dev/full"]


@pytest.mark.parametrize(
    ("words", "status"), [*((words, 2) for words in BAD_WORDS), ("81 >&-", 0), ("81 | :", 0)]
)
def test_an_error_costs_one_line_and_no_reader_none(words, status):
    # -E: PYTHONUNBUFFERED would hide what is left in a buffer until Python's exit.
    command = f"'{sys.executable}' -E '{hyperband.__file__}' {words}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (status, "")
    assert re.fullmatch("hyperband.py: error: .+\n" if status else "", run.stderr)
