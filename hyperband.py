"""Hyperband and successive halving, exact in integers, with the standard library alone.

``python hyperband.py 81 3`` prints the brackets for R = 81 and eta = 3 (the default); without
arguments it prints the poster's bracket. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1. Its R is `max_resource`, the most
that one trial may use (here epochs). Its n_i is the `configurations` of a rung and its r_i the
`resource`, which is cumulative. T are the configurations of a rung, L their losses.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class SearchError(ValueError):
    """Bad arguments, a damaged log, files of another search, or a search that cannot go on."""


class Rung(NamedTuple):
    """One round of a bracket: this many configurations, each up to this resource in total."""

    configurations: int
    resource: int


# The poster's figure. Its last rung confirms the same three instead of pruning to one.
POSTER_BRACKET = [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(3, 27)]


def brackets(max_resource: int, eta: int = 3) -> list[list[Rung]]:
    """Return the brackets of Algorithm 1, s = s_max .. 0, for R up to 1,000,000."""
    for name, value, least in ("max_resource", max_resource, 1), ("eta", eta, 2):
        if not isinstance(value, int) or not least <= value <= 10**6:
            raise SearchError(f"{name} must be an integer from {least} to 1000000")
    # Not floor(log(R) / log(eta)): in floating point that is 4 for R = 243, eta = 3.
    s_max = max(s for s in range(20) if eta**s <= max_resource)
    schedule = []
    for s in range(s_max, -1, -1):
        n = -(-(s_max + 1) * eta**s // (s + 1))  # ceil(B/R * eta^s / (s + 1)), B = (s_max + 1) * R
        schedule.append([Rung(n // eta**i, max_resource // eta ** (s - i)) for i in range(s + 1)])
    return schedule


def total_resource(rungs: Sequence[Rung], retrain: bool = False) -> int:
    """Return the resource of one bracket: 117 epochs for the poster's, 162 with `retrain`."""
    total = previous = 0
    for n_i, r_i in rungs:
        total += n_i * (r_i - previous)
        previous = 0 if retrain else r_i
    return total


# A seed draws the same on every machine: the samplers call `random.Random.random` alone, whose
# sequence Python promises to keep. The repr of a sampler evaluates to an equal one.
@dataclass(frozen=True)
class Choice:
    """One of `values`, a sequence of JSON values, each with the same probability."""

    values: Sequence

    def __post_init__(self) -> None:
        if not isinstance(self.values, Sequence) or not self.values:
            raise SearchError("Choice: values must be a sequence that is not empty")
        try:
            json.dumps(list(self.values), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SearchError(f"Choice: values must be JSON values: {error}") from error

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    types = (int, float)
    least = -1e300  # high - low must not overflow

    def __post_init__(self) -> None:
        typed = type(self.low) in self.types and type(self.high) in self.types
        if not typed or not self.least <= self.low <= self.high <= 1e300:
            types = " or ".join(allowed.__name__ for allowed in self.types)
            bounds = f"bounds must be {types}, {self.least} <= low <= high <= 1e300"
            raise SearchError(f"{type(self).__name__}: {bounds}")


class Uniform(_Range):
    """A float from `low` to `high`."""

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        return self.low + (self.high - self.low) * rng.random()


class IntUniform(_Range):
    """An integer from `low` to `high` (integers), both included."""

    types = (int,)

    def sample(self, rng: random.Random) -> int:
        """Draw one integer."""
        return self.low + int(rng.random() * (self.high - self.low + 1))


class LogUniform(_Range):
    """A float of 6 digits from `low` to `high` (both above 0) whose logarithm is uniform."""

    least = 1e-300

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        low, high = math.log(self.low), math.log(self.high)
        drawn = math.exp(low + (high - low) * rng.random())
        # C libraries agree on log and exp except for the last of 16 digits. Rounding to 6 makes
        # the draw the same on every machine, unless it lies at a midpoint: 1 in 100 million.
        rounded = float(f"{drawn:.6g}")
        return float(min(max(rounded, self.low), self.high))


class Trial(NamedTuple):
    """What one configuration attained on one rung, which is one line of the log."""

    bracket: int  # position of its bracket in the schedule, from 0
    rung: int  # position of the rung in its bracket, from 0
    trial: int  # number of the configuration, counted from 0 over the whole search
    configuration: dict[str, Any]
    resource: int  # cumulative, at which `loss` was measured
    loss: float | None = None  # finite; None where the trial failed
    seconds: float = 0.0
    error: str | None = None  # why the trial failed, else None


class SearchResult(NamedTuple):
    """The outcome of a search."""

    best: Trial  # the lowest loss at the largest resource reached; the earlier trial of a tie
    trials: list[Trial]  # every finished trial, in the order of the schedule


def _hyperband(space, schedule, seed, log, trials) -> Iterator[tuple]:
    """Yield the rungs of Algorithm 1: the trials that the log has, plans of the others, `previous`.

    A plan is a Trial without an outcome, and `previous` is the resource that it has used so far.
    `trials` are those of the log. The caller finishes the plans and appends them, in their order.
    """
    if not schedule or not all(schedule):
        raise SearchError("a schedule has at least one bracket, a bracket at least one rung")
    rng = random.Random(seed)
    numbers = itertools.count()
    start = 0
    for b, rungs in enumerate(schedule):  # for s = s_max .. 0
        survivors = []  # T = get_hyperparameter_configuration(n)
        for _ in range(rungs[0].configurations):
            drawn = {name: sampler.sample(rng) for name, sampler in space.items()}
            configuration = json.loads(json.dumps(drawn))  # as the log gives it back
            survivors.append(Trial(b, 0, next(numbers), configuration, 0))
        previous = 0
        for i, (n_i, r_i) in enumerate(rungs):
            plans = [Trial(b, i, t.trial, t.configuration, r_i) for t in survivors[:n_i]]
            end = start + len(plans)
            logged = trials[start:end]
            for line, (plan, trial) in enumerate(zip(plans, logged, strict=False), start + 1):
                if trial[:5] != plan[:5]:
                    raise SearchError(f"{log}: line {line} has {trial[:5]}, not {plan[:5]}")
            # L = run_then_return_val_loss(t, r_i) for t in T
            yield logged, plans[len(logged) :], previous
            # T = top_k(T, L, k): the next rung takes the first k. A failed trial is never promoted.
            succeeded = [t for t in trials[start:end] if t.loss is not None]
            survivors = sorted(succeeded, key=lambda t: (t.loss, t.trial))
            start, previous = end, r_i
    if len(trials) > start:
        raise SearchError(f"{log}: line {start + 1} is not of this search")


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

    A trial that raises, or whose loss is NaN or infinite, has failed: it is logged and never
    promoted. An OSError (a full disk) ends the search instead. A search that has ended early is
    continued by the same call; this needs `log`, and `folder` where the trials keep state.

    Parameters
    ----------
    objective : callable
        ``objective(configuration, previous, resource, folder) -> loss`` brings a trial from
        `previous` to `resource` (cumulative) and returns its loss, lower is better. `folder` is
        the trial's own and holds what its last call left there. If that was interrupted, it may be
        more than `previous`.
    space : mapping of str to sampler
        Drawn from in this order. ``sampler.sample(random.Random)`` returns a JSON value.
    schedule : sequence of brackets
        ``brackets(81)`` or ``[POSTER_BRACKET]``. In a bracket n_i never grows and r_i never falls.
    seed : int
        Decides every configuration; 0 or more.
    log : path, optional
        File of one JSON line per finished trial: the fields of `Trial`.
    folder : path, optional
        Where the trials keep their state. At the end only the best trial's is left.
    retrain : bool
        Start every rung from nothing (`previous` is 0) in a new folder, as upstream's code did.
    executor : concurrent.futures.Executor, optional
        Runs the trials of a rung side by side. Result and log do not depend on it. A search that
        ends early does not wait for running trials: end them before it is continued.
    on_trial : callable
        Called for each trial, in the order of the log. `replayed`: the log had it already.
    """
    # A trial that is not waited for may still write there while the folder is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        log = Path(log or Path(temporary, "log.jsonl"))
        folder = Path(folder or temporary)
        if not log.exists():
            if any(folder.glob("trial-*")):
                raise SearchError(f"{folder} holds trials of another search: remove them first")
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()  # So that a search killed in its first trial is continued.
        trials, size = _read_log(log)
        os.truncate(log, size)  # A last line that was cut off goes.
        for logged, plans, previous in _hyperband(space, schedule, seed, log, trials):
            for trial in logged:
                on_trial(trial, True)
            start = 0 if retrain else previous
            run = functools.partial(_run_trial, objective, start, folder, retrain)
            # An exception in this loop closes its generator, which cancels what has not begun.
            for trial in _run_all(executor, run, plans):
                with log.open("a", newline="\n") as file:
                    file.write(json.dumps(trial._asdict()) + "\n")
                trials.append(trial)
                on_trial(trial, False)
        result = _result(trials)
        folders = {_trial_folder(folder, trial, retrain) for trial in result.trials}
        for loser in folders - {_trial_folder(folder, result.best, retrain)}:
            shutil.rmtree(loser, ignore_errors=True)
        return result


def replay(
    log: str | os.PathLike,
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
) -> SearchResult:
    """Return the result of a finished search from its log, without running a trial.

    The configurations and promotions are computed again and compared with the log.
    """
    trials, _ = _read_log(log)
    for _, plans, _ in _hyperband(space, schedule, seed, log, trials):
        if plans:
            raise SearchError(f"{log}: the log ends before the search does; finish that first")
    return _result(trials)


def _result(trials: list[Trial]) -> SearchResult:
    """Return the result of a search that has ended."""
    succeeded = [t for t in trials if t.loss is not None]
    if not succeeded:
        raise SearchError(f"all {len(trials)} trials failed; the first: {trials[0].error}")
    return SearchResult(min(succeeded, key=lambda t: (-t.resource, t.loss, t.trial)), trials)


def _run_all(executor: Executor | None, run: Callable, plans: list[Trial]) -> Iterator[Trial]:
    """Yield the trials of a rung in the order of `plans`, each as soon as it is finished."""
    try:
        yield from map(run, plans) if executor is None else executor.map(run, plans)
    except OSError:
        raise
    except Exception as error:  # not the objective's: a dead worker, or what does not pickle
        raise SearchError(f"the executor failed, run again: {error!r}") from error


def _trial_folder(root: Path, trial: Trial, retrain: bool) -> Path:
    """Return a trial's folder; the digest keeps it from the state of another configuration."""
    digest = hashlib.sha256(json.dumps(trial.configuration).encode()).hexdigest()
    name = f"trial-{trial.trial:04d}-{digest[:8]}"
    return root / (f"{name}-rung-{trial.rung}" if retrain else name)


def _run_trial(objective: Callable, previous: int, root: Path, retrain: bool, plan: Trial) -> Trial:
    """Run one trial, perhaps in another process."""
    folder = _trial_folder(root, plan, retrain)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        loss = float(objective(dict(plan.configuration), previous, plan.resource, folder))
        error = None
        if not math.isfinite(loss):
            loss, error = None, f"the loss is {loss}"
    except OSError:
        raise
    except Exception as exception:
        loss, error = None, repr(exception)
    return plan._replace(loss=loss, seconds=time.perf_counter() - started, error=error)


def _read_log(log: str | os.PathLike) -> tuple[list[Trial], int]:
    """Return the trials of a log, and the number of bytes before a last line that was cut off."""
    content = Path(log).read_bytes()
    *lines, cut = content.split(b"\n")
    if not cut.startswith(b'{"bracket": '[: len(cut)]):
        lines.append(cut)  # not the beginning of a trial: another file, which is left as it is
    trials = []
    for number, line in enumerate(lines, 1):
        try:
            trial = Trial(**json.loads(line))
            if not math.isfinite(trial.seconds + (trial.loss or 0.0)):
                raise ValueError("a number is not finite")
        except Exception as error:  # damage may be of any kind
            raise SearchError(f"{log}: line {number} is damaged: remove it and the rest") from error
        trials.append(trial)
    return trials, len(content) - len(cut)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the brackets for R and eta, or the poster's; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words in (["-h"], ["--help"]):
            print(__doc__ or "hyperband.py [R [eta]]", flush=True)
            return 0
        if len(words) > 2:
            raise SearchError("expected R and eta at most")
        # What is not a number stays text, which `brackets` refuses.
        numbers = [int(word) if word.isdecimal() else word for word in words]
        schedule = brackets(*numbers) if words else [POSTER_BRACKET]
        print(" s   epochs  retraining  n@r: n configurations up to r epochs each", flush=True)
        for rungs in schedule:
            flow = " -> ".join(f"{n}@{r}" for n, r in rungs)
            epochs, retraining = total_resource(rungs), total_resource(rungs, retrain=True)
            print(f"{len(rungs) - 1:2} {epochs:8} {retraining:11}  {flow}", flush=True)
    except (SearchError, OSError) as error:
        if isinstance(error, OSError):  # of stdout, which Python flushes once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            print(f"hyperband.py: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
