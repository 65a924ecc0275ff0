"""Hyperband and successive halving, exact in integers, with the standard library alone.

``python hyperband.py 81 3`` prints the brackets for R = 81 and eta = 3 (the default); without
arguments it prints the poster's bracket. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1. Its R is `max_resource`, the most
that one trial may use (here epochs), and one in `eta` configurations survives a rung. The brackets
are numbered s = s_max .. 0, where s_max = floor(log_eta(R)). A rung's n_i is `configurations` and
its r_i is `resource`, which is cumulative. T are the configurations of a rung, L their losses.
"""

import copy
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
    """Return the resource that one bracket spends: 117 epochs for the poster's.

    A survivor continues from its last rung. With `retrain` it starts again from nothing, and the
    poster's bracket spends 162 epochs.
    """
    total, previous = 0, 0
    for n_i, r_i in rungs:
        total += n_i * (r_i - previous)
        previous = 0 if retrain else r_i
    return total


# A seed draws the same on every machine and with every version of Python: the samplers call
# `random.Random.random` alone, whose sequence Python promises to keep. The repr of a sampler
# evaluates to an equal one.


def _as_json(value: Any) -> Any:
    """Return a value as a log of JSON lines gives it back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SearchError(f"a value that JSON cannot hold: {error}") from error


@dataclass(frozen=True)
class Choice:
    """One of `values`, a sequence of JSON values, each with the same probability."""

    values: Sequence

    def __post_init__(self) -> None:
        if not isinstance(self.values, Sequence) or not self.values:
            raise SearchError("Choice: values must be a sequence that is not empty")
        object.__setattr__(self, "values", tuple(_as_json(list(self.values))))

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    types = (int, float)
    least = -1e300
    most = 1e300  # high - low must not overflow

    def __post_init__(self) -> None:
        typed = type(self.low) in self.types and type(self.high) in self.types
        if not typed or not self.least <= self.low <= self.high <= self.most:
            types = " or ".join(allowed.__name__ for allowed in self.types)
            limits = f"{self.least} <= low <= high <= {self.most}"
            raise SearchError(f"{type(self).__name__}: bounds must be {types}, with {limits}")


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


def _hyperband(
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int,
    evaluate: Callable[[list[Trial], int], list[Trial]],
) -> Iterator[list[Trial]]:
    """Yield the trials of each bracket: Algorithm 1, however trials run.

    ``evaluate(plans, previous)`` returns the finished trials of one rung, in the order of `plans`.
    A plan is a Trial without an outcome. `previous` is the resource that each has used so far.
    """
    rng, numbers = random.Random(seed), itertools.count()
    for b, rungs in enumerate(schedule):  # for s = s_max .. 0
        survivors = []  # T = get_hyperparameter_configuration(n)
        for _ in range(rungs[0].configurations):
            drawn = {name: sampler.sample(rng) for name, sampler in space.items()}
            survivors.append(Trial(b, 0, next(numbers), _as_json(drawn), 0))
        finished, previous = [], 0
        for i, (n_i, r_i) in enumerate(rungs):
            plans = [Trial(b, i, t.trial, t.configuration, r_i) for t in survivors[:n_i]]
            trials = evaluate(plans, previous)  # L = run_then_return_val_loss(t, r_i) for t in T
            # T = top_k(T, L, k): the next rung takes the first k. A failed trial is never promoted.
            succeeded = [t for t in trials if t.loss is not None]
            survivors = sorted(succeeded, key=lambda t: (t.loss, t.trial))
            finished += trials
            previous = r_i
        yield finished


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

    A trial that raises, or whose loss is NaN or infinite, has failed. It is logged and never
    promoted. An OSError (a full disk) ends the search instead, as no configuration is to blame for
    it. The same call then continues from the log, as it does after a kill.

    Parameters
    ----------
    objective : callable
        ``objective(configuration, previous, resource, folder) -> loss`` brings the trial from
        `previous` to `resource` (cumulative) and returns its loss, lower is better. `folder` is
        the trial's own and still holds what its last call left there. After an interrupted run it
        may hold more than `previous`, up to `resource`. With a process executor it must pickle.
    space : mapping of str to sampler
        Drawn from in this order. A sampler, such as `Choice`, has a method
        ``sample(random.Random)`` that returns a JSON value.
    schedule : sequence of brackets
        ``brackets(81)`` or ``[POSTER_BRACKET]``. In a bracket n_i never grows and r_i never falls.
    seed : int
        Decides every configuration; 0 or more.
    log : path, optional
        One JSON line per finished trial: the fields of `Trial`. Trials that it has already are not
        run again. A last line that was cut off is dropped.
    folder : path, optional
        Where the trials keep their state, such as ``trial-0007-1f3a9c2e``, a number and a digest
        of the configuration. At the end only the best trial's is left. By default a temporary
        folder, with which a search whose trials keep state cannot be continued.
    retrain : bool
        Start every rung again from nothing, as the poster's upstream code did: `previous` is 0,
        and the folder is a new one, such as ``trial-0007-1f3a9c2e-rung-1``.
    executor : concurrent.futures.Executor, optional
        Runs the trials of a rung side by side. Result and log do not depend on it. A search that
        ends early does not wait for running trials: end them before it is continued.
    on_trial : callable
        ``on_trial(trial, replayed)`` is called after every finished trial, in the order of the
        schedule. `replayed` is True for a trial of the log.

    Raises
    ------
    SearchError
        The log is damaged or another search's; there is no log yet, but `folder` holds trials;
        every trial failed; or the executor failed (a dead worker).
    """
    # A trial that is not waited for may still write there while the folder is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        log = Path(temporary, "log.jsonl") if log is None else Path(log)
        folder = Path(temporary) if folder is None else Path(folder)
        if not log.exists():
            if any(folder.glob("trial-*")):
                advice = "remove them or choose another folder"
                raise SearchError(f"{folder} holds trials of another search: {advice}")
            # Before the first trial, so that a search killed in its first trial is continued.
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        lines, size = _read_log(log)
        os.truncate(log, size)
        logged = iter(lines)

        def evaluate(plans: list[Trial], previous: int) -> list[Trial]:
            trials = _logged_trials(plans, logged)
            for trial in trials:
                on_trial(trial, True)
            start = 0 if retrain else previous
            run = functools.partial(_run_trial, objective, start, folder, retrain)
            # An exception in this loop closes its generator, which cancels what has not begun.
            for trial in _run_all(executor, run, plans[len(trials) :]):
                with log.open("a", newline="\n") as file:
                    file.write(json.dumps(trial._asdict()) + "\n")
                trials.append(trial)
                on_trial(trial, False)
            return trials

        trials = []
        for finished in _hyperband(space, schedule, seed, evaluate):
            trials += finished
            folders = {_trial_folder(folder, trial, retrain) for trial in trials}
            for loser in folders - {_trial_folder(folder, _best(trials), retrain)}:
                shutil.rmtree(loser, ignore_errors=True)
        return _result(trials, logged)


def _trial_folder(root: Path, trial: Trial, retrain: bool) -> Path:
    """Return the folder of a trial. Its name is that of no other configuration."""
    digest = hashlib.sha256(json.dumps(trial.configuration).encode()).hexdigest()
    name = f"trial-{trial.trial:04d}-{digest[:8]}"
    return root / (f"{name}-rung-{trial.rung}" if retrain else name)


def _run_all(executor: Executor | None, run: Callable, plans: list[Trial]) -> Iterator[Trial]:
    """Yield the trials of a rung in the order of `plans`, each as soon as it is finished."""
    try:
        yield from map(run, plans) if executor is None else executor.map(run, plans)
    except OSError:
        raise
    except Exception as error:  # not the objective's: a dead worker, or what does not pickle
        text = f"the executor failed: {error!r}; with a log, the same call continues the search"
        raise SearchError(text) from error


def _run_trial(objective: Callable, previous: int, root: Path, retrain: bool, plan: Trial) -> Trial:
    """Run one trial, perhaps in another process."""
    folder = _trial_folder(root, plan, retrain)
    folder.mkdir(parents=True, exist_ok=True)
    loss, error, started = None, None, time.perf_counter()
    try:
        loss = float(objective(copy.deepcopy(plan.configuration), previous, plan.resource, folder))
        if not math.isfinite(loss):
            loss, error = None, f"the loss is {loss}"
    except OSError:
        raise
    except Exception as exception:
        error = repr(exception)
    return plan._replace(loss=loss, seconds=time.perf_counter() - started, error=error)


def replay(
    log: str | os.PathLike,
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
) -> SearchResult:
    """Return the result of a finished search from its log, without running a trial.

    The configurations and promotions are computed again and compared with the log. The losses,
    seconds and errors are taken from it. The arguments are those of `search`. A log that is
    damaged, unfinished or another search's is a SearchError.
    """
    lines, _ = _read_log(log)
    logged = iter(lines)

    def evaluate(plans: list[Trial], previous: int) -> list[Trial]:
        trials = _logged_trials(plans, logged)
        if len(trials) < len(plans):
            raise SearchError(f"{log}: the log ends before the search does; finish that first")
        return trials

    trials = itertools.chain.from_iterable(_hyperband(space, schedule, seed, evaluate))
    return _result([*trials], logged)


def _read_log(log: str | os.PathLike) -> tuple[list[tuple[str, Trial]], int]:
    """Return each line's name and trial, and the number of bytes before a cut last line."""
    content = Path(log).read_bytes()
    *lines, cut = content.split(b"\n")
    if not cut.startswith(b'{"bracket": '[: len(cut)]):
        lines.append(cut)  # not the beginning of a trial: another file, which is left as it is
    trials = []
    for number, text in enumerate(lines, 1):
        line = f"{log}: line {number}"
        try:
            trial = Trial(**json.loads(text))
            if not math.isfinite(trial.seconds + (trial.loss or 0.0)):
                raise ValueError("a number is not finite")
        except (OverflowError, RecursionError, TypeError, ValueError) as error:
            advice = "remove it and what follows to run that again"
            raise SearchError(f"{line} is damaged; {advice}") from error
        trials.append((line, trial))
    return trials, len(content) - len(cut)


def _logged_trials(plans: list[Trial], logged: Iterator[tuple[str, Trial]]) -> list[Trial]:
    """Return the trials of a rung as far as the log has them; raise where they are not `plans`."""
    trials = []
    for plan, (line, trial) in zip(plans, logged, strict=False):
        if trial[:5] != plan[:5]:
            text = f"{line} has {trial[:5]}, this search {plan[:5]}"
            raise SearchError(f"{text}: it was changed, or belongs to another search")
        trials.append(trial)
    return trials


def _best(trials: list[Trial]) -> Trial:
    return min(trials, key=lambda t: (t.loss is None, -t.resource, t.loss, t.trial))


def _result(trials: list[Trial], logged: Iterator[tuple[str, Trial]]) -> SearchResult:
    """Return the result; raise where lines of the log remain, or where every trial failed."""
    for line, _ in logged:
        raise SearchError(f"{line} belongs to another search")
    best = _best(trials)
    if best.loss is None:
        raise SearchError(f"all {len(trials)} trials failed; the first: {trials[0].error}")
    return SearchResult(best, trials)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the brackets for R and eta, or the poster's; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    lines = [" s   epochs  retraining  n@r: n configurations up to r epochs each"]
    try:
        if words in (["-h"], ["--help"]):
            print(__doc__ or "hyperband.py [R [eta]]", flush=True)
            return 0
        if len(words) > 2:
            raise SearchError(f"expected R and eta at most, not {len(words)} arguments")
        # Anything but a number of a few digits stays text, which `brackets` refuses.
        numbers = [int(word) if word.isdecimal() and len(word) < 9 else word for word in words]
        schedule = brackets(*numbers) if words else [POSTER_BRACKET]
        for rungs in schedule:
            flow = " -> ".join(f"{n}@{r}" for n, r in rungs)
            epochs, retraining = total_resource(rungs), total_resource(rungs, retrain=True)
            lines.append(f"{len(rungs) - 1:2} {epochs:8} {retraining:11}  {flow}")
        print("\n".join(lines), flush=True)
    except (SearchError, OSError) as error:
        if isinstance(error, OSError):  # of stdout, which Python flushes once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            return 0
        print(f"hyperband.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
