"""Measure what the code costs beside the textbook's way; ratios only, as machines drift.

    python tests/benchmark.py [ROW ...] [--precision fp32] [--pairs 5] [--json FILE]

Every row is the median of alternating pairs, with its lowest and highest; `ours` and `theirs` are
the medians of their seconds. Some minutes; `step predict metrics` take one or two.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score, roc_curve
from torch.nn import functional
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import hyperband
import metrics
import model
import reproduce

HERE = Path(__file__).resolve().parents[1]


def synchronize() -> None:
    """Wait for what a GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def random_images(n: int, size: int = 28, classes: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (n, size, size)).astype(np.uint8), rng.randint(0, classes, n)


class Bench:
    """Times pairs, and keeps a row of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows, self.pairs, self.images = [], options.pairs, options.images
        self.device = model.resolve_device("auto")
        self.precision = model.resolve_precision(options.precision, self.device)

    def pair(self, name, ours, theirs, *, target="") -> None:
        """Measure how many times longer `theirs` takes."""
        times = [(timed(ours), timed(theirs)) for _ in range(self.pairs)]
        ratios = [b / a for a, b in times]
        self.add(name, *(statistics.median(t) for t in zip(*times, strict=True)), ratios, target)

    def add(self, name, ours, theirs, ratios, target) -> None:
        spread = (min(ratios), statistics.median(ratios), max(ratios)) if ratios else ("", "", "")
        self.rows.append((name, ours, theirs, *spread, target))
        shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in self.rows[-1][1:])
        print(f"{name:<58}" + "".join(f"{x:>11}" for x in shown), flush=True)


# ------------------------------------------------------------------------------- the textbook


def textbook(device: torch.device, precision: str):
    """Give network, optimizer, autocast as a tutorial has them."""
    network = model.build({}).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.025, momentum=0.8, nesterov=True, weight_decay=0.004
    )
    autocast = torch.autocast(
        device.type,
        getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "half")),
        enabled=precision != "fp32",
    )
    return network, optimizer, autocast


def textbook_loader(images, labels, *, shuffle: bool) -> DataLoader:
    pairs = [
        (torch.tensor(x)[None].float() / 255, int(y)) for x, y in zip(images, labels, strict=True)
    ]
    return DataLoader(pairs, batch_size=128, shuffle=shuffle)


def textbook_epoch(parts, loader, device) -> float:
    network, optimizer, autocast = parts
    network.train()
    total = 0.0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        with autocast:
            loss = functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


def textbook_logits(parts, loader, device) -> torch.Tensor:
    network = parts[0].eval()
    with torch.no_grad():
        return torch.cat([network(x.to(device)).cpu() for x, _ in loader])


class Textbook:
    """The textbook's loop in a process of its own, as its user would run it.

    Beside ours it would gain by what ours leaves behind: the heap that a compiler has grown spares
    it thousands of page faults a step, a fifth of its time.
    """

    def __init__(self, bench: "Bench", n: int, valid: int = 0) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        words = theirs, n, valid, str(bench.device), bench.precision, torch.get_num_threads()
        spawn.Process(target=serve_textbook, args=words, daemon=True).start()
        self.seconds()

    def seconds(self) -> float:
        """Time an epoch, and validation."""
        self.pipe.send(True)
        return self.pipe.recv()


def serve_textbook(pipe, n: int, valid: int, device: str, precision: str, threads: int) -> None:
    """Run and time an epoch whenever told to."""
    torch.set_num_threads(threads)
    device = torch.device(device)
    parts = textbook(device, precision)
    loader = textbook_loader(*random_images(n), shuffle=True)
    valid_loader = textbook_loader(*random_images(valid), shuffle=False) if valid else []

    def both():
        textbook_epoch(parts, loader, device)
        if valid:
            textbook_logits(parts, valid_loader, device)

    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(timed(both))


def bare_convolutions(device, precision):
    """Give a call that runs the eight convolutions forward and backward, and nothing else."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    last = {"device": device, "dtype": dtype}
    layers, size, inputs = [], 28, 1
    for i, outputs in enumerate((8, 8, 8, 16, 16, 32, 64, 128)):
        tensors = [(128, inputs, size, size), (outputs, inputs, 3, 3), (128, outputs, size, size)]
        x, w, g = (
            torch.randn(shape, **last).to(memory_format=torch.channels_last) for shape in tensors
        )
        b = torch.randn(outputs, **last).requires_grad_()
        wanted = [w.requires_grad_(), b] + ([x.requires_grad_()] if i else [])
        layers.append((x, w, b, g, wanted))
        size, inputs = (size // 2 if i in (3, 5, 6) else size), outputs

    def run(steps):
        for _ in range(steps):
            for x, w, b, g, wanted in layers:
                torch.autograd.grad(functional.conv2d(x, w, b, padding=1), wanted, g)

    return run


# ---------------------------------------------------------------------------------------- rows


class Stepper:
    """Runs `fit` on and on, `steps` training steps at a call, so that a step can be timed."""

    def __init__(self, device, precision, compile, batches) -> None:
        x, y = random_images(128 * batches)
        self.parts, self.batches = (x, y, x[:2], y[:2]), batches
        self.options = {"device": str(device), "precision": precision, "compile": compile}

    def seconds(self, profiler: contextlib.AbstractContextManager | None = None) -> float:
        """Time a step: all of an epoch but its first two."""
        profiler, stamps = profiler or contextlib.nullcontext(), []

        def on_batch(_, done):
            if done == 256:
                profiler.__enter__()
            if done in (256, 128 * self.batches):
                synchronize()
                stamps.append(time.perf_counter())
            if done == 128 * self.batches:
                profiler.__exit__(None, None, None)

        h = model.Hyperparameters(epochs=1)
        model.fit(model.build({}), *self.parts, h, on_batch=on_batch, **self.options)
        return (stamps[1] - stamps[0]) / (self.batches - 2)

    def kernel_seconds(self) -> float:
        """Add up what the kernels of a step take, or on a CPU PyTorch's operators."""
        kinds = torch.profiler.ProfilerActivity
        on_gpu = self.options["device"].startswith("cuda")
        profiler = torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU])
        self.seconds(profiler)
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
        total = sum(getattr(event, name) for event in profiler.key_averages())
        return total / 1e6 / (self.batches - 2)


def step(bench: Bench) -> None:
    batches = 10 if bench.device.type == "cpu" else 500
    theirs = Textbook(bench, 128 * batches)
    bare = bare_convolutions(bench.device, bench.precision)
    for mode in ("off", "on"):
        ours = Stepper(bench.device, bench.precision, mode, batches)
        ours.seconds(), bare(2)  # warmed up
        rounds = [
            (
                ours.seconds(),
                theirs.seconds() / batches,
                timed(lambda: bare(batches)) / batches,
            )
            for _ in range(bench.pairs)
        ]
        a, b, c = (statistics.median(column) for column in zip(*rounds, strict=True))
        name = f"training step, {bench.precision}, compile {mode}"
        textbooks, bares = [r[1] / r[0] for r in rounds], [r[0] / r[2] for r in rounds]
        goals = (">= 1.6", "<= 1.2") if mode == "on" else ("", "")
        bench.add(f"{name}: textbook / ours", a, b, textbooks, goals[0])
        bench.add(f"{name}: ours / bare convolutions", a, c, bares, goals[1])
        a, b = ours.seconds(), ours.kernel_seconds()
        bench.add(f"{name}: ours / sum of its kernels", a, b, [a / b], "")


def epoch(bench: Bench) -> None:
    textbook = Textbook(bench, 20_000, 5_000)
    seconds, h = [], model.Hyperparameters(epochs=bench.pairs)
    model.fit(
        model.build({}),
        *random_images(20_000),
        *random_images(5_000),
        h,
        precision=bench.precision,
        compile="on",
        on_epoch=lambda record: seconds.append((record.seconds, textbook.seconds())),
    )
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    name = f"epoch of 20,000 + 5,000, {bench.precision}, compiled: textbook / ours"
    bench.add(name, ours, theirs, [b / a for a, b in seconds], "")


def predict(bench: Bench) -> None:
    x, y = random_images(bench.images)
    parts, network = textbook(bench.device, "fp32"), model.build({})
    loader = textbook_loader(x, y, shuffle=False)
    ours, theirs = [], []
    bench.pair(
        f"prediction, {bench.images:,} images, fp32: textbook / ours",
        lambda: ours.append(model.predict(network, x)),
        lambda: theirs.append(textbook_logits(parts, loader, bench.device)),
        target=">= 2",
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-4)


def search(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "random.npz")
        x, y = random_images(1000, size=16)
        parts = {"train": slice(600), "val": slice(600, 750), "test": slice(750, None)}
        arrays = {f"{k}_images": x[v] for k, v in parts.items()}
        arrays |= {f"{k}_labels": y[v][:, None] for k, v in parts.items()}
        np.savez(source, **arrays)

        def tune(*words):
            def call():
                command = [sys.executable, HERE / "reproduce.py", "--stage", "tune", "--overwrite"]
                command += ["--data", source, "--results", Path(folder, "-".join(words)), *words]
                subprocess.run(command, check=True, capture_output=True)

            return call

        cores = reproduce.count_workers(argparse.Namespace(workers=None, device="cpu"))
        calls = (
            tune("--workers", str(cores)),
            tune("--workers", "1"),
            tune("--workers", "1", "--retrain"),
        )
        times = [[timed(call) for call in calls] for _ in range(bench.pairs)]
        a, b, c = (statistics.median(column) for column in zip(*times, strict=True))
        name = "poster's search on 750 images of 16x16"
        bench.add(f"{name}: 1 worker / {cores}", a, b, [t[1] / t[0] for t in times], ">= 1.3")
        bench.add(f"{name}: retraining / continuing", b, c, [t[2] / t[1] for t in times], "")
    for retrain in (False, True):
        epochs = hyperband.total_resource(hyperband.POSTER_BRACKET, retrain)
        bench.add(f"its epochs, {'re' if retrain else 'continued '}trained", epochs, "", [], "")

    def bookkeeping():
        with tempfile.TemporaryDirectory() as folder:
            hyperband.search(
                lambda *_: 1.0,
                reproduce.SPACE,
                [[hyperband.Rung(1000, 1)]],
                log=Path(folder, "log"),
                folder=Path(folder, "trials"),
            )

    took = statistics.median(timed(bookkeeping) for _ in range(bench.pairs))
    bench.add("bookkeeping a trial, 1,000 trials", took / 1000, "", [], "<= 0.001")


def metric(bench: Bench) -> None:
    rng = np.random.RandomState(0)
    labels, logits = rng.randint(0, 8, 50_000), rng.randn(50_000, 8).astype(np.float32)
    logits[np.arange(50_000), labels] += 1
    predicted = logits.argmax(1)
    about = {
        "name": "random",
        "md5": None,
        "split": "poster",
        "sizes": [0, 0, 50_000],
        "class_names": [str(k) for k in range(8)],
    }

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            metrics.write_predictions(
                path / "predictions.csv", np.arange(50_000), labels, predicted, logits
            )
            reproduce.write_metrics(path, path, about)

    def theirs():
        for k in range(8):
            for score in (f1_score, precision_score, recall_score):
                score(labels == k, predicted == k)
            roc_curve(labels == k, logits[:, k])
            roc_auc_score(labels == k, logits[:, k])

    bench.pair(
        "metrics and CSVs, 50,000 x 8; scikit-learn's figures alone",
        ours,
        theirs,
        target="ours < 2 s",
    )
    matrix = metrics.confusion(labels, predicted, 8)

    def resampled():
        for _ in range(100):
            chosen = rng.randint(0, 50_000, 50_000)
            metrics.summary(labels[chosen], predicted[chosen], 8)

    bench.pair(
        "10,000 bootstrap replicates; 100 by resampled labels",
        lambda: metrics.bootstrap_intervals(matrix),
        resampled,
        target="ours < 1 s",
    )


def gpu(bench: Bench) -> None:
    """Train as the poster did, on random images: on a GPU alone, else it takes an hour."""
    if bench.device.type == "cuda":
        parts = (*random_images(120_000), *random_images(30_000))
        took = timed(lambda: model.fit(model.build({}), *parts, precision=bench.precision))
        bench.add("the poster's 100 epochs of 120,000 + 30,000", took, "", [], "< 60 s")


def memory(bench: Bench) -> None:
    """Read 200,000 images and train on a few steps of 120,000 of them, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        x, y = random_images(200_000)
        parts = {
            "train": slice(120_000),
            "val": slice(120_000, 150_000),
            "test": slice(150_000, None),
        }
        arrays = {f"{k}_images": x[v] for k, v in parts.items()}
        arrays |= {f"{k}_labels": y[v][:, None] for k, v in parts.items()}
        np.savez(Path(folder, "random.npz"), **arrays)
        command = [sys.executable, __file__, "--poster-scale", str(Path(folder, "random.npz"))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = map(float, done.stdout.split())
    bench.add("reading 200,000 images from npz to the device", seconds, "", [], "")
    bench.add("peak resident memory of that and training on, GB", peak, "", [], "< 1.2")


def poster_scale(path: str) -> None:
    started = time.perf_counter()
    images = data.load(path)
    split = data.poster_split(len(images.labels))
    train, valid = ((images.images[i], images.labels[i]) for i in (split.train, split.valid))
    torch.as_tensor(train[0]).to(model.resolve_device())
    seconds = time.perf_counter() - started

    class Enough(Exception):  # noqa: N818 - no error
        pass

    def stop(_, done):
        if done > 128 * 10:
            raise Enough

    with contextlib.suppress(Enough):
        model.fit(model.build({}), *train, *valid, model.POSTER, on_batch=stop)
    model.predict(model.build({}), images.images[split.test[:5000]])
    # Not getrusage's: that has the peak of the process that started this one in it.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    print(seconds, int(peak) * 1024 / 1e9)


ROWS = {
    "step": step,
    "epoch": epoch,
    "predict": predict,
    "search": search,
    "metrics": metric,
    "memory": memory,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; default: all")
    parser.add_argument("--precision", choices=model.PRECISIONS, default="auto")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="1 where other programs keep the cores busy")
    parser.add_argument("--images", type=int, default=50_000, help="of prediction")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--poster-scale", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.poster_scale:
        poster_scale(options.poster_scale)
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    bench = Bench(options)
    header = ("ours, s", "theirs, s", "lowest", "median", "highest", "target")
    print(f"{'':<58}" + "".join(f"{x:>11}" for x in header))
    for name in options.rows or ROWS:
        ROWS[name](bench)
    if options.json:
        keys = ("row", "ours", "theirs", "lowest", "median", "highest", "target")
        content = {
            "environment": model.environment(),
            "precision": bench.precision,
            "rows": [dict(zip(keys, row, strict=True)) for row in bench.rows],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
