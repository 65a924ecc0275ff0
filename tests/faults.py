"""Kill runs and damage files at random, and see that nothing wrong comes of it.

    python tests/faults.py --kills 100 --files 1000 --seed 0

Kills: each round runs ``reproduce.py --stage all`` on tiny images, kills it with SIGKILL after a
random time or right before or after a random file is moved into place, and gives the command again
until it ends. The folder must then hold what a run without kills leaves, wall times aside.

Damage: a file of a finished folder, of one that was interrupted, or the data file is changed at a
random place. A command must then end with status 2 and one line, or with the results of the
undamaged folder; and verify must name a changed file of a finished folder. Not on Windows.
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

CHAIN = ["--data", "tiny.npz", "--epochs", "6", "--schedule", "hyperband", "--max-resource", "3"]
CHAIN += ["--workers", "1", "--precision", "fp32", "--results"]
VERIFY = ["--stage", "verify", "--results"]


def write_tiny(path: Path, size: int = 8) -> None:
    """Write an npz in MedMNIST's layout whose three classes differ in where a bar stands."""
    rng = np.random.RandomState(0)
    arrays = {}
    for name, n in {"train": 48, "val": 16, "test": 24}.items():
        labels = np.arange(n) % 3
        images = rng.randint(0, 80, (n, size, size)).astype(np.uint8)
        images[np.arange(n), 2 + 2 * labels] += 120
        arrays |= {f"{name}_images": images, f"{name}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **arrays)


def contents(folder: Path) -> dict[str, str]:
    """Read every file of a results folder, without seconds and what follows from them."""
    varies = {"history.csv": ",[^,\n]*$", "report.md": r"\| (seconds|git_commit) .*|[- ]+"}
    varies |= dict.fromkeys(("run.json", "tuning.jsonl"), '"(seconds|git_commit)": [^,}]+')
    read = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "SHA256SUMS":
            text = path.read_bytes().decode("latin-1")
            if path.name in varies:
                text = re.sub(varies[path.name], "", text, flags=re.MULTILINE)
            read[path.relative_to(folder).as_posix()] = text
    return read


def command(words: list[str]) -> tuple[int | str, str, str]:
    """Run a command line here; return its status (or its exception), stdout and stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = reproduce.main(words)
        except Exception as error:
            status = repr(error)
    return status, out.getvalue(), err.getvalue()


def differing(folder: str, expected: dict[str, str]) -> set[str]:
    """Name the files of a folder whose contents are not as expected."""
    found = contents(Path(folder))
    return {name for name in expected | found if expected.get(name) != found.get(name)}


def forked(words: list[str], after: float | None = None) -> int:
    """Run a command in a child process; return its exit code, -SIGKILL where it was killed.

    Given `after`, that is after so many seconds or, by chance, at the move of a file into place.
    """
    move = os.replace

    def risky(*paths):
        lot = random.random()  # seeded anew in each child
        if lot < 0.01:
            signal.raise_signal(signal.SIGKILL)
        move(*paths)
        if lot > 0.99:
            signal.raise_signal(signal.SIGKILL)

    def run():
        os.replace = risky if after else move  # Path.replace calls it too
        sys.exit(command(words)[0])

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(after)
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
        if status != 0 or names:  # the chain's own audit included
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


def check_damage(files: int, rng: random.Random) -> int:
    """Damage so many files; return how many were wrongly taken."""
    assert command([*CHAIN, "sealed"])[0] == 0
    expected = contents(Path("sealed"))
    for stage in ("train", "test"):

        def interrupt(progress, done, *_, stage=stage, **__):  # after one epoch, or the test's end
            if progress.label == stage and done > 1:
                raise KeyboardInterrupt

        with mock.patch.object(reproduce.Progress, "__call__", interrupt):
            assert command([*CHAIN, stage])[0] == 130
    # Of a log that no checksum vouches for yet, a changed loss can't be told from a measured one.
    unsealed = [("train", "training.pt"), ("train", "run.json"), ("test", "model.pt")]
    targets = [("sealed", name) for name in sorted(reproduce.files_in(Path("sealed")))]
    targets += 3 * [*unsealed, ("test", "tiny.npz")]
    counts, wrong = Counter(), 0
    for number in range(files):
        base, name = targets[number % len(targets)]
        shutil.copytree(base, "damaged")
        path = Path(name) if name == "tiny.npz" else Path("damaged", name)
        # Of a run.json without a checksum, the report repeats what it says of the environment.
        aside = {name, "report.md"} if name == "run.json" else {name}
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        for words in (VERIFY, CHAIN) if base == "sealed" else (CHAIN,):
            status, out, error = command([*words, "damaged"])
            if status == 2 and re.fullmatch("(NOTE: .*\n)*reproduce.py: error: .*\n", error):
                outcome = "refused"
            elif status == 1 and re.search(rf"WRONG .*{path.name}", out):
                outcome = "found by verify"
            elif status == 0 and words == CHAIN and differing("damaged", expected) <= aside:
                outcome = "no change"
            else:
                outcome, wrong = "WRONG", wrong + 1
                print(f"file {number}, {base} {name}: status {status}, {error[-300:]!r}")
            counts[name, outcome] += 1
        path.write_bytes(whole)  # for the data file's sake
        shutil.rmtree("damaged")
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
    sys.modules["matplotlib"] = None  # figures take longer than all the rest of a round
    with tempfile.TemporaryDirectory() as place, chdir(place):
        write_tiny(Path("tiny.npz"))
        chance = random.Random(options.seed)
        faults = check_kills(options.kills, chance) + check_damage(options.files, chance)
    sys.exit(faults > 0)
