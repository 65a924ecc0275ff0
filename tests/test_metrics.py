"""Tests of metrics.py; the oracles are scikit-learn, definitions written out, and hand counts."""

import json
import math
import os
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
from metrics import MetricsError, Predictions

# "Medical Image Classification Model Based on CNN", Wei Deng and Kang Zhu: the figure "Confusion
# matrix", rows true. The table beside it has .6387, .5426, .5356 and .5678 (cut, not rounded).
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
NAMES = ["Collecting Duct, Connecting Tubule", 'a "quoted" name', "two\nlines", "Größe $x$ | µ"]


def quiet(function, *arguments):
    """Call a function whose warnings are not the point of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        return function(*arguments)


def predictions_of(seed=5, num_classes=4, n=100, used=None):
    """Return Predictions with tied logits; only the classes in `used` occur as labels."""
    generator = np.random.RandomState(seed)
    labels = generator.choice(num_classes if used is None else used, n).astype(np.int64)
    logits = generator.normal(size=(n, num_classes)) + np.eye(num_classes)[labels]
    logits = (np.round(logits * 8) / 8).astype(np.float32)
    return Predictions(np.arange(n) * 3 - 5, labels, logits.argmax(axis=1), logits)


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


# ---- numbers -------------------------------------------------------------------------------------


def test_poster_figures():
    figures = metrics.summary_from_confusion(POSTER_CONFUSION)
    exact = {"accuracy": 0.638700, "f1": 0.542641, "recall": 0.535631, "precision": 0.567883}
    assert figures == pytest.approx(exact, abs=5e-7)
    labels, predicted = expand(POSTER_CONFUSION)
    assert len(labels) == 50_000
    assert metrics.summary(labels, predicted, 8) == figures
    np.testing.assert_array_equal(metrics.confusion(labels, predicted, 8), POSTER_CONFUSION)


@pytest.mark.parametrize(("num_classes", "n"), [(2, 1), (2, 400), (3, 7), (8, 400), (30, 40)])
def test_summary_agrees_with_scikit_learn(num_classes, n):
    _, labels, predicted, _ = predictions_of(n, num_classes, n)
    figures = quiet(metrics.summary, labels, predicted.tolist(), num_classes)
    assert list(figures) == list(metrics.METRIC_NAMES)
    assert figures == pytest.approx(sklearn_summary(labels, predicted), abs=1e-12)


def test_undefined_figures_by_hand():
    # Class 2 is never predicted, class 3 does not occur at all, class 4 is only predicted.
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 4]
    with pytest.warns(UndefinedMetricWarning, match="class 3: neither in the test set nor pred"):
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
    assert [str(warning.message) for warning in caught] == [
        "class 2, 3: never predicted, precision is undefined",
        "class 3, 4: not in the test set, recall is undefined",
    ]
    nan = math.nan
    expected = [
        (1 / 2, 1 / 2, 1 / 2, 2),
        (2 / 3, 1, 4 / 5, 2),
        (nan, 0, 0, 2),
        (nan, nan, nan, 0),
        (0, nan, 0, 0),
    ]
    np.testing.assert_allclose(classes, expected, equal_nan=True)
    assert [type(value) for value in classes[0]] == [float, float, float, int]


def test_roc_curves_by_definition():
    _, labels, _, logits = predictions_of(1, 4, 300)
    for k, curve in enumerate(metrics.roc_curves(labels, logits)):
        positive, scores = labels == k, logits[:, k]
        called = scores >= curve.thresholds[:, np.newaxis]  # (thresholds, images)
        np.testing.assert_allclose(curve.fpr, called[:, ~positive].mean(axis=1))
        np.testing.assert_allclose(curve.tpr, called[:, positive].mean(axis=1))
        assert (curve.fpr[0], curve.tpr[0], curve.thresholds[0]) == (0, 0, math.inf)
        assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)
        # The area is the share of pairs in the right order, a tie being half of one.
        pairs = scores[positive][:, np.newaxis] - scores[~positive]
        assert (pairs == 0).any()
        assert curve.auc == pytest.approx((np.sign(pairs).mean() + 1) / 2, abs=1e-12)


@pytest.mark.parametrize(("used", "undefined"), [([0, 1, 3], "2"), ([1], "0, 1, 2, 3")])
def test_roc_of_absent_classes(used, undefined):
    _, labels, _, logits = predictions_of(2, 4, 60, used)
    with pytest.warns(UndefinedMetricWarning, match=f"^class {undefined}: none or all of the"):
        curves = metrics.roc_curves(labels, logits)
    for k, (curve, row) in enumerate(zip(curves, metrics.class_aucs(labels, logits), strict=True)):
        if str(k) in undefined:
            assert [len(column) for column in curve[:3]] == [0, 0, 0]
            assert np.isnan([curve.auc, *row[:4]]).all()
        else:
            assert row.auc == pytest.approx(roc_auc_score(labels == k, logits[:, k]), abs=1e-12)
        assert row.support == (labels == k).sum()


def test_auc_of_logits_is_not_that_of_softmax():
    _, labels, _, logits = predictions_of(3, 3, 200)
    # No ties but in column 1: whether softmax keeps a tie is a matter of rounding.
    logits = logits + np.random.RandomState(0).normal(0, 1e-3, size=(200, 1)) * [[1, 0, 2]]
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.softmax(logits), probabilities, rtol=1e-12)
    for k, row in enumerate(metrics.class_aucs(labels, logits)):
        positive = labels == k
        assert row.auc == pytest.approx(roc_auc_score(positive, logits[:, k]))
        assert row.auc_softmax == pytest.approx(roc_auc_score(positive, probabilities[:, k]))
        assert row.auc_softmax != row.auc
        assert row[:3] == metrics.delong_interval(positive, logits[:, k])


def test_softmax_does_not_overflow():
    result = metrics.softmax(np.array([[1e4, 0, 1e4], [-1e4, -1e4, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(result, [[0.5, 0, 0.5], [1 / 3] * 3], rtol=1e-14)


GOOD = [0, 1, 1]


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (metrics.summary, (GOOD, [0, 1], 2), "labels: .* inconsistent numbers of samples"),
        (metrics.summary, (GOOD, [0, 1, 2], 2), "predicted classes: .* integers from 0 to 1"),
        (metrics.summary, ([0, -1, 0], GOOD, 2), "labels: give class indices"),
        (metrics.summary, ([], [], 2), r"labels: .*0 sample\(s\)"),
        (metrics.summary, ([[0, 1], [1, 1], [1, 1]], GOOD, 2), "labels: .*1d array"),
        (metrics.per_class, ([0.0, 1.0, 1.0], GOOD, 2), "labels: give class indices, integers"),
        (metrics.confusion, (["a", "b", "c"], GOOD, 2), "labels: .*bytes/strings"),
        (metrics.summary_from_confusion, ([[1, 2, 3]],), r"give \(K, K\) counts"),
        (metrics.summary_from_confusion, ([[0, 0], [0, 0]],), "not all of them 0"),
        (metrics.bootstrap_intervals, ([[0.5, 0.5], [0, 1]],), "counts of images"),
        (metrics.roc_curves, (GOOD, [[0, 1], [0, math.nan], [1, 1]]), "scores: .*NaN"),
        (metrics.class_aucs, (GOOD, [1.0, 2.0, 3.0]), "logits: Expected 2D array"),
        (metrics.softmax, ([[1.0], [2.0]],), r"logits: .*1 feature\(s\)"),
        (metrics.delong_interval, (GOOD, [1, 2, 3]), "positive: give booleans"),
        (metrics.tables, (predictions_of(), NAMES[:3]), "3 class names, 4 logits"),
    ],
)
def test_bad_arrays(function, arguments, words):
    with pytest.raises(MetricsError, match=words) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


# ---- intervals -----------------------------------------------------------------------------------


def test_bootstrap_of_the_poster():
    # NumPy promises that RandomState's stream never changes, so these are the same everywhere.
    intervals = metrics.bootstrap_intervals(POSTER_CONFUSION)
    assert list(intervals) == list(metrics.METRIC_NAMES)
    expected = [
        [0.6345, 0.64294],
        [0.536891924852074, 0.5482974894055691],
        [0.5302536117818577, 0.5410263316993901],
        [0.5612816181017718, 0.5745682719057594],
    ]
    np.testing.assert_allclose(list(intervals.values()), expected, rtol=1e-12)
    # Accuracy is binomial: its interval is known in closed form.
    reach = 1.959964 * math.sqrt(0.6387 * (1 - 0.6387) / 50_000)
    assert intervals["accuracy"] == pytest.approx((0.6387 - reach, 0.6387 + reach), abs=2e-4)
    assert metrics.bootstrap_intervals(POSTER_CONFUSION, seed=1) != intervals


def test_bootstrap_agrees_with_resampling_images():
    _, labels, predicted, _ = predictions_of(4, 3, 150)
    few, many = 300, 20_000
    generator = np.random.RandomState(0)
    resampled = []
    for _ in range(few):
        drawn = generator.randint(len(labels), size=len(labels))
        resampled.append(list(sklearn_summary(labels[drawn], predicted[drawn]).values()))
    matrix = metrics.confusion(labels, predicted, 3)
    for level, density in ((0.95, 0.0584451), (0.8, 0.1754983)):  # the normal's at its quantiles
        tail = (1 - level) / 2
        intervals = metrics.bootstrap_intervals(matrix, replicates=many, seed=1, level=level)
        for interval, values in zip(intervals.values(), np.transpose(resampled), strict=True):
            share = math.sqrt(tail * (1 - tail) * (1 / few + 1 / many))
            error = 5 * values.std() * share / density  # five standard errors of a quantile
            np.testing.assert_allclose(interval, np.quantile(values, [tail, 1 - tail]), atol=error)


@pytest.mark.parametrize("seed", range(12))
def test_a_replicate_averages_over_the_classes_that_occur_in_it(seed):
    matrix = np.array([[3, 1, 0, 0], [1, 2, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0]])
    cells = np.nonzero(matrix)
    draw = np.zeros_like(matrix)
    draw[cells] = np.random.RandomState(seed).multinomial(matrix.sum(), matrix[cells] / 11)
    intervals = metrics.bootstrap_intervals(matrix, replicates=1, seed=seed)
    for name, value in sklearn_summary(*expand(draw)).items():
        assert intervals[name] == pytest.approx((value, value), abs=1e-12)


def delong_by_definition(positive, scores, quantile):
    """DeLong, DeLong & Clarke-Pearson 1988, equations (1) to (6), for one curve."""
    cases, controls = scores[positive].astype(float), scores[~positive].astype(float)
    kernel = (np.sign(cases[:, np.newaxis] - controls) + 1) / 2
    area = kernel.mean()
    s10 = ((kernel.mean(axis=1) - area) ** 2).sum() / (len(cases) - 1)
    s01 = ((kernel.mean(axis=0) - area) ** 2).sum() / (len(controls) - 1)
    reach = quantile * math.sqrt(s10 / len(cases) + s01 / len(controls))
    return area, max(0, area - reach), min(1, area + reach)


@pytest.mark.parametrize("scale", [1, 3, None])
def test_delong_by_definition(scale):
    generator = np.random.RandomState(7)
    positive = generator.uniform(size=120) < 0.3
    scores = generator.normal(size=120) + positive
    if scale:
        scores = np.round(scores * scale)
    assert (len(np.unique(scores)) < 60) == bool(scale)  # ties, or none
    for level, quantile in ((0.95, 1.959963984540054), (0.9, 1.6448536269514722)):
        expected = delong_by_definition(positive, scores, quantile)
        assert metrics.delong_interval(positive, scores, level) == pytest.approx(expected)


def test_delong_by_hand():
    nan, few = math.nan, [True, True, False, False]
    low = 0.75 - 1.959963984540054 * math.sqrt((0.125 + 0.125) / 2)
    assert metrics.delong_interval(few, [4, 2, 3, 1]) == pytest.approx((0.75, low, 1))  # cut to 1
    assert metrics.delong_interval(few, [3, 4, 1, 2]) == (1, 1, 1)
    assert metrics.delong_interval(few, [3, 1, 4, 2])[:2] == (0.25, 0)  # cut to 0
    one = metrics.delong_interval([True, False, False], [2, 1, 3])
    np.testing.assert_equal(one, (0.5, nan, nan))
    for only in (True, False):
        np.testing.assert_equal(metrics.delong_interval([only] * 2, [1, 2]), (nan, nan, nan))


# ---- files ---------------------------------------------------------------------------------------


def test_csv(tmp_path):
    values = [1 / 3, np.float32(0.1), 5e-324, math.nan, -math.inf, np.int64(-7)]
    rows = [[NAMES[i % 4], value] for i, value in enumerate(values)]
    text = metrics.csv_text(["name", "value"], rows)
    assert text == (
        'name,value\n"Collecting Duct, Connecting Tubule",0.3333333333333333\n'
        '"a ""quoted"" name",0.1\n"two\nlines",5e-324\nGröße $x$ | µ,nan\n'
        '"Collecting Duct, Connecting Tubule",-inf\n"a ""quoted"" name",-7\n'
    )
    metrics.write(tmp_path / "a.csv", text)
    assert (tmp_path / "a.csv").read_bytes() == text.encode()
    header, read = metrics.read_csv(tmp_path / "a.csv")
    assert header == ["name", "value"]
    assert read == [[name, str(value)] for name, value in rows]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        metrics.write(tmp_path / "gone" / "a.csv", "a\n")
    path = tmp_path / "a.csv"
    metrics.write(path, "caf\udce9\n")  # a folder's name in Latin-1
    write_bytes = Path.write_bytes
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def full(self, content, error=error):
            write_bytes(self, content[:1])
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(Path, "write_bytes", full)
            metrics.write(path, b"new")
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == b"caf\\udce9\n"


def test_predictions_round_trip(tmp_path):
    bits = np.random.RandomState(0).randint(2**32, size=(3000, 3), dtype=np.uint64)
    logits = bits.astype(np.uint32).view(np.float32)
    logits = logits[np.isfinite(logits).all(axis=1)]
    largest, least = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    logits[:2] = [[largest, -largest, 0], [-0.0, least, -least]]
    ids = np.random.RandomState(1).permutation(len(logits)) - 10
    ids[:2] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    written = Predictions(ids, np.arange(len(ids)) % 3, logits.argmax(axis=1), logits)
    text = metrics.predictions_text(written)
    assert text.startswith(
        "id,label,predicted,logit_0,logit_1,logit_2\n9223372036854775807,0,0,3.4"
    )
    metrics.write(tmp_path / "p.csv", text)
    for before, after in zip(written, metrics.read_predictions(tmp_path / "p.csv"), strict=True):
        assert before.dtype == after.dtype
        assert before.tobytes() == after.tobytes()  # the sign of zero as well


HEADER = "id,label,predicted,logit_0,logit_1\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEADER, "no row below the header"),
        (HEADER + "0,1,1,0.5,1", "cut short"),
        ("id,label,predicted,logit_0\n0,0,0,1\n", "row 1 is not id,label"),
        ("0,1,1,0.5,1\n", "row 1 is not"),
        (HEADER + "0,1,1,0.5,1\n0,1,1,0.5\n", "row 3 has 4 cells, the header 5"),
        (HEADER + "0,1,1,0.5,1\n\n1,1,1,0.5,1\n", "row 3 has 1 cells"),
        (HEADER + "0,1,1,0.5,1\n1,1,1,0.5,x\n", "'x' to float32 at row 3, column 5"),
        (HEADER + "0,1.5,1,0.5,1\n", "'1.5' to int64 at row 2, column 2"),
        (HEADER + f"{2**63},1,1,0.5,1\n", "to int64 at row 2, column 1"),
        (HEADER + "0,1,1,nan,1\n", "row 2, column logit_0: not finite"),
        (HEADER + "0,1,1,0.5,1e39\n", "row 2, column logit_1: not finite"),
        (HEADER + "0,2,1,0.5,1\n", "row 2, column label: not 0 to 1"),
        (HEADER + "0,-1,1,0.5,1\n", "row 2, column label: not 0 to 1"),
        (HEADER + "0,1,1,0.5,1\n1,1,2,0.5,1\n", "row 3, column predicted: not the"),
        (HEADER + "0,1,1,1,1\n", "row 2, column predicted: not the"),  # not the first maximum
        (HEADER + "7,1,1,0,1\n8,1,1,0,1\n7,0,1,0,1\n", "row 4, column id: stands in an earlier"),
    ],
)
def test_malformed_predictions(tmp_path, content, words):
    refuses(metrics.read_predictions, tmp_path / "p.csv", content.encode(), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"a,b\n1,2", "cut short"),
        (b"a,b\n1,\xff2\n", "byte 6 is not UTF-8"),
        (b"\n", "row 1 has 0 cells"),
        (b"a,b\n\n1,2\n", "row 2 has 0 cells, the header 2"),
        (b"a,b\n1,2\n1,2,3\n", "row 3 has 3 cells, the header 2"),
        (b'a,b\n1,"2\n', "not a CSV file"),
    ],
)
def test_malformed_csv(tmp_path, content, words):
    refuses(metrics.read_csv, tmp_path / "a.csv", content, words)


def refuses(function, path, content, words):
    path.write_bytes(content)
    with pytest.raises(MetricsError, match=f"{path}: .*{words}") as caught:
        function(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.array([3, 3])}, "row 3, column id"),
        ({"labels": np.array([0, 2])}, "row 3, column label"),
        ({"labels": np.array([0.0, 1.0])}, "labels, predicted as int64"),
        ({"predicted": np.array([1, 0])}, "row 3, column predicted"),
        ({"logits": np.array([[0, 1], [0, np.nan]], np.float32)}, "logit_1: .*did training div"),
        ({"logits": np.array([[0.0, 1.0], [0.0, 1.0]])}, "logits as float32"),
    ],
)
def test_predictions_that_would_not_be_read(change, words):
    logits = np.array([[0, 1], [0, 1]], np.float32)
    good = Predictions(np.array([0, 1]), np.array([0, 1]), np.array([1, 1]), logits)
    assert metrics.predictions_text(good) == HEADER + "0,0,1,0,1\n1,1,1,0,1\n"
    with pytest.raises(MetricsError, match=words):
        metrics.predictions_text(good._replace(**change))


def test_tables():
    predictions = predictions_of(6, used=[0, 1, 3])
    with pytest.warns(UndefinedMetricWarning) as caught:
        tables = metrics.tables(predictions, NAMES)
    assert [str(w.message) for w in caught] == ["class 2: not in the test set, recall is undefined"]
    _, labels, predicted, logits = predictions
    named = [[k, name] for k, name in enumerate(NAMES)]
    classes = quiet(metrics.per_class, labels, predicted, 4)
    aucs = metrics.class_aucs(labels, logits)
    matrix = metrics.confusion(labels, predicted, 4).tolist()
    expected = {
        "confusion.csv": (
            "label,predicted_0,predicted_1,predicted_2,predicted_3",
            [[k, *row] for k, row in enumerate(matrix)],
        ),
        "per_class.csv": (
            "class,name,precision,recall,f1,support",
            [[*name, *row] for name, row in zip(named, classes, strict=True)],
        ),
        "roc/auc.csv": (
            "class,name,auc,auc_low,auc_high,auc_softmax,support",
            [[*name, *row] for name, row in zip(named, aucs, strict=True)],
        ),
    }
    for k, curve in enumerate(quiet(metrics.roc_curves, labels, logits)):
        points = [[*map(float, point)] for point in zip(*curve[:3], strict=True)]
        expected[f"roc/class_{k}.csv"] = ("fpr,tpr,threshold", points)
    assert expected["roc/class_2.csv"][1] == []
    assert list(tables) == list(expected)
    for name, (header, rows) in expected.items():
        assert tables[name][0] == header.split(",")
        assert repr(tables[name][1]) == repr(rows)  # types, and NaN is NaN


def test_markdown_table():
    assert metrics.markdown_table(["metric", "b"], [["a|b", 1], ["longer one", "0.6387"]]) == (
        "| metric     |      b |\n"
        "| ---------- | -----: |\n"
        "| a\\|b       |      1 |\n"
        "| longer one | 0.6387 |\n"
    )


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture
def predictions_csv(tmp_path):
    metrics.write(tmp_path / "p.csv", metrics.predictions_text(predictions_of()))
    return tmp_path / "p.csv"


def test_main_prints_the_table(predictions_csv, capsys):
    assert metrics.main([str(predictions_csv)]) == 0
    captured = capsys.readouterr()
    _, labels, predicted, logits = predictions_of()
    figures = sklearn_summary(labels, predicted)
    area = roc_auc_score(labels == 3, logits[:, 3])
    assert captured.out.startswith("100 images, 4 classes\n\n| metric ")
    assert re.search(rf"\| accuracy +\| {figures['accuracy']:.4f} \| 0\.\d{{4}} to ", captured.out)
    assert re.search(rf"\| macro F1 +\| {figures['f1']:.4f} \|", captured.out)
    assert re.search(rf"\| 3 .*\| {area:.4f} \| +0\.\d{{4}} to [01]\.\d{{4}} \|\n$", captured.out)
    assert captured.err == ""


def test_main_says_what_is_undefined(tmp_path, capsys):
    (tmp_path / "p.csv").write_text(HEADER + "0,0,0,1,0\n1,0,1,0,1\n")
    assert metrics.main([str(tmp_path / "p.csv")]) == 0
    captured = capsys.readouterr()
    assert re.search(r"\| 1 .* nan to nan \|\n$", captured.out)
    warned = "metrics.py: warning: class 1: not in the test set, recall is undefined\n"
    assert captured.err == warned


def test_main_reports_errors_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.csv").touch()
    assert metrics.main([str(tmp_path / "none.csv")]) == 2
    assert metrics.main([str(tmp_path / "empty.csv")]) == 2
    with pytest.raises(SystemExit, match="2"):
        metrics.main([])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"(metrics\.py: error: .*\n){3}", captured.err)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "read_predictions", interrupted)
    assert metrics.main(["p.csv"]) == 130


def test_main_stops_quietly_where_its_reader_does(predictions_csv):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, metrics.__file__, str(predictions_csv)]
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


def test_alone_in_an_empty_folder(predictions_csv):
    shutil.copy(metrics.__file__, predictions_csv.parent)
    code = "import sys, metrics; sys.exit(metrics.main(['p.csv']) or 'matplotlib' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=predictions_csv.parent, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("100 images, 4 classes\n")


# ---- figures -------------------------------------------------------------------------------------

FEW = predictions_of(6, used=[0, 1, 3])  # what the run's folder is made of
AREA, LOW, HIGH = metrics.delong_interval(FEW.labels == 3, FEW.logits[:, 3])
TRIALS = [(1, 0, 0.5), (1, 1, 1.5), (1, 2, None), (1, 3, 900), (3, 1, 1.0)]


def fill(folder, **files):
    """Write CSV files: name=(header, rows)."""
    folder.mkdir(exist_ok=True)
    for name, (header, rows) in files.items():
        metrics.write(folder / f"{name}.csv", metrics.csv_text(header.split(","), rows))


def log_line(resource, trial, loss):
    return json.dumps({"bracket": 1, "trial": trial, "resource": resource, "loss": loss}) + "\n"


@pytest.fixture
def folders(tmp_path):
    """Return a folder with "run", class 2 of 4 not in its test set, and with "poster"."""
    pytest.importorskip("matplotlib")
    (tmp_path / "run" / "roc").mkdir(parents=True)
    for name, table in quiet(metrics.tables, FEW, NAMES).items():
        metrics.write(tmp_path / "run" / name, metrics.csv_text(*table))
    metrics.write(tmp_path / "run" / "tuning.jsonl", "".join(log_line(*trial) for trial in TRIALS))
    fill(
        tmp_path / "run",
        history=(
            "epoch,learning_rate,train_loss,valid_loss,train_accuracy,valid_accuracy,seconds",
            [[e, 0.1 if e < 9 else 0.03, 1 / (e + 1), math.nan, 0.5, 0.4, 2.5] for e in range(12)],
        ),
        compare=(
            "system,training_images,accuracy,train_seconds,predict_seconds_per_1000,model_mb,note",
            [["KNN", n, 0.5, n / 9, 0.1, math.nan, "a, b"] for n in (10**3, 10**6, 10**5)]
            + [["CNN", 10**4, 0.5, 20, 0.1, 0.98, ""]],
        ),
    )
    fill(
        tmp_path / "poster",
        per_class=("class,name,ratio", [[k, NAMES[k], 0.01 * k] for k in range(4)]),
        auc=("class,name,auc,printed", [[k, NAMES[k], 0.8 + 0.011 * k, 0.8] for k in range(4)]),
        roc=("fpr,tpr_0,tpr_1,tpr_2,tpr_3", [[x, *[x**0.5] * 4] for x in (0, 0.25, 0.5, 1)]),
        history=(
            "epoch,train_loss,valid_loss,train_accuracy,valid_accuracy",
            [[e, 1.3 - e / 100, 1.2, 0.5, 0.4] for e in range(40)],
        ),
    )
    columns = ",".join(f"predicted_{k}" for k in range(8))
    rows = [[k, *row] for k, row in enumerate(POSTER_CONFUSION.tolist())]
    fill(tmp_path / "poster", confusion=(f"label,{columns}", rows))
    return tmp_path


@pytest.mark.parametrize(
    ("figure", "folder", "reference", "words"),
    [
        ("class_ratios", "run", None, [f"0: {NAMES[0]}", "2: two lines", f"3: {NAMES[3]}", "0.4"]),
        ("class_ratios", "poster", None, ["0", "0.01", "0.02", "0.03"]),
        ("confusion", "run", None, ["predicted class", "true class", "share of the true class"]),
        ("confusion", "poster", None, [str(count) for count in POSTER_CONFUSION.ravel()]),
        ("roc", "run", None, [f"AUC {AREA:.3f}", f"({LOW:.3f} to {HIGH:.3f})", "AUC undefined"]),
        ("roc", "run", "poster", ["this run", "poster", "poster 0.811", f"3: {NAMES[3]}"]),
        ("roc", "poster", None, ["AUC 0.833", "class ratio 0.03", "true positive rate"]),
        ("history", "run", None, ["training", "validation", "learning rate drops", "epoch"]),
        ("history", "run", "poster", ["training", "validation", "learning rate drops", "poster"]),
        ("history", "poster", None, ["training", "validation", "accuracy", "loss"]),
        ("search", "run", None, ["trial", "lowest loss", "failed (1)", "1", "3", "epochs"]),
        ("growth", "run", None, ["CNN", "KNN", "training images", "10k", "model (MB)"]),
    ],
)
def test_figures(folders, figure, folder, reference, words):
    draw = getattr(metrics, f"draw_{figure}")
    arguments = [folders / folder, folders / "a", *([folders / reference] if reference else [])]
    svg, texts = drawn_twice(draw, *arguments)
    assert set(words) <= set(texts)
    assert ("learning rate drops" in texts) == ((figure, folder) == ("history", "run"))
    # The poster's curves are the only black dashes: four of them and one in the legend.
    dashes = re.findall(r"stroke-dasharray: [^\"]*stroke: #000000", svg)
    assert len(dashes) == (5 if reference else 0)


def test_draw_search_highlights_the_lowest_loss_after_the_most_epochs(folders):
    metrics.draw_search(folders / "run", folders / "a")
    svg = (folders / "a.svg").read_text()
    (path,) = re.findall(r'd="([^"]*)" clip-path=[^>]*stroke: #0072b2; stroke-width: 2[;"]', svg)
    assert path.count("L") == 1  # from 1 epoch to 3; trial 0 had a lower loss, but 1 epoch


def drawn_twice(draw, *arguments):
    """Return the SVG and its texts, having checked that it has the same bytes each time."""
    draw(*arguments)
    stem = next(argument for argument in arguments if getattr(argument, "name", "") == "a")
    pictures = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    first = [picture.read_bytes() for picture in pictures]
    draw(*arguments)
    assert first == [picture.read_bytes() for picture in pictures]
    assert first[0].startswith(b"\x89PNG\r\n\x1a\n")
    texts = ElementTree.fromstring(first[1]).iter("{http://www.w3.org/2000/svg}text")
    return first[1].decode(), ["".join(text.itertext()).strip() for text in texts]


@pytest.mark.parametrize("shape", [(8, 8), (8, 10, 1), (12, 8, 3)])
def test_draw_samples(folders, shape):
    images = np.random.RandomState(0).randint(256, size=(30, *shape), dtype=np.uint8)
    arguments = images, np.arange(30) % 4, [*"abcd", "none"], folders / "a", 9
    _, texts = drawn_twice(metrics.draw_samples, *arguments)
    assert texts == ["0: a", "1: b", "2: c", "3: d", "4: none"]


@pytest.mark.parametrize(
    ("name", "content", "figure", "words"),
    [
        ("per_class.csv", "class,name,support\n0,a,many\n", "class_ratios", "column support"),
        ("per_class.csv", "class,name,support\n", "class_ratios", "no row below"),
        ("history.csv", "epoch\n0\n", "history", "no column train_accuracy"),
        ("tuning.jsonl", log_line(1, 0, 1.0) + "[1]\n", "search", "row 2 is no trial"),
        ("tuning.jsonl", '{"bracket": 1}\n', "search", "row 1 is no trial"),
        ("tuning.jsonl", log_line("x", 0, 1.0), "search", "row 1 is no trial"),
    ],
)
def test_a_figure_of_a_damaged_file(tmp_path, name, content, figure, words):
    draw = getattr(metrics, f"draw_{figure}")
    refuses(
        lambda path: draw(path.parent, tmp_path / "a"), tmp_path / name, content.encode(), words
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_figures_neither_heed_nor_change_the_settings_of_matplotlib(folders):
    code = (
        "import sys, metrics; from matplotlib import rcParams; rcParams['axes.facecolor'] = 'red'; "
        # Looking at the key 'backend' makes matplotlib load pyplot and look for a display.
        "state = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}; "
        "before = state(); metrics.draw_class_ratios('poster', 'a'); "
        "assert state() == before and before['axes.facecolor'] == 'red'; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    shutil.copy(metrics.__file__, folders)
    subprocess.run([sys.executable, "-c", code], cwd=folders, check=True)
    metrics.draw_class_ratios(folders / "poster", folders / "b")
    assert (folders / "a.png").read_bytes() == (folders / "b.png").read_bytes()
