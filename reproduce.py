"""Regenerate the table and the ROC curves of "Medical Image Classification Model Based on CNN".

``python reproduce.py --stage all`` searches hyperparameters, trains with the poster's, tests,
draws, reports and verifies, in ``results/<data set>/``: on TissueMNIST, the poster's images, in
some two hours on two CPU cores; offline on scikit-learn's digits, in minutes. What was interrupted
goes on when the same command is given again, and what is finished is not done again.

The file is in the order of execution: what the poster says, `main` and `reproduce`, the stages,
their settings, their folders, figures and report, verify, and the command line.
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
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np

import data
import hyperband
import metrics
import model
from hyperband import Choice, IntUniform, LogUniform, Uniform
from metrics import METRIC_NAMES, read_column


class RunError(ValueError):
    """The command cannot be carried out, or a check failed; the message is one line."""


# What a user's command, file or disk can raise. Everything else is a fault of this program.
ERRORS = (RunError, data.DataError, model.ModelError, hyperband.SearchError, metrics.MetricsError)
ERRORS += (OSError, MemoryError)

# ---- what the poster says ------------------------------------------------------------------------

REFERENCE = Path(__file__).resolve().parent / "results" / "reference"
POSTER = REFERENCE / "poster"  # Its table, matrix and curves; they are stated nowhere else.
# How far a reproduction may lie from the poster's figures, fixed before any run.
TOLERANCE = {"accuracy": 0.01, "f1": 0.02, "recall": 0.02, "precision": 0.02, "auc": 0.02}

# The poster names batch size, number of features and patience, and the values that begin each list.
# The learning rate and weight decay of the authors' run have 16 digits, so they were drawn as well.
SPACE = {
    "batch_size": Choice((128, 256, 512)),
    "num_features": Choice((8, 16, 32)),
    "patience": IntUniform(3, 8),
    "learning_rate": LogUniform(1e-3, 1e-1),
    "weight_decay": LogUniform(1e-4, 1e-2),
    "factor": Uniform(0.1, 0.5),
}
TUNING_IMAGES = 10_000  # The poster's "subset of the whole dataset".
HYPERPARAMETERS = {"poster": model.POSTER, "authors": model.AUTHORS}


def comparable(about: dict[str, Any]) -> bool:
    """Return whether a run's figures may stand beside the poster's, given run.json's "data".

    They may on TissueMNIST with the poster's split and stretched pixels, or where the test set has
    exactly the poster's class counts, as the authors' own files have.
    """
    if about["md5"] in data.TISSUEMNIST and about["split"] == "poster":
        return about["pixels"] == "stretched"
    return about["test_counts"] == metrics.read_confusion(POSTER).sum(axis=1).tolist()


# ---- the chain -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0 done, 1 verify found a fault, 2 not done, 130 interrupted."""
    with contextlib.suppress(AttributeError):  # Standard output is closed, or a test's.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"NOTE: {message}", file=sys.stderr)
            return 0 if reproduce(parse(argv)) else 1
    except KeyboardInterrupt:
        if sys.stdout is not None and sys.stdout.isatty():
            print()  # Ends the line of a progress bar.
        print("reproduce.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader of our output has ended, as in `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its exit.
    except (MemoryError, model.torch.OutOfMemoryError) as error:
        print(f"reproduce.py: error: out of memory ({error!s:.100})", file=sys.stderr)
    except ERRORS as error:
        print(f"reproduce.py: error: {metrics.describe(error)}", file=sys.stderr)
    return 2


def reproduce(options: Namespace) -> bool:
    """Do the stages that the command names, in order; return whether verify finds no fault."""
    if {*options.stage} == {"verify"}:
        return verify(open_finished(options))
    run = open_run(options)
    announce(run, options)
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder):
        if "tune" in options.stage:
            once(run, tune, settings_of(run, "tune", options))
        if "train" in options.stage:
            once(run, train, settings_of(run, "train", options))
        if "test" in options.stage:
            once(run, test, settings_of(run, "test", options))
        if "compare" in options.stage:
            once(run, compare, settings_of(run, "compare", options))
        draw_figures(run)
        write_report(run)
    is_well = "verify" not in options.stage or verify(run)
    show_results(run, options)
    return is_well


# A stage writes its files into `folder`, and goes on with what an interrupted process has left
# there. Its `settings` are those of its run.json. They and the data decide the outcome.


def tune(run: Run, folder: Path, settings: dict[str, Any]) -> None:
    """Search SPACE by successive halving; write tuning.jsonl, one line per trial, and best.json."""
    brackets = read_schedule(settings["schedule"])
    retrain = settings["retrain"]
    total = sum(hyperband.total_resource(rungs, retrain) for rungs in brackets)
    progress = Progress("tune", total)
    epochs = 0  # Of all trials together.
    lowest = math.inf

    def on_trial(trial: hyperband.Trial, replayed: bool) -> None:
        nonlocal epochs, lowest
        rungs = brackets[trial.bracket]
        is_continued = trial.rung > 0 and not retrain
        epochs += trial.resource - (rungs[trial.rung - 1].resource if is_continued else 0)
        if trial.loss is not None:
            lowest = min(lowest, trial.loss)
        if replayed:  # From the log of an interrupted search.
            progress.start(epochs)
            return
        outcome = trial.error or f"loss {trial.loss:.4f}, lowest {lowest:.4f}"
        place = f"rung {rungs[trial.rung].configurations}@{trial.resource}, trial {trial.trial}"
        progress.show(epochs, f"{epochs}/{total} epochs, {place}: {outcome}", is_step=True)

    # Images (N, H, W) or (N, H, W, C) uint8, labels (N,) int64, of training and of validation.
    split = data.tuning_split(run.split, TUNING_IMAGES, settings["seed"])
    arrays = (*run.part(split.train), *run.part(split.valid))
    base_config = network_config(run.about, model.POSTER)
    objective = partial(trial_loss, arrays, base_config, fit_options(run, settings))
    progress.start(0)
    most = max(rungs[0].configurations for rungs in brackets)
    with trial_executor(run, most) as executor:
        result = hyperband.search(
            objective,
            SPACE,
            brackets,
            settings["seed"],
            log=folder / "tuning.jsonl",
            folder=(folder / "trials").absolute(),  # A cluster's workers run in other folders.
            retrain=retrain,
            executor=executor,
            on_trial=on_trial,
        )
    metrics.write(folder / "best.json", best_text(result.best))


def train(run: Run, folder: Path, settings: dict[str, Any]) -> float:
    """Train the poster's network; write history.csv and model.pt, the last epoch's weights.

    Returns the seconds of all epochs, those before an interruption included.
    """
    h = hyperparameters_of(settings)
    network = model.build(network_config(run.about, h), settings["seed"])
    num_images = len(run.split.train)
    progress = Progress("train", h.epochs)
    text = ""  # Of the last epoch; shown while the next one runs.

    def on_epoch(record: model.EpochRecord) -> None:
        nonlocal text
        text = f"epoch {record.epoch + 1}/{h.epochs}, learning rate {record.learning_rate:.3g}, "
        text += f"loss {record.train_loss:.4f}, accuracy {record.train_accuracy:.4f}, validation "
        text += f"{record.valid_loss:.4f}, {record.valid_accuracy:.4f}"
        progress.show(record.epoch + 1, text, is_step=True)

    history = model.fit(
        network,
        *run.part(run.split.train),
        *run.part(run.split.valid),
        h,
        **fit_options(run, settings),
        checkpoint=folder / "training.pt",
        on_epoch=on_epoch,
        on_batch=lambda epoch, done: progress.show(epoch + done / num_images, text),
    )
    metrics.write(folder / "history.csv", metrics.csv_text(model.EpochRecord._fields, history))
    model.save_network(network, folder / "model.pt", run.about["pixels"])
    return sum(record.seconds for record in history)


def test(run: Run, folder: Path, settings: dict[str, Any]) -> None:
    """Apply train/model.pt to the test images; write predictions.csv and what follows from it."""
    network = model.load_network(run.folder / "train" / "model.pt")
    images, labels = run.part(run.split.test)
    n = len(images)
    progress = Progress("test", n)

    def on_batch(done: int) -> None:
        progress.show(done, f"{done:,}/{n:,} images", is_step=done == n)

    # (n, number of classes) float32
    logits = model.predict(network, images, device=run.device, on_batch=on_batch).numpy()
    ids = data.ids(run.images.images[run.split.test])  # Of the file's own pixels, not stretched.
    predictions = metrics.Predictions(ids, labels, logits.argmax(1), logits)
    metrics.write(folder / "predictions.csv", metrics.predictions_text(predictions))
    (folder / "roc").mkdir(exist_ok=True)
    for name, table in metrics.tables(predictions, run.about["class_names"]).items():
        metrics.write(folder / name, metrics.csv_text(*table))
    if comparable(run.about):
        metrics.write(folder / "poster.csv", metrics.csv_text(*beside_poster(folder)))


def compare(run: Run, folder: Path, settings: dict[str, Any]) -> None:
    """Train and apply each of SYSTEMS at growing training sizes; write compare.csv row by row."""
    most = settings["compare_max"]
    first = 1_000 if most >= 5_000 else 100  # Small data have to show their growth, too.
    # 100, 200, 500, 1,000 and so on, then the most; a size just below it would show nothing new.
    series = [digit * 10**power for power in range(2, 9) for digit in (1, 2, 5)]
    sizes = [n for n in series if first <= n <= most / 1.5] + [most]
    steps = [*itertools.product(sizes, SYSTEMS)]
    path = folder / "compare.csv"
    rows = metrics.read_csv(path)[1] if path.exists() else []
    # A random order that begins with one image of each class, so that small sizes have them all.
    shuffled = random.Random(settings["seed"]).sample(
        run.split.train.tolist(), len(run.split.train)
    )
    firsts = {int(run.images.labels[index]): index for index in reversed(shuffled)}
    order = np.array([*dict.fromkeys([*firsts.values(), *shuffled])])
    progress = Progress("compare", sum(size for size, _ in steps))
    done = sum(size for size, _ in steps[: len(rows)])
    progress.start(done)
    for size, system in steps[len(rows) :]:
        rows.append([system, size, *measure(run, system, order[:size], settings)])
        metrics.write(path, metrics.csv_text(COMPARE_HEADER, rows))
        done += size
        text = f"{system}, {size:,} images: accuracy {rows[-1][2]:.4f}"
        progress.show(done, text, is_step=True)


# ---- parts of the stages -------------------------------------------------------------------------


def fit_options(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `model.fit` that a stage's settings and this process decide."""
    options = {name: settings[name] for name in ("seed", "precision")}
    return {**options, "device": run.device, "compile": settings.get("compile", "off")}


def trial_loss(arrays, base_config, options, configuration, previous, resource, folder) -> float:
    """Train a configuration for `resource` epochs in total; return its validation loss.

    The first three arguments are the same for all trials: images and labels of training and of
    validation, the network's config but for its width, and the options of `model.fit`. The others
    are a trial's, as `hyperband.search` passes them. Its checkpoint has the `previous` epochs.
    """
    h = replace(model.POSTER, **configuration, epochs=resource)
    config = {**base_config, "num_features": h.num_features}
    checkpoint = folder / "training.pt"
    with model.one_thread():  # So that losses do not depend on the number of workers.
        network = model.build(config, options["seed"])
        try:
            history = model.fit(network, *arrays, h, **options, checkpoint=checkpoint)
        except model.CheckpointError:  # A damaged one is no fault of the configuration.
            checkpoint.unlink()
            return trial_loss(arrays, base_config, options, configuration, 0, resource, folder)
    return history[-1].valid_loss


def best_text(best: hyperband.Trial) -> str:
    """Return the text of best.json."""
    hyperparameters = asdict(replace(model.POSTER, **best.configuration))
    outcome = {"trial": best.trial, "resource": best.resource, "loss": best.loss}
    return json_text({"hyperparameters": hyperparameters, **outcome})


@contextlib.contextmanager
def trial_executor(run: Run, most: int) -> Iterator[Executor | None]:
    """Yield what runs up to `most` trials at a time: a cluster, processes, or this one (None)."""
    workers = min(run.workers, most)
    if run.dask:
        with dask_client(run.dask) as client:
            yield client.get_executor()
    elif workers == 1:
        yield None
    else:
        # An uncompiled training step allocates its feature maps anew. By default glibc returns such
        # blocks to the system, and the page faults cost some 5 % of a search with two workers on an
        # AMD EPYC. 32 MB is the highest threshold that every glibc takes.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
        spawn = multiprocessing.get_context("spawn")
        pool = Workers(workers, spawn, end_with_parent)
        try:
            yield pool
        except BaseException:  # Ctrl-C above all: a trial may take minutes to end.
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class Workers(ProcessPoolExecutor):
    """Processes, started as trials need them, that leave Ctrl-C to this process."""

    def submit(self, *arguments: Any) -> Any:
        """Submit a call; a process that is started for it ignores Ctrl-C from its first moment."""
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().submit(*arguments)
        finally:
            signal.signal(signal.SIGINT, handler)


def end_with_parent() -> None:
    """End this worker process as soon as its parent has ended; it would wait for work forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def dask_client(address: str) -> Any:
    """Return a client of a Dask cluster whose workers have the code of this program."""
    # When the scheduler is lost, it would log a traceback beside our one line.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        from distributed import Client

        client = Client(address, timeout=10, set_as_default=False)
        for path in (data.__file__, model.__file__, hyperband.__file__, metrics.__file__, __file__):
            client.upload_file(path)
    except Exception as error:  # Imports on another machine may raise anything.
        raise RunError(
            f"--dask {address}: {error!r:.200}: install requirements.txt and "
            "requirements-cluster.txt here and there, and start a scheduler and workers"
        ) from None
    return client


def beside_poster(folder: Path) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of poster.csv: a test's figures and AUCs beside the poster's."""
    ours = read_column(folder / "table.csv", "value")
    poster = read_column(POSTER / "table.csv", "value")
    figures = [*METRIC_NAMES.values()]
    tolerances = [TOLERANCE[key] for key in METRIC_NAMES]
    areas = read_column(POSTER / "auc.csv", "auc")  # Ours have a mean in the last row, too.
    ours += read_column(folder / "roc" / "auc.csv", "auc")[: len(areas)]
    figures += [f"AUC of class {k}" for k in range(len(areas))]
    tolerances += [TOLERANCE["auc"]] * len(areas)
    rows = []
    for figure, a, b, tolerance in zip(figures, ours, poster + areas, tolerances, strict=True):
        verdict = "within" if abs(a - b) <= tolerance else "outside"
        rows.append([figure, a, b, a - b, tolerance, verdict])
    return ["figure", "ours", "poster", "difference", "tolerance", "verdict"], rows


SYSTEMS = ("KNN", "SVM (RBF)", "SVM (linear)", "NephNet2D", "PosterCNN")
COSTS = ("train_seconds", "predict_seconds_per_1000", "model_mb")
COMPARE_HEADER = ("system", "training_images", *METRIC_NAMES, *COSTS, "note")
TIMED_IMAGES = 1_000  # Test images on which prediction is timed.


def train_system(
    run: Run, system: str, index: np.ndarray, settings: dict[str, Any]
) -> tuple[Callable[[np.ndarray], np.ndarray], Any]:
    """Train one of SYSTEMS on some images, scikit-learn's with their defaults.

    Returns a function from images to classes, and the object that has to be kept for it.
    """
    # Only `compare` needs these.
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC, LinearSVC

    images, labels = run.part(index)
    if system in model.NETWORKS:
        h = hyperparameters_of(settings)
        if system == "NephNet2D":
            h = replace(h, num_features=32)  # Its authors' width; ours is no hyperparameter of it.
        network = model.build(network_config(run.about, h, system), settings["seed"])
        valid = run.part(run.split.valid[: max(1, len(images) // 4)])  # The poster's 80/20.
        model.fit(network, images, labels, *valid, h, **fit_options(run, settings))
        predict = partial(model.predict, network, device=run.device)
        return lambda images: predict(images).numpy().argmax(1), network.state_dict()
    classifiers = {
        "KNN": KNeighborsClassifier(),
        "SVM (RBF)": SVC(),
        "SVM (linear)": LinearSVC(random_state=settings["seed"]),
    }
    classifier = classifiers[system].fit(flat_pixels(images), labels)
    return lambda images: classifier.predict(flat_pixels(images)), classifier


def flat_pixels(images: np.ndarray) -> np.ndarray:
    """Return uint8 images as rows of float32 pixels in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def measure(run: Run, system: str, index: np.ndarray, settings: dict[str, Any]) -> list[Any]:
    """Train a system on some images and apply it; return the figures of its row."""
    images, labels = run.part(run.split.test)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Warm up, so that one-time initialisation is not measured.
        few = index[: max(10, run.images.num_classes)]  # With all classes, as `compare` sorts them.
        predict, _ = train_system(run, system, few, {**settings, "epochs": 1})
        predict(images[:10])
        caught.clear()
        started = time.perf_counter()
        predict, kept = train_system(run, system, index, settings)
        trained = time.perf_counter()
        predict(images[:TIMED_IMAGES])
        predicted = time.perf_counter()
        summary = metrics.summary(labels, predict(images), run.images.num_classes)
    seconds_per_1000 = (predicted - trained) * 1000 / min(len(images), TIMED_IMAGES)
    megabytes = len(pickle.dumps(kept)) / 1e6
    has_converged = not any("converge" in str(warning.message) for warning in caught)
    note = "" if has_converged else "not converged"
    return [*summary.values(), trained - started, seconds_per_1000, megabytes, note]


class Progress:
    """A bar with the time left: redrawn in place on a terminal, one line per step in a log."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total = label, total
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self.first, self.drawn_at = None, 0.0

    def start(self, done: float) -> None:
        """Measure the speed from here on; an earlier process has reached `done`."""
        self.first, self.started_at = done, time.monotonic()

    def show(self, done: float, text: str, is_step: bool = False) -> None:
        """Show that `done` of the total is reached; a step gets a line in a log."""
        now = time.monotonic()
        if self.first is None:
            self.start(done)
        if not is_step and not (self.is_terminal and now - self.drawn_at > 0.1):
            return
        self.drawn_at = now
        if self.first < done < self.total:
            left = (now - self.started_at) * (self.total - done) / (done - self.first)
            text += f"  ETA {timedelta(seconds=round(left))}"
        if self.is_terminal:
            share = min(1.0, done / self.total)
            width = shutil.get_terminal_size().columns - 1
            line = f"{self.label:<8} [{'#' * round(20 * share):<20}] {share:4.0%}  {text}"[:width]
            print(f"\r{line:<{width}}", end="\n" if done >= self.total else "", flush=True)
        else:
            print(f"{self.label:<8} {text}", flush=True)


# ---- the stages' settings ------------------------------------------------------------------------
# What decides a stage's outcome beside the data, under the names of the options. What the command
# does not give, or gives as "auto", is as the stage was begun, else the default: a search that was
# begun in bf16 goes on in bf16 where "auto" would be fp32.

FIELDS = tuple(asdict(model.POSTER))  # The names of the hyperparameters.
# What a record has under a name that is no option: the option that decides it, if there is one.
OPTION_OF = {name: "hyperparameters" for name in FIELDS if name != "epochs"}
OPTION_OF |= dict.fromkeys(
    ("space", "model_sha256", "md5", "shape", "class_names", "sizes", "test_counts")
)


def settings_of(run: Run, stage: str, options: Namespace) -> dict[str, Any]:
    """Return a stage's settings; the stage that they follow from, if any, must be finished."""
    if stage == "test":
        return {"model_sha256": sha256(run.folder / "train" / "model.pt")}
    known = run.settings(stage)

    def chosen(name: str, default: Any) -> Any:
        given = getattr(options, name)
        return known.get(name, default) if given in (None, "auto") else given

    settings = {
        "seed": chosen("seed", 0),
        "precision": chosen("precision", model.resolve_precision("auto", run.device)),
    }
    if stage == "tune":
        return {
            **settings,
            "schedule": chosen("schedule", "poster"),
            "retrain": chosen("retrain", False),
            "space": {name: repr(sampler) for name, sampler in SPACE.items()},
        }
    name = chosen("hyperparameters", "poster")
    if known and options.hyperparameters is None:
        h = hyperparameters_of(known)  # The file that they came from may have changed since.
    else:
        h = named_hyperparameters(run.folder, name)
    h = replace(h, epochs=options.epochs or known.get("epochs") or h.epochs)
    settings |= {"hyperparameters": name, **asdict(h)}
    num_images = len(run.split.train)
    if stage == "train":
        config = network_config(run.about, h)
        default = model.resolve_compile("auto", run.device, config, num_images, h.epochs)
        return {**settings, "compile": chosen("compile", default)}
    compare_max = min(chosen("compare_max", 10_000), num_images)
    if compare_max < 10:
        raise RunError("fewer than 10 training images are too few to compare")
    return {**settings, "compare_max": compare_max}


def hyperparameters_of(settings: dict[str, Any]) -> model.Hyperparameters:
    """Return the hyperparameters in a stage's settings."""
    return model.Hyperparameters(**{name: settings[name] for name in FIELDS})


def named_hyperparameters(folder: Path, name: str) -> model.Hyperparameters:
    """Return hyperparameters by name: poster, authors, tuned (by the folder's search) or a file.

    The file holds a JSON object of them, or an object that has one as "hyperparameters".
    """
    if name in HYPERPARAMETERS:
        return HYPERPARAMETERS[name]
    path = folder / "tune" / "best.json" if name == "tuned" else Path(name)
    try:
        found = json.loads(path.read_bytes())
        return model.Hyperparameters(**found.get("hyperparameters", found))
    except FileNotFoundError:
        names = ", ".join((*HYPERPARAMETERS, "tuned"))
        raise RunError(f"{path} is missing: hyperparameters are {names} or a file") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} holds no hyperparameters: {error}") from None


def read_schedule(schedule: str) -> list[list[hyperband.Rung]]:
    """Return the brackets of a schedule: "poster", or "R,ETA" for all of Hyperband's."""
    if schedule == "poster":
        return [hyperband.POSTER_BRACKET]
    match = re.fullmatch(r"([0-9]{1,7}),([0-9]{1,7})", schedule)
    if match is None:
        raise RunError(f"schedule {schedule!r:.40} is neither poster nor R,ETA such as 81,3")
    return hyperband.brackets(int(match[1]), int(match[2]))


# ---- the results folder --------------------------------------------------------------------------
# A stage is a folder in it, made under the name STAGE.part and renamed when everything is there.
# Its run.json, called a record here, holds data, settings, environments and, at the end, seconds.

STAGES = ("tune", "train", "test", "compare")
DATA_DEFAULTS = {"split": "poster", "split_seed": 0, "pixels": "stretched"}
# The names in a record's "data", and in the "settings" of each stage.
DATA_TYPES = {
    **dict.fromkeys(("name", "source", "md5", "split", "pixels"), str),
    **dict.fromkeys(("shape", "class_names", "sizes", "test_counts"), list),
    "split_seed": int,
}
TRAINING_TYPES = {"seed": int, "precision": str, "hyperparameters": str}
TRAINING_TYPES |= dict.fromkeys(FIELDS, object)  # Hyperparameters check themselves.
SETTING_TYPES = {
    "tune": {"seed": int, "precision": str, "schedule": str, "retrain": bool, "space": dict},
    "train": {**TRAINING_TYPES, "compile": str},
    "test": {"model_sha256": str},
    "compare": {**TRAINING_TYPES, "compare_max": int},
}


@dataclass
class Run:
    """A results folder, the images that it is about, and what decides how fast this process is.

    `about` is "data" of every record. `images` is None where a command needs none, or verify has
    none. `dask` is the address of a scheduler, or None.
    """

    folder: Path
    about: dict[str, Any]
    images: data.ImageData | None
    device: model.torch.device
    workers: int
    dask: str | None

    @cached_property
    def split(self) -> data.Split:
        """The split that `about` names."""
        return data.split(self.images, self.about["split"], self.about["split_seed"])

    def part(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images at an index array as they go into the network, and their labels.

        The images are (n, H, W) or (n, H, W, C) uint8, the labels (n,) int64.
        """
        images = self.images.images[index]
        if self.about["pixels"] == "stretched":
            images = data.stretch(images)
        return images, self.images.labels[index]

    def settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that a stage was begun with; {} where it was not."""
        return read_records(self.folder).get(stage, {}).get("settings", {})


def once(run: Run, stage: Callable, settings: dict[str, Any]) -> None:
    """Do a stage in a folder of its own, which gets its name when everything in it is there."""
    name = stage.__name__
    done = run.folder / name
    part = run.folder / f"{name}.part"
    # Again, as another command may have come between `announce` and the lock.
    refuse_other_data(run)
    refuse_other_settings(run, name, settings)
    if done.exists():
        print(f"{name:<8} done already", flush=True)
        return
    begun = {"data": run.about, "settings": settings, "environments": []}
    record = read_records(run.folder).get(name, begun)
    add_environment(record, run, name)
    # The first file in the folder, so that whatever a kill leaves there is known to be ours.
    part.mkdir(exist_ok=True)
    metrics.write(part / "run.json", json_text(record))
    for figure, (source, *_) in metrics.FIGURES.items():
        if source == name:  # It shows an earlier result, whose folder was removed.
            for path in (run.folder / "figures").glob(f"{figure}.*"):
                path.unlink()
    if "seconds" not in record:  # Else a process was killed between here and the renaming.
        started = time.perf_counter()
        seconds = stage(run, part, settings)
        # Only `train` knows the seconds of the processes before this one.
        record["seconds"] = seconds or time.perf_counter() - started
        metrics.write(part / "run.json", json_text(record))
    if (part / "trials").is_dir():
        shutil.rmtree(part / "trials")
    for path in (part / "training.pt", *part.rglob("*.tmp")):
        path.unlink(missing_ok=True)
    metrics.write_sums(part)
    part.rename(done)


def open_run(options: Namespace) -> Run:
    """Return the run that a command works on; what its folder was made with is the default."""
    device = model.resolve_device(options.device or "auto")  # Refused before any download.
    folder, images = find_folder(options)
    known = next((record["data"] for record in read_records(folder).values()), {})
    if not begins_run(options) and not finished_records(folder):
        advice = "do --stage all first, or name its --results"
        raise RunError(f"{folder} holds no run with a finished stage: {advice}")
    # Report and figures follow from the stages' folders, but for the samples of the images.
    if images is None and (options.data or {*STAGES} & {*options.stage}):
        source = options.data or known.get("source", "auto")
        try:
            images = load_images(source, options)
        except data.DataError as error:
            advice = "" if options.data else "; give its new place by --data"
            raise RunError(f"{error}{advice}") from None
    # A container may use some of the cores only. A GPU is fastest with one trial at a time.
    workers = options.workers or (joblib.cpu_count() if device.type == "cpu" else 1)
    run = Run(folder, known, images, device, workers, options.dask)
    if images is not None:
        given = {name: getattr(options, name) for name in DATA_DEFAULTS}
        given = {name: value for name, value in given.items() if value is not None}
        run.about = {**DATA_DEFAULTS, **known, **given}  # All that `describe_data` needs of it.
        if run.about["split"] == "official" and "split_seed" in given:
            raise RunError("--split-seed has no effect on the official split: leave it out")
        run.about = describe_data(run)
    return run


def open_finished(options: Namespace) -> Run:
    """Return the run to verify, with its images if they are here or --data names them."""
    folder, images = find_folder(options)
    if not any((folder / stage).exists() for stage in STAGES):
        raise RunError(f"{folder} holds no finished stage: name the --results of a run")
    records = read_records(folder, skip_damaged=True)  # `check_records` names a damaged one.
    known = next((record["data"] for record in records.values()), {})
    if images is None and options.data:
        images = load_images(options.data, options)
    elif images is None and known:
        with contextlib.suppress(data.DataError):
            images = data.load(known["source"], options.root, download=False)
    return Run(folder, known, images, model.resolve_device(options.device or "auto"), 1, None)


def find_folder(options: Namespace) -> tuple[Path, data.ImageData | None]:
    """Return the run's folder, and the images where it is named after them."""
    if options.results:
        try:
            return Path(options.results).expanduser(), None
        except RuntimeError as error:  # There is no such user, or no home.
            raise RunError(f"--results {options.results}: {error}") from None
    if options.data or begins_run(options):
        images = load_images(options.data or "auto", options)
        return Path("results", images.name), images
    # Without --data, --stage test, report or verify is about what --stage all has made here.
    places = [Path("results", name) for name in ("tissuemnist", "digits")]
    return next((place for place in places if place.exists()), places[0]), None


def begins_run(options: Namespace) -> bool:
    """Return whether the command has a stage that needs no other one before it."""
    return bool({"tune", "train", "compare"} & {*options.stage})


def load_images(source: str, options: Namespace) -> data.ImageData:
    """Load images, with a progress bar where they are downloaded."""
    progress = Progress("data", 1)

    def show(done: int, total: int) -> None:
        text = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        progress.show(done / max(total, 1), text, is_step=done == total)

    return data.load(source, options.root, progress=show)


def describe_data(run: Run) -> dict[str, Any]:
    """Return what a record has as "data"."""
    labels = run.images.labels[run.split.test]
    return {
        "name": run.images.name,
        "source": run.images.source,
        "md5": run.images.md5,
        **{name: run.about[name] for name in DATA_DEFAULTS},
        "shape": list(run.images.images.shape),
        "class_names": list(run.images.class_names),
        "sizes": [len(part) for part in run.split],
        "test_counts": np.bincount(labels, minlength=run.images.num_classes).tolist(),
    }


def network_config(about: dict, h: model.Hyperparameters, name: str = "PosterCNN") -> dict:
    """Return the `config` of `model.build` for a network of these images."""
    _, size, _, *channels = about["shape"]  # (N, H, W) or (N, H, W, C)
    return {
        "network": name,
        "num_features": h.num_features,
        "num_classes": len(about["class_names"]),
        "in_channels": channels[0] if channels else 1,
        "image_size": size,
        "dropout": h.dropout,
    }


def announce(run: Run, options: Namespace) -> None:
    """Refuse what cannot be done, before anything is written; print what will be done."""
    # Other stages draw where they can; who asks for figures wants them.
    if "figures" in options.stage and importlib.util.find_spec("matplotlib") is None:
        raise RunError("figures need matplotlib: pip install -r requirements-figures.txt")
    print(f"results  {run.folder}")
    beside = "" if comparable(run.about) else "; not comparable with the poster"
    print(f"data     {run.about['source']}: {description(run.about)}{beside}", flush=True)
    refuse_other_data(run)
    for stage in STAGES:
        if stage not in options.stage:
            continue
        hyperparameters = options.hyperparameters or run.settings(stage).get("hyperparameters")
        needed = needed_stage(stage, hyperparameters)
        if needed and not (run.folder / needed).exists():
            # Settings that follow from its outcome are not known yet; `once` looks at them.
            if needed not in options.stage:
                raise RunError(f"{run.folder} has no finished {needed}: do --stage {needed} first")
            print(f"{stage:<8} after {needed}", flush=True)
            continue
        settings = settings_of(run, stage, options)
        refuse_other_settings(run, stage, settings)
        shown = [f"{name} {value}" for name, value in settings.items() if name not in OPTION_OF]
        print(f"{stage:<8} {', '.join(shown) or 'of train/model.pt'}", flush=True)
    if run.dask and not (run.folder / "tune").exists():
        dask_client(run.dask).close()  # Raises where there is none.


def needed_stage(stage: str, hyperparameters: str | None) -> str | None:
    """Return the stage that must be finished before this one, if there is one."""
    if stage == "test":
        return "train"
    return "tune" if stage != "tune" and hyperparameters == "tuned" else None


def refuse_other_data(run: Run) -> None:
    """Raise RunError where the folder has other files or data, or lacks what a stage came from."""
    records = read_records(run.folder)
    ours = {"figures", "report.md", *(f"{stage}.part" for stage in STAGES)}
    foreign = {path.name for path in run.folder.glob("[!.]*")} - ours
    if foreign and not records:
        raise RunError(f"{run.folder} holds other files, as {min(foreign)}: name new --results")
    for stage, record in records.items():
        place = stage_folder(run.folder, stage)
        needed = needed_stage(stage, record["settings"].get("hyperparameters"))
        if needed and not (run.folder / needed).exists():
            raise RunError(f"{place} was made with a {needed} that is gone: remove it as well")
        refuse_difference(place, record["data"], run.about, "choose another --results")


def refuse_other_settings(run: Run, stage: str, settings: dict[str, Any]) -> None:
    """Raise RunError where a stage, finished or begun, was made with other settings."""
    place = stage_folder(run.folder, stage)
    if place is not None:
        advice = f"remove {place} to do it again, or choose another --results"
        refuse_difference(place, run.settings(stage), settings, advice)


def refuse_difference(place: Path, known: dict, given: dict, advice: str) -> None:
    """Raise RunError where a stage was made with other values than the command's."""
    name = difference(known, given)
    if name is None:
        return
    option = OPTION_OF.get(name, name)
    if option:
        advice = f"leave out --{option.replace('_', '-')} to go on, or {advice}"
    values = f"{name} {known[name]!r:.60}, not {given[name]!r:.60}"
    raise RunError(f"{place} was made with {values}: {advice}")


def difference(known: dict[str, Any], given: dict[str, Any]) -> str | None:
    """Return the first name in `given` whose value differs; None where none does.

    Values count, not the name or the file that they came from.
    """
    for name, value in given.items():
        if name not in ("name", "source", "hyperparameters") and known.get(name) != value:
            return name
    return None


def stage_folder(folder: Path, stage: str) -> Path | None:
    """Return a stage's folder, finished or begun; None where it is neither."""
    done = folder / stage
    part = folder / f"{stage}.part"
    if done.exists():
        return done
    # With nothing but an unfinished run.json.tmp in it, the stage was not begun.
    if part.exists() and any(path.suffix != ".tmp" for path in part.iterdir()):
        return part
    return None


def read_records(folder: Path, skip_damaged: bool = False) -> dict[str, dict[str, Any]]:
    """Return the records of the stages that are finished or begun.

    Raises RunError where one is missing or, unless it is to be skipped, damaged.
    """
    records = {}
    for stage in STAGES:
        place = stage_folder(folder, stage)
        if place is None:
            continue
        path = place / "run.json"
        try:
            record = json.loads(path.read_bytes())
            about, settings = record["data"], record["settings"]
            is_whole = (
                has_types(about, DATA_TYPES)
                and {type(n) for n in about["shape"] + about["sizes"] + about["test_counts"]}
                == {int}
                and len(about["shape"]) in (3, 4)
                and {type(name) for name in about["class_names"]} == {str}
                and about["split"] in ("poster", "official")
                and has_types(settings, SETTING_TYPES[stage])
                and all(environment["device"] for environment in record["environments"])
                and record["environments"]
                and record.get("seconds", place.suffix == ".part") > 0
            )
            if "schedule" in settings:
                read_schedule(settings["schedule"])
            if "epochs" in settings:
                hyperparameters_of(settings)
        except FileNotFoundError:
            raise RunError(f"{place} has no run.json, so it is not ours: move it away") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            is_whole = False
        if is_whole:
            records[stage] = record
        elif not skip_damaged:
            raise RunError(f"{path}: damaged; restore it, or remove {place} to do it again")
    return records


def has_types(values: dict[str, Any], types: dict[str, type]) -> bool:
    """Return whether values have these names, and no others, and these types."""
    if values.keys() != types.keys():
        return False
    return all(isinstance(values[name], kind) for name, kind in types.items())


def add_environment(record: dict[str, Any], run: Run, stage: str) -> None:
    """Add to a record where this process runs, if that differs from the last process."""
    environment = {
        **model.environment(run.device),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }
    if stage == "tune":
        environment["trials"] = f"on {run.dask}" if run.dask else f"by {run.workers} workers"
    environments = record["environments"]
    if environments and environments[-1].get("git_commit") != environment["git_commit"]:
        warnings.warn(f"{stage} was begun with the code of another commit", stacklevel=2)
    if environment not in environments[-1:]:
        environments.append(environment)


def git_commit() -> str | None:
    """Return the commit of this program's code, "-dirty" where files differ; None without git."""
    # Another repository's GIT_DIR, as a git hook has it, does not concern this one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(words, capture_output=True, text=True, cwd=here, env=own)
    except OSError:  # git is not installed.
        return None
    return described.stdout.strip() or None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system releases it however the process ends."""
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process: wait for it") from None
        except (ImportError, OSError):  # Windows, or a file system without locks.
            pass
        yield


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def json_text(content: Any) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


# ---- figures and report --------------------------------------------------------------------------


def draw_figures(run: Run) -> None:
    """Draw figures/ from the stages that are there, and sample images."""
    if importlib.util.find_spec("matplotlib") is None:
        print("figures  not drawn: pip install -r requirements-figures.txt")
        return
    drawn = metrics.draw(run.folder, POSTER if comparable(run.about) else None)
    if run.images is not None:
        # Eight images of each class, one row per class.
        first = [np.flatnonzero(run.images.labels == k)[:8] for k in range(run.images.num_classes)]
        stem = run.folder / "figures" / "samples"
        metrics.draw_samples(*run.part(np.concatenate(first)), run.about["class_names"], stem)
        drawn.append("samples")
    print(f"figures  {', '.join(drawn)} in {run.folder / 'figures'}")


def write_report(run: Run) -> None:
    """Write report.md."""
    folder = run.folder
    drawn = []
    for name, (stage, *_) in metrics.FIGURES.items():
        if (folder / stage).exists() and (folder / "figures" / f"{name}.png").exists():
            drawn.append(name)
    metrics.write(folder / "report.md", report_text(folder, drawn))
    print(f"report   {folder / 'report.md'}", flush=True)


def report_text(folder: Path, pictures: Sequence[str]) -> str:
    """Return the text of report.md, which follows from the stages' folders and shows `pictures`."""
    records = finished_records(folder)
    about = next(record["data"] for record in records.values())
    parts = [f"# {about['name']}: a run of the poster's chain", f"{description(about)}."]
    for name, title in (
        ("test/table.csv", "Results (95 % intervals: bootstrap over the test images)"),
        ("test/poster.csv", "Beside the poster"),
        ("test/per_class.csv", "Classes"),
        ("test/roc/auc.csv", "Area under each ROC curve (intervals: DeLong's)"),
        ("compare/compare.csv", "KNN, SVM, NephNet2D and PosterCNN"),
    ):
        if (folder / name).exists():
            parts += [f"## {title}", metrics.csv_table(folder / name)]
    for name in pictures:
        *_, caption = metrics.FIGURES[name]
        parts += [f"## {caption}", f"![{caption}](figures/{name}.png)"]
    commands = "\n".join(command(stage, record) for stage, record in records.items())
    parts += ["## The same again", f"```bash\n{commands}\n```"]
    environments = itertools.starmap(environment_lines, records.items())
    parts += ["## Environments", "\n".join(itertools.chain(*environments))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def finished_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the finished stages."""
    records = read_records(folder)
    return {stage: record for stage, record in records.items() if (folder / stage).exists()}


def description(about: dict[str, Any]) -> str:
    """Return in words what a run is on."""
    count, *shape = about["shape"]
    sizes = " / ".join(f"{size:,}" for size in about["sizes"])
    text = f"{count:,} images of {'x'.join(map(str, shape))} pixels, {about['pixels']}, "
    text += f"{len(about['class_names'])} classes, MD5 {about['md5']}; {about['split']} split: "
    return f"{text}{sizes} for training / validation / test"


def command(stage: str, record: dict[str, Any]) -> str:
    """Return the command that does a stage again in another folder, with every option settled."""
    about, settings = record["data"], record["settings"]
    options = {"data": about["source"], **{name: about[name] for name in DATA_DEFAULTS}}
    if about["split"] == "official":
        del options["split_seed"]
    options |= {name: value for name, value in settings.items() if name not in OPTION_OF}
    options["device"] = record["environments"][-1]["device"]
    # Another folder, as in this one the stage is done.
    options["results"] = f"results/{about['name']}-again"
    words = ["python", "reproduce.py", "--stage", stage]
    for name, value in options.items():
        if value is not False:
            words.append(f"--{name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


def environment_lines(stage: str, record: dict[str, Any]) -> list[str]:
    """Return the seconds of a stage, and one line for each machine or version that worked on it."""
    scope = "all epochs" if stage == "train" else "the last process"
    lines = [f"- {stage}: {record['seconds']:.1f} seconds ({scope})"]
    for environment in record["environments"]:
        lines.append("  - " + ", ".join(f"{name} {value}" for name, value in environment.items()))
    return lines


def show_results(run: Run, options: Namespace) -> None:
    """Print the tables of the test, and how many predictions are those of our own run."""
    for name in ("table.csv", "poster.csv"):
        if (run.folder / "test" / name).exists():
            print(f"\n{metrics.csv_table(run.folder / 'test' / name)}", end="")
    if "test" in options.stage:
        compare_with_reference(run)
    if run.about["source"] == "digits" and options.data is None and begins_run(options):
        print("NOTE: these are scikit-learn's digits, which stand in for the poster's images")


def compare_with_reference(run: Run) -> None:
    """Print how many predictions are those of our run in results/reference, if it is like this."""
    reference = REFERENCE / run.about["name"]
    if not (reference / "test").exists():
        return
    ours = finished_records(reference)["train"]
    users = finished_records(run.folder)["train"]
    is_like = hyperparameters_of(ours["settings"]) == hyperparameters_of(users["settings"])
    if is_like and difference(ours["data"], users["data"]) is None:
        paths = (folder / "test" / "predictions.csv" for folder in (reference, run.folder))
        first, second = (metrics.read_predictions(path).predicted for path in paths)
        print(f"\n{(first == second).sum()} of {len(first)} predictions are those of {reference}")


# ---- verify --------------------------------------------------------------------------------------
# A check is a function that raises at the first problem; its docstring is what verify prints. The
# message begins with the path of the file that is wrong.

# How far two machines may lie apart: logits, as a share of the largest one; and the last epoch's
# validation loss and accuracy, recomputed in fp32, where the training was in fp32 or in 16 bits.
LOGIT_TOLERANCE = 1e-4
VALIDATION_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}


def check_records(run: Run) -> None:
    """Check that every run.json agrees with the others and with its hyperparameters' name."""
    records = finished_records(run.folder)
    for stage, record in records.items():
        path, settings = run.folder / stage / "run.json", record["settings"]
        if other := difference(record["data"], run.about):
            raise RunError(f"{path}: another stage has other data: {other}")
        name = settings.get("hyperparameters")
        needed = needed_stage(stage, name)
        if needed and needed not in records:
            raise RunError(f"{path}: {stage} was made with a {needed} that is not here")
        model_path = run.folder / "train" / "model.pt"
        if stage == "test" and settings["model_sha256"] != sha256(model_path):
            raise RunError(f"{path}: the test is not of train/model.pt")
        if name in (*HYPERPARAMETERS, "tuned"):  # Else it is a file of the user, maybe elsewhere.
            named = replace(named_hyperparameters(run.folder, name), epochs=settings["epochs"])
            if hyperparameters_of(settings) != named:
                raise RunError(f"{path}: the values are not those of {name}")


def check_data(run: Run) -> None:
    """Check that run.json describes the images and their split."""
    if other := difference(run.about, describe_data(run)):
        stage = next(iter(read_records(run.folder)))
        raise RunError(f"{run.folder / stage / 'run.json'}: {other} is not the images'")


def check_search(run: Run) -> None:
    """Check that the search's configurations follow from its seed, the rest from its losses."""
    folder, settings = run.folder / "tune", run.settings("tune")
    if settings["space"] != {name: repr(sampler) for name, sampler in SPACE.items()}:
        raise RunError(f"{folder / 'run.json'}: the space is not this program's SPACE")
    brackets = read_schedule(settings["schedule"])
    best = hyperband.replay(folder / "tuning.jsonl", SPACE, brackets, settings["seed"]).best
    if (folder / "best.json").read_bytes() != best_text(best).encode():
        raise RunError(f"{folder / 'best.json'}: not trial {best.trial}, the best of tuning.jsonl")


def check_training(run: Run) -> None:
    """Check that the learning rates follow from the losses, and model.pt's size from run.json."""
    folder, settings = run.folder / "train", run.settings("train")
    path, h = folder / "history.csv", hyperparameters_of(settings)
    _, rows = metrics.read_csv(path)
    rates = model.learning_rates(h, read_column(path, "valid_loss"))
    expected = [[epoch, rates[epoch], *row[2:]] for epoch, row in enumerate(rows)]
    metrics.compare_csv(path, model.EpochRecord._fields, expected)
    if len(rows) != h.epochs:
        raise RunError(f"{path}: {len(rows)} epochs, run.json has {h.epochs}")
    network = model.load_network(folder / "model.pt")
    expected = network_config(run.about, h), run.about["pixels"]
    if (network.config, network.pixels) != expected:
        raise RunError(
            f"{folder / 'model.pt'}: {network.config!r:.200}, expected {expected!r:.200}"
        )


def check_validation(run: Run) -> None:
    """Check that the last epoch's validation loss and accuracy are model.pt's."""
    folder, path = run.folder / "train", run.folder / "train" / "history.csv"
    # A changed run.json may have any text as its precision.
    tolerance = VALIDATION_TOLERANCE.get(run.settings("train")["precision"], 0)
    network = model.load_network(folder / "model.pt")
    images, labels = run.part(run.split.valid)
    measured = model.evaluate(network, images, labels, device=run.device, precision="fp32")
    for name, value in zip(("valid_loss", "valid_accuracy"), measured, strict=True):
        stored = read_column(path, name)[-1]
        if not abs(stored - value) <= tolerance:
            raise RunError(f"{path}: last row, column {name}: {stored}, recomputed {value}")


def check_predictions(run: Run) -> None:
    """Check that the predictions are of these images, and their logits model.pt's."""
    path = run.folder / "test" / "predictions.csv"
    stored = metrics.read_predictions(path)
    places = find_images(run, stored.ids, path)
    images, _ = run.part(np.array([equal[0] for equal in places]))
    network = model.load_network(run.folder / "train" / "model.pt")
    logits = model.predict(network, images, device=run.device).numpy()  # (N, classes) float32
    if logits.shape != stored.logits.shape:
        raise RunError(f"{path}: logits of shape {stored.logits.shape}, model.pt's {logits.shape}")
    # Sums of another order, on another processor, differ in proportion to their largest terms.
    tolerance = LOGIT_TOLERANCE * max(1, np.abs(logits).max())
    is_near = (np.abs(logits - stored.logits) <= tolerance).all(axis=1)
    for row, equal in enumerate(places):  # Their file's first row is the header.
        if stored.labels[row] not in run.images.labels[equal]:
            raise RunError(f"{path}: row {row + 2}: the label is not the image's")
        if not is_near[row]:
            raise RunError(f"{path}: row {row + 2}: the logits are not model.pt's")


def find_images(run: Run, ids: np.ndarray, path: Path) -> list[list[int]]:
    """Return where in the data each id's image is: one place, or those of equal images.

    In the run's own file they must be the split's test images, in its order.
    """
    if run.images.md5 == run.about["md5"]:
        expected = data.ids(run.images.images[run.split.test]).tolist()
        pairs = itertools.zip_longest(ids.tolist(), expected)
        for row, (stored_id, split_id) in enumerate(pairs, 2):  # Row 1 is the header.
            if stored_id != split_id:
                raise RunError(f"{path}: row {row}: id {stored_id}, the split has {split_id}")
        return [[place] for place in run.split.test]
    places: dict[str, list[int]] = {}
    for place, image_id in enumerate(data.ids(run.images.images).tolist()):
        places.setdefault(image_id, []).append(place)
    for row, image_id in enumerate(ids.tolist(), 2):
        if image_id not in places:
            raise RunError(f"{path}: row {row}: {run.images.source} has no image {image_id}")
    return [places[image_id] for image_id in ids.tolist()]


def check_tables(run: Run) -> None:
    """Check that tables, curves, AUCs and poster.csv follow from predictions.csv."""
    folder = run.folder / "test"
    metrics.check_tables(folder)
    counts = metrics.read_confusion(folder).sum(axis=1).tolist()
    names = read_column(folder / "per_class.csv", "name", str)
    if (counts, names) != (run.about["test_counts"], run.about["class_names"]):
        raise RunError(f"{folder / 'run.json'}: test_counts or class_names are not the tables'")
    path = folder / "poster.csv"
    if comparable(run.about):
        metrics.compare_csv(path, *beside_poster(folder))
    elif path.exists():
        raise RunError(f"{path}: this run is not comparable with the poster")


def check_report(run: Run) -> None:
    """Check that report.md follows from the stages' folders."""
    path = run.folder / "report.md"
    if not path.exists():  # As after an interruption.
        raise RunError(f"{path} is missing: --stage report writes it")
    stored = path.read_bytes()
    # Figures may have been drawn, or not, since the report was written.
    pictures = [name for name in metrics.FIGURES if f"(figures/{name}.png)".encode() in stored]
    if stored != report_text(run.folder, pictures).encode("utf-8", "backslashreplace"):
        raise RunError(f"{path}: not what --stage report writes")


def check_files(run: Run) -> None:
    """Check that every file of the stages is as SHA256SUMS has it."""
    for stage in STAGES:
        if (run.folder / stage).exists():
            metrics.check_sums(run.folder / stage)


# Each check, the stage that it is about (None: all of them), and what it needs beside the folder:
# "images", a file that may have the test images, in any order; "split", a file whose split has them
# as its test images; "file", the run's own file.
CHECKS = (
    (check_records, None, None),
    (check_data, None, "file"),
    (check_search, "tune", None),
    (check_training, "train", None),
    (check_validation, "train", "split"),
    (check_predictions, "test", "images"),
    (check_tables, "test", None),
    (check_report, None, None),
    (check_files, None, None),
)


def verify(run: Run) -> bool:
    """Check a results folder without training; return whether nothing is wrong. Write nothing."""
    print(f"verify   {run.folder}")
    for stage in STAGES:
        if (run.folder / f"{stage}.part").exists():
            print(f"-        {stage}.part is not finished: not checked")
    checks, missing = (CHECKS[0], CHECKS[-1]), {}
    if run.about:  # Without any whole record, there is nothing to check the other files against.
        checks, missing = CHECKS, missing_evidence(run)
    num_wrong = num_left_out = 0
    for check, stage, needed in checks:
        if stage and not (run.folder / stage).exists():
            continue
        if needed in missing:
            print(f"left out {metrics.claim(check)}: {missing[needed]}")
            num_left_out += 1
        elif not metrics.passes(check, run, root=run.folder, errors=ERRORS):
            num_wrong += 1
    print("on trust training losses and accuracies, validation before the last epoch, trials'")
    print("         losses, that training had run.json's settings, seconds, environments, figures,")
    print("         compare.csv")
    where = f"in what was checked of {run.folder}" if num_left_out else f"in {run.folder}"
    print(f"verify   {'something is WRONG' if num_wrong else 'nothing wrong'} {where}", flush=True)
    return num_wrong == 0


def missing_evidence(run: Run) -> dict[str, str]:
    """Return which of "images", "split" and "file", as CHECKS has them, is not here, and why."""
    images, about = run.images, run.about
    if images is None:
        return dict.fromkeys(("images", "split", "file"), "the images are not here; give --data")
    if images.md5 == about["md5"]:
        return {}
    shape, num_classes = about["shape"][1:], len(about["class_names"])
    if [*images.images.shape[1:]] != shape or images.num_classes != num_classes:
        raise RunError(f"{images.source}: images of another shape, or another number of classes")
    missing = {"file": f"{images.source} is another file than the run's"}
    try:
        stored = metrics.read_predictions(run.folder / "test" / "predictions.csv").ids.tolist()
        is_same = sorted(stored) == sorted(data.ids(images.images[run.split.test]).tolist())
    except ERRORS:
        is_same = False
    if not is_same:
        missing["split"] = f"{images.source} has, split alike, other test images"
    return missing


# ---- the command line ----------------------------------------------------------------------------

# The stages on which an option has an effect; the others have one on every stage.
EFFECTS = {
    "split split_seed pixels": STAGES,
    "schedule retrain workers dask": ("tune",),
    "seed precision": ("tune", "train", "compare"),
    "hyperparameters epochs": ("train", "compare"),
    "compile": ("train",),
    "compare_max": ("compare",),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others."""

    def error(self, message: str) -> None:
        """Raise the error."""
        raise RunError(message)


def whole_number(least: int, text: str) -> int:
    """Return the whole number in a text, from `least` to the largest seed."""
    if re.fullmatch("[0-9]{1,10}", text) and least <= int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r:.20} is no whole number from {least} to 2^32-1")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line; options that are not given are None."""
    parser = Parser("reproduce.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    count = {"metavar": "N", "type": partial(whole_number, 1)}
    seed = {"metavar": "N", "type": partial(whole_number, 0)}

    add = parser.add_argument_group("what to do").add_argument
    text = "one or more of tune train test compare figures report verify, done in this order; all "
    text += "(default): tune train test report verify"
    choices = (*STAGES, "figures", "report", "verify", "all")
    add("--stage", nargs="+", choices=choices, default=["all"], help=text, metavar="STAGE")
    add("--results", metavar="DIR", help="folder of the run; default: results/NAME of the data")

    add = parser.add_argument_group("data (default: as the folder was made)").add_argument
    text = f"digits, {', '.join(data.MEDMNIST)}, or FILE.npz in MedMNIST's layout; default: "
    add("--data", metavar="SOURCE", help=text + "tissuemnist; offline digits")
    text = "folder of downloads; default: ~/.medmnist"
    add("--root", metavar="DIR", default="~/.medmnist", help=text)
    text = "poster (default): 60/15/25 %% for training/validation/test; official: the file's own"
    add("--split", choices=("poster", "official"), help=text)
    add("--split-seed", help="random seed of the poster's split; default: 0", **seed)
    text = "stretched (default): each image's grey values to 0..255, as the authors' were; raw: "
    add("--pixels", choices=("stretched", "raw"), help=text + "as the file has them")

    add = parser.add_argument_group("search (default: as it was begun)").add_argument
    text = "poster (default): its one bracket; R,ETA such as 81,3: all brackets of Hyperband"
    add("--schedule", metavar="poster|R,ETA", help=text)
    text = "train the survivors of a rung from scratch; default: go on from their last epoch"
    add("--retrain", action="store_const", const=True, help=text)
    text = "trials at a time; default: one per core; on a GPU 1"
    add("--workers", help=text, **count)
    text = "run the trials on the Dask cluster of this scheduler"
    add("--dask", metavar="tcp://HOST:PORT", help=text)

    add = parser.add_argument_group("training (default: as it was begun)").add_argument
    text = "poster (default): as printed; authors: with 16 digits; tuned: best of this folder's "
    text += "search; or a JSON file of yours, such as another folder's best.json"
    add("--hyperparameters", metavar="NAME|FILE.json", help=text)
    text = "epochs of training; default: those of the hyperparameters, the poster's 100"
    add("--epochs", help=text, **count)
    text = "random seed of search, weights, order of the images and dropout; default: 0"
    add("--seed", help=text, **seed)
    add("--device", help="auto (default): a GPU where there is one; cpu, cuda, cuda:1, ...")
    text = "auto (default): fp16 on a GPU, bf16 on a CPU that has it, else fp32"
    add("--precision", choices=model.PRECISIONS, help=text)
    text = "compile the training step; auto (default): on a CPU, where training takes minutes"
    add("--compile", choices=model.COMPILE, help=text)
    text = "most training images of compare; default: 10000"
    add("--compare-max", help=text, metavar="N", type=partial(whole_number, 10))

    options = parser.parse_args(argv)
    if "all" in options.stage:
        options.stage += ["tune", "train", "test", "report", "verify"]
    for names, stages in EFFECTS.items():
        for name in names.split():
            if getattr(options, name) is not None and not {*stages} & {*options.stage}:
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} has no effect on --stage {' '.join(options.stage)}")
    for name, value in vars(options).items():
        if value == "":
            parser.error(f"--{name.replace('_', '-')} is empty: is a variable not set?")
    if options.data == "auto":  # What data.py calls the default, too.
        options.data = None
    if options.dask and (options.workers or not re.fullmatch(r"\w+://.+:\d+", options.dask)):
        parser.error("--dask takes tcp://HOST:PORT, and no --workers beside it")
    if options.schedule:
        read_schedule(options.schedule)  # Raises where it is none, before any image is loaded.
    return options


if __name__ == "__main__":
    sys.exit(main())
