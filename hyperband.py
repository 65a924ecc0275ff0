"""Hyperband and successive halving, exact in integers, on the standard library alone.

``python hyperband.py 81 3`` prints the brackets for at most 81 epochs a trial and eta = 3;
``python hyperband.py`` prints the poster's. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1. Its letters, and our names:

- R is `max_resource`, the most that one trial may use, in epochs here: 1 to 1,000,000;
- eta is `eta`, one in eta configurations survives a rung: 2 to 1,000,000;
- s numbers the brackets, s_max = floor(log_eta(R)) down to 0; bracket s prunes s times;
- n_i and r_i are a rung's ``configurations`` and ``resource``; r_i is cumulative.
"""

import argparse
import contextlib
import copy
import decimal
import functools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class SearchError(ValueError):
    """Bad bounds, a damaged or foreign log, an executor that failed, or only failed trials."""


# ---- schedule ------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One round of a bracket: this many configurations, each up to this resource in total."""

    configurations: int
    resource: int


# The poster's figure. Its last rung confirms the same three instead of pruning to one.
POSTER_BRACKET = [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(3, 27)]


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise SearchError(f"{name} must be an integer from {least} to {most}, not {value!r}")


def _s_max(max_resource: int, eta: int) -> int:
    """Return the largest s with ``eta**s <= max_resource``, after checking both."""
    _check_integer("max_resource", max_resource, 1, 10**6)  # about a million configurations
    _check_integer("eta", eta, 2, 10**6)
    # Not floor(log(R) / log(eta)): in floating point that is 4 for R = 243, eta = 3.
    s = 0
    while eta ** (s + 1) <= max_resource:
        s += 1
    return s


def bracket(s: int, max_resource: int, eta: int = 3) -> list[Rung]:
    """Give the s + 1 rungs of bracket `s` (0 .. s_max) of Algorithm 1, the cheapest first."""
    s_max = _s_max(max_resource, eta)
    _check_integer("s", s, 0, s_max)
    n = -(-(s_max + 1) * eta**s // (s + 1))  # ceil(B/R * eta^s / (s + 1)), B = (s_max + 1) * R
    return [Rung(n // eta**i, max_resource // eta ** (s - i)) for i in range(s + 1)]


def brackets(max_resource: int, eta: int = 3) -> list[list[Rung]]:
    """Give every bracket of Hyperband, s = s_max .. 0."""
    return [bracket(s, max_resource, eta) for s in range(_s_max(max_resource, eta), -1, -1)]


def total_resource(rungs: Sequence[Rung], retrain: bool = False) -> int:
    """Count the resource (epochs) that one bracket spends.

    A survivor continues from its last rung, or with `retrain` starts again from nothing:
    the poster's flow costs 117 epochs or 162.
    """
    before = [0, *(0 if retrain else r for _, r in rungs[:-1])]
    return sum(n * (r - b) for (n, r), b in zip(rungs, before, strict=True))


# ---- search space --------------------------------------------------------------------------------
# Samplers use `Random.random` alone, the one method whose sequence Python promises to keep, and
# no function of the C library, whose last digits differ: a seed gives the same configurations on
# every machine and Python version. The repr of a sampler says all of it.


@dataclass(frozen=True)
class Choice:
    """One of `values` (JSON values), each as likely."""

    values: Sequence

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise SearchError(f"{self} needs low <= high")


@dataclass(frozen=True)
class Uniform(_Range):
    """A float from `low` to `high`."""

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        return self.low + (self.high - self.low) * rng.random()


@dataclass(frozen=True)
class IntUniform(_Range):
    """An integer from `low` to `high` (integers), both included."""

    def sample(self, rng: random.Random) -> int:
        """Draw one integer."""
        return self.low + int(rng.random() * (self.high - self.low + 1))


@dataclass(frozen=True)
class LogUniform(_Range):
    """A float from `low` to `high` (both above 0) whose logarithm is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise SearchError(f"{self} needs low above 0")

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        exact = decimal.Context(prec=30)  # ln and exp are correctly rounded here, unlike math's
        u = decimal.Decimal(rng.random())
        low, high = (exact.ln(decimal.Decimal(value)) for value in (self.low, self.high))
        # 30 digits are so many more than a float's that both ends are met exactly.
        return float(exact.exp(exact.add(low, exact.multiply(exact.subtract(high, low), u))))


# ---- the algorithm -------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What one configuration attained on one rung: a line of the log."""

    bracket: int  # position of its bracket in the schedule, from 0
    rung: int  # position of the rung in its bracket, from 0
    trial: int  # number of the configuration, counted from 0 over the whole search
    configuration: dict[str, Any]
    resource: int  # cumulative, at which `loss` was measured
    loss: float | None  # finite; None where the trial failed
    seconds: float
    error: str | None  # why the trial failed, else None


class SearchResult(NamedTuple):
    """The end of a search."""

    best: Trial  # the lowest loss at the largest resource reached; the earlier trial of a tie
    trials: list[Trial]  # every finished trial, in the order of the schedule


def _hyperband(
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int,
    retrain: bool,
    recorded: list[tuple[str, Trial]],
    run: Callable[[list[Trial], list[tuple], int], list[Trial]],
    drop: Callable[[Trial], Any],
) -> SearchResult:
    """Do Algorithm 1 with any schedule: the one loop of `search` and `replay`.

    `recorded` is what `_read_log` returns. ``run(trials, plans, previous)`` completes a rung's
    trials, of which the log had the first; a plan is a trial's first five fields.
    ``drop(trial)`` is called for each whose state on its rung nobody needs any more.
    """
    rng, lines, finished, count = random.Random(seed), iter(recorded), [], 0
    for b, rungs in enumerate(schedule):  # for s in s_max .. 0
        previous, entrants = 0, []
        for _ in range(rungs[0].configurations):  # T
            drawn = {name: sampler.sample(rng) for name, sampler in space.items()}
            # As the log would give it back, so that a replayed trial is the same.
            entrants.append((count, json.loads(json.dumps(drawn, allow_nan=False))))
            count += 1
        for i, (_, r_i) in enumerate(rungs):
            plans = [(b, i, number, drawn, r_i) for number, drawn in entrants]
            trials = run(_recall(lines, plans), plans, previous)
            finished += trials
            # T = top_k(T, L, n_(i+1)); what failed never goes on, so there may be fewer.
            last = i + 1 == len(rungs)
            k = 1 if last else rungs[i + 1].configurations
            good = [t for t in trials if t.loss is not None]
            top = sorted(good, key=lambda t: (t.loss, t.trial))[:k]
            entrants = [(t.trial, t.configuration) for t in top]
            for t in trials:
                if t not in top or (retrain and not last):
                    drop(t)
            previous = 0 if retrain else r_i
    for where, _ in lines:
        raise SearchError(f"{where} belongs to another search, as this one ends a line before")
    good = [t for t in finished if t.loss is not None]
    if not good:
        raise SearchError(f"all {len(finished)} trials failed; the first: {finished[0].error}")
    best = min(good, key=lambda t: (-t.resource, t.loss, t.trial))
    for t in finished:
        if t.trial != best.trial:  # the other brackets' best
            drop(t)
    return SearchResult(best, finished)


def _recall(lines: Iterator[tuple[str, Trial]], plans: list[tuple]) -> list[Trial]:
    """Take the trials of these plans, or as many as are left, from a log's lines."""
    trials = []
    for plan, (where, trial) in zip(plans, lines, strict=False):
        logged, planned = json.dumps(trial[:5]), json.dumps(plan)  # as text 1, 1.0, true differ
        if logged != planned:
            raise SearchError(
                f"{where} belongs to another search or was changed: it has {logged}, this search "
                f"{planned}; give this search another log"
            )
        trials.append(trial)
    return trials


# ---- search --------------------------------------------------------------------------------------


def search(
    objective: Callable[[dict[str, Any], int, int, Path], float],
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
    *,
    log: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    retrain: bool = False,
    executor: Executor | None = None,
    on_trial: Callable[[Trial, bool], Any] = lambda trial, replayed: None,
) -> SearchResult:
    """Minimise `objective` over `space` by successive halving.

    Within a bracket the best of a rung go on to the next; ties keep the earlier trial. A trial
    that raises, or whose loss is NaN or infinite, has failed: it is logged and never goes on. An
    OSError (a full disk) ends the search instead, as no configuration is to blame for it.

    Parameters
    ----------
    objective : callable
        ``objective(configuration, previous, resource, folder) -> loss``: bring the trial from
        `previous` to `resource` (cumulative) and return its loss, lower is better. `folder` is
        the trial's own and still holds what its last call left there; after an interrupted run it
        may hold more than `previous`, up to `resource`. With a process executor it must pickle.
    space : mapping of str to sampler
        Anything with ``.sample(random.Random)`` that gives JSON values, such as `Choice`; drawn in
        the mapping's order. A tuple becomes a list.
    schedule : sequence of brackets
        ``brackets(81)`` or ``[POSTER_BRACKET]``: in a bracket n never grows and r never falls.
    seed : int
        Decides every configuration; 0 or more.
    log : path, optional
        One JSON line a finished trial: the fields of `Trial`. Where it holds lines already, the
        search replays them and continues after the last; a line that was cut off is dropped.
    folder : path, optional
        Where the trials keep their state, as ``trial-0007``; a temporary folder by default, so give
        one where `log` is to be continued by an objective that keeps state. A folder whose trial is
        out is removed, so at the end only the best trial's is left.
    retrain : bool
        Start every rung again from nothing (`previous` is 0, the folder a new one, such as
        ``trial-0007-rung-1``), as the poster's upstream code did.
    executor : concurrent.futures.Executor, optional
        Runs the trials of a rung side by side; results and log do not depend on it. When the
        search ends early, trials that run are not waited for: end them before it goes on.
    on_trial : callable
        ``on_trial(trial, replayed)`` after every finished trial, in the order of the schedule.

    Raises
    ------
    SearchError
        The log belongs to another search or is damaged, every trial failed, or the executor did
        (a dead worker); after the last, the same call goes on from the log.
    OSError
        The log or a trial's state can't be written; here, too, the same call goes on.
    """
    recorded = []
    if log is not None:
        log = Path(log)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            recorded, cut = _read_log(log)
            if cut:
                os.truncate(log, log.stat().st_size - len(cut))

    def folder_of(number: int, rung: int) -> Path:
        return Path(place, f"trial-{number:04d}" + (f"-rung-{rung}" if retrain and rung else ""))

    def drop(trial: Trial) -> None:
        shutil.rmtree(folder_of(trial.trial, trial.rung), ignore_errors=True)

    def run(trials: list[Trial], plans: list[tuple], previous: int) -> list[Trial]:
        for trial in trials:
            on_trial(trial, True)
        plans = plans[len(trials) :]
        calls = [(drawn, previous, r, folder_of(n, i)) for _, i, n, drawn, r in plans]
        # Closed, what has not begun is cancelled; to wait for what has would hold up Ctrl-C.
        with contextlib.closing(_outcomes(objective, calls, executor)) as outcomes:
            for plan, outcome in zip(plans, outcomes, strict=True):
                trial = Trial(*plan, *outcome)
                if log is not None:
                    with log.open("a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(trial._asdict(), allow_nan=False) + "\n")
                trials.append(trial)
                on_trial(trial, False)
        return trials

    state = contextlib.nullcontext(folder)
    if folder is None:  # where a trial that is not waited for may still write
        state = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with state as place:
        return _hyperband(space, schedule, seed, retrain, recorded, run, drop)


def _outcomes(objective: Callable, calls: list[tuple], executor: Executor | None) -> Iterator:
    """Yield what `_evaluate` returns for each call, in the order of the calls."""
    each = map if executor is None else executor.map
    try:
        yield from each(functools.partial(_evaluate, objective), calls)
    except OSError:
        raise
    except Exception as error:  # not the objective's: a dead worker, what does not pickle
        raise SearchError(
            f"the executor failed: {error!r}; start the same search again to go on from its log"
        ) from error


def _evaluate(objective: Callable, call: tuple) -> tuple[float | None, float, str | None]:
    """Run one trial, maybe in another process; return its loss, seconds and error."""
    configuration, previous, resource, folder = call
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        loss = float(objective(copy.deepcopy(configuration), previous, resource, folder))
        error = None if math.isfinite(loss) else f"the loss is {loss}"
    except OSError:
        raise  # a full disk or a folder that is gone is no configuration's fault
    except Exception as exc:
        error = repr(exc)
    return None if error else loss, time.perf_counter() - started, error


# ---- log -----------------------------------------------------------------------------------------


def replay(
    log: str | os.PathLike,
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
    retrain: bool = False,
) -> SearchResult:
    """Go through the log of a finished search without its objective; write nothing.

    Configurations, promotions and the best are worked out anew and compared with the log; losses,
    seconds and errors are taken from it. Arguments, result and errors are those of `search`; it is
    a SearchError, too, where the log ends before the search does.
    """
    recorded, _ = _read_log(Path(log))

    def run(trials: list[Trial], plans: list[tuple], previous: int) -> list[Trial]:
        if len(trials) < len(plans):
            raise SearchError(
                f"{log}: the log ends before the search does; start the same search again to finish"
            )
        return trials

    return _hyperband(space, schedule, seed, retrain, recorded, run, lambda trial: None)


def _read_log(log: Path) -> tuple[list[tuple[str, Trial]], bytes]:
    """Read the finished trials, each with its place, and what a kill left of a last line."""
    *lines, cut = log.read_bytes().split(b"\n")
    if not cut.startswith(b'{"bracket": '[: len(cut)]):
        lines.append(b"")  # not ours: a wrong file, to be refused and left as it is
    recorded = []
    for number, line in enumerate(lines, 1):
        where = f"{log}: line {number}"
        try:
            trial = Trial(**json.loads(line))
            fit = trial.loss is None if trial.error else abs(trial.loss) < math.inf  # NaN is not
            fit = fit and 0 <= trial.seconds < math.inf
        except (ValueError, TypeError):  # no JSON, other fields, a value of another type
            fit = False
        if not fit:
            raise SearchError(
                f"{where} is damaged; remove it and the lines after it to run those trials again"
            )
        recorded.append((where, trial))
    return recorded, cut


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the brackets for R and eta, or the poster's."""
    parser = argparse.ArgumentParser(
        prog="hyperband.py", description="Print Hyperband's brackets, or the poster's without R."
    )
    # One line, without the usage.
    parser.error = lambda text: parser.exit(2, f"hyperband.py: error: {text}\n")
    parser.add_argument("R", nargs="?", type=int, help="most epochs a trial may use")
    parser.add_argument("eta", nargs="?", type=int, default=3, help="one in eta survives; 3")
    arguments = parser.parse_args(argv)
    schedule = [POSTER_BRACKET]
    if arguments.R is not None:
        try:
            schedule = brackets(arguments.R, arguments.eta)
        except SearchError as error:
            parser.error(str(error))
    lines = [" s   epochs  retraining  n@r: n configurations up to r epochs each"]
    for rungs in schedule:
        flow = " -> ".join(f"{n}@{r}" for n, r in rungs)
        epochs, retraining = total_resource(rungs), total_resource(rungs, retrain=True)
        lines.append(f"{len(rungs) - 1:2} {epochs:8} {retraining:11}  {flow}")
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # | head; else Python would complain of it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
