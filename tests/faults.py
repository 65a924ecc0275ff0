"""Kill runs and damage files at random, and see that nothing wrong comes of it.

    python tests/faults.py --kills 100 --files 1000 --seed 0

Kills: each round runs ``reproduce.py --stage all`` on tiny images, kills it with SIGKILL after a
random time or right before or after a random file is moved into place, and gives the command again
until it ends. The folder must then hold what a run without kills leaves, wall times aside.

Damage: a file of a finished folder, of one that a kill interrupted, or the data file is changed at
a random place. A command must then end with status 2 and one line, or with the results of the
undamaged folder; and verify must name a changed file of a finished folder. Not on Windows.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model
import reproduce

CHAIN = ["--epochs", "6", "--schedule", "hyperband", "--max-resource", "3", "--workers", "1"]
CHAIN += ["--precision", "fp32"]


def write_tiny(path: Path, size: int = 8, parts: tuple[int, ...] = (48, 16, 24)) -> None:
    """Write an npz in MedMNIST's layout whose three classes differ in where a bar stands."""
    rng = np.random.RandomState(0)
    arrays = {}
    for name, n in zip(("train", "val", "test"), parts, strict=True):
        labels = np.arange(n) % 3
        images = rng.randint(0, 80, (n, size, size)).astype(np.uint8)
        images[np.arange(n), 2 + 2 * labels] += 120
        arrays |= {f"{name}_images": images, f"{name}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **arrays)


def contents(folder: Path) -> dict[str, str]:
    """Read every file of a results folder, without seconds and what follows from them."""
    read = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        text = path.read_bytes().decode("latin-1")
        if path.name == "history.csv":
            text = re.sub(r",[^,]*$", "", text, flags=re.MULTILINE)
        elif path.name in ("run.json", "tuning.jsonl"):
            text = re.sub(r'"(seconds|git_commit)": [^,}]+', "", text)
        elif path.name == "report.md":
            text = re.sub(r"\| (seconds|git_commit) .*|[- ]+", "", text)
        if path.name != "SHA256SUMS":
            read[path.relative_to(folder).as_posix()] = text
    return read


def command(words: list[str]) -> tuple[int | str, str, str]:
    """Run a command line here; return its status (or its exception), stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = reproduce.main(words)
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("NOTE: ")]
    return status, out.getvalue(), "\n".join(lines)


# --------------------------------------------------------------------------------------- kills


def killed(words: list[str], after: float, at: tuple[int, bool] | None) -> tuple[int | None, int]:
    """Fork and run a command, to be killed after some seconds, or at its n-th move of a file.

    Return its status, None where it was killed, and how many files it has moved into place.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        move, moves = os.replace, [0]

        def counted(*arguments, **options):
            os.write(writing, b".")
            moves[0] += 1
            if at == (moves[0], False):
                os.kill(os.getpid(), signal.SIGKILL)
            move(*arguments, **options)
            if at == (moves[0], True):
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted  # Path.replace calls it too
        os._exit(status if isinstance(status := command(words)[0], int) else 99)
    os.close(writing)

    def kill():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    timer = threading.Timer(after, kill)
    timer.start()
    with os.fdopen(reading, "rb") as pipe:
        moves = len(pipe.read())  # until the child's end
    timer.cancel()
    _, status = os.waitpid(child, 0)
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), moves


def check_kills(kills: int, rng: random.Random, scratch: Path) -> int:
    """Kill at least so many runs; return how many rounds ended with a difference."""
    words = ["--data", str(scratch / "tiny.npz"), *CHAIN, "--results"]
    started = time.monotonic()
    status, moves = killed([*words, str(scratch / "whole")], 1e6, None)
    expected, takes = contents(scratch / "whole"), time.monotonic() - started
    done = rounds = different = 0
    while done < kills:
        rounds += 1
        folder, status = scratch / f"round-{rounds}", None
        while status is None:
            at = (rng.randint(1, moves), rng.random() < 0.5) if rng.random() < 0.5 else None
            after = 1e6 if at else rng.uniform(0, takes)
            status, _ = killed([*words, str(folder)], after, at)
            done += status is None
        found = contents(folder) if status == 0 else {}
        # Forked too: PyTorch's threads, once started here, would hang the next child.
        status, _ = killed(["--stage", "verify", "--results", str(folder)], 1e6, None)
        if found != expected or status != 0:
            different += 1
            names = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
            print(f"round {rounds}: verify says {status}, different: {sorted(names)}")
        shutil.rmtree(folder)
    print(f"{done} kills, {rounds} rounds, {different} with a difference")
    return different


# -------------------------------------------------------------------------------------- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes, cut the end off, or leave nothing."""
    broken, place, kind = bytearray(content), rng.randrange(len(content)), rng.random()
    if kind < 0.5:
        broken[place] ^= 1 << rng.randrange(8)
    elif kind < 0.7:
        broken[place] = ord(rng.choice('0123456789-.,e\n"{}[]x\0\xff'))
    elif kind < 0.9:
        del broken[place:]
    else:
        broken[place : place + 64] = rng.randbytes(len(broken[place : place + 64]))
    return bytes(broken) if broken != content else b""


def interrupt(folder: Path, stage: str, words: list[str]) -> None:
    """Make of a finished folder one whose command was interrupted in a stage."""
    record = json.loads((folder / "run.json").read_text())
    for later in ("test", "train", "tune")[: 3 - ("tune", "train", "test").index(stage)]:
        record[later]["seconds"] = None
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    (folder / "SHA256SUMS").unlink()
    if stage == "train":  # after one epoch
        save, saved = model._save, []

        def once(content, path):
            if saved:
                raise KeyboardInterrupt
            saved.append(path)
            save(content, path)

        model._save = once
        assert command([*words, str(folder)])[0] == 130
        model._save = save


def alike(found: dict[str, str], expected: dict[str, str], name: str) -> bool:
    """Compare folders, but for the damaged file: zip archives have bytes that say nothing.

    Of a run.json without a checksum, the report repeats what it says of the environment.
    """
    aside = {name, "report.md"} if name == "run.json" else {name}
    return all(found.get(n) == text for n, text in expected.items() if n not in aside)


def check_damage(files: int, rng: random.Random, scratch: Path) -> int:
    """Damage so many files; return how many were wrongly taken."""
    words = ["--data", str(scratch / "tiny.npz"), *CHAIN, "--results"]
    assert command([*words, str(scratch / "sealed")])[0] == 0
    expected = contents(scratch / "sealed")
    for stage in ("train", "test"):
        shutil.copytree(scratch / "sealed", scratch / stage)
        interrupt(scratch / stage, stage, words)
    sealed = [("sealed", name) for name in reproduce.files_in(scratch / "sealed")]
    sealed = [pair for pair in sealed if "figures" not in pair[1]]
    # Of a log that no checksum vouches for yet, a changed loss can't be told from a measured one.
    unsealed = [("train", "training.pt"), ("train", "run.json"), ("test", "model.pt")]
    targets = [*sealed, *unsealed * 3, *[("sealed", "tiny.npz")] * 3]
    counts, wrong, folder = Counter(), 0, scratch / "damaged"
    for number in range(files):
        base, name = targets[number % len(targets)]
        shutil.copytree(scratch / base, folder)
        path = folder / name if name != "tiny.npz" else scratch / "copy.npz"
        whole = (scratch / name if name == "tiny.npz" else path).read_bytes()
        path.write_bytes(damaged(whole, rng))
        tried = [*words, str(folder)]
        if name == "tiny.npz":
            tried = ["--stage", "test", "--data", str(path), "--results", str(folder)]
        results = [command(tried)]
        if base == "sealed" and name != "tiny.npz":
            results.append(command(["--stage", "verify", "--results", str(folder)]))
        for (status, out, error), last in zip(results, (False, True), strict=False):
            if status == 2 and "\n" not in error and error.startswith("reproduce.py: error: "):
                outcome = "refused"
            elif status == 1 and re.search(rf"WRONG .*{Path(name).name}", out):
                outcome = "found by verify"
            elif status == 0 and not last and alike(contents(folder), expected, name):
                outcome = "no change"
            else:
                outcome, wrong = "WRONG", wrong + 1
                print(f"file {number}, {base} {name}: status {status}, {error[-300:]!r}")
            counts[name, outcome] += 1
        shutil.rmtree(folder)
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:<16} {outcome:<16} {count}")
    print(f"{files} damaged files, {wrong} wrongly taken")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Figures take longer than all the rest of a round.
    find = reproduce.importlib.util.find_spec
    reproduce.importlib.util.find_spec = lambda name: None if name == "matplotlib" else find(name)
    with tempfile.TemporaryDirectory() as place:
        write_tiny(Path(place, "tiny.npz"))
        chance = random.Random(options.seed)
        faults = check_kills(options.kills, chance, Path(place)) if options.kills else 0
        faults += check_damage(options.files, chance, Path(place)) if options.files else 0
    sys.exit(faults > 0)
