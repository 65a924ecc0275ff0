"""Tests of metrics.py; the oracles are scikit-learn, definitions written out, and hand counts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

import metrics
from metrics import MetricsError, Predictions

POSTER = Path(metrics.__file__).parent / "results" / "reference" / "poster"
POSTER_CONFUSION = np.loadtxt(POSTER / "confusion.csv", int, delimiter=",", skiprows=1)[:, 1:]
POSTER_AREAS = [0.868, 0.760, 0.961, 0.944, 0.915, 0.939, 0.880, 0.817]
NAMES = ["Collecting Duct, Connecting Tubule", 'a "quoted" name', "two\nlines", "Größe $x$ | µ"]


def predictions_of(seed=5, num_classes=4, n=100, used=None):
    """Return Predictions; only the classes in `used` occur as labels."""
    generator = np.random.RandomState(seed)
    labels = generator.choice(num_classes if used is None else used, n).astype(np.int64)
    logits = (generator.normal(size=(n, num_classes)) + np.eye(num_classes)[labels]).astype("f4")
    return Predictions(np.arange(n) * 3 - 5, labels, logits.argmax(axis=1), logits)


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


def test_poster_figures():
    figures = metrics.summary_from_confusion(POSTER_CONFUSION)
    # The poster's table has .6387, .5426, .5356 and .5678 (cut, not rounded).
    exact = {"accuracy": 0.638700, "f1": 0.542641, "recall": 0.535631, "precision": 0.567883}
    assert figures == pytest.approx(exact, abs=5e-7)
    labels, predicted = expand(POSTER_CONFUSION)
    assert len(labels) == 50_000
    assert metrics.summary(labels, predicted, 8) == figures
    np.testing.assert_array_equal(metrics.confusion(labels, predicted, 8), POSTER_CONFUSION)


def test_undefined_figures_by_hand():
    # Class 2 is never predicted, class 3 does not occur at all, class 4 is only predicted.
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 4]
    figures = metrics.summary(labels, predicted, 5)
    by_hand = [3 / 6, (1 / 2 + 4 / 5) / 4, (1 / 2 + 1) / 4, (1 / 2 + 2 / 3) / 4]
    assert list(figures.values()) == pytest.approx(by_hand)
    nan = math.nan
    expected = [(1 / 2, 1 / 2, 1 / 2, 2), (2 / 3, 1, 4 / 5, 2)]
    expected += [(nan, 0, 0, 2), (nan, nan, nan, 0), (0, nan, 0, 0)]
    np.testing.assert_allclose(metrics.per_class(labels, predicted, 5), expected, equal_nan=True)


def test_softmax_does_not_overflow():
    assert metrics.softmax([[0, math.log(3)], [1000, 1000]]).tolist() == [[0.25, 0.75], [0.5, 0.5]]


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
def test_roc_of_absent_classes(used):
    _, labels, _, logits = predictions_of(2, 4, 60, used)
    for k, curve in enumerate(metrics.roc_curves(labels, logits)):
        assert np.isnan(curve.tpr).all() == (k not in used)
        assert np.isnan(curve.fpr).all() == (used == [k])
        assert math.isnan(curve.auc) == (k not in used or used == [k])


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
    intervals = metrics.bootstrap_intervals(POSTER_CONFUSION)
    reach = 1.959964 * math.sqrt(0.6387 * (1 - 0.6387) / 50_000)  # accuracy is binomial
    assert intervals["accuracy"] == pytest.approx((0.6387 - reach, 0.6387 + reach), abs=2e-4)
    assert metrics.bootstrap_intervals(POSTER_CONFUSION, seed=1) != intervals


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


def test_delong_by_hand():
    few = [True, True, False, False]
    low = 0.75 - 1.959963984540054 * math.sqrt((0.125 + 0.125) / 2)
    assert metrics.delong_interval(few, [4, 2, 3, 1]) == pytest.approx((low, 1))  # cut to 1
    assert metrics.delong_interval(few, [3, 4, 1, 2]) == (1, 1)
    assert metrics.delong_interval(few, [3, 1, 4, 2])[0] == 0  # cut to 0
    for single in ([True, False, False], [False, True, True], [True, True, True]):
        assert np.isnan(metrics.delong_interval(single, [2, 1, 3])).all()


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
    path = tmp_path / "a.csv"
    metrics.write(path, text)
    assert path.read_bytes() == text.encode()
    cells = [[name, str(value)] for name, value in rows]
    assert metrics.read_csv(path) == (["name", "value"], cells)
    assert metrics.read_column(path, "name", str) == [name for name, _ in rows]
    np.testing.assert_array_equal(metrics.read_column(path, "value"), [float(c) for _, c in cells])


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
    ids = np.arange(len(logits))
    ids[:2] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    written = Predictions(ids, np.arange(len(ids)) % 3, logits.argmax(axis=1), logits)
    text = metrics.predictions_text(written)
    assert text.startswith("id,label,predicted,logit_0,logit_1,logit_2\n9223372036854775807,0,0,3")
    metrics.write(tmp_path / "p.csv", text)
    for before, after in zip(written, metrics.read_predictions(tmp_path / "p.csv"), strict=True):
        assert before.dtype == after.dtype
        assert before.tobytes() == after.tobytes()  # the sign of zero as well


def refuses(function, path, content, words):
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(MetricsError, match=f"{path}: .*{words}") as caught:
        function(path)
    assert "\n" not in str(caught.value)


HEADER = "id,label,predicted,logit_0,logit_1\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        (HEADER + "0,1,1,0.5,1", "cut short"),
        (HEADER + "0,1,1,0.5,\udcff1\n", "not a CSV file in UTF-8 .*byte 0xff"),
        (HEADER + '0,1,1,0.5,"1\n', "not a CSV file"),
        (HEADER + "0,1,1,0.5,1\n0,1,1,0.5\n", "row 3 has 4 cells, not 5"),
        (HEADER, "give rows of id,label"),
        ("id,label,predicted,logit_0\n0,0,0,1\n", "give rows of id,label"),
        (HEADER + "0,1,1,0.5,1\n1,1,1,0.5,x\n", "'x' .* row 1, column 5"),
        (HEADER + "0,1.5,1,0.5,1\n", "'1.5'"),
        (HEADER + "0,1,1,nan,1\n", "row 2: a logit is not finite"),
        (HEADER + "0,2,1,0.5,1\n", "row 2: the label is not 0 to 1"),
        (HEADER + "0,1,1,0.5,1\n1,1,2,0.5,1\n", "row 3: predicted is not the"),
        (HEADER + "0,1,1,1,1\n", "row 2: predicted is not the"),  # not the first maximum
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
    _, labels, predicted, logits = predictions = predictions_of(6, used=[0, 1, 3])
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
    for file in ("per_class.csv", "roc/auc.csv"):
        assert [tuple(row[:2]) for row in rows[file]] == [*enumerate(NAMES)]
    matrix = metrics.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(np.array(rows["confusion.csv"])[:, 1:], matrix)
    values, intervals = sklearn_summary(labels, predicted), metrics.bootstrap_intervals(matrix)
    assert rows["table.csv"] == [
        [name, pytest.approx(values[key]), *intervals[key]]
        for key, name in metrics.METRIC_NAMES.items()
    ]
    columns = precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    figures = [row[2:] for row in rows["per_class.csv"]]
    np.testing.assert_allclose(figures, np.transpose(columns), equal_nan=True)
    probabilities = metrics.softmax(logits)
    for k, (*_, area, low, high, of_softmax, support) in enumerate(rows["roc/auc.csv"]):
        positive, points = labels == k, np.array(rows[f"roc/class_{k}.csv"])
        assert support == positive.sum()
        if k == 2:
            assert np.isnan([area, low, high, of_softmax, *points[:, 1]]).all()
            continue
        assert area == pytest.approx(roc_auc_score(positive, logits[:, k]))
        assert area == pytest.approx(np.trapezoid(points[:, 1], points[:, 0]))
        assert (low, high) == metrics.delong_interval(positive, logits[:, k])
        assert of_softmax == pytest.approx(roc_auc_score(positive, probabilities[:, k]))
        assert of_softmax != area
    with pytest.raises(MetricsError, match="3 class names, 4 logits"):
        metrics.tables(predictions, NAMES[:3])


def test_markdown_table():
    assert metrics.markdown_table(["metric", "b"], [["a|b", 1], ["longer one", "0.6387"]]) == (
        "| metric     |      b |\n"
        "| ---------- | -----: |\n"
        "| a\\|b       |      1 |\n"
        "| longer one | 0.6387 |\n"
    )


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
    assert run.stdout.count("\n| name ") == 2
    assert re.search(rf"\| accuracy +\| {accuracy:.4f} \| 0\.\d{{4}} \|", run.stdout)
    assert re.search(rf"\n\| class 3 \| {area:.4f} \|.* {(labels == 3).sum()} \|\n$", run.stdout)

    reading, writing = os.pipe()
    os.close(reading)  # as in `| head -1`
    run = subprocess.run(command, **keep, stdout=writing)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, b"")


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


# ---- figures -------------------------------------------------------------------------------------

RUN = predictions_of(6, 8, n=200, used=[0, 1, 3, 4, 5, 6, 7])
AREA = f"AUC {roc_auc_score(RUN.labels == 3, RUN.logits[:, 3]):.3f}"
INTERVAL = "({:.3f} to {:.3f})".format(*metrics.delong_interval(RUN.labels == 3, RUN.logits[:, 3]))


def log_line(resource, trial, loss):
    return json.dumps({"bracket": 1, "trial": trial, "resource": resource, "loss": loss}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Return a run's folder, class 2 of 8 not in its test set."""
    pytest.importorskip("matplotlib")
    tables = metrics.tables(RUN, [*NAMES, "4", "five", "six", "seven"])
    tables["history.csv"] = (
        ["epoch", "learning_rate", "train_loss", "valid_loss", "train_accuracy", "valid_accuracy"],
        [[e, 0.1 if e < 9 else 0.03, 1 / (e + 1), math.nan, 0.5, 0.4] for e in range(12)],
    )
    costs = ["train_seconds", "predict_seconds_per_1000", "model_mb"]
    tables["compare.csv"] = (
        ["system", "training_images", *costs, "note"],
        [["KNN", n, n / 9, 0.1, math.nan, "a, b"] for n in (10**3, 10**5, 10**6)]
        + [["CNN", 10**4, 20, 0.1, 0.98, ""]],
    )
    (tmp_path / "roc").mkdir()
    for name, table in tables.items():
        metrics.write(tmp_path / name, metrics.csv_text(*table))
    trials = [(1, 0, 0.5), (1, 1, 1.5), (1, 2, None), (1, 3, 900), (3, 1, 1.0)]
    lines = [log_line(*trial) for trial in trials]
    metrics.write(tmp_path / "tuning.jsonl", "".join([*lines, '{"cut']))
    return tmp_path


def drawn(stem):
    """Return a drawing's SVG and the texts in it."""
    svg = stem.with_suffix(".svg").read_text("utf-8")
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return svg, ["".join(text.itertext()).strip() for text in texts]


@pytest.mark.parametrize(
    ("figure", "sources", "words"),
    [
        ("class_ratios", "run", [f"0: {NAMES[0]}", "2: two lines", f"3: {NAMES[3]}", "4", "0.00"]),
        ("class_ratios", "poster", ["5: Podocytes", "0.32", "0.05", "0.04", "0.24"]),
        ("confusion", "poster", ["true class", *map(str, POSTER_CONFUSION.ravel())]),
        ("roc", "run", [AREA, INTERVAL, "AUC nan", f"3: {NAMES[3]}", "true positive rate"]),
        ("roc", "run poster", [AREA, INTERVAL, "poster AUC 0.944", "this run", "poster"]),
        ("roc", "poster", ["AUC 0.868", "class ratio 0.32"]),
        ("history", "run", ["training", "validation", "learning rate drops", "epoch"]),
        ("history", "run poster", ["training", "validation", "learning rate drops", "poster"]),
        ("history", "poster", ["training", "validation", "accuracy", "loss"]),
        ("search", "run", ["trial", "lowest loss", "1", "3", "epochs (failed trials: 1)"]),
        ("growth", "run", ["CNN", "KNN", "training images", "model (MB)"]),
    ],
)
def test_figures(folder, figure, sources, words):
    source, *reference = [{"run": folder, "poster": POSTER}[name] for name in sources.split()]
    getattr(metrics, f"draw_{figure}")(source, folder / "a", *reference)
    svg, texts = drawn(folder / "a")
    assert set(words) <= set(texts)
    assert ("learning rate drops" in texts) == (figure == "history" and source == folder)
    # The poster's curves are the only black dashes, and one in the legend.
    curves = re.findall(r'd="([^"]*)"[^>]*stroke-dasharray: [^"]*stroke: #000000', svg)
    assert len(curves) == (0 if not reference else 8 + 1 if figure == "roc" else 4 + 1)

    for curve, area in zip(curves, POSTER_AREAS if figure == "roc" else (), strict=False):
        x, y = np.reshape(re.findall(r"[\d.]+", curve), (-1, 2)).astype(float).T
        share = np.trapezoid(y - y[0], x) / ((x[-1] - x[0]) * (y[-1] - y[0]))
        assert share == pytest.approx(area, abs=2e-3)


def test_draw_search_highlights_the_lowest_loss_after_the_most_epochs(folder):
    metrics.draw_search(folder, folder / "a")
    svg, _ = drawn(folder / "a")
    (path,) = re.findall(r'd="([^"]*)" clip-path=[^>]*stroke: #0072b2; stroke-width: 2[;"]', svg)
    assert path.count("L") == 1  # from 1 epoch to 3; trial 0 had a lower loss, but 1 epoch


@pytest.mark.parametrize("shape", [(8, 8), (8, 10, 1), (12, 8, 3)])
def test_draw_samples(tmp_path, shape):
    pytest.importorskip("matplotlib")
    images = np.random.RandomState(0).randint(256, size=(40, *shape), dtype=np.uint8)
    metrics.draw_samples(images, np.arange(40) % 4, [*"abcd", "none"], tmp_path / "a")
    assert drawn(tmp_path / "a")[1] == ["0: a", "1: b", "2: c", "3: d", "4: none"]


@pytest.mark.parametrize(
    ("name", "content", "figure", "words"),
    [
        ("confusion.csv", "label,predicted_0\n0,many\n", "confusion", "predicted_0: .*'many'"),
        ("confusion.csv", "label,predicted_0\n", "confusion", "no column predicted_0, or no row"),
        ("history.csv", "epoch\n0\n", "history", "no column train_accuracy"),
        ("tuning.jsonl", log_line(1, 0, 1.0) + "[1]\n", "search", "not a log of trials"),
        ("tuning.jsonl", log_line("x", 0, 1.0), "search", "not a log of trials"),
        ("tuning.jsonl", log_line(1, 0, None), "search", "no trial has a loss"),
    ],
)
def test_a_figure_of_a_damaged_file(tmp_path, name, content, figure, words):
    pytest.importorskip("matplotlib")
    draw, stem = getattr(metrics, f"draw_{figure}"), tmp_path / "a"
    refuses(lambda path: draw(path.parent, stem), tmp_path / name, content, words)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_figures_are_the_same_whatever_the_settings_of_matplotlib(folder):
    from matplotlib import rc_context, rcParams

    metrics.draw_class_ratios(folder, folder / "a")
    with rc_context({"axes.facecolor": "red", "font.size": 5}):
        metrics.draw_class_ratios(folder, folder / "b")
        assert (rcParams["axes.facecolor"], rcParams["font.size"]) == ("red", 5)
    for kind in ("png", "svg"):
        assert (folder / f"a.{kind}").read_bytes() == (folder / f"b.{kind}").read_bytes()
    assert "dc:date" not in drawn(folder / "a")[0]
