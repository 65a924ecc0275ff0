"""Kill runs and damage files at random, and check that nothing wrong comes of it.

    python tests/faults.py --kills 100 --files 1000 --seed 0

Kills: ``reproduce.py --stage all`` is killed after a random time, or where it moves a random file
or stage folder into place, and given again until it ends. What it leaves must be what a run without
kills leaves. Damage: a random place of a finished run, of an interrupted one, or of the data file
is changed. A command must then be refused in one line, or leave what it would have left, or its
verify must name the file. Not on Windows.
"""

import argparse
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reproduce

# Every setting is given, so that a damaged run.json decides none.
CHAIN = "--data tiny.npz --split poster --split-seed 0 --pixels stretched --schedule 3,3 --seed 0 "
CHAIN += "--hyperparameters poster --epochs 6 --compile off --precision fp32 --workers 1 --results"
CHAIN = CHAIN.split()
VERIFY = ["--stage", "verify", "--results"]
# Where files have wall times, environments and commits.
VARYING = {"run.json": '(?s)"environments": .*', "tuning.jsonl": '"seconds": [^,}]+'}
VARYING |= {"history.csv": "(?m),[^,\n]*$", "report.md": "(?s)## Environments.*"}


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray, ends: list[int]) -> None:
    """Write images in MedMNIST's layout; `ends` are those of the train and validation images."""
    arrays = {}
    for i, part in enumerate(("train", "val", "test")):
        arrays[f"{part}_images"] = np.split(images, ends)[i]
        arrays[f"{part}_labels"] = np.split(labels, ends)[i]
    np.savez(path, **arrays)


def write_tiny(path: Path, num_classes: int = 3, num_images: int = 88) -> None:
    """Write an npz of 8x8 pixels whose classes differ in which row of pixels is bright."""
    labels = np.arange(num_images) % num_classes
    images = np.random.RandomState(0).randint(0, 80, (num_images, 8, 8)).astype(np.uint8)
    images[np.arange(num_images), labels] += 120
    save_npz(path, images, labels, ends=[48, 64])


def contents(folder: Path) -> dict[str, str]:
    """Read every file of a results folder but SHA256SUMS, without what is VARYING."""
    texts = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "SHA256SUMS":
            text = path.read_bytes().decode("latin-1")
            name = path.relative_to(folder).as_posix()
            texts[name] = re.sub(VARYING.get(path.name, "$^"), "", text)
    return texts


def differing(folder: str, expected: dict[str, str]) -> set[str]:
    """Return the names of the files whose contents are not as expected."""
    found = contents(Path(folder))
    return {name for name in expected | found if expected.get(name) != found.get(name)}


def command(words: list[str]) -> tuple[int | str, str, str]:
    """Run a command line here; return its status (or its exception), stdout and stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = reproduce.main(words)
        except Exception as error:
            status = repr(error)
    return status, out.getvalue(), err.getvalue()


def forked(words: list[str], seconds: float | None = None) -> int:
    """Run a command in a child process; return its exit code, -SIGKILL where it was killed.

    Given `seconds`, it is killed after them, or by chance where it moves something into place.
    """

    def risky(move, chance):
        def moved(*paths):
            lot = random.random()  # seeded anew in each child
            if lot < chance:
                signal.raise_signal(signal.SIGKILL)
            move(*paths)
            if lot > 1 - chance:
                signal.raise_signal(signal.SIGKILL)

        return moved

    def run():
        if seconds:
            os.replace = risky(os.replace, 0.01)  # of a file, by Path.replace
            os.rename = risky(os.rename, 0.1)  # of a stage's folder, by Path.rename
        sys.exit(command(words)[0])

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode


def check_kills(kills: int, rng: random.Random) -> int:
    """Kill at least so many runs; return how many rounds ended with a difference."""
    started = time.monotonic()
    forked([*CHAIN, "whole"])
    expected, longest = contents(Path("whole")), 1.5 * (time.monotonic() - started)
    done = rounds = different = 0
    while done < kills:
        rounds += 1
        while (status := forked([*CHAIN, "killed"], rng.uniform(0, longest))) == -signal.SIGKILL:
            done += 1
        names = differing("killed", expected)
        if status != 0 or names:  # the chain's own verify included
            different += 1
            print(f"round {rounds}: status {status}, different: {sorted(names)}")
        shutil.rmtree("killed")
    print(f"{done} kills, {rounds} rounds, {different} with a difference")
    return different


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit, write another character or 64 bytes of noise, or cut the end off, or all."""
    place, kind = rng.randrange(len(content)), rng.random()
    if kind < 0.2:
        return content[: rng.choice([0, place])]
    flipped = content[place] ^ 1 << rng.randrange(8)
    typed = rng.choice([c for c in b'0123456789-.,e\n"{}[]x\0\xff' if c != content[place]])
    new = rng.randbytes(64) if kind < 0.3 else bytes([flipped if kind < 0.8 else typed])
    return content[:place] + new + content[place + len(new) :]


def outcome(words: list[str], name: str, expected: dict[str, str], aside: set[str]) -> str:
    """Run a command on a folder with a damaged file; return what became of it."""
    status, out, error = command([*words, "damaged"])
    if status == 2 and re.fullmatch("(NOTE: .*\n)*reproduce.py: error: .*\n", error):
        return "refused"
    if status == 1 and re.search(rf"WRONG .*{name}", out):
        return "found by verify"
    # Of what verify reads, nothing but a line break of SHA256SUMS may change unnoticed.
    may_pass = words == CHAIN or name == "SHA256SUMS"
    if status == 0 and may_pass and differing("damaged", expected) <= aside:
        return "no change"
    print(f"{name}: status {status}, {error[-300:]!r}")
    return "WRONG"


def check_damage(files: int, rng: random.Random) -> int:
    """Damage so many files; return how many were wrongly taken."""
    assert command([*CHAIN, "sealed"])[0] == 0
    expected, targets = contents(Path("sealed")), [*Path("sealed").rglob("[!.]*")]
    for stage in ("tune", "train", "test"):

        def interrupt(progress, done, *_, stage=stage, **__):
            if progress.label == stage and done > 1:
                raise KeyboardInterrupt

        with mock.patch.object(reproduce.Progress, "show", interrupt):
            assert command([*CHAIN, stage])[0] == 130
        targets += 3 * [*Path(stage, f"{stage}.part").rglob("*"), Path("tiny.npz")]
    targets = sorted(path for path in targets if path.is_file())
    counts = Counter()
    for number in range(files):
        target = targets[number % len(targets)]
        base, *rest = target.parts
        shutil.copytree(base if rest else "test", "damaged")
        path = Path("damaged", *rest) if rest else target
        whole, aside, commands = path.read_bytes(), set(), [CHAIN]
        path.write_bytes(damaged(whole, rng))
        if base == "sealed":
            commands = [VERIFY, CHAIN]
        elif path.name == "run.json":  # The report repeats its names and environments.
            aside = {f"{base}/run.json", "report.md"}
        elif path.name == "tuning.jsonl":
            loss = rb'"(loss|seconds)": -?\d[^,}"]*'
            if re.sub(loss, b"", whole) == re.sub(loss, b"", path.read_bytes()):
                aside = {*expected}  # Nobody can know what was measured.
        for words in commands:
            counts[base, path.name, outcome(words, path.name, expected, aside)] += 1
        if not rest:
            path.write_bytes(whole)
        shutil.rmtree("damaged")
    for row, count in sorted(counts.items()):
        print("{:<9} {:<16} {:<16}".format(*row), count)
    wrong = sum(count for row, count in counts.items() if row[-1] == "WRONG")
    print(f"{files} damaged files, {wrong} wrongly taken")
    return wrong


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"kills": 100, "files": 1000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options = parse(None)
    sys.modules["matplotlib"] = None  # Figures would take longer than all the rest of a round.
    with tempfile.TemporaryDirectory() as place, chdir(place):
        write_tiny(Path("tiny.npz"))
        chance = random.Random(options.seed)
        faults = check_kills(options.kills, chance) + check_damage(options.files, chance)
    sys.exit(faults > 0)
