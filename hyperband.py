"""Hyperband and successive halving, exact in integers, on the standard library alone.

``python hyperband.py 81 3`` prints the brackets for at most 81 epochs a trial and eta = 3;
``python hyperband.py poster`` prints the poster's flow. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1. Its letters, and our names:

- R is `max_resource`, the most that one trial may use, in epochs here: 1 to 1,000,000;
- eta is `eta`, one in eta configurations survives a rung: 2 to 1,000,000;
- s numbers the brackets, s_max = floor(log_eta(R)) down to 0; bracket s prunes s times;
- n_i and r_i are a rung's ``configurations`` and ``resource``; r_i is cumulative.

Whatever is wrong with an argument or a log is a `SearchError`.
"""

import argparse
import contextlib
import copy
import decimal
import itertools
import json
import math
import operator
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
    """The search cannot start or go on, its executor failed, or every trial of it failed."""


# ---- schedule ------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One round of a bracket: this many configurations, each up to this resource in total."""

    configurations: int
    resource: int


# The poster's figure. Its last rung confirms the same three instead of pruning to one.
POSTER_BRACKET = [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(3, 27)]


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
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

    def __post_init__(self) -> None:
        if not isinstance(self.values, Sequence) or not self.values:
            raise SearchError(f"{self} needs a sequence of at least one value")
        object.__setattr__(self, "values", tuple(self.values))

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def __post_init__(self) -> None:
        numbers = all(isinstance(end, int | float) for end in (self.low, self.high))
        if not numbers or not 0 <= self.high - self.low < math.inf:  # NaN is refused too
            raise SearchError(f"{self} needs finite numbers, low <= high")


@dataclass(frozen=True)
class Uniform(_Range):
    """A float from `low` to `high`."""

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        return self.low + (self.high - self.low) * rng.random()


@dataclass(frozen=True)
class IntUniform(_Range):
    """An integer from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.low, int) or not isinstance(self.high, int):
            raise SearchError(f"{self} needs integers")

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
    resource: int  # spent in all, what an interrupted run of the same search spent included


def _hyperband(space, schedule, seed, retrain, run, drop) -> SearchResult:
    """Do Algorithm 1 with any schedule: the one loop of `search` and `replay`.

    ``run(plans, previous)`` makes trials of a rung's plans, a plan being a trial's first five
    fields; ``drop(trial)`` is called for each whose state on its rung nobody needs any more.
    """
    _check_integer("seed", seed, 0, 2**32 - 1)
    rng, finished, spent, count = random.Random(seed), [], 0, 0
    for b, rungs in enumerate(_checked(schedule)):  # for s in s_max .. 0
        n, previous = rungs[0].configurations, 0
        entrants = [(count + j, _draw(space, rng)) for j in range(n)]  # T
        count += n
        for i, (_, r_i) in enumerate(rungs):
            trials = run([(b, i, number, drawn, r_i) for number, drawn in entrants], previous)
            finished += trials
            spent += len(trials) * (r_i - previous)
            # T = top_k(T, L, n_(i+1)); what failed never goes on, so there may be fewer.
            last = i + 1 == len(rungs)
            k = 1 if last else rungs[i + 1].configurations
            good = [t for t in trials if t.loss is not None]
            top = sorted(good, key=lambda t: (t.loss, t.trial))[:k]
            entrants = [(t.trial, t.configuration) for t in top]
            kept = {t.trial for t in top if last or not retrain}
            for t in trials:
                if t.trial not in kept:
                    drop(t)
            previous = 0 if retrain else r_i
    good = [t for t in finished if t.loss is not None]
    if not good:
        raise SearchError(f"all {len(finished)} trials failed; the first: {finished[0].error}")
    return SearchResult(min(good, key=lambda t: (-t.resource, t.loss, t.trial)), finished, spent)


def _checked(schedule) -> list[list[Rung]]:
    """Return the schedule, with rungs where one that was read from JSON has lists."""
    try:
        checked = [[Rung(*map(operator.index, rung)) for rung in rungs] for rungs in schedule]
    except TypeError:
        checked = []
    if not checked or not all(
        rungs
        and min(map(min, rungs)) >= 1
        and all(a[0] >= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(rungs))
        for rungs in checked
    ):
        raise SearchError(
            "a schedule is a list of brackets, a bracket a list of rungs (n, r), integers from 1 "
            f"up, where n never grows and r never falls; not {schedule!r}"
        )
    return checked


def _draw(space, rng) -> dict[str, Any]:
    try:
        configuration = {name: sampler.sample(rng) for name, sampler in space.items()}
        # As the log would give it back, so that a replayed trial is the same.
        return json.loads(json.dumps(configuration, allow_nan=False))
    except (AttributeError, TypeError, ValueError) as error:
        raise SearchError(f"a space has samplers of JSON values by name, not {space}") from error


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
    on_trial: Callable[[Trial, bool], None] | None = None,
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
        Each a sequence of `Rung`: ``brackets(81)`` or ``[POSTER_BRACKET]``.
    seed : int
        Decides every configuration; 0 to 2**32 - 1.
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
    on_trial : callable, optional
        ``on_trial(trial, replayed)`` after every finished trial, in the order of the schedule.

    Raises
    ------
    SearchError
        An argument is unfit, the log belongs to another search or is damaged, every trial failed,
        or the executor did (a dead worker); after the last, the same call goes on from the log.
    OSError
        The log or a trial's state can't be written; here, too, the same call goes on.
    """
    if not (executor is None or isinstance(executor, Executor)):
        raise SearchError(f"executor must be a concurrent.futures.Executor, not {executor!r}")
    recorded = []
    if log is not None:
        log = Path(log)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            recorded, cut = _read_log(log)
            if cut:
                os.truncate(log, log.stat().st_size - len(cut))
    lines = enumerate(recorded, 1)
    report = on_trial or (lambda trial, replayed: None)

    def folder_of(number: int, rung: int) -> Path:
        return Path(place, f"trial-{number:04d}" + (f"-rung-{rung}" if retrain and rung else ""))

    def drop(trial: Trial) -> None:
        shutil.rmtree(folder_of(trial.trial, trial.rung), ignore_errors=True)

    def run(plans: list[tuple], previous: int) -> list[Trial]:
        trials = _recall(log, lines, plans)
        for trial in trials:
            report(trial, True)
        plans = plans[len(trials) :]
        calls = [(objective, drawn, previous, r, folder_of(n, i)) for _, i, n, drawn, r in plans]
        with contextlib.closing(_outcomes(executor, calls)) as outcomes:
            for plan, outcome in zip(plans, outcomes, strict=True):
                trial = Trial(*plan, *outcome)
                if log is not None:
                    with log.open("a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(trial._asdict(), allow_nan=False) + "\n")
                trials.append(trial)
                report(trial, False)
        return trials

    state = contextlib.nullcontext(folder)
    if folder is None:  # where a trial that is not waited for may still write
        state = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with state as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        result = _hyperband(space, schedule, seed, retrain, run, drop)
        _check_end(log, lines)
        for trial in result.trials:
            if trial.trial != result.best.trial:
                drop(trial)  # the other brackets' best
    return result


def _outcomes(executor, calls) -> Iterator[tuple[float | None, float, str | None]]:
    """Yield what `_evaluate` returns for each call, in the order of the calls."""
    if executor is None:
        yield from (_evaluate(*call) for call in calls)
        return
    futures = []
    try:
        for call in calls:
            futures.append(executor.submit(_evaluate, *call))
        for future in futures:
            yield future.result()
    except OSError:
        raise
    except Exception as error:  # not the objective's: a dead worker, what does not pickle
        raise SearchError(
            f"the executor failed ({_describe(error)}); "
            "start the same search again, and it goes on from its log"
        ) from error
    finally:
        for future in futures:
            future.cancel()  # what has not begun; to wait for the others would hold up Ctrl-C


def _evaluate(objective, configuration, previous, resource, folder):
    """Run one trial, maybe in another process; return its loss, seconds and error."""
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    try:
        loss = float(objective(copy.deepcopy(configuration), previous, resource, folder))
        error = None
        if not math.isfinite(loss):
            loss, error = None, f"the loss is {loss}"
    except OSError:
        raise  # a full disk or a folder that is gone is no configuration's fault
    except Exception as exc:
        loss, error = None, _describe(exc)
    return loss, time.perf_counter() - started, error


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    lines = enumerate(recorded, 1)

    def run(plans: list[tuple], previous: int) -> list[Trial]:
        trials = _recall(log, lines, plans)
        if len(trials) < len(plans):
            raise SearchError(
                f"{log}: after line {len(recorded)} the log ends before the search does; start the "
                "same search again to finish it"
            )
        return trials

    result = _hyperband(space, schedule, seed, retrain, run, lambda trial: None)
    _check_end(log, lines)
    return result


def _read_log(log: Path) -> tuple[list[Trial], bytes]:
    """Read the finished trials, and what a kill left of a last line."""
    *lines, cut = log.read_bytes().split(b"\n")
    if not cut.startswith(b'{"bracket": '[: len(cut)]):
        lines.append(b"")  # not ours: a wrong file, to be refused and left as it is
    trials = []
    for number, line in enumerate(lines, 1):
        try:
            trial = Trial(**json.loads(line))
            fit = trial.loss is None or abs(trial.loss) < math.inf  # NaN is not
            fit &= isinstance(trial.error, str) == (trial.loss is None)
            fit &= 0 <= trial.seconds < math.inf
        except (ValueError, TypeError, RecursionError):
            fit = False
        if not fit:
            raise SearchError(
                f"{log}: line {number} is damaged; remove it and the lines after it to run those "
                "trials again"
            )
        trials.append(trial)
    return trials, cut


def _recall(log, lines, plans) -> list[Trial]:
    """Take the trials of these plans, or as many as are left, from a log's numbered lines."""
    trials = []
    for plan, (number, trial) in zip(plans, lines, strict=False):
        logged, planned = json.dumps(trial[:5]), json.dumps(plan)  # as text 1, 1.0, true differ
        if logged != planned:
            raise SearchError(
                f"{log}: line {number} belongs to another search or was changed: it has {logged}, "
                f"this search {planned}; give this search another log"
            )
        trials.append(trial)
    return trials


def _check_end(log, lines) -> None:
    for number, _ in lines:
        raise SearchError(
            f"{log}: line {number} belongs to another search: this one ends a line before; "
            "give this search another log"
        )


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print a schedule: ``hyperband.py R [ETA]`` or ``hyperband.py poster``."""
    parser = argparse.ArgumentParser(prog="hyperband.py", description="Print Hyperband's brackets.")
    # One line, without the usage.
    parser.error = lambda text: parser.exit(2, f"hyperband.py: error: {' '.join(text.split())}\n")
    parser.add_argument("R", help="most epochs a trial may use, or the word poster")
    parser.add_argument("eta", nargs="?", type=int, default=3, help="one in eta survives; 3")
    arguments = parser.parse_args(argv)
    most, eta = arguments.R, arguments.eta
    title, schedule = "the poster's bracket, R = 27, eta = 3", [POSTER_BRACKET]
    if most != "poster":
        try:
            schedule = brackets(int(most) if most.isdecimal() else most, eta)
        except ValueError as error:  # int's, too: its limit is 4,300 digits
            parser.error(str(error))
        title = f"R = {most}, eta = {eta}"
    table = "{:>3}{:>12}{:>12}   {}".format
    lines = [f"Hyperband (Li et al., JMLR 18(185), 2018), {title}; the cost in epochs"]
    lines += [table("s", "continuing", "retraining", "n@r: n configurations up to r epochs each")]
    for rungs in schedule:
        costs = total_resource(rungs), total_resource(rungs, retrain=True)
        lines += [table(len(rungs) - 1, *costs, " -> ".join(f"{n}@{r}" for n, r in rungs))]
    totals = [sum(total_resource(rungs, again) for rungs in schedule) for again in (False, True)]
    n = sum(rungs[0].configurations for rungs in schedule)
    lines += [table("all", *totals, f"{n} configurations")]
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # | head; else Python would complain of it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
