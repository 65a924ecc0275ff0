"""The chain, its folder and its audit, on tiny images; real kills are in faults.py."""

import contextlib
import csv
import errno
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import contents, write_tiny
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

import data
import metrics
import model
import reproduce

SCRIPT = Path(reproduce.__file__)
SEARCH = ["--schedule", "hyperband", "--max-resource", "3", "--workers", "1"]
DRAWS = importlib.util.find_spec("matplotlib") is not None


def run(*words, status=0):
    """Run a command line in this process."""
    assert reproduce.main([str(word) for word in words]) == status


def refused(capsys, *words):
    """Run a command line that must be refused in one line; return the line."""
    capsys.readouterr()
    try:
        assert reproduce.main([str(word) for word in words]) == 2
    except SystemExit as stop:  # argparse's
        assert stop.code == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce.py: error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def chain(tiny):
    """Words of a whole run, precision pinned so that it is quick on every processor."""
    return ["--data", tiny, *SEARCH, "--epochs", "3", "--precision", "fp32"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chain):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("--stage", "all", *chain, "--results", folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def mend_sums(folder):
    """Write SHA256SUMS again, as somebody who wants to deceive would."""
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    present = [name for name in names if (folder / name).exists()]
    lines = (f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in present)
    (folder / "SHA256SUMS").write_text("".join(lines))


def verify(capsys, folder, *words):
    """Return verify's status and its WRONG lines."""
    capsys.readouterr()
    status = reproduce.main(["--stage", "verify", "--results", str(folder), *words])
    printed = capsys.readouterr().out
    return status, [line for line in printed.splitlines() if line.startswith("WRONG")]


# ----------------------------------------------------------------------------------- the chain


def test_all_leaves_every_file_and_seals_them(whole):
    expected = {"run.json", "tuning.jsonl", "best.json", "history.csv", "model.pt", "report.md"}
    expected |= {"predictions.csv", "confusion.csv", "per_class.csv", "table.csv", "roc/auc.csv"}
    expected |= {f"roc/class_{k}.csv" for k in range(3)}
    if DRAWS:
        names = ("class_ratios", "confusion", "history", "roc", "samples", "search")
        expected |= {f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")}
    lines = [line.split("  ") for line in (whole / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == expected
    for digest, name in lines:
        assert digest == hashlib.sha256((whole / name).read_bytes()).hexdigest()
    assert {p.name for p in whole.iterdir() if p.is_file()} - expected == {"SHA256SUMS", ".lock"}


def test_table_is_scikit_learns(whole):
    with (whole / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    true, predicted = ([row[name] for row in rows] for name in ("label", "predicted"))
    macro = {"average": "macro", "zero_division": 0}
    expected = [
        accuracy_score(true, predicted),
        f1_score(true, predicted, **macro),
        recall_score(true, predicted, **macro),
        precision_score(true, predicted, **macro),
    ]
    header, rows = metrics.read_csv(whole / "table.csv")
    assert header == ["metric", "value", "low_95", "high_95"]  # nothing of the poster's
    assert [float(row[1]) for row in rows] == pytest.approx(expected)
    assert all(float(row[2]) <= float(row[1]) <= float(row[3]) for row in rows)


def test_what_is_done_is_done_once(finished, chain, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*.*") if path.is_file()}
    run("--stage", "all", *chain, "--results", finished)
    printed = capsys.readouterr().out
    assert "tune     done already" in printed and "train    done already" in printed
    for path, content in before.items():
        if path.name not in ("run.json", "report.md", "SHA256SUMS"):  # the test's seconds
            assert path.read_bytes() == content, path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stage", "train", "--epochs", "4"], "train was begun with epochs 3, not 4"),
        (["--stage", "train", "--epochs", "3", "--seed", "1"], "train was begun with seed 0"),
        (["--stage", "tune", "--seed", "1", *SEARCH], "tune was begun with seed 0, not 1"),
        (["--stage", "tune", "--precision", "fp32"], "tune was begun with schedule"),
        (["--stage", "test", "--split", "official"], "with split 'poster', not 'official'"),
        (["--stage", "test", "--split-seed", "1"], "with split_seed 0, not 1"),
        (["--stage", "test", "--data", "digits"], "holds another run, with md5"),
        (["--stage", "train", "--epochs", "3", "--seeds", "0", "1"], "seeds None, not [0, 1]"),
    ],
)
def test_a_finished_run_is_not_touched_by_another_command(finished, capsys, words, told):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    if "tune" in words or "train" in words:
        words = [*words, *["--precision", "fp32"] * ("--precision" not in words)]
    assert told in refused(capsys, *words, "--results", finished)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_overwrite_drops_what_followed(finished, tiny):
    words = ["--data", tiny, "--epochs", "1", "--precision", "fp32"]
    run("--stage", "train", *words, "--results", finished, "--overwrite")
    names = {path.name for path in finished.iterdir()} - {"roc", ".lock"}
    kept = {"run.json", "tuning.jsonl", "best.json", "history.csv", "model.pt"}
    assert names == kept | {"report.md", "SHA256SUMS"}
    (finished / "run.json").write_text("{")
    run("--stage", "train", *words, "--results", finished, "--overwrite")
    assert not (finished / "tuning.jsonl").exists()  # of nobody knows what


def test_overwrite_removes_nothing_for_a_command_that_is_refused(finished, tiny, capsys):
    words = ["--stage", "train", "--hyperparameters", "tuned", "--overwrite"]
    (finished / "best.json").rename(finished / "away")  # as of an interrupted search
    before = contents(finished)
    assert "best.json" in refused(capsys, *words, "--results", finished)
    (finished / "away").rename(finished / "best.json")
    words += ["--results", finished, "--data", tiny, "--split-seed", "1"]
    assert "--stage tune first" in refused(capsys, *words)  # the search was on another split
    record = (finished / "run.json").read_text()
    (finished / "run.json").write_text("{")
    assert "--stage tune first" in refused(capsys, *words[:-2])
    (finished / "run.json").write_text(record)
    (finished / "best.json").rename(finished / "away")
    (finished / "model.pt").rename(finished / "gone")
    refused(capsys, "--stage", "test", "--results", finished, "--overwrite")
    (finished / "gone").rename(finished / "model.pt")
    assert contents(finished) == before


def test_overwriting_the_search_drops_what_was_trained_by_it(tiny, tmp_path):
    words = ["--data", tiny, *SEARCH, "--precision", "fp32", "--results", tmp_path / "run"]
    tuned = ["--epochs", "1", "--hyperparameters", "tuned"]
    run("--stage", "all", *words, *tuned, "--seeds", "0", "1")
    run("--stage", "tune", *words, "--seed", "1", "--overwrite")
    assert not [*(tmp_path / "run").glob("seed-*")]
    assert not (tmp_path / "run" / "seeds.csv").exists()


def test_overwriting_with_other_data_begins_with_the_defaults(tiny, tmp_path):
    words = ["--stage", "train", "--epochs", "1", "--precision", "fp32", "--results", tmp_path]
    folder = tmp_path / "run"
    run(*words[:-1], folder, "--data", tiny, "--split", "official", "--seeds", "0", "1")
    write_tiny(tmp_path / "other.npz", size=9)
    run(*words[:-1], folder, "--data", tmp_path / "other.npz", "--overwrite")
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["split"] == "poster" and "seeds" not in record
    assert not [*folder.glob("seed-*")]


def test_the_reports_commands_do_the_same_again(tiny, tmp_path):
    folder, again = tmp_path / "run", tmp_path / "again"
    common = ["--precision", "fp32", "--results", folder]
    run("--stage", "tune", "--data", tiny, "--split-seed", "5", "--seed", "1", *SEARCH, *common)
    words = ["--hyperparameters", "tuned", "--epochs", "2", "--seed", "2"]
    run("--stage", "train", *words, *common)
    for stage in ("test", "report"):
        run("--stage", stage, "--results", folder)
    commands = (folder / "report.md").read_text().split("```")[1].split("\n")[1:-1]
    assert [command.split()[3] for command in commands] == ["tune", "train", "test"]
    for command in commands:
        words = shlex.split(command)[2:]
        words[words.index("--results") + 1] = str(again)
        run(*words)
    for name in ("best.json", "predictions.csv"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_hyperparameters_from_a_file(tiny, tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('{"num_features": 4, "epochs": 1, "learning_rate": 0.01}')
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "run"]
    run(*words, "--hyperparameters", path)
    config = model.load_network(tmp_path / "run" / "model.pt").config
    assert config["num_features"] == 4
    path.write_text('{"learning_rat": 0.01}')
    assert "holds no hyperparameters" in refused(capsys, *words, "--hyperparameters", path)
    assert "--stage tune first" in refused(capsys, *words, "--hyperparameters", "tuned")


def test_several_seeds(tiny, tmp_path, capsys):
    folder = tmp_path / "seeds"
    words = ["--data", tiny, *SEARCH, "--precision", "fp32", "--epochs", "2", "--results", folder]
    run("--stage", "train", *words[:2], *words[-6:], "--seeds", "3", "4")
    assert "seeds.csv" not in (folder / "SHA256SUMS").read_text()  # nothing is tested yet
    run("--stage", "all", *words, "--seeds", "3", "4")
    values = []
    for seed in (3, 4):
        record = json.loads((folder / f"seed-{seed}" / "run.json").read_text())
        assert record["train"]["options"]["seed"] == seed
        values.append(
            [float(v) for v in metrics.read_column(folder / f"seed-{seed}/table.csv", "value")]
        )
    header, rows = metrics.read_csv(folder / "seeds.csv")
    assert header == ["metric", "runs", "mean", "std", "min", "max"]
    for k, row in enumerate(rows):
        a, b = values[0][k], values[1][k]
        expected = [(a + b) / 2, np.std([a, b], ddof=1), min(a, b), max(a, b)]
        assert [float(cell) for cell in row[2:]] == pytest.approx(expected)
    assert "seed-3/" not in (folder / "SHA256SUMS").read_text()
    assert "--seeds 3 4" in (folder / "report.md").read_text()
    assert verify(capsys, folder) == (0, [])
    (folder / "seed-4" / "history.csv").unlink()
    status, wrong = verify(capsys, folder)
    assert status == 1 and wrong == ["WRONG    history.csv is missing"]
    change(folder, "run.json", '"seeds": [', '"seeds": [7,')
    status, wrong = verify(capsys, folder)
    assert status == 1 and wrong[0].startswith("WRONG    run.json is missing or changed")


def test_overwriting_one_run_with_several(finished, tiny):
    words = ["--data", tiny, "--precision", "fp32", "--epochs", "1", "--results", finished]
    run("--stage", "train", *words, "--seeds", "3", "4", "--overwrite")
    names = {"run.json", "report.md", "SHA256SUMS", "seed-3", "seed-4"}
    names |= {"tuning.jsonl", "best.json"}  # no training's
    assert {path.name for path in finished.iterdir()} - {".lock"} == names
    run("--stage", "train", *words, "--seeds", "3", "5", "--overwrite")
    assert not (finished / "seed-4").exists()


def test_compare_resumes_from_its_rows(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--stage", "compare", "--data", tiny, "--epochs", "1", "--results", folder]
    words += ["--precision", "fp32", "--compare-max", "30"]
    run(*words)
    path = folder / "compare.csv"
    header, rows = metrics.read_csv(path)
    assert tuple(header) == reproduce.COMPARE_HEADER
    assert [row[:2] for row in rows] == [[system, "30"] for system in reproduce.SYSTEMS]
    sizes = {row[0]: float(row[header.index("model_mb")]) for row in rows}
    assert sizes["KNN"] > 30 * 64 * 4 / 1e6  # it keeps its training set, as float32
    network = model.PosterCNN(num_classes=3, image_size=8)
    weights = 4 * sum(weight.numel() for weight in network.parameters()) / 1e6
    assert weights < sizes["PosterCNN"] < 1.1 * weights
    assert "| KNN" in (folder / "report.md").read_text()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    record = json.loads((folder / "run.json").read_text())
    record["compare"]["seconds"] = None
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "SHA256SUMS").unlink()
    run(*words)
    resumed = path.read_text().splitlines(keepends=True)
    assert resumed[:3] == lines[:3]
    assert [line.split(",")[:2] for line in resumed] == [line.split(",")[:2] for line in lines]
    assert verify(capsys, folder) == (0, [])


def test_growth_is_the_exponent(tmp_path):
    header, sizes = [*reproduce.COMPARE_HEADER], (100, 200, 1000)
    systems = [(n, system) for n in sizes for system in reproduce.SYSTEMS]
    rows = [[system, n, 1, 1, 1, 1, 3 * n**1.5, 0.2, n, ""] for n, system in systems]
    (tmp_path / "compare.csv").write_text(metrics.csv_text(header, rows))
    powers = reproduce.growth(tmp_path / "compare.csv")
    assert powers[0] == ["KNN", "1.50", "0.00", "1.00"] and len(powers) == 5
    (tmp_path / "compare.csv").write_text(metrics.csv_text(header, rows[:5]))
    assert reproduce.growth(tmp_path / "compare.csv") == []  # one size shows none


def test_the_digits_stand_in_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/{name}.npz")  # the discard port: closed
    monkeypatch.setattr(reproduce, "REFERENCE", tmp_path)
    words = [
        "--stage",
        "train",
        "--epochs",
        "1",
        "--precision",
        "fp32",
        "--root",
        tmp_path / "none",
    ]
    run(*words, "--results", tmp_path / "digits")
    printed = capsys.readouterr()
    assert printed.err.startswith("NOTE: ") and "digits" in printed.err.splitlines()[0]
    assert printed.out.splitlines()[-1].startswith("NOTE: without a network")
    run("--stage", "test", "--results", tmp_path / "digits")
    shutil.copytree(tmp_path / "digits", tmp_path / "again")
    run("--stage", "test", "--results", tmp_path / "again")
    assert f"450 of 450 predictions are those of {tmp_path / 'digits'}" in capsys.readouterr().out


def test_workers_are_the_cores_that_may_be_used(finished, chain, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.joblib, "cpu_count", lambda: 3)  # of a host with more
    words = [word for word in chain if word not in ("--workers", "1")]
    run("--stage", "all", *words, "--results", finished)
    assert "trials 3 at a time" in capsys.readouterr().out


def test_trials_side_by_side_leave_the_same_log(whole, chain, tmp_path):
    words = [*chain[:-4], "--precision", "fp32", "--workers", "2"]
    run("--stage", "tune", *words, "--results", tmp_path / "run")
    ours, theirs = contents(tmp_path / "run"), contents(whole)
    assert (
        ours["tuning.jsonl"] == theirs["tuning.jsonl"] and ours["best.json"] == theirs["best.json"]
    )


CLUSTER = """if __name__ == "__main__":
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
"""


def test_trials_on_a_cluster_leave_the_same_log(whole, chain, tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed")
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cluster:
        address = cluster.stdout.readline().decode().strip()
        words = [word for word in chain[:-4] if word not in ("--workers", "1")]
        words += ["--precision", "fp32", "--dask", address]
        run("--stage", "tune", *words, "--results", tmp_path / "run")
        cluster.communicate(b"enough\n")
    ours, theirs = contents(tmp_path / "run"), contents(whole)
    assert (
        ours["tuning.jsonl"] == theirs["tuning.jsonl"] and ours["best.json"] == theirs["best.json"]
    )

    def absent(*_, **__):
        raise OSError("nobody there")

    monkeypatch.setattr(distributed, "Client", absent)
    told = refused(capsys, "--stage", "tune", *words, "--results", tmp_path / "none")
    assert f"--dask {address}: OSError('nobody there')" in told
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------- beside the poster


def poster_predictions():
    """Images of the poster's confusion matrix, with logits that say no more than the class."""
    _, rows = metrics.read_csv(reproduce.POSTER / "confusion.csv")
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    true, predicted = np.nonzero(matrix)
    true, predicted = (np.repeat(k, matrix[matrix > 0]) for k in (true, predicted))
    logits = np.eye(8, dtype=np.float32)[predicted]
    return metrics.Predictions(np.arange(len(true)), true, predicted, logits)


def about(**changes):
    names = list(data.TISSUEMNIST_CLASSES)
    counts = [16037, 2352, 1785, 4663, 3570, 2331, 11816, 7446]  # FACTS: support
    known = {"md5": "", "split": "official", "class_names": names, "test_counts": counts}
    return {**known, **changes}


def test_the_posters_matrix_reproduces_the_poster():
    header, rows = reproduce.derived(poster_predictions(), about())["table.csv"]
    assert header[4:] == ["poster", "difference", "tolerance", "verdict"]
    values = [round(row[1], 6) for row in rows[:4]]
    assert values == [0.6387, 0.542641, 0.535631, 0.567883]
    areas = [0.8678, 0.7602, 0.9613, 0.9441, 0.9150, 0.9389, 0.8801, 0.8170]
    assert [row[4] for row in rows] == [0.6387, 0.5426, 0.5356, 0.5678, *areas]
    assert [row[7] for row in rows[:4]] == ["within"] * 4
    assert rows[4][7] == "outside"  # hard decisions for scores: a far smaller area


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),  # the authors' own files: the poster's test set to the image
        ({"md5": data.MEDMNIST["tissuemnist"], "split": "poster", "test_counts": [1]}, True),
        ({"md5": data.MEDMNIST["tissuemnist"], "test_counts": [1]}, False),
        ({"test_counts": [16036, 2353, 1785, 4663, 3570, 2331, 11816, 7446]}, False),
    ],
)
def test_what_is_comparable(changes, expected):
    assert reproduce.comparable(about(**changes)) is expected


def test_a_comparable_run_is_drawn_over_the_poster(finished, tiny, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("auc.csv", "per_class.csv", "roc.csv"):
        text = (reproduce.POSTER / name).read_text().splitlines(keepends=True)
        folder = finished.parent / "poster"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("".join(text[:4] if name != "roc.csv" else text))
    shutil.copy(reproduce.POSTER / "history.csv", folder)
    monkeypatch.setattr(reproduce, "POSTER", folder)
    monkeypatch.setattr(reproduce, "comparable", lambda about: True)
    run("--stage", "figures", "--results", finished)
    for name in ("roc", "history"):
        assert "poster" in (finished / "figures" / f"{name}.svg").read_text()


def test_figures_drawn_later_are_in_the_report(finished, capsys):
    pytest.importorskip("matplotlib")
    shutil.rmtree(finished / "figures")
    mend_sums(finished)
    run("--stage", "figures", "--results", finished)
    assert "figures/roc.png" in (finished / "report.md").read_text()
    assert verify(capsys, finished) == (0, [])


def test_the_posters_figures_are_drawn_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = Path(shutil.copytree(reproduce.POSTER, tmp_path / "poster"))
    before = reproduce.files_in(folder)
    run("--stage", "figures", "--results", folder, "--overwrite")
    assert reproduce.files_in(folder) == before
    assert verify(capsys, folder) == (0, [])


def test_the_posters_folder_agrees_with_itself(tmp_path, capsys):
    folder = Path(shutil.copytree(reproduce.POSTER, tmp_path / "poster"))
    assert verify(capsys, folder) == (0, [])
    for name, row, old, new, told in (
        ("table.csv", 4, "0.5678", "0.5679", None),  # rounded instead of cut: the same figure
        ("table.csv", 1, "0.6387", "0.6388", "table.csv accuracy: 0.6388"),
        ("confusion.csv", 2, "1032", "2032", "table.csv accuracy"),
        ("per_class.csv", 3, "0.04", "0.05", "per_class.csv class 2"),
        ("auc.csv", 8, "0.8170", "0.8270", "auc.csv class 7"),
    ):
        lines = (reproduce.POSTER / name).read_text().splitlines(keepends=True)
        assert old in lines[row]
        lines[row] = lines[row].replace(old, new)
        (folder / name).write_text("".join(lines))
        mend_sums(folder)
        status, wrong = verify(capsys, folder)
        assert (
            (status, wrong) == (0, [])
            if told is None
            else (status == 1 and told in "\n".join(wrong))
        )
        shutil.copy(reproduce.POSTER / name, folder)


def test_the_committed_run_is_consistent(capsys):
    assert verify(capsys, reproduce.REFERENCE / "digits") == (0, [])


# ----------------------------------------------------------------------------------- the audit


def change(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def made_up(folder, row, column, value):
    """Replace a cell of history.csv."""
    header, rows = metrics.read_csv(folder / "history.csv")
    rows[row][header.index(column)] = str(value)
    (folder / "history.csv").write_text(metrics.csv_text(header, rows))


def demote(folder):
    """Give the trial that was promoted first a loss that it would not have been promoted with."""
    trials = [json.loads(line) for line in (folder / "tuning.jsonl").read_text().splitlines()]
    promoted = next(trial["trial"] for trial in trials if trial["rung"] == 1)
    trials[promoted]["loss"] = 9.0
    (folder / "tuning.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))


FORGERIES = {
    "a rate": (lambda f: made_up(f, 1, "learning_rate", 0.03), "row 3, column learning_rate"),
    "a loss": (lambda f: made_up(f, 2, "valid_loss", 0.001), "last row, column valid_loss"),
    "an accuracy": (
        lambda f: made_up(f, 2, "valid_accuracy", 2),
        "last row, column valid_accuracy",
    ),
    "an epoch less": (
        lambda f: (f / "history.csv").write_text(
            "".join((f / "history.csv").read_text().splitlines(keepends=True)[:-1])
        ),
        "history.csv has 2 epochs",
    ),
    "a cell": (lambda f: change(f, "confusion.csv", "\n0,", "\n0,9"), "row 2, column predicted_0"),
    "an interval": (
        lambda f: change(f, "table.csv", "accuracy,0.", "accuracy,0.1"),
        "row 2, column",
    ),
    "the best": (lambda f: change(f, "best.json", '"trial": ', '"trial": 1'), "is not trial"),
    "a promotion": (demote, "tuning.jsonl: line 4"),
    "the report": (lambda f: change(f, "report.md", "0.", "1."), "report.md line"),
    "the split": (lambda f: change(f, "run.json", '"split_seed": 0', '"split_seed": 1'), "row 2"),
    "the seed": (lambda f: change(f, "run.json", '"seed": 0', '"seed": 1'), "tuning.jsonl"),
    "a hyperparameter": (
        lambda f: change(f, "run.json", '"weight_decay": 0.004', '"weight_decay": 0.0004'),
        "not those of the poster",
    ),
    "an epoch's number": (lambda f: made_up(f, 1, "epoch", 7), "row 3, column epoch"),
    "a stage": (
        lambda f: change(f, "run.json", '"test": {', '"compare": {'),
        "run.json tells of no test",
    ),
    "no matrix": (lambda f: (f / "confusion.csv").unlink(), "confusion.csv is missing"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_verify_recomputes_what_can_be_known(finished, capsys, forgery):
    forge, told = FORGERIES[forgery]
    forge(finished)
    mend_sums(finished)  # no checksum tells
    status, wrong = verify(capsys, finished)
    assert status == 1 and told in "\n".join(wrong), wrong


def test_verify_names_every_changed_file(finished, capsys):
    for line in (finished / "SHA256SUMS").read_text().splitlines():
        path = finished / line.split("  ")[1]
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        status, wrong = verify(capsys, finished)
        assert status == 1 and any(path.name in line for line in wrong), path
        path.write_bytes(content)
    assert verify(capsys, finished) == (0, [])


def test_a_missing_file_spoils_only_the_checks_that_need_it(finished, capsys):
    (finished / "predictions.csv").unlink()
    assert verify(capsys, finished) == (1, ["WRONG    predictions.csv is missing"])
    run("--stage", "verify", "--results", finished, status=1)
    printed = capsys.readouterr().out
    assert "ok       the learning rates" in printed and "the predictions: see above" in printed
    (finished / "model.pt").write_bytes(b"damaged")
    _, wrong = verify(capsys, finished)
    assert [line.split()[1] for line in wrong] == ["model.pt", "predictions.csv"]


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (
            lambda f: (f / "run.json").unlink(),
            "run.json is missing or changed: SHA256SUMS alone is checked",
        ),
        (lambda f: (f / "run.json").write_text('{"data": 3}'), "run.json"),
        (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    ],
)
def test_verify_without_what_it_goes_by(finished, capsys, spoil, wrong):
    spoil(finished)
    status, lines = verify(capsys, finished)
    assert status == 1 and len(lines) == 1 and wrong in lines[0]


def test_verify_before_the_test_and_without_the_data(tiny, tmp_path, capsys):
    folder, copy = tmp_path / "run", tmp_path / "copy.npz"
    shutil.copy(tiny, copy)
    run("--stage", "train", "--data", copy, "--epochs", "1", "--results", folder)
    assert verify(capsys, folder) == (0, [])
    copy.unlink()
    told = refused(capsys, "--stage", "verify", "--results", folder)
    assert "copy.npz" in told and "--data, or say --no-model" in told
    assert verify(capsys, folder, "--no-model") == (0, [])
    assert verify(capsys, folder, "--data", str(tiny)) == (0, [])


# -------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stage", "fly"], "invalid choice"),
        (["--stage", "test", "--epochs", "5"], "--epochs has no effect on --stage test"),
        (["--stage", "train", "--no-model"], "--no-model has no effect"),
        (["--stage", "verify", "--seeds", "1", "2"], "--seeds has no effect"),
        (["--eta", "4"], "go with --schedule hyperband"),
        (["--schedule", "hyperband", "--eta", "1"], "no whole number from 2"),
        (["--dask", "here"], "tcp://HOST:PORT"),
        (["--seeds", "1", "1"], "two or more different seeds"),
        (["--epochs", "0"], "no whole number"),
        (["--seed", "00000000000999999999999"], "no whole number"),
        (["--results", ""], "is a variable empty"),
        (["--stage", "verify", "--overwrite"], "--overwrite has no effect"),
        (["--seed", "-1"], "no whole number"),
        (["--split", "official", "--split-seed", "3"], "no effect on --split official"),
        (["--data", "chestmnist"], "chestmnist"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--data", "digits", "--split", "official"], "official"),
        (["--data", "digits", "--device", "tpu"], "tpu"),
        (["--data", "digits", "--hyperparameters", "gone.json"], "gone.json"),
        (["--stage", "verify", "--results", "nowhere"], "nowhere holds no run"),
        (["--stage", "report", "--results", "nowhere"], "nowhere holds no run"),
        (["--stage", "test"], "results/tissuemnist holds no run"),
        (["--stage", "test", "--data", "digits"], "run --stage all first"),
    ],
)
def test_bad_commands_are_one_line(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *words)
    assert not [*tmp_path.iterdir()]  # and nothing half-written


def test_bad_folders_are_one_line(tiny, chain, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    for words in ([], ["--overwrite"]):
        assert "other files" in refused(capsys, *chain, "--results", tmp_path / "notes", *words)
    poster = shutil.copytree(reproduce.POSTER, tmp_path / "poster")
    assert "other files" in refused(capsys, *chain, "--results", poster, "--overwrite")
    (tmp_path / "file").write_text("")
    refused(capsys, *chain, "--results", tmp_path / "file")
    (tmp_path / "run").mkdir()
    for text in ("", "[]", '{"data": 3}', '{"data": {}}', '{"data": {"md5": 1}, "test": 1}'):
        (tmp_path / "run" / "run.json").write_text(text)
        for stage in ("all", "test", "report"):
            words = ["--stage", stage, "--results", tmp_path / "run"]
            assert "run.json is damaged" in refused(capsys, *words)


def test_a_changed_file_is_not_sealed_again(finished, capsys):
    before = (finished / "SHA256SUMS").read_text().splitlines()
    change(finished, "history.csv", "0", "1")
    (finished / "best.json").unlink()
    run("--stage", "report", "--results", finished, "--overwrite")
    after = (finished / "SHA256SUMS").read_text().splitlines()
    assert {line.split()[1] for line in {*before} ^ {*after}} <= {"report.md"}
    status, wrong = verify(capsys, finished)
    assert status == 1 and any("best.json is missing" in line for line in wrong)


def test_two_commands_at_a_time(finished, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (finished / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in refused(capsys, "--stage", "report", "--results", finished)
    run("--stage", "report", "--results", finished)


def test_a_full_disk(finished, chain, tmp_path, monkeypatch, capsys):
    write, left = metrics.write, [6]

    def fills(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(metrics, "write", fills)
    folder = tmp_path / "full"
    assert "No space left on device" in refused(capsys, *chain, "--results", folder)
    left[0] = 10**9
    run("--stage", "all", *chain, "--results", folder)
    assert contents(folder) == contents(finished)


def test_out_of_memory(tiny, tmp_path, monkeypatch, capsys):
    def fit(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(model, "fit", fit)
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "run"]
    assert "out of memory" in refused(capsys, *words)


def processes_naming(text):
    """List the processes whose command line or environment names `text`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                text.encode() in (place / "environ").read_bytes()
                and "Z" not in ((place / "stat").read_text().rpartition(")")[2].split()[0])
            ):
                found.append(int(place.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_search_leaves_no_process_and_goes_on(whole, tiny, tmp_path, kill):
    folder, mark = tmp_path / "run", f"mark-{tmp_path}"
    words = ["--data", tiny, *SEARCH[:-1], "2", "--epochs", "3", "--precision", "fp32"]
    words = [str(word) for word in (SCRIPT, "--stage", "all", *words, "--results", folder)]
    # Where the tests run behind a shell's &, it is ignored, in child processes too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(
        [sys.executable, "-u", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "MARK": mark},
    )
    for line in child.stdout:
        if "trial 0" in line:
            break
    if kill == signal.SIGINT:
        os.killpg(child.pid, kill)  # as a terminal does: to every process
    else:
        child.kill()
    _, error = child.communicate(timeout=60)
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert error.splitlines() == ["reproduce.py: interrupted; the same command goes on"]
    for _ in range(100):
        if not processes_naming(mark):
            break
        time.sleep(0.1)
    assert not processes_naming(mark)
    run(*words[1:])
    assert contents(folder) == contents(whole)


def test_a_closed_pipe_gets_no_traceback(finished):
    command = [sys.executable, str(SCRIPT), "--stage", "verify", "--results", str(finished)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read()
    child.wait()
    child.stderr.close()


def test_progress_is_a_line_a_step_in_a_log_and_a_bar_on_a_terminal(capsys, monkeypatch):
    progress = reproduce.Progress("work", 10)
    progress(1, "one")
    progress(2, "two", step=True)
    assert capsys.readouterr().out.startswith("work     two")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reproduce.Progress("work", 10)(10, "ten", step=True)
    assert f"\rwork     [{'#' * 20}] 100%  ten" in capsys.readouterr().out
