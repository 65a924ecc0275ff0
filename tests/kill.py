"""Kill runs with SIGKILL at random moments, start them again, and compare what they leave.

    python tests/kill.py --kills 200 --seed 0

Each round runs ``reproduce.py --stage all`` on a tiny data set: forked, killed after a random time,
or at a random step of the file protocol (before or after a temporary file is moved into place),
and started again until it ends. Its files must then be those of a run that was never killed, wall
times aside. Every fourth round is a download instead. Not on Windows.
"""

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import random
import re
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
        if name == "history.csv":
            text = "\n".join(line.rpartition(",")[0] for line in text.split("\n"))
        elif name == "tuning.jsonl":
            text = re.sub(r'"seconds": [^,]+,|"crc32": "\w+"', "", text)
        elif name == "run.json":
            record = json.loads(text)
            del record["check"]
            for stage in set(record) - {"data"}:
                del record[stage]["result"]["seconds"]
                record[stage]["result"].pop("images_per_second", None)
                for timed in ("history.csv", "tuning.jsonl"):
                    record[stage]["files"].pop(timed, None)
            text = json.dumps(record)
        read[name] = text
    return read


def run(call, kill_after: float | None = None, kill_at_move: int | None = None) -> int | None:
    """Fork and `call`; return its exit status, or None where it was killed."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        moves, move = 0, os.replace

        def counted(*arguments, **options):
            nonlocal moves
            moves += 1
            if moves == kill_at_move:
                if random.random() < 0.5:
                    move(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return move(*arguments, **options)

        os.replace = counted
        Path.replace = lambda self, target: (counted(self, target), Path(target))[1]
        status = 99
        with contextlib.suppress(BaseException):
            status = call()
        os._exit(status)
    if kill_after is not None:
        threading.Timer(kill_after, lambda: kill_if_there(child)).start()
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


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
        if run(lambda: command(whole)) != 0:
            raise SystemExit("the run without kills failed")
        expected, takes = contents(whole), time.monotonic() - started
        while done < kills:
            rounds += 1
            folder = Path(scratch, f"round-{rounds}")
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
                after = rng.uniform(0, min(takes, 3.0 * workers)) if rng.random() < 0.6 else None
                at_move = None if after else rng.randint(1, 12)
                status = run(call, after, at_move)
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
