"""Hyperband and successive halving, exact in integers, on the standard library alone.

``python hyperband.py 81 3`` prints the brackets for R = 81 and eta = 3, by default 3; without
arguments, the poster's. In code::

    best = search(objective, {"learning_rate": LogUniform(1e-4, 1e-1)}, brackets(27), seed=0).best

Source: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, "Hyperband: A Novel Bandit-Based Approach
to Hyperparameter Optimization", JMLR 18(185), 2018, Algorithm 1. Its R is `max_resource`, the most
that one trial may use (epochs here, 1 to 1,000,000), and one in `eta` configurations (2 to
1,000,000) survives a rung; s = floor(log_eta(R)) .. 0 numbers the brackets, and n_i and r_i are a
rung's ``configurations`` and ``resource``, which is cumulative.
"""

import copy
import functools
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class SearchError(ValueError):
    """Bad bounds, a damaged or foreign log, an executor that failed, or only failed trials."""


class Rung(NamedTuple):
    """One round of a bracket: this many configurations, each up to this resource in total."""

    configurations: int
    resource: int


# The poster's figure. Its last rung confirms the same three instead of pruning to one.
POSTER_BRACKET = [Rung(27, 1), Rung(9, 3), Rung(3, 9), Rung(3, 27)]


def brackets(max_resource: int, eta: int = 3) -> list[list[Rung]]:
    """Give every bracket of Algorithm 1, s = s_max .. 0, each with its cheapest rung first."""
    for name, value, least in ("max_resource", max_resource, 1), ("eta", eta, 2):
        if not isinstance(value, int) or not least <= value <= 10**6:
            raise SearchError(f"{name} must be an integer from {least} to 1000000, not {value!r}")
    # Not floor(log(R) / log(eta)): in floating point that is 4 for R = 243, eta = 3.
    s_max = max(s for s in range(20) if eta**s <= max_resource)
    schedule = []
    for s in range(s_max, -1, -1):
        n = -(-(s_max + 1) * eta**s // (s + 1))  # ceil(B/R * eta^s / (s + 1)), B = (s_max + 1) * R
        schedule.append([Rung(n // eta**i, max_resource // eta ** (s - i)) for i in range(s + 1)])
    return schedule


def bracket(s: int, max_resource: int, eta: int = 3) -> list[Rung]:
    """Give the s + 1 rungs of bracket `s` (0 .. s_max)."""
    schedule = brackets(max_resource, eta)
    if s not in range(len(schedule)):
        raise SearchError(f"s must be an integer from 0 to {len(schedule) - 1}, not {s!r}")
    return schedule[-1 - s]


def total_resource(rungs: Sequence[Rung], retrain: bool = False) -> int:
    """Count the resource that one bracket spends: for the poster's 117 epochs, or 162.

    A survivor continues from its last rung, or with `retrain` starts again from nothing.
    """
    before = [0, *(0 if retrain else r for _, r in rungs[:-1])]
    return sum(n * (r - b) for (n, r), b in zip(rungs, before, strict=True))


# The samplers use `Random.random` alone, the one method whose sequence Python promises to keep, and
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
    above = -math.inf

    def __post_init__(self) -> None:
        if not self.above < self.low <= self.high:
            raise SearchError(f"{self} needs {self.above} < low <= high")


class Uniform(_Range):
    """A float from `low` to `high`."""

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        return self.low + (self.high - self.low) * rng.random()


class IntUniform(_Range):
    """An integer from `low` to `high` (integers), both included."""

    def sample(self, rng: random.Random) -> int:
        """Draw one integer."""
        return self.low + int(rng.random() * (self.high - self.low + 1))


class LogUniform(_Range):
    """A float from `low` to `high` (both above 0) whose logarithm is uniform."""

    above = 0

    def sample(self, rng: random.Random) -> float:
        """Draw one float."""
        # Rounded correctly, unlike math's ln and exp; with 30 digits both ends are met exactly.
        with localcontext(Context(prec=30)):
            low, high = Decimal(self.low).ln(), Decimal(self.high).ln()
            return float((low + (high - low) * Decimal(rng.random())).exp())


class Trial(NamedTuple):
    """What one configuration attained on one rung: a line of the log."""

    bracket: int  # position of its bracket in the schedule, from 0
    rung: int  # position of the rung in its bracket, from 0
    trial: int  # number of the configuration, counted from 0 over the whole search
    configuration: dict[str, Any]
    resource: int  # cumulative, at which `loss` was measured
    loss: float | None = None  # finite; None where the trial failed
    seconds: float = 0.0
    error: str | None = None  # why the trial failed, else None


class SearchResult(NamedTuple):
    """The end of a search."""

    best: Trial  # the lowest loss at the largest resource reached; the earlier trial of a tie
    trials: list[Trial]  # every finished trial, in the order of the schedule


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

    A trial that raises, or whose loss is NaN or infinite, has failed: it is logged and never goes
    on. An OSError (a full disk) ends the search instead, as no configuration is to blame for it;
    the same call goes on from the log, as it does after a kill.

    Parameters
    ----------
    objective : callable
        ``objective(configuration, previous, resource, folder) -> loss``: bring the trial from
        `previous` to `resource` (cumulative) and return its loss, lower is better. `folder` is
        the trial's own and still holds what its last call left there; after an interrupted run it
        may hold more than `previous`, up to `resource`. With a process executor it must pickle.
    space : mapping of str to sampler
        Drawn in this order. A sampler, such as `Choice`, has ``.sample(random.Random)``, which
        gives a JSON value; a tuple becomes a list.
    schedule : sequence of brackets
        ``brackets(81)`` or ``[POSTER_BRACKET]``: in a bracket n never grows and r never falls.
    seed : int
        Decides every configuration; 0 or more.
    log : path, optional
        A JSON line a finished trial: the fields of `Trial`. The lines that it has already are
        replayed, and the search goes on after the last; a line that was cut off is dropped.
    folder : path, optional
        Where the trials keep their state, as ``trial-0007``; at the end only the best trial's is
        left. By default a temporary one, with which `log` can't continue what keeps state.
    retrain : bool
        Start every rung again from nothing, as the poster's upstream code did: `previous` is 0,
        the folder a new one, such as ``trial-0007-rung-1``.
    executor : concurrent.futures.Executor, optional
        Runs the trials of a rung side by side; results and log do not depend on it. When the
        search ends early, trials that run are not waited for: end them before it goes on.
    on_trial : callable
        ``on_trial(trial, replayed)`` after every finished trial, in the order of the schedule.

    Raises
    ------
    SearchError
        The log is damaged or another search's, every trial failed, or the executor did (a dead
        worker), after which, too, the same call goes on.
    """
    rng, entered, finished = random.Random(seed), 0, []
    logged = [] if log is None else _read_log(Path(log), mend=objective is not None)

    def folder_of(trial: Trial) -> Path:
        return Path(place, f"trial-{trial.trial:04d}" + f"-rung-{trial.rung}" * retrain)

    def run(plans: list[Trial], previous: int) -> Iterator[Trial]:
        """Yield the trials of a rung: from the log as far as it goes, then new ones."""
        known = logged[len(finished) :]
        for line, (trial, plan) in enumerate(zip(known, plans, strict=False), len(finished) + 1):
            if trial[:5] != plan[:5]:
                text = f"{log}: line {line} has {trial[:5]}, this search {plan[:5]}"
                raise SearchError(f"{text}: it was changed, or belongs to another search")
            yield trial
        plans = plans[len(known) :]
        if plans and objective is None:
            raise SearchError(f"{log}: the log ends before the search does; finish that first")
        each = map if executor is None else executor.map
        evaluate = functools.partial(_evaluate, objective, previous)
        try:
            for trial in each(evaluate, plans, [*map(folder_of, plans)]):
                if log is not None:
                    with Path(log).open("a", newline="\n") as file:
                        file.write(json.dumps(trial._asdict()) + "\n")
                yield trial
        except OSError:
            raise
        except Exception as error:  # not the objective's: a dead worker, what does not pickle
            text = f"the executor failed: {error!r}; the same search again goes on from its log"
            raise SearchError(text) from error

    # A trial that is not waited for may still write while the folder is removed.
    with nullcontext(folder) if folder else TemporaryDirectory(ignore_cleanup_errors=True) as place:
        for b, rungs in enumerate(schedule):  # for s in s_max .. 0
            entrants = []  # T, with its losses L
            for _ in range(rungs[0].configurations):
                drawn = {name: sampler.sample(rng) for name, sampler in space.items()}
                # As the log would give it back, so that a replayed trial is the same.
                entrants.append((0.0, entered, json.loads(json.dumps(drawn, allow_nan=False))))
                entered += 1
            for i, (n_i, r_i) in enumerate(rungs):
                # T = top_k(T, L, n_i); what failed never goes on, so there may be fewer.
                plans = [Trial(b, i, k, drawn, r_i) for _, k, drawn in sorted(entrants)[:n_i]]
                previous = 0 if retrain or i == 0 else rungs[i - 1].resource
                entrants = []
                # Ended early, the loop closes `run`, which cancels what has not begun.
                for trial in run(plans, previous):
                    finished.append(trial)
                    on_trial(trial, len(finished) <= len(logged))
                    if trial.loss is not None:
                        entrants.append((trial.loss, trial.trial, trial.configuration))
            best = min(finished, key=lambda t: (t.loss is None, -t.resource, t.loss, t.trial))
            for path in {*map(folder_of, finished)} - {folder_of(best)}:
                shutil.rmtree(path, ignore_errors=True)
        if len(logged) > len(finished):
            raise SearchError(f"{log}: line {len(finished) + 1} belongs to another search")
        if best.loss is None:
            raise SearchError(f"all {len(finished)} trials failed; the first: {finished[0].error}")
    return SearchResult(best, finished)


def _evaluate(objective: Callable, previous: int, plan: Trial, folder: Path) -> Trial:
    """Run one trial, maybe in another process."""
    folder.mkdir(parents=True, exist_ok=True)
    loss, error, started = None, None, time.perf_counter()
    try:
        loss = float(objective(copy.deepcopy(plan.configuration), previous, plan.resource, folder))
        if not math.isfinite(loss):
            loss, error = None, f"the loss is {loss}"
    except OSError:
        raise  # a full disk or a folder that is gone is no configuration's fault
    except Exception as exc:
        error = repr(exc)
    return plan._replace(loss=loss, seconds=time.perf_counter() - started, error=error)


def replay(
    log: str | os.PathLike,
    space: Mapping[str, Any],
    schedule: Sequence[Sequence[Rung]],
    seed: int = 0,
    retrain: bool = False,
) -> SearchResult:
    """Go through the log of a finished search without its objective.

    Configurations and promotions are worked out anew and compared with the log; losses, seconds
    and errors are taken from it. Arguments, result and errors are those of `search`; a log that
    ends before the search does is a SearchError, too.
    """
    return search(None, space, schedule, seed, log=log, retrain=retrain)


def _read_log(log: Path, mend: bool) -> list[Trial]:
    """Read the finished trials; `mend` makes a log that is missing, and drops a cut last line."""
    if mend:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    *lines, cut = log.read_bytes().split(b"\n")
    if not cut.startswith(b'{"bracket": '[: len(cut)]):
        lines.append(b"")  # a wrong file, to be refused and left as it is
    trials = []
    for number, line in enumerate(lines, 1):
        try:
            trial = Trial(**json.loads(line))
            if not math.isfinite(trial.seconds + (trial.loss or 0.0)):
                raise ValueError("a number is not finite")
            trials.append(trial)
        except (ValueError, TypeError) as error:  # no JSON, or fields of another name or type
            text = f"{log}: line {number} is damaged; remove it and what follows to run that again"
            raise SearchError(text) from error
    if mend:
        os.truncate(log, log.stat().st_size - len(cut))
    return trials


def main(argv: Sequence[str] | None = None) -> int:
    """Print the brackets for R and eta, or the poster's."""
    words = sys.argv[1:] if argv is None else argv
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        schedule = brackets(*map(int, words)) if words else [POSTER_BRACKET]
        print(" s   epochs  retraining  n@r: n configurations up to r epochs each")
        for rungs in schedule:
            flow = " -> ".join(f"{n}@{r}" for n, r in rungs)
            epochs, retraining = total_resource(rungs), total_resource(rungs, retrain=True)
            print(f"{len(rungs) - 1:2} {epochs:8} {retraining:11}  {flow}", flush=True)
    except BrokenPipeError:  # | head; else Python would complain of it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TypeError, ValueError) as error:  # the number of arguments; SearchError or int's
        print(f"hyperband.py: error: {error}; expected [R [eta]]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
