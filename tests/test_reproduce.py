"""The chain, its folders and its audit, on tiny images; real kills are in faults.py."""

import errno
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from subprocess import PIPE, Popen
from unittest import mock
from unittest.mock import Mock

import faults
import numpy as np
import pytest
import torch
from faults import contents, save_npz, write_tiny

import data
import metrics
import model
import reproduce

SEARCH = "--schedule 3,3 --precision fp32"  # the precision that is quick on every processor
BRIEF = "--epochs 1 --precision fp32"
REPOSITORY = Path(reproduce.__file__).parent
FIND_SPEC = importlib.util.find_spec


def command(*words):
    """Run a command line of words, of which strings are split; return status, stdout, stderr."""
    split = [word.split() if isinstance(word, str) else [str(word)] for word in words]
    return faults.command([*itertools.chain(*split)])


def run(*words):
    """Run a command line that must succeed; return what it prints."""
    status, out, error = command(*words)
    assert status == 0, out + error
    return out


def refused(*words):
    """Run a command line that must be refused in one line; return the line."""
    status, _, error = command(*words)
    assert status == 2
    assert error.startswith("reproduce.py: error: ") and error.count("\n") == 1, error
    return error


def wrong(folder, *words):
    """Return what verify finds wrong."""
    status, out, error = command("--stage verify --results", folder, *words)
    found = re.findall("^WRONG    (.*)", out, re.MULTILINE)
    assert status == bool(found), error
    return found


def interrupt(*words):
    """Run a command line until Ctrl-C at the end of its first trial, epoch or row."""

    def show(progress, done, text, is_step=False):
        if is_step:
            raise KeyboardInterrupt

    with mock.patch.object(reproduce.Progress, "show", show):
        assert command(*words)[0] == 130


def change(folder, name, pattern, new):
    """Change files, whose name may be a glob pattern, wherever they have a pattern."""
    for path in [*folder.glob(name)]:
        text, count = re.subn(pattern, new, path.read_text())
        assert count
        path.write_text(text)


def mend_sums(folder):
    """Write every SHA256SUMS again, as somebody who wants to deceive would."""
    for path in folder.glob("*/SHA256SUMS"):
        metrics.write_sums(path.parent)


def snapshot(*folders):
    """Return the bytes and the time of the last change of everything in folders."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths}


def record(folder, stage):
    return json.loads((folder / stage / "run.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Draw no figures and start no worker processes unless a test asks for them."""

    def find_spec(name, *package):
        return None if name == "matplotlib" else FIND_SPEC(name, *package)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", find_spec)
        patched.setattr(reproduce.joblib, "cpu_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def chain(tiny):
    """Return the words of a whole run but for its folder."""
    return "--stage all --data", tiny, SEARCH, "--epochs 3 --results"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chain):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(*chain, folder)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


# ---- the chain -----------------------------------------------------------------------------------


def test_all_leaves_every_file_and_each_stage_is_sealed(whole):
    stages = {"tune": "tuning.jsonl best.json", "train": "history.csv model.pt"}
    stages["test"] = "predictions.csv confusion.csv per_class.csv table.csv roc/auc.csv "
    stages["test"] += "roc/class_0.csv roc/class_1.csv roc/class_2.csv"
    assert {path.name for path in whole.iterdir()} == {*stages, "report.md", ".lock"}
    for stage, names in stages.items():
        folder, names = whole / stage, {"run.json", *names.split()}
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == names | {"SHA256SUMS"}
        lines = {f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names}
        assert {*(folder / "SHA256SUMS").read_text().splitlines()} == lines


def test_a_finished_stage_is_not_done_again(finished, chain):
    stages = [finished / stage for stage in ("tune", "train", "test")]
    before = snapshot(*stages)
    for words in (*chain, finished), ("--stage tune train test --results", finished):
        assert run(*words).count("done already") == 3
    assert snapshot(*stages) == before


@pytest.mark.parametrize(
    ("words", "made", "option"),
    [
        ("train --epochs 4", "train was made with epochs 3, not 4", "epochs"),
        ("train --precision bf16", "train was made with precision 'fp32'", "precision"),
        ("train --compile on", "train was made with compile 'off', not 'on'", "compile"),
        ("train --epochs 3 --hyperparameters authors", "with learning_rate", "hyperparameters"),
        ("train --epochs 3 --hyperparameters tuned", "train was made with", "hyperparameters"),
        ("tune --schedule poster", "tune was made with schedule '3,3'", "schedule"),
        ("test --split official", "with split 'poster', not 'official'", "split"),
        ("test --split-seed 1", "with split_seed 0, not 1", "split-seed"),
        ("test --pixels raw", "with pixels 'stretched', not 'raw'", "pixels"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(finished, words, made, option):
    before = snapshot(finished)
    line = refused("--stage", words, "--results", finished)
    assert made in line and f"leave out --{option} to go on, or " in line
    place = re.search("error: (.*) was made", line)[1]
    is_data = option in ("split", "split-seed", "pixels")
    assert ("choose another --results" if is_data else f"remove {place} to do it again") in line
    assert snapshot(finished) == before


def test_other_images_are_refused_and_nothing_is_touched(finished):
    before = snapshot(finished)
    line = refused("--stage test --data digits --results", finished)
    assert "tune was made with md5 " in line and line.endswith(": choose another --results\n")
    assert snapshot(finished) == before


def test_what_is_not_given_is_as_the_stage_was_begun(tiny, tmp_path):
    auto = model.resolve_precision("auto", torch.device("cpu"))
    other = "bf16" if auto == "fp32" else "fp32"
    settings = f"--seed 2 --split-seed 5 --pixels raw --precision {other}"
    train = "--stage train --hyperparameters authors --epochs 2", settings, "--data", tiny
    tune = "--stage tune --schedule 3,3 --retrain", settings
    once, twice = ("--results", tmp_path / "once"), ("--results", tmp_path / "twice")
    run(*train, *once)
    run(*tune, *once)
    interrupt(*train, *twice)
    run("--stage train --precision auto --data auto", *twice)
    interrupt(*tune, *twice)
    assert [*tmp_path.glob("twice/tune.part/trials/trial-0000-*-rung-0")]  # with --retrain
    run("--stage tune", *twice)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    assert wrong(tmp_path / "twice") == []
    assert "done already" in run("--stage train --hyperparameters authors", *twice)  # 2 epochs


def test_the_report_is_about_finished_stages(finished, tiny, tmp_path):
    interrupt("--stage train --data", tiny, BRIEF, "--epochs 2 --results", tmp_path / "begun")
    for stage in ("report", "verify"):
        assert "finished stage" in refused("--stage", stage, "--results", tmp_path / "begun")
    (finished / "figures").mkdir()
    for name in ("roc", "history"):
        (finished / "figures" / f"{name}.png").touch()
    (finished / "test").rename(tmp_path / "test")
    run("--stage report --results", finished)
    text = (finished / "report.md").read_text()
    assert "figures/history.png" in text and "figures/roc.png" not in text


def test_tuned_hyperparameters_are_the_searchs(tiny, tmp_path):
    folder = tmp_path / "run"
    tuned = BRIEF, "--hyperparameters tuned --data", tiny, "--results", folder, "--stage"
    assert "no finished tune: do --stage tune first" in refused(*tuned, "train")
    assert not folder.exists()
    printed = run(*tuned, "test train tune --schedule 3,3")
    assert "train    after tune\n" in printed and "test     after train\n" in printed
    best = json.loads((folder / "tune" / "best.json").read_text())["hyperparameters"]
    settings = record(folder, "train")["settings"]
    assert {name: settings[name] for name in best} == {**best, "epochs": 1}
    assert "train    seed 0, " in run(*tuned, "train")  # known before anything runs
    (folder / "tune").rename(tmp_path / "away")
    assert "train was made with a tune that is gone: remove it" in refused(*tuned, "tune train")
    assert "train was made with a tune that is not here" in wrong(folder)[0]


def test_hyperparameters_from_a_file(tiny, tmp_path):
    mine, best = tmp_path / "mine.json", tmp_path / "best.json"
    train = "--stage train --precision fp32 --data", tiny, "--results", tmp_path / "run"
    mine.write_text('{"num_features": 4, "epochs": 1, "learning_rate": 0.01}')
    run(*train, "--hyperparameters", mine)
    network = model.load_network(tmp_path / "run" / "train" / "model.pt")
    assert network.config["num_features"] == 4
    best.write_text('{"trial": 3, "hyperparameters": ' + mine.read_text() + "}")
    assert "done already" in run(*train, "--hyperparameters", best)  # values count, not names
    mine.write_text('{"learning_rat": 0.01}')
    assert "mine.json holds no hyperparameters" in refused(*train, "--hyperparameters", mine)


def test_the_reports_commands_do_the_same_again(tiny, tmp_path):
    folder, again = tmp_path / "run", tmp_path / "again"
    common = "--precision fp32 --results", folder, "--stage"
    run(*common, "tune --schedule 3,3 --split-seed 5 --pixels raw --seed 1 --data", tiny)
    run(*common, "train --hyperparameters tuned --epochs 2 --seed 2")
    run("--stage test --results", folder)
    lines = (folder / "report.md").read_text().split("```")[1].split("\n")[1:-1]
    commands = [shlex.split(line)[2:] for line in lines]
    assert [words[:2] for words in commands] == [["--stage", s] for s in ("tune", "train", "test")]
    for words in commands:
        words[words.index("--results") + 1] = str(again)
        assert faults.command(words)[0] == 0
    for name in ("tune/best.json", "test/predictions.csv"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_stretched_and_raw_runs_have_the_same_test_images(whole, tiny, tmp_path):
    words = "--stage train test --pixels raw --epochs 3 --precision fp32 --data", tiny
    run(*words, "--results", tmp_path)
    found = [metrics.read_predictions(f / "test" / "predictions.csv") for f in (whole, tmp_path)]
    assert (found[0].ids == found[1].ids).all() and (found[0].labels == found[1].labels).all()
    images = data.load(tiny).images
    raw = images[data.ids(images).tolist().index(found[0].ids[0])]
    low, high = raw.min(), raw.max()
    stretched = ((raw.astype(int) - low) * 255 // (int(high) - low)).astype(np.uint8)
    for folder, image, predictions in zip((whole, tmp_path), (stretched, raw), found, strict=True):
        network = model.load_network(folder / "train" / "model.pt")
        logits = model.predict(network, image[None], device="cpu").numpy()[0]
        assert network.pixels == ("raw" if image is raw else "stretched")
        assert np.allclose(logits, predictions.logits[0], atol=1e-4)
    assert not np.allclose(found[0].logits, found[1].logits)


def test_compare_resumes_from_its_rows(tiny, tmp_path):
    words = "--stage compare --compare-max 30 --data", tiny, BRIEF, "--results", tmp_path
    interrupt(*words)
    _, begun = metrics.read_csv(tmp_path / "compare.part" / "compare.csv")
    run(*words)
    path = tmp_path / "compare" / "compare.csv"
    _, rows = metrics.read_csv(path)
    assert [row[:2] for row in rows] == [[system, "30"] for system in reproduce.SYSTEMS]
    assert rows[:1] == begun  # seconds too
    knn, *_, cnn = metrics.read_column(path, "model_mb")
    assert knn > 30 * 64 * 4 / 1e6  # it keeps its training set, as float32
    network = model.PosterCNN(num_classes=3, image_size=8)
    weights = 4 * sum(weight.numel() for weight in network.parameters()) / 1e6
    assert weights < cnn < 1.1 * weights
    assert "| KNN" in (tmp_path / "report.md").read_text()
    assert wrong(tmp_path) == []


def test_the_digits_stand_in_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/{name}.npz")  # the discard port: closed
    (tmp_path / "h.json").write_text('{"num_features": 1, "epochs": 1}')
    words = "--stage train --precision fp32 --root", tmp_path, "--results", tmp_path / "run"
    status, printed, error = command(*words, "--hyperparameters", tmp_path / "h.json")
    assert status == 0 and error.startswith("NOTE: the digits stand in for TissueMNIST: no conn")
    assert printed.splitlines()[-1].startswith("NOTE: these are scikit-learn's digits")
    assert "NOTE" not in run("--stage train --data digits --results", tmp_path / "run")


def test_predictions_are_counted_that_are_those_of_our_own_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "REFERENCE", tmp_path)
    ours = shutil.copytree(finished, tmp_path / "tiny")
    words = "--stage test --results", finished
    assert f"\n22 of 22 predictions are those of {ours}\n" in run(*words)
    path = ours / "test" / "predictions.csv"
    predictions = metrics.read_predictions(path)
    least = (-predictions.logits).argmax(1)
    others = predictions._replace(predicted=least, logits=-predictions.logits)
    path.write_text(metrics.predictions_text(others))
    assert f"\n0 of 22 predictions are those of {ours}\n" in run(*words)
    change(ours, "train/run.json", '"dropout": 0.5', '"dropout": 0.4')
    assert "predictions are those" not in run(*words)


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
        assert contents(tmp_path / "run" / "tune")[name] == contents(whole / "tune")[name]
    assert record(tmp_path / "run", "tune")["environments"][0]["trials"] == f"on {address}"
    monkeypatch.setattr(distributed, "Client", Mock(side_effect=OSError("nobody there")))
    assert f"--dask {address}: OSError('nobody there')" in refused(*words, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_no_more_workers_than_the_largest_rung_has_trials(tiny, tmp_path, monkeypatch):
    pool = Mock(side_effect=lambda workers, *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(reproduce, "Workers", pool)
    run("--stage tune --workers 64", SEARCH, "--data", tiny, "--results", tmp_path)
    assert pool.call_args[0][0] == 3


# ---- folders -------------------------------------------------------------------------------------


def test_a_stage_folder_without_run_json_is_refused_unless_nothing_is_in_it(tiny, tmp_path):
    train = "--stage train", BRIEF, "--data", tiny, "--results", tmp_path
    (tmp_path / "train").mkdir()
    for words in train, ("--stage verify --results", tmp_path):
        assert f"{tmp_path / 'train'} has no run.json, so it is not ours" in refused(*words)
    part = (tmp_path / "train").rename(tmp_path / "train.part")
    (part / "training.pt").touch()
    assert "train.part has no run.json" in refused(*train)
    assert [path.name for path in tmp_path.rglob("*")] == ["train.part", "training.pt"]
    (part / "training.pt").rename(part / "run.json.tmp")
    run(*train)
    assert wrong(tmp_path) == []


def test_a_test_whose_network_is_gone_is_refused(finished):
    (finished / "train").rename(finished.parent / "away")
    for stages in ("train", "test", "train test", "tune", "report"):
        line = refused("--stage", stages, "--results", finished)
        assert f"{finished / 'test'} was made with a train that is gone: remove it as well" in line
    assert "test was made with a train that is not here" in wrong(finished)[0]


def test_folders_of_other_files_are_refused(chain, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    assert "holds other files, as diary.txt: name new --results" in refused(*chain, tmp_path)
    refused(*chain, tmp_path / "diary.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_a_damaged_run_json_is_refused(finished):
    path = finished / "train" / "run.json"
    for text in "", "[]", '{"data": 3}', '{"data": {"md5": 1}}', "[" * 9**5:
        path.write_text(text)
        for stage in ("all", "report"):
            line = refused("--stage", stage, "--results", finished)
            assert f"{path}: damaged; restore it, or remove {path.parent} to do it again" in line
        assert wrong(finished)[0].startswith("train/run.json: damaged; restore it")


def test_verify_with_images_where_every_run_json_is_damaged(finished, tiny):
    for path in finished.glob("*/run.json"):
        path.write_text("{}")
    assert wrong(finished, "--data", tiny)[0].startswith("tune/run.json: damaged; restore it")


def test_a_resumed_stage_records_both_machines(whole, tiny, tmp_path, monkeypatch):
    train = "--stage train --epochs 2 --precision fp32 --data", tiny, "--results", tmp_path
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # another repository's
    interrupt(*train)
    commit = record(tmp_path, "train.part")["environments"][0]["git_commit"]
    assert commit == record(whole, "train")["environments"][0]["git_commit"]
    change(tmp_path, "train.part/run.json", '"git_commit": .*', '"git_commit": "abc"')
    here = model.environment("cpu")
    monkeypatch.setattr(model, "environment", lambda device: {**here, "device_name": "another"})
    status, _, error = command(*train)
    assert (status, error) == (0, "NOTE: train was begun with the code of another commit\n")
    first, second = record(tmp_path, "train")["environments"]
    assert (first["git_commit"], second["git_commit"]) == ("abc", commit)
    assert (first["device_name"], second["device_name"]) == (here["device_name"], "another")
    lines = (tmp_path / "report.md").read_text().split("- train: ")[1].splitlines()
    assert lines[0].endswith(" seconds (all epochs)") and len(lines) == 3
    seconds = metrics.read_column(tmp_path / "train" / "history.csv", "seconds")
    assert record(tmp_path, "train")["seconds"] == pytest.approx(sum(seconds))


def test_one_command_at_a_time_uses_a_folder(finished):
    fcntl = pytest.importorskip("fcntl")
    with (finished / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is in use by another process" in refused("--stage report --results", finished)
    run("--stage report --results", finished)


# ---- figures and the poster ----------------------------------------------------------------------


def test_figures_are_drawn_and_a_stage_made_anew_removes_its_own(finished, tiny, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", FIND_SPEC)
    figures = finished / "figures"
    run("--stage figures --results", finished)
    stems = ("class_ratios", "confusion", "history", "roc", "search")
    names = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert {path.name for path in figures.iterdir()} == names
    assert "(figures/roc.png)" in (finished / "report.md").read_text()
    assert "samples" in run("--stage figures --results", finished, "--data", tiny)
    assert wrong(finished) == []
    (finished / "test").rename(finished.parent / "away")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    run("--stage test --results", finished)
    assert {path.stem for path in figures.iterdir()} == {"history", "search", "samples"}
    assert "(figures/roc.png)" not in (finished / "report.md").read_text()


def test_without_matplotlib_a_line_names_what_to_install(finished):
    install = "pip install -r requirements-figures.txt"
    assert f"figures  not drawn: {install}\n" in run("--stage report --results", finished)
    assert install in refused("--stage figures --results", finished)


def test_what_is_comparable():
    counts = [16037, 2352, 1785, 4663, 3570, 2331, 11816, 7446]
    authors = {"md5": "", "split": "official", "pixels": "raw", "test_counts": counts}
    assert reproduce.comparable(authors)
    assert not reproduce.comparable({**authors, "test_counts": [16036, 2353, *counts[2:]]})
    for md5 in data.TISSUEMNIST:
        about = {"md5": md5, "split": "poster", "pixels": "stretched", "test_counts": [1]}
        assert reproduce.comparable(about)
        assert not reproduce.comparable({**about, "pixels": "raw"})
        assert not reproduce.comparable({**about, "split": "official"})


def test_the_posters_matrix_reproduces_the_poster(tmp_path):
    _, rows = metrics.read_csv(reproduce.POSTER / "confusion.csv")
    matrix = np.array(rows)[:, 1:].astype(int)
    true, predicted = (np.repeat(k, matrix.ravel()) for k in np.indices((8, 8)).reshape(2, 64))
    logits = np.eye(8, dtype=np.float32)[predicted]  # which say no more than the class
    predictions = metrics.Predictions(np.full(50_000, "0"), true, predicted, logits)
    (tmp_path / "roc").mkdir()
    for name, table in metrics.tables(predictions, data.TISSUEMNIST_CLASSES).items():
        (tmp_path / name).write_text(metrics.csv_text(*table))
    header, rows = reproduce.beside_poster(tmp_path)
    assert header == ["figure", "ours", "poster", "difference", "tolerance", "verdict"]
    _, ours, poster, differences, tolerances, verdicts = zip(*rows, strict=True)
    assert [round(value, 6) for value in ours[:4]] == [0.6387, 0.542641, 0.535631, 0.567883]
    areas = (0.8678, 0.7602, 0.9613, 0.9441, 0.9150, 0.9389, 0.8801, 0.8170)
    assert poster == (0.6387, 0.5426, 0.5356, 0.5678, *areas)
    assert differences == pytest.approx(np.subtract(ours, poster))
    assert tolerances == (0.01, *11 * [0.02])
    # Hard decisions instead of scores have far smaller areas.
    assert verdicts[:5] == ("within", "within", "within", "within", "outside")


def test_poster_csv_is_written_where_a_run_is_comparable(tmp_path, monkeypatch):
    write_tiny(tmp_path / "eight.npz", num_classes=8, num_images=160)
    monkeypatch.setattr(data, "TISSUEMNIST", (data.load(tmp_path / "eight.npz").md5,))
    words = "--stage train test", BRIEF, "--data", tmp_path / "eight.npz", "--results"
    folder, raw = tmp_path / "run", tmp_path / "raw"
    printed = run(*words, folder)
    assert "not comparable" not in printed and "| figure " in printed
    assert record(folder, "test")["data"]["name"] == "tissuemnist"
    assert len(metrics.read_column(folder / "test" / "poster.csv", "ours")) == 4 + 8
    assert "## Beside the poster" in (folder / "report.md").read_text()
    assert wrong(folder) == []
    change(folder, "test/poster.csv", ",0.01,", ",0.9,")
    mend_sums(folder)
    assert wrong(folder)[0].startswith("test/poster.csv: row 2, column tolerance: 0.9")
    (folder / "test" / "poster.csv").unlink()
    mend_sums(folder)
    assert wrong(folder)[0] == "test/poster.csv is missing"
    if FIND_SPEC("matplotlib"):
        monkeypatch.setattr(importlib.util, "find_spec", FIND_SPEC)
        run("--stage figures --results", folder)
        assert "poster" in (folder / "figures" / "roc.svg").read_text()
    assert "not comparable" in run(*words, raw, "--pixels raw")
    (raw / "test" / "poster.csv").write_text("figure\n")
    mend_sums(raw)
    assert wrong(raw)[0] == "test/poster.csv: this run is not comparable with the poster"


# ---- verify --------------------------------------------------------------------------------------

ALL = "*/run.json"


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("tune/tuning.jsonl", '"loss": ', '"loss": -', "tune/tuning.jsonl: line 4 "),
        ("tune/best.json", '"trial": ', '"trial": 1', "tune/best.json: not trial"),
        ("tune/run.json", '"seed": 0', '"seed": 1', "tune/tuning.jsonl: line 1 "),
        ("tune/run.json", r"IntUniform\(low=3", "IntUniform(low=2", "tune/run.json: the space"),
        ("tune/run.json", '"3,3"', '"3"', "tune/run.json: "),
        ("tune/run.json", '"3,3"', "33", "tune/run.json: damaged"),
        ("train/history.csv", "\n1,[^,]*", "\n1,0.03", "row 3, column learning_rate"),
        ("train/history.csv", "(\n2(,.*?){2}),.*?,", r"\1,0.001,", "last row, column valid_loss"),
        ("train/history.csv", "(\n2(,.*?){4}),.*?,", r"\1,2,", "last row, column valid_accuracy"),
        ("train/history.csv", "\n2,.*", "", "train/history.csv: 2 epochs, run.json has 3"),
        ("train/run.json", '"dropout": 0.5', '"dropout": 0.6', "not those of poster"),
        ("train/run.json", '"dropout": 0.5', '"dropout": 5.0', "train/run.json: "),
        ("train/run.json", '"md5": "', '"md5": "0', "train/run.json: another stage has other data"),
        ("train/run.json", ' *"pixels": "stretched",\n', "", "train/run.json: damaged"),
        ("test/run.json", 'sha256": "', 'sha256": "0', "test/run.json: the test is not of"),
        ("test/predictions.csv", r"(\.\d+)(?=[,\n])", r"\1e-1", "row 2: the logits are not"),
        ("test/predictions.csv", r"(\n\w+),\d", r"\1,0", "the label is not the image's"),
        ("test/predictions.csv", r"\n\w", "\ng", "test/predictions.csv: row 2: id g"),
        ("test/confusion.csv", "\n0,", "\n0,9", "test/confusion.csv: row 2, column predicted_0"),
        ("test/table.csv", "accuracy,0.", "accuracy,0.1", "test/table.csv: row 2, column value"),
        ("test/roc/auc.csv", "class 1,", "class 1,1", "test/roc/auc.csv: row 3, column auc"),
        ("report.md", r"0\.", "1.", "report.md: not what --stage report writes"),
        (ALL, r'"test_counts": \[\n +', '"test_counts": [9', "tune/run.json: test_counts is not"),
        (ALL, '"class 1"', '"class one"', "tune/run.json: class_names is not the images'"),
        (ALL, '"split_seed": 0', '"split_seed": 1', "test/predictions.csv: row 2: id"),
        (ALL, '"stretched"', '"raw"', "train/model.pt: "),
        (ALL, '"split": "poster"', '"split": "other"', "/run.json: "),
        (ALL, r'"source": ".*"', '"source": 3', "/run.json: damaged"),
        (ALL, r'"shape": \[\n +(\d+)', r'"shape": ["\1"', "/run.json: damaged"),
        (ALL, r'"shape": \[\n +(\d+)[^]]*', r'"shape": [\1', "/run.json: damaged"),
        (ALL, r'"environments": \[', '"environments": ["x",', "/run.json: damaged"),
        ("tune/run.json", '"seed": 0', '"seed": []', "tune/run.json: damaged"),
    ],
)
def test_verify_finds_a_change_that_the_checksums_hide(finished, name, old, new, expected):
    change(finished, name, old, new)
    mend_sums(finished)
    assert expected in "\n".join(wrong(finished))


def test_verify_finds_another_network(finished):
    path = finished / "train" / "model.pt"
    config = model.load_network(path).config
    model.save_network(model.build(config, 7), path, "stretched")
    mend_sums(finished)
    assert "test/run.json: the test is not of train/model.pt" in wrong(finished)
    digest = sha256(path.read_bytes()).hexdigest()
    change(finished, "test/run.json", 'sha256": ".*"', f'sha256": "{digest}"')
    mend_sums(finished)
    found = wrong(finished)
    assert found[0].startswith("train/history.csv: last row, column valid_loss")
    assert found[1:] == ["test/predictions.csv: row 2: the logits are not model.pt's"]
    model.save_network(model.build({**config, "num_features": 4}), path)
    assert "train/model.pt: {'network': " in "\n".join(wrong(finished))


def test_verify_names_every_changed_missing_or_foreign_file(finished):
    for path in [path for path in finished.rglob("[!.]*") if path.is_file()]:
        content = path.read_bytes()
        for changed in content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], content + b"\n", b"":
            path.write_bytes(changed)
            assert path.name in "\n".join(wrong(finished))
        path.unlink()
        if path.name != "run.json":  # without it, a folder is not ours
            assert path.name in "\n".join(wrong(finished))
        path.write_bytes(content)
    (finished / "train" / "notes").touch()
    assert wrong(finished) == ["train/notes: SHA256SUMS does not list it"]


def test_verify_writes_nothing_and_leaves_out_what_is_not_finished(finished):
    (finished / "compare.part").mkdir()
    (finished / ".lock").unlink()
    before = snapshot(finished)
    assert "compare.part is not finished: not checked" in run("--stage verify --results", finished)
    assert snapshot(finished) == before


def test_verify_without_the_images_leaves_out_what_needs_them(finished, tiny):
    change(finished, ALL, '"source": .*', '"source": "gone.npz",')
    change(finished, ALL, '"md5": "', '"md5": "0')  # a lie that it cannot find
    mend_sums(finished)
    verify = "--stage verify --results", finished
    run("--stage report --results", finished)
    lines = run(*verify).splitlines()
    left_out = [line for line in lines if "the images are not here; give --data" in line]
    assert len(left_out) == 3 and left_out[0].startswith("left out run.json describes the images")
    assert lines[-1] == f"verify   nothing wrong in what was checked of {finished}"
    status, printed, _ = command(*verify, "--data", tiny)
    assert (status, printed.count("left out ")) == (0, 1)
    assert f"{tiny} is another file than the run's" in printed
    change(finished, ALL, '"class 1"', '"class one"')
    assert wrong(finished)[0] == "test/run.json: test_counts or class_names are not the tables'"
    for words in ("--stage test --results", finished), (*verify, "--data gone.npz"):
        assert "gone.npz: no such npz file" in refused(*words)


def test_verify_finds_the_images_in_a_file_of_another_order(finished, tiny, tmp_path):
    order = np.random.RandomState(1).permutation(88)
    images, labels = data.load(tiny).images[order], data.load(tiny).labels[order]
    other = tmp_path / "other.npz"
    verify = "--stage verify --data", other, "--results"

    save = partial(save_npz, other, ends=[20, 50])
    save(images, labels)
    printed = run(*verify, finished)
    assert printed.count("left out ") == 1
    assert f"left out run.json describes the images and their split: {other} is another" in printed
    official = tmp_path / "official"
    run("--stage train test --split official --data", tiny, BRIEF, "--results", official)
    assert f"{other} has, split alike, other test images\n" in run(*verify, official)
    first = metrics.read_predictions(finished / "test" / "predictions.csv").ids[0]
    place = data.ids(images).tolist().index(first)
    false = (labels[place] + 1) % 3
    save(np.concatenate([images[[place]], images]), np.array([false, *labels]))
    assert "ok       the predictions are of these images" in run(*verify, finished)
    labels[place] = false
    save(images, labels)
    label = "test/predictions.csv: row 2: the label is not the image's"
    assert wrong(finished, "--data", other) == [label]
    images[place, 0, 0] ^= 1
    save(images, labels)
    assert f"row 2: {other} has no image" in "\n".join(wrong(finished, "--data", other))
    line = refused("--stage verify --data digits --results", finished)
    assert "digits: images of another shape" in line


@pytest.mark.parametrize("train", sorted(reproduce.REFERENCE.rglob("train")), ids=str)
def test_a_committed_run_is_consistent(train):
    assert wrong(train.parent) == []


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_checkout_does_not_convert_the_committed_results(tmp_path):
    shutil.copy(REPOSITORY / ".gitattributes", tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options = {"cwd": tmp_path, "env": clean, "check": True, "capture_output": True}
    subprocess.run(["git", "init"], **options)
    words = ["git", "-c", "core.autocrlf=true", "check-attr", "text", "results/reference/a/b.csv"]
    assert subprocess.run(words, **options).stdout.endswith(b": text: unset\n")


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--stage fly", "invalid choice"),
        ("--stag test", "unrecognized arguments"),
        ("--stage test --epochs 5", "--epochs has no effect on --stage test"),
        ("--stage verify --split official", "--split has no effect on --stage verify"),
        ("--stage compare --retrain", "--retrain has no effect on --stage compare"),
        ("--schedule 81", "is neither poster nor R,ETA"),
        ("--schedule 81,1", "eta must be an integer from 2"),
        ("--dask tcp://host:1 --workers 2", "no --workers beside it"),
        ("--seed -1", "no whole number from 0"),
        ("--stage compare --compare-max 9", "'9' is no whole number from 10"),
        ("--seed 4294967296", "no whole number"),
        ("--results=", "--results is empty: is a variable not set?"),
        ("--schedule=", "--schedule is empty"),
        ("--results=~no-such-user/x", "--results ~no-such-user/x: Could not determine"),
        ("--data digits --split official --split-seed 3", "no effect on the official split"),
        ("--data digits --split official", "no official split"),
        ("--data digits --device tpu", "tpu"),
        ("--data digits --hyperparameters gone.json", "gone.json is missing"),
        ("--stage verify --results nowhere", "nowhere holds no finished stage"),
        ("--stage report", f"{Path('results', 'tissuemnist')} holds no run"),
        ("--stage test --data digits", f"{Path('results', 'digits')} holds no run"),
    ],
)
def test_a_bad_command_is_refused_in_one_line(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(words)
    assert not [*tmp_path.iterdir()]


def readme_commands():
    """Return the `python FILE.py ...` commands of README.md as words; variables and * become 0."""
    text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
    text = re.sub(r"\$\{?\w+\}?|\*(?! )", "0", text)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks += [" ".join(span.split()) for span in re.findall("`([^`]*)`", prose)]
    pattern = r"\bpython3? ([\w/]+\.py\b[^;&|#)\n]*)"
    return [shlex.split(words) for words in re.findall(pattern, "\n".join(blocks))]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_every_command_of_the_readme_is_read(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)  # where no command finds its files
    monkeypatch.setattr(data, "load", Mock(side_effect=data.DataError("not here")))
    monkeypatch.setattr(data, "convert", Mock(side_effect=data.DataError("not here")))
    module = importlib.import_module(Path(words[0]).stem)
    if hasattr(module, "parse"):
        module.parse(words[1:])
    else:
        assert module.main(words[1:]) in (0, 2)
        assert "expected" not in capsys.readouterr().err


def test_a_run_short_of_room_goes_on(whole, chain, tmp_path):
    disk, memory = OSError(errno.ENOSPC, "no room left"), torch.OutOfMemoryError("no room left")
    for name, error in ("save_network", disk), ("predict", memory):
        with mock.patch.object(model, name, side_effect=error):
            assert "no room left" in refused(*chain, tmp_path)
    run(*chain, tmp_path)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_search_leaves_no_process_and_goes_on(whole, chain, tmp_path, kill):
    # Where the tests run behind a shell's &, it is ignored, in child processes too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = " ".join(map(str, chain)).split()
    start = [sys.executable, "-u", reproduce.__file__, *words, tmp_path, "--workers", "2"]
    child = Popen(start, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
    next(line for line in child.stdout if "trial 0" in line)
    send = os.killpg if kill == signal.SIGINT else os.kill  # a terminal sends to every process
    send(child.pid, kill)
    _, error = child.communicate(timeout=60)  # until no process holds the other end of a pipe
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert error == "reproduce.py: interrupted; the same command goes on\n"
    run(*chain, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_closed_pipe_ends_a_command_in_silence(finished):
    reading, writing = os.pipe()
    os.close(reading)
    start = [sys.executable, reproduce.__file__, "--stage", "verify", "--results", finished]
    with Popen(start, stdout=writing, stderr=PIPE) as child:
        os.close(writing)
        assert child.stderr.read() == b""


def test_standard_output_may_be_closed_or_lack_letters(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "größe λ")
    for stdout in None, io.TextIOWrapper(io.BytesIO(), encoding="ascii"):
        monkeypatch.setattr(sys, "stdout", stdout)
        for stage in ("verify", "test"):
            assert reproduce.main(["--stage", stage, "--results", str(folder)]) == 0
    assert rb"gr\xf6\xdfe \u03bb" in stdout.buffer.getvalue()


def test_progress_is_one_line_per_step_in_a_log_and_a_bar_on_a_terminal(capsys, monkeypatch):
    progress = reproduce.Progress("work", 10)
    progress.show(1, "one")
    progress.show(2, "two", is_step=True)
    progress.show(4, "four", is_step=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ETA ")[0] for line in lines] == ["work     two", "work     four"]
    assert "ETA" in lines[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reproduce.Progress("work", 10).show(10, "ten", is_step=True)
    assert f"\rwork     [{'#' * 20}] 100%  ten" in capsys.readouterr().out
