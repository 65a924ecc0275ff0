"""The chain, its command line, and what it promises of the results folder."""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from kill import contents, write_tiny
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import data
import hyperband
import metrics
import model
import reproduce

# Few images and few epochs leave classes that are never predicted, which is rightly said.
pytestmark = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore:precision is undefined"
)
HERE = Path(reproduce.__file__).parent
QUICK = ["--epochs", "3", "--schedule", "hyperband", "--max-resource", "3", "--workers", "1"]
# What ../shared/DESIGN.md and the README list, for three classes.
FILES = {
    *("run.json", "tuning.jsonl", "best.json", "history.csv", "model.pt", "predictions.csv"),
    *("table.csv", "table.md", "per_class.csv", "confusion.csv", "roc/auc.csv", "report.md"),
    *(f"roc/class_{k}.csv" for k in range(3)),
}
DRAWN = ("class_ratios", "confusion", "roc", "history", "search", "samples")
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
PICTURES = {f"figures/{name}.{kind}" for name in DRAWN for kind in ("png", "svg")}
PICTURES = PICTURES if HAS_MATPLOTLIB else set()


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_tiny(path)
    return path


def run(*words, expect=0) -> None:
    """Run the command line here; a run on so few images rightly warns of undefined figures."""
    assert reproduce.main([str(word) for word in words]) == expect


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """Hold a finished run, made by the command itself in a process of its own."""
    folder = tmp_path_factory.mktemp("run") / "results"
    words = ["--stage", "all", "--data", tiny, "--results", folder, *QUICK]
    done = subprocess.run(
        [sys.executable, HERE / "reproduce.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def refused(capsys, *words) -> str:
    """Run a command that must be refused; return its one line on stderr."""
    run(*words, expect=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("reproduce.py: error: ")
    return error


# ----------------------------------------------------------------------------------- the chain


def test_all_leaves_every_file_and_no_other(finished):
    assert files_in(finished) == FILES | PICTURES


def test_output_starts_and_ends_by_saying_that_this_is_not_the_posters_data(finished):
    lines = (finished.parent / "stdout").read_text().splitlines()
    assert "cannot be compared" in lines[0]
    assert lines[-1] == lines[0] == reproduce.NOT_COMPARABLE
    for path in FILES:
        assert f"file       {finished / path}" in lines


def test_plan_comes_before_the_work_and_the_log_has_a_line_a_step(finished):
    lines = (finished.parent / "stdout").read_text().splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("results "))
    first = next(i for i, line in enumerate(lines) if "rung 3@1, trial 0" in line)
    assert plan < first
    assert "tiny: 88 images 8x8, 3 classes" in "".join(lines[:plan])
    assert "52 / 14 / 22" in "".join(lines[:plan])  # 60/15/25 % of 88
    # 3@1 -> 1@3 and 2@3: 6 lines of trials, 3 of epochs
    assert sum(line.startswith("tune  ") and " rung " in line for line in lines) == 6
    assert sum(line.startswith("train  ") and "epoch " in line for line in lines) == 3


def test_table_is_what_scikit_learn_says_of_the_predictions(finished):
    rows = rows_of(finished / "predictions.csv")
    labels = [int(row["label"]) for row in rows]
    predicted = [int(row["predicted"]) for row in rows]
    logits = np.array([[float(row[f"logit_{k}"]) for k in range(3)] for row in rows])
    assert predicted == logits.argmax(1).tolist()
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "macro F1": f1_score(labels, predicted, average="macro", zero_division=0),
        "macro recall": recall_score(labels, predicted, average="macro", zero_division=0),
        "macro precision": precision_score(labels, predicted, average="macro", zero_division=0),
    }
    table = {row["metric"]: row for row in rows_of(finished / "table.csv")}
    assert table.keys() == expected.keys()
    for name, value in expected.items():
        assert float(table[name]["this_run"]) == pytest.approx(value, abs=1e-12)
        assert table[name]["verdict"] == "not comparable"
        assert table[name]["on"] == "tiny, poster split, 22 test images"
    for k, row in enumerate(rows_of(finished / "roc" / "auc.csv")):
        auc = roc_auc_score(np.array(labels) == k, logits[:, k])
        assert float(row["auc"]) == pytest.approx(auc, abs=1e-12)


def test_predictions_are_of_the_test_split_and_by_the_saved_network(finished, tiny):
    images = data.load(tiny)
    split = data.poster_split(len(images.labels))
    read = metrics.read_predictions(finished / "predictions.csv")
    assert read.ids.tolist() == split.test.tolist()
    assert read.labels.tolist() == images.labels[split.test].tolist()
    network = model.load_network(finished / "model.pt")
    logits = model.predict(network, images.images[split.test]).numpy()
    np.testing.assert_array_equal(logits, read.logits)


def test_history_and_settings(finished):
    history = rows_of(finished / "history.csv")
    assert list(history[0]) == list(metrics.HISTORY_HEADER)
    assert [row["epoch"] for row in history] == ["0", "1", "2"]
    record = json.loads((finished / "run.json").read_text())
    assert record["train"]["settings"]["hyperparameters"]["learning_rate"] == 0.025
    assert record["train"]["settings"]["network"]["num_classes"] == 3
    assert record["data"]["md5"] == data.load(record["data"]["source"]).md5
    assert record["data"]["sizes"] == [52, 14, 22]
    assert record["train"]["environment"]["torch"] == model.torch.__version__


def test_search_is_logged_and_its_best_is_kept(finished):
    trials = [json.loads(line) for line in (finished / "tuning.jsonl").read_text().splitlines()]
    assert [(t["rung"], t["resource"]) for t in trials] == [(0, 1)] * 3 + [(1, 3)] + [(0, 3)] * 2
    best = min((t for t in trials if t["resource"] == 3), key=lambda t: t["loss"])
    kept = json.loads((finished / "best.json").read_text())
    assert kept["trial"] == best["trial"]
    for name, value in best["configuration"].items():
        assert kept["hyperparameters"][name] == value


def test_same_command_gives_the_same_bytes(finished, tiny, tmp_path):
    run("--data", tiny, "--results", tmp_path / "r", *QUICK)
    ours, theirs = contents(tmp_path / "r"), contents(finished)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name != "run.json":
            assert ours[name] == theirs[name], name


def test_same_command_compiled_gives_the_same_bytes(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--epochs", 3, "--compile", "on", "--results"]
    for name in ("once", "twice"):
        for stage in ("train", "test"):
            run("--stage", stage, *words, tmp_path / name)
    if "torch.compile fails" in capsys.readouterr().err:
        pytest.skip("no C++ compiler")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    run("--stage", "train", *words, tmp_path / "plain", "--compile", "off")
    network, plain = (model.load_network(tmp_path / n / "model.pt") for n in ("once", "plain"))
    for a, b in zip(network.parameters(), plain.parameters(), strict=True):
        # In bf16, where the CPU has it.
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=0.05, atol=0.01)


def test_search_space_contains_the_posters_values():
    rng = random.Random(0)
    drawn = {name: [s.sample(rng) for _ in range(400)] for name, s in reproduce.SPACE.items()}
    for values in (model.POSTER, model.AUTHORS):
        for name in drawn:
            assert min(drawn[name]) <= getattr(values, name) <= max(drawn[name])
    assert {128, 256} <= set(drawn["batch_size"])
    assert {8, 16, 32} <= set(drawn["num_features"])
    assert {3, 4, 5, 6} <= set(drawn["patience"])


def test_search_never_sees_a_test_image():
    split = data.poster_split(1000)
    tuning = data.tuning_split(split, 300, seed=1)
    assert (len(tuning.train), len(tuning.valid), len(tuning.test)) == (240, 60, 0)
    seen = np.concatenate([tuning.train, tuning.valid])
    assert len(set(seen.tolist())) == 300
    assert not set(seen.tolist()) & set(split.test.tolist())
    assert [len(part) for part in data.tuning_split(split)] == [600, 150, 0]


# ------------------------------------------------------------------------------ hyperparameters


def trained_with(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["train"]["settings"]["hyperparameters"]


def test_tuned_takes_the_best_trial(copied, tiny):
    words = ["--stage", "train", "--data", tiny, "--results", copied, "--epochs", 1]
    run(*words, "--hyperparameters", "tuned", "--overwrite")
    best = json.loads((copied / "best.json").read_text())["hyperparameters"]
    assert trained_with(copied) == {**best, "epochs": 1}


@pytest.mark.parametrize("form", [{"batch_size": 32}, {"hyperparameters": {"batch_size": 32}}])
def test_hyperparameters_from_a_file(form, tiny, tmp_path):
    file = tmp_path / "h.json"
    file.write_text(json.dumps(form))
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r", "--epochs", 1]
    run(*words, "--hyperparameters", file)
    assert trained_with(tmp_path / "r")["batch_size"] == 32
    assert trained_with(tmp_path / "r")["momentum"] == 0.8


def test_authors_digits(tiny, tmp_path):
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r", "--epochs", 1]
    run(*words, "--hyperparameters", "authors")
    assert trained_with(tmp_path / "r")["learning_rate"] == 0.025336627337952815


# ---------------------------------------------------------------------------------- bad input

BAD = {
    "epochs": (["--epochs", "0"], "'0' is no whole number from 1 up"),
    "device": (["--device", "gpu9"], "no device 'gpu9' here"),
    "second cpu": (["--device", "cpu:1"], "no device 'cpu:1' here"),
    "no gpu": (["--device", "cuda:99"], "no device 'cuda:99' here"),
    "stage": (["--stage", "dance"], "invalid choice: 'dance'"),
    "precision": (["--precision", "fp8"], "invalid choice: 'fp8'"),
    "seed": (["--seed", "-1"], "'-1' is no whole number from 0 up"),
    "huge seed": (["--seed", "4294967296"], "is no whole number from 0 up"),
    "one seed": (["--seeds", "1"], "two or more different seeds"),
    "source": (["--data", "nowhere.npz"], "nowhere.npz"),
    "official": (["--data", "digits", "--split", "official"], "no official split"),
    "tuned": (["--stage", "train", "--hyperparameters", "tuned"], "run --stage tune first"),
    "no file": (["--hyperparameters", "none.json"], "cannot read none.json"),
    "untrained": (["--stage", "test"], "run --stage train first"),
    "from": (["--from", "none/run.json"], "cannot read none/run.json"),
    "test data of digits": (["--data", "digits", "--test-data", "x"], "digits: no such folder"),
    "test data and split": (
        ["--data", "x", "--test-data", "x", "--split", "poster"],
        "--test-data goes with --data FOLDER, and without --split",
    ),
    "no folder": (["--data", "none", "--test-data", "nor"], "none: no such folder"),
    "nothing to predict": (["--stage", "predict"], "--images FOLDER_OR_NPZ and --model FILE"),
    "compare max": (["--stage", "compare", "--compare-max", "9"], "no whole number from 10 up"),
    "too few": (["--stage", "compare", "--data", "few.npz"], "too few to compare on"),
    "one image": (["--data", "one.npz", "--split", "official"], "one training image"),
    "compare seeds": (["--stage", "compare", "--seeds", "0", "1"], "--seeds is for all, tune"),
    "eta": (["--eta", "4"], "go with --schedule hyperband"),
    "no model": (["--stage", "train", "--no-model"], "--no-model goes with --stage verify"),
    "no such run": (["--stage", "test", "--results", "none"], "run.json: no such file"),
    "endless": (["--max-resource", "100001"], "(to 100,000)"),
    "from and seed": (["--from", "run.json", "--seed", "1"], "leave out --seed"),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    words, message, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if "few.npz" in words:
        write_tiny(tmp_path / "few.npz", parts=(4, 3, 3))
    if "one.npz" in words:
        write_tiny(tmp_path / "one.npz", parts=(1, 3, 3))
    given = [] if "--data" in words or "--from" in words else ["--data", str(tiny)]
    try:
        status = reproduce.main([*words, *given])
    except SystemExit as leaving:  # argparse
        status = leaving.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1), error
    assert message in error
    assert files_in(tmp_path) <= {"few.npz", "one.npz"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "no JSON object"),
        ("{", "no JSON object"),
        ('{"batch_size": 0}', "batch_size 0 is out of its range"),
        ('{"momentum": "much"}', "momentum must be of type float"),
        ('{"speed": 3}', "unexpected keyword argument 'speed'"),
        ('{"hyperparameters": 7}', "no hyperparameters"),
        ('{"train": 5}', "no hyperparameters"),
        ('{"train": {}}', "no hyperparameters"),
        ('{"learning_rate": NaN}', "learning_rate nan is out of its range"),
    ],
)
def test_bad_hyperparameters_file(content, message, tiny, tmp_path, capsys):
    file = tmp_path / "h.json"
    file.write_text(content)
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r"]
    assert message in refused(capsys, *words, "--hyperparameters", file)
    assert not (tmp_path / "r").exists()


def test_another_run_in_the_folder(copied, tiny, tmp_path, capsys):
    before = contents(copied)
    words = ["--stage", "train", "--data", tiny, "--results", copied]
    line = refused(capsys, *words, "--epochs", 4)
    assert "holds another run (hyperparameters differ)" in line
    assert "--overwrite" in line
    other = tmp_path / "other.npz"
    write_tiny(other, size=9)
    words[3] = other
    assert "md5, name, shape differ" in refused(capsys, *words)
    assert contents(copied) == before
    run(*words, "--epochs", 1, "--overwrite")
    assert files_in(copied) == {"run.json", "model.pt", "history.csv"}


@pytest.mark.parametrize("other", [["--split-seed", 1], ["--data", "digits"]])
def test_a_later_stage_of_another_run_removes_nothing(other, copied, capsys):
    before = contents(copied)
    words = ["--stage", "test", "--results", copied, *other, "--overwrite"]
    assert "was made otherwise" in refused(capsys, *words)
    assert contents(copied) == before


def test_out_of_memory(tiny, tmp_path, capsys, monkeypatch):
    def fit(*_, **options):
        raise MemoryError("Unable to allocate 4 TiB")

    monkeypatch.setattr(model, "fit", fit)
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r"]
    assert "out of memory" in refused(capsys, *words)


def test_an_error_that_names_no_file_keeps_its_words(tiny, tmp_path, capsys, monkeypatch):
    def search(*_, **options):
        raise ConnectionError("the Dask scheduler has gone; the same command goes on")

    monkeypatch.setattr(hyperband, "search", search)
    words = ["--stage", "tune", "--data", tiny, "--results", tmp_path / "r", "--workers", 1]
    assert "error: the Dask scheduler has gone" in refused(capsys, *words)


def test_a_lock_that_its_holder_removes_meanwhile(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, opened = fcntl.flock, []

    def slow(file, how):
        flock(file, how)
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", slow)
    with reproduce.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert len(opened) == 2


def test_a_file_system_without_locks(tiny, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    words = ["--stage", "tune", "--data", tiny, "--results", tmp_path / "r", *QUICK]
    run(*words)
    assert not (tmp_path / "r" / ".lock").exists()


def test_verify_downloads_nothing(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "download", lambda *_, **__: pytest.fail("downloads"))
    words = ["--stage", "verify", "--results", copied, "--data", "tissuemnist"]
    assert "download is off" in refused(capsys, *words, "--root", tmp_path)


def test_a_folder_of_somebody_else(tiny, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path, "--epochs", 1]
    assert "is not empty and holds no run.json" in refused(capsys, *words)
    assert files_in(tmp_path) == {"thesis.txt"}
    run(*words, "--overwrite")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_unwritable_results(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "--data", tiny, "--results", tmp_path / "file" / "results")
    assert "Not a directory" in line


def test_checkpoint_of_another_network(copied, tiny, capsys):
    model.save_network(model.build({"num_classes": 4, "image_size": 8}), copied / "model.pt")
    line = refused(capsys, "--stage", "test", "--data", tiny, "--results", copied)
    assert "is another network" in line


def test_damaged_run_json(copied, tiny, capsys):
    path = copied / "run.json"
    path.write_text(path.read_text().replace('"num_features": 8', '"num_features": 9', 1))
    line = refused(capsys, "--stage", "test", "--data", tiny, "--results", copied)
    assert "'9', was '8'" in line
    assert "--overwrite" in line


def test_diverged_training(tiny, tmp_path, capsys):
    file = tmp_path / "h.json"
    file.write_text('{"learning_rate": 1e30}')
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r"]
    line = refused(capsys, *words, "--hyperparameters", file, "--precision", "fp32")
    assert "in epoch" in line
    assert "learning rate 1e+30" in line


def test_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    whole, write = [], Path.write_bytes

    def full(path, content):
        if path.name == "training.pt.tmp":
            if len(whole) == 2:
                raise OSError(28, "No space left on device")  # as a write that fails says it
            whole.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    folder = tmp_path / "r"
    words = ["--stage", "train", "--data", tiny, "--results", folder, "--epochs", 5]
    assert f"{folder}: No space left on device" in refused(capsys, *words)
    assert files_in(folder) == {"run.json", "training.pt"}
    monkeypatch.undo()
    run(*words)
    run("--stage", "train", "--data", tiny, "--results", tmp_path / "s", "--epochs", 5)
    assert contents(folder) == contents(tmp_path / "s")


def test_a_reader_that_has_seen_enough(finished):
    words = [sys.executable, HERE / "reproduce.py", "--stage", "verify", "--results", finished]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*words, "--no-model"], **pipes) as verify:
        verify.stdout.close()
        assert verify.stderr.read() == b""
    assert verify.returncode == 2


def test_vanished_results_folder(tiny, tmp_path, capsys, monkeypatch):
    fit = model.fit

    def vanish(*arguments, **options):
        shutil.rmtree(tmp_path / "r")
        return fit(*arguments, **options)

    monkeypatch.setattr(model, "fit", vanish)
    line = refused(capsys, "--stage", "train", "--data", tiny, "--results", tmp_path / "r")
    assert "No such file or directory" in line
    assert not (tmp_path / "r").exists()


# -------------------------------------------------------------------- interruptions and the lock


def start(*words) -> subprocess.Popen:
    command = [sys.executable, "-u", HERE / "reproduce.py", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"it ended before it printed {text!r}: {process.stderr.read()}")


def test_interrupt_lock_and_going_on(tiny, tmp_path, capsys):
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r", "--epochs", 2000]
    first = start(*words)
    wait_for(first, "epoch 3/2000")
    line = refused(capsys, *words)
    assert f"in use by process {first.pid}" in line
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert error.strip() == "reproduce.py: interrupted; the same command goes on from here"
    second = start(*words)
    wait_for(second, "epoch 3/2000")  # replayed from the checkpoint
    second.kill()
    second.communicate(timeout=60)
    assert (tmp_path / "r" / ".lock").read_text() == str(second.pid)
    # The lock of a dead process is taken over: what is refused now is refused for another reason.
    assert "another run" in refused(capsys, *words[:-1], 5)
    assert not (tmp_path / "r" / ".lock").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["kill.py", "--kills", "6", "--seed", "1"], r"\b0 with a difference"),
        (["damage.py", "--files", "96", "--seed", "2"], "96 damaged files, 0 wrongly taken"),
    ],
    ids=["kill", "damage"],
)
def test_nothing_is_lost_and_nothing_damaged_is_taken(words, says):
    command = [sys.executable, HERE / "tests" / words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(says, done.stdout)


def test_a_finished_run_is_done_again(copied, tiny):
    before = (copied / "model.pt").stat().st_mtime_ns
    run("--stage", "train", "--data", tiny, "--results", copied, *QUICK)
    assert (copied / "model.pt").stat().st_mtime_ns > before
    assert not (copied / "predictions.csv").exists()  # they were another model.pt's


# --------------------------------------------------------------------------------------- verify


def test_verify_is_content_with_a_whole_folder(finished, tiny, capsys):
    run("--stage", "verify", "--results", finished)  # data and split as run.json tells
    output = capsys.readouterr().out
    assert "WRONG" not in output
    for name in FILES - {"run.json"}:
        assert f"{name} is as it was written" in output
    run("--stage", "verify", "--results", finished, "--no-model")


def test_any_changed_digit_is_found_and_named(finished, tmp_path, capsys):
    rng = random.Random(0)
    for i in range(40):
        name = sorted(FILES)[i % len(FILES)]
        folder = Path(shutil.copytree(finished, tmp_path / str(i)))
        content = bytearray((folder / name).read_bytes())
        place = rng.choice([k for k, byte in enumerate(content) if chr(byte) in "0123456789"])
        was = chr(content[place])
        content[place] = ord(rng.choice([d for d in "0123456789" if d != was]))
        (folder / name).write_bytes(content)
        run("--stage", "verify", "--no-model", "--results", folder, expect=1)
        wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
        assert any(name in line for line in wrong), (name, wrong)
        if name != "run.json":
            row = content.count(b"\n", 0, place) + 1
            named = f"row {row}, column"
            assert any(named in line and f"was {was!r}" in line for line in wrong), (name, wrong)


def test_wrong_figures_are_found_without_the_fingerprints(finished, tmp_path, capsys):
    """A forger who mends the fingerprints still meets the recomputation."""
    folder = Path(shutil.copytree(finished, tmp_path / "r"))
    path = folder / "table.csv"
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[2] = "0.5426"
    lines[2] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    record = reproduce.read_json(folder / "run.json")
    record["test"]["files"]["table.csv"] = reproduce.fingerprint(path.read_bytes())
    reproduce.write_json(folder / "run.json", record)
    run("--stage", "verify", "--no-model", "--results", folder, expect=1)
    assert "WRONG  table.csv, row 3, column this_run: 0.5426 |" in capsys.readouterr().out


def test_verify_evaluates_the_model_again(finished, tiny, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "r"))
    network = model.load_network(folder / "model.pt")
    with model.torch.no_grad():
        network.classifier[-1].bias[0] += 0.01
    model.save_network(network, folder / "model.pt")
    record = reproduce.read_json(folder / "run.json")
    record["train"]["files"]["model.pt"] = reproduce.fingerprint((folder / "model.pt").read_bytes())
    reproduce.write_json(folder / "run.json", record)
    run("--stage", "verify", "--data", tiny, "--results", folder, expect=1)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert "column logit_0: farthest from model.pt's logits" in wrong[0]


def test_verify_on_other_data_than_run_json_names(finished, tmp_path, capsys):
    write_tiny(tmp_path / "tiny.npz", parts=(47, 17, 24))
    words = ["--stage", "verify", "--results", finished]
    run(*words, "--data", tmp_path / "tiny.npz", expect=1)
    assert "WRONG  data, md5" in capsys.readouterr().out


def test_verify_prints_the_posters_figures_from_its_confusion_matrix(tmp_path, capsys):
    matrix = np.array(reproduce.POSTER_CONFUSION)
    labels = np.repeat(np.arange(8), matrix.sum(1))
    predicted = np.concatenate([np.repeat(np.arange(8), row) for row in matrix])
    logits = np.eye(8, dtype=np.float32)[predicted]
    metrics.write_predictions(
        tmp_path / "predictions.csv", np.arange(50_000), labels, predicted, logits
    )
    run("--stage", "verify", "--no-model", "--results", tmp_path)
    output = capsys.readouterr().out
    for figure in (
        "accuracy of predictions.csv: 0.638700",
        "macro F1 of predictions.csv: 0.542641",
        "macro recall of predictions.csv: 0.535631",
        "macro precision of predictions.csv: 0.567883",
        "the poster cuts it, rounded it would be 0.5679",
    ):
        assert figure in output


def test_audit_of_the_poster_can_fail(monkeypatch, capsys):
    monkeypatch.setitem(reproduce.POSTER_TABLE, "f1", 0.5427)
    audit = reproduce.Audit()
    reproduce.audit_poster(audit)
    assert (audit.wrong, audit.checks) == (1, 6)
    assert "WRONG  poster, macro F1" in capsys.readouterr().out


def test_nothing_to_verify(tiny, tmp_path, capsys):
    words = ["--stage", "verify", "--results", tmp_path, "--data", tiny]
    assert "holds no predictions.csv" in refused(capsys, *words, "--no-model")
    assert "holds no run.json: --no-model audits" in refused(capsys, *words)
    assert "name it by --results" in refused(capsys, "--stage", "verify", "--no-model")


def test_verify_without_model_looks_into_the_seeds_too(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--results", tmp_path / "r", "--epochs", 1, "--seeds", 0, 1]
    for stage in ("train", "test"):
        run("--stage", stage, *words)
    run("--stage", "verify", "--no-model", "--results", tmp_path / "r")
    path = tmp_path / "r" / "seed-1" / "table.csv"
    path.write_text(path.read_text().replace("0.6387", "0.6388"))
    run("--stage", "verify", "--no-model", "--results", tmp_path / "r", expect=1)
    assert "'8', was '7'" in capsys.readouterr().out


def test_verify_of_a_history_that_holds_no_numbers(copied, capsys):
    path = copied / "history.csv"
    path.write_text(path.read_text().replace("0.025", "0.x25"))
    run("--stage", "verify", "--no-model", "--results", copied, expect=1)
    assert "WRONG  history.csv, first learning rate: 0.x25 | 0.025" in capsys.readouterr().out


def test_overwriting_a_search_trains_again_with_what_it_found(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--results", tmp_path / "r", "--hyperparameters", "tuned"]
    words += ["--epochs", 1, "--schedule", "hyperband", "--workers", 1]
    run(*words, "--max-resource", 3)
    run(*words, "--max-resource", 4, "--eta", 2, "--overwrite")
    best = json.loads((tmp_path / "r" / "best.json").read_text())["hyperparameters"]
    assert trained_with(tmp_path / "r") == {**best, "epochs": 1}
    assert "ok     run.json, the hyperparameters of best.json" in capsys.readouterr().out


def test_damaged_checkpoint_of_a_trial_does_not_change_the_search(
    finished, tiny, tmp_path, monkeypatch
):
    append, log = hyperband._append, []

    def cut(path, trial):
        append(path, trial)
        log.append(trial)
        if len(log) == 2:
            raise KeyboardInterrupt

    words = ["--stage", "tune", "--data", tiny, "--results", tmp_path / "r", *QUICK]
    monkeypatch.setattr(hyperband, "_append", cut)
    run(*words, "--workers", 1, expect=130)
    monkeypatch.undo()
    checkpoints = list((tmp_path / "r" / "trials").glob("trial-*/training.pt"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    run(*words, "--workers", 1)
    for name in ("best.json", "tuning.jsonl"):
        assert contents(tmp_path / "r")[name] == contents(finished)[name]
    assert not (tmp_path / "r" / "trials").exists()


def test_cut_off_while_a_finished_run_is_cleared(copied, tiny, monkeypatch):
    before, unlink = contents(copied), Path.unlink

    def cut(path, **options):
        unlink(path, **options)
        if path.name == "model.pt":
            raise KeyboardInterrupt

    words = ["--data", tiny, "--results", copied, *QUICK]
    monkeypatch.setattr(Path, "unlink", cut)
    run(*words, expect=130)
    monkeypatch.undo()
    assert not (copied / "model.pt").exists()
    run(*words)
    assert contents(copied) == before


def test_verify_names_a_damaged_run_json(copied, capsys):
    path = copied / "run.json"
    path.write_text(path.read_text().replace("0.025", "0.026", 1))
    run("--stage", "verify", "--results", copied, expect=1)
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert "run.json" in wrong[0]
    assert "'6', was '5'" in wrong[0]
    assert "1 of" in wrong[-1] or len(wrong) == 1, "files that nobody changed are accused"


def test_interrupted_seeds_go_on(tiny, tmp_path, monkeypatch, capsys):
    words = ["--data", tiny, *QUICK, "--seeds", 1, 2, "--results"]
    run(*words, tmp_path / "whole")
    fit = model.fit

    def interrupted(*arguments, **options):
        if options["seed"] == 2 and "seed-2" in str(options["checkpoint"]):
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(model, "fit", interrupted)
    run(*words, tmp_path / "cut", expect=130)
    monkeypatch.undo()
    capsys.readouterr()
    run(*words, tmp_path / "cut")
    lines = capsys.readouterr().out.splitlines()
    done = [line.split()[0] for line in lines if line.endswith("done already")]
    assert done[:3] == ["tune", "train", "test"]  # and with matplotlib the first seed's figures
    assert {*done} <= {"tune", "train", "test", "figures", "report"}
    assert done.count("train") == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_one_image_a_batch_where_batchnorm_cannot(tiny, tmp_path, capsys):
    (tmp_path / "h.json").write_text('{"batch_size": 1}')
    words = ["--stage", "train", "--data", tiny, "--results", tmp_path / "r"]
    line = refused(capsys, *words, "--hyperparameters", tmp_path / "h.json")
    assert "cannot train on tiny: BatchNorm needs at least 2 images a batch" in line


def test_tolerances_judge_only_the_posters_own_data(tmp_path):
    """Same predictions, once as if on TissueMNIST under the poster's split, once not."""
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 8, 400)
    logits = rng.normal(size=(400, 8)).astype(np.float32)
    logits[np.arange(400), labels] += 2
    source = tmp_path / "source"
    source.mkdir()
    metrics.write_predictions(
        source / "predictions.csv", np.arange(400), labels, logits.argmax(1), logits
    )
    about = {
        "name": "tissuemnist",
        "md5": data.TISSUEMNIST.md5,
        "split": "poster",
        "sizes": [0, 0, 400],
        "class_names": list("abcdefgh"),
    }
    summary = reproduce.write_metrics(source, tmp_path, about)
    rows = rows_of(tmp_path / "table.csv")
    assert [row["metric"] for row in rows[4:]] == [f"AUC of class {k}" for k in range(8)]
    for key, row in zip(("accuracy", "f1", "recall", "precision"), rows, strict=False):
        difference = summary[key] - reproduce.POSTER_TABLE[key]
        limit = 0.01 if key == "accuracy" else 0.02
        assert float(row["difference"]) == difference
        assert row["verdict"] == f"{'within' if abs(difference) <= limit else 'outside'} {limit}"
    assert {row["verdict"].split()[0] for row in rows} == {"within", "outside"}
    reproduce.write_metrics(source, tmp_path, {**about, "split": "official"})
    rows = rows_of(tmp_path / "table.csv")
    assert [row["verdict"] for row in rows] == ["not comparable"] * 4


def test_located_byte():
    text = b'metric,value\n"a, b",0.5\nb,0.7\n'
    stored = reproduce.fingerprint(text)
    for old, new, place in (
        (b"7", b"1", "row 3, column value: '1', was '7'"),
        (b"a,", b"c,", "row 2, column metric: 'c', was 'a'"),
        (b"m", b"n", "row 1, column metric: 'n', was 'm'"),
        (b"0.7", b"7.0", "more than one byte differs"),
        (b"b,0.7\n", b"", "more than one byte differs"),
    ):
        assert reproduce.locate("t.csv", text.replace(old, new, 1), stored) == place
    changed = text.replace(b"7", b"1")
    assert reproduce.locate("t.md", changed, stored) == "row 3, column 5: '1', was '7'"


# ----------------------------------------------------------------------- seeds, and once more


def test_seeds(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "drawable", lambda: False)
    folder = tmp_path / "r"
    words = ["--data", tiny, "--results", folder, *QUICK, "--epochs", 20]
    run(*words, "--seeds", 3, 5, 8)
    capsys.readouterr()
    accuracies = []
    for seed in (3, 5, 8):
        assert files_in(folder / f"seed-{seed}") == FILES - {"tuning.jsonl", "best.json"}
        read = metrics.read_predictions(folder / f"seed-{seed}" / "predictions.csv")
        accuracies.append(accuracy_score(read.labels, read.predicted))
    assert len(set(accuracies)) > 1, "the seeds change nothing"
    report = (folder / "report.md").read_text()
    assert (folder / "seeds.md").read_text().strip() in report
    assert "[seed-5](seed-5/report.md)" in report
    row = rows_of(folder / "seeds.csv")[0]
    a, b, c = accuracies
    apart = [abs(a - b), abs(a - c), abs(b - c)]
    expected = {
        "mean": sum(accuracies) / 3,
        "std": statistics.stdev(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
        "mean_apart": sum(apart) / 3,
        "max_apart": max(apart),
    }
    assert row["runs"] == "3"
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value)
    # Every seed's split is the same: the split has a seed of its own.
    ids = [metrics.read_predictions(p).ids.tolist() for p in folder.glob("seed-*/predictions.csv")]
    assert ids[0] == ids[1] == ids[2]
    run("--stage", "verify", "--results", folder)
    (folder / "seed-5" / "predictions.csv").write_bytes(
        (folder / "seed-3" / "predictions.csv").read_bytes()
    )
    run("--stage", "verify", "--results", folder, expect=1)
    assert "WRONG  seeds.csv, row 2" in capsys.readouterr().out


def test_from_does_several_seeds_again(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "drawable", lambda: False)
    monkeypatch.chdir(tiny.parent)  # the data are found from elsewhere too
    words = ["--data", tiny.name, *QUICK, "--seed", 4, "--seeds", 2, 6, "--results", tmp_path / "r"]
    run(*words, "--hyperparameters", "tuned")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run("--from", "r/run.json", "--workers", 1)
    again = tmp_path / "r-again"
    out = capsys.readouterr().out
    for seed in (2, 6):
        name = f"seed-{seed}/predictions.csv"
        assert f"{again}/{name} and r/{name} are identical" in out
    for name in ("best.json", "seeds.csv"):
        assert (again / name).read_bytes() == (tmp_path / "r" / name).read_bytes()


def test_seeds_stage_by_stage(tiny, tmp_path):
    words = ["--data", tiny, "--results", tmp_path / "r", "--epochs", 1, "--seeds", 0, 1]
    for stage in ("train", "test"):
        run("--stage", stage, *words)
    assert (tmp_path / "r" / "seeds.csv").exists()


def test_split_seed_changes_the_split_alone(tiny, tmp_path):
    words = ["--stage", "train", "--data", tiny, "--epochs", 1, "--split-seed", 4]
    run(*words, "--results", tmp_path / "r")
    run("--stage", "test", "--results", tmp_path / "r")  # the split as run.json has it
    ids = metrics.read_predictions(tmp_path / "r" / "predictions.csv").ids
    assert ids.tolist() == data.poster_split(88, 4).test.tolist()


def test_from_does_the_run_again_beside_it(copied, capsys):
    run("--from", copied / "run.json", "--workers", 1)
    again = copied.with_name("results-again")
    assert f"{again / 'predictions.csv'} and {copied / 'predictions.csv'} are identical" in (
        capsys.readouterr().out
    )
    assert (again / "best.json").read_bytes() == (copied / "best.json").read_bytes()
    assert (again / "model.pt").read_bytes() == (copied / "model.pt").read_bytes()


def test_from_of_one_seed_leaves_the_others_verifiable(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "drawable", lambda: False)
    words = ["--data", tiny, "--epochs", 1, "--seeds", 0, 1, "--results", tmp_path / "r"]
    for stage in ("train", "test"):
        run("--stage", stage, *words)
    run("--from", tmp_path / "r" / "seed-1" / "run.json")
    assert (tmp_path / "r" / "seed-1-again" / "predictions.csv").exists()
    run("--stage", "verify", "--results", tmp_path / "r")


def test_from_refuses_other_data(copied, tmp_path, capsys):
    write_tiny(tmp_path / "tiny.npz", size=9)
    words = ["--from", copied / "run.json", "--data", tmp_path / "tiny.npz"]
    assert "has MD5" in refused(capsys, *words)


# -------------------------------------------------------------------------- terminal, fallback


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_redraws_on_a_terminal_and_writes_lines_to_a_log(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for stream in (Terminal(), io.StringIO()):
        progress = reproduce.Progress("train", 4, stream)
        for done in range(1, 5):
            progress(done - 0.5, "half")
            progress(done, f"epoch {done}", step=True)
        progress.close()
        if stream.isatty():
            assert stream.getvalue().count("\n") == 1
            assert stream.getvalue().count("\r") == 8
            assert "100%  epoch 4" in stream.getvalue()
        else:
            lines = stream.getvalue().splitlines()
            assert len(lines) == 4
            # started at 0 s, first seen at 0.5 of 4 after 10 s; 2 of 4 after 40 s: 1.5 in 40 s
            assert lines[1] == "train    epoch 2  ETA 53s"
            assert lines[3] == "train    epoch 4"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (7620, "2h07m")]
)
def test_duration(seconds, text):
    assert reproduce.duration(seconds) == text


def test_without_network_the_digits_stand_in_and_say_so(tmp_path, monkeypatch, capsys):
    remote = data.TISSUEMNIST._replace(url="http://127.0.0.1:9/closed")
    monkeypatch.setattr(data, "TISSUEMNIST", remote)
    words = ["--stage", "train", "--root", tmp_path / "cache", "--epochs", 1]
    run(*words, "--results", tmp_path / "r")
    lines = capsys.readouterr().out.splitlines()
    assert "digits stand in for TissueMNIST" in lines[0]
    assert lines[-1] == reproduce.NOT_COMPARABLE


# ----------------------------------------------------------------------- figures and the report


def linked(folder: Path) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", (folder / "report.md").read_text()))


def test_report_tells_what_was_run_and_links_what_is_there(finished):
    text = (finished / "report.md").read_text()
    record = json.loads((finished / "run.json").read_text())
    assert linked(finished) == {name for name in PICTURES if name.endswith("png")}
    assert reproduce.NOT_COMPARABLE in text
    assert (finished / "table.md").read_text().split("\n\n", 1)[1].strip() in text
    for fact in (record["data"]["md5"], "52 / 14 / 22", "0.025", "epochs 3 instead of 100"):
        assert fact in text
    for row in rows_of(finished / "per_class.csv"):
        assert re.search(rf"\| class {row['class']} *\| +{row['support']} ", text)
    assert "poster's AUC" not in text


def test_a_forged_report_is_found(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "r"))
    path = folder / "report.md"
    path.write_text(path.read_text().replace("0.025", "0.026"))
    record = reproduce.read_json(folder / "run.json")
    record["report"]["files"]["report.md"] = reproduce.fingerprint(path.read_bytes())
    reproduce.write_json(folder / "run.json", record)
    run("--stage", "verify", "--no-model", "--results", folder, expect=1)
    assert "WRONG  report.md, row" in capsys.readouterr().out


def test_report_beside_the_posters_figures_where_comparable(finished, tmp_path):
    """Where data and split are the poster's, its AUC stands in a column; else it never does."""
    record = reproduce.read_json(finished / "run.json")
    record["data"] |= {"md5": data.TISSUEMNIST.md5, "name": "tissuemnist"}
    reproduce.write_report(finished, tmp_path, record)
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| class 1 .* 0.7602 \|", text)
    assert "200,000 of its 236,386" in text
    assert reproduce.NOT_COMPARABLE not in text


def test_figures_drawn_later_are_the_same_and_verified(copied, tiny, capsys):
    pytest.importorskip("matplotlib")
    before = contents(copied)
    run("--stage", "figures", "--results", copied)
    after = contents(copied)
    assert {n for n in before if before[n] != after[n]} <= {"run.json"}
    assert set(before) == set(after)
    (copied / "figures" / "roc.svg").write_text("<svg/>")
    run("--stage", "verify", "--no-model", "--results", copied, expect=1)
    assert "WRONG  figures/roc.svg" in capsys.readouterr().out


def test_without_matplotlib_one_line_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quick = ["--epochs", 1, "--schedule", "hyperband", "--max-resource", 1]
    run("--data", tiny, "--results", tmp_path / "r", *quick)
    assert capsys.readouterr().out.count(reproduce.NO_MATPLOTLIB) == 1
    assert files_in(tmp_path / "r") == FILES
    assert not linked(tmp_path / "r")
    line = refused(capsys, "--stage", "figures", "--results", tmp_path / "r")
    assert reproduce.NO_MATPLOTLIB in line
    assert files_in(tmp_path / "r") == FILES


def test_no_table_to_report(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--results", tmp_path / "r"]
    run("--stage", "train", *words, "--epochs", 1)
    assert "holds no table to report" in refused(capsys, "--stage", "report", *words)


# ------------------------------------------------------------------------ the authors' own format


def write_folder(folder: Path, images, labels, width=6, kind="png", **options) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images):
        image.fromarray(pixels).save(folder / f"{i:0{width}d}.{kind}", **options)
    rows = "".join(f"{i},{label}\n" for i, label in enumerate(labels))
    (folder / "labels.csv").write_text(f"Id,Cell type\n{rows}")
    return folder


def test_a_folder_gives_what_the_npz_gives(tmp_path, capsys):
    digits = data.load("digits")
    images, labels = digits.images[:300], digits.labels[:300]
    parts = {"train": slice(0, 150), "val": slice(150, 200), "test": slice(200, 300)}
    arrays = {f"{p}_images": images[rows] for p, rows in parts.items()}
    arrays |= {f"{p}_labels": labels[rows] for p, rows in parts.items()}
    np.savez(tmp_path / "same.npz", **arrays)
    pngs = write_folder(tmp_path / "same", images, labels)
    (tmp_path / "h.json").write_text('{"batch_size": 16}')
    for source, results in ((tmp_path / "same.npz", "npz"), (pngs, "png")):
        words = ["--data", source, "--results", tmp_path / results, "--root", tmp_path / "root"]
        words += ["--hyperparameters", tmp_path / "h.json", "--epochs", 5]
        run("--stage", "train", *words)
        run("--stage", "test", *words)
    for name in ("table.csv", "table.md", "predictions.csv", "roc/auc.csv"):
        a, b = (tmp_path / results / name for results in ("npz", "png"))
        assert a.read_bytes() == b.read_bytes(), name
    assert "300 of 300 images decoded" in capsys.readouterr().out
    jpegs = write_folder(tmp_path / "jpeg", images, labels, width=5, kind="jpg", quality=90)
    accuracies = []
    for source in (pngs, jpegs):
        output = tmp_path / f"{source.name}.csv"
        words = ["--stage", "predict", "--images", source, "--output", output]
        run(*words, "--model", tmp_path / "png" / "model.pt")
        predicted = [int(row["predicted"]) for row in rows_of(output)]
        accuracies.append(accuracy_score(labels, predicted))
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)


def test_two_folders(tmp_path, capsys):
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (40, 8, 8)).astype(np.uint8), np.arange(40) % 3
    labels[30:] = np.arange(10) % 2  # a class that the second folder lacks
    first = write_folder(tmp_path / "train", images[:30], labels[:30])
    second = write_folder(tmp_path / "test", images[30:], labels[30:], width=5)
    words = ["--data", first, "--test-data", second, "--root", tmp_path / "root"]
    run("--stage", "train", *words, "--results", tmp_path / "r", "--epochs", 1)
    assert "30 of 30 images decoded" in capsys.readouterr().out
    run("--stage", "test", "--results", tmp_path / "r", "--root", tmp_path / "root")
    about = json.loads((tmp_path / "r" / "run.json").read_text())["data"]
    assert (about["split"], about["sizes"]) == ("folders", [24, 6, 10])
    read = metrics.read_predictions(tmp_path / "r" / "predictions.csv")
    assert read.ids.tolist() == list(range(30, 40))
    assert read.labels.tolist() == labels[30:].tolist()
    run("--from", tmp_path / "r" / "run.json", "--results", tmp_path / "again")
    assert "are identical" in capsys.readouterr().out


# ---------------------------------------------------------------------------- unlabelled images


@pytest.fixture
def unlabelled(tmp_path) -> Path:
    path = tmp_path / "unlabelled.npz"
    images = np.random.RandomState(1).randint(0, 256, (5, 8, 8)).astype(np.uint8)
    np.savez(path, images=images)
    return path


def test_predict(finished, unlabelled, tmp_path, capsys):
    words = ["--stage", "predict", "--images", unlabelled, "--model", finished / "model.pt"]
    words += ["--output", tmp_path / "p.csv"]
    run(*words)
    images = np.load(unlabelled)["images"]
    logits = model.predict(model.load_network(finished / "model.pt"), images)
    shares = model.torch.softmax(logits.double(), 1).numpy()
    rows = rows_of(tmp_path / "p.csv")
    assert [row["id"] for row in rows] == list("01234")
    assert [int(row["predicted"]) for row in rows] == shares.argmax(1).tolist()
    assert [row["class_name"] for row in rows] == [f"class {k}" for k in shares.argmax(1)]
    found = [[float(row[f"probability_{k}"]) for k in range(3)] for row in rows]
    np.testing.assert_allclose(found, shares, rtol=1e-12)
    assert "exists: choose another --output, or say --overwrite" in refused(capsys, *words)
    run(*words, "--overwrite", "--submission")
    text = "".join(f"{i},{k}\n" for i, k in enumerate(shares.argmax(1)))
    assert (tmp_path / "p.csv").read_text() == f"Id,Cell type\n{text}"


def test_predict_knows_the_class_names_of_a_results_folder(copied, unlabelled, tmp_path):
    record = reproduce.read_json(copied / "run.json")
    record["data"]["class_names"] = ["red", "green", "blue"]
    reproduce.write_json(copied / "run.json", record)
    words = ["--images", unlabelled, "--model", copied / "model.pt", "--output", tmp_path / "p.csv"]
    run("--stage", "predict", *words)
    for row in rows_of(tmp_path / "p.csv"):
        assert row["class_name"] == ["red", "green", "blue"][int(row["predicted"])]


def test_predict_refuses_what_does_not_fit(finished, unlabelled, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, shape in (("large", (5, 28, 28)), ("colour", (5, 8, 8, 3))):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros(shape, np.uint8))
    trained, output = finished / "model.pt", folder / "p.csv"
    for images, network, place, message in (
        (tmp_path / "large.npz", trained, output, "takes uint8 images (N, 8, 8)"),
        (tmp_path / "colour.npz", trained, output, "takes uint8 images (N, 8, 8, 1)"),
        (tmp_path / "none.npz", trained, output, "no such file"),
        (unlabelled, tmp_path / "none.pt", output, "cannot read"),
        (unlabelled, finished / "table.csv", output, "is damaged or no checkpoint"),
        (unlabelled, trained, folder / "none" / "p.csv", "no such folder"),
    ):
        words = ["--images", images, "--model", network, "--output", place]
        assert message in refused(capsys, "--stage", "predict", *words)
        assert not list(folder.iterdir())


def test_predict_into_a_folder(finished, unlabelled, tmp_path, capsys):
    words = ["--images", unlabelled, "--model", finished / "model.pt", "--output", tmp_path]
    assert "choose another --output" in refused(capsys, "--stage", "predict", *words, "--overwrite")


def test_submission_needs_integer_ids(finished, tmp_path, capsys):
    folder = write_folder(tmp_path / "f", np.zeros((2, 8, 8), np.uint8), [0, 1])
    (folder / "000001.png").rename(folder / "kidney.png")
    words = ["--images", folder, "--model", finished / "model.pt", "--output", tmp_path / "p.csv"]
    line = refused(capsys, "--stage", "predict", *words, "--submission")
    assert "needs files named by integer ids" in line
    assert not (tmp_path / "p.csv").exists()


# ---------------------------------------------------------------- the poster's other systems


def compare_here(monkeypatch, stop_after=None) -> list:
    """Measure in this process; return the list of the jobs that will have been measured."""
    jobs = []

    def here(job, tell):
        if len(jobs) == stop_after:
            raise KeyboardInterrupt
        jobs.append((job.system, len(job.train[0])))
        return reproduce.measure(job, tell)

    monkeypatch.setattr(reproduce, "in_own_process", here)
    return jobs


def test_compare_goes_on_and_says_what_scikit_learn_says(tiny, tmp_path, capsys, monkeypatch):
    words = ["--stage", "compare", "--data", tiny, "--results", tmp_path / "r", "--epochs", 1]
    jobs = compare_here(monkeypatch, stop_after=7)
    run(*words, expect=130)
    assert len(jobs) == 7
    assert files_in(tmp_path / "r") == {"run.json", "measured.json"}
    jobs, path = compare_here(monkeypatch), tmp_path / "r" / "measured.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"KNN", b"kNN", 1))
    capsys.readouterr()
    assert "measured.json was changed or damaged" in refused(capsys, *words)
    path.write_bytes(whole)
    run(*words)
    sizes = [10, 20, 52]
    assert len(jobs) == 15 - 7
    files = {"run.json", "compare.csv", "compare.md", "scaling.csv"}
    assert files_in(tmp_path / "r") == files
    scaling = rows_of(tmp_path / "r" / "scaling.csv")
    assert [(row["system"], int(row["images"])) for row in scaling] == [
        (system, size) for system in reproduce.SYSTEMS for size in sizes
    ]
    assert all(float(row[key]) > 0 for row in scaling for key in metrics.SCALING_HEADER[2:])

    images = data.load(tiny)
    split = data.poster_split(len(images.labels))
    flat = images.images.reshape(len(images.labels), -1) / np.float32(255)
    rows = {row["system"]: row for row in rows_of(tmp_path / "r" / "compare.csv")}
    for system, classifier in (("SVM (RBF)", SVC()), ("KNN", KNeighborsClassifier())):
        classifier.fit(flat[split.train], images.labels[split.train])
        truth, predicted = images.labels[split.test], classifier.predict(flat[split.test])
        assert float(rows[system]["accuracy"]) == pytest.approx(accuracy_score(truth, predicted))
        f1 = f1_score(truth, predicted, average="macro", zero_division=0)
        assert float(rows[system]["f1"]) == pytest.approx(f1)
    assert "n_neighbors=5" in rows["KNN"]["settings"]
    assert "1 epochs" in rows["PosterCNN"]["settings"]
    assert rows["NephNet2D"]["settings"].startswith("1,834,179 parameters")  # at 8x8, 3 classes
    assert float(rows["KNN"]["model_mb"]) * 1e6 > 52 * 64 * 4  # it keeps the training images

    run("--stage", "verify", "--results", tmp_path / "r")
    path = tmp_path / "r" / "scaling.csv"
    path.write_text(path.read_text().replace("PosterCNN,52,", "PosterCNN,52,9"))
    capsys.readouterr()
    run("--stage", "verify", "--no-model", "--results", tmp_path / "r", expect=1)
    assert "WRONG  compare.md" in capsys.readouterr().out


def test_a_process_of_its_own_measures_what_is_allocated_there():
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (3000, 28, 28)).astype(np.uint8), np.arange(3000) % 3
    job = reproduce.Job(
        "KNN",
        (images, labels),
        (images[:1], labels[:1]),
        (images[:50], labels[:50]),
        {"num_classes": 3},
        model.POSTER,
        {"seed": 0},
    )
    row = reproduce.in_own_process(job, lambda share: None)
    floats = images.size * 4 / 1e6
    assert floats < row["peak_memory_mb"] < 30 * floats
    assert row["accuracy"] < 1
    bad = dataclasses.replace(job, train=(images, labels * 0), system="SVM (RBF)")
    with pytest.raises(reproduce.RunError, match=r"SVM \(RBF\) on 3,000 images: The number of cl"):
        reproduce.in_own_process(bad, lambda share: None)


def test_sizes_of_the_comparison():
    assert reproduce.comparison_sizes(10_000) == [1000, 2000, 5000, 10_000]
    assert reproduce.comparison_sizes(35_372) == [1000, 2000, 5000, 10_000, 20_000, 35_372]
    assert reproduce.comparison_sizes(1078) == [100, 200, 500, 1078]
    assert reproduce.comparison_sizes(12) == [12]


def measured(powers, factor) -> tuple[dict, dict]:
    """Make up rows of compare.csv, and the exponents of them."""
    columns = metrics.SCALING_HEADER[2:]
    rows = {
        system: {"model_mb": "1", **dict.fromkeys(columns, str(factor.get(system, 1)))}
        for system in reproduce.SYSTEMS
    }
    return rows, {system: [powers.get(system, 0.5)] * 3 for system in reproduce.SYSTEMS}


def test_growth_is_the_exponent_of_a_power_law():
    rows = [
        {"system": system, "images": str(n), "train_seconds": str(a * n**p)}
        for system, a, p in (("KNN", 3e-3, 1.7), ("SVM (RBF)", 5, -0.25))
        for n in (100, 200, 500, 3000)
    ]
    assert reproduce.growth(rows, "KNN", "train_seconds") == pytest.approx(1.7)
    assert reproduce.growth(rows, "SVM (RBF)", "train_seconds") == pytest.approx(-0.25)
    assert np.isnan(reproduce.growth(rows[:1], "KNN", "train_seconds"))


def test_claims_follow_the_measurements():
    knn, svm = reproduce.claims(*measured({"SVM (RBF)": 2.0}, {"KNN": 5}), 12_000)
    assert "**holds here**" in knn
    assert "**holds here**" in svm
    assert "which makes 1m40s of the poster's 120,000" in svm  # 1 s * (120,000 / 12,000) ** 2
    _, svm = reproduce.claims(*measured({"SVM (RBF)": 2.0}, {"PosterCNN": 50}), 12_000)
    assert "**holds here for growth, not for time**" in svm
    knn, svm = reproduce.claims(*measured({"SVM (RBF)": 0.9}, {"KNN": 0.5}), 12_000)
    assert "**does not hold here**" in knn
    assert "**does not hold here**" in svm


# ------------------------------------------------------------------------- the committed results


def test_committed_results_are_whole():
    folder = HERE / "results" / "digits"
    assert reproduce.verify(folder, None)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1 << 20


def test_schedules_of_the_command_line():
    arguments = reproduce.parse(["--schedule", "hyperband", "--max-resource", "9", "--eta", "3"])
    assert reproduce.tuning_schedule(arguments) == hyperband.brackets(9, 3)
    assert reproduce.tuning_schedule(reproduce.parse([])) == [hyperband.POSTER_BRACKET]


def test_no_file_but_reproduce_imports_a_sibling():
    names = ("data", "model", "hyperband", "metrics", "reproduce")
    for name in names[:-1]:
        code = f"import sys, {name}; print(*(set({names!r}) & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )
        assert done.stdout.split() == [name]


# ------------------------------------------------------------------------------- side by side


def trials_in(folder: Path) -> list[dict]:
    lines = (folder / "tuning.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "crc32")}
        for line in lines
    ]


def workers_of(pid: int) -> list[int]:
    """Find the live worker processes of a run, wherever it was started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            spawned = b"spawn_main" in (stat.parent / "cmdline").read_bytes()
            if int(parent) == pid and state != "Z" and spawned:
                found.append(int(stat.parent.name))
    return found


def gone(pids: list[int]) -> bool:
    """Wait until these processes have ended."""
    deadline = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in pids
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_worker_processes_change_nothing_whatever_befalls_them(tiny, tmp_path):
    """A worker is killed, then the search, then it is interrupted; it ends as with one process."""
    words = ["--stage", "tune", "--data", tiny, "--schedule", "hyperband", "--max-resource", "9"]
    run(*words, "--results", tmp_path / "one", "--workers", 1)
    words += ["--results", tmp_path / "two", "--workers", 2]
    for end in (signal.SIGKILL, signal.SIGINT):
        process = start(*words)
        wait_for(process, "trial 0" if end == signal.SIGKILL else "results ")
        while len(pids := workers_of(process.pid)) < 2:
            assert process.poll() is None
        if end == signal.SIGKILL:
            os.kill(pids[0], signal.SIGKILL)
            wait_for(process, "trial 5")  # more than was under way
            pids = workers_of(process.pid)
        process.send_signal(end)
        _, error = process.communicate(timeout=60)
        assert gone(pids)
    assert process.returncode == 130
    assert error == "reproduce.py: interrupted; the same command goes on from here\n"
    run(*words[:-1], 1)  # another number of workers goes on with the same search
    assert trials_in(tmp_path / "two") == trials_in(tmp_path / "one")


def test_trials_use_one_thread_and_pickle_small(tmp_path, monkeypatch):
    """So that results do not hang on the number of workers, nor calls on that of images."""
    objective = reproduce.Objective({}, tmp_path, 0, "cpu", "fp32")
    assert len(pickle.dumps(objective)) < 1000
    for name in reproduce.TUNING_ARRAYS:
        np.save(tmp_path / f"{name}.npy", np.zeros(1))
    threads, torch = [], model.torch

    def fit(*_, **options):
        threads.append(torch.get_num_threads())
        return [model.EpochRecord(0, 0.1, 1.0, 0.5, 0.0, 0.0, 0.0)]

    monkeypatch.setattr(model, "fit", fit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert objective({}, 0, 1, tmp_path) == 0.5
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_trial_waits_for_the_worker_of_a_killed_search(tmp_path):
    code = "import sys, reproduce, pathlib\nwith reproduce.held(pathlib.Path(sys.argv[1])):"
    code += "\n print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, tmp_path / "lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE) as other:
        other.stdout.readline()
        order = []
        waits = threading.Thread(target=lambda: order.append(wait_held(tmp_path / "lock")))
        waits.start()
        time.sleep(0.2)
        order.append("released")
        other.stdin.close()
        waits.join(60)
    assert order == ["released", "held"]


def wait_held(path: Path) -> str:
    with reproduce.held(path):
        return "held"


def test_dask_cluster(finished, tiny, tmp_path):
    """A real scheduler and two workers on this machine."""
    pytest.importorskip("distributed")
    command = [sys.executable, "-W", "ignore", "-m"]
    scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    file = tmp_path / "scheduler.json"
    started = [[*scheduler, "--no-dashboard", "--scheduler-file", file]]
    worker = ["distributed.cli.dask_worker", "--scheduler-file", file, "--nthreads", "1"]
    started += [[*worker, "--no-dashboard", "--no-nanny"]] * 2
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    processes = [subprocess.Popen([*command, *words], **quiet) for words in started]
    try:
        while not file.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        words = ["--stage", "tune", "--data", tiny, "--results", tmp_path / "r", *QUICK[2:-2]]
        done = subprocess.run(
            [sys.executable, HERE / "reproduce.py", *words, "--dask", address],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert trials_in(tmp_path / "r") == trials_in(finished)


def test_dask_that_is_not_there(tiny, tmp_path, capsys, monkeypatch):
    words = ["--stage", "tune", "--data", tiny, "--results", tmp_path / "r"]
    for address in ("127.0.0.1:8786", "tcp://127.0.0.1", "tcp://:a"):
        with pytest.raises(SystemExit, match="2"):
            reproduce.main([str(word) for word in (*words, "--dask", address)])
        assert "tcp://HOST:PORT" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "requirements-cluster.txt" in refused(capsys, *words, "--dask", "tcp://127.0.0.1:1")
