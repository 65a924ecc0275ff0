"""The poster's CNN, NephNet2D, and the mixed-precision loop that trains and applies them.

``python model.py`` prints the layers; ``python model.py apply MODEL.pt IMAGES.npz OUT.csv`` applies
a saved network to images. In code, with PyTorch 2.11 or newer::

    network = PosterCNN(num_classes=8)
    history = fit(network, train_images, train_labels, valid_images, valid_labels, POSTER)
    logits = predict(network, test_images)  # (N, 8) float32

Everywhere, `network` is a PosterCNN or a NephNet2D, which is moved to `device`; images are arrays,
uint8, (N, H, W) for a network of one channel, else (N, H, W, C); labels are N integers from 0 to
num_classes - 1; `device` and `precision` are as for `resolve_device` and `resolve_precision`.
Images, labels and hyperparameters that do not fit or are out of range raise a ModelError of one
line. PyTorch's global random state plays no part; the CPU's and `device`'s is left as it was.

Sources: W. Deng and K. Zhu, "Medical Image Classification Model Based on CNN" (poster, BUPT, 2022)
and the settings in their public repository dw-dengwei/PML_coursework; NephNet2D: A. Woloshuk et
al., Cytometry A 99(7):707-721, 2021, and the public code awoloshuk/NephNet.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import os
import secrets
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


class ModelError(ValueError):
    """Something given cannot be used, a file cannot be read, or the training diverged."""


class CheckpointError(ModelError):
    """A training checkpoint cannot be read, or is of another run."""


@contextlib.contextmanager
def _refusing(what: str, kind: type[ModelError] = ModelError) -> Iterator[None]:
    """Make any error one line of ours: nobody lists those of damaged files or missing devices."""
    try:
        yield
    except FileNotFoundError:  # tells enough
        raise
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise kind(f"{what} ({why})") from None


@dataclass(frozen=True)
class Hyperparameters:
    """How a network is sized and trained; the defaults are the poster's printed values."""

    num_features: int = 8  # width of the first convolution, at least 1
    batch_size: int = 128  # images a step, at least 1
    learning_rate: float = 0.025  # the initial one, above 0
    weight_decay: float = 0.004  # L2 penalty of every parameter, at least 0
    momentum: float = 0.8  # in [0, 1)
    nesterov: bool = True  # its Nesterov form; not printed, the authors' setting
    dropout: float = 0.5  # share of the hidden layer's outputs dropped, in [0, 1)
    patience: int = 5  # epochs without a better validation loss that the rate survives, at least 0
    factor: float = 0.29  # what the rate is multiplied by then, in (0, 1)
    epochs: int = 100  # at least 1; not printed, the axis of the curves

    def __post_init__(self) -> None:
        for name, least in {"num_features": 1, "batch_size": 1, "patience": 0, "epochs": 1}.items():
            if type(value := getattr(self, name)) is not int or value < least:
                raise ModelError(f"{name} must be an integer of at least {least}, not {value!r}")
        in_range = {
            "learning_rate": 0 < self.learning_rate <= sys.float_info.max,
            "weight_decay": 0 <= self.weight_decay <= sys.float_info.max,
            "momentum": 0 <= self.momentum < 1,
            "nesterov": self.momentum > 0 or not self.nesterov,
            "dropout": 0 <= self.dropout < 1,
            "factor": 0 < self.factor < 1,
        }
        for name, holds in in_range.items():
            if not holds:
                raise ModelError(f"{name} {getattr(self, name)} is out of its range")


POSTER = Hyperparameters()
# The 16 digits of the authors' own run; the poster prints 0.025 and 0.004.
AUTHORS = replace(POSTER, learning_rate=0.025336627337952815, weight_decay=0.0046684446208345)

# ---- networks ------------------------------------------------------------------------------------


class PosterCNN(nn.Module):
    """The poster's network: eight convolutions f, f, f, 2f, 2f, 4f, 8f, 16f, two dense layers.

    `num_features` is f. `num_classes` is at least 2, `in_channels` 1 for gray images and 3 for RGB,
    `image_size` height and width in pixels, at least 8; `dropout`, in [0, 1), is the share of the
    hidden layer's outputs dropped while training. By default there are 250,904 parameters. The
    hidden dense layer and its dropout are the authors' code's, the figure leaves them out; weights
    are initialised by PyTorch's defaults, as theirs were.
    """

    widths = (1, 1, 1, 2, 2, 4, 8, 16)  # of the 3x3 convolutions, in num_features
    pooled = (4, 6, 7)  # those, counted from 1, that 2x2 average pooling follows

    def __init__(self, num_features=8, num_classes=8, in_channels=1, image_size=28, dropout=0.5):
        super().__init__()
        self.config = {  # what `build` takes
            "network": type(self).__name__,
            "num_features": num_features,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "dropout": dropout,
        }
        if image_size < 8:
            raise ModelError(f"images must be at least 8x8 pixels, not {image_size}x{image_size}")
        layers, channels = [], in_channels
        for i, width in enumerate(self.widths, 1):
            inputs, channels = channels, width * num_features
            layers.append(nn.Conv2d(inputs, channels, 3, padding=1))  # (B, channels, H, W)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if i in self.pooled:
                layers.append(nn.AvgPool2d(2))  # (B, channels, H // 2, W // 2)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (B, 16f * (H // 8) * (W // 8))
            nn.Linear(channels * (image_size // 8) ** 2, 16 * num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(16 * num_features, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) float in [0, 1]
        """Return a batch's logits."""
        return self.classifier(self.features(images))  # (B, num_classes) logits


class NephNet2D(PosterCNN):
    """The network that the poster's is based on: five convolutions f, 2f, 4f, 8f, 16f.

    Weights are Kaiming-normal and biases standard normal, as in its public code, which takes 64x64
    images. The rest is `PosterCNN`'s.
    """

    widths = (1, 2, 4, 8, 16)
    pooled = (2, 3, 4)

    def __init__(self, num_features=32, num_classes=8, in_channels=1, image_size=28, dropout=0.5):
        super().__init__(num_features, num_classes, in_channels, image_size, dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias)


NETWORKS = {"PosterCNN": PosterCNN, "NephNet2D": NephNet2D}


def build(config: dict[str, Any], seed: int = 0) -> PosterCNN:
    """Build the network that `config` (a network's ``.config``) tells of, initialised by `seed`."""
    arguments = {"network": "PosterCNN", **config}
    with _refusing("no such network can be built"), _seeded(seed, torch.device("cpu")):
        return NETWORKS[arguments.pop("network")](**arguments)


@torch.inference_mode()
def layer_table(network) -> list[tuple[str, tuple[int, ...], int, int]]:
    """List (layer, output shape without the batch, parameters, multiply-accumulates an image)."""
    size, rows, copied = network.config["image_size"], [], copy.deepcopy(network).cpu().eval()
    outputs = torch.zeros(1, network.config["in_channels"], size, size)
    for layer in [*copied.features, *copied.classifier]:
        outputs = layer(outputs)  # (1, C, H, W), then (1, features)
        parameters = sum(p.numel() for p in layer.parameters())
        weights = layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        macs = weights * outputs[0, 0].numel()
        rows.append((type(layer).__name__, tuple(outputs.shape[1:]), parameters, macs))
    return rows


# ---- device, precision, data ---------------------------------------------------------------------


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device meant; ``auto`` is the first CUDA GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _refusing(f"no device {str(device)!r} here"):
        device = torch.device(device)
        torch.empty(1, device=device)
    return device


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *_DTYPES)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``.

    ``auto`` is what pays on the hardware: fp16 on CUDA (the poster's Apex O1), bf16 on a CPU with
    instructions for it, else fp32: a CPU that has to emulate bf16 is ten times slower with it.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp16"
    has = torch.cpu.get_capabilities()
    return "bf16" if any(has.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    # Without the cache of cast weights: inside a caller's autocast it would outlive a step.
    return torch.autocast(device.type, _DTYPES[precision], precision != "fp32", cache_enabled=False)


# Held while PyTorch's global random state is borrowed: threads would draw from each other's.
_RANDOM = threading.RLock()


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch, and put the random state of the CPU and of `device` back afterwards."""
    with _RANDOM, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread on the CPU, so that results do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def environment(device="auto") -> dict[str, Any]:
    """Tell what results depend on beside the settings: PyTorch, device, threads."""
    device = resolve_device(device)
    cpu_name = torch.cpu.get_capabilities().get("cpu_name", "")
    return {
        "torch": torch.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _to_device(config, device, images, labels=None) -> tuple[Tensor, Tensor | None]:
    """Check that images and labels fit the network, and put them on the device, still uint8."""
    size, channels, classes = config["image_size"], config["in_channels"], config["num_classes"]
    shape = (size, size) if channels == 1 else (size, size, channels)
    images = torch.as_tensor(images, device=device)
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        given = f"{images.dtype} of {tuple(images.shape)}"
        raise ModelError(f"images must be uint8, one or more of {shape}, not {given}")
    if labels is None:
        return images, None
    labels = torch.as_tensor(labels, device=device).long()
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() >= classes:
        raise ModelError(f"labels must be {len(images)} integers from 0 to {classes - 1}")
    return images, labels


def _as_input(images: Tensor) -> Tensor:  # (B, H, W) or (B, H, W, C) uint8
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.float().div_(255)  # (B, C, H, W); the poster's whole preprocessing


# ---- training ------------------------------------------------------------------------------------


class EpochRecord(NamedTuple):
    """One epoch of a training history; losses are mean cross-entropies, accuracies in [0, 1]."""

    epoch: int  # counted from 0, as in the authors' curves
    learning_rate: float  # the one this epoch trained with
    train_loss: float  # over the images as they were trained on, dropout on; so is the accuracy
    valid_loss: float
    train_accuracy: float
    valid_accuracy: float
    seconds: float  # wall time, validation included


def fit(
    network,
    train_images,
    train_labels,
    valid_images,
    valid_labels,
    hyperparameters: Hyperparameters = POSTER,
    *,
    seed: int = 0,
    device="auto",
    precision="auto",
    compile: str = "auto",
    checkpoint: str | os.PathLike | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[EpochRecord]:
    """Train `network` in place as the poster did; it ends with the last epoch's weights.

    SGD on the mean cross-entropy under `torch.autocast`, with a `GradScaler` in fp16;
    ReduceLROnPlateau on the validation loss. The images stay uint8 on the device. Every image is
    used once an epoch: the last batch is smaller, and takes in a single image left over, since
    BatchNorm cannot normalise one.

    Parameters
    ----------
    hyperparameters : Hyperparameters
        Its `num_features` and `dropout` must be the network's.
    seed : int
        Decides order and dropout, which start afresh from (seed, epoch) at every epoch.
    compile : {"auto", "on", "off"}
        As for `resolve_compile`. Where compiling fails, for want of a C++ compiler perhaps, a
        warning says so and training runs without.
    checkpoint : path, optional
        Written after every epoch. Where it exists, training continues from it, and ends as if it
        had never been interrupted; damaged or of another run, it raises a CheckpointError.
    on_epoch, on_batch : callable, optional
        ``on_epoch(record)`` after every epoch that is trained here, not those of the checkpoint;
        ``on_batch(epoch, images_done)`` after every training step.
    """
    device, config, h = resolve_device(device), network.config, hyperparameters
    precision = resolve_precision(precision, device)
    if (config["num_features"], config["dropout"]) != (h.num_features, h.dropout):
        raise ModelError("num_features or dropout differ between network and hyperparameters")
    images, labels = _to_device(config, device, train_images, train_labels)
    valid = _to_device(config, device, valid_images, valid_labels)
    n, batch_size = len(images), min(len(images), h.batch_size)

    network.to(device).train()
    rule = {"momentum": h.momentum, "nesterov": h.nesterov, "weight_decay": h.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), h.learning_rate, **rule)
    scheduler = ReduceLROnPlateau(optimizer, factor=h.factor, patience=h.patience)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(_as_input(images))  # (B, num_classes)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    compiled = None
    if resolve_compile(compile, config, n, h.epochs) == "on":
        compiled = _compiled(step, network, images[:batch_size], labels[:batch_size], precision)
    # Convolutions are fastest in channels-last everywhere, but PyTorch's own BatchNorm takes five
    # times as long backwards in it where a CPU's threads share the work.
    plain = compiled is None and device.type == "cpu" and torch.get_num_threads() > 1
    network.to(memory_format=torch.contiguous_format if plain else torch.channels_last)

    # What a checkpoint must have been made with; a finished training may go on for more epochs.
    run = [config, asdict(replace(h, epochs=1)), seed, precision, bool(compiled), n, len(valid[0])]
    parts, history = [network, optimizer, scheduler, scaler], []
    if checkpoint is not None and Path(checkpoint).exists():
        history = _restore(checkpoint, run, parts, h.epochs)

    for epoch in range(len(history), h.epochs):
        started, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
        loss_sum = correct = done = 0
        network.train()
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        with _seeded(int.from_bytes(digest[:8]) >> 1, device):
            batches = list(torch.randperm(n).to(device).split(batch_size))
            if len(batches[-1]) == 1 < batch_size:
                batches[-2:] = [torch.cat(batches[-2:])]
            for batch in batches:  # (B,) int64, indices
                # Another size would be compiled anew: the last batch runs as it is.
                run_step = compiled if compiled and len(batch) == batch_size else step
                with _autocast(device, precision):
                    loss, hits = run_step(images[batch], labels[batch])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                loss_sum += loss.detach() * len(batch)  # on the device: reading it stalls a GPU
                correct += hits
                done += len(batch)
                if on_batch:
                    on_batch(epoch, done)
        train_loss, train_accuracy = loss_sum.item() / n, correct.item() / n
        valid_loss, valid_accuracy = evaluate(network, *valid, device=device, precision=precision)
        if not np.isfinite(train_loss + valid_loss):
            raise ModelError(f"epoch {epoch}: loss not finite, try a learning rate below {rate:g}")
        scheduler.step(valid_loss)
        figures = train_loss, valid_loss, train_accuracy, valid_accuracy
        history.append(EpochRecord(epoch, rate, *figures, time.perf_counter() - started))
        if checkpoint is not None:
            states = [part.state_dict() for part in parts]
            _save({"run": run, "history": [*map(tuple, history)], "states": states}, checkpoint)
        if on_epoch:
            on_epoch(history[-1])
    return history


def learning_rates(hyperparameters: Hyperparameters, valid_losses: Iterable[float]) -> list[float]:
    """Return the rate each epoch trained with, as `fit`'s scheduler makes it of these losses."""
    h, rates = hyperparameters, []
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=h.learning_rate)
    scheduler = ReduceLROnPlateau(optimizer, factor=h.factor, patience=h.patience)
    for loss in valid_losses:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    return rates


COMPILE = ("auto", "on", "off")


def resolve_compile(compile: str, network_config: dict, num_images: int, epochs: int) -> str:
    """Say whether `torch.compile` fuses the training step: ``on`` or ``off``.

    It changes nothing beyond rounding. It takes 10 to 30 seconds and saves a third of the time, so
    ``auto`` is on from 3e12 forward multiply-accumulates of a whole training, a resumed one's
    beginning included: some minutes of two cores.
    """
    if compile != "auto":
        return compile
    macs = sum(row[3] for row in layer_table(build(network_config)))
    return "on" if macs * num_images * epochs > 3e12 else "off"


def _compiled(step, network, images, labels, precision) -> Callable | None:
    """Compile a training step for such a batch; None, and a warning, where that fails."""
    # With PyTorch's own random numbers: dropout draws what it would draw uncompiled.
    options = {"fallback_random": True, "triton.cudagraphs": images.device.type == "cuda"}
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if is_avx512 and precision == "fp32" and network.config["num_features"] % 16:
        # The loops run along the channels, and 8 of them fill half a register of 512 bits, which
        # has to be loaded masked then: a step of the poster's network takes 1.4 times as long.
        options["cpp.simdlen"] = 256
    # What an earlier call compiled was of another network; too many of them, and no more follow.
    torch.compiler.reset()
    network.to(memory_format=torch.channels_last)
    before = copy.deepcopy(network.state_dict())
    try:  # forward and backward for nothing, so that what can fail fails here
        with (
            _refusing("torch.compile fails here"),
            warnings.catch_warnings(action="ignore"),
            _seeded(0, images.device),
        ):
            compiled = torch.compile(step, dynamic=False, options=options)
            with _autocast(images.device, precision):
                loss, _ = compiled(images, labels)
            loss.backward()
            return compiled
    except (ModelError, OSError) as error:
        warnings.warn(f"{error}; training runs uncompiled", stacklevel=3)
        return None
    finally:
        network.load_state_dict(before)


# ---- validation and prediction -------------------------------------------------------------------


@torch.inference_mode()
def _logits(network, images, precision) -> Iterator[Tensor]:
    """Yield the logits of images on the network's device, (B, num_classes) float32, by batches."""
    layers = []
    for layer in [*network.eval().features, *network.classifier]:
        if isinstance(layer, nn.BatchNorm2d):  # folded into the convolution before it
            layers[-1] = nn.utils.fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    folded = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    # Enough to keep a CPU's cores busy, few enough that their feature maps stay in its caches; and
    # on a GPU so many that starting the kernels takes less than they do.
    for batch in images.split(128 if images.device.type == "cpu" else 4096):
        with _autocast(images.device, precision):
            logits = folded(_as_input(batch)).float()
        yield logits


def evaluate(network, images, labels, *, device="auto", precision="auto") -> tuple[float, float]:
    """Return mean cross-entropy and accuracy as `fit` validates."""
    device = resolve_device(device)
    images, labels = _to_device(network.config, device, images, labels)
    loss_sum = correct = done = 0
    for logits in _logits(network.to(device), images, resolve_precision(precision, device)):
        target = labels[done : done + len(logits)]
        loss_sum += nn.functional.cross_entropy(logits, target, reduction="sum").double()
        correct += (logits.argmax(1) == target).sum()
        done += len(logits)
    return loss_sum.item() / done, correct.item() / done


def predict(network, images, *, device="auto", on_batch=None) -> Tensor:
    """Return logits, float32, (N, num_classes), on the CPU, in plain float32 as the authors tested.

    `network` is left in evaluation mode. ``on_batch(images_done)`` is called after every batch.
    """
    device = resolve_device(device)
    images, _ = _to_device(network.config, device, images)
    parts = []
    # cuDNN's default is to round the factors of float32 products to TF32, of 10 bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for logits in _logits(network.to(device), images, "fp32"):
            parts.append(logits)
            if on_batch:
                on_batch(sum(map(len, parts)))
    return torch.cat(parts).cpu()


# ---- files ---------------------------------------------------------------------------------------


def save_network(network: PosterCNN, path: str | os.PathLike) -> None:
    """Write weights and `config` to `path`; the same weights are the same bytes."""
    _save({"config": network.config, "network": network.state_dict()}, path)


def load_network(path: str | os.PathLike) -> PosterCNN:
    """Read a network that `save_network` wrote, onto the CPU; no code in the file is run."""
    with _refusing(f"{path} is no saved network"):
        content = _load(path)
        network = build(content["config"])
        network.load_state_dict(content["network"])
    return network


def _restore(path: str | os.PathLike, run: list, parts: list, epochs: int) -> list[EpochRecord]:
    """Load the states of a checkpoint of this very run; return its history."""
    with _refusing(f"remove {path}: it is no checkpoint to go on from", CheckpointError):
        content = _load(path)
        if content["run"] != run or len(content["history"]) > epochs:
            raise ValueError("of another run: network, settings, epochs, precision or images")
        history = [EpochRecord(*record) for record in content["history"]]
        for part, state in zip(parts, content["states"], strict=True):
            part.load_state_dict(state)
    return history


def _save(content: dict[str, Any], path: str | os.PathLike) -> None:
    # Through memory: torch.save writes a file's name into it, and of a full disk tells no reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _write(buffer.getvalue(), path)


def _write(content: bytes, path: str | os.PathLike) -> None:
    """Write a file that is there complete or not at all."""
    # A name of its own: workers that outlive a killed search may write the same checkpoint.
    temporary = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: str | os.PathLike) -> Any:
    with zipfile.ZipFile(path) as archive:
        # torch.load takes flipped bits unsuspecting; the archive's checksums do not.
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- command line --------------------------------------------------------------------------------


def _print_layers(network: PosterCNN) -> None:
    name, rows = type(network).__name__, layer_table(network)
    total, macs = sum(row[2] for row in rows), sum(row[3] for row in rows)
    print(f"{name}: {total:,} parameters, {macs:,} multiply-accumulates (MACs) an image")
    print(f"{'layer':<12}{'output':>10}{'parameters':>12}{'MACs':>10}")
    for name, shape, parameters, macs in rows:
        print(f"{name:<12}{'x'.join(map(str, shape)):>10}{parameters:>12,}{macs:>10,}")


def _apply(arguments: argparse.Namespace) -> None:
    """Write a network's classes and softmax probabilities of unlabelled images."""
    network, path = load_network(arguments.model), arguments.images
    with (
        _refusing(f"{path} is no npz of test_images or images"),
        np.load(path, allow_pickle=False) as archive,
    ):
        images = torch.as_tensor(archive["test_images" if "test_images" in archive else "images"])
    logits = predict(network, images, device=arguments.device).double()  # (N, num_classes)
    columns, header = [np.arange(len(logits)), logits.argmax(1)], "Id,Cell type"
    if not arguments.submission:
        columns.append(logits.softmax(1))
        header = ",".join(["id,predicted", *(f"probability_{k}" for k in range(logits.shape[1]))])
    text = io.BytesIO()
    np.savetxt(text, np.column_stack(columns), "%.9g", ",", header=header, comments="")
    _write(text.getvalue(), arguments.output)
    print(f"wrote {arguments.output}: {len(images):,} images")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a network's layers, or apply a saved network; 0 done, 2 refused, 130 interrupted."""
    parser = argparse.ArgumentParser("model.py", description="Print or apply a network.")
    parser.add_argument("--network", choices=NETWORKS, default="PosterCNN")
    apply = parser.add_subparsers(dest="command").add_parser("apply", help="to images, into a CSV")
    # One line, without the usage.
    parser.error = apply.error = lambda message: parser.exit(2, f"model.py: error: {message}\n")
    apply.add_argument("model", metavar="MODEL.pt", help="written by save_network")
    apply.add_argument("images", metavar="IMAGES.npz", help="with test_images, else images, uint8")
    apply.add_argument("output", metavar="OUT.csv", help="id, predicted class, probabilities")
    apply.add_argument("--submission", action="store_true", help="the authors' Id,Cell type alone")
    apply.add_argument("--device", default="auto", help="default: a GPU where there is one")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "apply":
            _apply(arguments)
        else:
            _print_layers(NETWORKS[arguments.network]())
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what read our output, `| head` perhaps, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains at its exit
        return 2
    except (ModelError, OSError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
