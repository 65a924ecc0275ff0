"""Measure this suite's speed beside the plain way to do the same; print the README's table.

    python tests/benchmark.py [ROW ...] [--precision fp32] [--pairs 5]

Machines drift, so only ratios count: ours and theirs take turns, a row has the medians of the times
and of the ratios. Where compiling fails, a warning on stderr says that a row was not compiled.
"""

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from timeit import timeit

import joblib
import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import model
import reproduce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
timed = partial(timeit, number=1)


def pair(options, *calls):
    """Time two or more calls in turn: seconds (calls, pairs)."""
    return np.array([[timed(call) for call in calls] for _ in range(options.pairs)]).T


def print_row(what, ours, theirs, inverse=False):
    """Print a row, of seconds (pairs,); the ratio is theirs / ours, or ours / theirs."""
    ratios = ours / theirs if inverse else theirs / ours
    ratio = f"{np.median(ratios):.4g} ({ratios.min():.4g} to {ratios.max():.4g})"
    print(f"| {what} | {np.median(ours):.4g} | {np.median(theirs):.4g} | {ratio} |", flush=True)


def random_images(n, size=28):
    # Noise of 43 greys compresses to two thirds, as TissueMNIST does.
    return np.random.RandomState(0).randint(0, 43, (n, size, size), np.uint8), np.arange(n) % 8


def save_random(path, n, size=28):
    images, labels = random_images(n, size)
    arrays, parts = {}, np.split(np.arange(n), [n * 7 // 10, n * 8 // 10])
    for name, index in zip(data.PARTS, parts, strict=True):
        arrays |= {f"{name}_images": images[index], f"{name}_labels": labels[index]}
    np.savez_compressed(path, **arrays)


def elsewhere(function, *arguments):
    # In a process of its own, as its user would run it: in ours the textbook would gain a fifth by
    # the heap that a compiler has grown, which spares it thousands of page faults per step.
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    return lambda: process.submit(function, *arguments).result()


@cache
def textbook(device, precision):
    """Return data, network and what trains it, as a tutorial has them."""
    images, labels = random_images(50_000)
    images = torch.from_numpy(images)[:, None].float() / 255
    network = model.build({}).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, 0.8, weight_decay=0.004, nesterov=True)
    autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return list(zip(images, labels.tolist(), strict=True)), network, optimizer, autocast, scaler


def textbook_epoch(device, precision, num_train, num_valid):
    """Train, and then return the logits of validation images, one tensor per batch."""
    pairs, network, optimizer, autocast, scaler = textbook(device, precision)
    network.train()
    for x, y in DataLoader(pairs[:num_train], batch_size=128, shuffle=num_train > 0):
        optimizer.zero_grad()
        with autocast:
            loss = torch.nn.functional.cross_entropy(network(x.to(device)), y.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # to be printed
    network.eval()
    with torch.no_grad(), autocast:
        return [network(x.to(device)).cpu() for x, _ in DataLoader(pairs[:num_valid], 128)]


def convolutions(options, steps):
    """Return a function that runs the convolutions forward and backward, and nothing else."""
    like = {"dtype": DTYPES[options.precision], "memory_format": torch.channels_last}
    layers, x = [], torch.randn(128, 1, 28, 28).to(options.device, **like)
    for layer in model.build({}).to(options.device, **like).features:
        if isinstance(layer, torch.nn.Conv2d):
            inputs = [x.requires_grad_()] if layers else []  # the images themselves need none
            layers.append((layer, x, [*layer.parameters(), *inputs]))
        x = layer(x).detach()

    def run():
        for layer, x, inputs in layers * steps:
            y = layer(x)
            torch.autograd.grad(y, inputs, y)
        y.sum().item()  # waits for a GPU

    return run


def train(options, compile, num_train, num_valid, *others):
    """Time our epochs, after each the textbook's, and the others: seconds (2 + others, pairs)."""
    theirs = elsewhere(textbook_epoch, options.device, options.precision, num_train, num_valid)
    times = []
    model.fit(
        model.build({}),
        *(*random_images(num_train), *random_images(num_valid)),
        model.Hyperparameters(epochs=options.pairs + 1),
        precision=options.precision,
        compile=compile,
        on_epoch=lambda epoch: times.append([epoch.seconds, *map(timed, (theirs, *others))]),
    )
    return np.array(times[1:]).T  # in the first all warm up


def step(options):
    steps = 390 if options.device.type == "cuda" else 100  # an epoch; a validation comes on top
    what, alone = "training step of 128 images: ", convolutions(options, steps)
    times = train(options, "on", 128 * steps, 2, alone) / steps
    print_row(what + "textbook / ours, compiled", *times[:2])
    print_row(what + "ours, compiled / convolutions", *times[::2], inverse=True)
    times = train(options, "off", 128 * steps, 2) / steps
    print_row(what + "textbook / ours, not compiled", *times)


def epoch(options):
    what = "epoch of 20,000 + 5,000 images: textbook / ours, compiled"
    print_row(what, *train(options, "on", 20_000, 5_000))


def predict(options):
    network, (x, _) = model.build({}), random_images(50_000)
    theirs = elsewhere(textbook_epoch, options.device, "fp32", 0, len(x))
    torch.testing.assert_close(model.predict(network, x), torch.cat(theirs()), rtol=1e-3, atol=1e-4)
    times = pair(options, lambda: model.predict(network, x), theirs)
    print_row("prediction of 50,000 images in fp32: textbook / ours", *times)


def search(options):
    cores = joblib.cpu_count()  # of a container's, those it may use
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder, "random.npz"), 300, size=16)
        command = [sys.executable, reproduce.__file__, "--stage", "tune", "--device", "cpu"]
        command += ["--data", "random.npz", "--results", "run", "--workers"]

        def tune(*words):
            subprocess.run([*command, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(Path(folder, "run"))  # a finished search is not done again

        calls = [partial(tune, str(cores)), partial(tune, "1"), partial(tune, "1", "--retrain")]
        ours, one, again = pair(options, *calls)
    what = "the poster's search on 300 images of 16x16: "
    print_row(f"{what}one worker / {cores}", ours, one)
    print_row(what + "retraining (162 epochs) / continuing (117)", one, again)


def peak_memory(path):
    status = Path("/proc/self/status")  # Linux; getrusage's peak has the parent process's in it
    before, images = status.read_text(), data.load(path)
    low, high = (int(text.split("VmHWM:")[1].split()[0]) for text in (before, status.read_text()))
    return (high - low) * 1024 / images.images.nbytes


def load(options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.npz")
        save_random(path, 236_386)
        times = pair(options, lambda: data.load(path), lambda: dict(np.load(path)))
        peak = elsewhere(peak_memory, path)()
    what = f"loading an npz like TissueMNIST's, at most {peak:.3g} times the images: ours / np.load"
    print_row(what, *times, inverse=True)


def gpu(options):
    if options.device.type == "cuda":  # two CPU cores take an hour
        images = *random_images(120_000), *random_images(30_000)
        took = timed(lambda: model.fit(model.build({}), *images, precision=options.precision))
        print(f"| the poster's 100 epochs of 120,000 + 30,000 | {took:.4g} |  |  |")


ROWS = {
    "step": step,
    "epoch": epoch,
    "predict": predict,
    "search": search,
    "data": load,
    "gpu": gpu,
}


def parse(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    # Not by `choices`: Python 3.11 looks for the empty list of no ROW in them.
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--precision", choices=model.PRECISIONS, default="auto")
    number = partial(reproduce.whole_number, 1)
    parser.add_argument("--pairs", type=number, default=5, help="default: 5", metavar="N")
    options = parser.parse_args(argv)
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"no row {name!r}: choose from {', '.join(ROWS)}")
    return options


def main():
    options = parse(None)
    options.device = model.resolve_device()
    options.precision = model.resolve_precision(options.precision, options.device)
    where = [f"{key.replace('_', ' ')} {value}" for key, value in model.environment().items()]
    what = f"Medians of {options.pairs} pairs, in {options.precision} on random images"
    print(f"{what}, with {joblib.cpu_count()} CPU cores; {', '.join(where)}.")
    print("\n| what | ours, s | theirs, s | ratio (median, lowest to highest) |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name in options.rows or ROWS:
        ROWS[name](options)


if __name__ == "__main__":
    main()
