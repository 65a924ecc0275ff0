"""Kill runs with SIGKILL at random moments, start them again, and compare what they leave.

    python tests/kill.py --kills 200 --seed 0

Each round runs ``reproduce.py --stage all`` on a tiny data set: forked, killed after a random time,
or just before or after a random temporary file is moved into place, and started again until it
ends. Its files must then be those of a run that was never killed, wall times aside. Every second
round starts from a finished folder, every fourth is a download instead. Not on Windows.
"""

import argparse
import contextlib
import hashlib
import http.server
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import reproduce


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
    """Read every file of a results folder, wall times and what follows from them removed."""
    read = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        text = path.read_bytes().decode("latin-1")
        if path.name == "history.csv":
            text = "\n".join(line.rpartition(",")[0] for line in text.split("\n"))
        elif path.name == "tuning.jsonl":
            text = re.sub(r'"seconds": [^,]+,|"crc32": "\w+"', "", text)
        elif path.name == "report.md":
            text = re.sub(r"\| (computing time|git commit) .*", "", text)
        elif path.name == "run.json":
            record = json.loads(text)
            del record["check"]
            for entry in (record[stage] for stage in record if stage != "data"):
                for timed in ("seconds", "images_per_second"):
                    entry.get("result", {}).pop(timed, None)
                for timed in ("history.csv", "tuning.jsonl", "report.md"):
                    entry.get("files", {}).pop(timed, None)
                entry.get("environment", {}).pop("git_commit", None)  # somebody may commit
            text = json.dumps(record)
        read[name] = text
    return read


def run(call, kill_after: float | None = None, kill_at: tuple[int, bool] | None = None):
    """Fork and `call`; return its exit status, or None where it was killed, and its moves.

    It is killed after some seconds, or at its n-th move of a temporary file: before or after it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        reproduce.drawable = lambda: False  # figures take longer than all the rest of a round
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        move = os.replace

        def counted(*arguments, **options):
            os.write(writing, b".")
            counted.moves += 1
            if kill_at == (counted.moves, False):
                os.kill(os.getpid(), signal.SIGKILL)
            move(*arguments, **options)
            if kill_at == (counted.moves, True):
                os.kill(os.getpid(), signal.SIGKILL)

        counted.moves = 0
        os.replace = counted  # Path.replace calls it
        status = 99
        with contextlib.suppress(BaseException):
            status = call()
        os._exit(status)
    os.close(writing)
    if kill_after is not None:
        timer = threading.Timer(kill_after, kill_if_there, (child,))
        timer.start()
    with os.fdopen(reading, "rb") as pipe:
        moves = len(pipe.read())  # until the child's end, and its descendants'
    _, status = os.waitpid(child, 0)
    if kill_after is not None:
        timer.cancel()
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), moves


def kill_if_there(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Serves `content` with Range requests, slowly enough to be killed in between."""

    content = b""

    def do_GET(self):
        whole = type(self).content
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(start, len(whole), 1 << 20):
                self.wfile.write(whole[i : i + (1 << 20)])
                time.sleep(0.02)

    def log_message(self, *_):
        pass


def check(kills: int, seed: int, workers: int = 1, say=print) -> int:
    """Kill at least `kills` runs; return how many rounds ended with a difference."""
    rng = random.Random(seed)
    done = rounds = different = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    SlowServer.content = np.random.RandomState(seed).bytes(20 << 20)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    md5 = hashlib.md5(SlowServer.content).hexdigest()
    remote = data.RemoteFile(
        f"http://127.0.0.1:{server.server_port}/x", len(SlowServer.content), md5
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_tiny(Path(scratch, "tiny.npz"))

        def command(folder: Path):
            words = ["--data", f"{scratch}/tiny.npz", "--results", str(folder), "--epochs", "12"]
            words += ["--schedule", "hyperband", "--max-resource", "9", "--workers", str(workers)]
            return reproduce.main(words)

        started = time.monotonic()
        whole = Path(scratch, "whole")
        status, moves = run(lambda: command(whole))
        if status != 0:
            raise SystemExit("the run without kills failed")
        expected, takes = contents(whole), time.monotonic() - started
        while done < kills:
            rounds += 1
            folder = Path(scratch, f"round-{rounds}")
            if rounds % 2:  # a finished run, which is cleared and done again
                shutil.copytree(whole, folder)
            if rounds % 4 == 0:
                target, expects, found = folder / "x", SlowServer.content, None

                def call(target=target):
                    data.download(remote, target)
                    return 0
            else:
                target, expects, found = folder, expected, None

                def call(target=target):
                    return command(target)

            while True:
                if rng.random() < 0.5:
                    status, _ = run(call, kill_after=rng.uniform(0, takes))
                else:
                    status, _ = run(call, kill_at=(rng.randint(1, moves), rng.random() < 0.5))
                if status is None:
                    done += 1
                    continue
                if status == 0:
                    found = contents(folder) if target is folder else target.read_bytes()
                break
            if found != expects:
                different += 1
                say(f"round {rounds}: status {status}, files differ: {difference(expects, found)}")
            elif rounds % 10 == 0:
                say(f"{done} kills, {rounds} rounds, {different} with a difference")
    server.shutdown()
    server.server_close()
    say(f"{done} kills, {rounds} rounds, {different} with a difference")
    return different


def difference(expected, found) -> list[str]:
    """Name the files that differ."""
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return ["the download"]
    return sorted(k for k in {**expected, **found} if expected.get(k) != found.get(k))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes of the search")
    options = parser.parse_args()
    sys.exit(check(options.kills, options.seed, options.workers) > 0)
