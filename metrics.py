"""The metrics of a classification test, the CSV files that hold them, checks and figures.

    python metrics.py predictions.csv        print the tables of a predictions file
    python metrics.py check FOLDER           check a run's test folder, or the poster's
    python metrics.py spread TABLE.csv ...   print mean, std, min and max over several runs as CSV,
                                             from their table.csv or their roc/auc.csv
    python metrics.py draw FOLDER [--reference POSTER_FOLDER]
                                             draw FOLDER/figures of a run, or of the poster

The metrics are accuracy and macro F1, recall and precision with bootstrap intervals; precision,
recall and F1 of each class; the confusion matrix; one ROC curve per class, and its AUC with
DeLong's interval. In code::

    predictions = read_predictions("predictions.csv")
    for name, (header, rows) in tables(predictions, class_names).items():
        write(name, csv_text(header, rows))

Needs numpy and scikit-learn (which brings scipy), and matplotlib only to draw.

What all functions share: N is the number of images, K > 1 the number of classes. Labels and
predicted classes are (N,) integers from 0 to K - 1; logits and scores are (N, K) finite numbers.
Metrics are floats from 0 to 1, NaN where undefined. Intervals are 95 % intervals. Wrong labels and
wrong files raise `MetricsError`, a file that cannot be read or written raises OSError, and other
arrays that do not fit raise the ValueError of NumPy or scikit-learn.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import sklearn.metrics
from numpy.typing import ArrayLike

# The keys of `summary`, in its order, and their names in tables.
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "recall": "macro recall",
    "precision": "macro precision",
}
REPLICATES = 10_000  # of the bootstrap


class MetricsError(ValueError):
    """Labels or a file cannot be used; the message is one line."""


# ---- metrics -------------------------------------------------------------------------------------


class ClassMetrics(NamedTuple):
    """The metrics of one class; `support` is the number of its test images."""

    precision: float
    recall: float
    f1: float
    support: int


class RocCurve(NamedTuple):
    """One class against the rest: float64 arrays (M,), and the area under the curve.

    `thresholds` falls from infinity, the point (0, 0), to the lowest score.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray
    auc: float


def _classes(values: ArrayLike, num_classes: int) -> np.ndarray:
    """Return class indices as an array; scikit-learn would ignore those that are too high."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or not np.isin(array, range(num_classes)).all():
        raise MetricsError(f"labels and predicted classes are integers from 0 to {num_classes - 1}")
    return array


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> np.ndarray:
    """Return the confusion matrix, (K, K) int64: rows are true classes, columns predicted ones."""
    labels, predicted = _classes(labels, num_classes), _classes(predicted, num_classes)
    return sklearn.metrics.confusion_matrix(labels, predicted, labels=range(num_classes))


def summary(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> dict[str, float]:
    """Return accuracy and the macro averages of F1, recall and precision, by METRIC_NAMES' keys.

    As in scikit-learn, the average is over the classes that occur in `labels` or `predicted`, and
    an undefined precision or recall counts as 0 (``zero_division=0``).
    """
    return summary_from_confusion(confusion(labels, predicted, num_classes))


def summary_from_confusion(matrix: ArrayLike) -> dict[str, float]:
    """Return what `summary` returns, from a (K, K) confusion matrix of counts."""
    true, predicted = np.nonzero(matrix)
    weight = np.asarray(matrix)[true, predicted]  # one sample per cell, weighted by its count
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        true, predicted, average="macro", sample_weight=weight, zero_division=0
    )
    accuracy = sklearn.metrics.accuracy_score(true, predicted, sample_weight=weight)
    return dict(zip(METRIC_NAMES, map(float, (accuracy, f1, recall, precision)), strict=True))


def per_class(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> list[ClassMetrics]:
    """Return precision, recall, F1 (NaN where undefined) and support of each of the K classes."""
    labels, predicted = _classes(labels, num_classes), _classes(predicted, num_classes)
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(num_classes), zero_division=np.nan
    )
    # scikit-learn returns the support as floats where no prediction is right.
    rows = zip(precision.tolist(), recall.tolist(), f1.tolist(), map(int, support), strict=True)
    return [ClassMetrics(*row) for row in rows]


def softmax(logits: ArrayLike) -> np.ndarray:
    """Return the softmax of each row of (N, K) logits as float64."""
    # The order in memory decides the order of summation, and so the last bit.
    return scipy.special.softmax(np.asarray(logits, dtype=np.float64, order="C"), axis=1)


def roc_curves(labels: ArrayLike, scores: ArrayLike) -> list[RocCurve]:
    """Return the ROC curve of each class against the rest.

    Scores are raw logits, as in the poster's curves, or their `softmax`, whose curves differ.
    Points on a straight line between their neighbours are left out (``drop_intermediate``). Where a
    class has no test image, `tpr` and `auc` are NaN; where it has all of them, `fpr` and `auc` are.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = _classes(labels, scores.shape[1])
    curves = []
    with warnings.catch_warnings(action="ignore"):  # of undefined curves, which NaN shows
        for k, column in enumerate(scores.T):
            fpr, tpr, thresholds = sklearn.metrics.roc_curve(labels == k, column)
            curves.append(RocCurve(fpr, tpr, thresholds, float(sklearn.metrics.auc(fpr, tpr))))
    return curves


def bootstrap_intervals(matrix: ArrayLike, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return (low, high) of each metric of `summary`: percentile bootstrap over test images.

    The metrics depend on the (K, K) confusion matrix alone, and drawing N of N images with
    replacement makes its cells multinomial. So each of 10,000 replicates is one multinomial draw by
    ``numpy.random.RandomState(seed)``, whose stream NumPy promises to keep. The intervals show how
    far another test set would move the metrics, not another training run. Source: Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    matrix = np.asarray(matrix)
    total = matrix.sum()
    draws = np.random.RandomState(seed).multinomial(total, matrix.ravel() / total, REPLICATES)
    draws = draws.reshape(-1, *matrix.shape)  # (B, K, K)
    hits = draws.diagonal(axis1=1, axis2=2)  # (B, K)
    support, called = draws.sum(axis=2), draws.sum(axis=1)
    present = (support + called > 0).sum(axis=1)  # (B,)
    values = [hits.sum(axis=1) / total]  # accuracy
    # F1, recall, precision. Hits are 0 wherever the denominator is: that is zero_division=0.
    for part, whole in ((2 * hits, support + called), (hits, support), (hits, called)):
        values.append((part / np.maximum(whole, 1)).sum(axis=1) / present)
    intervals = np.quantile(values, [0.025, 0.975], axis=1).T
    return dict(zip(METRIC_NAMES, map(tuple, intervals.tolist()), strict=True))


def delong_interval(positive: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return (low, high) of an AUC by DeLong's variance, in O(n log n).

    `positive`, (N,) bool, marks the images of the class; `scores` are (N,) numbers. The interval is
    normal, cut to 0..1, and NaN if fewer than two images are positive or negative. Sources: DeLong,
    DeLong & Clarke-Pearson, Biometrics 44(3):837-845, 1988; Sun & Xu, IEEE Signal Processing
    Letters 21(11):1389-1393, 2014, for the O(n log n).
    """
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores)
    cases, controls = np.sort(scores[positive]), np.sort(scores[~positive])
    if min(len(cases), len(controls)) < 2:
        return math.nan, math.nan
    components = []  # the share of the other group that lies below each score; a tie counts half
    for values, others in ((cases, controls), (controls, cases)):
        below = np.searchsorted(others, values) + np.searchsorted(others, values, side="right")
        components.append(below / (2 * len(others)))
    area = float(components[0].mean())
    variance = sum(component.var(ddof=1) / len(component) for component in components)
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return max(0.0, area - reach), min(1.0, area + reach)


# ---- files ---------------------------------------------------------------------------------------
# Errors name the file and the row, counted as editors do: the header is row 1.


def write(path: str | Path, content: str | bytes) -> None:
    r"""Write a file whole or not at all: as NAME.tmp, which is then moved into place.

    Text becomes UTF-8, with "\n" kept and lone surrogates escaped.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Return the text of a CSV file: lines end in "\n", floats have full precision."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])  # a float's str() is exact
    return text.getvalue()


def _read_text(path: str | Path) -> str:
    """Return the text of a CSV file, without a byte order mark."""
    content = Path(path).read_bytes()
    if not content.endswith(b"\n"):
        raise MetricsError(f"{path}: empty, or its last row is cut short; write it again")
    return content.decode("utf-8-sig", "backslashreplace")


def read_csv(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a CSV file; each row has as many cells as the header."""
    try:
        header, *rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    except csv.Error as error:
        raise MetricsError(f"{path}: not a CSV file ({error}); write it again") from None
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise MetricsError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")
    return header, rows


def read_column(path: str | Path, name: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """Return one column of a CSV file that has rows, each cell converted by `kind`."""
    header, rows = read_csv(path)
    if name not in header or not rows:
        raise MetricsError(f"{path}: no column {name}, or no row; write it again")
    try:
        return [kind(row[header.index(name)]) for row in rows]
    except ValueError as error:
        raise MetricsError(f"{path}: column {name}: {error}; write it again") from None


def read_confusion(folder: str | Path) -> np.ndarray:
    """Return the confusion matrix (K, K) int64 of a folder's confusion.csv."""
    path = Path(folder, "confusion.csv")
    header, _ = read_csv(path)
    return np.column_stack([read_column(path, name, int) for name in header[1:]])


class Predictions(NamedTuple):
    """The columns of predictions.csv.

    ids (N,) str, without commas, quotes and line breaks; labels (N,) int64; predicted (N,) int64,
    the class of the (first) highest logit; logits (N, K) float32.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray


def _predictions_header(num_classes: int) -> str:
    return ",".join(["id", "label", "predicted", *(f"logit_{k}" for k in range(num_classes))])


def predictions_text(predictions: Predictions) -> str:
    """Return the text of predictions.csv, from which `read_predictions` makes the same bits."""
    ids, labels, predicted, logits = predictions
    if not np.isfinite(logits).all():
        raise MetricsError("a logit is not finite: did training diverge?")
    num_classes = logits.shape[1]
    line = ",".join(["%s,%d,%d"] + ["%.9g"] * num_classes)  # float32 needs 9 digits
    columns = (column.tolist() for column in (ids, labels, predicted, *logits.T))
    lines = [line % row for row in zip(*columns, strict=True)]
    return "\n".join([_predictions_header(num_classes), *lines, ""])


def read_predictions(path: str | Path) -> Predictions:
    """Read predictions.csv, id,label,predicted,logit_0,..., and check that its columns agree."""
    header, *lines = _read_text(path).splitlines()
    num_classes = max(2, header.count(",") - 2)
    if header != _predictions_header(num_classes) or not lines or "" in lines:
        expected = "rows of id,label,predicted,logit_0,logit_1,... and no other columns"
        raise MetricsError(f"{path}: expected {expected}")
    for row, line in enumerate(lines, 2):
        if line.count(",") != header.count(","):
            raise MetricsError(f"{path}: row {row} has {line.count(',') + 1} cells")
    dtype = [("id", object), ("label", int), ("predicted", int), ("logits", "f4", num_classes)]
    try:
        table = np.loadtxt(lines, dtype, delimiter=",", comments=None, ndmin=1)
    except ValueError as error:  # names row and column, both counted from 0
        raise MetricsError(f"{path}: {error} (row 0 is below the header)") from None
    ids = np.array(table["id"].tolist())
    labels, predicted, logits = (table[name].copy() for name in ("label", "predicted", "logits"))
    for wrong, problem in (
        (~np.isfinite(logits).all(axis=1), "a logit is not finite"),
        (~np.isin(labels, range(num_classes)), f"the label is not 0 to {num_classes - 1}"),
        (predicted != logits.argmax(axis=1), "predicted is not the (first) highest logit's class"),
    ):
        if wrong.any():
            raise MetricsError(f"{path}: row {wrong.argmax() + 2}: {problem}")
    return Predictions(ids, labels, predicted, logits)


def tables(predictions: Predictions, class_names: Sequence[str]) -> dict[str, tuple[list, list]]:
    """Return (header, rows), by file name, of all CSV files that follow from predictions.

    The last row of roc/auc.csv is the mean over classes, which by softmax is the AUC of MedMNIST's
    evaluator. Cells are Python's str, int and float.
    """
    _, labels, predicted, logits = predictions
    num_images, num_classes = logits.shape
    if len(class_names) != num_classes:
        raise MetricsError(f"{len(class_names)} class names, {num_classes} logits; give one each")
    names = [[k, str(name)] for k, name in enumerate(class_names)]

    matrix = confusion(labels, predicted, num_classes)
    intervals = bootstrap_intervals(matrix)
    rows = []
    for key, value in summary_from_confusion(matrix).items():
        rows.append([METRIC_NAMES[key], value, *intervals[key]])
    files = {"table.csv": (["metric", "value", "low_95", "high_95"], rows)}

    header = ["label", *(f"predicted_{k}" for k in range(num_classes))]
    files["confusion.csv"] = header, [[k, *row] for k, row in enumerate(matrix.tolist())]

    classes = per_class(labels, predicted, num_classes)
    rows = [[*name, *metrics] for name, metrics in zip(names, classes, strict=True)]
    files["per_class.csv"] = ["class", "name", *ClassMetrics._fields], rows

    curves = roc_curves(labels, logits)
    softmax_areas = [curve.auc for curve in roc_curves(labels, softmax(logits))]
    rows = []
    for k, (fpr, tpr, thresholds, auc) in enumerate(curves):
        interval = delong_interval(labels == k, logits[:, k])
        rows.append([*names[k], auc, *interval, softmax_areas[k], classes[k].support])
        points = np.column_stack([fpr, tpr, thresholds]).tolist()
        files[f"roc/class_{k}.csv"] = ["fpr", "tpr", "threshold"], points
    mean = float(np.mean([curve.auc for curve in curves]))
    rows.append(["mean", "", mean, math.nan, math.nan, float(np.mean(softmax_areas)), num_images])
    header = ["class", "name", "auc", "auc_low", "auc_high", "auc_softmax", "support"]
    files["roc/auc.csv"] = header, rows
    return files


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, padded so that it reads well as plain text too.

    The first column is aligned left, the others right. Numbers with a decimal point are shown with
    four digits after it.
    """
    lines = []
    for row in (header, *rows):
        cells = []
        for cell in map(str, row):
            is_fraction = re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", cell)
            cells.append(f"{float(cell):.4f}" if is_fraction else cell.replace("|", "\\|"))
        lines.append(cells)
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    text = ""
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        text += f"| {' | '.join(cells)} |\n"
    return text


def csv_table(path: str | Path) -> str:
    """Return a CSV file as a Markdown table."""
    return markdown_table(*read_csv(path))


def spread(paths: Sequence[str | Path]) -> tuple[list[str], list[list[Any]]]:
    """Return (header, rows) of how metrics spread over several runs: one row per metric.

    `paths` are the runs' table.csv, or their roc/auc.csv. The columns are figure, runs, mean, std
    (``ddof=1``; NaN for one run), min, max, and one per path.
    """
    runs = [_read_metrics(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if run.keys() != runs[0].keys():
            raise MetricsError(f"{path}: its metrics are not those of {paths[0]}")
    rows = []
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        std = values.std(ddof=1) if len(runs) > 1 else math.nan
        statistics = [values.mean(), std, values.min(), values.max()]
        rows.append([name, len(runs), *map(float, statistics), *values.tolist()])
    return ["figure", "runs", "mean", "std", "min", "max", *map(str, paths)], rows


def _read_metrics(path: str | Path) -> dict[str, float]:
    """Return the metrics of a table.csv or roc/auc.csv by name."""
    header, _ = read_csv(path)
    if "metric" in header:
        names = read_column(path, "metric", str)
        return dict(zip(names, read_column(path, "value"), strict=True))
    metrics = {}
    classes = read_column(path, "class", str)
    for column in ("auc", "auc_softmax"):
        for k, area in zip(classes, read_column(path, column), strict=True):
            metrics[f"mean {column}" if k == "mean" else f"{column} of class {k}"] = area
    return metrics


# ---- checks --------------------------------------------------------------------------------------
# A check is a function that raises at the first problem, with the file's name. Its docstring begins
# with "Check that"; what follows is printed where there is no problem.


def compare_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Raise MetricsError at the first cell in which a CSV file differs from a table."""
    stored_header, stored_rows = read_csv(path)
    if stored_header != [*header]:
        columns = f"{','.join(stored_header)}, not {','.join(header)}"
        raise MetricsError(f"{path}: the columns are {columns}")
    pairs = itertools.zip_longest(stored_rows, rows, fillvalue=["no such row"] * len(header))
    for number, (stored_row, row) in enumerate(pairs, start=2):
        for column, stored, expected in zip(header, stored_row, map(str, row), strict=True):
            if not _equal(stored, expected):
                place = f"row {number}, column {column}"
                raise MetricsError(f"{path}: {place}: {stored}, recomputed {expected}")


def _equal(a: str, b: str) -> bool:
    """Return whether two cells are the same text, or numbers that agree to 12 digits."""
    try:
        return a == b or math.isclose(float(a), float(b), rel_tol=1e-12, abs_tol=1e-12)
    except ValueError:
        return False


def check_tables(folder: str | Path) -> None:
    """Check that the tables, curves and AUCs follow from predictions.csv."""
    predictions = read_predictions(Path(folder, "predictions.csv"))
    num_classes = predictions.logits.shape[1]
    path = Path(folder, "per_class.csv")
    names = read_column(path, "name", str)
    if len(names) != num_classes:
        raise MetricsError(f"{path}: {len(names)} classes, predictions.csv has {num_classes}")
    for name, (header, rows) in tables(predictions, names).items():
        compare_csv(Path(folder, name), header, rows)


def check_poster(folder: str | Path) -> None:
    """Check that the poster's table follows from its confusion matrix, its AUCs from its curves."""
    matrix = read_confusion(folder)
    if matrix.sum() != 50_000:
        raise MetricsError(f"{Path(folder, 'confusion.csv')}: {matrix.sum()} images, not 50000")
    # The poster cuts its metrics after four digits: precision 0.567883 became 0.5678.
    values = [math.floor(value * 1e4) / 1e4 for value in summary_from_confusion(matrix).values()]
    ratios = matrix.sum(axis=1) / matrix.sum()
    curves = Path(folder, "roc.csv")
    fpr = read_column(curves, "fpr")
    areas = [np.trapezoid(read_column(curves, f"tpr_{k}"), fpr) for k in range(len(matrix))]
    for name, column, expected, tolerance in (
        ("table.csv", "value", values, 0),
        ("per_class.csv", "ratio", ratios.round(2).tolist(), 0),
        ("auc.csv", "auc", np.round(areas, 4).tolist(), 1e-3),
    ):
        path = Path(folder, name)
        stored = read_column(path, column)
        if len(stored) != len(expected) or not np.allclose(stored, expected, 0, tolerance):
            raise MetricsError(f"{path}: column {column}: {stored}, recomputed {expected}")


def write_sums(folder: str | Path) -> None:
    """Write SHA256SUMS, which ``sha256sum -c`` reads, of all files in a folder and its folders.

    It does not list itself, ``*.tmp`` and hidden files.
    """
    lines = (f"{digest}  {name}\n" for name, digest in sorted(_digests(folder).items()))
    write(Path(folder, "SHA256SUMS"), "".join(lines).encode("utf-8", "surrogateescape"))


def check_sums(folder: str | Path) -> None:
    """Check that every file is as SHA256SUMS lists it."""
    path = Path(folder, "SHA256SUMS")
    digests = _digests(folder)
    lines = path.read_bytes().decode("utf-8", "surrogateescape").splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    for name in sorted(listed.keys() | digests.keys()):
        if name not in digests:
            raise MetricsError(f"{path}: lists {name!r}, which is missing")
        if name not in listed:
            raise MetricsError(f"{Path(folder, name)}: SHA256SUMS does not list it")
        if listed[name] != digests[name]:
            raise MetricsError(f"{Path(folder, name)}: changed since SHA256SUMS was written")


def _digests(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file that SHA256SUMS lists, by the file's name there."""
    digests = {}
    for path in Path(folder).rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.suffix != ".tmp" and str(name) != "SHA256SUMS":
            digests[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def describe(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}"
    return " ".join(str(error).split())


def passes(check: Callable, *arguments: Any, root: Path, errors=(MetricsError, OSError)) -> bool:
    """Run a check, print its outcome in one line, and return whether it raised none of `errors`.

    A problem's path is printed relative to `root`.
    """
    try:
        check(*arguments)
    except errors as error:
        print(f"WRONG    {describe(error).removeprefix(f'{root}{os.sep}')}", flush=True)
        return False
    print(f"ok       {claim(check)}", flush=True)
    return True


def claim(check: Callable[..., None]) -> str:
    """Return the first line of a check's docstring without "Check that"; under -OO its name."""
    line = (check.__doc__ or check.__name__).splitlines()[0]
    return line.removeprefix("Check that ").removesuffix(".")


def check(folder: str | Path) -> bool:
    """Check the test folder of a run, or the poster's folder; return whether no problem was found.

    MetricsError is raised where there is nothing to check.
    """
    root = Path(folder)
    folder = root / "test" if (root / "test").is_dir() else root
    if (folder / "predictions.csv").exists():
        check_metrics = check_tables
        left_out = "what is not in test/ alone: python reproduce.py --stage verify"
    elif (folder / "roc.csv").exists():
        check_metrics = check_poster
        left_out = "history.csv and class names; all against the poster itself"
    else:
        raise MetricsError(f"{folder} has neither predictions.csv nor the poster's roc.csv")
    passed = [passes(one, folder, root=root) for one in (check_metrics, check_sums)]
    print(f"left out {left_out}")
    print("nothing wrong in what was checked" if all(passed) else "something is WRONG", flush=True)
    return all(passed)


# ---- figures -------------------------------------------------------------------------------------
# Each function draws STEM.png and STEM.svg from files in `folder`, which is a stage's or the
# poster's; the same files give the same bytes. STEM's folder is made if it is missing. `reference`
# is the poster's folder: its curves are drawn over the run's. All raise ImportError where
# matplotlib is missing.

# Okabe & Ito, Color Universal Design, 2008: distinct for colour-blind readers and in grey print.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
_BLUE, _ORANGE, _GREY = _COLORS[0], _COLORS[1], "#999999"
_POSTER = {"color": "black", "linestyle": "--", "linewidth": 0.9, "label": "poster"}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and tested
    "svg.hashsalt": "metrics",  # the same ids in each drawing
}


@contextlib.contextmanager
def _figure(stem: str | Path, width: float, height: float, **grid: Any) -> Iterator[np.ndarray]:
    """Yield the axes, (panels,), of a figure whose size is in inches; then write its files.

    Where there are several labels, the figure gets a legend.
    """
    if "ipykernel" not in sys.modules:  # a notebook's backend may not be installed here
        os.environ.pop("MPLBACKEND", None)
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(_STYLE, after_reset=True):  # the user's matplotlibrc has no effect
        figure = Figure(figsize=(width, height), layout="compressed")
        panels = figure.subplots(squeeze=False, **grid).ravel()
        yield panels
        handles, labels = panels[0].get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True))
        if len(entries) > 1:
            place = {"loc": "outside upper center", "ncols": len(entries), "frameon": False}
            figure.legend(entries.values(), entries.keys(), **place)
        Path(stem).parent.mkdir(exist_ok=True)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=120, metadata=metadata)
            write(f"{stem}.{kind}", picture.getvalue())


def _titles(names: Iterable[str], width: int) -> list[str]:
    """Return '5: Podocytes' in lines of `width`, or '5' where the name is the number."""
    titles = [name if name == str(k) else f"{k}: {name}" for k, name in enumerate(names)]
    return [textwrap.fill(title, width).replace("$", r"\$") for title in titles]  # "$": no formula


def _read_classes(folder: str | Path, width: int) -> tuple[list[str], np.ndarray]:
    """Return each class's title in lines of `width`, and its share of the test images."""
    names = read_column(Path(folder, "per_class.csv"), "name", str)
    support = read_confusion(folder).sum(axis=1)
    return _titles(names, width), support / support.sum()


def _read_roc(folder: str | Path) -> list[tuple[list[float], list[float], str]]:
    """Return fpr, tpr and the text of the AUC, for each class."""
    curves = []
    path = Path(folder, "roc.csv")
    if path.exists():  # the poster's, which has no intervals
        for k, area in enumerate(read_column(Path(folder, "auc.csv"), "auc")):
            text = f"AUC {area:.3f}"
            curves.append((read_column(path, "fpr"), read_column(path, f"tpr_{k}"), text))
        return curves
    path = Path(folder, "roc", "auc.csv")
    areas, lows, highs = (read_column(path, name) for name in ("auc", "auc_low", "auc_high"))
    for k in range(len(areas) - 1):  # the last row is the mean over classes
        text = f"AUC {areas[k]:.3f}\n({lows[k]:.3f} to {highs[k]:.3f})"
        path = Path(folder, "roc", f"class_{k}.csv")
        curves.append((read_column(path, "fpr"), read_column(path, "tpr"), text))
    return curves


def draw_class_ratios(folder: str | Path, stem: str | Path) -> None:
    """Draw each class's share of the test images as a bar."""
    titles, ratios = _read_classes(folder, 45)
    with _figure(stem, 5.2, 0.8 + 0.28 * len(ratios)) as (axes,):
        axes.bar_label(axes.barh(titles, ratios, color=_BLUE), fmt="{:.2f}", padding=3)
        axes.invert_yaxis()  # class 0 on top, as in the tables
        axes.set(xlabel="class ratio (share of the test images)", xmargin=0.12)


def draw_confusion(folder: str | Path, stem: str | Path) -> None:
    """Draw the confusion matrix: counts, shaded by their share of the true class."""
    matrix = read_confusion(folder)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(3.0, 0.5 + 0.45 * len(matrix))
    with _figure(stem, side, side) as (axes,):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", size=8, color=color)
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.set(xlabel="predicted class (shade: share of the true class)", ylabel="true class")


def draw_roc(folder: str | Path, stem: str | Path, reference: str | Path | None = None) -> None:
    """Draw one panel per class: the ROC curve, its AUC with interval, the class ratio."""
    titles, ratios = _read_classes(folder, 23)
    curves = _read_roc(folder)
    poster = _read_roc(reference) if reference else curves
    if not len(titles) == len(ratios) == len(curves) == len(poster):
        raise MetricsError(f"{folder}: names, counts, curves and reference differ in their classes")
    columns = min(len(curves), 4)
    rows = math.ceil(len(curves) / columns)
    size = 0.4 + 1.75 * columns, 0.6 + 2.1 * rows
    with _figure(stem, *size, nrows=rows, ncols=columns, sharex=True, sharey=True) as panels:
        for axes in panels[len(curves) :]:
            axes.remove()
        for k, (fpr, tpr, text) in enumerate(curves):
            axes = panels[k]
            axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=0.8)
            axes.plot(fpr, tpr, color=_BLUE, label="this run")
            if reference:
                axes.plot(*poster[k][:2], **_POSTER)
                text += f"\nposter {poster[k][2]}"
            text += f"\nclass ratio {ratios[k]:.2f}"
            axes.text(1, 0.01, text, ha="right", va="bottom", size=7.5)
            axes.set(title=titles[k], aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.tick_params(labelbottom=k + columns >= len(curves))
        axes.figure.supxlabel("false positive rate", size=9)
        axes.figure.supylabel("true positive rate", size=9)


def draw_history(folder: str | Path, stem: str | Path, reference: str | Path | None = None) -> None:
    """Draw accuracy and loss over the epochs, and where the learning rate drops."""
    path = Path(folder, "history.csv")
    header, _ = read_csv(path)  # the poster's has no learning rates
    rates = read_column(path, "learning_rate") if "learning_rate" in header else []
    parts = (("train", "training", _BLUE), ("valid", "validation", _ORANGE))
    with _figure(stem, 7.2, 2.7, ncols=2) as panels:
        for axes, quantity in zip(panels, ("accuracy", "loss"), strict=True):
            for part, label, color in parts:
                name = f"{part}_{quantity}"
                if reference:
                    axes.plot(read_column(Path(reference, "history.csv"), name), **_POSTER)
                axes.plot(read_column(path, name), ".-", ms=4, mew=0, color=color, label=label)
            for epoch in np.flatnonzero(np.diff(rates) < 0) + 1:
                axes.axvline(epoch, color=_GREY, lw=0.6, zorder=0, label="learning rate drops")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="epoch", ylabel=quantity)


def draw_search(folder: str | Path, stem: str | Path) -> None:
    """Draw the loss of each trial of the search against its epochs.

    The trial with the lowest loss after the most epochs is highlighted.
    """
    path = Path(folder, "tuning.jsonl")
    trials = {}
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for record in records:
            if record["loss"] is not None:
                points = trials.setdefault((record["bracket"], record["trial"]), [])
                points.append((float(record["resource"]), float(record["loss"])))
        best = min(trials.values(), key=lambda points: (-points[-1][0], points[-1][1]))
    except (ValueError, TypeError, KeyError) as error:
        raise MetricsError(f"{path}: not a log of a search ({error!r})") from None
    with _figure(stem, 7.2, 3.9) as (axes,):
        for points in trials.values():
            axes.plot(*zip(*points, strict=True), "o-", color=_GREY, ms=3, lw=0.8, label="trial")
        axes.plot(*zip(*best, strict=True), "o-", color=_BLUE, ms=3, lw=2, label="lowest loss")
        resources, losses = zip(*itertools.chain(*trials.values()), strict=True)
        ticks = sorted({*resources})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        if max(losses) > 20 * min(losses):  # one that diverged would hide the others
            axes.set_yscale("log")
        failed = len(records) - len(losses)
        axes.set(xlabel=f"epochs (failed trials: {failed})", ylabel="validation loss")


def draw_growth(folder: str | Path, stem: str | Path) -> None:
    """Draw compare.csv: times and model size against the training images, one line per system."""
    path = Path(folder, "compare.csv")
    systems = np.array(read_column(path, "system", str))
    images = np.array(read_column(path, "training_images"))
    quantities = {
        "train_seconds": "training (s)",
        "predict_seconds_per_1000": "prediction of 1,000 images (s)",
        "model_mb": "model (MB)",
    }
    with _figure(stem, 7.2, 2.7, ncols=3) as panels:
        for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
            axes.set_prop_cycle(color=_COLORS, marker=tuple("os^Dv"))
            costs = np.array(read_column(path, quantity))
            for system in dict.fromkeys(systems.tolist()):
                rows = systems == system
                axes.plot(images[rows], costs[rows], markersize=4, label=system)
            axes.set(xscale="log", yscale="log", xlabel="training images", ylabel=label)


def draw_samples(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], stem: str | Path
) -> None:
    """Draw the first 8 images of each class, one row per class.

    Images are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8: grey or RGB.
    """
    _, height, width, *channels = images.shape
    rows, tall, wide = len(class_names), height + 2, width + 2  # with a gap to the next image
    sheet = np.full((rows * tall, 8 * wide, *channels), 255, dtype=np.uint8)
    for k in range(rows):
        for i, image in enumerate(images[np.flatnonzero(labels == k)[:8]]):
            sheet[k * tall :, i * wide :][:height, :width] = image
    with _figure(stem, 6.8, 0.2 + 0.6 * rows * height / width) as (axes,):
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        axes.set_yticks(height / 2 + tall * np.arange(rows), _titles(class_names, 26))
        axes.set(xticks=[], frame_on=False)


# What `draw` draws: the stage whose files it needs, the function, the caption.
FIGURES = {
    "roc": ("test", draw_roc, "ROC curves by raw logits"),
    "history": ("train", draw_history, "Accuracy and loss over the epochs"),
    "confusion": ("test", draw_confusion, "Confusion matrix"),
    "class_ratios": ("test", draw_class_ratios, "Class ratios"),
    "search": ("tune", draw_search, "Validation loss of each trial"),
    "growth": ("compare", draw_growth, "Time and size over training images"),
}


def draw(folder: str | Path, reference: str | Path | None = None) -> list[str]:
    """Draw the FIGURES of a run, or of the poster, into `folder`/figures; return their names.

    `folder` holds the folders of a run's stages, of which those that are there are drawn, or it is
    the poster's. MetricsError is raised where there is nothing to draw.
    """
    folder = Path(folder)
    sources = {path.name: path for path in folder.iterdir() if path.is_dir()}
    if (folder / "roc.csv").exists():  # the poster's, whose files lie in no stage's folder
        sources = {"test": folder, "train": folder}
    drawn = []
    for name, (stage, draw_figure, _) in FIGURES.items():
        if stage in sources:
            over = {"reference": reference} if name in ("roc", "history") else {}
            draw_figure(sources[stage], folder / "figures" / name, **over)
            drawn.append(name)
    if not drawn:
        raise MetricsError(f"{folder}: neither a run's folder nor the poster's")
    return drawn


# ---- command line --------------------------------------------------------------------------------


def _print_tables(path: str | Path) -> None:
    """Print the tables of a predictions file."""
    predictions = read_predictions(path)
    num_images, num_classes = predictions.logits.shape
    files = tables(predictions, [""] * num_classes)
    print(f"{num_images:,} images, {num_classes} classes, intervals of 95 %")
    for name in ("table.csv", "per_class.csv", "roc/auc.csv"):
        header, rows = files[name]
        kept = [column != "name" for column in header]  # the file has no names of classes
        lines = [[*itertools.compress(row, kept)] for row in (header, *rows)]
        print(f"\n{markdown_table(lines[0], lines[1:])}", end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0 done, 1 a check found a problem, 2 refused, 130 Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):  # stdout is closed, or a test's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        match words:
            case ["-h" | "--help"]:
                print(__doc__ or "metrics.py predictions.csv")
            case ["check", folder]:
                return 0 if check(folder) else 1
            case ["spread", *paths] if paths:
                print(csv_text(*spread(paths)), end="")
            case ["draw", folder] | ["draw", folder, "--reference", _]:
                names = draw(folder, *words[3:])
                print(f"PNG and SVG in {Path(folder, 'figures')}: {', '.join(names)}")
            case [path] if path not in ("check", "spread", "draw"):
                _print_tables(path)
            case _:
                raise MetricsError("expected one of the command lines that --help shows")
        print(end="", flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except (MetricsError, ImportError, OSError) as error:
        print(f"metrics.py: error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
