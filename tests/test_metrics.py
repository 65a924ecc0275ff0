"""Tests of metrics.py; the oracles are scikit-learn, definitions written out, and hand counts."""

import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

import metrics
from metrics import MetricsError

# "Medical Image Classification Model Based on CNN", Wei Deng and Kang Zhu: the figure "Confusion
# matrix", rows true, and the table beside it (its 0.5678 is cut, not rounded).
POSTER_CONFUSION = np.array(
    [
        [12535, 237, 29, 309, 164, 131, 1342, 1290],
        [1032, 435, 25, 72, 54, 26, 299, 409],
        [47, 0, 805, 240, 264, 398, 12, 19],
        [318, 1, 167, 3078, 580, 211, 243, 65],
        [307, 7, 190, 671, 1902, 198, 203, 92],
        [184, 0, 389, 263, 216, 1060, 135, 84],
        [1522, 66, 20, 383, 204, 139, 8211, 1271],
        [1633, 145, 7, 160, 121, 98, 1373, 3909],
    ]
)
POSTER_TABLE = {"accuracy": 0.6387, "f1": 0.5426, "recall": 0.5356, "precision": 0.5678}
NAMES = ["Collecting Duct, Connecting Tubule", 'a "quoted" name', "two\nlines", "Größe $x$ | µ"]


def quiet(function, *arguments):
    """Call a function whose warnings about undefined figures are not the point of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        return function(*arguments)


def random_case(seed, num_classes, n, used=None):
    """Return labels, predicted and float32 logits with ties; only `used` classes are labels."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(num_classes if used is None else used, n)
    logits = generator.normal(size=(n, num_classes)) + np.eye(num_classes)[labels]
    logits = (np.round(logits * 8) / 8).astype(np.float32)
    return labels, logits.argmax(axis=1), logits


def sklearn_summary(labels, predicted):
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    accuracy = accuracy_score(labels, predicted)
    return {"accuracy": accuracy, "f1": f1, "recall": recall, "precision": precision}


def expand(matrix):
    true, predicted = np.nonzero(matrix)
    counts = np.asarray(matrix)[true, predicted]
    return np.repeat(true, counts), np.repeat(predicted, counts)


# Numbers


def test_poster_figures():
    figures = metrics.summary_from_confusion(POSTER_CONFUSION)
    assert {name: math.floor(value * 1e4) / 1e4 for name, value in figures.items()} == POSTER_TABLE
    exact = {"accuracy": 0.638700, "f1": 0.542641, "recall": 0.535631, "precision": 0.567883}
    assert figures == pytest.approx(exact, abs=5e-7)
    labels, predicted = expand(POSTER_CONFUSION)
    assert len(labels) == 50_000
    assert metrics.summary(labels, predicted, 8) == figures
    np.testing.assert_array_equal(metrics.confusion(labels, predicted, 8), POSTER_CONFUSION)


@pytest.mark.parametrize("num_classes", [2, 3, 8, 30])
@pytest.mark.parametrize("n", [1, 7, 400])
def test_summary_agrees_with_scikit_learn(num_classes, n):
    for seed in range(4):
        labels, predicted, _ = random_case(seed, num_classes, n)
        figures = quiet(metrics.summary, labels, predicted, num_classes)
        matrix = np.zeros((num_classes, num_classes), dtype=np.int32)
        np.add.at(matrix, (labels, predicted), 1)
        assert list(figures) == ["accuracy", "f1", "recall", "precision"]
        assert figures == pytest.approx(sklearn_summary(labels, predicted), abs=1e-12)
        assert figures == quiet(metrics.summary_from_confusion, matrix)
        counted = metrics.confusion(labels.tolist(), predicted.astype(np.uint8), num_classes)
        assert counted.dtype == np.int64
        np.testing.assert_array_equal(counted, matrix)


def test_by_hand():
    # Class 2 is never predicted, class 3 does not occur at all, class 4 is only predicted.
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 4]
    with pytest.warns(UndefinedMetricWarning, match="class 3 neither in the test set nor pred"):
        figures = metrics.summary(labels, predicted, 5)
    assert figures == pytest.approx(
        {
            "accuracy": 3 / 6,
            "f1": (1 / 2 + 4 / 5 + 0 + 0) / 4,
            "recall": (1 / 2 + 1 + 0 + 0) / 4,
            "precision": (1 / 2 + 2 / 3 + 0 + 0) / 4,
        }
    )
    with pytest.warns(UndefinedMetricWarning) as caught:
        classes = metrics.per_class(labels, predicted, 5)
    assert {str(warning.message) for warning in caught} == {
        "precision is undefined for classes 2, 3: never predicted",
        "recall is undefined for classes 3, 4: not in the test set",
    }
    nan = float("nan")
    expected = [
        (1 / 2, 1 / 2, 1 / 2, 2),
        (2 / 3, 1, 4 / 5, 2),
        (nan, 0, 0, 2),
        (nan, nan, nan, 0),
        (0, nan, 0, 0),
    ]
    np.testing.assert_allclose(classes, expected, equal_nan=True)
    assert [type(value) for value in classes[0]] == [float, float, float, int]


def test_per_class_agrees_with_scikit_learn():
    labels, predicted, _ = random_case(0, 8, 500)
    expected = np.column_stack(precision_recall_fscore_support(labels, predicted))
    np.testing.assert_allclose(metrics.per_class(labels, predicted, 8), expected, atol=1e-12)


def test_roc_curves_by_definition():
    labels, _, logits = random_case(1, 4, 300)
    for index, curve in enumerate(metrics.roc_curves(labels, logits)):
        positive, scores = labels == index, logits[:, index]
        called = scores >= curve.thresholds[:, np.newaxis]  # (thresholds, images)
        np.testing.assert_allclose(curve.fpr, called[:, ~positive].mean(axis=1))
        np.testing.assert_allclose(curve.tpr, called[:, positive].mean(axis=1))
        assert (curve.fpr[0], curve.tpr[0], curve.thresholds[0]) == (0, 0, math.inf)
        assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)
        # The area is the share of pairs in the right order, a tie being half of one.
        pairs = scores[positive][:, np.newaxis] - scores[~positive]
        assert (pairs == 0).any()
        assert curve.auc == pytest.approx((np.sign(pairs).mean() + 1) / 2, abs=1e-12)


def test_roc_of_a_missing_class():
    labels, _, logits = random_case(2, 4, 60, used=[0, 1, 3])
    with pytest.warns(UndefinedMetricWarning, match="undefined for class 2"):
        curves = metrics.roc_curves(labels, logits)
    assert [math.isnan(curve.auc) for curve in curves] == [False, False, True, False]
    assert [len(column) for column in curves[2][:3]] == [0, 0, 0]
    assert curves[3].auc == pytest.approx(roc_auc_score(labels == 3, logits[:, 3]))
    rows = metrics.class_aucs(labels, logits, curves)  # has been warned of: no second warning
    assert np.isnan(rows[2][:4]).all()
    assert rows[2].support == 0


def test_roc_of_the_only_class():
    with pytest.warns(UndefinedMetricWarning, match="undefined for classes 0, 1"):
        curves = metrics.roc_curves([1, 1], [[0.0, 1.0], [1.0, 0.0]])
    assert all(math.isnan(curve.auc) for curve in curves)


def test_class_aucs():
    labels, _, logits = random_case(3, 3, 200)
    # No ties but in column 1: whether softmax keeps a tie is a matter of rounding.
    logits += np.random.default_rng(0).normal(0, 1e-3, size=(200, 1)) * [[1, 0, 2]]
    rows = metrics.class_aucs(labels, logits, metrics.roc_curves(labels, logits), level=0.9)
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1)[:, None]
    for index, row in enumerate(rows):
        positive = labels == index
        assert row.auc == pytest.approx(roc_auc_score(positive, logits[:, index]))
        assert row.auc_softmax == pytest.approx(roc_auc_score(positive, probabilities[:, index]))
        assert row.auc_softmax != row.auc
        interval = delong_by_definition(positive, logits[:, index], 1.6448536269514722)
        assert row[:3] == pytest.approx(interval, abs=1e-12)
        assert row.support == positive.sum()


def test_softmax():
    logits = np.array([[1e4, 0.0, 1e4], [-1e4, -1e4, -1e4], [1.0, 2.0, 4.0]], dtype=np.float32)
    total = math.exp(1) + math.exp(2) + math.exp(4)
    expected = [[0.5, 0, 0.5], [1 / 3] * 3, [math.exp(x) / total for x in (1, 2, 4)]]
    result = metrics.softmax(logits)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-14)
    assert logits[0, 0] == 1e4  # the input is left alone


GOOD = [0, 1, 1]
MATRIX = [[1, 2], [3, 4]]
SCORES = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.summary(GOOD, [0, 1], 2), "3 labels but 2 predicted"),
        (lambda: metrics.summary(GOOD, [0, 1, 2], 2), r"predicted\[2\] is 2; .* 0 to 1"),
        (lambda: metrics.summary([0, -1, 0], GOOD, 2), r"labels\[1\] is -1"),
        (lambda: metrics.summary([], [], 2), r"shape \(0,\)"),
        (lambda: metrics.summary([[0], [1], [1]], GOOD, 2), r"shape \(3, 1\)"),
        (lambda: metrics.per_class([0.0, 1.0, 1.0], GOOD, 2), "labels has the type float64"),
        (lambda: metrics.confusion(["a", "b", "c"], GOOD, 2), "labels has the type <U1"),
        (lambda: metrics.confusion(GOOD, GOOD, 1), "at least 2 classes"),
        (lambda: metrics.summary_from_confusion([[1, 2, 3]]), r"shape \(1, 3\)"),
        (lambda: metrics.summary_from_confusion([[5]]), r"shape \(1, 1\)"),
        (lambda: metrics.summary_from_confusion([[1, -1], [0, 1]]), "at least 0"),
        (lambda: metrics.summary_from_confusion([[0, 0], [0, 0]]), "not all of them 0"),
        (lambda: metrics.summary_from_confusion([[0.5, 0.5], [0, 1]]), "integers"),
        (lambda: metrics.roc_curves(GOOD, SCORES[:2]), "3 labels but 2 rows of scores"),
        (lambda: metrics.roc_curves([0, 1, 2], SCORES), r"labels\[2\] is 2"),
        (lambda: metrics.roc_curves(GOOD, [[0, 1], [0, math.nan], [1, 1]]), "image 1 .* class 1"),
        (lambda: metrics.roc_curves(GOOD, [1.0, 2.0, 3.0]), r"shape \(3,\)"),
        (lambda: metrics.softmax([[1.0, math.inf]]), "class 1 is inf; give finite"),
        (lambda: metrics.class_aucs(GOOD, SCORES, []), "0 curves for 2 classes"),
        (lambda: metrics.bootstrap_intervals(MATRIX, level=1), "level is 1"),
        (lambda: metrics.bootstrap_intervals(MATRIX, replicates=0), "0 replicates"),
        (lambda: metrics.delong_interval(GOOD, [1, 2, 3]), "positive has the type int64"),
        (lambda: metrics.delong_interval([True, False], [1, 2, 3]), r"shape \(3,\)"),
        (lambda: metrics.delong_interval([True, False], [1, math.nan]), "finite"),
        (lambda: metrics.delong_interval([True, False], [1, 2], level=0), "level is 0"),
    ],
)
def test_bad_arrays(call, message):
    with pytest.raises(MetricsError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# Intervals


@pytest.mark.parametrize("seed", range(25))
def test_a_bootstrap_replicate_is_the_summary_of_a_multinomial_draw(seed):
    matrix = np.array([[3, 1, 0, 0], [1, 2, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0]])
    intervals = metrics.bootstrap_intervals(matrix, replicates=1, seed=seed)
    cells = np.nonzero(matrix)
    draw = np.zeros_like(matrix)
    draw[cells] = np.random.default_rng(seed).multinomial(matrix.sum(), matrix[cells] / 11)
    expected = sklearn_summary(*expand(draw))  # classes that no image was drawn of included
    assert list(intervals) == list(expected)
    for name, value in expected.items():
        assert intervals[name] == pytest.approx((value, value), abs=1e-12)


def test_bootstrap_agrees_with_resampling_images():
    labels, predicted, _ = random_case(4, 3, 150)
    few, many = 500, 20_000
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(few):
        drawn = generator.integers(len(labels), size=len(labels))
        resampled.append(sklearn_summary(labels[drawn], predicted[drawn]))
    intervals = metrics.bootstrap_intervals(
        metrics.confusion(labels, predicted, 3), replicates=many, seed=1
    )
    for name, interval in intervals.items():
        values = np.array([figures[name] for figures in resampled])
        # Standard error of a normal sample's 2.5 % quantile: sd sqrt(p (1 - p) / n) / density.
        density = math.exp(-(1.959964**2) / 2) / math.sqrt(2 * math.pi)
        error = values.std() * math.sqrt(0.025 * 0.975 * (1 / few + 1 / many)) / density
        np.testing.assert_allclose(interval, np.quantile(values, [0.025, 0.975]), atol=5 * error)


def test_bootstrap_of_the_poster():
    intervals = metrics.bootstrap_intervals(POSTER_CONFUSION)
    assert intervals == metrics.bootstrap_intervals(POSTER_CONFUSION, seed=0)
    assert intervals != metrics.bootstrap_intervals(POSTER_CONFUSION, seed=1)
    # Accuracy is binomial: its interval is known in closed form.
    reach = 1.959964 * math.sqrt(0.6387 * (1 - 0.6387) / 50_000)
    assert intervals["accuracy"] == pytest.approx((0.6387 - reach, 0.6387 + reach), abs=2e-4)
    for name, value in metrics.summary_from_confusion(POSTER_CONFUSION).items():
        assert intervals[name][0] < value < intervals[name][1]
        wide = metrics.bootstrap_intervals(POSTER_CONFUSION, level=0.99)[name]
        assert wide[0] < intervals[name][0] < intervals[name][1] < wide[1]


def test_bootstrap_in_chunks_is_the_same():
    matrix = np.random.default_rng(0).integers(1, 5, size=(70, 70))  # 4,900 cells: 855 at a time
    draws = np.random.default_rng(3).multinomial(
        matrix.sum(), matrix.ravel() / matrix.sum(), size=1_000
    )
    accuracy = draws[:, :: 70 + 1].sum(axis=1) / matrix.sum()
    expected = np.quantile(accuracy, [0.025, 0.975])
    result = metrics.bootstrap_intervals(matrix, replicates=1_000, seed=3)["accuracy"]
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def delong_by_definition(positive, scores, quantile):
    """DeLong, DeLong & Clarke-Pearson 1988, equations (1) to (6), for one curve."""
    cases, controls = scores[positive].astype(float), scores[~positive].astype(float)
    kernel = (np.sign(cases[:, np.newaxis] - controls) + 1) / 2
    area = kernel.mean()
    s10 = ((kernel.mean(axis=1) - area) ** 2).sum() / (len(cases) - 1)
    s01 = ((kernel.mean(axis=0) - area) ** 2).sum() / (len(controls) - 1)
    reach = quantile * math.sqrt(s10 / len(cases) + s01 / len(controls))
    return area, max(0, area - reach), min(1, area + reach)


@pytest.mark.parametrize("seed", range(6))
def test_delong_by_definition(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(120) < 0.3
    scores = generator.normal(size=120) + positive
    scores = np.round(scores * (seed + 1)) if seed < 3 else scores.astype(np.float32)
    assert (len(np.unique(scores)) < 60) == (seed < 3)  # ties, or none
    expected = delong_by_definition(positive, scores, 1.959963984540054)
    assert metrics.delong_interval(positive, scores) == pytest.approx(expected, abs=1e-12)
    area, low, high = metrics.delong_interval(~positive, scores)
    expected = (1 - expected[0], 1 - expected[2], 1 - expected[1])
    assert (area, low, high) == pytest.approx(expected, abs=1e-12)


def test_delong_at_the_edges():
    nan = float("nan")
    few = [True, True, False, False]
    assert metrics.delong_interval(few, [3, 4, 1, 2]) == (1, 1, 1)
    assert metrics.delong_interval(few, [1, 2, 3, 4]) == (0, 0, 0)
    assert metrics.delong_interval(few, [2, 4, 1, 3])[::2] == (0.75, 1)  # cut to 1
    assert metrics.delong_interval(few, [3, 1, 4, 2])[:2] == (0.25, 0)  # cut to 0
    one = metrics.delong_interval([True, False, False], [2, 1, 3])
    np.testing.assert_equal(one, (0.5, nan, nan))
    np.testing.assert_equal(metrics.delong_interval([False, False], [1, 2]), (nan, nan, nan))
    np.testing.assert_equal(metrics.delong_interval([True, True], [1, 2]), (nan, nan, nan))


# Files


def test_csv_round_trip(tmp_path):
    path = tmp_path / "a.csv"
    third = 1 / 3
    values = [third, np.float64(third), np.float32(0.1), 5e-324, math.nan, -math.inf, np.int64(-7)]
    metrics.write_csv(path, ["name", "value"], ((NAMES[i % 4], v) for i, v in enumerate(values)))
    assert path.read_bytes().startswith(b'name,value\n"Collecting Duct, Connecting Tubule",0.3333')
    assert b"\r" not in path.read_bytes()
    rows = metrics.read_csv(path, ["name", "value"])
    assert [row[0] for row in rows] == [NAMES[i % 4] for i in range(7)]
    assert [row[1] for row in rows][4:] == ["nan", "-inf", "-7"]
    assert float(rows[0][1]) == float(rows[1][1]) == third
    assert np.float32(rows[2][1]) == np.float32(0.1)
    assert float(rows[3][1]) == 5e-324
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


def test_a_name_that_is_no_text_is_written(tmp_path):
    metrics.write_csv(tmp_path / "a.csv", ["name"], [["caf\udce9"]])  # a folder's, in Latin-1
    assert metrics.read_csv(tmp_path / "a.csv", ["name"]) == [["caf\\udce9"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"a,b\n1,2", "last line is cut short"),
        (b"a,b\n1,\xff2\n", "byte 6 is not UTF-8"),
        (b"a,c\n1,2\n", "row 1 is 'a,c'; the header must be a,b"),
        (b"\n", "row 1 is ''"),
        (b"\xef\xbb\xbfa,b\n1,2\n", "row 1 is"),
        (b"a,b\n1,2\n1,2,3\n", "row 3 has 3 cells for 2 columns"),
        (b"a,b\n\n1,2\n", "row 2 has 0 cells for 2 columns"),
        (b'a,b\n1,"2\n', "not a CSV file"),
        (b'a,b\n1,"2"3\n', "not a CSV file"),
    ],
)
def test_malformed_csv(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(MetricsError, match=message) as caught:
        metrics.read_csv(path, ["a", "b"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_writing_fails_cleanly(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        metrics.write_csv(tmp_path / "gone" / "a.csv", ["a"], [["1"]])
    with pytest.raises(MetricsError, match="row 3 has 1 cells for 2 columns"):
        metrics.write_csv(tmp_path / "a.csv", ["a", "b"], [[1, 2], [3]])
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.csv").write_text("a\nold\n")
    write_bytes = Path.write_bytes
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def full(self, content, error=error):
            write_bytes(self, content[:3])
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(Path, "write_bytes", full)
            metrics.write_csv(tmp_path / "a.csv", ["a"], [["new"]])
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]
        assert (tmp_path / "a.csv").read_text() == "a\nold\n"


def write_case(path, seed=5, num_classes=4, n=40):
    labels, predicted, logits = random_case(seed, num_classes, n)
    metrics.write_predictions(path, np.arange(n) * 3 - 5, labels, predicted, logits)
    return labels, predicted, logits


def test_predictions_round_trip(tmp_path):
    bits = np.random.default_rng(0).integers(2**32, size=(3000, 3), dtype=np.uint64)
    logits = bits.astype(np.uint32).view(np.float32)
    logits = logits[np.isfinite(logits).all(axis=1)]
    largest, least = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    logits[:2] = [[largest, -largest, 0], [-0.0, least, -least]]
    n = len(logits)
    ids = np.random.default_rng(1).permutation(n) - 10
    ids[0] = 999_999_999_999_999_000
    labels, predicted = ids % 3, logits.argmax(axis=1)
    metrics.write_predictions(tmp_path / "p.csv", ids, labels.tolist(), predicted, logits)
    read = metrics.read_predictions(tmp_path / "p.csv")
    assert [array.dtype for array in read] == [np.int64] * 3 + [np.float32]
    np.testing.assert_array_equal(read.ids, ids)
    np.testing.assert_array_equal(read.labels, labels)
    np.testing.assert_array_equal(read.predicted, predicted)
    assert read.logits.tobytes() == logits.tobytes()  # the sign of zero as well
    header = (tmp_path / "p.csv").read_text().split("\n")[0]
    assert header == "id,label,predicted,logit_0,logit_1,logit_2"


@pytest.mark.parametrize(
    ("ids", "labels", "predicted", "logits", "message"),
    [
        ([0, 0], [0, 1], [1, 1], [[0, 1], [0, 1]], "row 3, column id: 0 stands in an earlier row"),
        ([0, 1], [0, 2], [1, 1], [[0, 1], [0, 1]], "row 3, column label: 2 is no class"),
        ([0, 1], [0, 1], [-1, 1], [[0, 1], [0, 1]], "row 2, column predicted: -1 is no class"),
        ([0, 1], [0, 1], [1, 1], [[0, 1], [1, 1]], "row 3, column predicted: 1 is not the class"),
        ([0, 1], [0, 1], [1, 1], [[0, 1], [0, 1e39]], "row 3, column logit_1: not a finite float"),
        ([0, 1], [0, 1], [1, 1], [[0, 1], [0, math.nan]], "image 1 for class 1 is nan"),
        ([0, 1], [0], [1, 1], [[0, 1], [0, 1]], r"labels has the type int64 and shape \(1,\)"),
        ([0.0, 1.0], [0, 1], [1, 1], [[0, 1], [0, 1]], "ids has the type float64"),
        ([0, 10**18], [0, 1], [1, 1], [[0, 1], [0, 1]], "1e18 or beyond"),
    ],
)
def test_predictions_that_are_not_written(tmp_path, ids, labels, predicted, logits, message):
    with pytest.raises(MetricsError, match=message):
        metrics.write_predictions(tmp_path / "p.csv", ids, labels, predicted, logits)
    assert not list(tmp_path.iterdir())


HEADER = "id,label,predicted,logit_0,logit_1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x00\xff\x1f\x8b\n", "byte 1 is not UTF-8"),
        (HEADER, "no row below the header"),
        (HEADER + "0,1,1,0.5,1", "cut short"),
        ("id,label,predicted,logit_0\n0,0,0,1\n", "row 1 is 'id,label,predicted,logit_0'"),
        ("id,label,predicted,logit_1,logit_0\n0,0,0,1,1\n", "row 1 is"),
        ("0,1,1,0.5,1\n", "row 1 is"),
        (HEADER + "0,1,1,0.5,1\n0,1,1,0.5\n", "row 3 has 4 cells for 5 columns"),
        (HEADER + "0,1,1,0.5,1,1\n", "row 2 has 6 cells for 5 columns"),
        (HEADER + "\n", "row 2 has 1 cells for 5 columns"),
        (HEADER + "0,1,1,0.5,1\r\n", r"row 2, column logit_1: '1\\r' is not a finite number"),
        (HEADER + "0,1,1,nan,1\n", "row 2, column logit_0: 'nan' is not a finite number"),
        (HEADER + "0,1,1,-inf,1\n", "row 2, column logit_0: '-inf' is not a finite number"),
        (HEADER + "0,1,1,0.5,1e39\n", "row 2, column logit_1: not a finite float32"),
        (HEADER + "0,1,1,0.5,1e999\n", "row 2, column logit_1: not a finite float32"),
        (HEADER + "0,1,1,1_0,11\n", "row 2, column logit_0: '1_0' is not a finite number"),
        (HEADER + "0,1,1,٣,11\n", "row 2, column logit_0"),
        (HEADER + "0,1,1, 1,11\n", "row 2, column logit_0: ' 1' is not a finite number"),
        (HEADER + "0,1,1,,11\n", "row 2, column logit_0: '' is not a finite number"),
        (HEADER + "0,1.0,1,0.5,1\n", "row 2, column label: '1.0' is not an integer"),
        (HEADER + f"{10**18},1,1,0.5,1\n", "row 2, column id: '10+' is not an integer"),
        (HEADER + "0,2,1,0.5,1\n", "row 2, column label: 2 is no class; with 2 logits"),
        (HEADER + "0,-1,1,0.5,1\n", "row 2, column label: -1 is no class"),
        (HEADER + "0,1,1,0.5,1\n1,1,2,0.5,1\n", "row 3, column predicted: 2 is no class"),
        (HEADER + "0,1,0,0.5,1\n", "row 2, column predicted: 0 is not the class of the highest"),
        (HEADER + "0,1,1,1,1\n", "row 2, column predicted: 1 is not the class of the highest"),
        (HEADER + "7,1,1,0,1\n8,1,1,0,1\n7,0,1,0,1\n", "row 4, column id: 7 stands in an earlier"),
    ],
)
def test_malformed_predictions(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MetricsError, match=message) as caught:
        metrics.read_predictions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_predictions(tmp_path):
    path = tmp_path / "p.csv"
    write_case(path)
    whole = path.read_bytes()
    chance = random.Random(0)
    refused = read = 0
    for trial in range(600):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(trial % 4):
            place = chance.randrange(len(damaged))
            damaged[place] = chance.choice((damaged[place] ^ 1 << chance.randrange(8), 48, 44, 10))
        path.write_bytes(damaged)
        try:
            predictions = metrics.read_predictions(path)
        except MetricsError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        read += 1
        header, *rows = csv.reader(damaged.decode("ascii").splitlines())
        ids, labels, predicted = ([int(row[i]) for row in rows] for i in range(3))
        logits = np.array([[float(cell) for cell in row[3:]] for row in rows], dtype=np.float32)
        assert header == whole.decode().split("\n")[0].split(",")
        assert predictions.ids.tolist() == ids
        assert len(set(ids)) == len(ids)
        assert predictions.labels.tolist() == labels
        assert set(labels) <= set(range(4))
        assert predictions.predicted.tolist() == predicted
        assert predicted == [row.tolist().index(max(row)) for row in logits]
        np.testing.assert_array_equal(predictions.logits, logits)
    assert refused > 100
    assert read > 30


def test_confusion_file(tmp_path):
    path = tmp_path / "c.csv"
    metrics.write_confusion(path, POSTER_CONFUSION)
    lines = path.read_text().splitlines()
    assert lines[0] == "label," + ",".join(f"predicted_{k}" for k in range(8))
    assert lines[2] == "1,1032,435,25,72,54,26,299,409"
    assert len(lines) == 9
    np.testing.assert_array_equal(metrics.read_confusion(path), POSTER_CONFUSION)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,predicted_0,predicted_1\n0,1,2\n", "not of the labels 0 to 1"),
        ("label,predicted_0,predicted_1\n", "not of the labels 0 to 1"),
        ("label,predicted_0,predicted_1\n1,1,2\n0,1,2\n", "not of the labels 0 to 1"),
        ("label,predicted_0,predicted_1\n0,1,x\n1,1,2\n", "row 2, column predicted_1: 'x'"),
        ("label,predicted_0,predicted_1\n0,1,2\n1,1,-2\n", "at least 0"),
        ("label,predicted_0\n0,1\n", "row 1 is"),
        ("label\n", "row 1 is"),
    ],
)
def test_malformed_confusion(tmp_path, content, message):
    path = tmp_path / "c.csv"
    path.write_text(content)
    with pytest.raises(MetricsError, match=message) as caught:
        metrics.read_confusion(path)
    assert str(caught.value).startswith(str(path))


def test_class_files(tmp_path):
    labels, predicted, logits = random_case(6, 4, 80, used=[0, 1, 3])
    classes = quiet(metrics.per_class, labels, predicted, 4)
    metrics.write_classes(tmp_path / "p.csv", NAMES, classes)
    header = ["class", "name", "precision", "recall", "f1", "support"]
    rows = metrics.read_csv(tmp_path / "p.csv", header)
    assert [row[:2] for row in rows] == [[str(k), name] for k, name in enumerate(NAMES)]
    np.testing.assert_array_equal([list(map(float, row[2:])) for row in rows], classes)

    curves = quiet(metrics.roc_curves, labels, logits)
    aucs = metrics.class_aucs(labels, logits, curves)
    metrics.write_classes(tmp_path / "a.csv", NAMES, aucs)
    header = ["class", "name", "auc", "auc_low", "auc_high", "auc_softmax", "support"]
    rows = metrics.read_csv(tmp_path / "a.csv", header)
    np.testing.assert_array_equal([list(map(float, row[2:])) for row in rows], aucs)
    assert rows[2][2:] == ["nan", "nan", "nan", "nan", "0"]

    for k, curve in enumerate(curves):
        metrics.write_roc(tmp_path / "r.csv", curve)
        rows = metrics.read_csv(tmp_path / "r.csv", ["fpr", "tpr", "threshold"])
        values = np.array([list(map(float, row)) for row in rows]).reshape(-1, 3)
        np.testing.assert_array_equal(values.T, curve[:3])
        assert (len(values) == 0) == (k == 2)

    for rows in (classes, aucs):
        with pytest.raises(MetricsError, match="3 class names but 4 classes"):
            metrics.write_classes(tmp_path / "x.csv", NAMES[:3], rows)
    assert not (tmp_path / "x.csv").exists()


def test_markdown_table():
    assert metrics.markdown_table(["metric", "b"], [["a|b", 1], ["longer one", "0.6387"]]) == (
        "| metric     |      b |\n"
        "| ---------- | -----: |\n"
        "| a\\|b       |      1 |\n"
        "| longer one | 0.6387 |\n"
    )


# Command line


def test_main_prints_the_table(tmp_path, capsys):
    labels, predicted, logits = write_case(tmp_path / "p.csv")
    assert metrics.main([str(tmp_path / "p.csv")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "40 images, 4 classes" in captured.out
    figures = sklearn_summary(labels, predicted)
    assert re.search(rf"\| accuracy +\| {figures['accuracy']:.4f} \| 0\.\d{{4}} to ", captured.out)
    assert re.search(rf"\| macro F1 +\| {figures['f1']:.4f} \|", captured.out)
    area = roc_auc_score(labels == 3, logits[:, 3])
    assert re.search(rf"\| 3 .*\| {area:.4f} \| +0\.\d{{4}} to [01]\.\d{{4}} \|", captured.out)


def test_main_reports_errors_in_one_line(tmp_path, capsys, monkeypatch):
    assert metrics.main([str(tmp_path / "none.csv")]) == 2
    (tmp_path / "empty.csv").touch()
    assert metrics.main([str(tmp_path / "empty.csv")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"(metrics\.py: error: .*\n){2}", captured.err)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "read_predictions", interrupted)
    assert metrics.main(["p.csv"]) == 130


def test_main_stops_quietly_where_its_reader_does(tmp_path):
    write_case(tmp_path / "p.csv")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, metrics.__file__, str(tmp_path / "p.csv")]
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


def test_main_says_what_is_undefined(tmp_path, capsys):
    metrics.write_predictions(tmp_path / "p.csv", [0, 1], [0, 0], [0, 1], [[1, 0], [0, 1]])
    assert metrics.main([str(tmp_path / "p.csv")]) == 0
    captured = capsys.readouterr()
    assert "metrics.py: warning: recall is undefined for class 1" in captured.err
    assert re.search(r"\| 1 .* nan \|", captured.out)


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(metrics.__file__, tmp_path / "metrics.py")
    write_case(tmp_path / "p.csv")
    code = (
        "import sys, metrics; metrics.main(['p.csv']); "
        "sys.exit('matplotlib' in sys.modules or metrics.main(['none.csv']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout.startswith("40 images, 4 classes\n")
    assert run.stderr.startswith("metrics.py: error: ")
    assert run.stderr.count("\n") == 1


# Figures


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def check_picture(stem, draw):
    """Draw twice; return the SVG's texts, having checked that the bytes are the same."""
    draw(stem)
    first = [Path(f"{stem}.{kind}").read_bytes() for kind in ("png", "svg")]
    draw(stem)
    assert first == [Path(f"{stem}.{kind}").read_bytes() for kind in ("png", "svg")]
    assert first[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(stem.parent.glob(".*"))
    svg = ElementTree.fromstring(first[1])
    space = "{http://www.w3.org/2000/svg}"
    return ["".join(text.itertext()).strip() for text in svg.iter(f"{space}text")]


def write_class_files(folder, num_classes, names, used=None):
    labels, predicted, logits = random_case(7, num_classes, 120, used)
    curves = quiet(metrics.roc_curves, labels, logits)
    aucs = metrics.class_aucs(labels, logits, curves)
    metrics.write_classes(folder / "auc.csv", names, aucs)
    classes = quiet(metrics.per_class, labels, predicted, num_classes)
    metrics.write_classes(folder / "per_class.csv", names, classes)
    for k, curve in enumerate(curves):
        metrics.write_roc(folder / f"class_{k}.csv", curve)
    return labels, aucs


@pytest.mark.parametrize("num_classes", [2, 5, 9])
def test_draw_roc(tmp_path, matplotlib, num_classes):
    names = [f"${k} of <many>$" for k in range(num_classes)]
    labels, aucs = write_class_files(tmp_path, num_classes, names, range(max(2, num_classes - 1)))
    files = tmp_path, tmp_path / "auc.csv", tmp_path / "per_class.csv"
    plain = check_picture(tmp_path / "plain", lambda stem: metrics.draw_roc(*files, stem))
    reference = [0.87, *[math.nan] * (num_classes - 1)]
    texts = check_picture(
        tmp_path / "roc", lambda stem: metrics.draw_roc(*files, stem, reference, "poster")
    )
    assert not any("reference" in text for text in plain)
    assert sum("poster" in text for text in texts) == 1
    assert any("poster 0.870" in text for text in texts)
    assert texts.count("AUC undefined") == (num_classes > 2)
    for k, area in enumerate(aucs):
        assert f"{k}: ${k} of <many>$" in texts
        assert f"class ratio {(labels == k).mean():.3f}" in texts
        if area.support:
            assert f"AUC {area.auc:.3f}" in texts
            assert f"({area.auc_low:.3f} to {area.auc_high:.3f})" in texts


def test_draw_class_ratios(tmp_path, matplotlib):
    labels, _ = write_class_files(tmp_path, 4, NAMES)
    texts = check_picture(
        tmp_path / "ratios",
        lambda stem: metrics.draw_class_ratios(tmp_path / "per_class.csv", stem),
    )
    assert {f"{(labels == k).mean():.3f}" for k in range(4)} <= set(texts)
    assert f"0: {NAMES[0]}" in texts
    assert "class ratio (of 120 test images)" in texts


def test_draw_confusion(tmp_path, matplotlib):
    metrics.write_confusion(tmp_path / "c.csv", POSTER_CONFUSION)
    texts = check_picture(
        tmp_path / "confusion", lambda stem: metrics.draw_confusion(tmp_path / "c.csv", stem)
    )
    counts = sorted(map(str, POSTER_CONFUSION.ravel()))
    assert sorted(set(texts) & set(counts)) == sorted(set(counts))
    assert {"predicted class", "true class", "share of the true class"} <= set(texts)


def test_draw_history(tmp_path, matplotlib):
    path = tmp_path / "history.csv"
    for epochs, drop in ((40, 20), (1, 20)):
        rows = [
            [epoch, 0.1 if epoch < drop else 0.03, 1 / (epoch + 1), math.nan, 0.5, 0.4, 2.5]
            for epoch in range(epochs)
        ]
        metrics.write_csv(path, metrics.HISTORY_HEADER, rows)
        texts = check_picture(tmp_path / "history", lambda stem: metrics.draw_history(path, stem))
        assert {"training", "validation", "epoch", "accuracy", "loss"} <= set(texts)
        assert ("learning rate drops" in texts) == (epochs > drop)


def test_draw_search(tmp_path, matplotlib):
    records = [
        {"bracket": 1, "rung": rung, "trial": trial, "resource": 3**rung, "loss": loss}
        for rung, trial, loss in [(0, 0, 2.0), (0, 1, 1.5), (0, 2, None), (0, 3, 900), (1, 1, 1.0)]
    ]
    path = tmp_path / "tuning.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = check_picture(tmp_path / "search", lambda stem: metrics.draw_search(path, stem))
    assert {"stopped earlier", "lowest loss there", "failed (1)"} <= set(texts)
    assert "in the last rung" not in texts  # the only one there is also the best
    assert {"1", "3", "validation loss", "resource (epochs)"} <= set(texts)
    path.write_text(json.dumps(records[2]) + "\n")
    texts = check_picture(tmp_path / "search", lambda stem: metrics.draw_search(path, stem))
    assert "lowest loss there" not in texts


@pytest.mark.parametrize(
    "line",
    ["", "[1, 2]", '{"bracket": 1', '{"bracket": 1, "trial": 0, "resource": 1}', "null"]
    + [
        json.dumps({"bracket": 1, "trial": 0, "resource": resource, "loss": 1.0})
        for resource in (0, -1, "x", math.inf, None)
    ],
)
def test_malformed_tuning_log(tmp_path, matplotlib, line):
    path = tmp_path / "tuning.jsonl"
    good = '{"bracket": 1, "trial": 0, "resource": 1, "loss": 1.0}\n'
    path.write_text(good + line + "\n")
    with pytest.raises(MetricsError, match=r"tuning\.jsonl: row 2 is no record of a trial"):
        metrics.draw_search(path, tmp_path / "search")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tuning.jsonl"]


def test_draw_scaling(tmp_path, matplotlib):
    path = tmp_path / "scaling.csv"
    rows = [
        [system, n, n * pace, pace, 100 + n / 1000 if n < 10**6 else math.nan]
        for system, pace in (("CNN", 0.001), ("k-NN", 0.1))
        for n in (1_000, 100_000, 1_000_000)
    ]
    metrics.write_csv(path, metrics.SCALING_HEADER, rows)
    texts = check_picture(tmp_path / "scaling", lambda stem: metrics.draw_scaling(path, stem))
    assert {"CNN", "k-NN", "training images", "training (s)", "peak memory (MB)", "10,000"} <= set(
        texts
    )


@pytest.mark.parametrize("shape", [(8, 8), (8, 10, 1), (12, 8, 3)])
def test_draw_samples(tmp_path, matplotlib, shape):
    images = np.random.default_rng(0).integers(256, size=(30, *shape), dtype=np.uint8)
    labels = np.arange(30) % 4
    texts = check_picture(
        tmp_path / "samples",
        lambda stem: metrics.draw_samples(images, labels, [*"abcd", "none"], stem, per_class=9),
    )
    assert texts == ["0: a", "1: b", "2: c", "3: d", "4: none"]
    for wrong in (images.astype(float), images[:, 0, 0], np.stack([images] * 2, axis=-1)):
        with pytest.raises(MetricsError, match="give uint8 of shape"):
            metrics.draw_samples(wrong, labels, [*"abcd"], tmp_path / "x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,a,1,1,1,many", "row 2, column support: 'many' is not a number"),
        ("0,a,1,1,1,0", "the support counts no images"),
        ("0,a,1,1,1,nan", "the support counts no images"),
        ("0,a,1,1,1", "row 2 has 5 cells"),
        (None, "no row below the header"),
    ],
)
def test_a_figure_of_a_damaged_file(tmp_path, matplotlib, line, message):
    path = tmp_path / "per_class.csv"
    lines = ["class,name,precision,recall,f1,support", *([] if line is None else [line])]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(MetricsError, match=message):
        metrics.draw_class_ratios(path, tmp_path / "ratios")
    assert [entry.name for entry in tmp_path.iterdir()] == ["per_class.csv"]


def test_figures_leave_matplotlib_as_it_was(tmp_path, matplotlib):
    write_class_files(tmp_path, 4, NAMES)
    code = (
        "import sys, metrics; from matplotlib import rcParams; rcParams['axes.facecolor'] = 'red'; "
        # Looking at the key 'backend' makes matplotlib load pyplot and look for a display.
        "state = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}; "
        "before = state(); metrics.draw_class_ratios('per_class.csv', 'a'); "
        "assert state() == before and before['axes.facecolor'] == 'red'; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    shutil.copy(metrics.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    metrics.draw_class_ratios(tmp_path / "per_class.csv", tmp_path / "b")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
