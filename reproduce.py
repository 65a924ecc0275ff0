"""Regenerate the table and the ROC curves of "Medical Image Classification Model Based on CNN".

``python reproduce.py --stage all`` searches hyperparameters, trains with the poster's, tests, and
writes ``results/<data set>/``. On the poster's data (TissueMNIST, downloaded; 120,000 training
images) that takes hours on a CPU; where there is no network it runs on scikit-learn's digits, in
minutes. The stages can be run one by one, and what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import data
import hyperband
import metrics
import model
from hyperband import Choice, IntUniform, LogUniform, Uniform

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
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "recall": "macro recall",
    "precision": "macro precision",
}

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
        "figures/*.png",
        "figures/*.svg",
    ),
    "seeds": ("seeds.csv", "seeds.md"),
}


class RunError(ValueError):
    """The command cannot be carried out as it was given; the message is one line."""


# -------------------------------------------------------------------------------- checked files


def fingerprint(content: bytes) -> str:
    """Give the SHA-256 of a file, and two sums that locate one changed byte.

    The sums of b[i] and of i * b[i] change by d and i * d where one byte changes by d: a
    weighted checksum, as in an error-correcting code.
    """
    weighted = sum(map(operator.mul, content, itertools.count()))
    return f"{hashlib.sha256(content).hexdigest()} {sum(content)} {weighted}"


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


def write_text(path: Path, content: str) -> None:
    """Write a text file through a temporary one moved into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8", newline="\n")
    temporary.replace(path)


CHECK = '\n "check": "'


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object whose last key is the fingerprint of what stands before it."""
    body = json.dumps(content, indent=1, allow_nan=False)[:-2] + ","
    write_text(path, f'{body}{CHECK}{fingerprint(body.encode())}"\n}}\n')


def read_json(path: Path) -> dict:
    """Read what `write_json` wrote; RunError where one byte of it has changed."""
    raw, content = read_object(path)
    body, _, stored = raw.rpartition(CHECK.encode())
    stored = stored.removesuffix(b'"\n}\n').decode("ascii", "replace")
    if fingerprint(body) != stored:
        raise RunError(f"{path} was changed or damaged ({locate(path.name, body, stored)})")
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
        raise RunError(f"{path} is no JSON object") from None
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
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()  # its holder removed it between our opening and our locking it
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunError(
                f"{folder} is in use by process {holder}: wait for it, or choose another --results"
            ) from None
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
                    raise RunError(f"{error}: say --overwrite to start over") from None
        known = self.record.get("data", {}) if arguments.stage in ("test", "verify") else {}
        self.split_name = arguments.split or known.get("split", "poster")
        seed = known.get("split_seed") if arguments.split_seed is None else arguments.split_seed
        if self.split_name == "official":
            self.split, seed = data.official_split(images), None
        else:
            self.split = data.poster_split(len(images.labels), seed := seed or 0)
        named = images.name if arguments.data in (None, "auto") else str(arguments.data)
        self.data = {
            "name": images.name,
            "source": named,
            "md5": images.md5,
            "shape": list(images.images.shape),
            "class_names": list(images.class_names),
            "split": self.split_name,
            "split_seed": seed,
            "sizes": [len(part) for part in self.split],
        }

    def open(self, stages: Sequence[str]) -> None:
        """See that the folder may take these stages, and clear what is to be done again.

        A run that was interrupted goes on; one that is finished is done again.
        """
        changed = self.changed(self.record.get("data", {}), self.data)
        if not self.arguments.overwrite:
            if self.record and changed:
                self.refuse(changed)
            names = {path.name for path in self.folder.iterdir()} - {".lock", "run.json.tmp"}
            if not self.record and names:
                raise RunError(
                    f"{self.folder} is not empty and holds no run.json: choose another --results, "
                    "or say --overwrite to write into it"
                )
        elif changed:
            for stage in reversed(OUTPUTS):
                self.discard(stage)
        for stage in reversed(stages):
            if self.differs(stage):
                self.discard(stage)
        if all(self.finished(stage) for stage in stages):
            for stage in reversed(stages):
                self.discard(stage)
        self.record["data"] = self.data
        self.save()

    @staticmethod
    def changed(ours: dict, theirs: dict) -> list[str]:
        """Name the settings that differ; where the data lay is none."""
        keys = {**ours, **theirs}.keys() - {"source"}
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
        settings = SETTINGS[stage](self)
        where = environment(self.arguments.device, settings.get("precision", "fp32"))
        self.record[stage] = {"settings": settings, "environment": where}
        self.save()
        return settings

    def finish(self, stage: str, result: dict) -> None:
        """Record that the stage's files are complete, and what they are."""
        for pattern in OUTPUTS[stage]:  # what a killed run left half written
            path = self.folder / pattern
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink()
        self.record[stage]["result"] = result
        self.record[stage]["files"] = {
            path.relative_to(self.folder).as_posix(): fingerprint(path.read_bytes())
            for pattern in OUTPUTS[stage]
            for path in sorted(self.folder.glob(pattern))
            if path.is_file() and path.name != "training.pt"
        }
        self.save()

    def finished(self, stage: str) -> bool:
        """Tell whether the stage's files are complete."""
        return "result" in self.record.get(stage, {})

    def discard(self, stage: str) -> None:
        """Remove the stage's files and forget it, and before it what hangs on it."""
        if stage == "train":
            self.discard("test")
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
        with held(folder / ".lock"), model.one_thread():
            history = model.fit(
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
        return history[-1].valid_loss


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`, and hold it.

    A worker may outlive a killed search for a moment, or on a cluster until its trial is done; the
    search that goes on must not write beside it.
    """
    with path.open("a") as file:
        with contextlib.suppress(ImportError):  # not on Windows, as for `locked`
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def processes(count: int) -> Iterator[Callable[[], ProcessPoolExecutor]]:
    """Give what starts `count` workers, which end with this process, and at once at Ctrl-C."""
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
        pool = Pool(count, multiprocessing.get_context("spawn"), end_with_parent)
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


def end_with_parent() -> None:
    """End this worker process as soon as its parent is gone: its queue would wait forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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
        self.killed = distributed.KilledWorker
        for module in (data, model, hyperband, metrics):  # the workers run this very code
            self.client.upload_file(module.__file__)
        self.client.upload_file(__file__)
        self.executor = self.client.get_executor()

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        """Run a call on the cluster."""
        outcome = Future()

        def settle(done: Future) -> None:
            if outcome.cancelled():
                return
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                error = ConnectionError("the Dask scheduler has gone; the same command goes on")
            elif isinstance(error, self.killed):
                error = BrokenExecutor(str(error))
            if error:
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
    return processes(workers) if workers > 1 else contextlib.nullcontext()


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
    objective = Objective(
        run.network_config(model.POSTER),
        trials,
        arguments.seed,
        arguments.device,
        arguments.precision,
    )
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
        if "train" in content:  # a run.json
            content = content["train"]["settings"]
        try:
            chosen = model.Hyperparameters(**content.get("hyperparameters", content))
        except (TypeError, ValueError) as error:
            raise RunError(f"{path} holds no hyperparameters: {error}") from None
    return chosen if arguments.epochs is None else replace(chosen, epochs=arguments.epochs)


def training_settings(run: Run) -> dict[str, Any] | None:
    """Say what decides the training's outcome; None where the search is still to come."""
    chosen = chosen_hyperparameters(run.arguments, run.best)
    if chosen is None:
        return None
    return {
        "network": run.network_config(chosen),
        "hyperparameters": asdict(chosen),
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
            f"{run.folder / 'model.pt'} is another network ({network.config}) than run.json tells "
            "of: run --stage train again"
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
    metrics.write_per_class(target / "per_class.csv", names, per_class)
    curves = metrics.roc_curves(labels, logits)
    aucs = metrics.class_aucs(labels, logits, curves)
    (target / "roc").mkdir(exist_ok=True)
    metrics.write_auc(target / "roc" / "auc.csv", names, aucs)
    for k, curve in enumerate(curves):
        metrics.write_roc(target / "roc" / f"class_{k}.csv", curve)
    summary = metrics.summary_from_confusion(matrix)
    intervals = metrics.bootstrap_intervals(matrix)
    rows = [(METRIC_NAMES[k], POSTER_TABLE[k], summary[k], *intervals[k]) for k in POSTER_TABLE]
    tolerances = [TOLERANCE[k] for k in POSTER_TABLE]
    if comparable(about):
        for k, (poster, auc) in enumerate(zip(POSTER_AUC, aucs, strict=True)):
            rows.append((f"AUC of class {k}", poster, auc.auc, auc.low, auc.high))
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
    write_text(folder / "table.md", note + metrics.markdown_table(heading, shown))


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
    write_text(
        target / "seeds.md",
        f"{title(about)}; seeds {', '.join(map(str, seeds))}. Two runs of the same settings lie "
        "`mean_apart` apart on average, `max_apart` at most.\n\n"
        + metrics.markdown_table(header, shown),
    )


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
    if not stored.exists():
        audit(f"{recomputed.name} follows from the predictions", "no such file", "", False)
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
                audit(f"{stored.name}, row {row}, column {name}", a, b)
                return
    audit(
        f"{stored.name} follows from the predictions", f"{len(tables[0])} rows", "all equal", True
    )


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
            audit("tuning.jsonl and best.json", "readable", str(error), False)
            return
        errors = [t.error for t in result.trials if t.error and "the log ends" in t.error]
        audit("tuning.jsonl is whole", 0, len(errors))
        found = best_content(result.best)
        shown = (f"trial {best['trial']}, loss {best['loss']}" for best in (stored, found))
        audit("best.json is the best of tuning.jsonl", *shown, stored == found)


def audit_model(audit: Audit, run: Run) -> None:
    """Check data and split against run.json, and the logits against model.pt and the images."""
    for key in [key for key in run.data if key != "source"]:
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
    audit_files(audit, folder, record)
    if "result" in record.get("tune", {}):
        audit_search(audit, folder, record["tune"]["settings"])
    if "result" in record.get("seeds", {}):
        seeds = record["seeds"]["settings"]["seeds"]
        with tempfile.TemporaryDirectory() as scratch:
            write_seeds(folder, Path(scratch), record["data"], seeds)
            for name in OUTPUTS["seeds"]:
                audit_cells(audit, folder / name, Path(scratch, name))
    if (folder / "predictions.csv").exists():
        audit_predictions(audit, folder, record, run)
    elif "result" not in record.get("seeds", {}):
        raise RunError(f"{folder} holds no predictions.csv to verify: run --stage test first")
    if audit.wrong:
        print(f"{audit.wrong} of {audit.checks} checks are WRONG in {folder}")
    else:
        print(f"all {audit.checks} checks ok in {folder}")
    return not audit.wrong


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
}


# ------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """Make an argument type: an integer from `least` up."""

    def convert(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
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
    add("--stage", choices=("all", *STAGES, "verify"), default="all", help="default: all four")
    add("--data", metavar="SOURCE", help=f"{data.SOURCES}; default: auto")
    add("--root", default="~/.medmnist", help="where downloads are kept; default: %(default)s")
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
    add("--max-resource", type=at_least(1), default=81, metavar="R", help="of hyperband: 81")
    add("--eta", type=at_least(2), default=3, metavar="ETA", help="of hyperband: 3")
    add("--retrain", action="store_true", help="search: start every rung again from scratch")
    add("--workers", type=at_least(1), metavar="N", help="search: N processes; default: one a core")
    add("--dask", metavar="tcp://HOST:PORT", help="search: on the Dask cluster of this scheduler")
    add("--results", metavar="DIR", help="default: results/<data set>")
    add("--overwrite", action="store_true", help="replace another run in the results folder")
    add("--no-model", action="store_true", help="verify: look at predictions.csv alone")
    add("--from", dest="origin", metavar="RUN.JSON", help="do that run again, beside it")
    arguments = parser.parse_args(argv)
    if arguments.dask and not re.fullmatch(r"\w+://.+:\d+", arguments.dask):
        parser.error(f"--dask takes tcp://HOST:PORT, not {arguments.dask}")
    if arguments.workers and arguments.dask:
        parser.error("--workers starts processes here: leave it out with --dask")
    if arguments.seeds and len({*arguments.seeds}) < max(2, len(arguments.seeds)):
        parser.error("--seeds takes two or more different seeds; for one say --seed")
    if arguments.origin:
        given = {key for key, value in vars(arguments).items() if value != parser.get_default(key)}
        free = {"origin", "data", "root", "device", "workers", "dask", "results", "overwrite"}
        if extra := given - free:
            option = min(extra).replace("_", "-")
            parser.error(f"--from takes its settings from the file: leave out --{option}")
        take_settings(arguments)
    return arguments


def take_settings(arguments: argparse.Namespace) -> None:
    """Set the command line to what the run.json named by ``--from`` was made with."""
    origin = Path(arguments.origin)
    record = read_json(origin)
    if not {"data", "train"} <= record.keys():
        raise RunError(f"{origin} holds no training to do again")
    about, trained = record["data"], record["train"]
    tuned = record.get("tune", {}).get("settings")
    arguments.data = arguments.data or about["source"]
    arguments.md5 = about["md5"]
    arguments.split, arguments.split_seed = about["split"], about["split_seed"]
    arguments.hyperparameters, arguments.seed = str(origin), trained["settings"]["seed"]
    arguments.precision = trained["environment"]["precision"]
    arguments.compile = trained["settings"].get("compile", "off")
    arguments.results = arguments.results or f"{origin.parent}-again"
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
    known = Path(arguments.results or ".") / "run.json"
    if source is None and arguments.stage in ("test", "verify") and known.exists():
        source = arguments.data = read_json(known)["data"]["source"]
    progress = Progress("data", 1)

    def on_bytes(done: int, total: int) -> None:
        progress.total = total
        progress(done, f"{done / 1e6:.0f} of {total / 1e6:.0f} million bytes")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", data.DigitsFallbackWarning)
        images = data.load(source or "auto", arguments.root, progress=on_bytes)
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
        chosen = chosen_hyperparameters(arguments, run.folder / "best.json")
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
    if arguments.stage == "verify" and arguments.no_model:
        return 0 if verify(Path(arguments.results or "."), None) else 1
    try:
        model.resolve_device(arguments.device)
    except ValueError as error:
        raise RunError(str(error)) from None
    if arguments.hyperparameters != "tuned":  # before gigabytes are read, not after
        chosen_hyperparameters(arguments, Path())
    images = load_images(arguments)
    folder = Path(arguments.results or Path("results", images.name))
    run = Run(arguments, images, folder, folder / "best.json")
    if not comparable(run.data):
        print(NOT_COMPARABLE)
    if arguments.stage == "verify":
        ok = verify_all(run)
        for path in (folder / "table.md", folder / "seeds.md"):
            if path.exists():
                print(f"\n{path.read_text(encoding='utf-8')}")
        return 0 if ok else 1
    stages = STAGES if arguments.stage == "all" else tuple(arguments.stage.split())
    if "train" in stages and "tune" not in stages and training_settings(run) is None:
        raise RunError(f"no {run.best} to take tuned hyperparameters from: run --stage tune first")
    if stages == ("test",) and not arguments.seeds:
        load_trained(run)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if arguments.seeds is None:
            carry_out(run, stages)
        else:
            if "tune" in stages:
                carry_out(run, ("tune",))
            for seed in arguments.seeds:
                own = copy.copy(arguments)
                own.seed = seed
                (folder / f"seed-{seed}").mkdir(exist_ok=True)
                one = Run(own, images, folder / f"seed-{seed}", run.best)
                carry_out(one, [stage for stage in stages if stage != "tune"])
            if "test" in stages:
                carry_out(run, ("seeds",))
        ok = arguments.stage != "all" or verify_all(run)
    for name in ("seeds.md",) if arguments.seeds else ("table.md",):
        if "test" in stages:
            print(f"\n{(folder / name).read_text(encoding='utf-8')}")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"wrote {path}")
    if arguments.origin:
        pair = [Path(p, "predictions.csv") for p in (Path(arguments.origin).parent, folder)]
        if all(path.exists() for path in pair):
            alike = pair[0].read_bytes() == pair[1].read_bytes()
            print(f"{pair[1]} and {pair[0]} are {'identical' if alike else 'NOT identical'}")
    if not comparable(run.data):
        print(NOT_COMPARABLE)
    return 0 if ok else 1


def carry_out(run: Run, stages: Sequence[str]) -> None:
    """Do the stages of one folder that are not done yet."""
    run.open(stages)
    print_plan(run, stages)
    for stage in stages:
        if run.finished(stage):
            print(f"{stage:<10} done already")
        else:
            {"tune": tune, "train": train, "test": test, "seeds": aggregate}[stage](run)


def verify_all(run: Run) -> bool:
    """Verify a run's folder, and those of its seeds."""
    ok = True
    for seed in run.record.get("seeds", {}).get("settings", {}).get("seeds", []):
        folder = run.folder / f"seed-{seed}"
        ok &= verify(folder, Run(run.arguments, run.images, folder, run.best))
    return verify(run.folder, run) and ok


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 refused, 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"NOTE: {message}", file=sys.stderr)
            return run_stages(parse(argv))
    except KeyboardInterrupt:
        print("\nreproduce.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"reproduce.py: error: {where}{error.strerror or error}", file=sys.stderr)
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
