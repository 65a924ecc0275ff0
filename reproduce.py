"""Regenerate the table and the ROC curves of "Medical Image Classification Model Based on CNN".

``python reproduce.py --stage all`` searches hyperparameters, trains with the poster's, tests,
draws, reports, verifies, and writes ``results/<data set>/``. On the poster's data (TissueMNIST,
downloaded; 120,000 training images) that takes more than an hour on two cores; where there is no
network it runs on scikit-learn's digits, in 3 minutes. The stages can be run one by one, and what
was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

try:
    import data
    import hyperband
    import metrics
    import model
    from hyperband import Choice, IntUniform, LogUniform, Uniform
    from metrics import METRIC_NAMES
except KeyboardInterrupt:  # importing PyTorch takes seconds
    print("reproduce.py: interrupted before it began", file=sys.stderr)
    raise SystemExit(130) from None

# ---------------------------------------------------------------------- the poster's figures
# From the poster's table and confusion matrix (rows true, columns predicted), and its ROC figure.

POSTER_TABLE = {"accuracy": 0.6387, "f1": 0.5426, "recall": 0.5356, "precision": 0.5678}
POSTER_CONFUSION = (
    (12535, 237, 29, 309, 164, 131, 1342, 1290),
    (1032, 435, 25, 72, 54, 26, 299, 409),
    (47, 0, 805, 240, 264, 398, 12, 19),
    (318, 1, 167, 3078, 580, 211, 243, 65),
    (307, 7, 190, 671, 1902, 198, 203, 92),
    (184, 0, 389, 263, 216, 1060, 135, 84),
    (1522, 66, 20, 383, 204, 139, 8211, 1271),
    (1633, 145, 7, 160, 121, 98, 1373, 3909),
)
POSTER_AUC = (0.8678, 0.7602, 0.9613, 0.9441, 0.9150, 0.9389, 0.8801, 0.8170)
POSTER_RATIOS = (0.32, 0.05, 0.04, 0.09, 0.07, 0.05, 0.24, 0.15)  # in the legends of its ROC
# Fixed before any run: how far a reproduction may lie from the poster's figures.
TOLERANCE = {"accuracy": 0.01, "f1": 0.02, "recall": 0.02, "precision": 0.02, "auc": 0.02}
# How far the logits of one network may lie apart on two machines, as a share of the largest.
LOGIT_TOLERANCE = 1e-4

# ------------------------------------------------------------------------------- the search
# Batch size, number of features and patience are on the poster, with the values that open each
# list; the learning rate and the weight decay that the authors used were drawn too.

SPACE = {
    "batch_size": Choice((128, 256, 512)),
    "num_features": Choice((8, 16, 32)),
    "patience": IntUniform(3, 8),
    "learning_rate": LogUniform(1e-3, 1e-1),
    "weight_decay": LogUniform(1e-4, 1e-2),
    "factor": Uniform(0.1, 0.5),
}
TUNING_IMAGES = 10_000  # the poster's "subset of the whole dataset"

STAGES = ("tune", "train", "test")
# Patterns of the files that a stage writes, and so may remove.
OUTPUTS = {
    "tune": ("tuning.jsonl", "best.json", "trials/trial-*", "trials/*.npy"),
    "train": ("training.pt", "model.pt", "history.csv"),
    "test": (
        "predictions.csv",
        "confusion.csv",
        "per_class.csv",
        "table.csv",
        "table.md",
        "roc/class_*.csv",
        "roc/auc.csv",
    ),
    "seeds": ("seeds.csv", "seeds.md"),
    "compare": ("measured.json", "compare.csv", "scaling.csv", "compare.md"),
    "figures": ("figures/*.png", "figures/*.svg"),
    "report": ("report.md",),
}
# What is out of date once a stage is done again.
FOLLOWING = {
    "tune": ("figures", "report"),
    "train": ("test",),
    "test": ("figures", "report"),
    "seeds": ("report",),
    "compare": ("figures", "report"),
    "figures": ("report",),
}
# Files by which an interrupted stage goes on, and which a finished one has no more.
UNFINISHED = ("training.pt", "measured.json")
# Stages that look at the results of others: on the same data, without being told it again.
LATER = ("test", "verify", "figures", "report", "compare")


class RunError(ValueError):
    """The command cannot be carried out as it was given; the message is one line."""


# -------------------------------------------------------------------------------- checked files


def fingerprint(content: bytes) -> str:
    """Give the SHA-256 of a file, and two sums that locate one changed byte.

    The sums of b[i] and of i * b[i] change by d and i * d where one byte changes by d: a
    weighted checksum, as in an error-correcting code.
    """
    numbers = np.frombuffer(content, np.uint8).astype(np.int64)
    weighted = numbers @ np.arange(len(numbers))
    return f"{hashlib.sha256(content).hexdigest()} {numbers.sum()} {weighted}"


def locate(name: str, content: bytes, stored: str) -> str:
    """Name the place of the one byte that differs from the file that `stored` was made of."""
    _, plain, weighted = fingerprint(content).split()
    with contextlib.suppress(ValueError, ZeroDivisionError, IndexError):
        change = int(plain) - int(stored.split()[1])
        place, rest = divmod(int(weighted) - int(stored.split()[2]), change)
        was = content[place] - change
        original = content[:place] + bytes([was]) + content[place + 1 :]
        if not rest and place >= 0 and fingerprint(original) == stored:
            row = content.count(b"\n", 0, place) + 1
            column: Any = place - content.rfind(b"\n", 0, place)
            if name.endswith(".csv"):  # the column's name, from the row up to the place
                line = content[place + 1 - column : place].decode("utf-8", "replace")
                header = original.split(b"\n", 1)[0].decode("utf-8", "replace").split(",")
                column = header[len(next(csv.reader([line + "."]))) - 1]
            return f"row {row}, column {column}: {chr(content[place])!r}, was {chr(was)!r}"
    return "more than one byte differs"


CHECK = '\n "check": "'


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object whose last key is the fingerprint of what stands before it."""
    body = json.dumps(content, indent=1, allow_nan=False)[:-2] + ","
    metrics.write_atomically(path, f'{body}{CHECK}{fingerprint(body.encode())}"\n}}\n')


def read_json(path: Path) -> dict:
    """Read what `write_json` wrote; RunError where one byte of it has changed."""
    raw, content = read_object(path)
    body, _, stored = raw.rpartition(CHECK.encode())
    stored = stored.removesuffix(b'"\n}\n').decode("ascii", "replace")
    if fingerprint(body) != stored:
        place = locate(path.name, body, stored)
        raise RunError(f"{path} was changed or damaged ({place}): restore it")
    content.pop("check")
    return content


def read_object(path: Path) -> tuple[bytes, dict]:
    """Read a JSON object: its bytes and its content."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is no JSON object: restore it") from None
    return raw, content


# ----------------------------------------------------------------------------------- terminal


class Progress:
    """A bar with an ETA: redrawn in place on a terminal, a line a step in a log."""

    def __init__(self, label: str, total: float, stream: Any = None) -> None:
        self.label, self.total, self.stream = label, total, stream or sys.stdout
        self.live = self.stream.isatty()
        self.started, self.first, self.drawn = time.monotonic(), None, 0.0

    def __call__(self, done: float, text: str = "", *, step: bool = False) -> None:
        """Show that `done` of the total is reached; `step` marks what a log has a line for."""
        now = time.monotonic()
        if self.first is None:  # what an earlier run did says nothing of the speed of this one
            self.first = done
        if not (step or (self.live and now - self.drawn > 0.1)):
            return
        self.drawn = now
        share = min(1.0, done / self.total)
        eta = ""
        if done > self.first and share < 1:
            left = (now - self.started) * (self.total - done) / (done - self.first)
            eta = f"  ETA {duration(left)}"
        if self.live:
            bar = "#" * round(20 * share)
            line = f"{self.label:<8} [{bar:<20}] {share:4.0%}  {text}{eta}"
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{line[:width]:<{width}}")
        else:
            self.stream.write(f"{self.label:<8} {text}{eta}\n")
        self.stream.flush()

    def close(self) -> None:
        """End the redrawn line."""
        if self.live and self.drawn:
            self.stream.write("\n")
            self.stream.flush()


def duration(seconds: float) -> str:
    """Write seconds as 12s, 3m05s or 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


# ------------------------------------------------------------------------------ results folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a second process is told the first's id.

    The lock is the kernel's, so it ends with its process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows: two processes there have to be kept apart by hand
        yield
        return
    path = folder / ".lock"
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunError(
                f"{folder} is in use by process {holder}: wait for it, or choose another --results"
            ) from None
        except OSError:  # a file system without locks, such as Lustre by default
            break
        # Its holder may have removed it between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Run:
    """One results folder, and what is to be done in it.

    `record` is the content of run.json: `data` says what the run is on, and an entry a stage holds
    its settings, the environment it ran in and, once its files are complete, its result and their
    fingerprints.
    """

    def __init__(
        self, arguments: argparse.Namespace, images: data.ImageData, folder: Path, best: Path
    ) -> None:
        self.arguments, self.images, self.folder, self.best = arguments, images, folder, best
        self.record: dict[str, Any] = {}
        if (folder / "run.json").exists():
            try:
                self.record = read_json(folder / "run.json")
            except RunError as error:
                if not arguments.overwrite:
                    raise RunError(f"{error}, or say --overwrite to start over") from None
        known = self.record.get("data", {}) if arguments.stage in LATER else {}
        self.split_name = arguments.split or known.get("split", "poster")
        if arguments.test_data:
            self.split_name = "folders"
        seed = known.get("split_seed") if arguments.split_seed is None else arguments.split_seed
        if self.split_name == "official":
            self.split, seed = data.official_split(images), None
        elif self.split_name == "folders":
            self.split = data.folders_split(images, seed := seed or 0)
        else:
            self.split = data.poster_split(len(images.labels), seed := seed or 0)
        source = images.name if arguments.data in (None, "auto") else arguments.data
        self.data = {
            "name": images.name,
            "source": source
            if source in ("tissuemnist", "digits")
            else str(Path(source).resolve()),
            "md5": images.md5,
            "shape": list(images.images.shape),
            "class_names": list(images.class_names),
            "split": self.split_name,
            "split_seed": seed,
            "sizes": [len(part) for part in self.split],
        }
        if arguments.test_data:
            self.data["test_source"] = str(Path(arguments.test_data).resolve())

    def open(self, stages: Sequence[str], again: bool) -> None:
        """See that the folder may take these stages; clear other runs', and all if `again`."""
        changed = self.changed(self.record.get("data", {}), self.data)
        if self.record and changed and self.arguments.stage in LATER:
            raise RunError(
                f"{self.folder} was made otherwise ({', '.join(changed)} differ): leave out what "
                f"--stage {self.arguments.stage} takes from its run.json"
            )
        if not self.arguments.overwrite:
            if self.record and changed:
                self.refuse(changed)
            ours = re.compile(r"\.lock|run\.json\.tmp|seed-\d+")
            others = [path for path in self.folder.iterdir() if not ours.fullmatch(path.name)]
            if not self.record and others:
                raise RunError(
                    f"{self.folder} is not empty and holds no run.json: choose another --results, "
                    "or say --overwrite to write into it"
                )
        elif changed:
            for stage in reversed(OUTPUTS):
                self.discard(stage)
        for stage in reversed(stages):
            if self.differs(stage) or again:
                self.discard(stage)
        self.record["data"] = self.data
        self.save()

    @staticmethod
    def changed(ours: dict, theirs: dict) -> list[str]:
        """Name the settings that differ; where the data lay is none."""
        keys = {**ours, **theirs}.keys() - {"source", "test_source"}
        return sorted(key for key in keys if ours.get(key) != theirs.get(key))

    def refuse(self, changed: list[str]) -> None:
        """Raise RunError: the folder holds another run."""
        raise RunError(
            f"{self.folder} holds another run ({', '.join(changed)} differ): choose another "
            "--results, or say --overwrite"
        )

    def differs(self, stage: str) -> bool:
        """Tell whether the stage was begun with other settings; RunError if it may not be."""
        begun, settings = self.record.get(stage, {}).get("settings"), SETTINGS[stage](self)
        if begun is None or settings is None:
            return False
        changed = self.changed(begun, json.loads(json.dumps(settings)))
        if changed and not self.arguments.overwrite:
            self.refuse(changed)
        return bool(changed)

    def begin(self, stage: str) -> dict[str, Any]:
        """Record what the stage is about to do, and where; return its settings."""
        if self.differs(stage):
            self.discard(stage)
        for later in FOLLOWING.get(stage, ()):
            self.discard(later)
        settings = SETTINGS[stage](self)
        where = environment(self.arguments.device, settings.get("precision", "fp32"))
        self.record[stage] = {"settings": settings, "environment": where}
        self.save()
        return settings

    def finish(self, stage: str, result: dict) -> None:
        """Record that the stage's files are complete, and what they are."""
        self.record[stage]["result"] = result
        self.record[stage]["files"] = {
            path.relative_to(self.folder).as_posix(): fingerprint(path.read_bytes())
            for pattern in OUTPUTS[stage]
            for path in sorted(self.folder.glob(pattern))
            if path.is_file() and path.name not in UNFINISHED
        }
        self.save()

    def finished(self, stage: str) -> bool:
        """Tell whether the stage's files are complete."""
        return "result" in self.record.get(stage, {})

    def discard(self, stage: str) -> None:
        """Remove the stage's files and forget it, and before it what hangs on it."""
        for later in FOLLOWING.get(stage, ()):
            self.discard(later)
        if self.finished(stage):  # not any more, wherever a kill may cut this off
            del self.record[stage]["result"], self.record[stage]["files"]
            self.save()
        for pattern in OUTPUTS[stage]:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.record.pop(stage, None):
            self.save()

    def save(self) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", self.record)

    def network_config(self, hyperparameters: model.Hyperparameters) -> dict[str, Any]:
        """Size the poster's network for these images."""
        shape = self.images.images.shape
        return {
            "network": "PosterCNN",
            "num_features": hyperparameters.num_features,
            "num_classes": self.images.num_classes,
            "in_channels": shape[3] if len(shape) == 4 else 1,
            "image_size": shape[1],
            "dropout": hyperparameters.dropout,
        }

    def part(self, indices: Any) -> tuple[Any, Any]:
        """Copy out images and labels."""
        return self.images.images[indices], self.images.labels[indices]


def environment(device: str, precision: str) -> dict[str, Any]:
    """Tell what results depend on beside the settings."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(Path(__file__).resolve().parent)]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        if subprocess.run([*git, "status", "--porcelain", "--", "*.py"], **options).stdout:
            commit += " with changes"
    return {
        **model.environment(device),
        "precision": model.resolve_precision(precision, model.resolve_device(device)),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "platform": platform.platform(),
        "git_commit": commit,
    }


# ------------------------------------------------------------------------------------ tuning


TUNING_ARRAYS = ("train_images", "train_labels", "valid_images", "valid_labels")


@dataclass(frozen=True)
class Objective:
    """Validation loss of a configuration after `resource` epochs on the tuning images.

    Pickles small: the images are in files, which the workers of one machine map and so share.
    """

    network: dict[str, Any]
    arrays: Path
    seed: int
    device: str
    precision: str
    on_batch: Callable[[int, int], None] | None = None

    def __call__(
        self, configuration: dict[str, Any], previous: int, resource: int, folder: Path
    ) -> float:
        """Train on from the checkpoint in `folder`, where there is one."""
        hyperparameters = replace(model.POSTER, **configuration, epochs=resource)
        network = {**self.network, "num_features": hyperparameters.num_features}
        # Copy on write: PyTorch shares no read-only array, and nothing writes to it.
        arrays = [np.load(self.arrays / f"{name}.npy", mmap_mode="c") for name in TUNING_ARRAYS]

        def fit() -> list[model.EpochRecord]:
            return model.fit(
                model.build(network, self.seed),
                *arrays,
                hyperparameters,
                seed=self.seed,
                device=self.device,
                precision=self.precision,
                compile="off",  # a trial is too short for it
                checkpoint=folder / "training.pt",
                on_batch=self.on_batch,
            )

        with held(folder / ".lock"), model.one_thread():
            try:
                history = fit()
            except model.CheckpointError:  # damaged, and no fault of the configuration
                (folder / "training.pt").unlink()
                history = fit()
        return history[-1].valid_loss


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`, and hold it.

    A worker may outlive a killed search for a moment, or on a cluster until its trial is done; the
    search that goes on must not write beside it.
    """
    with path.open("a") as file:
        with contextlib.suppress(ImportError, OSError):  # where there are no locks, as in `locked`
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class DaskExecutor(Executor):
    """A Dask cluster; a trial whose workers died has failed, and the others go on.

    Dask itself runs a trial again whose worker died, so often as its scheduler is told to.
    """

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ImportError:
            raise RunError(
                "--dask needs distributed: pip install -r requirements-cluster.txt"
            ) from None
        try:
            self.client = distributed.Client(address, timeout=10, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"no Dask scheduler at {address}: {reason}") from None
        try:
            for module in (data, model, hyperband, metrics):  # the workers run this very code
                self.client.upload_file(module.__file__)
            self.client.upload_file(__file__)
        except Exception as error:  # whatever an import raises on a machine of the cluster
            self.client.close()
            raise RunError(
                f"the cluster cannot import this program ({error!r:.200}): install "
                "requirements.txt for its scheduler and its workers"
            ) from None
        self.executor = self.client.get_executor()

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        """Run a call on the cluster."""
        outcome = Future()

        def settle(done: Future) -> None:
            if outcome.cancelled():
                return
            gone = ConnectionError("the Dask scheduler has gone; the same command goes on")
            if error := gone if done.cancelled() else done.exception():
                outcome.set_exception(error)
            else:
                outcome.set_result(done.result())

        self.executor.submit(function, *arguments, **options).add_done_callback(settle)
        return outcome

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; what it still runs for us is cancelled."""
        self.client.close()


def trial_executor(
    arguments: argparse.Namespace,
) -> contextlib.AbstractContextManager[Executor | Callable[[], Executor] | None]:
    """Give what runs the trials: a Dask cluster, processes, or (None) this process."""
    if arguments.dask:
        return DaskExecutor(arguments.dask)
    workers = count_workers(arguments)
    return hyperband.processes(workers) if workers > 1 else contextlib.nullcontext()


def count_workers(arguments: argparse.Namespace) -> int:
    """Say how many processes run trials: by default one a core, or one for a GPU."""
    if arguments.workers or model.resolve_device(arguments.device).type != "cpu":
        return arguments.workers or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tuning_schedule(arguments: argparse.Namespace) -> list[list[hyperband.Rung]]:
    """Give the brackets that the command line asks for."""
    if isinstance(arguments.schedule, list):  # --from
        return arguments.schedule
    if arguments.schedule == "poster":
        return [hyperband.POSTER_BRACKET]
    return hyperband.brackets(arguments.max_resource, arguments.eta)


def tuning_settings(run: Run) -> dict[str, Any]:
    """Say what decides the search's outcome."""
    return {
        "schedule": tuning_schedule(run.arguments),
        "space": {name: repr(sampler) for name, sampler in SPACE.items()},
        "images": TUNING_IMAGES,
        "retrain": run.arguments.retrain,
        "seed": run.arguments.seed,
        "precision": run.arguments.precision,
    }


def tune(run: Run) -> None:
    """Search SPACE; write tuning.jsonl, a line a trial, and best.json."""
    arguments, schedule = run.arguments, tuning_schedule(run.arguments)
    split = data.tuning_split(run.split, TUNING_IMAGES, arguments.seed)
    run.begin("tune")
    total = sum(hyperband.total_resource(rungs, arguments.retrain) for rungs in schedule)
    progress = Progress("tune", total)
    epochs, lowest, last = 0, float("inf"), ""

    def on_trial(trial: hyperband.Trial, replayed: bool) -> None:
        nonlocal epochs, lowest, last
        rungs = schedule[trial.bracket]
        continued = trial.rung > 0 and not arguments.retrain
        epochs += trial.resource - (rungs[trial.rung - 1].resource if continued else 0)
        if trial.loss is not None:
            lowest = min(lowest, trial.loss)
        last = (
            f"{epochs}/{total} epochs, rung {rungs[trial.rung].configurations}@{trial.resource}, "
            f"trial {trial.trial}: "
            + (f"loss {trial.loss:.4f}" if trial.error is None else trial.error)
            + f", lowest {lowest:.4f}"
            + (", from the log" if replayed else "")
        )
        progress(epochs, last, step=True)

    trials = (run.folder / "trials").absolute()
    trials.mkdir(exist_ok=True)
    arrays = *run.part(split.train), *run.part(split.valid)
    for name, array in zip(TUNING_ARRAYS, arrays, strict=True):
        # Moved into place: a worker that outlives a killed search may have the old one mapped.
        np.save(trials / f"{name}.tmp.npy", array)
        (trials / f"{name}.tmp.npy").replace(trials / f"{name}.npy")
    # Decided here for all: the workers of a cluster may be of several kinds.
    precision = run.record["tune"]["environment"]["precision"]
    config = run.network_config(model.POSTER)
    objective = Objective(config, trials, arguments.seed, arguments.device, precision)
    with trial_executor(arguments) as executor:
        if executor is None:
            objective = replace(objective, on_batch=lambda *_: progress(epochs, last))
        result = hyperband.search(
            objective,
            SPACE,
            schedule,
            arguments.seed,
            log=run.folder / "tuning.jsonl",
            folder=trials,
            retrain=arguments.retrain,
            executor=executor,
            on_trial=on_trial,
        )
    progress.close()
    write_json(run.folder / "best.json", best_content(result.best))
    shutil.rmtree(run.folder / "trials", ignore_errors=True)
    failed = sum(trial.loss is None for trial in result.trials)
    run.finish(
        "tune",
        {
            "epochs": result.resource,
            "trials": len(result.trials),
            "failed": failed,
            "seconds": sum(trial.seconds for trial in result.trials),
        },
    )


def best_content(best: hyperband.Trial) -> dict[str, Any]:
    """Say what best.json says."""
    return {
        "hyperparameters": asdict(replace(model.POSTER, **best.configuration)),
        "trial": best.trial,
        "resource": best.resource,
        "loss": best.loss,
    }


# ---------------------------------------------------------------------------------- training


def chosen_hyperparameters(
    arguments: argparse.Namespace, best: Path
) -> model.Hyperparameters | None:
    """Read what ``--hyperparameters`` names; None for `tuned` where `best` is not there yet."""
    name = arguments.hyperparameters
    if name == "tuned" and not best.exists():
        return None
    if name in ("poster", "authors"):
        chosen = model.POSTER if name == "poster" else model.AUTHORS
    else:
        path = best if name == "tuned" else Path(name)
        content = read_json(path) if name == "tuned" else read_object(path)[1]
        try:
            if "train" in content:  # a run.json
                content = content["train"]["settings"]
            chosen = model.Hyperparameters(**content.get("hyperparameters", content))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RunError(f"{path} holds no hyperparameters: {error}") from None
    return chosen if arguments.epochs is None else replace(chosen, epochs=arguments.epochs)


def training_settings(run: Run) -> dict[str, Any] | None:
    """Say what decides the training's outcome; None where the search is still to come."""
    chosen = chosen_hyperparameters(run.arguments, run.best)
    if chosen is None:
        return None
    if len(run.split.train) < 2:
        raise RunError(f"one training image in {run.images.source}: the network needs more")
    return {
        "network": run.network_config(chosen),
        "hyperparameters": asdict(chosen),
        "tuned": run.arguments.hyperparameters == "tuned",
        "seed": run.arguments.seed,
        "precision": run.arguments.precision,
        "compile": run.arguments.compile,
    }


def train(run: Run) -> None:
    """Train the poster's network; write history.csv and model.pt, the last epoch's weights."""
    arguments = run.arguments
    settings = run.begin("train")
    hyperparameters = model.Hyperparameters(**settings["hyperparameters"])
    network = model.build(settings["network"], arguments.seed)
    epochs, n = hyperparameters.epochs, len(run.split.train)
    progress = Progress("train", epochs)
    last = ""

    def on_epoch(record: model.EpochRecord) -> None:
        nonlocal last
        last = (
            f"epoch {record.epoch + 1}/{epochs}, learning rate {record.learning_rate:.3g}, "
            f"loss {record.train_loss:.4f}, validation {record.valid_loss:.4f}, "
            f"accuracy {record.train_accuracy:.4f}, validation {record.valid_accuracy:.4f}"
        )
        progress(record.epoch + 1, last, step=True)

    checkpoint = run.folder / "training.pt"
    try:
        history = model.fit(
            network,
            *run.part(run.split.train),
            *run.part(run.split.valid),
            hyperparameters,
            seed=arguments.seed,
            device=arguments.device,
            precision=arguments.precision,
            compile=arguments.compile,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            on_batch=lambda epoch, done: progress(epoch + done / n, last),
        )
    except model.CheckpointError as error:
        raise RunError(f"{error}; remove it, and training starts again") from None
    except ValueError as error:
        raise RunError(f"cannot train on {run.images.name}: {error}") from None
    progress.close()
    metrics.write_csv(run.folder / "history.csv", model.EpochRecord._fields, history)
    model.save_network(network, run.folder / "model.pt")
    seconds = sum(record.seconds for record in history)
    images = epochs * (n + len(run.split.valid))
    run.finish("train", {"seconds": seconds, "images_per_second": images / seconds})
    checkpoint.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- testing


def load_trained(run: Run) -> Any:
    """Read model.pt, and see that it is the network that run.json tells of."""
    if not run.finished("train"):
        raise RunError(f"{run.folder} holds no trained network: run --stage train first")
    network = model.load_network(run.folder / "model.pt")
    if network.config != run.record["train"]["settings"]["network"]:
        raise RunError(
            f"{run.folder / 'model.pt'} is another network than run.json tells of "
            f"({network.config}): run --stage train again"
        )
    return network


def test(run: Run) -> None:
    """Apply model.pt to the test images; write predictions, table, ROC curves."""
    network = load_trained(run)
    run.begin("test")
    images, labels = run.part(run.split.test)
    progress = Progress("test", len(images))
    started = time.perf_counter()
    logits = model.predict(
        network,
        images,
        device=run.arguments.device,
        on_batch=lambda done: progress(done, f"{done:,}/{len(images):,} images"),
    ).numpy()
    seconds = time.perf_counter() - started
    progress(len(images), f"{len(images):,} images in {duration(seconds)}", step=True)
    progress.close()
    predicted = logits.argmax(1)
    metrics.write_predictions(
        run.folder / "predictions.csv", run.split.test, labels, predicted, logits
    )
    write_metrics(run.folder, run.folder, run.data)
    run.finish("test", {"seconds": seconds, "images_per_second": len(images) / seconds})


def title(about: dict[str, Any]) -> str:
    """Say which data numbers are on, given run.json's `data`."""
    return f"{about['name']}, {about['split']} split, {about['sizes'][2]:,} test images"


def comparable(about: dict[str, Any]) -> bool:
    """Tell whether the poster's figures were measured on such images and such a split."""
    return about["md5"] == data.TISSUEMNIST.md5 and about["split"] == "poster"


def write_metrics(source: Path, target: Path, about: dict[str, Any]) -> dict[str, float]:
    """Write to `target` all that follows from `source`'s predictions.csv; return the summary."""
    _, labels, predicted, logits = metrics.read_predictions(source / "predictions.csv")
    names = about["class_names"]
    if len(names) != logits.shape[1]:
        raise metrics.MetricsError(
            f"{source / 'predictions.csv'} has {logits.shape[1]} classes, run.json {len(names)}"
        )
    matrix = metrics.confusion(labels, predicted, len(names))
    metrics.write_confusion(target / "confusion.csv", matrix)
    per_class = metrics.per_class(labels, predicted, len(names))
    metrics.write_classes(target / "per_class.csv", names, per_class)
    curves = metrics.roc_curves(labels, logits)
    aucs = metrics.class_aucs(labels, logits, curves)
    (target / "roc").mkdir(exist_ok=True)
    metrics.write_classes(target / "roc" / "auc.csv", names, aucs)
    for k, curve in enumerate(curves):
        metrics.write_roc(target / "roc" / f"class_{k}.csv", curve)
    summary = metrics.summary_from_confusion(matrix)
    intervals = metrics.bootstrap_intervals(matrix)
    rows = [(METRIC_NAMES[k], POSTER_TABLE[k], summary[k], *intervals[k]) for k in POSTER_TABLE]
    tolerances = [TOLERANCE[k] for k in POSTER_TABLE]
    if comparable(about):
        for k, (poster, auc) in enumerate(zip(POSTER_AUC, aucs, strict=True)):
            rows.append((f"AUC of class {k}", poster, auc.auc, auc.auc_low, auc.auc_high))
            tolerances.append(TOLERANCE["auc"])
    write_table(target, rows, tolerances, about)
    return summary


def write_table(
    folder: Path, rows: Sequence[tuple], tolerances: Sequence[float], about: dict[str, Any]
) -> None:
    """Write table.csv and table.md: the poster's figures beside this run's."""
    full, shown = [], []
    for (name, poster, value, low, high), tolerance in zip(rows, tolerances, strict=True):
        difference, verdict, text = "", "not comparable", ""
        if comparable(about):
            difference = value - poster
            verdict = "within" if abs(difference) <= tolerance else "outside"
            verdict, text = f"{verdict} {tolerance}", f"{difference:+.4f}"
        full.append((name, poster, value, low, high, difference, verdict, title(about)))
        interval = f"{low:.4f} to {high:.4f}"
        shown.append((name, f"{poster:.4f}", f"{value:.4f}", interval, text, verdict))
    header = ("metric", "poster", "this_run", "low_95", "high_95", "difference", "verdict", "on")
    metrics.write_csv(folder / "table.csv", header, full)
    heading = (
        "metric",
        "poster (TissueMNIST's images, 50,000 test)",
        f"this run ({title(about)})",
        "95 % interval",
        "difference",
        "verdict",
    )
    note = "" if comparable(about) else f"{NOT_COMPARABLE}\n\n"
    metrics.write_atomically(folder / "table.md", note + metrics.markdown_table(heading, shown))


# -------------------------------------------------------------------------------- several seeds


def aggregate(run: Run) -> None:
    """Write seeds.csv and seeds.md: how the figures of the seed-K folders spread."""
    run.begin("seeds")
    write_seeds(run.folder, run.folder, run.data, run.arguments.seeds)
    run.finish("seeds", {})


def write_seeds(source: Path, target: Path, about: dict[str, Any], seeds: Sequence[int]) -> None:
    """Write to `target` what follows from the predictions in `source`'s seed-K folders."""
    summaries = []
    for seed in seeds:
        read = metrics.read_predictions(source / f"seed-{seed}" / "predictions.csv")
        summaries.append(metrics.summary(read.labels, read.predicted, read.logits.shape[1]))
    rows = []
    for key, name in METRIC_NAMES.items():
        values = [summary[key] for summary in summaries]
        apart = [abs(a - b) for a, b in itertools.combinations(values, 2)]
        spread = (statistics.stdev(values), statistics.fmean(apart), max(apart))
        mean = statistics.fmean(values)
        rows.append((name, len(values), mean, spread[0], min(values), max(values), *spread[1:]))
    header = ("metric", "runs", "mean", "std", "min", "max", "mean_apart", "max_apart")
    metrics.write_csv(target / "seeds.csv", header, rows)
    shown = [(row[0], row[1], *(f"{value:.4f}" for value in row[2:])) for row in rows]
    metrics.write_atomically(
        target / "seeds.md",
        f"{title(about)}; seeds {', '.join(map(str, seeds))}. Two runs of the same settings lie "
        "`mean_apart` apart on average, `max_apart` at most.\n\n"
        + metrics.markdown_table(header, shown),
    )


# ---------------------------------------------------------------- the poster's other systems

SYSTEMS = ("KNN", "SVM (RBF)", "SVM (linear)", "NephNet2D", "PosterCNN")
TIMED_IMAGES = 1_000  # test images that prediction is timed on
POSTER_TRAIN = 120_000
COMPARE_HEADER = (
    *("system", "training_images", *METRIC_NAMES, "train_seconds"),
    *("predict_seconds_per_1000", "peak_memory_mb", "model_mb", "settings"),
)


@dataclass(frozen=True)
class Job:
    """One system to be trained on some images, and applied; pairs are images and labels."""

    system: str
    train: tuple[Any, Any]
    valid: tuple[Any, Any]
    test: tuple[Any, Any]
    network: dict[str, Any]
    hyperparameters: model.Hyperparameters
    options: dict[str, Any]
    """The seed, device, precision and compile of `model.fit`."""


def comparison_sizes(top: int) -> list[int]:
    """List 1,000, 2,000, 5,000, ... and `top`; on small data the last three below `top`."""
    series = [k * 10**exponent for exponent in range(1, 9) for k in (1, 2, 5)]
    below = [size for size in series if 1.5 * size <= top]
    return [*(below[-3:] if len(below) < 9 else below[6:]), top]


def comparison_settings(run: Run) -> dict[str, Any]:
    """Say what decides the comparison's outcome."""
    chosen = chosen_hyperparameters(run.arguments, run.best)
    top = min(run.arguments.compare_max, len(run.split.train))
    if chosen is None:
        raise RunError(f"no {run.best} to take tuned hyperparameters from: run --stage tune first")
    if top < max(10, run.images.num_classes):
        raise RunError(f"{top} training images are too few to compare on")
    return {
        "sizes": comparison_sizes(top),
        "systems": SYSTEMS,
        "hyperparameters": asdict(chosen),
        "seed": run.arguments.seed,
        "precision": run.arguments.precision,
    }


def compare(run: Run) -> None:
    """Train and apply each system at growing training sizes, each time in a process of its own."""
    settings = run.begin("compare")
    sizes, arguments = settings["sizes"], run.arguments
    log = run.folder / "measured.json"
    try:
        rows = read_json(log)["rows"] if log.exists() else []
    except RunError as error:
        raise RunError(f"{error}, or remove it to measure again") from None
    hyperparameters = model.Hyperparameters(**settings["hyperparameters"])
    # In a random order, but for one image of each class at the head: a prefix has every class.
    pool = random.Random(arguments.seed).sample(run.split.train.tolist(), len(run.split.train))
    head = {int(run.images.labels[index]): index for index in reversed(pool)}
    pool = [*head.values(), *(index for index in pool if index not in {*head.values()})]
    options = {key: getattr(arguments, key) for key in ("seed", "device", "precision")}
    options["compile"] = "off"  # else a network's time would jump where it starts to pay
    progress = Progress("compare", len(SYSTEMS) * sum(sizes))
    done = 0
    for size, system in itertools.product(sizes, SYSTEMS):
        row = next((r for r in rows if (r["system"], r["images"]) == (system, size)), None)
        if row is None:
            config = run.network_config(hyperparameters) | {"network": system}
            if system == "NephNet2D":
                config["num_features"] = 32
            last = size == sizes[-1]
            job = Job(
                system,
                run.part(pool[:size]),
                run.part(run.split.valid[: max(1, size // 4)]),  # the poster's 80/20
                run.part(run.split.test[: None if last else TIMED_IMAGES]),
                config,
                hyperparameters,
                options,
            )

            def tell(share: float, done: int = done, job: Job = job) -> None:
                progress(done + share * len(job.train[0]), f"{job.system} is training")

            row = in_own_process(job, tell)
            rows.append(row)
            write_json(log, {"rows": rows})
        done += size
        shown = f"training {row['train_seconds']:.3g} s, prediction of 1,000 "
        shown += f"{row['predict_seconds_per_1000']:.3g} s, {row['peak_memory_mb']:.0f} MB"
        progress(done, f"{system}, {size:,} images: {shown}", step=True)
    progress.close()
    rows.sort(key=lambda row: (SYSTEMS.index(row["system"]), row["images"]))
    scaling = [[row[key] for key in metrics.SCALING_HEADER] for row in rows]
    metrics.write_csv(run.folder / "scaling.csv", metrics.SCALING_HEADER, scaling)
    table = [
        [row["images" if key == "training_images" else key] for key in COMPARE_HEADER]
        for row in rows
        if row["images"] == sizes[-1]
    ]
    metrics.write_csv(run.folder / "compare.csv", COMPARE_HEADER, table)
    write_comparison(run.folder, run.folder, run.data, run.record["compare"])
    run.finish("compare", {"seconds": sum(row["seconds"] for row in rows)})
    log.unlink(missing_ok=True)


def in_own_process(job: Job, tell: Callable[[float], None]) -> dict[str, Any]:
    """Measure a job in a new process, so that no other's memory and caches count."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=answer, args=(job, theirs), daemon=True)
    with ours:
        try:
            with hyperband.unheard_interrupt():  # Ctrl-C is for us alone
                process.start()
            theirs.close()
            while isinstance(message := ours.recv(), float):
                tell(message)
        except EOFError:
            message = "its process ended early (out of memory?)"
        finally:
            if process.pid:
                process.kill()
                process.join()
            process.close()
    if isinstance(message, str):
        raise RunError(f"{job.system} on {len(job.train[0]):,} images: {message}")
    return message


def answer(job: Job, pipe: Any) -> None:
    """Send shares done of a job, then its measurements, or what went wrong."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of classes never predicted
            pipe.send(measure(job, pipe.send))
    except Exception as error:  # whatever a system raises is its user's to read, in one line
        pipe.send((str(error).splitlines() or [type(error).__name__])[0])


def measure(job: Job, tell: Callable[[float], None]) -> dict[str, Any]:
    """Train and apply a job's system; return times, memory, size and metrics on `job.test`."""
    started = time.perf_counter()
    make = network_system if job.system in model.NETWORKS else classical_system
    images, labels = job.test
    # Once on a few images, lest the libraries' own first steps be measured.
    few = slice(max(10, job.network["num_classes"]))
    learn, apply, *_ = make(job, lambda share: None)
    learn(job.train[0][few], job.train[1][few], epochs=1)
    apply(images[few])
    learn, apply, settings, size = make(job, tell)
    before = peak_memory(reset=True)
    clock = [time.perf_counter()]
    learn(*job.train)
    clock.append(time.perf_counter())
    predicted = list(apply(images[:TIMED_IMAGES]))
    clock.append(time.perf_counter())
    peak = peak_memory() - before
    if len(images) > TIMED_IMAGES:
        predicted += list(apply(images[TIMED_IMAGES:]))
    return {
        "system": job.system,
        "images": len(job.train[0]),
        **metrics.summary(labels, [int(k) for k in predicted], job.network["num_classes"]),
        "train_seconds": clock[1] - clock[0],
        "predict_seconds_per_1000": (clock[2] - clock[1]) * 1000 / min(len(images), TIMED_IMAGES),
        "peak_memory_mb": max(peak, 4096) / 1e6,  # a page at least: it stands on a log axis
        "model_mb": size() / 1e6,
        "settings": settings(),
        "seconds": time.perf_counter() - started,
    }


def classical_system(job: Job, tell: Callable[[float], None]) -> tuple[Callable, ...]:
    """Give functions that train one of scikit-learn's classifiers, apply, describe and size it."""
    import sklearn
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC, LinearSVC

    classifier = {
        "KNN": KNeighborsClassifier,
        "SVM (RBF)": SVC,
        "SVM (linear)": partial(LinearSVC, random_state=job.options["seed"]),
    }[job.system]()
    notes: list[str] = []

    def flat(images: Any) -> Any:
        return images.reshape(len(images), -1).astype("float32") / 255

    def learn(images: Any, labels: Any, epochs: int | None = None) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classifier.fit(flat(images), labels)
        notes.extend("not converged" for w in caught if "converge" in str(w.message))

    def settings() -> str:
        with sklearn.config_context(print_changed_only=False):
            return "; ".join([" ".join(repr(classifier).split()), *notes])

    def apply(images: Any) -> Any:
        return classifier.predict(flat(images))

    return learn, apply, settings, lambda: len(pickle.dumps(classifier))


def network_system(job: Job, tell: Callable[[float], None]) -> tuple[Callable, ...]:
    """Give functions that train a network, apply, describe and size it."""
    network = model.build(job.network, job.options["seed"])
    parameters = sum(weights.numel() for weights in network.parameters())

    def learn(images: Any, labels: Any, epochs: int = job.hyperparameters.epochs) -> None:
        model.fit(
            network,
            images,
            labels,
            *job.valid,
            replace(job.hyperparameters, epochs=epochs),
            **job.options,
            on_epoch=lambda record: tell((record.epoch + 1) / epochs),
        )

    def apply(images: Any) -> Any:
        return model.predict(network, images, device=job.options["device"]).numpy().argmax(1)

    return (
        learn,
        apply,
        lambda: f"{parameters:,} parameters, {job.hyperparameters.epochs} epochs, uncompiled",
        lambda: sum(t.numel() * t.element_size() for t in network.state_dict().values()),
    )


def peak_memory(reset: bool = False) -> float:
    """Give the most bytes this process has held, on Linux since the last `reset`."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)


def growth(rows: Sequence[dict[str, str]], system: str, column: str) -> float:
    """Fit p of `column` = a * images ** p by least squares on logarithms; NaN for one size."""
    mine = [row for row in rows if row["system"] == system]
    points = [(float(row["images"]), float(row[column])) for row in mine]
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def write_comparison(
    source: Path, target: Path, about: dict[str, Any], entry: dict[str, Any]
) -> None:
    """Write to `target` compare.md, which follows from `source`'s compare.csv and scaling.csv."""
    rows, scaling = (
        [dict(zip(header, row, strict=True)) for row in metrics.read_csv(source / name, header)]
        for name, header in (
            ("compare.csv", COMPARE_HEADER),
            ("scaling.csv", metrics.SCALING_HEADER),
        )
    )
    where, size = entry["environment"], int(rows[0]["training_images"])
    columns = metrics.SCALING_HEADER[2:]
    powers = {system: [growth(scaling, system, c) for c in columns] for system in SYSTEMS}
    shown = [
        (
            row["system"],
            *(f"{float(row[key]):.4f}" for key in METRIC_NAMES),
            *(f"{float(row[key]):.3g}" for key in (*columns, "model_mb")),
        )
        for row in rows
    ]
    times = ("training, s", "prediction of 1,000, s", "peak memory, MB")
    heading = ("system", *METRIC_NAMES.values(), *times, "model, MB")
    grown = [(s, *(f"{power:.2f}" for power in powers[s])) for s in SYSTEMS]
    sizes = ", ".join(f"{n:,}" for n in entry["settings"]["sizes"])
    settings = "".join(f"- {row['system']}: {row['settings']}\n" for row in rows)
    metrics.write_atomically(
        target / "compare.md",
        f"{title(about)}; {size:,} training images, device {where['device']}, "
        f"{where['threads']} threads.\n\n{metrics.markdown_table(heading, shown)}\n"
        "KNN and SVM, with scikit-learn's defaults, take the pixels divided by 255. A network's "
        "training includes validation on a quarter as many images. Memory is the process's, above "
        f"what it held before training; a GPU's is not counted.\n\n{settings}\n"
        f"Exponents p of the growth n^p, fitted by least squares on logarithms to n = {sizes} "
        f"training images (scaling.csv):\n\n"
        + metrics.markdown_table(("system", "training", "prediction", "peak memory"), grown)
        + "\n"
        + "\n\n".join(claims({row["system"]: row for row in rows}, powers, size))
        + "\n",
    )


def claims(
    rows: dict[str, dict[str, str]], powers: dict[str, list[float]], size: int
) -> tuple[str, str]:
    """Say whether the poster's two claims hold, given `write_comparison`'s measurements."""
    knn, cnn = rows["KNN"], rows["PosterCNN"]
    more = [float(knn[c]) > float(cnn[c]) for c in metrics.SCALING_HEADER[3:]]
    verdict = {
        (True, True): "holds here",
        (True, False): "holds here for computation, not for memory",
        (False, True): "holds here for memory, not for computation",
        (False, False): "does not hold here",
    }[more[0], more[1]]

    def at_posters(system: str) -> float:
        measured = float(rows[system]["train_seconds"])
        return measured * (POSTER_TRAIN / size) ** powers[system][0]

    rbf, network = powers["SVM (RBF)"][0], powers["PosterCNN"][0]
    suits = "does not hold here"
    if rbf > max(1.0, network):
        slower = at_posters("SVM (RBF)") > at_posters("PosterCNN")
        suits = "holds here" if slower else "holds here for growth, not for time"
    if math.isnan(rbf) or size < 1000:
        return ("From fewer than 1,000 training images nothing can be said of the claims.", "")
    return (
        f'"KNN has a large amount of computation and memory overhead" **{verdict}**: after '
        f"{size:,} training images, predicting 1,000 takes "
        f"{float(knn['predict_seconds_per_1000']):.3g} s (PosterCNN "
        f"{float(cnn['predict_seconds_per_1000']):.3g} s) and grows as n^{powers['KNN'][1]:.2f}; "
        f"memory peaks at {float(knn['peak_memory_mb']):.3g} MB (PosterCNN "
        f"{float(cnn['peak_memory_mb']):.3g} MB) and grows as n^{powers['KNN'][2]:.2f}; the model "
        f"takes {float(knn['model_mb']):.3g} MB (PosterCNN {float(cnn['model_mb']):.3g} MB).",
        f'SVM "doesn\'t suitable for large-scale training samples" **{suits}**: training the RBF '
        f"SVM grows as n^{rbf:.2f} (PosterCNN n^{network:.2f}, linear SVM "
        f"n^{powers['SVM (linear)'][0]:.2f}; the claim asks for more than 1 and than PosterCNN's), "
        f"which makes {duration(at_posters('SVM (RBF)'))} of the poster's {POSTER_TRAIN:,} images "
        "if it goes on so "
        f"(PosterCNN {duration(at_posters('PosterCNN'))}, linear SVM "
        f"{duration(at_posters('SVM (linear)'))}).",
    )


# ---------------------------------------------------------------------- figures and the report

NO_MATPLOTLIB = "figures need matplotlib: pip install -r requirements-figures.txt"
FIGURES = {  # with what stands in the report
    "class_ratios": "Class ratios of the test images",
    "confusion": "Confusion matrix: counts, shaded by share of the true class",
    "roc": "ROC curves by raw logits, each class against the rest",
    "history": "Accuracy and loss over the epochs",
    "search": "Search: validation loss of each trial",
    "scaling": "Training time, prediction time and peak memory over training images",
    "samples": "The first images of each class",
}


def drawable() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(run: Run) -> None:
    """Draw figures/ from the CSV files that are there, and sample images from the data."""
    run.begin("figures")
    (run.folder / "figures").mkdir(exist_ok=True)
    poster = {"reference_auc": POSTER_AUC, "reference_name": "poster"}
    roc = partial(metrics.draw_roc, **(poster if comparable(run.data) else {}))
    for name, function, *sources in (
        ("class_ratios", metrics.draw_class_ratios, "per_class.csv"),
        ("confusion", metrics.draw_confusion, "confusion.csv"),
        ("roc", roc, "roc", "roc/auc.csv", "per_class.csv"),
        ("history", metrics.draw_history, "history.csv"),
        ("search", metrics.draw_search, "tuning.jsonl"),
        ("scaling", metrics.draw_scaling, "scaling.csv"),
    ):
        paths = [run.folder / source for source in sources]
        if all(path.exists() for path in paths):
            function(*paths, run.folder / "figures" / name)
    images = run.images
    stem = run.folder / "figures" / "samples"
    metrics.draw_samples(images.images, images.labels, images.class_names, stem)
    run.finish("figures", {})


def report(run: Run) -> None:
    """Write report.md: what was run on what, how it came out, and how it was made."""
    if not any((run.folder / name).exists() for name in ("table.md", "seeds.md")):
        raise RunError(f"{run.folder} holds no table to report: run --stage test first")
    run.begin("report")
    write_report(run.folder, run.folder, run.record)
    run.finish("report", {})


def write_report(source: Path, target: Path, record: dict[str, Any]) -> None:
    """Write to `target` the report.md that follows from `source`'s files and run.json."""
    about, trained = record["data"], record.get("train")
    seeds = []
    if trained is None:  # several seeds: each has trained in a folder of its own
        seeds = [f"seed-{seed}" for seed in record["seeds"]["settings"]["seeds"]]
        each = [read_json(source / seed / "run.json")["train"] for seed in seeds]
        seconds = sum(one["result"]["seconds"] for one in each)
        trained = {**each[0], "result": {"seconds": seconds}}

    def content(name: str) -> str:
        path = source / name
        return path.read_text(encoding="utf-8").replace(f"{NOT_COMPARABLE}\n\n", "").strip()

    parts = [f"# {about['name']}: a run of the poster's chain"]
    if not comparable(about):
        parts.append(f"**{NOT_COMPARABLE}**")
    parts += ["## What was run", "\n".join(f"- {line}" for line in what_was_run(record, trained))]
    parts.append("## Results")
    parts += [content(name) for name in ("table.md", "seeds.md") if (source / name).exists()]
    told = [
        f"[{seed}]({seed}/report.md)" for seed in seeds if (source / seed / "report.md").exists()
    ]
    parts += [f"Each seed's own report: {', '.join(told)}."] * bool(told)
    if (source / "table.md").exists():
        parts.append(
            "Intervals: percentile bootstrap over the test images (10,000 replicates); DeLong's "
            "for AUC, which has no width at 1. Tolerances were fixed before any run."
        )
        parts += ["## Classes", class_table(source, about)]
    if (source / "compare.md").exists():
        parts += ["## KNN, SVM, NephNet2D and PosterCNN", content("compare.md")]
    drawn = [name for name in FIGURES if (source / "figures" / f"{name}.png").exists()]
    parts += ["## Figures"] * bool(drawn)
    parts += [f"{FIGURES[name]}:\n\n![{name}](figures/{name}.png)" for name in drawn]
    parts.append("## Deviations from the poster")
    parts.append("\n".join(f"- {line}" for line in deviations(record, trained)))
    parts += ["## Provenance", metrics.markdown_table(("what", ""), provenance(record, trained))]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    metrics.write_atomically(target / "report.md", text)


def what_was_run(record: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """Tell of data, search and training in a line each."""
    about, settings = record["data"], trained["settings"]
    sizes = " / ".join(f"{size:,}" for size in about["sizes"])
    shape = "x".join(map(str, about["shape"][1:]))
    lines = [
        f"Data: {about['name']}, {about['shape'][0]:,} images of {shape} pixels in "
        f"{len(about['class_names'])} classes; {about['split']} split, {sizes} train / validation "
        "/ test."
    ]
    if "result" in record.get("tune", {}):
        flows = [[f"{n}@{r}" for n, r in rungs] for rungs in record["tune"]["settings"]["schedule"]]
        lines.append(
            f"Search: {'; '.join(' -> '.join(flow) for flow in flows)} (configurations@epochs), "
            f"{record['tune']['result']['trials']} trials, "
            f"{record['tune']['result']['failed']} of them failed."
        )
    epochs = settings["hyperparameters"]["epochs"]
    network = settings["network"]["network"]
    lines.append(f"Training: {network}, {epochs} epochs; the last one's weights are tested.")
    return lines


def class_table(source: Path, about: dict[str, Any]) -> str:
    """Put per_class.csv and roc/auc.csv side by side, and the poster's AUC where comparable."""
    rows = []
    for k, (figures, area) in enumerate(
        zip(
            metrics.read_csv(source / "per_class.csv", metrics.PER_CLASS_HEADER),
            metrics.read_csv(source / "roc" / "auc.csv", metrics.AUC_HEADER),
            strict=True,
        )
    ):
        shown = [f"{float(cell):.4f}" for cell in (*figures[2:5], *area[2:5])]
        poster = [f"{POSTER_AUC[k]:.4f}"] if comparable(about) else []
        name = figures[1] if figures[1] in (str(k), f"class {k}") else f"{k}: {figures[1]}"
        row = (name, figures[5], *shown[:4], f"{shown[4]} to {shown[5]}", *poster)
        rows.append(row)
    header = ["class", "test images", "precision", "recall", "F1", "AUC", "95 % interval of AUC"]
    return metrics.markdown_table(header + ["poster's AUC"] * comparable(about), rows)


def deviations(record: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """List what differs from what the poster did."""
    about, settings = record["data"], trained["settings"]
    lines = [f"Images: {about['name']}, {about['split']} split; the poster's are TissueMNIST's."]
    if about["md5"] == data.TISSUEMNIST.md5:
        lines = [
            "TissueMNIST instead of the authors' JPEG copy of the same images, "
            + (
                "200,000 of its 236,386, shuffled here."
                if comparable(about)
                else f"{about['split']} split instead of theirs."
            )
        ]
    for name, value in settings["hyperparameters"].items():
        if value != getattr(model.POSTER, name):
            lines.append(f"{name} {value} instead of {getattr(model.POSTER, name)}.")
    used = trained["environment"]["precision"]
    mixed = "no mixed precision" if used == "fp32" else f"torch.autocast in {used}"
    lines.append(f"Training with {mixed} on {trained['environment']['device']} instead of Apex.")
    if "tune" in record and not record["tune"]["settings"]["retrain"]:
        lines.append("Survivors of a rung of the search go on training instead of starting again.")
    if "tune" in record:
        lines.append("The search draws its images from training and validation images only.")
    return lines


def provenance(record: dict[str, Any], trained: dict[str, Any]) -> list[tuple[str, Any]]:
    """Give the rows of the report's last table."""
    about, where = record["data"], trained["environment"]
    stages = {**record, "train": trained}
    seconds = {name: stages.get(name, {}).get("result", {}).get("seconds") for name in OUTPUTS}
    seeds = record.get("seeds", {}).get("settings", {}).get("seeds")
    seed = about["split_seed"]
    versions = ("python", "torch", "numpy", "scikit-learn", "platform")
    taken = {name: duration(value) for name, value in seconds.items() if value is not None}
    return [
        ("MD5 of the data", about["md5"]),
        ("split", about["split"] + ("" if seed is None else f", seed {seed}")),
        ("seed", trained["settings"]["seed"] if seeds is None else ", ".join(map(str, seeds))),
        *trained["settings"]["hyperparameters"].items(),
        *((name, where[name]) for name in versions),
        ("device", f"{where['device']} {where['device_name']}, {where['threads']} threads"),
        ("precision", f"{trained['settings']['precision']}: {where['precision']}"),
        ("computing time", ", ".join(f"{name} {time}" for name, time in taken.items())),
        ("git commit", where["git_commit"]),
    ]


# ---------------------------------------------------------------------------- unlabelled images


def predict(arguments: argparse.Namespace) -> None:
    """Apply a saved network to images without labels; write a CSV, complete or not at all."""
    target, source = Path(arguments.output), Path(arguments.model)
    if target.is_dir():
        raise RunError(f"{target} is a folder: choose another --output, a file")
    if target.exists() and not arguments.overwrite:
        raise RunError(f"{target} exists: choose another --output, or say --overwrite")
    if not target.parent.is_dir():
        raise RunError(f"{target.parent}: no such folder")
    network = model.load_network(source)
    progress = Progress("predict", 1)

    def decoded(done: int, total: int) -> None:
        progress.total = total
        progress(done, f"{done:,} of {total:,} images decoded", step=done == total)

    ids, images = data.load_images(arguments.images, decoded)
    progress.close()
    progress = Progress("predict", len(images))
    try:
        logits = model.predict(
            network,
            images,
            device=arguments.device,
            on_batch=lambda done: progress(done, f"{done:,}/{len(images):,} images"),
        ).numpy()
    except ValueError as error:
        raise RunError(f"{arguments.images}: {error}") from None
    progress.close()
    predicted = logits.argmax(1).tolist()
    if arguments.submission:
        if not all(name.isdecimal() for name in ids) or len({*map(int, ids)}) < len(ids):
            raise RunError(f"{arguments.images}: --submission needs files named by integer ids")
        rows = zip(map(int, ids), predicted, strict=True)
        metrics.write_csv(target, ("Id", "Cell type"), rows)
    else:
        count = logits.shape[1]
        names = [f"class {k}" for k in range(count)]
        if (source.parent / "run.json").exists():  # a results folder
            known = read_json(source.parent / "run.json")["data"]["class_names"]
            names = known if len(known) == count else names
        header = ("id", "predicted", "class_name", *(f"probability_{k}" for k in range(count)))
        cells = zip(ids, predicted, metrics.softmax(logits).tolist(), strict=True)
        metrics.write_csv(target, header, ((i, k, names[k], *shares) for i, k, shares in cells))
    print(f"wrote {target}: {len(ids):,} images")


# --------------------------------------------------------------------------------------- audit


class Audit:
    """Prints a line a check: what, stored, recomputed, ok or WRONG; counts the wrong ones."""

    def __init__(self) -> None:
        self.checks = self.wrong = 0

    def __call__(self, what: str, stored: Any, recomputed: Any, ok: bool | None = None) -> None:
        """Take one check; by default both sides must be equal."""
        ok = stored == recomputed if ok is None else ok
        self.checks += 1
        self.wrong += not ok
        print(f"{'ok' if ok else 'WRONG':<6} {what}: {stored} | {recomputed}", flush=True)


def audit_poster(audit: Audit) -> None:
    """Check the poster against itself: its table and class ratios from its confusion matrix."""
    recomputed = metrics.summary_from_confusion(POSTER_CONFUSION)
    for key, printed in POSTER_TABLE.items():
        cut = math.floor(recomputed[key] * 1e4) / 1e4
        rounded = round(recomputed[key], 4)
        note = "" if printed == rounded else " (the poster cuts it, rounded it would be "
        note += f"{rounded})" if note else ""
        audit(
            f"poster, {METRIC_NAMES[key]} of its confusion matrix",
            printed,
            f"{recomputed[key]:.6f}{note}",
            printed in (rounded, cut),
        )
    support = tuple(map(sum, POSTER_CONFUSION))
    ratios = tuple(round(row / sum(support), 2) for row in support)
    audit("poster, class ratios of its confusion matrix", POSTER_RATIOS, ratios)
    audit("poster, test images of its confusion matrix", 50_000, sum(support))


def audit_files(audit: Audit, folder: Path, record: dict[str, Any]) -> None:
    """Check every file of the folder against the fingerprint in run.json."""
    for stage in OUTPUTS:
        for name, stored in record.get(stage, {}).get("files", {}).items():
            try:
                content = (folder / name).read_bytes()
            except OSError as error:
                audit(f"{name} is as it was written", stored[:12], error.strerror, False)
                continue
            found = fingerprint(content)
            place = "" if found == stored else f" ({locate(name, content, stored)})"
            shown = found.split()[0][:12] + place
            audit(f"{name} is as it was written", stored[:12], shown, found == stored)


def audit_cells(audit: Audit, stored: Path, recomputed: Path) -> None:
    """Compare two text files cell by cell; name the first that differs."""
    shown = f"roc/{stored.name}" if stored.parent.name == "roc" else stored.name
    if not stored.exists():
        audit(f"{shown} follows from the other files", "no such file", "", False)
        return
    tables = []
    for path in (stored, recomputed):
        text = path.read_bytes().decode("utf-8", "replace").removesuffix("\n")
        split = csv.reader if path.suffix == ".csv" else (lambda rows: [[row] for row in rows])
        tables.append(list(split(text.split("\n"))))
    header = tables[1][0] if stored.suffix == ".csv" else ["text"]
    for row, pair in enumerate(itertools.zip_longest(*tables, fillvalue=[]), 1):
        for column, (a, b) in enumerate(itertools.zip_longest(*pair, fillvalue="nothing")):
            if a != b:
                name = header[column] if column < len(header) else column + 1
                audit(f"{shown}, row {row}, column {name}", a, b)
                return
    audit(f"{shown} follows from the other files", f"{len(tables[0])} rows", "all equal", True)


def audit_search(audit: Audit, run_folder: Path, settings: dict[str, Any]) -> None:
    """Replay tuning.jsonl without training.

    Its configurations follow from the seed, and best.json from its losses.
    """

    def missing(*_: Any) -> float:
        raise hyperband.SearchError("the log ends before the search does")

    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "tuning.jsonl")
        try:
            shutil.copy(run_folder / "tuning.jsonl", log)
            stored = read_json(run_folder / "best.json")
            result = hyperband.search(
                missing,
                SPACE,
                [[hyperband.Rung(*rung) for rung in rungs] for rungs in settings["schedule"]],
                settings["seed"],
                log=log,
                retrain=settings["retrain"],
            )
        except (OSError, RunError, hyperband.SearchError) as error:
            shown = str(error).replace(str(log), "tuning.jsonl")
            audit("tuning.jsonl and best.json", "readable", shown, False)
            return
        errors = [t.error for t in result.trials if t.error and "the log ends" in t.error]
        audit("tuning.jsonl is whole", 0, len(errors))
        found = best_content(result.best)
        shown = (f"trial {best['trial']}, loss {best['loss']}" for best in (stored, found))
        audit("best.json is the best of tuning.jsonl", *shown, stored == found)


def audit_training(audit: Audit, folder: Path, settings: dict[str, Any]) -> None:
    """Check history.csv against run.json's settings, and these against best.json if tuned."""
    hyperparameters = settings["hyperparameters"]
    try:
        rows = metrics.read_csv(folder / "history.csv", model.EpochRecord._fields)
    except (OSError, metrics.MetricsError) as error:
        audit("history.csv", "readable", str(error), False)
        return
    audit("history.csv, number of epochs", len(rows), hyperparameters["epochs"])
    first = rows[0][1] if rows else "none"
    audit("history.csv, first learning rate", first, str(hyperparameters["learning_rate"]))
    best = next((p for p in (folder, folder.parent) if (p / "best.json").exists()), None)
    if settings["tuned"] and best:
        with contextlib.suppress(RunError):  # which audit_files has told of
            found = read_json(best / "best.json")["hyperparameters"]
            found["epochs"] = hyperparameters["epochs"]
            audit("run.json, the hyperparameters of best.json", hyperparameters, found)


def audit_model(audit: Audit, run: Run) -> None:
    """Check data and split against run.json, and the logits against model.pt and the images."""
    for key in [key for key in run.data if key not in ("source", "test_source")]:
        stored, found = run.record["data"].get(key), run.data[key]
        shown = (textwrap.shorten(str(value), 60) for value in (stored, found))
        audit(f"data, {key}", *shown, stored == found)
    read = metrics.read_predictions(run.folder / "predictions.csv")
    images, labels = run.part(run.split.test)
    audit("predictions.csv, column id: the test split", *same(read.ids, run.split.test))
    audit("predictions.csv, column label: the data's", *same(read.labels, labels))
    logits = model.predict(load_trained(run), images, device=run.arguments.device).numpy()
    if logits.shape != read.logits.shape:
        audit("predictions.csv: logits of model.pt", read.logits.shape, logits.shape)
        return
    difference = abs(logits - read.logits)
    row, column = divmod(int(difference.argmax()), logits.shape[1])
    limit = LOGIT_TOLERANCE * max(1.0, float(abs(logits).max()))
    audit(
        f"predictions.csv, row {row + 2}, column logit_{column}: farthest from model.pt's logits",
        float(read.logits[row, column]),
        float(logits[row, column]),
        bool((difference <= limit).all()),
    )


def same(stored: Any, recomputed: Any) -> tuple[str, str, bool]:
    """Compare two integer columns; name the first row that differs."""
    if len(stored) != len(recomputed):
        return f"{len(stored)} rows", f"{len(recomputed)} rows", False
    wrong = (stored != recomputed).nonzero()[0]
    if len(wrong):
        return f"row {wrong[0] + 2}: {stored[wrong[0]]}", str(recomputed[wrong[0]]), False
    return f"{len(stored)} rows", "all equal", True


def verify(folder: Path, run: Run | None) -> bool:
    """Check a results folder without training; tell whether all is as it should be.

    Without `run` (``--no-model``), neither model.pt nor the data are looked at.
    """
    audit = Audit()
    audit_poster(audit)
    record: dict[str, Any] = {}
    if (folder / "run.json").exists():
        try:
            record = read_json(folder / "run.json")
            audit("run.json is as it was written", "checksum", "equal", True)
        except RunError as error:
            audit("run.json is as it was written", "checksum", str(error), False)
            print(f"the other files of {folder} are judged by run.json: not checked")
            return False
    audit_files(audit, folder, record)
    if "result" in record.get("tune", {}):
        audit_search(audit, folder, record["tune"]["settings"])
    if "result" in record.get("train", {}):
        audit_training(audit, folder, record["train"]["settings"])
    if "result" in record.get("seeds", {}):
        seeds = record["seeds"]["settings"]["seeds"]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                write_seeds(folder, Path(scratch), record["data"], seeds)
            except (OSError, metrics.MetricsError) as error:
                audit("seeds.csv follows from the predictions", "readable", str(error), False)
            for path in sorted(Path(scratch).iterdir()):
                audit_cells(audit, folder / path.name, path)
    audit_texts(audit, folder, record)
    if (folder / "predictions.csv").exists():
        audit_predictions(audit, folder, record, run)
    elif not any("result" in record.get(stage, {}) for stage in ("seeds", "compare")):
        raise RunError(f"{folder} holds no predictions.csv to verify: run --stage test first")
    if audit.wrong:
        print(f"{audit.wrong} of {audit.checks} checks are WRONG in {folder}")
    else:
        print(f"all {audit.checks} checks ok in {folder}")
    return not audit.wrong


def audit_texts(audit: Audit, folder: Path, record: dict[str, Any]) -> None:
    """Write compare.md and report.md again from the other files, and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        for stage in ("compare", "report"):
            if "result" not in record.get(stage, {}):
                continue
            try:
                if stage == "compare":
                    write_comparison(folder, Path(scratch), record["data"], record["compare"])
                else:
                    write_report(folder, Path(scratch), record)
            except (OSError, LookupError, ValueError, ArithmeticError) as error:
                audit(f"what {stage}.md follows from", "readable", str(error), False)
                continue
            audit_cells(audit, folder / f"{stage}.md", Path(scratch, f"{stage}.md"))


def audit_predictions(audit: Audit, folder: Path, record: dict[str, Any], run: Run | None) -> None:
    """Recompute all that follows from predictions.csv, and predictions.csv from model.pt."""
    try:
        read = metrics.read_predictions(folder / "predictions.csv")
    except metrics.MetricsError as error:
        audit("predictions.csv", "readable", str(error), False)
        return
    num_classes = read.logits.shape[1]
    about = record.get("data") or {
        "name": "unknown data",
        "md5": None,
        "split": "unknown",
        "sizes": [0, 0, len(read.labels)],
        "class_names": [f"class {k}" for k in range(num_classes)],
    }
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without test images; said when it was written
        try:
            summary = write_metrics(folder, Path(scratch), about)
        except metrics.MetricsError as error:
            audit("predictions.csv", "as run.json tells", str(error), False)
            return
        for path in sorted(p for p in Path(scratch).rglob("*") if p.is_file()):
            stored = folder / path.relative_to(scratch)
            if record or stored.exists():
                audit_cells(audit, stored, path)
        if run is not None:
            try:
                audit_model(audit, run)
            except (RunError, model.CheckpointError) as error:
                audit("model.pt", "readable", str(error), False)
        for key, value in summary.items():
            print(f"{'':<6} {METRIC_NAMES[key]} of predictions.csv: {value:.6f}")


SETTINGS: dict[str, Callable[[Run], dict | None]] = {
    "tune": tuning_settings,
    "train": training_settings,
    "test": lambda run: {"precision": "fp32"},
    "seeds": lambda run: {"seeds": run.arguments.seeds},
    "compare": comparison_settings,
    "figures": lambda run: {},
    "report": lambda run: {},
}
WORK: dict[str, Callable[[Run], None]] = {
    "tune": tune,
    "train": train,
    "test": test,
    "seeds": aggregate,
    "compare": compare,
    "figures": draw,
    "report": report,
}


# ------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """Make an argument type: an integer from `least` to `most`, or to the largest seed of all."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text[:11]) <= most:
            limit = f" (to {most:,})" * (most < 2**32 - 1)
            raise argparse.ArgumentTypeError(
                f"{text[:20]!r} is no whole number from {least} up{limit}"
            )
        return int(text)

    return convert


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="reproduce.py",
        description='Regenerate the results of the poster "Medical Image Classification Model '
        'Based on CNN".',
    )
    add = parser.add_argument
    add(
        "--stage",
        choices=("all", *STAGES, "verify", "figures", "report", "compare", "predict"),
        default="all",
        help="default: all but the last two",
    )
    add("--data", metavar="SOURCE", help=f"{data.SOURCES}; default: auto")
    add("--test-data", metavar="FOLDER", help="test on this; 80/20 %% of the folder --data: train")
    add(
        "--root",
        default="~/.medmnist",
        help="where downloads and decoded folders are kept: %(default)s",
    )
    add("--split", choices=("poster", "official"), help="default: poster, 60/15/25 %% at random")
    add("--split-seed", type=at_least(0), metavar="N", help="default: 0")
    add(
        "--hyperparameters",
        default="poster",
        metavar="{poster,authors,tuned,FILE.json}",
        help="what to train with; default: poster",
    )
    add("--epochs", type=at_least(1), metavar="N", help="default: the hyperparameters', 100")
    add("--seed", type=at_least(0), default=0, metavar="N", help="weights, order, dropout, search")
    add("--seeds", type=at_least(0), nargs="+", metavar="N", help="train and test once a seed")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default: auto")
    add("--precision", choices=model.PRECISIONS, default="auto", help="default: auto")
    add("--compile", choices=model.COMPILE, default="auto", help="training; default: auto")
    add("--schedule", choices=("poster", "hyperband"), default="poster", help="of the search")
    top = at_least(1, 100_000)
    add("--max-resource", type=top, default=81, metavar="R", help="of hyperband: 81")
    add("--eta", type=at_least(2), default=3, metavar="ETA", help="of hyperband: 3")
    add("--retrain", action="store_true", help="search: start every rung again from scratch")
    add("--workers", type=at_least(1), metavar="N", help="search: N processes; default: one a core")
    add("--dask", metavar="tcp://HOST:PORT", help="search: on the Dask cluster of this scheduler")
    add("--results", metavar="DIR", help="default: results/<data set>")
    add("--overwrite", action="store_true", help="replace another run in the results folder")
    add("--no-model", action="store_true", help="verify: without model and images")
    add("--compare-max", type=at_least(10), default=10_000, metavar="N", help="training images")
    add("--images", metavar="SOURCE", help="predict: FOLDER or FILE.npz")
    add("--model", metavar="FILE", help="predict: a model.pt")
    add("--output", metavar="FILE.csv", default="predicted.csv", help="default: %(default)s")
    add("--submission", action="store_true", help="predict: columns Id,Cell type, as the authors'")
    add("--from", dest="origin", metavar="RUN.JSON", help="do that run again, beside it")
    arguments = parser.parse_args(argv)
    if arguments.dask and not re.fullmatch(r"\w+://.+:\d+", arguments.dask):
        parser.error(f"--dask takes tcp://HOST:PORT, not {arguments.dask}")
    if arguments.workers and arguments.dask:
        parser.error("--workers starts processes here: leave it out with --dask")
    if arguments.seeds and len({*arguments.seeds}) < max(2, len(arguments.seeds)):
        parser.error("--seeds takes two or more different seeds; for one say --seed")
    if arguments.schedule != "hyperband" and (arguments.max_resource, arguments.eta) != (81, 3):
        parser.error("--max-resource and --eta go with --schedule hyperband")
    if arguments.no_model and arguments.stage != "verify":
        parser.error("--no-model goes with --stage verify")
    if arguments.seeds and arguments.stage not in ("all", *STAGES):
        parser.error(f"--seeds is for all, {', '.join(STAGES)}: the others look at one folder")
    if arguments.test_data and (arguments.split or arguments.data is None):
        parser.error("--test-data goes with --data FOLDER, and without --split")
    if arguments.stage == "predict" and not (arguments.images and arguments.model):
        parser.error("--stage predict needs --images FOLDER_OR_NPZ and --model FILE")
    if arguments.origin:
        given = {key for key, value in vars(arguments).items() if value != parser.get_default(key)}
        free = {"data", "test_data", "root", "device", "workers", "dask", "results", "overwrite"}
        if extra := given - free - {"origin"}:
            option = min(extra).replace("_", "-")
            parser.error(f"--from takes its settings from the file: leave out --{option}")
        take_settings(arguments)
    return arguments


def take_settings(arguments: argparse.Namespace) -> None:
    """Set the command line to what the run.json named by ``--from`` was made with."""
    origin = Path(arguments.origin)
    record = read_json(origin)
    tuned = record.get("tune", {}).get("settings")
    if "seeds" in record:
        arguments.seeds = record["seeds"]["settings"]["seeds"]
        origin = origin.parent / f"seed-{arguments.seeds[0]}" / "run.json"
        record["train"] = read_json(origin).get("train")
    if not record.get("train"):
        raise RunError(f"{arguments.origin} holds no training to do again")
    about, trained = record["data"], record["train"]
    arguments.test_data = arguments.test_data or about.get("test_source")
    arguments.data = arguments.data or about["source"]
    arguments.md5 = about["md5"]
    arguments.split_seed = about["split_seed"]
    arguments.split = None if about["split"] == "folders" else about["split"]
    arguments.hyperparameters, arguments.seed = str(origin), trained["settings"]["seed"]
    if arguments.seeds and tuned:
        arguments.seed = tuned["seed"]
    arguments.precision = trained["environment"]["precision"]
    arguments.compile = trained["settings"].get("compile", "off")
    arguments.results = arguments.results or f"{Path(arguments.origin).resolve().parent}-again"
    arguments.stage = "all" if tuned else "train test"
    if tuned and tuned["schedule"] != [list(map(list, hyperband.POSTER_BRACKET))]:
        arguments.schedule = [[hyperband.Rung(*r) for r in rungs] for rungs in tuned["schedule"]]
    if tuned:
        arguments.retrain = tuned["retrain"]


NOT_COMPARABLE = (
    "NOTE: this run is not on the poster's images and split; its figures cannot be compared with "
    "the poster's."
)


def load_images(arguments: argparse.Namespace) -> data.ImageData:
    """Load what ``--data`` names, or what the results folder at hand was made from."""
    source = arguments.data
    known = Path(arguments.results or "", "run.json")
    if source is None and arguments.stage in LATER and arguments.results and known.exists():
        about = read_json(known)["data"]
        source = arguments.data = about["source"]
        arguments.test_data = about.get("test_source")
    progress = Progress("data", 1)

    def show(done: int, total: int) -> None:
        progress.total = total
        shown = f"{done / 1e6:.0f} of {total / 1e6:.0f} million bytes"
        if source and Path(source).is_dir():
            shown = f"{done:,} of {total:,} images decoded"
        progress(done, shown, step=done == total)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", data.DigitsFallbackWarning)
        if arguments.test_data:
            images = data.load_folders(source, arguments.test_data, arguments.root, show)
        else:
            may = arguments.stage != "verify"  # which needs no network
            images = data.load(source or "auto", arguments.root, may, show)
    progress.close()
    for warning in caught:
        print(f"NOTE: {warning.message}")
    if arguments.origin and images.md5 != arguments.md5:
        raise RunError(f"{source} has MD5 {images.md5}, {arguments.origin} names {arguments.md5}")
    return images


def print_plan(run: Run, stages: Sequence[str]) -> None:
    """Say what is about to be done, and how much work it is."""
    arguments, images = run.arguments, run.images
    where = environment(arguments.device, arguments.precision)
    sizes = " / ".join(f"{len(part):,}" for part in run.split)
    shape = "x".join(map(str, images.images.shape[1:]))
    print(f"data       {images.name}: {len(images.labels):,} images {shape}, ", end="")
    print(f"{images.num_classes} classes; {images.source}")
    print(f"split      {run.split_name}: {sizes} train / validation / test")
    print(
        f"device     {where['device']} ({where['device_name']}), {where['threads']} threads, "
        f"precision {where['precision']}"
    )
    if "tune" in stages:
        schedule = tuning_schedule(arguments)
        flow = "; ".join(" -> ".join(f"{n}@{r}" for n, r in rungs) for rungs in schedule)
        epochs = sum(hyperband.total_resource(rungs, arguments.retrain) for rungs in schedule)
        count = min(TUNING_IMAGES, len(run.split.train) + len(run.split.valid))
        on = f"on {arguments.dask}" if arguments.dask else f"{count_workers(arguments)} at a time"
        print(f"tune       {flow}: {epochs} epochs of {count * 8 // 10:,} images, {on}")
    if "train" in stages:
        chosen = chosen_hyperparameters(arguments, run.best)
        if chosen is None:
            print("train      with the hyperparameters that the search will find")
        else:
            network = model.build(run.network_config(chosen))
            *_, parameters, macs = zip(*model.layer_table(network), strict=True)
            steps = chosen.epochs * len(run.split.train)
            print(
                f"train      {arguments.hyperparameters} hyperparameters, PosterCNN with "
                f"{sum(parameters):,} parameters: {chosen.epochs} epochs, {steps:,} image steps of "
                f"{3 * sum(macs) / 1e6:.1f} million multiply-accumulates"
            )
    print(f"results    {run.folder}", flush=True)


def run_stages(arguments: argparse.Namespace) -> int:
    """Carry out a command line; return the exit status."""
    if arguments.stage == "verify":
        return 0 if verify_stage(arguments) else 1
    try:
        model.resolve_device(arguments.device)
    except ValueError as error:
        raise RunError(str(error)) from None
    if arguments.stage == "predict":
        predict(arguments)
        return 0
    if arguments.stage == "figures" and not drawable():
        raise RunError(NO_MATPLOTLIB)
    known = Path(arguments.results or "", "run.json")
    later = arguments.stage in ("test", "figures", "report") and not arguments.seeds
    if later and arguments.results and not known.exists():
        raise RunError(f"{known}: no such file: run --stage train first, or --stage all")
    if arguments.hyperparameters != "tuned":  # before gigabytes are read, not after
        chosen_hyperparameters(arguments, Path())
    images = load_images(arguments)
    folder = Path(arguments.results or Path("results", images.name))
    run = Run(arguments, images, folder, folder / "best.json")
    if not comparable(run.data):
        print(NOT_COMPARABLE)
    stages = named = STAGES if arguments.stage == "all" else tuple(arguments.stage.split())
    drawn = ()  # what shows the results of these stages, or showed those of an earlier command
    if arguments.stage == "all" or named[0] in ("compare", "figures"):
        drawn = [s for s in ("figures", "report") if arguments.stage == "all" or run.finished(s)]
        drawn = tuple(s for s in drawn if s not in named and (s != "figures" or drawable()))
    stages = (*named, *drawn)
    if "train" in stages and training_settings(run) is None and "tune" not in stages:
        raise RunError(f"no {run.best} to take tuned hyperparameters from: run --stage tune first")
    seeds = [seed_run(run, seed) for seed in arguments.seeds or []]
    if stages == ("test",):
        for one in seeds or [run]:
            load_trained(one)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}: choose another --results") from None
    with locked(folder):
        run = Run(arguments, images, folder, run.best)  # as it is, now that nobody else writes it
        work = [(run, stages)]
        if seeds:
            seeds = [seed_run(run, seed) for seed in arguments.seeds]
            each = tuple(stage for stage in stages if stage != "tune")
            work = [(run, ("tune",))] if "tune" in stages else []
            work += [(one, each) for one in seeds if each]
            work += [(run, ("seeds", *drawn))] if "test" in stages else []
        try:
            carry_out(work)
        except OSError as error:
            if error.errno and not error.filename:  # a full disk names no file
                error.filename = str(folder)
            raise
        ok = arguments.stage != "all" or verify_all(folder, run)
    table = {"compare": "compare.md"}.get(named[0], "seeds.md" if seeds else "table.md")
    if "test" in stages or table == "compare.md":
        print("\n" + (folder / table).read_text(encoding="utf-8"))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"file       {path}")
    if arguments.stage == "all" and not drawable():
        print(NO_MATPLOTLIB)
    if arguments.origin:
        for path in sorted(folder.rglob("predictions.csv")):
            first = Path(arguments.origin).parent / path.relative_to(folder)
            if first.exists():
                alike = path.read_bytes() == first.read_bytes()
                print(f"{path} and {first} are {'identical' if alike else 'NOT identical'}")
    if not comparable(run.data):
        print(NOT_COMPARABLE)
    return 0 if ok else 1


def seed_run(run: Run, seed: int) -> Run:
    """Make the run of one of several seeds, in a folder inside `run`'s."""
    arguments = copy.copy(run.arguments)
    arguments.seed = seed
    return Run(arguments, run.images, run.folder / f"seed-{seed}", run.best)


def carry_out(work: Sequence[tuple[Run, Sequence[str]]]) -> None:
    """Do the stages that are not done yet; where all are done, do all again."""
    again = all(run.finished(stage) for run, stages in work for stage in stages)
    for run, stages in work:
        run.folder.mkdir(exist_ok=True)
        run.open(stages, again)
    for run, stages in work:
        print_plan(run, stages)
        for stage in stages:
            if run.finished(stage) and not run.differs(stage):
                (run.folder / "training.pt").unlink(missing_ok=True)  # after a kill at the very end
                print(f"{stage:<10} done already")
            else:
                WORK[stage](run)


def verify_stage(arguments: argparse.Namespace) -> bool:
    """Verify what ``--results``, or ``--data``, names; tell whether all is as it should be."""
    folder, run = Path(arguments.results or ""), None
    if not arguments.no_model:
        intact = True
        with contextlib.suppress(RunError):  # damaged, it can't say what the folder was made from
            intact = False
            intact = not arguments.results or bool(read_json(folder / "run.json"))
        if intact:
            images = load_images(arguments)
            folder = Path(arguments.results or Path("results", images.name))
            run = Run(arguments, images, folder, folder / "best.json")
        elif not (folder / "run.json").exists():
            raise RunError(f"{folder} holds no run.json: --no-model audits its predictions.csv")
    elif not arguments.results:
        raise RunError("--no-model looks at a folder alone: name it by --results DIR")
    ok = verify_all(folder, run)
    for path in (folder / "table.md", folder / "seeds.md"):
        if path.exists():
            print(f"\n{path.read_text(encoding='utf-8', errors='replace')}")
    return ok


def verify_all(folder: Path, run: Run | None) -> bool:
    """Verify a folder, and those of its seeds; without `run`, models and data aside."""
    ok = verify(folder, run)
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"seed-\d+", path.name):
            ok &= verify(path, seed_run(run, int(path.name[5:])) if run else None)
    return ok


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 refused, 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"NOTE: {message}", file=sys.stderr)
            return run_stages(parse(argv))
    except KeyboardInterrupt:
        end = "\n" * sys.stderr.isatty()  # of the line that a bar stands in
        print(
            f"{end}reproduce.py: interrupted; the same command goes on from here", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # what stdout went to, `| head` perhaps, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains at its exit
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"reproduce.py: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except (MemoryError, model.torch.OutOfMemoryError) as error:
        print(f"reproduce.py: error: out of memory ({str(error)[:100]!r})", file=sys.stderr)
        return 2
    except (
        RunError,
        data.DataError,
        model.CheckpointError,
        model.TrainingDivergedError,
        hyperband.SearchError,
        metrics.MetricsError,
    ) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
