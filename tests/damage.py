"""Damage every kind of file that the suite reads; nothing may come of it but refusal or no change.

    python tests/damage.py --files 2000 --seed 0

Flips bits, overwrites, truncates and empties files at random places, and gives them to the stage
that reads them. That must end with status 2 and one line, or (verify) with status 1 and the file
named, or as if nothing had been damaged: a flipped bit in a zip date, a log that is cut off and
goes on. A traceback or any other result is counted as wrong.
"""

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill import contents, write_tiny

import data
import model
import reproduce

QUICK = ["--epochs", "2", "--schedule", "hyperband", "--max-resource", "3", "--workers", "1"]
# File: (stage that wrote it and is cut short before its end, stage that reads it)
READERS = {
    "tiny.npz": (None, []),
    "model.pt": ("test", ["--stage", "test"]),
    "training.pt": ("train", ["--stage", "train"]),
    "run.json": ("test", ["--stage", "test"]),
    "best.json": ("train", ["--stage", "train", "--hyperparameters", "tuned"]),
    "tuning.jsonl": ("tune", ["--stage", "tune"]),
    "predictions.csv": (None, ["--stage", "verify", "--no-model"]),
    "history.csv": (None, ["--stage", "verify", "--no-model"]),
}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change `content` in one of five ways."""
    broken, place = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(100)
    if kind < 50:
        broken[place] ^= 1 << rng.randrange(8)
    elif kind < 70:
        broken[place] = ord(rng.choice('0123456789-.,e\n"{}[]x\0\xff'))
    elif kind < 90:
        del broken[place:]
    elif kind < 98:
        end = place + rng.randrange(1, 64)
        broken[place:end] = rng.randbytes(len(broken[place:end]))
    else:
        broken.clear()
    return bytes(broken)


def command(words: list[str]) -> tuple[int | str, str, str]:
    """Run the command line here; return status (or the exception), stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = reproduce.main(words)
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("NOTE: ")]
    return status, out.getvalue(), "\n".join(lines)


def prepare(scratch: Path) -> None:
    """Make a finished folder, and one a stage that was interrupted."""
    write_tiny(scratch / "tiny.npz")
    words = ["--data", str(scratch / "tiny.npz"), *QUICK]
    whole = scratch / "whole"
    if command([*words, "--results", str(whole), "--hyperparameters", "tuned"])[0] != 0:
        raise SystemExit("the undamaged run failed")
    for stage in ("tune", "train", "test"):
        folder = Path(shutil.copytree(whole, scratch / stage))
        record = reproduce.read_json(folder / "run.json")
        for later in ("test", "train", "tune")[: 3 - ("tune", "train", "test").index(stage)]:
            del record[later]["result"], record[later]["files"]
        if stage == "tune":
            lines = (folder / "tuning.jsonl").read_bytes().splitlines(keepends=True)
            (folder / "tuning.jsonl").write_bytes(b"".join(lines[:4]))
            (folder / "best.json").unlink()
        reproduce.write_json(folder / "run.json", record)
    # A checkpoint after one of two epochs.
    record, save = [], model._save

    def once(content, path):
        if record:
            raise KeyboardInterrupt
        record.append(path)
        save(content, path)

    model._save = once
    (scratch / "train" / "model.pt").unlink()
    words += ["--results", str(scratch / "train"), "--stage", "train"]
    status = command([*words, "--hyperparameters", "tuned"])[0]
    model._save = save
    if status != 130 or not (scratch / "train" / "training.pt").exists():
        raise SystemExit("the interrupted run was not interrupted")


def check(files: int, seed: int, say=print) -> int:
    """Damage that many files; return how many were wrongly taken."""
    rng, counts, wrong = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = Path(name)
        prepare(scratch)
        original = data.load(scratch / "tiny.npz")
        expected = {}
        for i in range(files):
            target = list(READERS)[i % len(READERS)]
            base, words = READERS[target]
            if target == "tiny.npz":
                path = scratch / "damaged.npz"
                path.write_bytes(damage((scratch / target).read_bytes(), rng))
                outcome = load(path, original)
            else:
                folder = Path(shutil.copytree(scratch / (base or "whole"), scratch / "damaged"))
                words = [*words, "--results", str(folder)]
                if "verify" not in words:
                    words += ["--data", str(scratch / "tiny.npz"), *QUICK]
                if target == "training.pt":
                    words += ["--hyperparameters", "tuned"]
                if target not in expected:
                    status, _, error = command(words)
                    if status != 0:
                        raise SystemExit(f"{target}: the undamaged folder was refused: {error}")
                    expected[target] = contents(folder)
                    shutil.rmtree(folder)
                    shutil.copytree(scratch / (base or "whole"), folder)
                before = (folder / target).read_bytes()
                while (after := damage(before, rng)) == before:
                    pass
                (folder / target).write_bytes(after)
                outcome = judge(target, command(words), folder, expected[target])
                shutil.rmtree(folder)
            counts[target, outcome.split(":")[0]] += 1
            if outcome.startswith("WRONG"):
                wrong += 1
                say(f"file {i}, {target}: {outcome}")
    for (target, outcome), count in sorted(counts.items()):
        say(f"{target:<16} {outcome:<20} {count}")
    say(f"{files} damaged files, {wrong} wrongly taken")
    return wrong


def load(path: Path, original: data.ImageData) -> str:
    """Judge what `data.load` makes of a damaged npz."""
    try:
        images = data.load(path)
    except data.DataError as error:
        return "refused" if str(error).count("\n") == 0 else f"WRONG: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    same = np.array_equal(images.images, original.images)
    return "no change" if same and np.array_equal(images.labels, original.labels) else "WRONG: read"


def judge(target: str, result: tuple, folder: Path, expected: dict[str, str]) -> str:
    """Judge what a command made of a damaged folder."""
    status, out, error = result
    if status == 2 and error.count("\n") == 0 and error.startswith("reproduce.py: error: "):
        return "refused"
    if status == 1 and any(
        line.startswith("WRONG") and target in line for line in out.splitlines()
    ):
        return "found by verify"
    if status == 0 and contents(folder) == expected:
        return "no change"
    return f"WRONG: status {status}, {error[-300:]!r}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(check(options.files, options.seed) > 0)
