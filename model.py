"""The poster's CNN, NephNet2D, and the mixed-precision loop that trains and applies them.

``python model.py`` prints the layer table. In code, with uint8 images (N, H, W) or (N, H, W, C)::

    network = PosterCNN(num_classes=8)
    history = fit(network, train_images, train_labels, valid_images, valid_labels, POSTER)
    logits = predict(network, test_images)  # (N, 8) float32

Sources: W. Deng and K. Zhu, "Medical Image Classification Model Based on CNN" (poster, BUPT, 2022)
and the settings in their public repository dw-dengwei/PML_coursework; NephNet2D: A. Woloshuk et
al., Cytometry A 99(7):707-721, 2021.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

# --------------------------------------------------------------------------- hyperparameters


@dataclass(frozen=True)
class Hyperparameters:
    """How a network is sized and trained; the defaults are the poster's printed values.

    Raises
    ------
    ValueError
        A value has the wrong type or is out of its range.
    """

    num_features: int = 8
    """Width of the first convolution, at least 1."""
    batch_size: int = 128
    """Images a step, at least 1."""
    learning_rate: float = 0.025
    """Initial learning rate, above 0."""
    weight_decay: float = 0.004
    """L2 penalty of every parameter, at least 0."""
    momentum: float = 0.8
    """SGD momentum, in [0, 1)."""
    nesterov: bool = True
    """Nesterov's form of it; not printed on the poster, the authors' setting."""
    dropout: float = 0.5
    """Share of the hidden layer's outputs dropped, in [0, 1)."""
    patience: int = 5
    """Epochs without a better validation loss before the learning rate falls, at least 0."""
    factor: float = 0.29
    """What the learning rate is multiplied by then, in (0, 1)."""
    epochs: int = 100
    """Passes over the training images, at least 1; not printed, the axis of the curves."""

    def __post_init__(self) -> None:
        above_zero, below_one = math.ulp(0.0), math.nextafter(1.0, 0.0)
        limits = {
            "num_features": (1, 1024),
            "batch_size": (1, math.inf),
            "learning_rate": (above_zero, math.inf),
            "weight_decay": (0, math.inf),
            "momentum": (0, below_one),
            "dropout": (0, below_one),
            "patience": (0, math.inf),
            "factor": (above_zero, below_one),
            "epochs": (1, math.inf),
        }
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if type(value) is not kind:
                raise ValueError(f"{field.name} must be of type {kind.__name__}, not {value!r}")
            if field.name in limits:
                low, high = limits[field.name]
                if not low <= value <= high or not math.isfinite(value):
                    raise ValueError(f"{field.name} {value!r} is out of its range")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")


POSTER = Hyperparameters()
# The 16 digits of the authors' own run; the poster prints 0.025 and 0.004.
AUTHORS = replace(POSTER, learning_rate=0.025336627337952815, weight_decay=0.0046684446208345)

# ---------------------------------------------------------------------------------- networks


def _convolutions(channels: Sequence[int], pooled: Sequence[int]) -> nn.Sequential:
    """Chain 3x3 convolution, BatchNorm and ReLU; average-pool 2x2 after those in `pooled`."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        if i in pooled:
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers)


def _classifier(num_features: int, num_classes: int, image_size: int, dropout: float):
    """Flatten 16f maps, pooled three times; dense, ReLU, dropout, dense."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16 * num_features * (image_size // 8) ** 2, 16 * num_features),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16 * num_features, num_classes),
    )


class _Network(nn.Module):
    """Checks and remembers the arguments that rebuild the network (`config`)."""

    def __init__(
        self, num_features: int, num_classes: int, in_channels: int, image_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.config = {
            "network": type(self).__name__,
            "num_features": num_features,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "dropout": dropout,
        }
        for name, least in {
            "num_features": 1,
            "num_classes": 2,
            "in_channels": 1,
            "image_size": 8,
        }.items():
            if type(self.config[name]) is not int or self.config[name] < least:
                raise ValueError(f"{name} must be an integer from {least} up")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout!r} is out of its range")

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) float in [0, 1]
        return self.classifier(self.features(images))  # (B, num_classes) logits


class PosterCNN(_Network):
    """The poster's network: eight convolutions f, f, f, 2f, 2f, 4f, 8f, 16f, two dense layers.

    250,904 parameters at 8 features, 8 classes and 28x28 gray images. The hidden dense layer
    and its dropout are the authors' code's; the figure leaves them out. Weights are initialised by
    PyTorch's defaults, as theirs were.

    Parameters
    ----------
    num_features : int
        f, at least 1.
    num_classes : int
        At least 2.
    in_channels : int
        1 for gray images, 3 for RGB.
    image_size : int
        Height and width in pixels, at least 8.
    dropout : float
        Share of the hidden layer's outputs dropped while training, in [0, 1).

    Raises
    ------
    ValueError
        A size is too small, or the dropout out of its range.
    """

    def __init__(
        self,
        num_features: int = 8,
        num_classes: int = 8,
        in_channels: int = 1,
        image_size: int = 28,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(num_features, num_classes, in_channels, image_size, dropout)
        widths = [num_features * multiple for multiple in (1, 1, 1, 2, 2, 4, 8, 16)]
        self.features = _convolutions([in_channels, *widths], pooled=(3, 5, 6))
        self.classifier = _classifier(num_features, num_classes, image_size, dropout)


class NephNet2D(_Network):
    """The network that the poster's is based on: five convolutions f, 2f, 4f, 8f, 16f.

    Weights are Kaiming-normal and biases standard normal, as in the public code awoloshuk/NephNet,
    which takes 64x64 images. Parameters and errors are `PosterCNN`'s.
    """

    def __init__(
        self,
        num_features: int = 32,
        num_classes: int = 8,
        in_channels: int = 1,
        image_size: int = 28,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(num_features, num_classes, in_channels, image_size, dropout)
        widths = [num_features * multiple for multiple in (1, 2, 4, 8, 16)]
        self.features = _convolutions([in_channels, *widths], pooled=(1, 2, 3))
        self.classifier = _classifier(num_features, num_classes, image_size, dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias)


NETWORKS = {"PosterCNN": PosterCNN, "NephNet2D": NephNet2D}


def build(config: dict[str, Any], seed: int = 0) -> _Network:
    """Build the network that `config` (a network's ``.config``) tells of, initialised by `seed`.

    PyTorch's global random state is left as it was.

    Raises
    ------
    ValueError
        `config` names no network of this file, or its values make none.
    """
    config = dict(config)
    name = config.pop("network", "PosterCNN")
    if name not in NETWORKS:
        raise ValueError(f"no network named {name!r}; there are {', '.join(NETWORKS)}")
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's; torch.manual_seed is every GPU's too
        try:
            return NETWORKS[name](**config)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} cannot be built from {config}: {_first_line(error)}"
            ) from None


# --------------------------------------------------------------------- device, precision, data


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device meant; ``auto`` is the first CUDA GPU where there is one, else the CPU.

    Raises
    ------
    ValueError
        No such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cpu" and device.index:
            raise RuntimeError("all its cores are the one device cpu")
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"no device {str(device)!r} here: {_first_line(error)}") from None
    return device


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *_DTYPES)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``.

    ``auto`` is what pays on the hardware: fp16 on CUDA (the poster's Apex O1), bf16 on a CPU with
    instructions for it, else fp32: a CPU that has to emulate bf16 is ten times slower with it.

    Raises
    ------
    ValueError
        An unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if any(has.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


@contextlib.contextmanager
def one_thread():
    """Compute with one thread on the CPU, so that results do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _as_input(images: Tensor) -> Tensor:
    """Turn uint8 (B, H, W) or (B, H, W, C) into float32 (B, C, H, W) in [0, 1]."""
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.float().div_(255)  # the poster's whole preprocessing


def _as_tensor(values: Any) -> Tensor:
    """Share the memory of tensors and arrays, but of no read-only array: PyTorch cannot."""
    try:
        shared = isinstance(values, Tensor) or getattr(
            getattr(values, "flags", None), "writeable", False
        )
        return torch.as_tensor(values) if shared else torch.tensor(values)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"images or labels are no array: {_first_line(error)}") from None


def _images_to_device(images: Any, config: dict, device: torch.device) -> Tensor:
    """Put uint8 images on the device, having checked that they fit the network."""
    images = _as_tensor(images)
    shape = (config["image_size"],) * 2 + ((config["in_channels"],) if images.ndim == 4 else ())
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(
            f"{config['network']} takes uint8 images (N, {', '.join(map(str, shape))}), N at "
            f"least 1, not {images.dtype} {tuple(images.shape)}"
        )
    if images.ndim == 3 and config["in_channels"] != 1:
        raise ValueError(f"images need {config['in_channels']} channels: (N, H, W, C)")
    return images.to(device)


def _to_device(images: Any, labels: Any, config: dict, device: torch.device) -> tuple:
    """Put uint8 images and their labels on the device, having checked that they fit."""
    images, labels = _images_to_device(images, config, device), _as_tensor(labels)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be {len(images)} integers, not {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < config["num_classes"]:
        raise ValueError(f"labels must be 0 to {config['num_classes'] - 1}")
    return images, labels.to(device)


# ---------------------------------------------------------------------------------- training


class EpochRecord(NamedTuple):
    """One epoch of a training history."""

    epoch: int
    """Counted from 0, as in the authors' curves."""
    learning_rate: float
    """The one this epoch trained with."""
    train_loss: float
    """Mean cross-entropy of the epoch's steps, dropout on."""
    valid_loss: float
    train_accuracy: float
    """Of the epoch's steps, dropout on; in [0, 1]."""
    valid_accuracy: float
    seconds: float
    """Wall time, validation included."""


class TrainingDivergedError(ArithmeticError):
    """The loss became NaN or infinite."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to something else."""


def fit(
    network: _Network,
    train_images: Any,
    train_labels: Any,
    valid_images: Any,
    valid_labels: Any,
    hyperparameters: Hyperparameters = POSTER,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compile: str = "auto",
    checkpoint: str | os.PathLike | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[EpochRecord]:
    """Train `network` in place as the poster did; it ends with the last epoch's weights.

    SGD on the mean cross-entropy under `torch.autocast`, with a `GradScaler` in fp16;
    ReduceLROnPlateau on the validation loss (relative threshold 1e-4). The images stay uint8 on the
    device and a batch is an index slice of them. Every image is used once an epoch: the last batch
    is smaller, and takes in a single image left over, since BatchNorm cannot normalise one.

    Parameters
    ----------
    network : PosterCNN or NephNet2D
        Moved to `device`. Its sizes count, not those in `hyperparameters`.
    train_images, valid_images : array or tensor, uint8, (N, H, W) or (N, H, W, C)
    train_labels, valid_labels : array or tensor of integers, (N,), 0 .. num_classes - 1
    hyperparameters : Hyperparameters
    seed : int
        Decides order and dropout. Both start afresh from (seed, epoch) at every epoch, so no random
        state has to outlive one; PyTorch's global random state is left as it was.
    device : str
        As for `resolve_device`.
    precision : {"auto", "fp32", "bf16", "fp16"}
        As for `resolve_precision`; validation runs in it too.
    compile : {"auto", "on", "off"}
        Whether `torch.compile` fuses the training step, which changes nothing beyond rounding;
        ``auto`` is where the whole training, done already or not, is long enough to win the
        compiler's time back. Where it fails, for want of a C++ compiler, a warning says so.
    checkpoint : path, optional
        Written after every epoch. Where it exists, training continues from it, and ends as if it
        had never been interrupted.
    on_epoch : callable, optional
        ``on_epoch(record)`` after every epoch, those of the checkpoint included.
    on_batch : callable, optional
        ``on_batch(epoch, images_done)`` after every training step.

    Returns
    -------
    list of EpochRecord
        One an epoch, ``hyperparameters.epochs`` long.

    Raises
    ------
    TrainingDivergedError
        The loss became NaN or infinite; names epoch and learning rate.
    CheckpointError
        The checkpoint is damaged or of another run.
    ValueError
        Images or labels do not fit the network, or an option is unknown.
    """
    if compile not in COMPILE:
        raise ValueError(f"no compile {compile!r}; there are {', '.join(COMPILE)}")
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    config = network.config
    train_images, train_labels = _to_device(train_images, train_labels, config, device)
    valid_images, valid_labels = _to_device(valid_images, valid_labels, config, device)
    n, batch_size = len(train_images), hyperparameters.batch_size
    if min(n, batch_size) == 1 and config["image_size"] < 16:
        raise ValueError("BatchNorm needs at least 2 images a batch below 16x16 pixels")
    network.to(device).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=hyperparameters.learning_rate,
        momentum=hyperparameters.momentum,
        nesterov=hyperparameters.nesterov,
        weight_decay=hyperparameters.weight_decay,
        fused=device.type == "cuda",
    )
    # From zero: PyTorch's fused optimizer leaves it unset where the scaled loss overflows in the
    # very first step.
    for weights in network.parameters():
        optimizer.state[weights]["momentum_buffer"] = torch.zeros_like(weights)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=hyperparameters.factor, patience=hyperparameters.patience
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = _autocast(device, precision)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, and how many of it are classified correctly."""
        logits = network(_as_input(images))
        return functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    compiled = None
    _lay_out(network, compiling=False)
    if compile == "on" or (
        compile == "auto" and _macs(config) * n * hyperparameters.epochs > _COMPILE_FROM
    ):
        _lay_out(network, compiling=True)
        first = slice(min(n, batch_size))
        batch = train_images[first], train_labels[first]
        compiled = _compiled(step, network, *batch, precision)
        _lay_out(network, compiling=compiled is not None)
    state = {
        "network": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
    }
    run = {
        "config": config,
        "hyperparameters": {k: v for k, v in asdict(hyperparameters).items() if k != "epochs"},
        "seed": seed,
        "precision": precision,
        "compiled": compiled is not None,
        "images": [n, len(valid_images)],
    }
    history = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = _restore(Path(checkpoint), run, state, hyperparameters.epochs)
    for record in history:
        if on_epoch:
            on_epoch(record)
    for epoch in range(len(history), hyperparameters.epochs):
        started = time.perf_counter()
        learning_rate = optimizer.param_groups[0]["lr"]
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        done = 0
        network.train()
        # A backward pass must not see the caller's autocast either.
        with _seeded(seed, epoch, device), _autocast(device, "fp32"):
            order = torch.randperm(n).to(device)
            for batch in _batches(order, batch_size):
                # Another size would be compiled anew: the last batch runs as it is.
                run_step = compiled if compiled and len(batch) == min(n, batch_size) else step
                with autocast:
                    loss, hits = run_step(train_images[batch], train_labels[batch])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                # Summed on the device: reading a loss every step would stall a GPU.
                loss_sum += loss.detach() * len(batch)
                correct += hits
                done += len(batch)
                if on_batch:
                    on_batch(epoch, done)
        valid_loss, valid_accuracy = _evaluate(network, valid_images, valid_labels, autocast)
        train_loss, train_accuracy = loss_sum.item() / n, correct.item() / n
        if not (math.isfinite(train_loss) and math.isfinite(valid_loss)):
            raise TrainingDivergedError(
                f"the loss became {train_loss} (validation {valid_loss}) in epoch {epoch} at "
                f"learning rate {learning_rate:g}: try a smaller learning rate"
            )
        scheduler.step(valid_loss)
        seconds = time.perf_counter() - started
        history.append(
            EpochRecord(
                epoch,
                learning_rate,
                train_loss,
                valid_loss,
                train_accuracy,
                valid_accuracy,
                seconds,
            )
        )
        if checkpoint is not None:
            states = {name: part.state_dict() for name, part in state.items()}
            _save({"run": run, "history": [tuple(r) for r in history], **states}, checkpoint)
        if on_epoch:
            on_epoch(history[-1])
    return history


COMPILE = ("auto", "on", "off")
# Forward multiply-accumulates of a whole training from which compiling pays: some minutes of two
# cores, of which it saves a third, and takes 10 to 30 seconds.
_COMPILE_FROM = 3e12


def _macs(config: dict[str, Any]) -> int:
    """Count the multiply-accumulates of a forward pass of one image."""
    return sum(row[3] for row in layer_table(build(config)))


def _lay_out(network: nn.Module, *, compiling: bool) -> None:
    """Put the weights in the layout that training is fastest in.

    Convolutions are fastest in channels-last everywhere, but PyTorch's own BatchNorm takes five
    times as long backwards in it where a CPU's threads share the work.
    """
    several_threads = (
        next(network.parameters()).device.type == "cpu" and torch.get_num_threads() > 1
    )
    plain = several_threads and not compiling
    network.to(memory_format=torch.contiguous_format if plain else torch.channels_last)


def _compiled(
    step: Callable, network: _Network, images: Tensor, labels: Tensor, precision: str
) -> Callable | None:
    """Compile a training step for such a batch; None, and a warning, where that fails."""
    # With PyTorch's own random numbers: dropout draws what it would draw uncompiled.
    options: dict[str, Any] = {"fallback_random": True}
    if images.device.type == "cuda":
        options["triton.cudagraphs"] = True
    elif (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and precision == "fp32"
        and network.config["num_features"] % 16
    ):
        # The loops run along the channels, and 8 of them fill half a register of 512 bits, which
        # has to be loaded masked then: a step of the poster's network takes 1.4 times as long.
        options["cpp.simdlen"] = 256
    # What an earlier call compiled was of another network; too many of them, and no more follow.
    torch.compiler.reset()
    before = copy.deepcopy(network.state_dict())
    try:
        # Forward and backward for nothing, so that what can fail fails here: on a GPU once to warm
        # up, once to record the CUDA graph and once to replay it.
        with (
            warnings.catch_warnings(action="ignore"),  # of PyTorch's own making
            _seeded(0, 0, images.device),
            _autocast(images.device, "fp32"),
        ):
            compiled = torch.compile(step, dynamic=False, options=options)
            for _ in range(3 if images.device.type == "cuda" else 1):
                network.zero_grad()
                with _autocast(images.device, precision):
                    loss, _ = compiled(images, labels)
                loss.backward()
    except Exception as error:  # anything: compilers are many, and so are their troubles
        warnings.warn(
            f"torch.compile fails here ({_first_line(error)}); training runs uncompiled",
            stacklevel=3,
        )
        return None
    finally:
        network.load_state_dict(before)
        network.zero_grad()
    return compiled


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Compute in `precision`, whatever autocast the caller may be in.

    Without the cache of cast weights: inside a caller's autocast it would outlive a step, and no
    weight is used twice in one.
    """
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=_DTYPES[precision], cache_enabled=False)


# Held while PyTorch's global random state is borrowed: threads would draw from each other's.
_RANDOM = threading.RLock()


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device):
    """Seed PyTorch from (seed, epoch), and put the global random state back afterwards."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    seed = int.from_bytes(digest[:8]) >> 1
    with _RANDOM, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _batches(order: Tensor, batch_size: int) -> list[Tensor]:
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _evaluation_batch(device: torch.device) -> int:
    """Say how many images a forward pass takes outside training.

    Enough to keep a CPU's cores busy, few enough that their feature maps stay in its caches; and
    on a GPU so many that starting the kernels takes less than they do.
    """
    return 128 if device.type == "cpu" else 4096


def _for_inference(network: _Network) -> nn.Module:
    """Copy a network for evaluation, each BatchNorm folded into the convolution before it."""
    layers: list[nn.Module] = []
    for layer in [*network.features, *network.classifier]:
        layer = copy.deepcopy(layer).eval()
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@torch.inference_mode()
def _evaluate(
    network: _Network, images: Tensor, labels: Tensor, autocast: contextlib.AbstractContextManager
) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy over all images."""
    folded = _for_inference(network.eval())
    loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    size = _evaluation_batch(images.device)
    for part, target in zip(images.split(size), labels.split(size), strict=True):
        with autocast:
            logits = folded(_as_input(part)).float()
        loss_sum += functional.cross_entropy(logits, target, reduction="sum")
        correct += (logits.argmax(1) == target).sum()
    return loss_sum.item() / len(labels), correct.item() / len(labels)


# -------------------------------------------------------------------------------- prediction


def predict(
    network: _Network,
    images: Any,
    *,
    device: str | torch.device = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Apply `network` in plain float32, as the authors tested.

    Parameters
    ----------
    network : PosterCNN or NephNet2D
        Moved to `device` and left in evaluation mode.
    images : array or tensor, uint8, (N, H, W) or (N, H, W, C)
    device : str
        As for `resolve_device`.
    on_batch : callable, optional
        ``on_batch(images_done)`` after every batch.

    Returns
    -------
    Tensor
        Logits, float32, (N, num_classes), on the CPU.

    Raises
    ------
    ValueError
        Images do not fit the network.
    """
    device = resolve_device(device)
    network.to(device).eval()
    images = _images_to_device(images, network.config, device)
    logits = torch.empty(len(images), network.config["num_classes"], device=device)
    with torch.inference_mode():
        folded = _for_inference(network)
    size = _evaluation_batch(device)
    for start in range(0, len(images), size):
        stop = min(start + size, len(images))
        with torch.inference_mode(), _autocast(device, "fp32"), _true_float32():
            logits[start:stop] = folded(_as_input(images[start:stop]))
        if on_batch:
            on_batch(stop)
    return logits.cpu()


@contextlib.contextmanager
def _true_float32():
    """Keep GPUs from rounding the factors of float32 products to TF32, as cuDNN's default is."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# ------------------------------------------------------------------------------- checkpoints


def save_network(network: _Network, path: str | os.PathLike) -> None:
    """Write weights and `config` to `path`, through a temporary file moved into place."""
    archive, packed = io.BytesIO(), io.BytesIO()
    torch.save({"config": network.config, "network": network.state_dict()}, archive)
    # torch.save stores and pads the weights in a zip archive; torch.load reads deflated ones too.
    with zipfile.ZipFile(archive) as stored, zipfile.ZipFile(packed, "w") as deflated:
        for name in stored.namelist():  # ZipInfo has a fixed date: same weights, same bytes
            entry = zipfile.ZipInfo(name)
            deflated.writestr(entry, stored.read(name), zipfile.ZIP_DEFLATED, compresslevel=9)
    _write(packed, path)


def load_network(path: str | os.PathLike) -> _Network:
    """Read a network that `save_network` wrote, onto the CPU; no code in the file is run.

    Raises
    ------
    CheckpointError
        Not such a file, or damaged.
    """
    content = _load(Path(path))
    try:
        # Shapes first: a damaged width must not allocate gigabytes.
        with torch.device("meta"):
            network = build(content["config"])
        network.load_state_dict(content["network"], assign=True)
        if any(
            t.is_floating_point() and not t.isfinite().all() for t in network.state_dict().values()
        ):
            raise ValueError("it holds weights that are NaN or infinite")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no saved network: {_first_line(error)}") from None
    return network.requires_grad_(True)


# A SHA-256 of what torch.save wrote ends every file: torch.load reads flipped bits unsuspecting.
# It does not mind bytes after its own either, so it can read these files by itself.
_DIGEST_SIZE = 32


def _save(content: dict, path: str | os.PathLike) -> None:
    # Through memory, since torch.save writes the file's name into the file: the same state is the
    # same bytes anywhere.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _write(buffer, path)


def _write(buffer: io.BytesIO, path: str | os.PathLike) -> None:
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _load(path: Path) -> dict:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        if raw[-_DIGEST_SIZE:] != hashlib.sha256(raw[:-_DIGEST_SIZE]).digest():
            raise ValueError("its bytes are not those that were written")
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load promises no type of error for a damaged file
        raise CheckpointError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint of this program")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _restore(path: Path, run: dict, state: dict, epochs: int) -> list[EpochRecord]:
    """Load the states of a checkpoint of this very run; return its history."""
    content = _load(path)
    if content.get("run") != run:
        raise CheckpointError(
            f"{path} is of another run (network, hyperparameters, seed, precision, compilation or "
            "number of images differ): remove it to start again"
        )
    try:
        history = [EpochRecord(*record) for record in content["history"]]
        if len(history) <= epochs:
            for name, part in state.items():
                part.load_state_dict(content[name])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from None
    if len(history) > epochs:
        raise CheckpointError(
            f"{path} holds {len(history)} epochs, more than the {epochs} asked for"
        )
    return history


def environment(device: str | torch.device = "auto") -> dict[str, Any]:
    """Tell what results depend on beside the settings: PyTorch, device, threads."""
    device = resolve_device(device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.cpu.get_capabilities().get("cpu_name", "")
    )
    return {
        "torch": torch.__version__,
        "device": str(device),
        "device_name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------------------ command line


def layer_table(network: _Network) -> list[tuple[str, tuple[int, ...], int, int]]:
    """List (layer, output shape without the batch, parameters, multiply-accumulates an image)."""
    rows, hooks = [], []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        weights = module.weight.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        rows.append(
            (type(module).__name__, tuple(output.shape[1:]), parameters, weights * positions)
        )

    for module in network.modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(record))
    size, training = network.config["image_size"], network.training
    with torch.inference_mode():
        network.eval()(torch.zeros(1, network.config["in_channels"], size, size))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print a network's layer table."""
    parser = argparse.ArgumentParser(prog="model.py", description="Print a network's layers.")
    # One line, without the usage.
    parser.error = lambda message: parser.exit(2, f"model.py: error: {message}\n")
    parser.add_argument("--network", choices=NETWORKS, default="PosterCNN")
    parser.add_argument("--num-features", type=int, help="default: 8, or NephNet2D's 32")
    parser.add_argument("--num-classes", type=int, default=8)
    parser.add_argument("--in-channels", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=28)
    config = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        network = build(config)
    except ValueError as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        return 2
    rows = layer_table(network)
    print(f"{'layer':<12}{'output':>16}{'parameters':>12}{'MACs':>12}")
    for name, shape, parameters, macs in rows:
        output = f"{shape[0]}@{shape[1]}x{shape[2]}" if len(shape) == 3 else str(shape[0])
        print(f"{name:<12}{output:>16}{parameters:>12,}{macs:>12,}")
    parameters, macs = (sum(column) for column in list(zip(*rows, strict=True))[2:])
    print(f"{'total':<12}{'':>16}{parameters:>12,}{macs:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
