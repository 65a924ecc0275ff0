"""Regenerate the table and the ROC curves of "Medical Image Classification Model Based on CNN".

``python reproduce.py --stage all`` searches hyperparameters, trains with the poster's, tests,
draws, reports and verifies, in ``results/<data set>/``: on TissueMNIST, the poster's images, in
some two hours on two CPU cores; where there is no network on scikit-learn's digits, in minutes.
What was interrupted goes on when the same command is given again.

From top to bottom: what the poster says; the terminal; the results folder (`Run`); the stages, in
the order of the chain; the audit; the command line. Start reading at `main`, the last function.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    import joblib
    import numpy as np

    import data
    import hyperband
    import metrics
    import model
    from hyperband import Choice, IntUniform, LogUniform, Uniform
    from metrics import METRIC_NAMES, read_column
except KeyboardInterrupt:  # importing PyTorch takes seconds
    print("reproduce.py: interrupted before it began", file=sys.stderr)
    raise SystemExit(130) from None


class RunError(ValueError):
    """The command cannot be carried out as it was given; the message is one line."""


ADVICE = "give that, choose another --results, or say --overwrite"


# ------------------------------------------------------------------------ what the poster says

REFERENCE = Path(__file__).resolve().parent / "results" / "reference"
POSTER = REFERENCE / "poster"  # its table, matrix and curves: the code has them from nowhere else
# Fixed before any run: how far a reproduction may lie from the poster's figures.
TOLERANCE = {"accuracy": 0.01, "f1": 0.02, "recall": 0.02, "precision": 0.02, "auc": 0.02}

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


def comparable(about: dict[str, Any]) -> bool:
    """Tell whether a run's figures may stand beside the poster's, given run.json's `data`.

    TissueMNIST under the poster's split, or a test set whose class counts are the poster's to the
    image, as the authors' own files have them.
    """
    if about["md5"] == data.MEDMNIST["tissuemnist"] and about["split"] == "poster":
        return True
    counts = about["test_counts"]
    return sum(counts) == 50_000 and counts == metrics.read_confusion(POSTER).sum(axis=1).tolist()


# -------------------------------------------------------------------------------- the terminal


def one_line(error: Exception) -> str:
    """Tell an error of a file's or of ours in a line."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror or error}"
    return str(error)


class Progress:
    """A bar with an ETA: redrawn in place on a terminal, a line a step in a log."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total, self.live = label, total, sys.stdout.isatty()
        self.started, self.first, self.drawn = time.monotonic(), None, 0.0

    def __call__(self, done: float, text: str, *, step: bool = False) -> None:
        """Show that `done` of the total is reached; `step` marks what a log has a line for."""
        now = time.monotonic()
        if self.first is None:  # what an earlier run did says nothing of the speed of this one
            self.first = done
        if not step and not (self.live and now - self.drawn > 0.1):
            return
        self.drawn = now
        if self.first < done < self.total:
            left = (now - self.started) * (self.total - done) / (done - self.first)
            text += f"  ETA {timedelta(seconds=round(left))}"
        if self.live:
            share = min(1.0, done / self.total)
            width = shutil.get_terminal_size().columns - 1
            line = f"{self.label:<8} [{'#' * round(20 * share):<20}] {share:4.0%}  {text}"[:width]
            print(f"\r{line:<{width}}", end="\n" * (done >= self.total), flush=True)
        else:
            print(f"{self.label:<8} {text}", flush=True)


# -------------------------------------------------------------------------- the results folder

# What each stage writes: removed where the stage begins anew, and with it what follows from it.
FILES = {
    "tune": ("tuning.jsonl", "best.json", "trials"),
    "train": ("history.csv", "model.pt", "training.pt"),
    "test": ("predictions.csv", "confusion.csv", "per_class.csv", "table.csv", "roc", "seeds.csv"),
    "compare": ("compare.csv",),
    "figures": ("figures",),
    "report": ("report.md",),
}


class Run:
    """A results folder, the images that it is about, and the options of the command.

    `record` is run.json: under "data", as `about`, what images and split are; under the name of a
    stage that was begun the "options" that decide its outcome, the "environment" and, once it is
    done, its "seconds". `sums` is SHA256SUMS.
    """

    def __init__(self, folder: Path, images: data.ImageData | None, options: Namespace) -> None:
        self.folder, self.images, self.options = folder, images, options
        self.record, self.sums = read_record(folder, options), read_sums(folder)
        self.about = self.record.get("data", {})
        if images is None:
            return
        self.split = data.split(images, options.split, options.split_seed)
        source = images.name if options.data == "auto" else options.data
        if source != "digits" and source not in data.MEDMNIST:
            source = str(Path(source).resolve())
        counts = np.bincount(images.labels[self.split.test], minlength=images.num_classes)
        self.about = {
            "name": images.name,
            "source": source,
            "md5": images.md5,
            "split": options.split,
            "split_seed": options.split_seed,
            "shape": list(images.images.shape),
            "class_names": list(images.class_names),
            "sizes": [len(part) for part in self.split],
            "test_counts": counts.tolist(),
        }

    @property
    def done(self) -> list[str]:
        """The stages that have ended, in the order of the chain."""
        return [key for key in FILES if self.record.get(key, {}).get("seconds") is not None]

    def begun(self, stage: str) -> dict[str, Any]:
        """Return the options that a stage was begun with."""
        return self.record.get(stage, {}).get("options", {})

    @property
    def seeds(self) -> list[Run]:
        """The runs of several seeds, each in a folder inside, that are here or to be trained."""
        seeds = self.options.seeds or []
        if self.options.stage not in ("all", "train"):
            seeds = self.begun("train").get("seeds") or []
        options = [Namespace(**{**vars(self.options), "seed": n, "seeds": None}) for n in seeds]
        return [Run(self.folder / f"seed-{one.seed}", self.images, one) for one in options]

    def other_data(self) -> str:
        """Say what run.json has otherwise of data and split; a moved file is the same data."""
        return difference(self.record.get("data", self.about), self.about, ("name", "source"))

    def part(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy out the images and labels of an index array."""
        return self.images.images[index], self.images.labels[index]

    def settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of `model.fit` that a stage's options and the command decide."""
        settings = {name: options[name] for name in ("seed", "precision")}
        return {**settings, "device": self.options.device, "compile": options.get("compile", "off")}

    def network(self, hyperparameters: model.Hyperparameters, name: str = "PosterCNN") -> dict:
        """Size a network for these images: the `config` of `model.build`."""
        _, size, _, *channels = self.images.images.shape
        return {
            "network": name,
            "num_features": hyperparameters.num_features,
            "num_classes": self.images.num_classes,
            "in_channels": channels[0] if channels else 1,
            "image_size": size,
            "dropout": hyperparameters.dropout,
        }

    def write(self, name: str, content: str) -> None:
        """Write a file, whole or not at all."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        metrics.write(self.folder / name, content)
        self.sums.pop(name, None)

    def save(self) -> None:
        """Write run.json."""
        self.write("run.json", json.dumps(self.record, indent=1, allow_nan=False) + "\n")

    def check(self, stage: str, options: dict[str, Any]) -> None:
        """Raise RunError where the stage was begun with other options."""
        begun, wanted = ({**o, **o.get("values", {})} for o in (self.begun(stage), options))
        # The values count, not where they were read.
        other = difference(begun, wanted, ("values", "hyperparameters"))
        if stage in self.record and other:
            raise RunError(f"{self.folder}: {stage} was begun with {other}: {ADVICE}")

    def begin(self, stage: str, options: dict[str, Any]) -> bool:
        """Record what a stage is about to do, and where; False where it is done already."""
        self.check(stage, options)
        if stage in self.done and stage != "test":  # which is cheap, and done whenever asked
            print(f"{stage:<8} done already")
            return False
        if stage not in self.record:
            self.drop(stage)  # what an interrupted removal has left is of another run
        self.forget(stage)
        where = environment(self.options.device)
        self.record[stage] = {"options": options, "environment": where, "seconds": None}
        self.save()
        return True

    def drop(self, stage: str) -> None:
        """Forget a stage, then remove its files; before it, what follows from it."""
        tuned = [s for s in ("train", "compare") if self.begun(s).get("hyperparameters") == "tuned"]
        last = ["figures", "report"]
        following = {"tune": tuned + last, "train": ["test"], "test": last, "compare": last}
        for later in following.get(stage, ()):
            self.drop(later)
        if self.record.pop(stage, None):
            self.save()
        self.forget(stage)
        for path in self.folder.glob("seed-*") if stage == "train" else ():
            if path.name[5:].isdecimal():
                remove(path)
        for name in FILES[stage]:
            remove(self.folder / name)

    def forget(self, stage: str) -> None:
        """Hash the files of a stage anew when the folder is sealed."""
        self.sums = {n: s for n, s in self.sums.items() if n.split("/")[0] not in FILES[stage]}

    def seal(self) -> None:
        """Write SHA256SUMS, which says that the folder is at rest."""
        # What kills have left, and what a stage needs no more to go on, as it is done.
        needless = {"tune": "trials", "train": "training.pt"}
        remains = [needless[stage] for stage in self.done if stage in needless]
        for path in [*self.folder.glob("*.*.tmp"), *(self.folder / name for name in remains)]:
            remove(path)
        # What this command has not written keeps its line, and what no stage writes gets none.
        ours = {"run.json", *itertools.chain(*FILES.values())}
        new = {n for n in files_in(self.folder) - self.sums.keys() if n.split("/")[0] in ours}
        new = {n: sha256(self.folder / n) for n in new}
        lines = (f"{digest}  {name}\n" for name, digest in sorted((self.sums | new).items()))
        metrics.write(self.folder / "SHA256SUMS", "".join(lines))


def difference(known: dict[str, Any], given: dict[str, Any], ignored: Sequence[str]) -> str:
    """Say what is known otherwise than it is given, if anything."""
    for name, value in given.items():
        if name not in ignored and known.get(name) != value:
            return f"{name} {known.get(name)!r:.99}, not {value!r:.99}"
    return ""


def read_record(folder: Path, options: Namespace) -> dict[str, Any]:
    """Read run.json; {} where there is none or, to overwrite or verify it, a damaged one."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        record = json.loads(path.read_bytes())
        known = read_sums(folder).get("run.json")
        whole = record["data"]["test_counts"] and known in (None, sha256(path))
        keys = {"options", "environment", "seconds"}
        if whole and all(record[stage].keys() == keys for stage in STAGES if stage in record):
            return record
    if options.overwrite or options.stage == "verify":
        return {}
    raise RunError(f"{path} is damaged: restore it, or say --stage all --overwrite")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_in(folder: Path) -> set[str]:
    """Name the files that SHA256SUMS lists; the folders of several seeds have their own."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {n for n in names if not re.search(r"\.tmp$|^SHA256SUMS$|(^|/)\.|^seed-\d+/", n)}


def read_sums(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS: a digest a file; {} where there is none."""
    path = folder / "SHA256SUMS"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return dict(reversed(line.split("  ", 1)) for line in text.splitlines() if "  " in line)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go of it however the process ends."""
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process: wait for it") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield


def environment(device: Any) -> dict[str, Any]:
    """Tell what results depend on beside data and options."""
    commit, git = None, ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):  # no git here
        here = Path(__file__).resolve().parent
        commit = subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    return {
        **model.environment(device),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "platform": platform.platform(),
        "git_commit": commit or None,
    }


# ---------------------------------------------------------------------------------------- tune


def trial_loss(
    given: tuple, configuration: dict[str, Any], previous: int, resource: int, folder: Path
) -> float:
    """Train a configuration on from its checkpoint; return its validation loss after `resource`."""
    arrays, network, settings = given  # as `model.fit` takes them; of `network`, all but its width
    hyperparameters = replace(model.POSTER, **configuration, epochs=resource)
    network = {**network, "num_features": hyperparameters.num_features}
    settings = {**settings, "checkpoint": folder / "training.pt"}
    try:
        with model.one_thread():  # so that losses do not depend on the number of workers
            built = model.build(network, settings["seed"])
            return model.fit(built, *arrays, hyperparameters, **settings)[-1].valid_loss
    except model.CheckpointError:  # damaged, which is no fault of the configuration
        settings["checkpoint"].unlink()
        return trial_loss(given, configuration, previous, resource, folder)


def tuning_options(run: Run) -> dict[str, Any]:
    """Say what decides the search's outcome, beside the data and SPACE."""
    names = ["schedule", "retrain", "seed", "precision"]
    if run.options.schedule == "hyperband":
        names += ["max_resource", "eta"]
    return {name: getattr(run.options, name) for name in names}


def brackets(options: dict[str, Any]) -> list[list[hyperband.Rung]]:
    """Give the brackets that a search's options name."""
    if options["schedule"] == "poster":
        return [hyperband.POSTER_BRACKET]
    return hyperband.brackets(options["max_resource"], options["eta"])


def tune(run: Run, options: dict[str, Any]) -> float:
    """Search SPACE by successive halving; write tuning.jsonl, a line a trial, and best.json."""
    schedule, seed, retrain = brackets(options), options["seed"], options["retrain"]
    total = sum(hyperband.total_resource(rungs, retrain) for rungs in schedule)
    progress, epochs, lowest = Progress("tune", total), 0, math.inf

    def on_trial(trial: hyperband.Trial, replayed: bool) -> None:
        nonlocal epochs, lowest
        rungs = schedule[trial.bracket]
        continued = trial.rung > 0 and not retrain
        epochs += trial.resource - (rungs[trial.rung - 1].resource if continued else 0)
        lowest = min(lowest, math.inf if trial.loss is None else trial.loss)
        if replayed:  # which says nothing of the speed of what follows
            progress.first = epochs
            return
        outcome = trial.error or f"loss {trial.loss:.4f}, lowest {lowest:.4f}"
        at = f"rung {rungs[trial.rung].configurations}@{trial.resource}, trial {trial.trial}"
        progress(epochs, f"{epochs}/{total} epochs, {at}: {outcome}", step=True)

    split = data.tuning_split(run.split, TUNING_IMAGES, seed)
    arrays = *run.part(split.train), *run.part(split.valid)
    given = arrays, run.network(model.POSTER), run.settings(options)
    places = {"log": run.folder / "tuning.jsonl", "folder": run.folder.absolute() / "trials"}
    progress(0, "begins")
    with trial_executor(run.options) as executor:
        how = {"retrain": retrain, "executor": executor, "on_trial": on_trial}
        objective = partial(trial_loss, given)
        result = hyperband.search(objective, SPACE, schedule, seed, **places, **how)
    run.write("best.json", best_text(result.best))
    return sum(trial.seconds for trial in result.trials)


def best_text(best: hyperband.Trial) -> str:
    """Give the text of best.json."""
    hyperparameters = asdict(replace(model.POSTER, **best.configuration))
    outcome = {"trial": best.trial, "resource": best.resource, "loss": best.loss}
    return json.dumps({"hyperparameters": hyperparameters, **outcome}, indent=1) + "\n"


@contextlib.contextmanager
def trial_executor(options: Namespace) -> Iterator[Executor | None]:
    """Give what runs the trials: a Dask cluster, processes, or (None) this process."""
    if options.dask:
        with dask_client(options.dask) as client:
            yield client.get_executor()
    elif options.workers == 1:
        yield None
    else:
        # Uncompiled training allocates its feature maps at each step; glibc's malloc by default
        # gives such large blocks back to the system: the page faults cost 5 to 25 % of a trial.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.setdefault(name, str(2**32))  # bytes; read at a process's start
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(options.workers, spawn, end_with_parent)
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which new processes inherit
        pool.map(abs, range(options.workers))  # starts a process each, as none is idle yet
        signal.signal(signal.SIGINT, heard)
        try:
            yield pool
        except BaseException:  # Ctrl-C above all: nobody waits for trials, which may take minutes
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this worker process as soon as its parent is gone: its queue would wait forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def dask_client(address: str) -> Any:
    """Join a Dask cluster, and give its workers the code of this program."""
    # Of a lost scheduler it would log a traceback, beside the error that we tell in a line.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        from distributed import Client

        client = Client(address, timeout=10, set_as_default=False)
        for path in (data.__file__, model.__file__, hyperband.__file__, metrics.__file__, __file__):
            client.upload_file(path)
    except Exception as error:  # nobody there, or whatever an import raises on another machine
        raise RunError(
            f"--dask {address}: {error!r:.200}: install requirements.txt and "
            "requirements-cluster.txt here and there, and start a scheduler and workers"
        ) from None
    return client


# --------------------------------------------------------------------------------------- train

NAMED = {"poster": model.POSTER, "authors": model.AUTHORS}  # and tuned, which is in best.json


def hyperparameters_of(run: Run, name: str) -> model.Hyperparameters:
    """Find hyperparameters: NAMED ones, or a JSON object of them or with a key of that name."""
    if name in NAMED:
        return NAMED[name]
    path = run.folder / "best.json" if name == "tuned" else Path(name)
    if name == "tuned" and not path.exists() and run.folder.name.startswith("seed-"):
        path = run.folder.parent / "best.json"  # of the run that this is a seed of
    try:
        found = json.loads(path.read_bytes())
        return model.Hyperparameters(**found.get("hyperparameters", found))
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{path} holds no hyperparameters: {error}") from None


def training_options(run: Run) -> dict[str, Any]:
    """Say what decides the training's outcome, beside the data; `tuned` needs best.json."""
    options, name = run.options, run.options.hyperparameters
    chosen = hyperparameters_of(run, name)
    chosen = replace(chosen, epochs=options.epochs or chosen.epochs)
    images, network = len(run.split.train), run.network(chosen)
    return {
        "hyperparameters": name if name in (*NAMED, "tuned") else str(Path(name).resolve()),
        "epochs": chosen.epochs,
        "seed": options.seed,
        "seeds": options.seeds,
        "precision": options.precision,
        "compile": model.resolve_compile(options.compile, network, images, chosen.epochs),
        "values": asdict(chosen),
    }


def train(run: Run, options: dict[str, Any]) -> float:
    """Train the poster's network; write history.csv and model.pt, the last epoch's weights."""
    hyperparameters = model.Hyperparameters(**options["values"])
    network = model.build(run.network(hyperparameters), options["seed"])
    epochs, images = hyperparameters.epochs, len(run.split.train)
    progress, last = Progress("train", epochs), ""

    def on_epoch(record: model.EpochRecord) -> None:
        nonlocal last
        last = f"epoch {record.epoch + 1}/{epochs}, learning rate {record.learning_rate:.3g}, "
        last += f"loss {record.train_loss:.4f}, accuracy {record.train_accuracy:.4f}, validation "
        last += f"{record.valid_loss:.4f}, {record.valid_accuracy:.4f}"
        progress(record.epoch + 1, last, step=True)

    history = model.fit(
        network,
        *run.part(run.split.train),
        *run.part(run.split.valid),
        hyperparameters,
        **run.settings(options),
        checkpoint=run.folder / "training.pt",
        on_epoch=on_epoch,
        on_batch=lambda epoch, done: progress(epoch + done / images, last),
    )
    run.write("history.csv", metrics.csv_text(model.EpochRecord._fields, history))
    model.save_network(network, run.folder / "model.pt")
    return sum(record.seconds for record in history)


# ---------------------------------------------------------------------------------------- test


def test(run: Run, options: dict[str, Any]) -> float:
    """Apply model.pt to the test images; write predictions.csv and what follows from it."""
    network = model.load_network(run.folder / "model.pt")
    images, labels = run.part(run.split.test)
    progress, started = Progress("test", len(images)), time.perf_counter()

    def on_batch(done: int) -> None:
        progress(done, f"{done:,}/{len(images):,} images", step=done == len(images))

    logits = model.predict(network, images, device=run.options.device, on_batch=on_batch).numpy()
    seconds = time.perf_counter() - started
    predictions = metrics.Predictions(run.split.test, labels, logits.argmax(1), logits)
    run.write("predictions.csv", metrics.predictions_text(predictions))
    for name, table in derived(predictions, run.about).items():
        run.write(name, metrics.csv_text(*table))
    return seconds


def derived(predictions: metrics.Predictions, about: dict[str, Any]) -> dict[str, tuple]:
    """Give {file name: (header, rows)} of all that follows from predictions.csv."""
    tables = metrics.tables(predictions, about["class_names"])
    if comparable(about):
        header, rows = tables["table.csv"]
        header += ["poster", "difference", "tolerance", "verdict"]
        _, areas = tables["roc/auc.csv"]
        rows += [[f"AUC of class {k}", *area] for k, _, *area, _, _ in areas]
        tolerances = [TOLERANCE[key] for key in METRIC_NAMES] + [TOLERANCE["auc"]] * len(areas)
        poster = read_column(POSTER / "table.csv", "value") + read_column(POSTER / "auc.csv", "auc")
        for row, printed, tolerance in zip(rows, poster, tolerances, strict=True):
            verdict = "within" if abs(row[1] - printed) <= tolerance else "outside"
            row += [printed, row[1] - printed, tolerance, verdict]
    return tables


def seeds_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Give header and rows of seeds.csv: how the figures of several seeds spread."""
    read = [metrics.read_csv(one.folder / "table.csv")[1] for one in run.seeds]
    rows = []
    for cells in zip(*read, strict=True):
        values = [float(row[1]) for row in cells]
        spread = [statistics.fmean(values), statistics.stdev(values), min(values), max(values)]
        rows.append([cells[0][0], len(values), *spread])
    return ["metric", "runs", "mean", "std", "min", "max"], rows


# ------------------------------------------------------------------------------------- compare

SYSTEMS = ("KNN", "SVM (RBF)", "SVM (linear)", "NephNet2D", "PosterCNN")
TIMED_IMAGES = 1_000  # test images that prediction is timed on
GROWING = ("train_seconds", "predict_seconds_per_1000", "model_mb")
COMPARE_HEADER = ("system", "training_images", *METRIC_NAMES, *GROWING, "note")


def flat_pixels(images: np.ndarray) -> np.ndarray:
    """Turn uint8 images into rows of pixels in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def train_system(
    run: Run, system: str, index: np.ndarray, options: dict[str, Any]
) -> tuple[Callable[[np.ndarray], np.ndarray], Any]:
    """Train one of SYSTEMS, scikit-learn's with its defaults, on some images.

    Return what gives the classes of other images, and what of the system has to be kept for that.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC, LinearSVC

    images, labels = run.part(index)
    if system in model.NETWORKS:
        hyperparameters = model.Hyperparameters(**options["values"])
        if system == "NephNet2D":
            hyperparameters = replace(hyperparameters, num_features=32)
        network = model.build(run.network(hyperparameters, system), options["seed"])
        valid = run.part(run.split.valid[: max(1, len(images) // 4)])  # the poster's 80/20
        model.fit(network, images, labels, *valid, hyperparameters, **run.settings(options))
        predict = partial(model.predict, network, device=run.options.device)
        return lambda x: predict(x).numpy().argmax(1), network.state_dict()
    classifiers = {"KNN": KNeighborsClassifier(), "SVM (RBF)": SVC()}
    classifiers["SVM (linear)"] = LinearSVC(random_state=options["seed"])
    classifier = classifiers[system].fit(flat_pixels(images), labels)
    return lambda x: classifier.predict(flat_pixels(x)), classifier


def measure(run: Run, system: str, index: np.ndarray, options: dict[str, Any]) -> list[Any]:
    """Train a system on some images and apply it; return what compare.csv has of it."""
    images, labels = run.part(run.split.test)
    brief = {**options, "values": {**options["values"], "epochs": 1}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Once on a few images, lest the libraries' own first steps be measured.
        predict, _ = train_system(run, system, index[: max(10, run.images.num_classes)], brief)
        predict(images[:10])
        caught.clear()
        clock = [time.perf_counter()]
        predict, kept = train_system(run, system, index, options)
        clock.append(time.perf_counter())
        predict(images[:TIMED_IMAGES])
        clock.append(time.perf_counter())
        summary = metrics.summary(labels, predict(images), run.images.num_classes)
    seconds_per_1000 = (clock[2] - clock[1]) * 1000 / min(len(images), TIMED_IMAGES)
    note = "not converged" if any("converge" in str(w.message) for w in caught) else ""
    costs = [clock[1] - clock[0], seconds_per_1000, len(pickle.dumps(kept)) / 1e6]
    return [system, len(index), *summary.values(), *costs, note]


def comparison_options(run: Run) -> dict[str, Any]:
    """Say what decides the comparison's outcome, beside the data."""
    options = training_options(run)
    del options["compile"]  # a system's time would jump where it begins to pay
    top = min(run.options.compare_max, len(run.split.train))
    if top < 10:
        raise RunError(f"{top} training images are too few to compare: give 10 or more")
    first = 1_000 if top >= 5_000 else 100  # small data has to show its growth too
    series = [digit * 10**power for power in range(2, 9) for digit in (1, 2, 5)]
    sizes = [n for n in series if first <= n <= top / 1.5] + [top]
    return {**options, "compare_max": top, "sizes": sizes}


def compare(run: Run, options: dict[str, Any]) -> float:
    """Train and apply each system at growing training sizes; write compare.csv, row by row."""
    path, steps = run.folder / "compare.csv", [*itertools.product(options["sizes"], SYSTEMS)]
    rows = metrics.read_csv(path)[1] if path.exists() else []
    # In a random order, but for one image of each class at the head: a prefix has every class.
    order = random.Random(options["seed"]).sample(run.split.train.tolist(), len(run.split.train))
    head = {int(run.images.labels[index]): index for index in reversed(order)}
    order = np.array([*dict.fromkeys([*head.values(), *order])])
    progress = Progress("compare", sum(size for size, _ in steps))
    done = sum(size for size, _ in steps[: len(rows)])
    for size, system in steps[len(rows) :]:
        text = f"{system}, {size:,} images"
        progress(done, text)
        rows.append(measure(run, system, order[:size], options))
        run.write("compare.csv", metrics.csv_text(COMPARE_HEADER, rows))
        done += size
        progress(done, f"{text}: accuracy {rows[-1][2]:.4f}", step=True)
    return sum(read_column(path, "train_seconds"))


def growth(path: Path) -> list[list[str]]:
    """Fit p of cost = a * images ** p to compare.csv: a row a system, a column each of GROWING."""
    images = np.log(read_column(path, "training_images"))
    costs = np.log([read_column(path, name) for name in GROWING]).T  # (rows, GROWING)
    powers, n = [], len(SYSTEMS)
    for k, system in enumerate(SYSTEMS if len(images) > n else ()):
        slopes, _ = np.polyfit(images[k::n], costs[k::n], 1)
        powers.append([system, *(f"{slope:.2f}" for slope in slopes)])
    return powers


# ------------------------------------------------------------------------- figures and report

FIGURES = {  # what is drawn where a file is there: (function, file, caption)
    "roc": (metrics.draw_roc, "per_class.csv", "ROC curves by raw logits"),
    "history": (metrics.draw_history, "history.csv", "Accuracy and loss over the epochs"),
    "confusion": (metrics.draw_confusion, "confusion.csv", "Confusion matrix"),
    "class_ratios": (metrics.draw_class_ratios, "per_class.csv", "Class ratios"),
    "search": (metrics.draw_search, "best.json", "Validation loss of each trial"),
    "growth": (metrics.draw_growth, "compare.csv", "Time and size over training images"),
}


def figures(run: Run) -> None:
    """Draw figures/ from the files that are there, and sample images from the data."""
    run.drop("figures")
    target, images = run.folder / "figures", run.images
    target.mkdir()
    for name, (draw, source, _) in FIGURES.items():
        if (run.folder / source).exists():
            over = name in ("roc", "history") and images is not None and comparable(run.about)
            draw(run.folder, target / name, **({"reference": POSTER} if over else {}))
    if images is not None:
        metrics.draw_samples(images.images, images.labels, images.class_names, target / "samples")
    print(f"figures  {len([*target.glob('*.png')])} as PNG and SVG in {target}")


def report(run: Run) -> None:
    """Write report.md."""
    run.write("report.md", report_text(run))
    print(f"report   {run.folder / 'report.md'}")


def description(about: dict[str, Any]) -> str:
    """Say what a run is on, given run.json's `data`."""
    count, *shape = about["shape"]
    sizes = " / ".join(f"{size:,}" for size in about["sizes"])
    text = f"{count:,} images of {'x'.join(map(str, shape))} pixels, {len(about['class_names'])} "
    text += f"classes, MD5 {about['md5']}; {about['split']} split: {sizes} for training / "
    return text + "validation / test"


def report_text(run: Run) -> str:
    """Give the text of report.md, which follows from run.json and the folder's other files."""
    folder, record, stages = run.folder, run.record, run.done
    parts = [f"# {record['data']['name']}: a run of the poster's chain"]
    parts += [f"{description(record['data'])}."]
    for name, title in (
        ("table.csv", "Results (95 % intervals: bootstrap over test images, DeLong's for AUC)"),
        ("seeds.csv", "Several seeds"),
        ("per_class.csv", "Classes"),
        ("roc/auc.csv", "Area under each ROC curve, by raw logits and by softmax"),
        ("compare.csv", "KNN, SVM, NephNet2D and PosterCNN"),
    ):
        if (folder / name).exists():
            parts += [f"## {title}", csv_table(folder / name)]
    if "compare" in stages and (powers := growth(folder / "compare.csv")):
        parts += ["Exponent p of the growth n^p with the number n of training images:"]
        parts += [metrics.markdown_table(["system", *GROWING], powers)]
    for name, (*_, caption) in FIGURES.items():
        if (folder / "figures" / f"{name}.png").exists():
            parts += [f"## {caption}", f"![{caption}](figures/{name}.png)"]
    parts += ["## The same again", "```bash\n" + "\n".join(commands(record)) + "\n```"]
    rows = [["seconds", *(f"{record[stage]['seconds']:.1f}" for stage in stages)]]
    for key in record[stages[0]]["environment"] if stages else ():
        rows.append([key, *(record[stage]["environment"].get(key) for stage in stages)])
    parts += ["## Environment", metrics.markdown_table(["", *stages], rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def csv_table(path: Path) -> str:
    """Show a CSV file as a Markdown table, fractions to four digits."""
    header, rows = metrics.read_csv(path)
    fraction = re.compile(r"-?\d+\.\d+(e-?\d+)?")
    rows = [[f"{float(c):.4f}" if fraction.fullmatch(c) else c for c in row] for row in rows]
    return metrics.markdown_table(header, rows)


def commands(record: dict[str, Any]) -> list[str]:
    """Give the commands that do a run again, beside it, with every option resolved."""
    about, lines = record["data"], []
    common = {"data": about["source"], "split": about["split"]}
    if about["split"] == "poster":
        common["split_seed"] = about["split_seed"]
    common["results"] = f"results/{about['name']}-again"
    for stage in [stage for stage in STAGES if stage in record]:
        words = ["python", "reproduce.py", "--stage", stage]
        common["device"] = record[stage]["environment"].get("device", "auto")
        for name, value in {**common, **record[stage]["options"]}.items():
            if value is not False and value is not None and name not in ("values", "sizes"):
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else map(str, value if name == "seeds" else [value])
        lines.append(shlex.join(words))
    return lines


# ----------------------------------------------------------------------------------- the audit

LIBRARIES = (data.DataError, model.ModelError, hyperband.SearchError, metrics.MetricsError)
# How far two machines may lie apart: logits, as a share of the largest; and the last epoch's
# validation loss and accuracy, which are recomputed in fp32, by the precision of the training.
LOGIT_TOLERANCE = 1e-4
VALIDATION_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}

Problems = Iterator[str]  # each a line that begins with the name of the file that is wrong


def alike(a: str, b: str) -> bool:
    """Tell whether two cells are equal; of numbers, to 12 digits."""
    try:
        return a == b or math.isclose(float(a), float(b), rel_tol=1e-12, abs_tol=1e-12)
    except ValueError:
        return False


def differences(folder: Path, name: str, header: Sequence[str], rows: Sequence) -> Problems:
    """Compare a CSV file with what it should hold, up to the first cell that differs."""
    stored_header, stored = metrics.read_csv(folder / name)
    lines = itertools.zip_longest([stored_header, *stored], [header, *rows], fillvalue=())
    for number, (ours, theirs) in enumerate(lines, 1):
        for k, (a, b) in enumerate(itertools.zip_longest(ours, theirs, fillvalue="")):
            if not alike(a, str(b)):
                column = stored_header[k] if k < len(stored_header) else k + 1
                yield f"{name} row {number}, column {column}: {a}, recomputed {b}"
                return


def audit_record(run: Run) -> Problems:
    """Check what run.json says of data and split, and that it tells of every stage."""
    if not run.record:
        yield "run.json is missing or changed: SHA256SUMS alone is checked"
        return
    if other := run.other_data():
        yield f"run.json data: {other}"
    for stage in [stage for stage in STAGES if stage not in run.record]:
        for name in FILES[stage]:
            if (run.folder / name).exists():  # nothing else would check it
                yield f"{name} is there, but run.json tells of no {stage}"


def audit_search(run: Run) -> Problems:
    """Replay the search: its configurations follow from the seed, the rest from the losses."""
    log, options = run.folder / "tuning.jsonl", run.begun("tune")
    schedule = brackets(options)
    best = hyperband.replay(log, SPACE, schedule, options["seed"], options["retrain"]).best
    if (run.folder / "best.json").read_bytes() != best_text(best).encode():
        yield f"best.json is not trial {best.trial}, the best of tuning.jsonl"


def audit_training(run: Run) -> Problems:
    """Replay the learning rates of history.csv; check the hyperparameters that have a name."""
    path, options = run.folder / "history.csv", run.begun("train")
    hyperparameters, name = model.Hyperparameters(**options["values"]), options["hyperparameters"]
    rates = model.learning_rates(hyperparameters, read_column(path, "valid_loss"))
    rows = zip(range(hyperparameters.epochs), rates, metrics.read_csv(path)[1], strict=False)
    expected = [[epoch, rate, *row[2:]] for epoch, rate, row in rows]
    yield from differences(run.folder, "history.csv", model.EpochRecord._fields, expected)
    if len(expected) < hyperparameters.epochs:
        yield f"history.csv has {len(expected)} epochs, run.json tells of {hyperparameters.epochs}"
    if name in (*NAMED, "tuned"):  # else a file of the user's own
        named = replace(hyperparameters_of(run, name), epochs=hyperparameters.epochs)
        if named != hyperparameters:
            yield f"run.json train: the values are not those of the {name} hyperparameters"


def audit_network(run: Run) -> Problems:
    """Check the last row of history.csv against model.pt and the validation images."""
    network = model.load_network(run.folder / "model.pt")
    options = run.begun("train")
    expected = run.network(model.Hyperparameters(**options["values"]))
    if network.config != expected:
        yield f"model.pt is {network.config!r:.120}, run.json tells of {expected!r:.120}"
        return
    images, labels = run.part(run.split.valid)
    measured = model.evaluate(network, images, labels, device=run.options.device, precision="fp32")
    for name, value in zip(("valid_loss", "valid_accuracy"), measured, strict=True):
        stored = read_column(run.folder / "history.csv", name)[-1]
        if not abs(stored - value) <= VALIDATION_TOLERANCE[options["precision"]]:
            yield f"history.csv last row, column {name}: {stored}, recomputed {value}"


def audit_predictions(run: Run) -> Problems:
    """Check predictions.csv against the split, the labels and model.pt."""
    read = metrics.read_predictions(run.folder / "predictions.csv")
    images, labels = run.part(run.split.test)
    network = model.load_network(run.folder / "model.pt")
    logits = model.predict(network, images, device=run.options.device).numpy()
    if logits.shape != read.logits.shape:
        yield f"predictions.csv has logits of shape {read.logits.shape}, model.pt {logits.shape}"
        return
    apart = np.abs(logits - read.logits).max(axis=1)
    for what, wrong in (
        ("id is not the split's", read.ids != run.split.test),
        ("label is not the image's", read.labels != labels),
        ("logits are not model.pt's", apart > LOGIT_TOLERANCE * max(1.0, np.abs(logits).max())),
    ):
        if wrong.any():
            yield f"predictions.csv row {wrong.argmax() + 2}: the {what}"


def audit_tables(run: Run) -> Problems:
    """Recompute what follows from predictions.csv, or from those of several seeds."""
    if run.seeds:
        tables = {"seeds.csv": seeds_table(run)}
    else:
        predictions = metrics.read_predictions(run.folder / "predictions.csv")
        tables = derived(predictions, run.record["data"])
    for name, table in tables.items():
        yield from differences(run.folder, name, *table)


def audit_report(run: Run) -> Problems:
    """Write report.md again from the other files, and compare."""
    stored = (run.folder / "report.md").read_text("utf-8", "replace").splitlines()
    expected = report_text(run).splitlines()
    for number, (a, b) in enumerate(itertools.zip_longest(stored, expected, fillvalue=""), 1):
        if a != b:
            yield f"report.md line {number}: {a!r:.120}, rewritten {b!r:.120}"
            break


def audit_poster(run: Run) -> Problems:
    """Check the poster's results against each other."""
    folder = run.folder
    matrix = metrics.read_confusion(folder)
    values = metrics.summary_from_confusion(matrix).values()
    printed = read_column(folder / "table.csv", "value")
    for name, value, stored in zip(METRIC_NAMES.values(), values, printed, strict=True):
        # The poster cuts its precision, 0.567883, instead of rounding it.
        if stored not in (round(value, 4), math.floor(value * 1e4) / 1e4):
            yield f"table.csv {name}: {stored}, the matrix gives {value:.6f}"
    for k, ratio in enumerate(read_column(folder / "per_class.csv", "ratio")):
        if ratio != round(matrix[k].sum() / matrix.sum(), 2):
            yield f"per_class.csv class {k}: {ratio}, the matrix gives another ratio"
    fpr = read_column(folder / "roc.csv", "fpr")
    for k, stored in enumerate(read_column(folder / "auc.csv", "auc")):
        area = np.trapezoid(read_column(folder / "roc.csv", f"tpr_{k}"), fpr)
        if not abs(area - stored) <= 1e-3:
            yield f"auc.csv class {k}: {stored}, the curve gives {area:.4f}"


def audit_files(run: Run) -> Problems:
    """Compare every file with SHA256SUMS."""
    if not (run.folder / "SHA256SUMS").exists():
        yield "SHA256SUMS is missing: the last command did not end"
        return
    sums, present = read_sums(run.folder), files_in(run.folder)
    for name in sorted(sums.keys() | present):
        if name not in present:
            yield f"{name} is missing"
        elif name not in sums:
            yield f"{name} is none of the run's files"
        elif sums[name] != sha256(run.folder / name):
            yield f"{name} is not as it was written"


def audit(run: Run) -> bool:
    """Check a results folder without training; print a line a group of checks or a wrong file.

    Without images (``--no-model``), neither model.pt nor the data are looked at.
    """
    folder, done, images = run.folder, run.done, run.images is not None
    one, poster, told = not run.seeds, is_poster(folder), set()
    print(f"verify   {folder}")
    for applies, what, check in (
        (not poster, "run.json is true of data, split and files", audit_record),
        ("tune" in done, "the search follows from its seed and losses", audit_search),
        ("train" in done and one, "the learning rates follow from the losses", audit_training),
        ("train" in done and one and images, "the last validation is model.pt's", audit_network),
        ("test" in done and one and images, "the predictions are model.pt's", audit_predictions),
        ("test" in done, "tables, curves and AUCs follow from the predictions", audit_tables),
        (run.record, "report.md follows from the files", audit_report),
        (poster, "the poster's table follows from its matrix, AUCs from curves", audit_poster),
        (True, f"{len(files_in(folder))} files are as SHA256SUMS has them", audit_files),
    ):
        try:
            found = [*check(run)] if applies else []
        except (OSError, RunError, *LIBRARIES) as error:
            found = [one_line(error).replace(f"{folder}{os.sep}", "")]
        names = [re.split("[ :]", problem)[0] for problem in found]
        new = [problem for problem, name in zip(found, names, strict=True) if name not in told]
        for problem in new:  # of a file that an earlier group has told of, one is enough
            print(f"WRONG    {problem}")
        if applies and not new:
            print(f"-        {what}: see above" if found else f"ok       {what}")
        told |= {*names}
    for stage in [stage for stage in STAGES if stage in run.record and stage not in done]:
        print(f"-        {stage} has not ended: not checked")
    if run.record:
        print("on trust training losses and accuracies, validation before the last epoch, trials'")
        print("         losses, seconds, environments, figures, compare.csv")
    return not told


def audit_all(run: Run) -> bool:
    """Audit a folder, and those of its seeds; tell whether all is as it should be."""
    well = all([audit(one) for one in [run, *run.seeds]])
    print(f"verify   {'all is well' if well else 'something is WRONG'} in {run.folder}")
    return well


def is_poster(folder: Path) -> bool:
    """Tell whether a folder has the poster's own results."""
    return (folder / "roc.csv").exists() and not (folder / "run.json").exists()


# --------------------------------------------------------------------------- the command line

# What decides a stage's outcome, by which it is done once, and what carries it out and returns its
# seconds. The other stages, figures and report, are done whenever asked, last.
STAGES = {
    "tune": (tuning_options, tune),
    "train": (training_options, train),
    "test": (lambda run: {}, test),
    "compare": (comparison_options, compare),
}
COMMANDS = {  # the report tells of everything, so every command ends with it
    "all": ("tune", "train", "test", "figures", "report"),
    "tune": ("tune", "report"),
    "train": ("train", "report"),
    "test": ("test", "figures", "report"),
    "compare": ("compare", "figures", "report"),
    "figures": ("figures", "report"),
    "report": ("report",),
    "verify": (),
}


def number(least: int, text: str) -> int:
    """Read a whole number up to the largest seed."""
    if text.isdecimal() and len(text) < 11 and least <= int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r:.20} is no whole number from {least} to 2^32-1")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line; what is wrong in it ends the program in one line."""
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"reproduce.py: error: {message}\n")
    stages_of, whole = {}, {"metavar": "N", "type": partial(number, 1)}
    seed = {"metavar": "N", "type": partial(number, 0)}

    def add(option: str, stages: str, text: str, **settings: Any) -> None:
        """Add an option that has an effect on these stages alone, or on any."""
        action = group.add_argument(option, help=text, **settings)
        stages_of[action.dest] = option, stages, action.default

    group = parser.add_argument_group("what to do")
    text = "all: tune, train, test, figures, report, verify in turn; compare: KNN, SVM and networks"
    add("--stage", "", text, choices=COMMANDS, default="all")
    add("--results", "", "folder of the run; default: results/DATA", metavar="DIR")
    anew = "all tune train test compare figures report"
    add("--overwrite", anew, "do done stages again, drop what followed", action="store_true")
    add("--no-model", "verify", "verify without model and images", action="store_true")

    group = parser.add_argument_group("data")
    text = f"digits; {', '.join(data.MEDMNIST)}; FILE.npz in MedMNIST's layout; default: auto: "
    text += "what the folder was made from, else tissuemnist, where there is no network digits"
    add("--data", "", text, metavar="SOURCE", default="auto")
    add("--root", "", "where downloads are kept", metavar="DIR", default="~/.medmnist")
    text = "60/15/25 %% at random, or the file's own; default: the folder's, else poster"
    add("--split", "", text, choices=("poster", "official"))
    add("--split-seed", "", "of the poster's split; default: the folder's, else 0", **seed)

    group, search = parser.add_argument_group("search"), "all tune"
    text = "the poster's one bracket, or Hyperband's; default: poster"
    add("--schedule", search, text, choices=("poster", "hyperband"), default="poster")
    add("--max-resource", search, "Hyperband's R, in epochs; default: 81", default=81, **whole)
    text = "Hyperband's eta: one in N survives a rung; default: 3"
    add("--eta", search, text, metavar="N", type=partial(number, 2), default=3)
    text = "train every rung from scratch, not from the last one"
    add("--retrain", search, text, action="store_true")
    add("--workers", search, "trials at a time; default: a core each, or 1 on a GPU", **whole)
    add("--dask", search, "run trials on the cluster of this scheduler", metavar="tcp://HOST:PORT")

    group, training = parser.add_argument_group("training"), "all train compare"
    text = "poster (default), authors (16 digits), tuned (the search's best) or a file of your own"
    add("--hyperparameters", training, text, metavar="NAME|FILE.json", default="poster")
    add("--epochs", training, "default: the hyperparameters', 100", **whole)
    text = "of search, weights, order of the images and dropout; default: 0"
    add("--seed", training + " tune", text, default=0, **seed)
    add("--seeds", "all train", "train and test once with each", nargs="+", **seed)
    add("--device", "", "auto (default), cpu, cuda, cuda:1, ...", default="auto")
    text = "auto (default): fp16 on a GPU, bf16 on a CPU that has it, else fp32"
    add("--precision", training + " tune", text, choices=model.PRECISIONS, default="auto")
    text = "compile the training step; auto (default): where the training is long enough to gain"
    add("--compile", "all train", text, choices=model.COMPILE, default="auto")
    text = "most training images of the comparison; default: 10000"
    add("--compare-max", "compare", text, default=10_000, **whole)

    options = parser.parse_args(argv)
    if "" in (options.results, options.data):
        parser.error("--results and --data need a name: is a variable empty?")
    for name, (option, stages, default) in stages_of.items():
        if stages and options.stage not in stages.split() and getattr(options, name) != default:
            parser.error(f"{option} has no effect on --stage {options.stage}: leave it out")
    if options.schedule == "poster" and (options.max_resource, options.eta) != (81, 3):
        parser.error("--max-resource and --eta go with --schedule hyperband")
    if options.dask and (options.workers or not re.fullmatch(r"\w+://.+:\d+", options.dask)):
        parser.error("--dask takes tcp://HOST:PORT, and no --workers beside it")
    if options.seeds and len({*options.seeds}) < max(2, len(options.seeds)):
        parser.error("--seeds takes two or more different seeds; for one say --seed")
    if options.split == "official" and options.split_seed is not None:
        parser.error("--split-seed has no effect on --split official: leave it out")
    return options


def open_run(options: Namespace) -> Run:
    """Settle folder, data and split; load the images, where the stage needs them.

    A folder that holds a run says what it is on; without one it is named after the data.
    """
    stage, folder, record = options.stage, None, {}
    looks = stage in ("test", "figures", "report", "verify")  # at a run that is there
    if options.results:
        folder = Path(options.results)
    elif options.data != "auto":
        folder = Path("results", Path(options.data).stem)
    elif looks:
        places = [Path("results", name) for name in ("tissuemnist", "digits")]
        folder = next((place for place in places if place.exists()), places[0])
    if folder is not None:
        record = read_record(folder, options)
        poster = stage == "figures" and is_poster(folder)
        found = folder.is_dir() if stage == "verify" else record or poster
        if looks and not found:
            raise RunError(f"{folder} holds no run: run --stage all first, or name --results")
    if stage == "report" or (stage in ("figures", "verify") and (options.no_model or not record)):
        return Run(folder, None, options)
    about = record.get("data", {})
    if options.data == "auto" and about:
        options.data = about["source"]
        if os.sep in options.data and not Path(options.data).exists():
            advice = "give its new place by --data" + ", or say --no-model" * (stage == "verify")
            raise RunError(f"{options.data}, of which {folder} was made, is gone: {advice}")
    progress = Progress("data", 1)

    def show(done: int, total: int) -> None:
        text = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        progress(done / max(total, 1), text, step=done == total)

    images = data.load(options.data, options.root, stage != "verify", show)
    about = about if about.get("md5") == images.md5 else {}
    options.split = options.split or about.get("split", "poster")
    if options.split_seed is None:
        options.split_seed = about.get("split_seed", 0)
    return Run(folder or Path("results", images.name), images, options)


def plan(run: Run, stages: Sequence[str]) -> None:
    """Refuse what cannot be done, before anything is changed; say what will be."""
    folder, options, other = run.folder, run.options, run.other_data()
    files = [path for path in folder.glob("*") if path.name != ".lock" and path.suffix != ".tmp"]
    poster = options.stage == "figures" and is_poster(folder)
    if files and not poster and not (folder / "run.json").exists():
        raise RunError(f"{folder} holds other files, and no run.json: choose another --results")
    if other and not options.overwrite:
        raise RunError(f"{folder} holds another run, with {other}: {ADVICE}")
    if other:
        run.record = {}
    if options.stage == "test":
        if "train" not in run.done:
            raise RunError(f"{folder} holds no trained network: run --stage train first")
        if not run.seeds:
            model.load_network(folder / "model.pt")  # raises where it is damaged
    print(f"results  {folder}")
    if run.images is not None:
        beside = "" if comparable(run.about) else "; not comparable with the poster"
        print(f"data     {run.images.source}: {description(run.about)}{beside}", flush=True)
    for stage in [stage for stage in stages if stage in STAGES and stage != "test"]:
        if stage != "tune" and options.hyperparameters == "tuned":
            if "tune" in stages and (options.overwrite or "tune" not in run.done):
                continue  # nobody knows yet what it will find
            if "tune" not in run.done:
                raise RunError(f"{folder} holds no finished search: run --stage tune first")
        wanted = STAGES[stage][0](run)
        if not options.overwrite:
            run.check(stage, wanted)
        told = [key for key in wanted if wanted[key] is not None and key not in ("values", "sizes")]
        shown = [f"{key} {wanted[key]}" for key in told]
        if stage == "tune":
            epochs = (hyperband.total_resource(b, options.retrain) for b in brackets(wanted))
            on = f"on {options.dask}" if options.dask else f"{options.workers} at a time"
            shown += [f"{sum(epochs)} epochs", f"trials {on}"]
        print(f"{stage:<8} {', '.join(shown)}", flush=True)
    if options.dask and (options.overwrite or "tune" not in run.done):
        dask_client(options.dask).close()  # raises where there is none


def do(run: Run, stages: Sequence[str]) -> None:
    """Do stages in a folder, of which several seeds have one each for training and test."""
    run.folder.mkdir(parents=True, exist_ok=True)
    remove(run.folder / "SHA256SUMS")
    if run.options.overwrite:
        for stage in stages if run.images is None or "data" in run.record else FILES:
            run.drop(stage)
    if run.images is not None:
        run.record["data"] = run.about
        run.save()
    try:
        do_stages(run, stages)
    except (RunError, *LIBRARIES):  # refused halfway, which leaves the folder at rest too
        run.seal()
        raise
    run.seal()


def do_stages(run: Run, stages: Sequence[str]) -> None:
    """Do those of the stages that are not done yet."""
    for stage in [stage for stage in stages if stage in STAGES]:
        options_of, work = STAGES[stage]
        options = options_of(run)
        if not run.begin(stage, options):
            continue
        if ones := run.seeds if stage in ("train", "test") else []:
            for one in ones:
                print(f"results  {one.folder}")
                do(one, [each for each in COMMANDS[stage] if each in stages])
            if stage == "test":
                run.write("seeds.csv", metrics.csv_text(*seeds_table(run)))
            seconds = sum(one.record[stage]["seconds"] for one in ones)
        else:
            seconds = work(run, options)
        run.record[stage]["seconds"] = seconds
        run.save()
    if "figures" in stages:
        figures(run)
    if "report" in stages:
        report(run)


def carry_out(options: Namespace) -> bool:
    """Carry out a command line; tell whether all is well, of which only the audit may doubt."""
    options.device = model.resolve_device(options.device)
    options.precision = model.resolve_precision(options.precision, options.device)
    cores = joblib.cpu_count() if options.device.type == "cpu" else 1
    options.workers = options.workers or cores  # of a container's cores, those it may use
    stages = COMMANDS[options.stage]
    if importlib.util.find_spec("matplotlib") is None:
        if options.stage == "figures":
            raise RunError("figures need matplotlib: pip install -r requirements-figures.txt")
        stages = tuple(stage for stage in stages if stage != "figures")
    run = open_run(options)
    if options.stage == "verify":
        return audit_all(run)
    if is_poster(run.folder):
        stages = ("figures",)
    folder = run.folder
    plan(run, stages)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        do(run, stages)
    well = options.stage != "all" or audit_all(run)
    for name in ("seeds.csv", "table.csv"):
        if (folder / name).exists():
            print(f"\n{csv_table(folder / name)}")
    if "test" in stages and not run.seeds:
        compare_with_reference(run)
    if options.data == "auto" and run.images is not None and run.images.name == "digits":
        print("NOTE: without a network these are scikit-learn's digits, not the poster's images")
    return well


def compare_with_reference(run: Run) -> None:
    """Say how many predictions are those of our own run, which lies in results/reference."""
    ours = REFERENCE / run.about["name"]
    first, second = read_record(ours, run.options), run.record
    values = [one.get("train", {}).get("options", {}).get("values") for one in (first, second)]
    if run.about == first.get("data") and values[0] == values[1]:  # else it would mean nothing
        paths = (folder / "predictions.csv" for folder in (ours, run.folder))
        theirs, these = (metrics.read_predictions(path).predicted for path in paths)
        print(f"{(theirs == these).sum()} of {len(these)} predictions are those of {ours}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0 done, 1 verify found faults, 2 refused, 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"NOTE: {message}", file=sys.stderr)
            return 0 if carry_out(parse(argv)) else 1
    except KeyboardInterrupt:
        end = "\n" * sys.stdout.isatty()  # of the line that a bar stands in
        again = ", without --overwrite," * ("--overwrite" in (argv or sys.argv))
        print(f"{end}reproduce.py: interrupted; the same command{again} goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
    except (MemoryError, model.torch.OutOfMemoryError) as error:
        print(f"reproduce.py: error: out of memory ({error!s:.100})", file=sys.stderr)
    except (OSError, RunError, *LIBRARIES) as error:
        print(f"reproduce.py: error: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
