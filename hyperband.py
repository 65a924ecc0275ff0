"""Hyperband and successive halving, exact in integers, on the standard library alone.

``python hyperband.py 81 3`` prints the brackets for at most 81 epochs a trial and eta = 3;
``python hyperband.py poster`` prints the poster's flow. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import decimal
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class SearchError(ValueError):
    """The search cannot start, cannot go on from its log, or every trial of it failed."""


# ---------------------------------------------------------------------------------- schedule


class Rung(NamedTuple):
    """One round of a bracket: this many configurations, each up to this resource in total."""

    configurations: int
    resource: int


# The poster's figure. Its last rung confirms the same three instead of pruning to one.
POSTER_BRACKET = [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(3, 27)]


def _s_max(max_resource: int, eta: int) -> int:
    """Return the largest s with ``eta**s <= max_resource``, after checking both."""
    for name, value, least in (("max_resource", max_resource, 1), ("eta", eta, 2)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    # Not floor(log(R) / log(eta)): in floating point that is 4 for R = 243, eta = 3.
    s = 0
    while eta ** (s + 1) <= max_resource:
        s += 1
    return s


def bracket(s: int, max_resource: int, eta: int = 3) -> list[Rung]:
    """Give the rungs of bracket `s` of Algorithm 1.

    With n = ceil((s_max + 1) / (s + 1) * eta**s), rung i holds floor(n / eta**i) configurations
    at floor(max_resource * eta**(i - s)).

    Parameters
    ----------
    s : int
        How often the bracket halves, 0 .. s_max, where s_max = floor(log_eta(max_resource)).
    max_resource : int
        The most that one configuration may use (R in the paper), in epochs here; at least 1.
    eta : int
        One in `eta` configurations survives a rung; at least 2.

    Returns
    -------
    list of Rung
        s + 1 rungs, the cheapest first.

    Raises
    ------
    TypeError, ValueError
        An argument is not an integer, or is out of its range.
    """
    s_max = _s_max(max_resource, eta)
    if not 0 <= s <= s_max:
        raise ValueError(f"s must be 0 to {s_max} for max_resource {max_resource}, not {s}")
    n = -(-(s_max + 1) * eta**s // (s + 1))  # ceil in integers
    return [Rung(n // eta**i, max_resource // eta ** (s - i)) for i in range(s + 1)]


def brackets(max_resource: int, eta: int = 3) -> list[list[Rung]]:
    """Give every bracket of Hyperband, s = s_max .. 0; arguments and errors as in `bracket`."""
    return [bracket(s, max_resource, eta) for s in range(_s_max(max_resource, eta), -1, -1)]


def total_resource(rungs: Sequence[Rung], retrain: bool = False) -> int:
    """Count the resource (epochs) that one bracket spends.

    A survivor continues from its last rung, or with `retrain` starts again from nothing:
    the poster's flow costs 117 epochs or 162.
    """
    before = [0, *(0 if retrain else rung.resource for rung in rungs[:-1])]
    return sum(n * (r - b) for (n, r), b in zip(rungs, before, strict=True))


# ------------------------------------------------------------------------------ search space
# Samplers use `Random.random` alone, the one method whose sequence Python promises to keep, and
# no function of the C library, whose last digits differ: a seed gives the same configurations on
# every machine and Python version.


@dataclass(frozen=True)
class Choice:
    """One of `values` (JSON values), each as likely."""

    values: tuple

    def __init__(self, values: Sequence) -> None:
        if not values:
            raise ValueError("Choice needs at least one value")
        object.__setattr__(self, "values", tuple(values))

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.high - self.low < math.inf:  # NaN is refused too
            raise ValueError(f"need finite low <= high, not {self.low} and {self.high}")


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
        if not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise TypeError(f"IntUniform needs integers, not {self.low!r} and {self.high!r}")

    def sample(self, rng: random.Random) -> int:
        """Draw one integer."""
        return self.low + int(rng.random() * (self.high - self.low + 1))


@dataclass(frozen=True)
class LogUniform(_Range):
    """A float from `low` to `high` (both above 0) whose logarithm is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"LogUniform needs low above 0, not {self.low}")

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        exact = decimal.Context(prec=30)  # ln and exp are correctly rounded here, unlike math's
        u = decimal.Decimal(rng.random())
        low, high = (exact.ln(decimal.Decimal(value)) for value in (self.low, self.high))
        # 30 digits are so many more than a float's that both ends are met exactly.
        return float(exact.exp(exact.add(low, exact.multiply(exact.subtract(high, low), u))))


# ------------------------------------------------------------------------------------ search


class Trial(NamedTuple):
    """What one configuration attained on one rung: a line of the log."""

    bracket: int
    """Position of its bracket in the schedule, from 0."""
    rung: int
    """Position of the rung in its bracket, from 0."""
    trial: int
    """Number of the configuration, counted from 0 over the whole search."""
    configuration: dict[str, Any]
    resource: int
    """Cumulative resource at which `loss` was measured."""
    loss: float | None
    """Finite; None where the trial failed."""
    seconds: float
    error: str | None
    """Why the trial failed, else None."""


class SearchResult(NamedTuple):
    """The end of a search."""

    best: Trial
    """The lowest loss at the largest resource that was reached; the earlier trial of a tie."""
    trials: list[Trial]
    """Every finished trial, in the order of the schedule."""
    resource: int
    """Resource spent, what an earlier, interrupted run of the same search spent included."""


def search(
    objective: Callable[[dict[str, Any], int, int, Path], float],
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
    *,
    log: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    retrain: bool = False,
    executor: Executor | Callable[[], Executor] | None = None,
    on_trial: Callable[[Trial, bool], None] | None = None,
) -> SearchResult:
    """Minimise `objective` over `space` by successive halving.

    Within a bracket the best of a rung go on to the next. Ties keep the earlier trial. A trial
    that raises, or whose loss is NaN or infinite, is logged and never goes on; a rung may
    therefore hold fewer trials than the schedule allows. An OSError (a full disk) ends the search
    instead: no configuration is to blame for it, and the log lets the search go on afterwards.

    Parameters
    ----------
    objective : callable
        ``objective(configuration, previous, resource, folder) -> loss``: bring the trial from
        `previous` to `resource` (cumulative) and return its loss, lower is better. `folder` is
        the trial's own and still holds what its last call left there; after an interrupted run it
        may hold more than `previous`, up to `resource`. With a process executor it must pickle.
    space : mapping of str to sampler
        Anything with ``.sample(random.Random)``, such as `Choice`; drawn in the mapping's order.
        What they give must be JSON values; a tuple becomes a list.
    schedule : sequence of brackets
        Each a sequence of `Rung`: ``brackets(81)`` or ``[POSTER_BRACKET]``.
    seed : int
        Decides every configuration.
    log : path, optional
        One JSON line a finished trial: the fields of `Trial`, and the CRC-32 of what stands
        before it in the line. Where it holds lines already, the search replays them and continues
        after the last; a last line without its newline is dropped.
    folder : path, optional
        Where the trials keep their state; a temporary folder by default, so give one where `log`
        is to be continued by an objective that keeps state. A folder whose trial is out is
        removed, so at the end only the best trial's is left.
    retrain : bool
        Start every rung again from nothing (`previous` is 0, the folder empty), as the poster's
        upstream code did.
    executor : concurrent.futures.Executor, or a callable that makes one, optional
        Runs the trials of a rung side by side. Results and log do not depend on it. Where a worker
        dies (killed, out of memory), its executor is broken for good. With a callable, such as
        `processes` gives, the search goes on in a new one, where the trials that were lost run
        again one by one, until a worker dies of one alone: that trial has failed. A given executor
        can't be made again: all that it still should run has failed.
    on_trial : callable, optional
        ``on_trial(trial, replayed)`` after every finished trial, in the order of the schedule.

    Returns
    -------
    SearchResult

    Raises
    ------
    SearchError
        The log belongs to another search or is damaged, or every trial failed.
    TypeError, ValueError
        The schedule, the executor or a sampled value is unfit.
    OSError
        The log or a trial's state can't be written.
    """
    if not schedule or not all(schedule):
        raise ValueError(f"a schedule needs a bracket, and a bracket a rung: {schedule}")
    for rungs in schedule:
        if min(map(min, rungs)) < 1:
            raise ValueError(f"rungs must have configurations and resource from 1 up: {rungs}")
        if any(a[0] < b[0] or a[1] > b[1] for a, b in itertools.pairwise(rungs)):
            raise ValueError(f"rungs must not grow in configurations or fall in resource: {rungs}")
    if not (executor is None or isinstance(executor, Executor) or callable(executor)):
        raise TypeError(f"executor must be an Executor or make one, not {executor!r}")
    recorded = [] if log is None else _read_log(Path(log))
    rng = random.Random(seed)
    finished: list[Trial] = []
    spent = 0

    def run(b: int, i: int, resource: int, previous: int, entrants: list) -> list[Trial]:
        """Run one rung, replaying what the log has of it; return its trials in order."""
        first = len(finished)
        for (n, configuration), trial in zip(entrants, recorded[first:], strict=False):
            # As JSON, where 1, 1.0 and true differ.
            if json.dumps(trial[:5]) != json.dumps((b, i, n, configuration, resource)):
                raise SearchError(
                    f"{log}: line {len(finished) + 1} (trial {trial.trial}, {trial.configuration}) "
                    "belongs to another search; give this search another log"
                )
            finished.append(trial)
            if on_trial:
                on_trial(trial, True)
        waiting = entrants[len(finished) - first :]
        calls = [
            (objective, configuration, previous, resource, _trial_folder(place, n, retrain and i))
            for n, configuration in waiting
        ]
        with contextlib.closing(workers.outcomes(calls)) as outcomes:
            for (n, configuration), outcome in zip(waiting, outcomes, strict=True):
                trial = Trial(b, i, n, configuration, resource, *outcome)
                if log is not None:
                    _append(Path(log), trial)
                finished.append(trial)
                if on_trial:
                    on_trial(trial, False)
        return finished[first:]

    keep_state = contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory()
    with keep_state as place, contextlib.closing(_Workers(executor)) as workers:
        for needed in (Path(place), *([] if log is None else [Path(log).parent])):
            needed.mkdir(parents=True, exist_ok=True)
        count = 0
        for b, rungs in enumerate(schedule):
            entrants = []
            for _ in range(rungs[0].configurations):
                configuration = {name: sampler.sample(rng) for name, sampler in space.items()}
                # As the log would give it back, so that a replayed trial is the same.
                configuration = json.loads(json.dumps(configuration, allow_nan=False))
                entrants.append((count, configuration))
                count += 1
            previous = 0
            for i, rung in enumerate(rungs):
                spent += len(entrants) * (rung.resource - previous)
                trials = run(b, i, rung.resource, previous, entrants)
                places = rungs[i + 1].configurations if i + 1 < len(rungs) else 1
                good = [t for t in trials if t.loss is not None]
                good = sorted(good, key=lambda t: (t.loss, t.trial))[:places]
                for t in trials:
                    if t not in good or (retrain and i + 1 < len(rungs)):
                        shutil.rmtree(_trial_folder(place, t.trial, retrain and i), True)
                entrants = [(t.trial, t.configuration) for t in good]
                previous = 0 if retrain else rung.resource
        if len(recorded) > len(finished):
            raise SearchError(
                f"{log} has {len(recorded)} lines, but this search only {len(finished)} trials; "
                "give this search another log"
            )
        good = [t for t in finished if t.loss is not None]
        if not good:
            raise SearchError(f"all {len(finished)} trials failed; the first: {finished[0].error}")
        best = min(good, key=lambda t: (-t.resource, t.loss, t.trial))
        for t in finished:
            if t.trial != best.trial:
                shutil.rmtree(_trial_folder(place, t.trial, retrain and t.rung), True)
    return SearchResult(best, finished, spent)


def _trial_folder(folder: str | os.PathLike, trial: int, rung: int = 0) -> Path:
    return Path(folder, f"trial-{trial:04d}" + (f"-rung-{rung}" if rung else ""))


def _evaluate(
    objective: Callable, configuration: dict, previous: int, resource: int, folder: Path
) -> tuple[float | None, float, str | None]:
    """Run one trial; return loss, seconds and error."""
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    loss, error = None, None
    try:
        loss = float(objective(copy.deepcopy(configuration), previous, resource, folder))
        if not math.isfinite(loss):
            loss, error = None, f"the loss is {loss}"
    except OSError:
        raise  # a full disk or a folder that is gone is no configuration's fault
    except Exception as exc:
        error = _describe(exc)
    return loss, time.perf_counter() - started, error


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Workers:
    """Evaluates trials: here, in an executor, or in executors that it makes and shuts down."""

    def __init__(self, executor: Executor | Callable[[], Executor] | None) -> None:
        self.make = None if executor is None or isinstance(executor, Executor) else executor
        self.executor = None if self.make else executor

    def outcomes(self, calls: Sequence[tuple]) -> Iterator[tuple[float | None, float, str | None]]:
        """Yield what `_evaluate` returns for each call, in the order of the calls."""
        if not (self.make or self.executor):
            yield from (_evaluate(*call) for call in calls)
            return
        futures = [self._submit(call) for call in calls]
        try:
            for k, call in enumerate(calls):
                error = _lost(futures[k])
                if error and self.make:
                    # Whichever trial killed its worker, all that were under way are lost. Each
                    # runs again alone, until one is caught; then the others go side by side again.
                    self.close()
                    futures[k] = self._submit(call)
                    error = _lost(futures[k])
                    if error:
                        self.close()
                        for j in range(k + 1, len(calls)):
                            if _lost(futures[j]):
                                futures[j] = self._submit(calls[j])
                if error:
                    died = "its worker died" + (" as it ran alone" if self.make else ", or another")
                    yield None, 0.0, f"{died}: {_describe(error)}"
                else:
                    yield self._result(futures[k])
        finally:
            # After an interrupt nothing may still write to a trial's folder.
            wait([future for future in futures if not future.cancel()])

    @staticmethod
    def _result(future: Future) -> tuple[float | None, float, str | None]:
        try:
            return future.result()
        except OSError:
            raise
        except Exception as exc:  # the call could not be sent, read or brought back
            return None, 0.0, _describe(exc)

    def close(self) -> None:
        """Shut the executor down if it was made here; the next trial gets a new one."""
        if self.make and self.executor:
            self.executor.shutdown(cancel_futures=True)  # waits until its processes have ended
            self.executor = None

    def _submit(self, call: tuple) -> Future:
        self.executor = self.executor or self.make()
        try:
            return self.executor.submit(_evaluate, *call)
        except BrokenExecutor as error:
            future = Future()
            future.set_exception(error)
            return future


def _lost(future: Future) -> BaseException | None:
    """Wait for `future`; return the error if a dead worker took it along."""
    error = future.exception()
    return error if isinstance(error, BrokenExecutor) else None


@contextlib.contextmanager
def processes(count: int) -> Iterator[Callable[[], ProcessPoolExecutor]]:
    """Give an `executor` for `search`: what starts `count` workers, of a process each.

    They end with this process, however that ends, and at once at Ctrl-C::

        with processes(4) as executor:
            search(objective, space, schedule, executor=executor)

    Spawned, not forked, so the program that calls needs ``if __name__ == "__main__":``.
    """
    interrupted = False

    class Pool(ProcessPoolExecutor):
        """Says at its end that Ctrl-C ended it, so that no trial takes the blame."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait, cancel_futures=cancel_futures)
            if interrupted:
                raise KeyboardInterrupt

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        for process in multiprocessing.active_children():
            process.kill()

    def start() -> ProcessPoolExecutor:
        if interrupted:
            raise KeyboardInterrupt
        pool = Pool(count, multiprocessing.get_context("spawn"), _end_with_parent)
        with unheard_interrupt():
            for _ in range(count):
                pool.submit(os.getpid)  # a process each, as none is idle yet
        return pool

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # else it is somebody else's to decide what Ctrl-C does
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield start
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def unheard_interrupt() -> Iterator[None]:
    """Put Ctrl-C off; a process that is started meanwhile never hears it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this worker process as soon as its parent is gone: its queue would wait forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --------------------------------------------------------------------------------------- log


def _line(trial: Trial) -> str:
    body = json.dumps(trial._asdict(), allow_nan=False)
    return f'{body[:-1]}, "crc32": "{zlib.crc32(body.encode()):08x}"}}\n'


def _append(log: Path, trial: Trial) -> None:
    with log.open("a", encoding="utf-8", newline="\n") as file:
        file.write(_line(trial))


def _read_log(log: Path) -> list[Trial]:
    """Read the finished trials, dropping a last line that was cut off while being written."""
    try:
        content = log.read_bytes()
    except FileNotFoundError:
        return []
    *lines, rest = content.split(b"\n")
    if not rest.startswith(b'{"bracket": '[: len(rest)]):
        lines, rest = [*lines, rest], b""  # nothing that _append cut short: leave it as it is
    trials = []
    for number, raw in enumerate(lines, 1):
        try:
            record = json.loads(raw)
            trial = Trial(**{name: record[name] for name in Trial._fields})
            if _line(trial).encode() != raw + b"\n":
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SearchError(
                f"{log}: line {number} is damaged; remove it and the lines after it to run "
                "those trials again"
            ) from None
        trials.append(trial)
    if rest:
        os.truncate(log, len(content) - len(rest))
    return trials


# ------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Print a schedule: ``hyperband.py MAX_RESOURCE [ETA]`` or ``hyperband.py poster``."""
    parser = argparse.ArgumentParser(prog="hyperband.py", description="Print Hyperband's brackets.")
    # One line, without the usage.
    parser.error = lambda message: parser.exit(2, f"hyperband.py: error: {message}\n")
    parser.add_argument("max_resource", help="most epochs a trial may use, or the word poster")
    parser.add_argument("eta", nargs="?", default="3", help="one in ETA survives; default: 3")
    arguments = parser.parse_args(argv)
    try:
        if arguments.max_resource == "poster":
            schedule = [POSTER_BRACKET]
        elif arguments.max_resource.isdecimal() and arguments.eta.isdecimal():
            schedule = brackets(int(arguments.max_resource), int(arguments.eta))
        else:
            raise ValueError("MAX_RESOURCE and ETA are whole numbers, or say: hyperband.py poster")
    except ValueError as error:
        parser.error(str(error))
    for rungs in schedule:
        flow = " -> ".join(f"{n}@{r}" for n, r in rungs)
        print(
            f"s={len(rungs) - 1}: {flow}   ({total_resource(rungs)} epochs continuing, "
            f"{total_resource(rungs, retrain=True)} retraining)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
