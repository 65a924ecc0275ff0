"""The chain, its folder and its audit, on tiny images; real kills are in faults.py."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from faults import contents, write_tiny
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import data
import metrics
import model
import reproduce

# Precision is pinned so that a run is quick on every processor.
BRIEF = "--epochs 1 --precision fp32"
SEARCH = "--schedule hyperband --max-resource 3 --precision fp32"


def split(*words):
    """Make arguments of words: strings are split at spaces, paths are not."""
    return [a for word in words for a in (word.split() if isinstance(word, str) else [str(word)])]


def command(*words):
    """Run a command line in this process; return its status, stdout and stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = reproduce.main(split(*words))
        except SystemExit as stop:  # argparse's
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def run(*words):
    """Run a command line that must do what it says; return what it prints."""
    status, out, error = command(*words)
    assert status == 0, error
    return out


def refused(*words):
    """Run a command line that must be refused in one line; return the line."""
    status, _, error = command(*words)
    assert status == 2
    assert error.startswith("reproduce.py: error: ") and error.count("\n") == 1, error
    return error


def wrong(folder, *words):
    """Return what verify says is wrong."""
    status, out, _ = command("--stage verify --results", folder, *words)
    found = re.findall("^WRONG    (.*)", out, re.MULTILINE)
    assert status == bool(found)
    return found


def change(folder, name, pattern, new):
    """Change a file wherever it has the pattern."""
    text, count = re.subn(pattern, new, (folder / name).read_text())
    assert count
    (folder / name).write_text(text)


def mend_sums(folder):
    """Write SHA256SUMS again, as somebody who wants to deceive would."""
    lines = (f"{reproduce.sha256(folder / n)}  {n}\n" for n in reproduce.files_in(folder))
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def chain(tiny):
    """Words of a whole run."""
    return "--stage all --data", tiny, SEARCH, "--epochs 3 --results"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chain):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(*chain, folder, "--workers 1")
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def poster(tmp_path):
    return shutil.copytree(reproduce.POSTER, tmp_path / "poster")


# ----------------------------------------------------------------------------------- the chain


def test_all_leaves_every_file_and_seals_them(whole):
    expected = {"run.json", "tuning.jsonl", "best.json", "history.csv", "model.pt", "report.md"}
    expected |= {"predictions.csv", "confusion.csv", "per_class.csv", "table.csv", "roc/auc.csv"}
    expected |= {f"roc/class_{k}.csv" for k in range(3)}
    if find_spec("matplotlib"):
        names = ("class_ratios", "confusion", "history", "roc", "samples", "search")
        expected |= {f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")}
    lines = (whole / "SHA256SUMS").read_text().splitlines()
    assert {*lines} == {f"{sha256((whole / n).read_bytes()).hexdigest()}  {n}" for n in expected}
    assert {p.name for p in whole.iterdir() if p.is_file()} - expected == {"SHA256SUMS", ".lock"}


def test_table_is_scikit_learns(whole):
    path = whole / "predictions.csv"
    classes = [metrics.read_column(path, name) for name in ("label", "predicted")]
    scores = precision_recall_fscore_support(*classes, average="macro", zero_division=0)
    header, rows = metrics.read_csv(whole / "table.csv")
    assert header == ["metric", "value", "low_95", "high_95"]  # nothing of the poster's
    values, lows, highs = np.array(rows)[:, 1:].astype(float).T
    assert values == pytest.approx([accuracy_score(*classes), *scores[2::-1]])
    assert (lows <= values).all() and (values <= highs).all()


def test_what_is_done_is_done_once(finished, chain, monkeypatch):
    monkeypatch.setattr(reproduce.joblib, "cpu_count", lambda: 3)  # of a host with more
    before = contents(finished)
    printed = run(*chain, finished)
    assert "trials 3 at a time" in printed
    assert "tune     done already" in printed and "train    done already" in printed
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --precision fp32 --epochs 4", "train was begun with epochs 3, not 4"),
        ("train --precision fp32 --epochs 3 --seed 1", "train was begun with seed 0"),
        ("train --precision fp32 --epochs 3 --seeds 0 1", "seeds None, not [0, 1]"),
        (f"all --epochs 3 {SEARCH} --hyperparameters tuned", "train was begun with"),
        (f"tune {SEARCH} --seed 1", "tune was begun with seed 0, not 1"),
        ("tune --precision fp32", "tune was begun with schedule"),
        ("test --split official", "with split 'poster', not 'official'"),
        ("test --split-seed 1", "with split_seed 0, not 1"),
        ("test --data digits", "holds another run, with md5"),
    ],
)
def test_a_finished_run_is_not_touched_by_another_command(finished, words, told):
    assert told in refused("--stage", words, "--results", finished)
    assert wrong(finished) == []


def test_overwrite_drops_what_followed(finished, tiny, tmp_path):
    words = "--stage train --overwrite", BRIEF, "--results", finished, "--data"
    network, search = {"history.csv", "model.pt"}, {"tuning.jsonl", "best.json"}

    def left():
        names = {path.name for path in finished.iterdir()}
        return names - {"run.json", "report.md", "SHA256SUMS", ".lock"}

    run(*words, tiny)
    assert left() == network | search
    for seeds in ("3 4", "3 5"):
        run(*words, tiny, "--seeds", seeds)
        assert left() == {f"seed-{seed}" for seed in seeds.split()} | search
    (finished / "run.json").write_text("{")
    run(*words, tiny, "--split official --seeds 3 4")
    assert left() == {"seed-3", "seed-4"}  # the search is of nobody knows what
    write_tiny(tmp_path / "other.npz", size=9)
    run(*words, tmp_path / "other.npz")
    assert left() == network
    assert json.loads((finished / "run.json").read_text())["data"]["split"] == "poster"


def test_overwrite_removes_nothing_for_a_command_that_is_refused(finished, tiny):
    test = "--stage test --overwrite --results", finished
    train = "--hyperparameters tuned --data", tiny, *test, "--stage train"
    assert "--stage tune first" in refused(*train, "--split-seed 1")  # the search has another
    record = (finished / "run.json").read_text()
    (finished / "run.json").write_text("{")
    assert "--stage tune first" in refused(*train)
    (finished / "run.json").write_text(record)
    for name, words in ("best.json", train), ("model.pt", test):
        (finished / name).rename(finished / "away")
        assert name in refused(*words)
        (finished / "away").rename(finished / name)
    assert wrong(finished) == []


def test_overwriting_the_search_drops_what_was_trained_by_it(tiny, tmp_path):
    words = SEARCH, "--workers 1 --data", tiny, "--results", tmp_path / "run"
    run(*words, "--epochs 1 --hyperparameters tuned --seeds 0 1")
    run("--stage tune --seed 1 --overwrite", *words)
    assert not [*tmp_path.glob("run/seed*")]


def test_the_reports_commands_do_the_same_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.joblib, "cpu_count", lambda: 1)  # no processes are started
    folder, again = tmp_path / "run", tmp_path / "again"
    common = "--precision fp32 --results", folder, "--stage"
    run(*common, "tune --split-seed 5 --seed 1", SEARCH, "--data", tiny)
    run(*common, "train --hyperparameters tuned --epochs 2 --seed 2")
    run("--stage test --results", folder)
    lines = (folder / "report.md").read_text().split("```")[1].split("\n")[1:-1]
    commands = [shlex.split(line)[2:] for line in lines]
    assert [words[:2] for words in commands] == [["--stage", s] for s in ("tune", "train", "test")]
    for words in commands:
        words[words.index("--results") + 1] = again
        run(*words)
    for name in ("best.json", "predictions.csv"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_hyperparameters_from_a_file(tiny, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"num_features": 4, "epochs": 1, "learning_rate": 0.01}')
    words = "--stage train --data", tiny, "--results", tmp_path / "run", "--hyperparameters"
    run(*words, path)
    assert model.load_network(tmp_path / "run" / "model.pt").config["num_features"] == 4
    path.write_text('{"learning_rat": 0.01}')
    assert "holds no hyperparameters" in refused(*words, path)
    assert "--stage tune first" in refused(*words, "tuned")


def test_several_seeds(tiny, tmp_path):
    folder = tmp_path / "seeds"
    words = "--epochs 2 --precision fp32 --seeds 3 4 --data", tiny, "--results", folder
    run("--stage train", *words)
    assert "seeds.csv" not in (folder / "SHA256SUMS").read_text()  # nothing is tested yet
    run("--workers 1", SEARCH, *words)
    for n in (3, 4):
        assert f'"seed": {n}' in (folder / f"seed-{n}" / "run.json").read_text()
    both = np.array([metrics.read_column(folder / f"seed-{n}/table.csv", "value") for n in (3, 4)])
    expected = [both.mean(0), both.std(0, ddof=1), both.min(0), both.max(0)]
    header, rows = metrics.read_csv(folder / "seeds.csv")
    assert header == ["metric", "runs", "mean", "std", "min", "max"]
    assert np.array(rows)[:, 2:].astype(float) == pytest.approx(np.transpose(expected))
    assert "seed-3/" not in (folder / "SHA256SUMS").read_text()
    assert "--seeds 3 4" in (folder / "report.md").read_text()
    assert wrong(folder) == []
    (folder / "seed-4" / "history.csv").unlink()
    assert wrong(folder) == ["history.csv is missing"]
    change(folder, "run.json", r'"seeds": \[', '"seeds": [7,')
    assert wrong(folder)[0].startswith("run.json is missing or changed")


def test_compare_resumes_from_its_rows(tiny, tmp_path):
    folder, path = tmp_path / "run", tmp_path / "run" / "compare.csv"
    words = "--stage compare --compare-max 30 --data", tiny, BRIEF, "--results", folder
    run(*words)
    header, rows = metrics.read_csv(path)
    assert [row[:2] for row in rows] == [[system, "30"] for system in reproduce.SYSTEMS]
    knn, *_, cnn = metrics.read_column(path, "model_mb")
    assert knn > 30 * 64 * 4 / 1e6  # it keeps its training set, as float32
    network = model.PosterCNN(num_classes=3, image_size=8)
    weights = 4 * sum(weight.numel() for weight in network.parameters()) / 1e6
    assert weights < cnn < 1.1 * weights
    assert "| KNN" in (folder / "report.md").read_text()
    path.write_text(metrics.csv_text(header, rows[:2]))
    change(folder, "run.json", '"seconds": .*', '"seconds": null')
    (folder / "SHA256SUMS").unlink()
    run(*words)
    _, resumed = metrics.read_csv(path)
    assert resumed[:2] == rows[:2]  # seconds too
    assert [row[:2] for row in resumed] == [row[:2] for row in rows]
    assert wrong(folder) == []


def test_growth_is_the_exponent(tmp_path):
    sizes, path = (100, 200, 1000), tmp_path / "compare.csv"
    systems = [(n, system) for n in sizes for system in reproduce.SYSTEMS]
    rows = [[system, n, 1, 1, 1, 1, 3 * n**1.5, 0.2, n, ""] for n, system in systems]
    path.write_text(metrics.csv_text(reproduce.COMPARE_HEADER, rows))
    powers = reproduce.growth(path)
    assert powers[0] == ["KNN", "1.50", "0.00", "1.00"] and len(powers) == 5
    path.write_text(metrics.csv_text(reproduce.COMPARE_HEADER, rows[:5]))
    assert reproduce.growth(path) == []  # one size shows none


def test_the_digits_stand_in_where_there_is_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/{name}.npz")  # the discard port: closed
    monkeypatch.setattr(reproduce, "REFERENCE", tmp_path)
    ours, again = tmp_path / "digits", tmp_path / "again"
    words = "--stage train", BRIEF, "--root", tmp_path / "none", "--results", ours
    status, printed, error = command(*words)
    assert status == 0 and error.startswith("NOTE: ") and "digits" in error.splitlines()[0]
    assert printed.splitlines()[-1].startswith("NOTE: without a network")
    run("--stage test --results", ours)
    shutil.copytree(ours, again)
    assert f"450 of 450 predictions are those of {ours}" in run("--stage test --results", again)


CLUSTER = """if __name__ == "__main__":
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
"""


def test_trials_on_a_cluster_leave_the_same_log(whole, tiny, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    start = [sys.executable, "-c", CLUSTER]
    with Popen(start, stdin=PIPE, stdout=PIPE, text=True) as cluster:
        address = cluster.stdout.readline().strip()
        words = "--stage tune", SEARCH, "--data", tiny, "--dask", address, "--results"
        run(*words, tmp_path / "run")
        cluster.communicate("enough\n")
    for name in ("tuning.jsonl", "best.json"):
        assert contents(tmp_path / "run")[name] == contents(whole)[name]
    monkeypatch.setattr(distributed, "Client", Mock(side_effect=OSError("nobody there")))
    told = refused(*words, tmp_path / "none")
    assert f"--dask {address}: OSError('nobody there')" in told
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------- beside the poster


def about(**changes):
    """What run.json says of the authors' own files: the poster's test set to the image."""
    names = list(data.TISSUEMNIST_CLASSES)
    counts = [16037, 2352, 1785, 4663, 3570, 2331, 11816, 7446]
    known = {"md5": "", "split": "official", "class_names": names, "test_counts": counts}
    return {**known, **changes}


def test_the_posters_matrix_reproduces_the_poster():
    _, rows = metrics.read_csv(reproduce.POSTER / "confusion.csv")
    matrix = np.array(rows)[:, 1:].astype(int)
    true, predicted = (np.repeat(k, matrix.ravel()) for k in np.indices((8, 8)).reshape(2, 64))
    logits = np.eye(8, dtype=np.float32)[predicted]  # which say no more than the class
    predictions = metrics.Predictions(np.arange(50_000), true, predicted, logits)
    header, rows = reproduce.derived(predictions, about())["table.csv"]
    assert header[4:] == ["poster", "difference", "tolerance", "verdict"]
    assert [round(row[1], 6) for row in rows[:4]] == [0.6387, 0.542641, 0.535631, 0.567883]
    areas = [0.8678, 0.7602, 0.9613, 0.9441, 0.9150, 0.9389, 0.8801, 0.8170]
    assert [row[4] for row in rows] == [0.6387, 0.5426, 0.5356, 0.5678, *areas]
    assert [row[7] for row in rows[:4]] == ["within"] * 4
    assert rows[4][7] == "outside"  # hard decisions for scores: a far smaller area


def test_what_is_comparable():
    tissuemnist = data.MEDMNIST["tissuemnist"]
    others = [16036, 2353, 1785, 4663, 3570, 2331, 11816, 7446]
    assert reproduce.comparable(about())
    assert reproduce.comparable(about(md5=tissuemnist, split="poster", test_counts=[1]))
    assert not reproduce.comparable(about(md5=tissuemnist, test_counts=[1]))
    assert not reproduce.comparable(about(test_counts=others))


def test_a_comparable_run_is_drawn_over_the_poster(finished, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reproduce, "comparable", lambda about: True)
    run("--stage figures --results", finished)
    for name in ("roc", "history"):
        assert "poster" in (finished / "figures" / f"{name}.svg").read_text()


def test_figures_drawn_later_are_in_the_report(finished):
    pytest.importorskip("matplotlib")
    shutil.rmtree(finished / "figures")
    mend_sums(finished)
    run("--stage figures --results", finished)
    assert "figures/roc.png" in (finished / "report.md").read_text()
    assert wrong(finished) == []


def test_the_posters_figures_are_drawn_again(poster):
    pytest.importorskip("matplotlib")
    before = reproduce.files_in(poster)
    run("--stage figures --overwrite --results", poster)
    assert reproduce.files_in(poster) == before
    assert wrong(poster) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("table.csv", "0.5678", "0.5679", None),  # rounded instead of cut: the same figure
        ("table.csv", "0.6387", "0.6388", "table.csv accuracy: 0.6388"),
        ("confusion.csv", "1032", "2032", "table.csv accuracy"),
        ("per_class.csv", "0.04", "0.05", "per_class.csv class 2"),
        ("auc.csv", "0.8170", "0.8270", "auc.csv class 7"),
    ],
)
def test_the_posters_folder_agrees_with_itself(poster, name, old, new, told):
    change(poster, name, old, new)
    mend_sums(poster)
    found = wrong(poster)
    assert found[0].startswith(told) if told else not found


def test_the_committed_run_is_consistent():
    assert wrong(reproduce.REFERENCE / "digits") == []


# ----------------------------------------------------------------------------------- the audit


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("history.csv", "\n1,[^,]*", "\n1,0.03", "history.csv row 3, column learning_rate"),
        ("history.csv", "\n1,", "\n7,", "history.csv row 3, column epoch"),
        ("history.csv", "(\n2(,.*?){2}),.*?,", r"\1,0.001,", "last row, column valid_loss"),
        ("history.csv", "(\n2(,.*?){4}),.*?,", r"\1,2,", "last row, column valid_accuracy"),
        ("history.csv", "\n2,.*", "", "history.csv has 2 epochs"),
        ("confusion.csv", "\n0,", "\n0,9", "confusion.csv row 2, column predicted_0"),
        ("table.csv", "accuracy,0.", "accuracy,0.1", "table.csv row 2, column"),
        ("best.json", '"trial": ', '"trial": 1', "best.json is not trial"),
        ("tuning.jsonl", '"loss": ', '"loss": -', "tuning.jsonl: line 4"),  # another's promoted
        ("report.md", r"0\.", "1.", "report.md line"),
        ("predictions.csv", r"0\.", "1.", "predictions.csv row 2: the logits"),
        ("predictions.csv", r"(\n\d+),[01]", r"\1,2", "the label is not the image's"),
        ("run.json", '"dropout": 0.5', '"dropout": 0.6', "model.pt is"),
        ("run.json", '"split_seed": 0', '"split_seed": 1', "predictions.csv row 2: the id"),
        ("run.json", '"seed": 0', '"seed": 1', "tuning.jsonl"),
        ("run.json", '"weight_decay": 0.004', '"weight_decay": 0.0004', "not those of the poster"),
        ("run.json", '"test": {', '"compare": {', "run.json tells of no test"),
    ],
)
def test_verify_recomputes_what_can_be_known(finished, name, old, new, told):
    change(finished, name, old, new)
    mend_sums(finished)  # no checksum tells
    assert told in "\n".join(wrong(finished))


def test_verify_names_every_changed_file(finished):
    for name in reproduce.files_in(finished):
        content = (finished / name).read_bytes()
        (finished / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert Path(name).name in "\n".join(wrong(finished))
        (finished / name).write_bytes(content)
    (finished / "other").touch()
    assert wrong(finished) == ["other is none of the run's files"]


def test_a_missing_file_spoils_only_the_checks_that_need_it(finished):
    (finished / "confusion.csv").unlink()
    mend_sums(finished)
    assert wrong(finished) == ["confusion.csv is missing"]
    (finished / "predictions.csv").unlink()
    assert wrong(finished) == ["predictions.csv is missing"]
    _, printed, _ = command("--stage verify --results", finished)
    assert "ok       the learning rates" in printed and "the predictions: see above" in printed
    (finished / "model.pt").write_bytes(b"damaged")
    assert [line.split()[0] for line in wrong(finished)] == ["model.pt", "predictions.csv"]


def test_verify_without_what_it_goes_by(finished):
    (finished / "run.json").write_text('{"data": 3}')
    assert len(wrong(finished)) == 1
    (finished / "run.json").unlink()
    assert wrong(finished) == ["run.json is missing or changed: SHA256SUMS alone is checked"]


def test_verify_before_the_test_and_without_the_data(tiny, tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "copy.npz"
    shutil.copy(tiny, copy)
    run("--stage train --split official --data", copy, BRIEF, "--results", folder)
    assert wrong(folder) == []
    copy.unlink()
    told = refused("--stage verify --results", folder)
    assert "copy.npz" in told and "--data, or say --no-model" in told
    assert wrong(folder, "--no-model") == []
    assert wrong(folder, "--data", tiny) == []


# -------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--stage fly", "invalid choice"),
        ("--stage test --epochs 5", "--epochs has no effect on --stage test"),
        ("--stage train --no-model", "--no-model has no effect"),
        ("--stage verify --seeds 1 2", "--seeds has no effect"),
        ("--stage verify --overwrite", "--overwrite has no effect"),
        ("--eta 4", "go with --schedule hyperband"),
        ("--schedule hyperband --eta 1", "no whole number from 2"),
        ("--dask here", "tcp://HOST:PORT"),
        ("--seeds 1 1", "two or more different seeds"),
        ("--epochs 0", "no whole number"),
        ("--seed -1", "no whole number"),
        ("--seed 00000000000999999999999", "no whole number"),
        ("--results=", "is a variable empty"),
        ("--split official --split-seed 3", "no effect on --split official"),
        ("--data chestmnist", "chestmnist"),
        ("--data nowhere.npz", "nowhere.npz"),
        ("--data digits --split official", "official"),
        ("--data digits --device tpu", "tpu"),
        ("--data digits --hyperparameters gone.json", "gone.json"),
        ("--stage verify --results nowhere", "nowhere holds no run"),
        ("--stage report --results nowhere", "nowhere holds no run"),
        ("--stage test", f"{Path('results', 'tissuemnist')} holds no run"),
        ("--stage test --data digits", "run --stage all first"),
    ],
)
def test_bad_commands_are_one_line(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(words)
    assert not [*tmp_path.iterdir()]  # and nothing half-written


def test_bad_folders_are_one_line(chain, poster, tmp_path):
    assert "other files" in refused(*chain, poster, "--overwrite")
    (tmp_path / "diary.txt").write_text("mine")
    for words in ("", "--overwrite"):
        assert "other files" in refused(*chain, tmp_path, words)
    refused(*chain, tmp_path / "diary.txt")
    folder = tmp_path / "run"
    folder.mkdir()
    entry = '{"data": {"test_counts": [1]}, "test": {"options": {}}}'  # two of its keys are gone
    for text in ("", "[]", '{"data": 3}', '{"data": {}}', '{"data": {"md5": 1}}', entry):
        (folder / "run.json").write_text(text)
        for stage in ("all", "test", "report"):
            assert "run.json is damaged" in refused("--stage", stage, "--results", folder)


def test_a_changed_file_is_not_sealed_again(finished):
    change(finished, "tuning.jsonl", '"seconds": ', '"seconds": 1')  # which no other check sees
    (finished / "best.json").unlink()
    (finished / "notes").touch()
    run("--stage report --overwrite --results", finished)
    text = (finished / "table.csv").read_text()
    (finished / "table.csv").write_text("junk")
    assert "table.csv" in refused("--stage report --results", finished)  # which seals, too
    (finished / "table.csv").write_text(text)
    assert wrong(finished) == [
        "best.json is missing",
        "notes is none of the run's files",
        "tuning.jsonl is not as it was written",
    ]


def test_two_commands_at_a_time(finished):
    fcntl = pytest.importorskip("fcntl")
    with (finished / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in refused("--stage report --results", finished)
    run("--stage report --results", finished)


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("save_network", OSError(errno.ENOSPC, "No space left"), "No space left"),
        ("predict", torch.OutOfMemoryError("tried to allocate"), "out of memory"),
    ],
)
def test_a_run_short_of_room_goes_on(finished, whole, chain, monkeypatch, name, error, told):
    words = *chain, finished, "--workers 1"
    with monkeypatch.context() as patched:
        patched.setattr(model, name, Mock(side_effect=error))
        assert told in refused(*words, "--overwrite")
    assert "SHA256SUMS is missing: the last command did not end" in wrong(finished)
    run(*words)
    assert contents(finished) == contents(whole)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_search_leaves_no_process_and_goes_on(whole, chain, tmp_path, kill):
    words = *chain, tmp_path / "run", "--workers 2"
    # Where the tests run behind a shell's &, it is ignored, in child processes too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = [sys.executable, "-u", reproduce.__file__, *split(*words)]
    child = Popen(start, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
    next(line for line in child.stdout if "trial 0" in line)
    send = os.killpg if kill == signal.SIGINT else os.kill  # a terminal sends to every process
    send(child.pid, kill)
    _, error = child.communicate(timeout=60)  # until no process holds the other end of a pipe
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert error == "reproduce.py: interrupted; the same command goes on\n"
    run(*words)
    assert contents(tmp_path / "run") == contents(whole)


def test_a_closed_pipe_ends_a_command_in_silence(finished):
    reading, writing = os.pipe()
    os.close(reading)
    start = [sys.executable, reproduce.__file__, "--stage", "verify", "--results", finished]
    with Popen(start, stdout=writing, stderr=PIPE) as child:
        os.close(writing)
        assert child.stderr.read() == b""
    assert child.returncode == 2


def test_progress_is_a_line_a_step_in_a_log_and_a_bar_on_a_terminal(capsys, monkeypatch):
    progress = reproduce.Progress("work", 10)
    progress(1, "one")
    progress(2, "two", step=True)
    assert capsys.readouterr().out.startswith("work     two")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reproduce.Progress("work", 10)(10, "ten", step=True)
    assert f"\rwork     [{'#' * 20}] 100%  ten" in capsys.readouterr().out
