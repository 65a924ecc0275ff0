"""Tests of metrics.py; the oracles are scikit-learn, definitions written out, and hand counts."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

import metrics
from metrics import MetricsError, Predictions

HOME = Path(metrics.__file__).parent
POSTER = HOME / "results" / "reference" / "poster"
POSTER_CONFUSION = np.loadtxt(POSTER / "confusion.csv", int, delimiter=",", skiprows=1)[:, 1:]
POSTER_AREAS = [0.868, 0.760, 0.961, 0.944, 0.915, 0.939, 0.880, 0.817]
NAMES = ["Collecting Duct, Connecting Tubule", 'a "quoted" name', "two\nlines", "Größe $x$ | µ"]


def predictions_of(seed=5, num_classes=4, n=100, used=None):
    """Return Predictions; only the classes in `used` occur as labels."""
    generator = np.random.RandomState(seed)
    labels = generator.choice(num_classes if used is None else used, n).astype(np.int64)
    logits = (generator.normal(size=(n, num_classes)) + np.eye(num_classes)[labels]).astype("f4")
    ids = np.array([hashlib.sha256(row).hexdigest()[:16] for row in logits])
    return Predictions(ids, labels, logits.argmax(axis=1), logits)


def sklearn_summary(labels, predicted):
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    accuracy = accuracy_score(labels, predicted)
    return {"accuracy": accuracy, "f1": f1, "recall": recall, "precision": precision}


def expand(matrix):
    true, predicted = np.nonzero(matrix)
    counts = matrix[true, predicted]
    return np.repeat(true, counts), np.repeat(predicted, counts)


# ---- numbers -------------------------------------------------------------------------------------


def test_metrics_of_the_poster():
    values = metrics.summary_from_confusion(POSTER_CONFUSION)
    # The poster's table has .6387, .5426, .5356 and .5678 (cut, not rounded).
    exact = {"accuracy": 0.638700, "f1": 0.542641, "recall": 0.535631, "precision": 0.567883}
    assert values == pytest.approx(exact, abs=5e-7)
    labels, predicted = expand(POSTER_CONFUSION)
    assert metrics.summary(labels, predicted, 8) == values
    np.testing.assert_array_equal(metrics.confusion(labels, predicted, 8), POSTER_CONFUSION)


def test_undefined_metrics_by_hand():
    # Class 2 is never predicted, class 3 does not occur at all, class 4 is only predicted.
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 4]
    values = metrics.summary(labels, predicted, 5)
    by_hand = [3 / 6, (1 / 2 + 4 / 5) / 4, (1 / 2 + 1) / 4, (1 / 2 + 2 / 3) / 4]
    assert list(values.values()) == pytest.approx(by_hand)
    nan = math.nan
    expected = [(1 / 2, 1 / 2, 1 / 2, 2), (2 / 3, 1, 4 / 5, 2)]
    expected += [(nan, 0, 0, 2), (nan, nan, nan, 0), (0, nan, 0, 0)]
    np.testing.assert_allclose(metrics.per_class(labels, predicted, 5), expected, equal_nan=True)


def test_support_is_an_integer_where_no_prediction_is_right():
    supports = [row.support for row in metrics.per_class([0, 1], [1, 0], 3)]
    assert [*map(repr, supports)] == ["1", "1", "0"]


def test_roc_curves_by_definition():
    _, labels, _, logits = predictions_of(1, 4, 300)
    logits = np.round(logits * 8) / 8
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


@pytest.mark.parametrize("used", [[0, 1, 3], [1]])
def test_curves_of_classes_without_images_or_with_all_of_them(used):
    _, labels, _, logits = predictions = predictions_of(2, 4, 60, used)
    rows = metrics.tables(predictions, NAMES)["roc/auc.csv"][1]
    for k, curve in enumerate(metrics.roc_curves(labels, logits)):
        assert np.isnan(curve.tpr).all() == (k not in used)
        assert np.isnan(curve.fpr).all() == (used == [k])
        is_undefined = k not in used or used == [k]
        assert [*np.isnan(rows[k][2:])] == [is_undefined] * 4 + [False]
    assert np.isnan(rows[-1][2:6]).all()


@pytest.mark.parametrize("wrong", [[0, 1, 2], [0, -1, 0], [0.0, 1.0, 1.0], ["a", "b", "c"]])
def test_wrong_labels(wrong):
    for function, *arguments in (
        (metrics.summary, wrong, [0, 1, 1], 2),
        (metrics.per_class, [0, 1, 1], wrong, 2),
        (metrics.roc_curves, wrong, np.eye(3)[:, :2]),
    ):
        with pytest.raises(MetricsError, match="integers from 0 to 1"):
            function(*arguments)


def test_bootstrap_of_accuracy_in_closed_form():
    reach = 1.959964 * math.sqrt(0.6387 * (1 - 0.6387) / 50_000)  # accuracy is binomial
    for seed in (0, 1):
        interval = metrics.bootstrap_intervals(POSTER_CONFUSION, seed)["accuracy"]
        assert interval == pytest.approx((0.6387 - reach, 0.6387 + reach), abs=2e-4)


def test_bootstrap_agrees_with_scikit_learn(monkeypatch):
    monkeypatch.setattr(metrics, "REPLICATES", 60)
    matrix = np.array([[3, 1, 0, 0], [1, 2, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0]])
    # NumPy promises that RandomState's stream never changes.
    draws = np.random.RandomState(0).multinomial(11, matrix.ravel() / 11, 60).reshape(60, 4, 4)
    assert 0 < ((draws.sum(1) + draws.sum(2)) == 0).any(axis=1).sum() < 60  # a class is missing
    values = [list(sklearn_summary(*expand(draw)).values()) for draw in draws]
    expected = np.quantile(values, [0.025, 0.975], axis=0).T
    intervals = metrics.bootstrap_intervals(matrix)
    assert list(intervals) == list(metrics.METRIC_NAMES)
    np.testing.assert_allclose(list(intervals.values()), expected)


def test_delong_by_definition():
    generator = np.random.RandomState(7)
    positive = generator.uniform(size=120) < 0.3
    scores = np.round(generator.normal(size=120) + positive)  # with many ties
    # DeLong, DeLong & Clarke-Pearson 1988, equations (1) to (6), for one curve.
    cases, controls = scores[positive], scores[~positive]
    kernel = (np.sign(cases[:, np.newaxis] - controls) + 1) / 2
    area = kernel.mean()
    s10 = ((kernel.mean(axis=1) - area) ** 2).sum() / (len(cases) - 1)
    s01 = ((kernel.mean(axis=0) - area) ** 2).sum() / (len(controls) - 1)
    reach = 1.959963984540054 * math.sqrt(s10 / len(cases) + s01 / len(controls))
    expected = pytest.approx((area - reach, area + reach))
    assert metrics.delong_interval(positive, scores) == expected


def test_delong_intervals_are_cut_to_0_and_1_and_need_two_of_each():
    few = [True, True, False, False]
    assert metrics.delong_interval(few, [4, 2, 3, 1])[1] == 1
    assert metrics.delong_interval(few, [3, 1, 4, 2])[0] == 0
    assert metrics.delong_interval(few, [3, 4, 1, 2]) == (1, 1)
    for single in ([True, False, False], [False, True, True], [True, True, True]):
        assert np.isnan(metrics.delong_interval(single, [2, 1, 3])).all()


# ---- files ---------------------------------------------------------------------------------------


def refuses(function, path, content, words):
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(MetricsError, match=f"{path}: .*{words}") as caught:
        function(path)
    assert "\n" not in str(caught.value)


def test_csv(tmp_path):
    values = [1 / 3, np.float32(0.1), math.nan, -math.inf, np.int64(-7)]
    rows = [[NAMES[i % 4], value] for i, value in enumerate(values)]
    text = metrics.csv_text(["name", "value"], rows)
    assert text == (
        'name,value\n"Collecting Duct, Connecting Tubule",0.3333333333333333\n'
        '"a ""quoted"" name",0.1\n"two\nlines",nan\nGröße $x$ | µ,-inf\n'
        '"Collecting Duct, Connecting Tubule",-7\n'
    )
    path = tmp_path / "a.csv"
    for start in ("", "\N{BYTE ORDER MARK}"):
        metrics.write(path, start + text)
        assert path.read_bytes() == (start + text).encode()
        assert metrics.read_csv(path) == (["name", "value"], [[n, str(v)] for n, v in rows])
    assert metrics.read_column(path, "name", str) == [name for name, _ in rows]
    refuses(metrics.read_csv, path, "", "empty")
    refuses(metrics.read_csv, path, 'a,b\n1,"2\n', "not a CSV file")
    refuses(metrics.read_csv, path, "a,b\n1,2\n1\n", "row 3 has 1 cells, not 2")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    metrics.write(path, "caf\udce9\n")  # a folder's name in Latin-1

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        metrics.write(path, b"new")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"caf\\udce9\n"


def test_predictions_round_trip(tmp_path):
    bits = np.random.RandomState(0).randint(2**32, size=(3000, 3), dtype=np.uint32)
    logits = bits.view(np.float32)[np.isfinite(bits.view(np.float32)).all(axis=1)]
    largest, least = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    logits[:2] = [[largest, -largest, 0], [-0.0, least, -least]]
    ids = np.array(["00000000000000e0", "f" * 16, *["12"] * (len(logits) - 2)])
    written = Predictions(ids, np.arange(len(ids)) % 3, logits.argmax(axis=1), logits)
    text = metrics.predictions_text(written)
    assert text.startswith("id,label,predicted,logit_0,logit_1,logit_2\n00000000000000e0,0,0,3")
    for start in ("", "\N{BYTE ORDER MARK}"):
        metrics.write(tmp_path / "p.csv", start + text)
        read = metrics.read_predictions(tmp_path / "p.csv")
        for before, after in zip(written, read, strict=True):
            assert before.dtype == after.dtype
            assert before.tobytes() == after.tobytes()  # the sign of zero as well


HEADER = "id,label,predicted,logit_0,logit_1\n"
ROW = HEADER + "a,1,1,0.5,1\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ROW + "a,1,1,0.5,1", "cut short"),
        (ROW + "a,1,1,0.5,\udcff1\n", "row 1, column 5"),
        (ROW + "a,1,1,0.5\n", "row 3 has 4 cells"),
        (ROW + "\n", "expected rows of id,label"),
        (HEADER, "expected rows of id,label"),
        ("id,label,predicted,logit_0\na,0,0,1\n", "expected rows of id,label"),
        ("id,label,predicted,logit_0,logit_1,correct\na,1,1,0.5,1,1\n", "no other columns"),
        (ROW + "a,1,1,0.5,x\n", "'x' .* row 1, column 5"),
        (ROW + "a,1,1,0.5,1e39\n", "row 3: a logit is not finite"),
        (ROW + "a,2,1,0.5,1\n", "row 3: the label is not 0 to 1"),
        (ROW + "a,1,1,1,1\n", "row 3: predicted is not the"),  # not the first maximum
    ],
)
def test_malformed_predictions(tmp_path, content, words):
    refuses(metrics.read_predictions, tmp_path / "p.csv", content, words)


def test_logits_of_a_training_that_diverged_are_not_written():
    predictions = predictions_of()
    predictions.logits[1, 2] = math.nan
    with pytest.raises(MetricsError, match=r"did training diverge\?"):
        metrics.predictions_text(predictions)


def test_tables():
    _, labels, predicted, logits = predictions = predictions_of(6)
    tables = metrics.tables(predictions, NAMES)
    assert {name: ",".join(header) for name, (header, _) in tables.items()} == {
        "confusion.csv": "label,predicted_0,predicted_1,predicted_2,predicted_3",
        "per_class.csv": "class,name,precision,recall,f1,support",
        "roc/auc.csv": "class,name,auc,auc_low,auc_high,auc_softmax,support",
        **{f"roc/class_{k}.csv": "fpr,tpr,threshold" for k in range(4)},
        "table.csv": "metric,value,low_95,high_95",
    }
    rows = {name: rows for name, (_, rows) in tables.items()}
    cells = [cell for file in rows.values() for row in file for cell in row]
    assert {type(cell) for cell in cells} == {int, str, float}

    matrix = metrics.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(np.array(rows["confusion.csv"])[:, 1:], matrix)
    values, intervals = sklearn_summary(labels, predicted), metrics.bootstrap_intervals(matrix)
    assert rows["table.csv"] == [
        [name, pytest.approx(values[key]), *intervals[key]]
        for key, name in metrics.METRIC_NAMES.items()
    ]
    columns = precision_recall_fscore_support(labels, predicted)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    *areas, mean = rows["roc/auc.csv"]
    for k, name in enumerate(NAMES):
        expected = pytest.approx([column[k] for column in columns])
        assert rows["per_class.csv"][k][:2] == [k, name]
        assert rows["per_class.csv"][k][2:] == expected
        positive, points = labels == k, np.array(rows[f"roc/class_{k}.csv"])
        area = pytest.approx(roc_auc_score(positive, logits[:, k]))
        assert np.trapezoid(points[:, 1], points[:, 0]) == area
        interval = metrics.delong_interval(positive, logits[:, k])
        of_softmax = pytest.approx(roc_auc_score(positive, probabilities[:, k]))
        assert areas[k] == [k, name, area, *interval, of_softmax, positive.sum()]
    # The mean by softmax is as MedMNIST's evaluator has it.
    of_softmax = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert mean[:3] == ["mean", "", pytest.approx(statistics.fmean(row[2] for row in areas))]
    assert np.isnan(mean[3:5]).all()
    assert mean[5:] == [pytest.approx(of_softmax), 100]
    with pytest.raises(MetricsError, match="3 class names, 4 logits"):
        metrics.tables(predictions, NAMES[:3])


def test_markdown_tables(tmp_path):
    rows = [["a|b", "1", 1 / 3], ["longer one", "0.6387", math.nan]]
    text = (
        "| metric     |      b |   cost |\n"
        "| ---------- | -----: | -----: |\n"
        "| a\\|b       |      1 | 0.3333 |\n"
        "| longer one | 0.6387 |    nan |\n"
    )
    assert metrics.markdown_table(["metric", "b", "cost"], rows) == text
    metrics.write(tmp_path / "a.csv", metrics.csv_text(["metric", "b", "cost"], rows))
    assert metrics.csv_table(tmp_path / "a.csv") == text


def test_spread_over_runs(tmp_path, capsys):
    paths = [str(tmp_path / f"{seed}.csv") for seed in range(3)]
    for path, area in zip(paths, (0.5, 0.7, 0.6), strict=True):
        text = f"class,name,auc,auc_softmax\n0,A,{area},0.9\nmean,,0.8,{area}\n"
        metrics.write(path, text)
    header, rows = metrics.spread(paths)
    assert header == ["figure", "runs", "mean", "std", "min", "max", *paths]
    names = ["auc of class 0", "mean auc", "auc_softmax of class 0", "mean auc_softmax"]
    assert [row[0] for row in rows] == names
    for row in (rows[0], rows[3]):
        assert row[1:] == [3, *map(pytest.approx, (0.6, 0.1)), 0.5, 0.7, 0.5, 0.7, 0.6]

    path = str(tmp_path / "table.csv")
    metrics.write(path, "metric,value,low_95,high_95\naccuracy,0.5,0.4,0.6\n")
    assert metrics.main(["spread", path]) == 0
    expected = f"figure,runs,mean,std,min,max,{path}\naccuracy,1,0.5,nan,0.5,0.5,0.5\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(MetricsError, match=r"table\.csv: its metrics are not those of .*0\.csv"):
        metrics.spread([*paths, path])


# ---- checks --------------------------------------------------------------------------------------


def test_comparison_with_a_table(tmp_path):
    def compare(path):
        metrics.compare_csv(path, ["a", "b"], [[1, 1 / 3], ["x", math.nan]])

    third = "a,b\n1,0.3333333333333333\n"
    metrics.write(tmp_path / "a.csv", "a,b\n1.0,0.33333333333333\nx,nan\n")  # 14 digits
    compare(tmp_path / "a.csv")
    for content, words in (
        ("a,b\n1,0.33333333333\nx,nan\n", "row 2, column b: 0.33333333333, recomputed 0.3333"),
        (third + "y,nan\n", "row 3, column a: y, recomputed x"),
        (third + "x,0\n", "row 3, column b: 0, recomputed nan"),
        (third, "row 3, column a: no such row, recomputed x"),
        (third + "x,nan\n,\n", "row 4, column a: , recomputed no such row"),
        (third.replace("a,b", "a,c"), "the columns are a,c, not a,b"),
    ):
        refuses(compare, tmp_path / "a.csv", content, words)


RUN = predictions_of(6, 8, n=200, used=[0, 1, 3, 4, 5, 6, 7])
AREA = f"AUC {roc_auc_score(RUN.labels == 3, RUN.logits[:, 3]):.3f}"
INTERVAL = "({:.3f} to {:.3f})".format(*metrics.delong_interval(RUN.labels == 3, RUN.logits[:, 3]))


def log_line(resource, trial, loss):
    return json.dumps({"bracket": 1, "trial": trial, "resource": resource, "loss": loss}) + "\n"


@pytest.fixture
def run(tmp_path):
    """Return a run's folder, class 2 of 8 not in its test set."""
    trials = [(1, 0, 0.5), (1, 1, 1.5), (1, 2, None), (1, 3, 900), (3, 1, 1.0)]
    files = {
        "test/predictions.csv": metrics.predictions_text(RUN),
        "train/history.csv": (
            "epoch,learning_rate,train_loss,valid_loss,train_accuracy,valid_accuracy\n"
            "0,0.1,1,nan,0.5,0.4\n1,0.1,0.5,nan,0.5,0.4\n2,0.03,0.4,nan,0.5,0.4\n"
        ),
        "compare/compare.csv": (
            "system,training_images,train_seconds,predict_seconds_per_1000,model_mb\n"
            "KNN,1000,9.5,0.1,nan\nKNN,100000,1e3,0.1,nan\nCNN,10000,20,0.1,0.98\n"
        ),
        "tune/tuning.jsonl": "".join(log_line(*trial) for trial in trials),
    }
    for name, table in metrics.tables(RUN, [*NAMES, "4", "five", "six", "seven"]).items():
        files[f"test/{name}"] = metrics.csv_text(*table)
    for name, content in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        metrics.write(tmp_path / "run" / name, content)
    metrics.write_sums(tmp_path / "run" / "test")
    return tmp_path / "run"


@pytest.fixture
def poster(tmp_path):
    return shutil.copytree(POSTER, tmp_path / "poster")


def checked(capsys, folder):
    """Return the exit status of `metrics.py check`, and the lines that it printed."""
    status = metrics.main(["check", str(folder)])
    return status, capsys.readouterr().out.splitlines()


def test_check_finds_nothing_wrong(run, capsys):
    for folder in (run, run / "test", POSTER):
        status, (first, second, left_out, last) = checked(capsys, folder)
        assert first.startswith("ok       the ")
        assert second == "ok       every file is as SHA256SUMS lists it"
        assert left_out.startswith("left out ")
        assert (status, last) == (0, "nothing wrong in what was checked")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("test/table.csv", "accuracy,0.", "accuracy,0.0", "row 2, column value: 0.0"),
        ("test/confusion.csv", "\n0,", "\n0,1", "row 2, column predicted_0: 1"),
        ("test/per_class.csv", "\n5,five", "\n5,five,0,0,0,1\n6,five", "9 classes, .* has 8"),
        ("test/roc/auc.csv", "4,4,0.", "4,4,0.0", "row 6, column auc: 0.0"),
        ("test/roc/class_1.csv", "\n0.0,0.0,inf", "\n0.0,0.0,9", "row 2, column threshold: 9"),
        ("test/predictions.csv", "predicted", "prediction", "expected rows of id,label"),
        ("test/predictions.csv", "\n", "\n1,", "row 2 has 12 cells"),
        ("confusion.csv", "\n0,12535", "\n0,12536", "50001 images, not 50000"),
        ("table.csv", "0.5678", "0.5679", "column value: .*0.5679], recomputed .*0.5678]"),
        ("table.csv", "metric,value\n", "metric,value\nF2,0.1\n", "column value: .0.1, 0.6387"),
        ("per_class.csv", "0.32", "0.33", "column ratio: .0.33, .*, recomputed .0.32, "),
        ("auc.csv", "0.7602", "0.7702", "column auc: .*0.7702, .* recomputed .*0.760"),
        ("roc.csv", "tpr_3", "tpr_9", "no column tpr_3"),
    ],
)
def test_check_finds_a_changed_file(run, poster, capsys, file, old, new, words):
    root = run if file.startswith("test/") else poster
    text = (root / file).read_text("utf-8")
    assert old in text
    metrics.write(root / file, text.replace(old, new, 1))
    status, (first, second, *_, last) = checked(capsys, root)
    assert re.match(f"WRONG    {file}: .*{words}", first)
    assert second == f"WRONG    {file}: changed since SHA256SUMS was written"
    assert (status, last) == (1, "something is WRONG")


def test_sums(poster, capsys):
    path, stored = poster / "SHA256SUMS", (poster / "SHA256SUMS").read_bytes()
    for name in (".hidden", "figures/a.png.tmp"):
        (poster / name).touch()
    metrics.write_sums(poster)
    assert path.read_bytes() == stored
    lines = [line.split("  ") for line in stored.decode().splitlines()]
    for digest, name in lines:
        assert hashlib.sha256((poster / name).read_bytes()).hexdigest() == digest
    for content, words in (
        (stored + b"0" * 64 + b"  none.csv\n", "lists 'none.csv', which is missing"),
        (stored.replace(lines[3][0].encode(), b"0" * 64), f"{lines[3][1]}: changed since"),
        (stored[: stored.rindex(b"\n", 0, -1)], "table.csv: SHA256SUMS does not list it"),
        (np.random.RandomState(0).bytes(900), "which is missing"),
        (b"", "auc.csv: SHA256SUMS does not list it"),
    ):
        path.write_bytes(content)
        with pytest.raises(MetricsError, match=words):
            metrics.check_sums(poster)
    for name in ("SHA256SUMS", "table.csv"):
        (poster / name).unlink()
    _, (first, second, *_) = checked(capsys, poster)
    assert (first, second) == ("WRONG    table.csv is missing", "WRONG    SHA256SUMS is missing")


def test_a_check_without_docstring_and_with_errors_of_its_own(capsys):
    def is_even(number):
        if number % 2:
            raise ArithmeticError("a/b: two\nlines")

    assert metrics.passes(is_even, 2, root=Path("a"))
    assert not metrics.passes(is_even, 3, root=Path("a"), errors=(ArithmeticError,))
    assert capsys.readouterr().out == "ok       is_even\nWRONG    b: two lines\n"
    with pytest.raises(ArithmeticError):
        metrics.passes(is_even, 3, root=Path("a"))


# ---- command line --------------------------------------------------------------------------------


def test_the_command_alone_in_an_empty_folder(tmp_path):
    shutil.copy(metrics.__file__, tmp_path)
    metrics.write(tmp_path / "p.csv", metrics.predictions_text(predictions_of()))
    code = "import sys, metrics; sys.exit(metrics.main(['p.csv']) or 'matplotlib' in sys.modules)"
    command, keep = [sys.executable, "-c", code], {"cwd": tmp_path, "stderr": subprocess.PIPE}
    run = subprocess.run(command, **keep, stdout=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    _, labels, predicted, logits = predictions_of()
    accuracy, area = accuracy_score(labels, predicted), roc_auc_score(labels == 3, logits[:, 3])
    assert run.stdout.startswith("100 images, 4 classes, intervals of 95 %\n\n| metric ")
    assert re.search(rf"\| accuracy +\| {accuracy:.4f} \| 0\.\d{{4}} \|", run.stdout)
    assert re.search(rf"\n\| 3 +\| {area:.4f} \|.* {(labels == 3).sum()} \|\n", run.stdout)

    reading, writing = os.pipe()
    os.close(reading)  # as in `| head -1`
    run = subprocess.run(command, **keep, stdout=writing)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, b"")


def test_wrong_use_is_one_line(tmp_path, capsys):
    (tmp_path / "empty.csv").touch()
    for words, message in (
        ([], "expected one of the command lines"),
        (["spread"], "expected one of the command lines"),
        (["draw", "FOLDER", "--over", "FOLDER"], "expected one of the command lines"),
        (["none.csv"], "none.csv is missing"),
        (["check", tmp_path], f"{tmp_path} has neither predictions.csv nor"),
        (["draw", tmp_path], f"{tmp_path}: neither a run's"),
        (["spread", tmp_path / "empty.csv"], f"{tmp_path / 'empty.csv'}: empty"),
    ):
        assert metrics.main([*map(str, words)]) == 2
        captured = capsys.readouterr()
        assert re.fullmatch(rf"metrics\.py: error: {re.escape(message)}.*\n", captured.err)
        assert captured.out == ""


def test_ctrl_c_and_a_stdout_that_is_closed_or_lacks_a_letter(tmp_path, monkeypatch):
    metrics.write(tmp_path / "caf\xe9.csv", "metric,value\naccuracy,1\n")
    ascii_output = io.TextIOWrapper(io.BytesIO(), "ascii")
    for output in (None, ascii_output):
        monkeypatch.setattr(sys, "stdout", output)
        assert metrics.main(["spread", str(tmp_path / "caf\xe9.csv")]) == 0
    assert rb"caf\xe9.csv" in ascii_output.buffer.getvalue()

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "read_predictions", interrupted)
    assert metrics.main(["p.csv"]) == 130


# ---- figures -------------------------------------------------------------------------------------


def drawn(stem):
    """Return a drawing's SVG and the texts in it."""
    svg = stem.with_suffix(".svg").read_text("utf-8")
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return svg, ["".join(text.itertext()).strip() for text in texts]


@pytest.mark.parametrize(
    ("figure", "source", "words"),
    [
        ("class_ratios", "run", [f"0: {NAMES[0]}", "2: two lines", f"3: {NAMES[3]}", "4", "0.00"]),
        ("confusion", "poster", ["true class", *map(str, POSTER_CONFUSION.ravel())]),
        ("roc", "run", [AREA, INTERVAL, "AUC nan", f"3: {NAMES[3]}", "true positive rate"]),
        ("roc", "poster", ["AUC 0.868", "class ratio 0.32"]),
        ("history", "run", ["training", "validation", "learning rate drops"]),
        ("search", "run", ["trial", "lowest loss", "1", "3", "epochs (failed trials: 1)"]),
        ("growth", "run", ["CNN", "KNN", "training images", "model (MB)"]),
    ],
)
def test_figures(run, figure, source, words):
    pytest.importorskip("matplotlib")
    stage, draw, _ = metrics.FIGURES[figure]
    draw(run / stage if source == "run" else POSTER, run / "a")
    svg, texts = drawn(run / "a")
    assert set(words) <= set(texts)
    assert "poster" not in texts
    assert ("learning rate drops" in texts) == ("learning rate drops" in words)
    if figure == "search":  # the best goes from 1 epoch to 3; trial 0 had a lower loss after 1
        (best,) = re.findall(r'd="([^"]*)" clip-path=[^>]*stroke: #0072b2; stroke-width: 2', svg)
        assert best.count("L") == 1


def test_the_curves_of_the_poster_over_those_of_a_run(run):
    pytest.importorskip("matplotlib")
    for stage, draw, num_curves in (
        ("train", metrics.draw_history, 4),
        ("test", metrics.draw_roc, 8),
    ):
        draw(run / stage, run / "a", POSTER)
        svg, texts = drawn(run / "a")
        assert "poster" in texts
        # They are the only black dashes. The legend has the last.
        curves = re.findall(r'd="([^"]*)"[^>]*stroke-dasharray: [^"]*stroke: #000000', svg)
        assert len(curves) == num_curves + 1
    assert {AREA, INTERVAL, "poster AUC 0.944", "this run"} <= set(texts)
    for curve, area in zip(curves[:8], POSTER_AREAS, strict=True):
        x, y = np.reshape(re.findall(r"[\d.]+", curve), (-1, 2)).astype(float).T
        share = np.trapezoid(y - y[0], x) / ((x[-1] - x[0]) * (y[-1] - y[0]))
        assert share == pytest.approx(area, abs=2e-3)


def test_draw_folders_whatever_backend_a_notebook_exports(run, poster):
    pytest.importorskip("matplotlib")
    shutil.rmtree(run / "tune")
    shutil.rmtree(poster / "figures")
    command = [sys.executable, metrics.__file__, "draw", run, "--reference", POSTER]
    subprocess.run(command, env={**os.environ, "MPLBACKEND": "inline"}, check=True)
    assert metrics.main(["draw", str(poster)]) == 0
    names = {"class_ratios", "confusion", "history", "roc"}
    for folder, stems in ((run, names | {"growth"}), (poster, names)):
        files = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
        assert {path.name for path in (folder / "figures").iterdir()} == files
    for name in ("history", "roc"):
        assert any(text.startswith("poster") for text in drawn(run / "figures" / name)[1])


def test_draw_samples(tmp_path):
    pytest.importorskip("matplotlib")
    for shape in ((8, 8), (8, 10, 1), (12, 8, 3)):
        images = np.random.RandomState(0).randint(256, size=(40, *shape), dtype=np.uint8)
        metrics.draw_samples(images, np.arange(40) % 4, [*"abcd", "none"], tmp_path / "a")
        assert drawn(tmp_path / "a")[1] == ["0: a", "1: b", "2: c", "3: d", "4: none"]


def test_figures_of_damaged_files(tmp_path, poster):
    def draw_search(path):
        metrics.draw_search(path.parent, tmp_path / "a")

    for content in ("{", "[1]\n", log_line("x", 0, 1.0), log_line(1, 0, None)):
        refuses(draw_search, tmp_path / "tuning.jsonl", content, "not a log of a search")
    for folder, file in ((POSTER, "auc.csv"), (poster, "per_class.csv")):
        lines = (poster / file).read_text("utf-8").splitlines(keepends=True)
        metrics.write(poster / file, "".join(lines[:-1]))
        with pytest.raises(MetricsError, match="differ in their classes"):
            metrics.draw_roc(folder, tmp_path / "a", poster)
        shutil.copy(POSTER / file, poster)


def test_figures_are_the_same_whatever_the_settings_of_matplotlib(run):
    matplotlib = pytest.importorskip("matplotlib")
    metrics.draw_class_ratios(run / "test", run / "a")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 5}):
        metrics.draw_class_ratios(run / "test", run / "b")
        assert matplotlib.rcParams["font.size"] == 5
    for kind in ("png", "svg"):
        assert (run / f"a.{kind}").read_bytes() == (run / f"b.{kind}").read_bytes()
    assert "dc:date" not in drawn(run / "a")[0]
