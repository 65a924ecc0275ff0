"""The numbers of a classification test, and the files that carry them.

Accuracy and macro F1, recall and precision with bootstrap intervals; precision, recall and F1 of
each class; the confusion matrix; one ROC curve a class with DeLong's interval for its AUC; all of
them as CSV files and as figures. For 50,000 images and 8 classes the numbers and their files take
0.6 s on one core (reading predictions.csv back 0.2 s, figures aside).

``python metrics.py predictions.csv`` prints the table of a predictions file.

Needs numpy and scikit-learn, and matplotlib only for the figures.

All functions raise `MetricsError` for bad input: an array of another shape, type or range than the
docstring gives, arrays that do not belong together, a file that is damaged or not of its kind; and
OSError where a file can't be read or written. Where a docstring speaks of a warning, it is
scikit-learn's UndefinedMetricWarning.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
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
    roc_auc_score,
    roc_curve,
)

PathLike = str | os.PathLike[str]


class MetricsError(ValueError):
    """Input that can't be measured or read; the message is one line and says what to do."""


# Checks


def _class_indices(name: str, values: ArrayLike, num_classes: int) -> np.ndarray:
    """Return `values` as a (N,) int64 array, having checked that all are 0..num_classes-1."""
    if num_classes < 2:
        raise MetricsError(f"num_classes is {num_classes}; give at least 2 classes")
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise MetricsError(
            f"{name} has the shape {array.shape}; give one class index an image, shape (N,), N > 0"
        )
    if array.dtype.kind not in "iu":
        raise MetricsError(f"{name} has the type {array.dtype}; give integer class indices")
    wrong = np.flatnonzero((array < 0) | (array >= num_classes))
    if wrong.size:
        raise MetricsError(
            f"{name}[{wrong[0]}] is {array[wrong[0]]}; give class indices 0 to {num_classes - 1}"
        )
    return array.astype(np.int64)


def _same_length(first: str, n: int, second: str, m: int) -> None:
    if n != m:
        raise MetricsError(f"{n} {first} but {m} {second}; give one of each an image")


def _logits(values: ArrayLike) -> np.ndarray:
    """Return `values` as a (N, K) float array, having checked that all are finite."""
    array = np.asarray(values)
    if array.ndim != 2 or not len(array) or array.shape[1] < 2 or array.dtype.kind not in "fiu":
        raise MetricsError(
            f"the scores have the shape {array.shape} and type {array.dtype}; "
            "give numbers of shape (N, K), N > 0 images by K > 1 classes"
        )
    wrong = np.argwhere(~np.isfinite(array))
    if wrong.size:
        row, column = wrong[0]
        raise MetricsError(
            f"the score of image {row} for class {column} is {array[row, column]}; "
            "give finite numbers (did training diverge?)"
        )
    return array


def _confusion_matrix(matrix: ArrayLike) -> np.ndarray:
    """Return `matrix` as a (K, K) int64 array, having checked that it counts something."""
    array = np.asarray(matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 2:
        raise MetricsError(
            f"the confusion matrix has the shape {array.shape}; give (K, K) with K > 1 classes"
        )
    if array.dtype.kind not in "iu" or array.min() < 0 or array.sum() == 0:
        raise MetricsError(
            "the confusion matrix holds something else than counts of images; "
            "give integers of at least 0, not all of them 0"
        )
    return array.astype(np.int64)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise MetricsError(f"the confidence level is {level}; give a number between 0 and 1")
    return (1 - level) / 2


def _warn_of(classes: Sequence[int], message: str) -> None:
    """Warn the caller's caller of these classes, if any: named at the {} of `message`."""
    if len(classes):
        named = ("class " if len(classes) == 1 else "classes ") + ", ".join(map(str, classes))
        warnings.warn(message.format(named), UndefinedMetricWarning, stacklevel=3)


# Numbers


# The figures of `summary`, in its order, and what readers call them.
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "recall": "macro recall",
    "precision": "macro precision",
}


class ClassMetrics(NamedTuple):
    """The metrics of one class, 0..1, NaN where undefined; `support` is its test images."""

    precision: float
    recall: float
    f1: float
    support: int


class RocCurve(NamedTuple):
    """One class against the rest: float64 arrays (M,) and the area under the curve, 0..1.

    `thresholds` falls from infinity, the point (0, 0), to the lowest score. All three arrays are
    empty and `auc` is NaN where the curve is undefined.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray
    auc: float


class ClassAuc(NamedTuple):
    """The AUC of one class from raw logits, its interval, and the AUC from softmax, all 0..1."""

    auc: float
    auc_low: float
    auc_high: float
    auc_softmax: float
    support: int


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> np.ndarray:
    """Count the images of each pair of true and predicted class.

    Parameters
    ----------
    labels, predicted : (N,) integers, N > 0
        True and predicted class indices, 0 to `num_classes` - 1.
    num_classes : int
        K, at least 2.

    Returns
    -------
    (K, K) int64
        Rows are true classes, columns predicted ones.
    """
    labels = _class_indices("labels", labels, num_classes)
    predicted = _class_indices("predicted", predicted, num_classes)
    _same_length("labels", len(labels), "predicted classes", len(predicted))
    return confusion_matrix(labels, predicted, labels=range(num_classes)).astype(np.int64)


def summary(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> dict[str, float]:
    """Return accuracy and the macro averages of F1, recall and precision.

    The arguments are those of `confusion`. The macro average is over the classes that occur in
    `labels` or `predicted`, as in scikit-learn; a class never predicted has precision 0, one
    without test images recall 0 (``zero_division=0``). A class that occurs in neither is left out
    with a warning.

    Returns
    -------
    dict
        "accuracy", "f1", "recall", "precision": float, 0..1.
    """
    return summary_from_confusion(confusion(labels, predicted, num_classes))


def summary_from_confusion(matrix: ArrayLike) -> dict[str, float]:
    """Return what `summary` returns, from a confusion matrix as in `bootstrap_intervals`."""
    matrix = _confusion_matrix(matrix)
    missing = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1) == 0)
    _warn_of(missing, "{} neither in the test set nor predicted: left out of the averages")
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

    The arguments are those of `confusion`. Precision is NaN for a class that is never predicted,
    recall for one without test images, F1 where both are; there is a warning of each.
    """
    matrix = confusion(labels, predicted, num_classes)
    true, predicted = np.nonzero(matrix)
    precision, recall, f1, support = precision_recall_fscore_support(
        true,
        predicted,
        labels=range(num_classes),
        sample_weight=matrix[true, predicted],
        zero_division=np.nan,
    )
    uncalled, absent = np.flatnonzero(np.isnan(precision)), np.flatnonzero(np.isnan(recall))
    _warn_of(uncalled, "precision is undefined for {}: never predicted")
    _warn_of(absent, "recall is undefined for {}: not in the test set")
    return [
        ClassMetrics(float(p), float(r), float(f), int(n))
        for p, r, f, n in zip(precision, recall, f1, support, strict=True)
    ]


def softmax(logits: ArrayLike) -> np.ndarray:
    """Return the softmax of each row of (N, K) finite logits as float64, without overflow."""
    shifted = _logits(logits).astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def roc_curves(labels: ArrayLike, scores: ArrayLike) -> list[RocCurve]:
    """Return the ROC curve of each class against the rest.

    Parameters
    ----------
    labels : (N,) integers, N > 0
        True class indices, 0 to K - 1.
    scores : (N, K) floats, K > 1
        The finite score of each class: raw logits, as the poster's authors did, or `softmax` of
        them. The two give different curves, because softmax compares a logit with the others.

    Returns
    -------
    list of RocCurve
        One for each class; points that no line needs are left out (``drop_intermediate``). Where a
        class has no test image, or all of them, the curve is empty and there is a warning.
    """
    scores = _logits(scores).astype(np.float64)
    labels = _class_indices("labels", labels, scores.shape[1])
    _same_length("labels", len(labels), "rows of scores", len(scores))
    curves = []
    for index in range(scores.shape[1]):
        positive = labels == index
        if positive.all() or not positive.any():
            curves.append(RocCurve(np.empty(0), np.empty(0), np.empty(0), math.nan))
        else:
            fpr, tpr, thresholds = roc_curve(positive, scores[:, index])
            curves.append(RocCurve(fpr, tpr, thresholds, float(auc(fpr, tpr))))
    undefined = [index for index, curve in enumerate(curves) if not len(curve.fpr)]
    _warn_of(undefined, "the ROC curve is undefined for {}: none or all of the test images")
    return curves


# Intervals


def bootstrap_intervals(
    matrix: ArrayLike, replicates: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals, over test images, of the figures of `summary`.

    The four figures depend on the confusion matrix alone, and drawing N of N images with
    replacement makes its cells multinomial; so a replicate is one multinomial draw. In each, the
    macro averages are over the classes that occur in it, as in `summary`. The intervals tell how
    far another test set would move the figures, not another training run.

    Parameters
    ----------
    matrix : (K, K) integers
        The confusion matrix, K > 1: counts of images, not all of them 0.
    replicates : int
        At least 1.
    seed : int
        Of ``numpy.random.default_rng``; the same seed gives the same intervals.
    level : float
        Confidence, between 0 and 1.

    Returns
    -------
    dict
        (low, high), 0..1, for each name that `summary` gives.

    References
    ----------
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    matrix = _confusion_matrix(matrix)
    tail = _tail(level)
    if replicates < 1:
        raise MetricsError(f"{replicates} replicates; give at least 1")
    generator = np.random.default_rng(seed)
    true, predicted = np.nonzero(matrix)
    of_true, of_predicted = np.eye(len(matrix))[true], np.eye(len(matrix))[predicted]
    share = matrix[true, predicted] / matrix.sum()
    step = max(1, 2**22 // len(share))  # at most 32 MiB of counts at a time
    figures = []
    for start in range(0, replicates, step):
        counts = generator.multinomial(matrix.sum(), share, size=min(step, replicates - start))
        counts = counts.astype(np.float64)  # whole numbers still, and a matrix product that is fast
        support, calls = counts @ of_true, counts @ of_predicted  # (B, K)
        hits = counts @ (of_true * of_predicted)
        present = (support + calls > 0).sum(axis=1)
        accuracy = hits.sum(axis=1) / matrix.sum()
        ratios = ((2 * hits, support + calls), (hits, support), (hits, calls))
        # A ratio's first is 0 wherever its second is; so this is zero_division=0.
        macro = [(part / np.maximum(whole, 1)).sum(axis=1) / present for part, whole in ratios]
        figures.append(np.column_stack([accuracy, *macro]))
    intervals = np.quantile(np.concatenate(figures), [tail, 1 - tail], axis=0).T
    return dict(zip(METRIC_NAMES, map(tuple, intervals.tolist()), strict=True))


def delong_interval(
    positive: ArrayLike, scores: ArrayLike, level: float = 0.95
) -> tuple[float, float, float]:
    """Return an AUC with its interval by DeLong's variance, in O(n log n).

    Parameters
    ----------
    positive : (N,) bool
        Whether the image is of the class.
    scores : (N,) floats
        The finite score of the class; only their order matters.
    level : float
        Confidence, between 0 and 1.

    Returns
    -------
    auc, low, high : float
        Normal interval, cut to 0..1. The AUC is NaN if none or all of the images are positive, the
        interval is NaN if fewer than two are positive or negative.

    References
    ----------
    DeLong, DeLong & Clarke-Pearson, Biometrics 44(3):837-845, 1988; Sun & Xu, IEEE Signal
    Processing Letters 21(11):1389-1393, 2014, for the O(n log n) by midranks.
    """
    positive, scores = np.asarray(positive), np.asarray(scores)
    tail = _tail(level)
    if positive.ndim != 1 or positive.dtype != bool or scores.shape != positive.shape:
        raise MetricsError(
            f"positive has the type {positive.dtype} and shape {positive.shape}, scores have the "
            f"shape {scores.shape}; give booleans and numbers, both of shape (N,)"
        )
    if scores.dtype.kind not in "fiu" or not np.isfinite(scores).all():
        raise MetricsError("the scores are not all finite numbers; give finite ones")
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
    reach = NormalDist().inv_cdf(1 - tail) * float(np.sqrt(variance))
    return area, max(0.0, area - reach), min(1.0, area + reach)


def class_aucs(
    labels: ArrayLike, logits: ArrayLike, curves: Sequence[RocCurve], level: float = 0.95
) -> list[ClassAuc]:
    """Return the rows of the AUC table.

    Parameters
    ----------
    labels : (N,) integers
        True class indices, 0 to K - 1.
    logits : (N, K) floats
        Raw logits.
    curves : sequence of K RocCurve
        What `roc_curves` made of the same labels and logits.
    level : float
        Confidence of DeLong's intervals, between 0 and 1.

    Returns
    -------
    list of ClassAuc
        One for each class; NaN where undefined, of which `roc_curves` has warned.
    """
    logits = _logits(logits)
    labels = _class_indices("labels", labels, logits.shape[1])
    _same_length("labels", len(labels), "rows of logits", len(logits))
    if len(curves) != logits.shape[1]:
        raise MetricsError(f"{len(curves)} curves for {logits.shape[1]} classes; give one a class")
    probabilities = softmax(logits)
    rows = []
    for index, curve in enumerate(curves):
        positive = labels == index
        _, low, high = delong_interval(positive, logits[:, index], level)
        defined = len(curve.fpr) > 0
        of_softmax = roc_auc_score(positive, probabilities[:, index]) if defined else math.nan
        rows.append(ClassAuc(curve.auc, low, high, float(of_softmax), int(positive.sum())))
    return rows


# Files


class Predictions(NamedTuple):
    """What predictions.csv holds: ids, labels, predicted (N,) int64; logits (N, K) float32."""

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray


PER_CLASS_HEADER = ("class", "name", *ClassMetrics._fields)
AUC_HEADER = ("class", "name", *ClassAuc._fields)
ROC_HEADER = ("fpr", "tpr", "threshold")

_INTEGER = r"-?[0-9]{1,18}"  # at most 18 digits always fit an int64
_DECIMAL = r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_NUMBER = _DECIMAL + "|-?inf|nan"
_TEXT = r"(?s:.*)"
_KINDS = {_INTEGER: "an integer", _DECIMAL: "a finite number", _NUMBER: "a number"}


def write_atomically(path: PathLike, content: str | bytes) -> None:
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
    content = Path(path).read_bytes()
    if not content:
        raise MetricsError(f"{path}: the file is empty; write it again")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetricsError(f"{path}: byte {error.start} is not UTF-8; write it again") from None
    if not text.endswith("\n"):
        raise MetricsError(f"{path}: the last line is cut short; write the file again")
    return text


def write_csv(path: PathLike, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    r"""Write a CSV file: UTF-8, "\n", floats in full precision, NaN as "nan".

    The file appears complete or not at all.

    Parameters
    ----------
    path : path
        Replaced if it is there; its folder must be.
    header : sequence of str
        Column names.
    rows : iterable of sequences
        Strings, integers and floats (Python's or numpy's), as many a row as there are columns.
    """
    rows = list(rows)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise MetricsError(
                f"{path}: row {number} has {len(row)} cells for {len(header)} columns; "
                "give one a column"
            )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)  # str() of a float is its shortest text that reads back exactly
    write_atomically(path, text.getvalue())


def read_csv(path: PathLike, header: Sequence[str]) -> list[list[str]]:
    """Return the cells of a CSV file, a list a row, below a header that must be exactly `header`.

    Each row must have one cell a column. Errors count rows as editors do, from 1, the header.
    """
    try:
        rows = list(csv.reader(io.StringIO(_read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise MetricsError(f"{path}: not a CSV file ({error}); write it again") from None
    if rows[0] != list(header):
        raise MetricsError(
            f"{path}: row 1 is {_shown(','.join(rows[0]))}; the header must be {','.join(header)}"
        )
    _check_cells(path, header, [_TEXT] * len(header), rows[1:])
    return rows[1:]


def _check_cells(
    path: PathLike, header: Sequence[str], patterns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Raise MetricsError naming the first cell that is not of its column's pattern."""
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise MetricsError(
                f"{path}: row {number} has {len(row)} cells for {len(header)} columns; "
                "write the file again"
            )
        for column, pattern, cell in zip(header, patterns, row, strict=True):
            if not re.fullmatch(pattern, cell):
                raise MetricsError(
                    f"{path}: row {number}, column {column}: {_shown(cell)} is not "
                    f"{_KINDS[pattern]}; write the file again"
                )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _prediction_header(num_classes: int) -> list[str]:
    return ["id", "label", "predicted", *(f"logit_{k}" for k in range(num_classes))]


def _check_predictions(path: PathLike, predictions: Predictions) -> None:
    """Raise MetricsError naming file, row and column unless all is in range and agrees."""
    ids, labels, predicted, logits = predictions
    num_classes = logits.shape[1]
    wrong = np.argwhere(~np.isfinite(logits))
    if wrong.size:
        row, column = wrong[0]
        raise MetricsError(
            f"{path}: row {row + 2}, column logit_{column}: not a finite float32; "
            "write finite logits"
        )
    highest = logits.argmax(axis=1)
    repeated = np.full(len(ids), True)
    repeated[np.unique(ids, return_index=True)[1]] = False
    no_class = f"is no class; with {num_classes} logits classes are 0 to {num_classes - 1}"
    no_maximum = "is not the class of the highest logit, {}; predict the first maximum"
    for column, values, wrong, problem in (
        ("label", labels, (labels < 0) | (labels >= num_classes), no_class),
        ("predicted", predicted, (predicted < 0) | (predicted >= num_classes), no_class),
        ("predicted", predicted, predicted != highest, no_maximum),
        ("id", ids, repeated, "stands in an earlier row too; give each image one"),
    ):
        if wrong.any():
            row = wrong.argmax()
            problem = f"{values[row]} {problem.format(highest[row])}"
            raise MetricsError(f"{path}: row {row + 2}, column {column}: {problem}")


def write_predictions(
    path: PathLike, ids: ArrayLike, labels: ArrayLike, predicted: ArrayLike, logits: ArrayLike
) -> None:
    """Write predictions.csv: `id,label,predicted,logit_0,...`, logits exact as float32.

    Parameters
    ----------
    path : path
        Replaced if it is there; its folder must be.
    ids : (N,) integers
        Which image each row is of; no two alike, between -1e18 and 1e18.
    labels, predicted : (N,) integers
        True and predicted class indices, 0 to K - 1; `predicted` is the first maximum of `logits`.
    logits : (N, K) floats
        Raw logits, finite as float32.
    """
    logits = _logits(logits)
    with np.errstate(over="ignore"):  # what overflows is refused below, by row and column
        logits = logits.astype(np.float32)
    columns = []
    for name, values in (("ids", ids), ("labels", labels), ("predicted", predicted)):
        array = np.asarray(values)
        if array.shape != logits.shape[:1] or array.dtype.kind not in "iu":
            raise MetricsError(
                f"{name} has the type {array.dtype} and shape {array.shape}; "
                f"give integers of shape ({len(logits)},), one a row of logits"
            )
        columns.append(array)
    if np.abs(columns[0].astype(np.float64)).max() >= 1e18:
        raise MetricsError("an id is 1e18 or beyond; number the images 0 to N - 1")
    _check_predictions(path, Predictions(*columns, logits))
    num_classes = logits.shape[1]
    line = ",".join(["%d"] * 3 + ["%.9g"] * num_classes)
    cells = zip(*(column.tolist() for column in (*columns, *logits.T)), strict=True)
    lines = [",".join(_prediction_header(num_classes)), *map(line.__mod__, cells), ""]
    write_atomically(path, "\n".join(lines))


def read_predictions(path: PathLike) -> Predictions:
    """Read and check what `write_predictions` wrote.

    Returns
    -------
    Predictions
        ids, labels, predicted (N,) int64; logits (N, K) float32, bit for bit what was written.

    Raises
    ------
    MetricsError
        If the file is damaged, or breaks what `write_predictions` asks of its arguments. Names
        file, row and column; the header is row 1.
    """
    header, *lines = _read_text(path).split("\n")[:-1]
    columns = header.split(",")
    num_classes = len(columns) - 3
    if num_classes < 2 or columns != _prediction_header(num_classes):
        raise MetricsError(
            f"{path}: row 1 is {_shown(header)}; the header must be id,label,predicted,logit_0,"
            "logit_1,... with a logit for each of at least 2 classes"
        )
    if not lines:
        raise MetricsError(f"{path}: no row below the header; write the file again")
    patterns = [_INTEGER] * 3 + [_DECIMAL] * num_classes
    if not all(map(re.compile(",".join(patterns)).fullmatch, lines)):  # by cell it takes longer
        _check_cells(path, columns, patterns, (line.split(",") for line in lines))
    cells = list(zip(*(line.split(",") for line in lines), strict=True))  # by column
    integers = np.array([list(map(int, column)) for column in cells[:3]], dtype=np.int64)
    with np.errstate(over="ignore"):  # what overflows is refused below, by row and column
        logits = np.array([list(map(float, column)) for column in cells[3:]]).astype(np.float32)
    predictions = Predictions(*integers, np.ascontiguousarray(logits.T))
    _check_predictions(path, predictions)
    return predictions


def write_confusion(path: PathLike, matrix: ArrayLike) -> None:
    """Write a (K, K) confusion matrix: `label,predicted_0,...`, one row a true class."""
    matrix = _confusion_matrix(matrix)
    header = ["label", *(f"predicted_{k}" for k in range(len(matrix)))]
    write_csv(path, header, [[k, *row] for k, row in enumerate(matrix.tolist())])


def read_confusion(path: PathLike) -> np.ndarray:
    """Read what `write_confusion` wrote, as (K, K) int64."""
    num_classes = max(2, _read_text(path).split("\n", 1)[0].count(","))
    header = ["label", *(f"predicted_{k}" for k in range(num_classes))]
    rows = read_csv(path, header)
    _check_cells(path, header, [_INTEGER] * len(header), rows)
    cells = np.array([list(map(int, row)) for row in rows], dtype=np.int64).reshape(-1, len(header))
    if cells[:, 0].tolist() != list(range(num_classes)):
        raise MetricsError(
            f"{path}: the rows are not of the labels 0 to {num_classes - 1}; write the file again"
        )
    try:
        return _confusion_matrix(cells[:, 1:])
    except MetricsError as error:
        raise MetricsError(f"{path}: {error}") from None


def write_classes(
    path: PathLike, class_names: Sequence[str], rows: Sequence[ClassMetrics] | Sequence[ClassAuc]
) -> None:
    """Write what `per_class` or `class_aucs` returned, under PER_CLASS_HEADER or AUC_HEADER.

    There must be a name a class.
    """
    _same_length("class names", len(class_names), "classes", len(rows))
    named = zip(class_names, rows, strict=True)
    cells = [(k, name, *row) for k, (name, row) in enumerate(named)]
    write_csv(path, ("class", "name", *rows[0]._fields), cells)


def write_roc(path: PathLike, curve: RocCurve) -> None:
    """Write the points of a ROC curve: `fpr,tpr,threshold`; the first threshold is "inf"."""
    columns = (curve.fpr, curve.tpr, curve.thresholds)
    write_csv(path, ROC_HEADER, zip(*(column.tolist() for column in columns), strict=True))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, padded so that it reads well as plain text too.

    The first column is set left, the others right; cells are shown by ``str``.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |\n"
        for row in (cells[0], rule, *cells[1:])
    )


# Figures
#
# Each is drawn from files alone and written as STEM.png (150 dots an inch) and STEM.svg, the same
# bytes each time. All raise ImportError where matplotlib is missing.

HISTORY_HEADER = (
    *("epoch", "learning_rate", "train_loss", "valid_loss"),
    *("train_accuracy", "valid_accuracy", "seconds"),
)
SCALING_HEADER = (
    *("system", "images", "train_seconds"),
    *("predict_seconds_per_1000", "peak_memory_mb"),
)

# Okabe & Ito, Color Universal Design, 2008: told apart by colour-blind readers and in grey print.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _GREY = "#CC79A7", "#56B4E9", "#999999"
_LINES = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in (
        *((_BLUE, "-", "o"), (_ORANGE, "--", "s"), (_GREEN, "-.", "^"), (_RED, ":", "D")),
        *((_PURPLE, "-", "v"), (_SKY, "--", "P")),
    )
]
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
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
            write_atomically(f"{os.fspath(stem)}.{kind}", picture.getvalue())


def _legend_above(figure: Any, axes: Any, columns: int) -> None:
    """Set the legend of `axes` above all panels, with an entry a label."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)


def _columns(
    path: PathLike, header: Sequence[str], text: str = "", least: int = 1
) -> dict[str, Any]:
    """Return the columns of a CSV file of `least` rows or more: float64 arrays, but str `text`."""
    rows = read_csv(path, header)
    if len(rows) < least:
        raise MetricsError(f"{path}: no row below the header; write the file again")
    patterns = [_TEXT if name == text else _NUMBER for name in header]
    _check_cells(path, header, patterns, rows)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return {
        name: cells if name == text else np.array(list(map(float, cells)))
        for name, cells in columns.items()
    }


def _names_and_support(per_class_csv: PathLike) -> tuple[list[str], np.ndarray]:
    table = _columns(per_class_csv, PER_CLASS_HEADER, text="name")
    support = table["support"]
    if not (support >= 0).all() or not 0 < support.sum() < np.inf:
        raise MetricsError(f"{per_class_csv}: the support counts no images; write the file again")
    return table["name"], support


def _class_title(index: int, name: str, width: int) -> str:
    """Return '3: Podocytes' in lines of `width`, or '3' where the name says no more."""
    title = str(index) if name in ("", str(index)) else f"{index}: {name}"
    return "\n".join(textwrap.wrap(title, width))


def draw_class_ratios(per_class_csv: PathLike, stem: PathLike) -> None:
    """Draw each class's share of the test images as a bar, from the file of `per_class`."""
    names, support = _names_and_support(per_class_csv)
    with _figure(stem, 5.5, 0.9 + 0.3 * len(support)) as figure:
        axes = figure.subplots()
        bars = axes.barh(range(len(support)), support / support.sum(), color=_BLUE, height=0.7)
        axes.bar_label(bars, fmt="{:.3f}", padding=3)
        titles = [_class_title(k, name, 45) for k, name in enumerate(names)]
        axes.set_yticks(range(len(titles)), titles)
        axes.invert_yaxis()  # class 0 on top, as in the tables
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set(xlabel=f"class ratio (of {support.sum():,.0f} test images)", ylabel="class")


def draw_confusion(confusion_csv: PathLike, stem: PathLike) -> None:
    """Draw the confusion matrix: counts, shaded by their share of the true class."""
    matrix = read_confusion(confusion_csv)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    num_classes = len(matrix)
    # scikit-learn's ConfusionMatrixDisplay goes through pyplot and can't shade by one matrix what
    # it labels by another.
    side = max(3.0, 0.5 * num_classes)
    with _figure(stem, side + 1.4, side + 0.5) as figure:
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(matrix.shape):
            color = "white" if share[row, column] > 0.5 else "black"
            count = str(matrix[row, column])
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
        axes.set(xticks=range(num_classes), yticks=range(num_classes))
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, label="share of the true class", shrink=0.8)
        bar.outline.set_visible(False)


def draw_roc(
    roc_folder: PathLike,
    auc_csv: PathLike,
    per_class_csv: PathLike,
    stem: PathLike,
    reference_auc: Sequence[float] | None = None,
    reference_name: str = "reference",
) -> None:
    """Draw a panel a class: the ROC curve, its AUC with interval, and the class ratio.

    Parameters
    ----------
    roc_folder : path
        Holds class_0.csv, class_1.csv, ... as `write_roc` writes them.
    auc_csv, per_class_csv : path
        What `write_classes` made of `class_aucs` and of `per_class`.
    stem : path
        The figure's, without ".png" and ".svg".
    reference_auc : sequence of K floats, optional
        AUCs to stand beside these, such as the poster's; NaN for none.
    reference_name : str, optional
        Whose they are.
    """
    areas = _columns(auc_csv, AUC_HEADER, text="name")
    names, support = _names_and_support(per_class_csv)
    num_classes = len(support)
    _same_length(f"classes in {auc_csv}", len(areas["auc"]), "elsewhere", num_classes)
    if reference_auc is None:
        reference_auc = [math.nan] * num_classes
    _same_length("reference AUCs", len(reference_auc), "classes", num_classes)
    curves = [
        _columns(Path(roc_folder) / f"class_{k}.csv", ROC_HEADER, least=0)
        for k in range(num_classes)
    ]
    rows = -(-num_classes // 4)
    columns = -(-num_classes // rows)
    with _figure(stem, 0.4 + 1.8 * columns, 0.4 + 1.95 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for unused in grid[num_classes:]:
            unused.remove()
        for k, axes in enumerate(grid[:num_classes]):
            axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=0.8)
            axes.plot(curves[k]["fpr"], curves[k]["tpr"], color=_BLUE, linewidth=1.3)
            low, high = areas["auc_low"][k], areas["auc_high"][k]
            lines = [
                f"AUC {areas['auc'][k]:.3f}" if len(curves[k]["fpr"]) else "AUC undefined",
                f"({low:.3f} to {high:.3f})" if np.isfinite(low) else "",
                f"{reference_name} {reference_auc[k]:.3f}" if np.isfinite(reference_auc[k]) else "",
                f"class ratio {support[k] / support.sum():.3f}",
            ]
            text = "\n".join(filter(None, lines))
            axes.text(1, 0.01, text, ha="right", va="bottom", fontsize=7.5, linespacing=1.15)
            axes.set_title(_class_title(k, names[k], 26))
            axes.set(aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.tick_params(labelbottom=k + columns >= num_classes)
        figure.supxlabel("false positive rate", fontsize=9)
        figure.supylabel("true positive rate", fontsize=9)


def draw_history(history_csv: PathLike, stem: PathLike) -> None:
    """Draw accuracy and loss over the epochs; thin lines mark where the learning rate drops."""
    history = _columns(history_csv, HISTORY_HEADER)
    epochs = history["epoch"]
    drops = epochs[1:][np.diff(history["learning_rate"]) < 0]
    parts = {"train": "training", "valid": "validation"}
    size = 3 if len(epochs) <= 30 else 0  # more markers would hide the line
    with _figure(stem, 7.2, 2.9) as figure:
        panels = figure.subplots(1, 2)
        for axes, quantity in zip(panels, ("accuracy", "loss"), strict=True):
            for (part, label), style in zip(parts.items(), _LINES, strict=False):
                values = history[f"{part}_{quantity}"]
                axes.plot(epochs, values, **style, markersize=size, label=label)
            label = "learning rate drops"
            for drop in drops:
                axes.axvline(drop, color=_GREY, linewidth=0.6, zorder=0, label=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="epoch", ylabel=quantity)
        _legend_above(figure, panels[0], columns=3)


def _read_trials(path: PathLike) -> dict[tuple, list[tuple[float, float]]]:
    """Return (resource, loss) of each rung of each (bracket, trial); a failed one's loss is NaN."""
    trials: dict[tuple, list[tuple[float, float]]] = {}
    for number, line in enumerate(_read_text(path).split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            loss = record["loss"]
            point = float(record["resource"]), math.nan if loss is None else float(loss)
            if not 0 < point[0] < math.inf:
                raise ValueError(f"resource {record['resource']}")
            trials.setdefault((record["bracket"], record["trial"]), []).append(point)
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(
                f"{path}: row {number} is no record of a trial ({error!r}); "
                "give JSON objects with bracket, trial, resource and loss"
            ) from None
    return trials


def draw_search(tuning_jsonl: PathLike, stem: PathLike) -> None:
    """Draw the loss of each trial of a search against its resource.

    Trials that reached the last rung of their bracket are highlighted, the one with the lowest loss
    there most; crosses on the upper edge are trials that failed.

    Parameters
    ----------
    tuning_jsonl : path
        A JSON object a line, with the keys bracket, trial, resource and loss (null if it failed).
    stem : path
        The figure's, without ".png" and ".svg".
    """
    trials = _read_trials(tuning_jsonl)
    points = [point for path in trials.values() for point in path]
    resources = sorted({resource for resource, _ in points})
    last: dict[object, float] = {}
    for (bracket, _), path in trials.items():
        last[bracket] = max(last.get(bracket, 0), *(resource for resource, _ in path))
    survivors = {
        (bracket, trial): loss
        for (bracket, trial), path in trials.items()
        for resource, loss in path
        if resource == last[bracket] and np.isfinite(loss)
    }
    best = min(survivors, key=survivors.get, default=None)
    losses = np.array([loss for _, loss in points if np.isfinite(loss)])
    failed = [resource for resource, loss in points if not np.isfinite(loss)]
    with _figure(stem, 7.2, 3.9) as figure:
        axes = figure.subplots()
        # The highlighted lines come last, so that they lie on top.
        for key in sorted(trials, key=lambda key: (key in survivors, key == best)):
            color, width, marker, label = _GREY, 0.8, ".", "stopped earlier"
            if key in survivors:
                color, width, marker, label = _BLUE, 1.5, "o", "in the last rung"
            if key == best:
                color, width, marker, label = _RED, 2.2, "s", "lowest loss there"
            style = {"color": color, "linewidth": width, "marker": marker, "markersize": 4}
            axes.plot(*zip(*sorted(trials[key]), strict=True), **style, label=label)
        if failed:
            cross = {"color": "black", "marker": "x", "linestyle": "", "clip_on": False}
            edge = axes.get_xaxis_transform()
            label = f"failed ({len(failed)})"
            axes.plot(failed, np.ones(len(failed)), transform=edge, **cross, label=label)
        axes.set_xscale("log")
        axes.set_xticks(resources, [f"{resource:g}" for resource in resources])
        axes.set_xticks([], minor=True)
        if losses.size and losses.min() > 0 and losses.max() > 20 * losses.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="resource (epochs)", ylabel="validation loss")
        _legend_above(figure, axes, columns=4)


def draw_scaling(scaling_csv: PathLike, stem: PathLike) -> None:
    """Draw time and memory against the number of images, a line a system, on log axes."""
    table = _columns(scaling_csv, SCALING_HEADER, text="system")
    systems = list(dict.fromkeys(table["system"]))
    quantities = {
        "train_seconds": "training (s)",
        "predict_seconds_per_1000": "prediction of 1,000 images (s)",
        "peak_memory_mb": "peak memory (MB)",
    }
    with _figure(stem, 7.2, 2.9) as figure:
        panels = figure.subplots(1, 3)
        for axes, (column, label) in zip(panels, quantities.items(), strict=True):
            for system, style in zip(systems, itertools.cycle(_LINES)):
                rows = np.flatnonzero(np.array(table["system"]) == system)
                rows = rows[np.argsort(table["images"][rows])]
                images, values = table["images"][rows], table[column][rows]
                axes.plot(images, values, **style, markersize=4, label=system)
            axes.set(xscale="log", yscale="log", xlabel="training images", ylabel=label)
            for axis in (axes.xaxis, axes.yaxis):
                if np.ptp(np.log10(axis.get_view_interval())) < 2:
                    axis.get_major_locator().set_params(subs=(1, 2, 5))
                axis.set_major_formatter("{x:,.10g}")
                axis.set_minor_formatter("")
        _legend_above(figure, panels[0], columns=min(5, len(systems)))


def draw_samples(
    images: np.ndarray,
    labels: ArrayLike,
    class_names: Sequence[str],
    stem: PathLike,
    per_class: int = 8,
) -> None:
    """Draw the first images of each class, a row a class.

    Parameters
    ----------
    images : (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8
        Grey or RGB.
    labels : (N,) integers
        Class indices.
    class_names : sequence of K str
        What stands beside the rows.
    stem : path
        The figure's, without ".png" and ".svg".
    per_class : int
        Images a row, at least 1.
    """
    labels = _class_indices("labels", labels, len(class_names))
    channels = images.shape[3:]
    if images.dtype != np.uint8 or images.ndim < 3 or channels not in ((), (1,), (3,)):
        raise MetricsError(
            f"the images have the type {images.dtype} and shape {images.shape}; "
            "give uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        )
    _same_length("labels", len(labels), "images", len(images))
    high, wide = images.shape[1:3]
    gap = max(1, wide // 14)
    shape = len(class_names) * (high + gap) - gap, per_class * (wide + gap) - gap
    sheet = np.full(shape + channels, 255, dtype=np.uint8)
    for k in range(len(class_names)):
        for place, index in enumerate(np.flatnonzero(labels == k)[:per_class]):
            top, left = k * (high + gap), place * (wide + gap)
            sheet[top : top + high, left : left + wide] = images[index]
    names = [_class_title(k, name, 26) for k, name in enumerate(class_names)]
    with _figure(stem, 2 + 0.6 * per_class, 0.2 + 0.6 * len(names) * high / wide) as figure:
        axes = figure.subplots()
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        axes.set_yticks((high - 1) / 2 + (high + gap) * np.arange(len(names)), names)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)


# Command line


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


def _report(predictions: Predictions) -> str:
    _, labels, predicted, logits = predictions
    num_classes = logits.shape[1]
    matrix = confusion(labels, predicted, num_classes)
    intervals = bootstrap_intervals(matrix)
    figures = [
        (METRIC_NAMES[name], f"{value:.4f}", "{:.4f} to {:.4f}".format(*intervals[name]))
        for name, value in summary_from_confusion(matrix).items()
    ]
    aucs = class_aucs(labels, logits, roc_curves(labels, logits))
    classes = [
        (
            *(k, metrics.support),
            *(f"{value:.4f}" for value in (*metrics[:3], area.auc)),
            f"{area.auc_low:.4f} to {area.auc_high:.4f}",
        )
        for k, (metrics, area) in enumerate(
            zip(per_class(labels, predicted, num_classes), aucs, strict=True)
        )
    ]
    header = ("class", "support", "precision", "recall", "F1", "AUC", "95 % interval of AUC")
    return (
        f"{len(labels):,} images, {num_classes} classes\n\n"
        + markdown_table(("metric", "value", "95 % interval"), figures)
        + "\n"
        + markdown_table(header, classes)
    )


if __name__ == "__main__":
    sys.exit(main())
