"""The numbers of a classification test, the text of the files that carry them, the figures.

Accuracy and macro F1, recall and precision with bootstrap intervals; precision, recall and F1 of
each class; the confusion matrix; a ROC curve a class, its AUC with DeLong's interval.

``python metrics.py predictions.csv`` prints the tables of a predictions file: 50,000 images in
8 classes take a second. In code::

    predictions = read_predictions("predictions.csv")
    for name, (header, rows) in tables(predictions, class_names).items():
        write(name, csv_text(header, rows))

Needs numpy and scikit-learn (which brings scipy), and matplotlib only to draw.

Said once for all functions: N is the number of images, K > 1 that of classes; labels and predicted
classes are (N,) integers, 0 to K - 1; logits and scores are (N, K) finite numbers; figures are
floats from 0 to 1, NaN where undefined. Intervals are of 95 %. Wrong labels and wrong files raise
`MetricsError`, a file that can't be read or written OSError, other arrays that don't fit the
ValueError of NumPy or scikit-learn.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import sklearn.metrics
from numpy.typing import ArrayLike

# The figures of `summary`, in its order, and what readers call them.
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "recall": "macro recall",
    "precision": "macro precision",
}
REPLICATES = 10_000  # of the bootstrap


class MetricsError(ValueError):
    """Labels or a file that can't be used; the message is one line and says what to do."""


# ---- numbers -------------------------------------------------------------------------------------


class ClassMetrics(NamedTuple):
    """The figures of one class; `support` is the number of its test images."""

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
    """Return class indices as an array; scikit-learn would leave out those that are too high."""
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

    The macro average is over the classes that occur in `labels` or `predicted`, as in scikit-learn;
    a class never predicted has precision 0, one without test images recall 0
    (``zero_division=0``).
    """
    return summary_from_confusion(confusion(labels, predicted, num_classes))


def summary_from_confusion(matrix: ArrayLike) -> dict[str, float]:
    """Return what `summary` returns, from a (K, K) confusion matrix of counts."""
    true, predicted = np.nonzero(matrix)
    weight = np.asarray(matrix)[true, predicted]  # a cell stands for its images by its weight
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        true, predicted, average="macro", sample_weight=weight, zero_division=0
    )
    accuracy = sklearn.metrics.accuracy_score(true, predicted, sample_weight=weight)
    return dict(zip(METRIC_NAMES, map(float, (accuracy, f1, recall, precision)), strict=True))


def per_class(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> list[ClassMetrics]:
    """Return precision, recall, F1 and support of each of the K classes.

    Precision is NaN for a class that is never predicted, recall for one without test images, F1
    where both are.
    """
    labels, predicted = _classes(labels, num_classes), _classes(predicted, num_classes)
    columns = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(num_classes), zero_division=np.nan
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [ClassMetrics(*row) for row in rows]


def softmax(logits: ArrayLike) -> np.ndarray:
    """Return the softmax of each row of (N, K) logits as float64, without overflow."""
    logits = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def roc_curves(labels: ArrayLike, scores: ArrayLike) -> list[RocCurve]:
    """Return the ROC curve of each class against the rest.

    Scores are raw logits, as the poster's authors did, or their `softmax`. The two give different
    curves, because softmax compares a logit with the others. Points that no line needs are left out
    (``drop_intermediate``). Where a class has no test image, `tpr` and `auc` are NaN, where it has
    all of them, `fpr` and `auc`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = _classes(labels, scores.shape[1])
    curves = []
    with warnings.catch_warnings(action="ignore"):  # of undefined curves, as NaN says
        for k, column in enumerate(scores.T):
            fpr, tpr, thresholds = sklearn.metrics.roc_curve(labels == k, column)
            curves.append(RocCurve(fpr, tpr, thresholds, float(sklearn.metrics.auc(fpr, tpr))))
    return curves


def bootstrap_intervals(matrix: ArrayLike, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return (low, high) of each figure of `summary`: percentile bootstrap over test images.

    The figures depend on the (K, K) confusion matrix alone, and drawing N of N images with
    replacement makes its cells multinomial; so each of 10,000 replicates is one multinomial draw,
    in 80,000 K^2 bytes, by ``numpy.random.RandomState(seed)``, whose stream NumPy promises to keep.
    The intervals tell how far another test set would move the figures, not another training run.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    matrix = np.asarray(matrix)
    total = matrix.sum()
    draws = np.random.RandomState(seed).multinomial(total, matrix.ravel() / total, REPLICATES)
    draws = draws.reshape(-1, *matrix.shape)  # (B, K, K)
    hits = draws.diagonal(axis1=1, axis2=2)  # (B, K)
    support, called = draws.sum(axis=2), draws.sum(axis=1)
    present = (support + called > 0).sum(axis=1)  # (B,)
    figures = [hits.sum(axis=1) / total]
    # F1, recall, precision. Hits are 0 wherever the denominator is: that is zero_division=0.
    for part, whole in ((2 * hits, support + called), (hits, support), (hits, called)):
        figures.append((part / np.maximum(whole, 1)).sum(axis=1) / present)
    intervals = np.quantile(figures, [0.025, 0.975], axis=1).T
    return dict(zip(METRIC_NAMES, map(tuple, intervals.tolist()), strict=True))


def delong_interval(positive: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return low and high end of an AUC's interval by DeLong's variance, in O(n log n).

    `positive`, (N,) bool, tells whether an image is of the class; of its scores, (N,) numbers, only
    the order matters. The interval is normal, cut to 0..1, and NaN if fewer than two images are
    positive or negative. Sources: DeLong, DeLong & Clarke-Pearson, Biometrics 44(3):837-845, 1988;
    Sun & Xu, IEEE Signal Processing Letters 21(11):1389-1393, 2014, for the O(n log n).
    """
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores)
    cases, controls = np.sort(scores[positive]), np.sort(scores[~positive])
    if min(len(cases), len(controls)) < 2:
        return math.nan, math.nan
    shares = []  # of the others, those below each case or control; a tie counts half
    for values, others in ((cases, controls), (controls, cases)):
        below = np.searchsorted(others, values) + np.searchsorted(others, values, side="right")
        shares.append(below / (2 * len(others)))
    area = float(shares[0].mean())
    variance = sum(share.var(ddof=1) / len(share) for share in shares)
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return max(0.0, area - reach), min(1.0, area + reach)


# ---- files ---------------------------------------------------------------------------------------
# Errors name the file and the row, counted as editors do: the header is row 1.


def write(path: str | Path, content: str | bytes) -> None:
    r"""Write a file so that at no time a part of it stands under its name.

    It is written as NAME.tmp in the same folder, which must be, and moved into place; if that
    fails it is removed again. Text becomes UTF-8 with "\n" kept and lone surrogates escaped.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a killed process's is written over
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Return a CSV file's text: "\n", floats in full precision, NaN as nan."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])  # a float's str() is exact
    return text.getvalue()


def read_csv(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a CSV file; each row has as many cells as the header."""
    content = Path(path).read_bytes()
    if not content.endswith(b"\n"):
        raise MetricsError(f"{path}: empty, or its last row is cut short; write it again")
    try:
        header, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
    except (UnicodeDecodeError, csv.Error) as error:
        raise MetricsError(f"{path}: not a CSV file in UTF-8 ({error}); write it again") from None
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise MetricsError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")
    return header, rows


def read_column(path: str | Path, name: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """Return a column of a CSV file with rows, each cell as `kind` makes it of the text."""
    header, rows = read_csv(path)
    if name not in header or not rows:
        raise MetricsError(f"{path}: no column {name}, or no row; write it again")
    try:
        return [kind(row[header.index(name)]) for row in rows]
    except ValueError as error:
        raise MetricsError(f"{path}: column {name}: {error}; write it again") from None


class Predictions(NamedTuple):
    """What predictions.csv holds: ids, labels, predicted (N,) int64; logits (N, K) float32.

    An id is an image's place in the data set; `predicted` is the (first) highest logit's class.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray


def predictions_text(predictions: Predictions) -> str:
    """Return the text of predictions.csv, from which `read_predictions` makes the same bits."""
    *integers, logits = predictions
    if not np.isfinite(logits).all():
        raise MetricsError("a logit is not finite: did training diverge?")
    header = ["id", "label", "predicted", *(f"logit_{k}" for k in range(logits.shape[1]))]
    line = ",".join(["%d"] * 3 + ["%.9g"] * logits.shape[1])  # 9 digits tell all float32 apart
    rows = zip(*(column.tolist() for column in (*integers, *logits.T)), strict=True)
    return "\n".join([",".join(header), *(line % row for row in rows), ""])


def read_predictions(path: str | Path) -> Predictions:
    """Read predictions.csv, `id,label,predicted,logit_0,...`, and check that all of it agrees."""
    header, rows = read_csv(path)
    if header[:5] != ["id", "label", "predicted", "logit_0", "logit_1"] or not rows:
        raise MetricsError(f"{path}: give rows of id,label,predicted,logit_0,logit_1,...")
    num_classes = len(header) - 3
    dtype = [("integers", np.int64, 3), ("logits", np.float32, num_classes)]
    try:
        table = np.loadtxt(path, dtype, delimiter=",", skiprows=1, comments=None, ndmin=1)
    except ValueError as error:  # names row and column
        raise MetricsError(f"{path}: {error} (row 0 is below the header)") from None
    ids, labels, predicted = table["integers"].T.copy()
    logits = table["logits"].copy()
    for wrong, problem in (
        (~np.isfinite(logits).all(axis=1), "a logit is not finite"),
        (~np.isin(labels, range(num_classes)), f"the label is not 0 to {num_classes - 1}"),
        (predicted != logits.argmax(axis=1), "predicted is not the (first) highest logit's class"),
    ):
        if wrong.any():
            raise MetricsError(f"{path}: row {wrong.argmax() + 2}: {problem}")
    return Predictions(ids, labels, predicted, logits)


def tables(predictions: Predictions, class_names: Sequence[str]) -> dict[str, tuple[list, list]]:
    """Return header and rows, by file name, of all CSV files that follow from predictions.

    They are confusion.csv, per_class.csv, roc/auc.csv (AUC by raw logits with its interval, AUC by
    softmax), a roc/class_K.csv for each class and table.csv (the figures of `summary` with their
    intervals). Cells are Python's str, int and float.
    """
    _, labels, predicted, logits = predictions
    num_classes = logits.shape[1]
    if len(class_names) != num_classes:
        raise MetricsError(f"{len(class_names)} class names, {num_classes} logits; give one each")
    matrix = confusion(labels, predicted, num_classes)
    figures, intervals = summary_from_confusion(matrix), bootstrap_intervals(matrix)
    classes = per_class(labels, predicted, num_classes)
    curves, softmax_curves = roc_curves(labels, logits), roc_curves(labels, softmax(logits))
    class_rows, auc_rows, points = [], [], {}
    for k, (curve, of_class) in enumerate(zip(curves, classes, strict=True)):
        name, interval = [k, str(class_names[k])], delong_interval(labels == k, logits[:, k])
        class_rows.append([*name, *of_class])
        auc_rows.append([*name, curve.auc, *interval, softmax_curves[k].auc, of_class.support])
        points[f"roc/class_{k}.csv"] = np.column_stack(curve[:3]).tolist()
    columns = ["label", *(f"predicted_{k}" for k in range(num_classes))]
    auc_columns = ["class", "name", "auc", "auc_low", "auc_high", "auc_softmax", "support"]
    rows = [[METRIC_NAMES[key], value, *intervals[key]] for key, value in figures.items()]
    return {
        "confusion.csv": (columns, [[k, *counts] for k, counts in enumerate(matrix.tolist())]),
        "per_class.csv": (["class", "name", *ClassMetrics._fields], class_rows),
        "roc/auc.csv": (auc_columns, auc_rows),
        **{name: (["fpr", "tpr", "threshold"], rows) for name, rows in points.items()},
        "table.csv": (["metric", "value", "low_95", "high_95"], rows),
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, padded so that it reads well as plain text too.

    The first column is set left, the others right; cells are shown by ``str``.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [[a.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for a, *rest in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- figures -------------------------------------------------------------------------------------
# Each is drawn from the files of a folder to STEM.png and STEM.svg, the same bytes each time. The
# folder is a run's or the one with the poster's own results; `reference` is the latter, to be drawn
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
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and tested
    "svg.hashsalt": "metrics",  # the same ids in each drawing
}


@contextlib.contextmanager
def _figure(stem: str | Path, width: float, height: float, **grid: Any) -> Iterator[np.ndarray]:
    """Yield the axes of a figure (inches), (panels,), then add the legend and write the files."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(_STYLE, after_reset=True):  # no matplotlibrc of the user's has a say
        figure = Figure(figsize=(width, height), layout="compressed")
        panels = figure.subplots(squeeze=False, **grid).ravel()
        yield panels
        handles, labels = panels[0].get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True))
        if len(entries) > 1:
            place = {"loc": "outside upper center", "ncols": len(entries), "frameon": False}
            figure.legend(entries.values(), entries.keys(), **place)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=120, metadata=metadata)
            write(f"{stem}.{kind}", picture.getvalue())


def _titles(names: Iterable[str], width: int) -> list[str]:
    """Return '5: Podocytes' in lines of `width`, or '5' where the name says no more."""
    titles = [name if name == str(k) else f"{k}: {name}" for k, name in enumerate(names)]
    return [textwrap.fill(title, width).replace("$", r"\$") for title in titles]  # "$": no formula


def read_confusion(folder: str | Path) -> np.ndarray:
    """Return the confusion matrix (K, K) of a folder."""
    path = Path(folder, "confusion.csv")
    return np.column_stack([read_column(path, name, int) for name in read_csv(path)[0][1:]])


def _read_classes(folder: str | Path, width: int) -> tuple[list[str], np.ndarray]:
    """Return each class's title in lines of `width`, and its share of the test images."""
    names = read_column(Path(folder, "per_class.csv"), "name", str)
    support = read_confusion(folder).sum(axis=1)
    return _titles(names, width), support / support.sum()


def _read_roc(folder: str | Path) -> list[tuple[list[float], list[float], str]]:
    """Return fpr, tpr and the AUC in words of each class."""
    path = Path(folder, "roc.csv")
    if path.exists():  # the poster's, which has no intervals
        areas = enumerate(read_column(Path(folder, "auc.csv"), "auc"))
        fpr = read_column(path, "fpr")
        return [(fpr, read_column(path, f"tpr_{k}"), f"AUC {area:.3f}") for k, area in areas]
    path = Path(folder, "roc", "auc.csv")
    areas = zip(*(read_column(path, name) for name in ("auc", "auc_low", "auc_high")), strict=True)
    curves = []
    for k, (area, low, high) in enumerate(areas):
        path = Path(folder, "roc", f"class_{k}.csv")
        text = f"AUC {area:.3f}\n({low:.3f} to {high:.3f})"
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
    """Draw a panel a class: the ROC curve, its AUC with interval, the class ratio."""
    titles, ratios = _read_classes(folder, 23)
    curves = _read_roc(folder)
    poster = _read_roc(reference) if reference else []
    columns = min(len(curves), 4)
    rows = math.ceil(len(curves) / columns)
    size = 0.4 + 1.75 * columns, 0.6 + 1.95 * rows
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
    """Draw the loss of each trial of the search against the epochs it had.

    The trial with the lowest loss after the most epochs is highlighted.
    """
    path, trials = Path(folder, "tuning.jsonl"), {}
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]  # a kill may have cut the last
        for record in map(json.loads, lines):
            if record["loss"] is not None:
                point = float(record["resource"]), float(record["loss"])
                trials.setdefault((record["bracket"], record["trial"]), []).append(point)
    except (ValueError, TypeError, KeyError) as error:
        raise MetricsError(f"{path}: not a log of trials ({error!r})") from None
    if not trials:
        raise MetricsError(f"{path}: no trial has a loss yet; let the search go on")
    resources, losses = zip(*(point for trial in trials.values() for point in trial), strict=True)
    ticks = sorted({*resources})
    best = min(trials.values(), key=lambda trial: (-trial[-1][0], trial[-1][1]))
    with _figure(stem, 7.2, 3.9) as (axes,):
        for trial in trials.values():
            axes.plot(*zip(*trial, strict=True), "o-", color=_GREY, ms=3, lw=0.8, label="trial")
        axes.plot(*zip(*best, strict=True), "o-", color=_BLUE, ms=3, lw=2, label="lowest loss")
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        if max(losses) > 20 * min(losses):  # one that diverged would hide the others
            axes.set_yscale("log")
        failed = len(lines) - len(losses)
        axes.set(xlabel=f"epochs (failed trials: {failed})", ylabel="validation loss")


def draw_growth(folder: str | Path, stem: str | Path) -> None:
    """Draw compare.csv: times and model size against the training images, a line a system."""
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
    """Draw the first 8 images of each class, a row a class.

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


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of a predictions file; return 0, 2 for an error, 130 for Ctrl-C."""
    about = "Print the tables of a predictions.csv file."
    parser = argparse.ArgumentParser("metrics.py", description=about)
    # One line, without the usage.
    parser.error = lambda message: parser.exit(2, f"metrics.py: error: {message}\n")
    parser.add_argument("predictions", help="columns id, label, predicted, logit_0, logit_1, ...")
    path = parser.parse_args(argv).predictions
    try:
        predictions = read_predictions(path)
        names = [f"class {k}" for k in range(predictions.logits.shape[1])]
        files = tables(predictions, names)
        print(f"{len(predictions.ids):,} images, {len(names)} classes, intervals of 95 %")
        # Without the column of the class's number, which its name has.
        for name, first in (("table.csv", 0), ("per_class.csv", 1), ("roc/auc.csv", 1)):
            header, *rows = (row[first:] for row in (files[name][0], *files[name][1]))
            rows = [[f"{c:.4f}" if isinstance(c, float) else c for c in row] for row in rows]
            print(f"\n{markdown_table(header, rows)}", end="", flush=True)
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
