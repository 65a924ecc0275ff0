"""The numbers of a classification test, the text of the files that carry them, the figures.

Accuracy and macro F1, recall and precision with bootstrap intervals; precision, recall and F1 of
each class; the confusion matrix; a ROC curve a class, its AUC with DeLong's interval.

``python metrics.py predictions.csv`` prints the table of a predictions file: 50,000 images in
8 classes take a second. In code::

    predictions = read_predictions("predictions.csv")
    for name, (header, rows) in tables(predictions, class_names).items():
        write(name, csv_text(header, rows))

Needs numpy and scikit-learn, and matplotlib only to draw.

Said once for all functions: N is the number of images, K > 1 that of classes; labels and predicted
classes are (N,) integers, 0 to K - 1; logits and scores are (N, K) finite numbers; figures are
floats from 0 to 1, NaN where undefined. Bad input raises `MetricsError`, a file that can't be read
or written OSError. A warning is scikit-learn's UndefinedMetricWarning.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    accuracy_score,
    auc,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_curve,
)
from sklearn.utils import check_array, check_consistent_length, column_or_1d

PathLike = str | os.PathLike[str]
Table = tuple[list[str], list[list[Any]]]  # header and rows of a CSV file

# The figures of `summary`, in its order, and what readers call them.
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "recall": "macro recall",
    "precision": "macro precision",
}


class MetricsError(ValueError):
    """Input that can't be measured or read; the message is one line and says what to do."""


# ---- checks --------------------------------------------------------------------------------------


def _checked(name: str, values: ArrayLike, ndim: int, *others: ArrayLike) -> np.ndarray:
    """Return `values` as an array of 1 or 2 dimensions, finite, with as many rows as `others`."""
    try:
        array = check_array(values, ensure_2d=ndim == 2, ensure_min_features=2, input_name=name)
        check_consistent_length(array, *others)
        return column_or_1d(array) if ndim == 1 else array
    except (ValueError, TypeError) as error:
        raise MetricsError(f"{name}: {' '.join(str(error).split())}") from None


def _classes(name: str, values: ArrayLike, num_classes: int, *others: ArrayLike) -> np.ndarray:
    """Return `values` as (N,) int64, all of them 0 to `num_classes` - 1."""
    array = _checked(name, values, 1, *others)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= num_classes:
        raise MetricsError(f"{name}: give class indices, integers from 0 to {num_classes - 1}")
    return array.astype(np.int64)


def _counts(matrix: ArrayLike) -> np.ndarray:
    """Return a confusion matrix as (K, K) int64."""
    array = _checked("confusion matrix", matrix, 2)
    square = array.shape[0] == array.shape[1]
    if not square or array.dtype.kind not in "iu" or array.min() < 0 or not array.any():
        raise MetricsError("confusion matrix: give (K, K) counts of images, not all of them 0")
    return array.astype(np.int64)


def _warn_of(undefined: np.ndarray, message: str) -> None:
    """Warn the caller's caller of the classes where `undefined` (K,) is true, if any."""
    if undefined.any():
        classes = ", ".join(map(str, np.flatnonzero(undefined)))
        warnings.warn(message.format(classes), UndefinedMetricWarning, stacklevel=3)


# ---- numbers -------------------------------------------------------------------------------------


class ClassMetrics(NamedTuple):
    """The figures of one class; `support` is the number of its test images."""

    precision: float
    recall: float
    f1: float
    support: int


class RocCurve(NamedTuple):
    """One class against the rest: float64 arrays (M,), and the area under the curve.

    `thresholds` falls from infinity, the point (0, 0), to the lowest score. The arrays are empty
    where the curve is undefined.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray
    auc: float


class ClassAuc(NamedTuple):
    """The AUC of one class from raw logits, its interval, and the AUC from softmax."""

    auc: float
    auc_low: float
    auc_high: float
    auc_softmax: float
    support: int


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> np.ndarray:
    """Return the confusion matrix, (K, K) int64: rows are true classes, columns predicted ones."""
    labels = _classes("labels", labels, num_classes, predicted)
    predicted = _classes("predicted classes", predicted, num_classes)
    return confusion_matrix(labels, predicted, labels=range(num_classes)).astype(np.int64)


def summary(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> dict[str, float]:
    """Return accuracy and the macro averages of F1, recall and precision, by METRIC_NAMES' keys.

    The macro average is over the classes that occur in `labels` or `predicted`, as in scikit-learn;
    a class never predicted has precision 0, one without test images recall 0
    (``zero_division=0``). A class that occurs in neither is left out with a warning.
    """
    return summary_from_confusion(confusion(labels, predicted, num_classes))


def summary_from_confusion(matrix: ArrayLike) -> dict[str, float]:
    """Return what `summary` returns, from a (K, K) confusion matrix."""
    matrix = _counts(matrix)
    nowhere = matrix.sum(axis=0) + matrix.sum(axis=1) == 0
    _warn_of(nowhere, "class {}: neither in the test set nor predicted, left out of the averages")
    # Each cell that is not empty stands for its images by its weight; scikit-learn does the rest.
    true, predicted = np.nonzero(matrix)
    weight = matrix[true, predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, predicted, average="macro", sample_weight=weight, zero_division=0
    )
    accuracy = accuracy_score(true, predicted, sample_weight=weight)
    return dict(zip(METRIC_NAMES, map(float, (accuracy, f1, recall, precision)), strict=True))


def per_class(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> list[ClassMetrics]:
    """Return precision, recall, F1 and support of each of the K classes.

    Precision is NaN for a class that is never predicted, recall for one without test images, F1
    where both are; there is a warning of each.
    """
    matrix = confusion(labels, predicted, num_classes)
    _warn_of(matrix.sum(axis=0) == 0, "class {}: never predicted, precision is undefined")
    _warn_of(matrix.sum(axis=1) == 0, "class {}: not in the test set, recall is undefined")
    columns = precision_recall_fscore_support(
        labels, predicted, labels=range(num_classes), zero_division=np.nan
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [ClassMetrics(*row) for row in rows]


def softmax(logits: ArrayLike) -> np.ndarray:
    """Return the softmax of each row of (N, K) logits as float64, without overflow."""
    shifted = _checked("logits", logits, 2).astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def roc_curves(labels: ArrayLike, scores: ArrayLike) -> list[RocCurve]:
    """Return the ROC curve of each class against the rest.

    Scores are raw logits, as the poster's authors did, or `softmax` of them. The two give different
    curves, because softmax compares a logit with the others. Points that no line needs are left out
    (``drop_intermediate``). Where a class has no test image, or all of them, its curve is undefined
    and there is a warning.
    """
    scores = _checked("scores", scores, 2).astype(np.float64)
    num_classes = scores.shape[1]
    labels = _classes("labels", labels, num_classes, scores)
    support = np.bincount(labels, minlength=num_classes)
    undefined = (support == 0) | (support == len(labels))
    _warn_of(undefined, "class {}: none or all of the test images, the ROC curve is undefined")
    curves = []
    for k in range(num_classes):
        if undefined[k]:
            curves.append(RocCurve(np.empty(0), np.empty(0), np.empty(0), math.nan))
        else:
            fpr, tpr, thresholds = roc_curve(labels == k, scores[:, k])
            curves.append(RocCurve(fpr, tpr, thresholds, float(auc(fpr, tpr))))
    return curves


# ---- intervals -----------------------------------------------------------------------------------


def bootstrap_intervals(
    matrix: ArrayLike, replicates: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return (low, high) of each figure of `summary`: percentile bootstrap over test images.

    The figures depend on the confusion matrix alone, and drawing N of N images with replacement
    makes its cells multinomial; so a replicate is one multinomial draw. In each, the macro averages
    are over the classes that occur in it, as in `summary`. The intervals tell how far another test
    set would move the figures, not another training run.

    Parameters
    ----------
    matrix : (K, K) integers
        The confusion matrix.
    replicates : int
        At least 1; they take 8 bytes a cell that is not empty.
    seed : int
        Of ``numpy.random.RandomState``, whose stream NumPy promises to keep.
    level : float
        Confidence, between 0 and 1.

    References
    ----------
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    matrix = _counts(matrix)
    true, predicted = np.nonzero(matrix)  # (C,) the cells that are not empty
    share = matrix[true, predicted] / matrix.sum()
    draws = np.random.RandomState(seed).multinomial(matrix.sum(), share, size=replicates)
    draws = draws.astype(np.float64)  # (B, C), whole numbers still; float products are fast
    of_true, of_predicted = np.eye(len(matrix))[true], np.eye(len(matrix))[predicted]  # (C, K)
    support, called = draws @ of_true, draws @ of_predicted  # (B, K)
    hits = draws @ (of_true * of_predicted)
    present = (support + called > 0).sum(axis=1)  # (B,)
    figures = [hits.sum(axis=1) / matrix.sum()]
    # F1, recall, precision. Hits are 0 wherever the denominator is: that is zero_division=0.
    for part, whole in ((2 * hits, support + called), (hits, support), (hits, called)):
        figures.append((part / np.maximum(whole, 1)).sum(axis=1) / present)
    intervals = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2], axis=1).T
    return dict(zip(METRIC_NAMES, map(tuple, intervals.tolist()), strict=True))


def delong_interval(
    positive: ArrayLike, scores: ArrayLike, level: float = 0.95
) -> tuple[float, float, float]:
    """Return an AUC, low and high end of its interval by DeLong's variance, in O(n log n).

    The interval is normal, cut to 0..1. The AUC is NaN if none or all of the images are positive,
    the interval is NaN if fewer than two are positive or negative.

    Parameters
    ----------
    positive : (N,) bool
        Whether the image is of the class.
    scores : (N,) numbers
        The score of the class; only their order matters.
    level : float
        Confidence, between 0 and 1.

    References
    ----------
    DeLong, DeLong & Clarke-Pearson, Biometrics 44(3):837-845, 1988; Sun & Xu, IEEE Signal
    Processing Letters 21(11):1389-1393, 2014, for the O(n log n) by midranks.
    """
    scores = _checked("scores", scores, 1, positive)
    positive = _checked("positive", positive, 1)
    if positive.dtype != bool:
        raise MetricsError("positive: give booleans, whether each image is of the class")
    cases, controls = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(cases) or not len(controls):
        return math.nan, math.nan, math.nan

    def share_below(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        # A tie counts half: the difference of a value's midranks among all and among its own.
        below = np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")
        return below / (2 * len(ordered))

    over_controls, over_cases = share_below(cases, controls), share_below(controls, cases)
    area = float(over_controls.mean())
    if len(cases) < 2 or len(controls) < 2:
        return area, math.nan, math.nan
    variance = over_controls.var(ddof=1) / len(cases) + over_cases.var(ddof=1) / len(controls)
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return area, max(0.0, area - reach), min(1.0, area + reach)


def class_aucs(labels: ArrayLike, logits: ArrayLike) -> list[ClassAuc]:
    """Return the AUC of each of the K classes from raw logits and from their softmax.

    The interval is DeLong's, of 95 %. Undefined figures, of which `roc_curves` warns, are NaN.
    """
    logits = _checked("logits", logits, 2)
    labels = _classes("labels", labels, logits.shape[1], logits)
    probabilities = softmax(logits)
    rows = []
    for k in range(logits.shape[1]):
        positive = labels == k
        of_softmax, _, _ = delong_interval(positive, probabilities[:, k])
        interval = delong_interval(positive, logits[:, k])
        rows.append(ClassAuc(*interval, of_softmax, int(positive.sum())))
    return rows


# ---- files ---------------------------------------------------------------------------------------
#
# Errors name the file and the row, counted as editors do: the header is row 1.


def write(path: PathLike, content: str | bytes) -> None:
    r"""Write a file so that at no time a part of it stands under its name.

    It is written as NAME.tmp in the same folder, which must be, and moved into place; if that
    fails it is removed again. Text becomes UTF-8 with "\n" kept and lone surrogates escaped.
    """
    if isinstance(content, str):
        # A class named after a folder may hold bytes that are no text; they must not cost the file.
        content = content.encode("utf-8", "backslashreplace")
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a killed process's is written over
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read_text(path: PathLike) -> str:
    """Return the text of a file of whole lines: one cut short may end in a number cut short."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetricsError(f"{path}: byte {error.start} is not UTF-8; write it again") from None
    if not text.endswith("\n"):
        raise MetricsError(f"{path}: empty, or its last row is cut short; write it again")
    return text


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Return a CSV file's text: "\n", floats in full precision, NaN as nan."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])  # a float's str() is exact
    return text.getvalue()


def read_csv(path: PathLike) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a CSV file; each row has as many cells as the header."""
    try:
        rows = list(csv.reader(io.StringIO(_read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise MetricsError(f"{path}: not a CSV file ({error}); write it again") from None
    _check_widths(path, [len(row) for row in rows])
    return rows[0], rows[1:]


def _check_widths(path: PathLike, widths: Sequence[int]) -> None:
    """Raise MetricsError unless each row has as many cells as the header, which is the first."""
    for number, width in enumerate(widths, start=1):
        if width != widths[0] or width == 0:
            problem = f"row {number} has {width} cells, the header {widths[0]}"
            raise MetricsError(f"{path}: {problem}; write it again")


class Predictions(NamedTuple):
    """What predictions.csv holds: ids, labels, predicted (N,) int64; logits (N, K) float32.

    No two ids are alike, and `predicted` is the (first) highest logit's class.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray


def _predictions_header(num_classes: int) -> list[str]:
    return ["id", "label", "predicted", *(f"logit_{k}" for k in range(num_classes))]


def _check_predictions(predictions: Predictions, where: str = "") -> None:
    """Raise MetricsError naming row and column unless all is in range and agrees."""
    ids, labels, predicted, logits = predictions
    num_classes = logits.shape[1]
    repeated = np.full(len(ids), True)
    repeated[np.unique(ids, return_index=True)[1]] = False
    diverged = "not finite (did training diverge?)"
    checks = [(f"logit_{k}", ~np.isfinite(logits[:, k]), diverged) for k in range(num_classes)]
    checks += [
        ("label", (labels < 0) | (labels >= num_classes), f"not 0 to {num_classes - 1}"),
        ("predicted", predicted != logits.argmax(axis=1), "not the (first) highest logit's class"),
        ("id", repeated, "stands in an earlier row too; give each image its own"),
    ]
    for column, wrong, problem in checks:
        if wrong.any():
            raise MetricsError(f"{where}row {wrong.argmax() + 2}, column {column}: {problem}")


def predictions_text(predictions: Predictions) -> str:
    """Return the text of predictions.csv, from which `read_predictions` makes the same bits."""
    *integers, logits = predictions
    dtypes = [array.dtype for array in predictions]
    shape_ok = logits.ndim == 2 and len(logits) > 0 and logits.shape[1] > 1
    if dtypes != [np.int64] * 3 + [np.float32] or not shape_ok:
        raise MetricsError("predictions: give ids, labels, predicted as int64, logits as float32")
    _check_predictions(predictions)
    header = _predictions_header(logits.shape[1])
    line = ",".join(["%d"] * 3 + ["%.9g"] * logits.shape[1])  # 9 digits tell all float32 apart
    rows = zip(*(column.tolist() for column in (*integers, *logits.T)), strict=True)
    return "\n".join([",".join(header), *(line % row for row in rows), ""])


def read_predictions(path: PathLike) -> Predictions:
    """Read predictions.csv, `id,label,predicted,logit_0,...`, and check that all of it agrees."""
    lines = _read_text(path).split("\n")[:-1]
    columns = lines[0].split(",")
    num_classes = len(columns) - 3
    if num_classes < 2 or columns != _predictions_header(num_classes):
        raise MetricsError(f"{path}: row 1 is not id,label,predicted,logit_0,logit_1,...")
    if len(lines) == 1:
        raise MetricsError(f"{path}: no row below the header; write it again")
    _check_widths(path, [line.count(",") + 1 for line in lines])
    dtype = [("integers", np.int64, 3), ("logits", np.float32, num_classes)]
    try:
        table = np.loadtxt(lines[1:], dtype, delimiter=",", comments=None, ndmin=1)
    except ValueError as error:  # "could not convert string 'x' to float32 at row 0, column 4."
        message = re.sub(r"at row (\d+)", lambda row: f"at row {int(row[1]) + 2}", str(error))
        raise MetricsError(f"{path}: {message}") from None
    predictions = Predictions(*table["integers"].T.copy(), table["logits"].copy())
    _check_predictions(predictions, f"{path}: ")
    return predictions


def tables(predictions: Predictions, class_names: Sequence[str]) -> dict[str, Table]:
    """Return header and rows, by file name, of all CSV files that follow from predictions.

    They are confusion.csv, per_class.csv, roc/auc.csv and a roc/class_K.csv for each class, without
    rows where the curve is undefined. Cells are Python's str, int and float.
    """
    _, labels, predicted, logits = predictions
    num_classes = logits.shape[1]
    if len(class_names) != num_classes:
        raise MetricsError(f"{len(class_names)} class names, {num_classes} logits; give one each")
    matrix = confusion(labels, predicted, num_classes)
    classes = per_class(labels, predicted, num_classes)
    with warnings.catch_warnings():
        # A curve is undefined where a class has no image, of which `per_class` has warned.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        curves = roc_curves(labels, logits)
    aucs = class_aucs(labels, logits)
    names = [[k, str(name)] for k, name in enumerate(class_names)]
    columns = ["label", *(f"predicted_{k}" for k in range(num_classes))]
    rows = [[k, *counts] for k, counts in enumerate(matrix.tolist())]
    result: dict[str, Table] = {"confusion.csv": (columns, rows)}
    for file_name, fields, values in (
        ("per_class.csv", ClassMetrics._fields, classes),
        ("roc/auc.csv", ClassAuc._fields, aucs),
    ):
        rows = [[*name, *value] for name, value in zip(names, values, strict=True)]
        result[file_name] = ["class", "name", *fields], rows
    for k, curve in enumerate(curves):
        points = np.column_stack(curve[:3]).tolist()
        result[f"roc/class_{k}.csv"] = (["fpr", "tpr", "threshold"], points)
    return result


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, padded so that it reads well as plain text too.

    The first column is set left, the others right; cells are shown by ``str``.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (cells[0], rule, *cells[1:]):
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(padded)} |\n")
    return "".join(lines)


# ---- figures -------------------------------------------------------------------------------------
#
# Each is drawn from the files of a folder to STEM.png (150 dots an inch) and STEM.svg, the same
# bytes each time. The folder is a run's or the one with the poster's own results, where some files
# differ: `_read_classes` and `_read_roc` know both. `reference` is the poster's folder, to be drawn
# over a run. All raise ImportError where matplotlib is missing.

# Okabe & Ito, Color Universal Design, 2008: told apart by colour-blind readers and in grey print.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
_BLUE, _ORANGE, _GREY = _COLORS[0], _COLORS[1], "#999999"
_POSTER = {"color": "black", "linestyle": "--", "linewidth": 0.9, "label": "poster"}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.columnspacing": 1.5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and tested
    "svg.hashsalt": "metrics",  # the same ids in each drawing
    "text.parse_math": False,  # a class name may hold a dollar sign
}


@contextlib.contextmanager
def _figure(stem: PathLike, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib Figure (inches) that is written when the block ends without an error."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # no matplotlibrc of the user's changes the picture
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="compressed")
        yield figure
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, metadata=metadata)
            write(f"{os.fspath(stem)}.{kind}", picture.getvalue())


def _legend_above(figure: Any, axes: Any) -> None:
    """Set the legend of `axes` in one line above all panels, with an entry a label."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries))


def _columns(path: Path, *needed: str) -> dict[str, Any]:
    """Return the columns of a CSV file: lists of str where they are text, else float64 arrays."""
    header, rows = read_csv(path)
    missing = set(needed) - set(header)
    if missing:
        raise MetricsError(f"{path}: no column {', '.join(sorted(missing))}; write it again")
    if not rows and "threshold" not in header:  # an undefined curve alone has no row
        raise MetricsError(f"{path}: no row below the header; write it again")
    columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    for name in columns.keys() - {"name", "system", "note"}:
        try:
            columns[name] = np.array(columns[name], dtype=np.float64)
        except ValueError as error:
            raise MetricsError(f"{path}: column {name}: {error}; write it again") from None
    return columns


def _title(k: int, name: str, width: int) -> str:
    """Return '5: Podocytes' in lines of `width`, or '5' where the name says no more."""
    return "\n".join(textwrap.wrap(str(k) if name in ("", str(k)) else f"{k}: {name}", width))


def _read_classes(folder: PathLike, width: int) -> tuple[list[str], np.ndarray]:
    """Return each class's title in lines of `width`, and its ratio to 3 digits after the point."""
    table = _columns(Path(folder, "per_class.csv"), "name")
    ratios = table["ratio"] if "ratio" in table else table["support"] / table["support"].sum()
    return [_title(k, name, width) for k, name in enumerate(table["name"])], ratios.round(3)


def _read_roc(folder: PathLike) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    """Return (fpr, tpr) of each class and the columns of auc.csv."""
    path = Path(folder, "roc.csv")
    if path.exists():  # the poster's
        areas = _columns(path.with_name("auc.csv"), "auc")
        names = [f"tpr_{k}" for k in range(len(areas["auc"]))]
        points = _columns(path, "fpr", *names)
        return [(points["fpr"], points[name]) for name in names], areas
    areas = _columns(Path(folder, "roc", "auc.csv"), "auc", "auc_low", "auc_high")
    files = [Path(folder, "roc", f"class_{k}.csv") for k in range(len(areas["auc"]))]
    curves = [_columns(file, "fpr", "tpr") for file in files]
    return [(points["fpr"], points["tpr"]) for points in curves], areas


def draw_class_ratios(folder: PathLike, stem: PathLike) -> None:
    """Draw each class's share of the test images as a bar, from per_class.csv."""
    titles, ratios = _read_classes(folder, 45)
    with _figure(stem, 5.2, 0.8 + 0.28 * len(ratios)) as figure:
        axes = figure.subplots()
        axes.bar_label(axes.barh(titles, ratios, color=_BLUE, height=0.7), fmt="{:g}", padding=3)
        axes.invert_yaxis()  # class 0 on top, as in the tables
        axes.margins(x=0.12)
        axes.set(xlabel="class ratio (share of the test images)")


def draw_confusion(folder: PathLike, stem: PathLike) -> None:
    """Draw confusion.csv: counts, shaded by their share of the true class."""
    columns = _columns(Path(folder, "confusion.csv"), "label")
    del columns["label"]
    matrix = np.column_stack(list(columns.values()))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # scikit-learn's ConfusionMatrixDisplay goes through pyplot and can't shade by one matrix what
    # it labels by another.
    side = max(3.0, 0.45 * len(matrix))
    with _figure(stem, side + 1.4, side + 0.5) as figure:
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", size=8, color=color)
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, label="share of the true class", shrink=0.8).outline.set(lw=0)


def draw_roc(folder: PathLike, stem: PathLike, reference: PathLike | None = None) -> None:
    """Draw a panel a class: the ROC curve, its AUC with interval, the class ratio."""
    titles, ratios = _read_classes(folder, 23)
    curves, areas = _read_roc(folder)
    poster_curves, poster_areas = _read_roc(reference) if reference else ([], {})
    rows = -(-len(curves) // 4)
    columns = -(-len(curves) // rows)
    with _figure(stem, 0.4 + 1.75 * columns, 0.4 + 1.9 * rows + 0.3 * bool(reference)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for k, axes in enumerate(grid):
            if k >= len(curves):
                axes.remove()
                continue
            axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=0.8)
            axes.plot(*curves[k], color=_BLUE, label="this run")
            lines = [f"AUC {areas['auc'][k]:.3f}" if len(curves[k][0]) else "AUC undefined"]
            if "auc_low" in areas and np.isfinite(areas["auc_low"][k]):
                lines.append(f"({areas['auc_low'][k]:.3f} to {areas['auc_high'][k]:.3f})")
            if reference:
                axes.plot(*poster_curves[k], **_POSTER)
                lines.append(f"poster {poster_areas['auc'][k]:.3f}")
            lines.append(f"class ratio {ratios[k]:g}")
            axes.text(1, 0.01, "\n".join(lines), ha="right", va="bottom", size=7.5)
            axes.set_title(titles[k])
            axes.set(aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.tick_params(labelbottom=k + columns >= len(curves))
        figure.supxlabel("false positive rate", size=9)
        figure.supylabel("true positive rate", size=9)
        if reference:
            _legend_above(figure, grid[0])


def draw_history(folder: PathLike, stem: PathLike, reference: PathLike | None = None) -> None:
    """Draw history.csv: accuracy and loss over the epochs, and where the learning rate drops."""
    parts = {"train": ("training", _BLUE), "valid": ("validation", _ORANGE)}
    needed = [f"{part}_{quantity}" for part in parts for quantity in ("accuracy", "loss")]
    history = _columns(Path(folder, "history.csv"), "epoch", *needed)
    poster = _columns(Path(reference, "history.csv"), "epoch", *needed) if reference else None
    marker = "o" if len(history["epoch"]) <= 30 else ""  # more would hide the line
    rates = history.get("learning_rate", np.zeros_like(history["epoch"]))  # the poster's: unknown
    drops = history["epoch"][1:][np.diff(rates) < 0]
    with _figure(stem, 7.2, 2.7) as figure:
        panels = figure.subplots(1, 2)
        for axes, quantity in zip(panels, ("accuracy", "loss"), strict=True):
            for part, (label, color) in parts.items():
                values = history[f"{part}_{quantity}"]
                style = {"marker": marker, "markersize": 3, "color": color, "label": label}
                axes.plot(history["epoch"], values, **style)
            for part in parts if poster else ():
                axes.plot(poster["epoch"], poster[f"{part}_{quantity}"], **_POSTER)
            for drop in drops:
                axes.axvline(drop, color=_GREY, lw=0.6, zorder=0, label="learning rate drops")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="epoch", ylabel=quantity)
        _legend_above(figure, panels[0])


def draw_search(folder: PathLike, stem: PathLike) -> None:
    """Draw tuning.jsonl: the loss of each trial of the search against the epochs it had.

    The trial with the lowest loss after the most epochs is highlighted; crosses on the upper edge
    are trials that failed.
    """
    path = Path(folder, "tuning.jsonl")
    trials: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for number, line in enumerate(_read_text(path).split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            loss = math.nan if record["loss"] is None else float(record["loss"])
            point = float(record["resource"]), loss
            trials.setdefault((record["bracket"], record["trial"]), []).append(point)
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(f"{path}: row {number} is no trial ({error!r})") from None
    points = [point for trial in trials.values() for point in trial]
    resources = sorted({resource for resource, _ in points})
    finite = [point for point in points if np.isfinite(point[1])]
    failed = [resource for resource, loss in points if not np.isfinite(loss)]
    best = min(finite, key=lambda point: (-point[0], point[1]), default=None)
    losses = [loss for _, loss in finite]
    with _figure(stem, 7.2, 3.9) as figure:
        axes = figure.subplots()
        for trial in trials.values():
            look = {"color": _GREY, "linewidth": 0.8, "label": "trial"}
            if best in trial:
                look = {"color": _BLUE, "linewidth": 2, "label": "lowest loss", "zorder": 3}
            axes.plot(*zip(*sorted(trial), strict=True), marker="o", markersize=3, **look)
        if failed:
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(failed, np.ones(len(failed)), "kx", label=f"failed ({len(failed)})", **edge)
        axes.set_xscale("log")
        axes.set_xticks(resources, [f"{resource:g}" for resource in resources])
        axes.set_xticks([], minor=True)
        if losses and 0 < 20 * min(losses) < max(losses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="epochs", ylabel="validation loss")
        _legend_above(figure, axes)


def draw_growth(folder: PathLike, stem: PathLike) -> None:
    """Draw compare.csv: times and model size against the training images, a line a system."""
    from matplotlib.ticker import EngFormatter

    quantities = {
        "train_seconds": "training (s)",
        "predict_seconds_per_1000": "prediction of 1,000 images (s)",
        "model_mb": "model (MB)",
    }
    table = _columns(Path(folder, "compare.csv"), "system", "training_images", *quantities)
    systems, images = np.array(table["system"]), table["training_images"]
    with _figure(stem, 7.2, 2.7) as figure:
        panels = figure.subplots(1, 3)
        for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
            axes.set_prop_cycle(color=_COLORS, marker=tuple("os^Dv"))
            for system in dict.fromkeys(table["system"]):
                rows = np.flatnonzero(systems == system)
                rows = rows[np.argsort(images[rows])]
                axes.plot(images[rows], table[quantity][rows], markersize=4, label=system)
            axes.set(xscale="log", yscale="log", xlabel="training images", ylabel=label)
            for axis, formatter in ((axes.xaxis, EngFormatter(sep="")), (axes.yaxis, "{x:,.10g}")):
                if np.ptp(np.log10(axis.get_view_interval())) < 2:
                    axis.get_major_locator().set_params(subs=(1, 2, 5))
                axis.set_major_formatter(formatter)
                axis.set_minor_formatter("")
        _legend_above(figure, panels[0])


def draw_samples(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    stem: PathLike,
    per_class: int = 8,
) -> None:
    """Draw the first `per_class` images of each class, a row a class.

    Images are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8: grey or RGB.
    """
    high, wide = images.shape[1:3]
    gap = max(1, wide // 14)
    shape = len(class_names) * (high + gap) - gap, per_class * (wide + gap) - gap
    sheet = np.full(shape + images.shape[3:], 255, dtype=np.uint8)
    for k in range(len(class_names)):
        for place, index in enumerate(np.flatnonzero(labels == k)[:per_class]):
            top, left = k * (high + gap), place * (wide + gap)
            sheet[top : top + high, left : left + wide] = images[index]
    titles = [_title(k, name, 26) for k, name in enumerate(class_names)]
    with _figure(stem, 2 + 0.6 * per_class, 0.2 + 0.6 * len(titles) * high / wide) as figure:
        axes = figure.subplots()
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        axes.set_yticks((high - 1) / 2 + (high + gap) * np.arange(len(titles)), titles)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)


# ---- command line --------------------------------------------------------------------------------


def _report(predictions: Predictions) -> str:
    """Return what the command line prints."""
    num_classes = predictions.logits.shape[1]
    matrix = confusion(predictions.labels, predictions.predicted, num_classes)
    intervals = bootstrap_intervals(matrix)
    figures = [
        (METRIC_NAMES[key], f"{value:.4f}", "{:.4f} to {:.4f}".format(*intervals[key]))
        for key, value in summary_from_confusion(matrix).items()
    ]
    files = tables(predictions, [""] * num_classes)
    classes = []
    for row, area in zip(files["per_class.csv"][1], files["roc/auc.csv"][1], strict=True):
        k, _, precision, recall, f1, support = row
        values = [f"{value:.4f}" for value in (precision, recall, f1, area[2])]
        classes.append((k, support, *values, f"{area[3]:.4f} to {area[4]:.4f}"))
    header = ("class", "support", "precision", "recall", "F1", "AUC", "95 % interval of AUC")
    return (
        f"{len(predictions.ids):,} images, {num_classes} classes\n\n"
        f"{markdown_table(('metric', 'value', '95 % interval'), figures)}\n"
        f"{markdown_table(header, classes)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a predictions file; return 0, 2 for an error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="metrics.py", description="Print the table of a predictions.csv file."
    )
    # One line, without the usage.
    parser.error = lambda message: parser.exit(2, f"metrics.py: error: {message}\n")
    parser.add_argument("predictions", help="columns id, label, predicted, logit_0, logit_1, ...")
    path = parser.parse_args(argv).predictions
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            text = _report(read_predictions(path))
        print(text, end="", flush=True)
        for warning in caught:
            print(f"metrics.py: warning: {warning.message}", file=sys.stderr)
    except BrokenPipeError:  # the reader has seen enough, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except (MetricsError, OSError) as error:
        print(f"metrics.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
