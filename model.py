"""The poster's CNN, NephNet2D, and the mixed-precision loop that trains and applies them.

``python model.py`` prints the layers. ``python model.py apply MODEL.pt IMAGES.npz OUT.csv`` applies
a saved network to raw images, which are stretched if the network was trained on stretched ones. In
code, with PyTorch 2.11 or newer::

    network = build({"num_classes": 8}, seed=0)
    history = fit(network, train_images, train_labels, valid_images, valid_labels, POSTER)
    logits = predict(network, test_images)  # (N, 8) float32

Everywhere, `network` is a PosterCNN or a NephNet2D, which is moved to `device`. Images are uint8,
(N, H, W) for a network of one channel, else (N, H, W, C). Labels are N integers from 0 to
num_classes - 1. Both may be arrays, tensors or lists. `device` and `precision` are as for
`resolve_device` and `resolve_precision`. Input that does not fit or is out of range raises a
ModelError of one line. The caller's autocast, default dtype and random state have no influence and
are left as they were.

Sources: W. Deng and K. Zhu, "Medical Image Classification Model Based on CNN" (poster, BUPT, 2022)
and the settings in their public repository dw-dengwei/PML_coursework; NephNet2D: A. Woloshuk et
al., Cytometry A 99(7):707-721, 2021, and the public code awoloshuk/NephNet.
"""

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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


class ModelError(ValueError):
    """An argument cannot be used, a file cannot be read, or the training diverged."""


class CheckpointError(ModelError):
    """A training checkpoint cannot be read, or was made by another training."""


@dataclass(frozen=True)
class Hyperparameters:
    """Size of a network and settings of its training; by default the poster's printed values."""

    num_features: int = 8  # channels of the first convolution
    batch_size: int = 128  # images per step
    learning_rate: float = 0.025  # of the first epoch
    weight_decay: float = 0.004  # L2 penalty of every parameter
    momentum: float = 0.8
    nesterov: bool = True  # not printed, the authors' setting
    dropout: float = 0.5  # fraction of the hidden layer's outputs
    patience: int = 5  # epochs without improvement before the learning rate drops
    factor: float = 0.29  # what the learning rate is multiplied by then
    epochs: int = 100  # not printed, the axis of the curves

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            accepted = (int, float) if field.type is float else (field.type,)
            if type(value) not in accepted:  # no subclass: bool is one of int
                types = f"{field.type.__name__}, not {type(value).__name__}"
                raise ModelError(f"{field.name} must be of type {types}")
            if not 0 <= value <= sys.float_info.max:
                raise ModelError(f"{field.name} must be at least 0 and finite, not {value}")
        for name in ("num_features", "batch_size", "learning_rate", "factor", "epochs"):
            if getattr(self, name) == 0:
                raise ModelError(f"{name} must be positive, not 0")
        for name in ("momentum", "dropout", "factor"):
            if getattr(self, name) >= 1:
                raise ModelError(f"{name} must be below 1, not {getattr(self, name)}")
        if self.nesterov and self.momentum == 0:
            raise ModelError("nesterov must be False without momentum")


POSTER = Hyperparameters()
# The 16 digits of the authors' own run; the poster prints 0.025 and 0.004.
AUTHORS = replace(POSTER, learning_rate=0.025336627337952815, weight_decay=0.0046684446208345)

# ---- networks ------------------------------------------------------------------------------------


class PosterCNN(nn.Module):
    """The poster's network: eight convolutions f, f, f, 2f, 2f, 4f, 8f, 16f, two dense layers.

    `num_features` is f. `num_classes` is at least 2, `in_channels` 1 for gray images and 3 for RGB,
    `image_size` height and width in pixels, at least 8; `dropout`, in [0, 1), is the fraction of
    the hidden layer's outputs dropped while training. All are in the attribute `config`.

    By default there are 250,904 parameters. The hidden dense layer and its dropout are in the
    authors' code; the figure leaves them out. PyTorch's defaults initialise the weights, as theirs.
    """

    widths = (1, 1, 1, 2, 2, 4, 8, 16)  # of the 3x3 convolutions, in num_features
    pooled = (4, 6, 7)  # the convolutions, counted from 1, that 2x2 average pooling follows
    pixels = "raw"  # of the images it was trained on, see `save_network`

    def __init__(self, num_features=8, num_classes=8, in_channels=1, image_size=28, dropout=0.5):
        super().__init__()
        self.config = {  # without NumPy's numbers, which PyTorch saves but does not load
            "network": type(self).__name__,
            "num_features": int(num_features),
            "num_classes": int(num_classes),
            "in_channels": int(in_channels),
            "image_size": int(image_size),
            "dropout": float(dropout),
        }
        if image_size < 8:
            raise ModelError(f"images must be at least 8x8 pixels, not {image_size}x{image_size}")
        float32 = {"dtype": torch.float32}  # whatever the caller's torch.set_default_dtype
        layers = []
        inputs = in_channels
        for i, width in enumerate(self.widths, 1):
            outputs = width * num_features
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, **float32))  # (B, outputs, H, W)
            layers += [nn.BatchNorm2d(outputs, **float32), nn.ReLU(inplace=True)]
            if i in self.pooled:
                layers.append(nn.AvgPool2d(2))  # (B, outputs, H // 2, W // 2)
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (B, 16f * (H // 8) * (W // 8))
            nn.Linear(inputs * (image_size // 8) ** 2, 16 * num_features, **float32),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(16 * num_features, num_classes, **float32),
        )

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) float in [0, 1]
        """Return a batch's logits."""
        return self.classifier(self.features(images))  # (B, num_classes)


class NephNet2D(PosterCNN):
    """The network that the poster's is based on: five convolutions f, 2f, 4f, 8f, 16f.

    Weights are Kaiming-normal and biases standard normal, as in its public code, which takes 64x64
    images. The rest is as in `PosterCNN`.
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
    """Return the network that a network's ``.config`` describes, initialised by `seed`."""
    arguments = {"network": "PosterCNN", **config}
    with _one_line_error("no such network can be built"), _isolated(seed, torch.device("cpu")):
        return NETWORKS[arguments.pop("network")](**arguments)


@torch.inference_mode()
def layer_table(network) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Return one row per layer: name, output shape, parameters, multiply-accumulates per image."""
    network = copy.deepcopy(network).cpu().eval()
    channels, size = network.config["in_channels"], network.config["image_size"]
    outputs = torch.zeros(1, channels, size, size, dtype=torch.float32)
    rows = []
    for layer in [*network.features, *network.classifier]:
        outputs = layer(outputs)  # (1, C, H, W), then (1, features)
        parameters = sum(p.numel() for p in layer.parameters())
        weights = layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        macs = weights * outputs[0, 0].numel()  # a weight is used once per output position
        rows.append((type(layer).__name__, tuple(outputs.shape[1:]), parameters, macs))
    return rows


# ---- training ------------------------------------------------------------------------------------


class EpochRecord(NamedTuple):
    """One epoch of a training history; losses are mean cross-entropies, accuracies in [0, 1]."""

    epoch: int  # counted from 0, as in the authors' curves
    learning_rate: float  # the one this epoch trained with
    train_loss: float  # over the images as they were trained on, with dropout
    valid_loss: float
    train_accuracy: float  # over the images as they were trained on, with dropout
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

    SGD on the mean cross-entropy under `torch.autocast`, with a `GradScaler` in fp16, and
    ReduceLROnPlateau on the validation loss. The images stay uint8 on the device. All epochs are
    returned, those of a checkpoint included.

    Parameters
    ----------
    seed : int
        Decides order and dropout, which start afresh from (seed, epoch) at every epoch.
    compile : {"auto", "on", "off"}
        As for `resolve_compile`. Without a C++ compiler it runs uncompiled, with a warning.
    checkpoint : path, optional
        Written after every epoch. If it exists, the training continues from it, perhaps for more
        epochs than before, and ends as if it had never been interrupted. `network` must be given
        as it was before its first epoch. If the checkpoint is damaged or of other images, labels,
        weights or settings, a CheckpointError is raised.
    on_epoch, on_batch : callable, optional
        ``on_epoch(record)`` after every epoch that is trained here, not those of the checkpoint;
        ``on_batch(epoch, images_done)`` after every training step.
    """
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    config, h = network.config, hyperparameters
    if (config["num_features"], config["dropout"]) != (h.num_features, h.dropout):
        raise ModelError("num_features or dropout differ between network and hyperparameters")
    images, labels = _to_device(config, device, train_images, train_labels)
    valid = _to_device(config, device, valid_images, valid_labels)
    n = len(images)
    batch_size = min(n, h.batch_size)
    if batch_size == 1 and config["image_size"] < 16:  # one number per channel after the poolings
        raise ModelError("BatchNorm needs batches of 2 images, or images of at least 16x16 pixels")
    if checkpoint:
        _check_writable(checkpoint)

    network.to(device).train()
    rule = {"momentum": h.momentum, "nesterov": h.nesterov, "weight_decay": h.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), h.learning_rate, **rule)
    scheduler = ReduceLROnPlateau(optimizer, factor=h.factor, patience=h.patience)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    compile = resolve_compile(compile, device, config, n, h.epochs)
    example = images[:batch_size], labels[:batch_size]
    forward, compiled = _training_forward(network, *example, precision, compile)

    parts = [network, optimizer, scheduler, scaler]
    history = []
    if checkpoint:  # it must be of the same settings, images, labels and starting weights
        fingerprint = [config, asdict(replace(h, epochs=1)), int(seed), precision, compiled]
        tensors = [images, labels, *valid, *network.state_dict().values()]
        fingerprint += [hashlib.sha256(t.cpu().contiguous().numpy()).hexdigest() for t in tensors]
        history = _restore(checkpoint, fingerprint, parts, h.epochs)

    for epoch in range(len(history), h.epochs):
        started = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        loss_sum = correct = done = 0
        network.train()
        with _isolated(_epoch_seed(seed, epoch), device):
            for batch in _epoch_batches(n, batch_size, device):  # (B,) int64, indices
                with _autocast(device, precision):
                    loss, hits = forward(images[batch], labels[batch])
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

        if checkpoint:
            states = [part.state_dict() for part in parts]
            records = [tuple(record) for record in history]
            _save({"fingerprint": fingerprint, "history": records, "states": states}, checkpoint)
        if on_epoch:
            on_epoch(history[-1])
    return history


def _restore(path, fingerprint: list, parts: list, epochs: int) -> list[EpochRecord]:
    """Load the parts' states from a checkpoint, if there is one; return its history."""
    if not Path(path).exists():
        return []
    with _one_line_error(f"remove {path}: training cannot continue from it", CheckpointError):
        content = _load(path)
        if content["fingerprint"] != fingerprint:
            raise ValueError("it is of other images, labels, starting weights or settings")
        history = [EpochRecord(*record) for record in content["history"]]
        if len(history) > epochs:
            raise ValueError(f"it has {len(history)} epochs")
        for part, state in zip(parts, content["states"], strict=True):
            part.load_state_dict(state)
        return history


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed that a resumed training finds again."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _epoch_batches(n: int, batch_size: int, device: torch.device) -> list[Tensor]:
    """Return the indices 0 to n - 1 in random order, by batches; the last one has what is left."""
    batches = list(torch.randperm(n).to(device).split(batch_size))
    if len(batches[-1]) == 1 < batch_size:  # BatchNorm cannot normalise a single image
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def learning_rates(hyperparameters: Hyperparameters, valid_losses: Iterable[float]) -> list[float]:
    """Return the learning rate of each epoch of a training with these validation losses."""
    h = hyperparameters
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=h.learning_rate)
    scheduler = ReduceLROnPlateau(optimizer, factor=h.factor, patience=h.patience)
    rates = []
    for loss in valid_losses:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    return rates


COMPILE = ("auto", "on", "off")


def resolve_compile(compile, device, network_config, num_images, epochs) -> str:
    """Return whether `torch.compile` fuses the training step: ``on`` or ``off``.

    It changes nothing beyond rounding. It takes 10 to 30 seconds and saves a third of the time on
    two Xeon cores. So on a CPU ``auto`` is on from 3e12 forward multiply-accumulates of a whole
    training, some minutes there. On a GPU it is off, because nobody has tried it on one.
    """
    _check_choice("compile", compile, COMPILE)
    if compile != "auto":
        return compile
    macs = sum(row[3] for row in layer_table(build(network_config)))
    return "on" if device.type == "cpu" and macs * num_images * epochs > 3e12 else "off"


def _training_forward(network, images, labels, precision, compile):
    """Return the function from a batch to (loss, number of hits), and whether it is compiled.

    `images` and `labels` are one batch. The network gets the memory format that suits it.
    """

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(_as_input(images))  # (B, num_classes)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    compiled = _compiled(forward, network, images, labels, precision) if compile == "on" else None
    # Convolutions are fastest in channels-last everywhere, but PyTorch's own BatchNorm takes five
    # times as long backwards in it where a CPU's threads share the work (two Xeon cores).
    contiguous = not compiled and images.device.type == "cpu" and torch.get_num_threads() > 1
    network.to(memory_format=torch.contiguous_format if contiguous else torch.channels_last)
    return compiled or forward, compiled is not None


def _compiled(forward, network, images, labels, precision) -> Callable | None:
    """Compile the forward pass for such a batch; return None, with a warning, where that fails."""
    # With PyTorch's own random numbers: dropout draws what it would draw uncompiled.
    options = {"fallback_random": True, "triton.cudagraphs": images.device.type == "cuda"}
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if is_avx512 and precision == "fp32" and network.config["num_features"] % 16:
        # The loops run along the channels. 8 of them fill half a register of 512 bits, which is
        # loaded masked then: a step of the poster's network takes 1.4 times as long (Xeon).
        options["cpp.simdlen"] = 256
    torch.compiler.reset()  # else PyTorch stops compiling after some trainings in one process
    network.to(memory_format=torch.channels_last)
    before = copy.deepcopy(network.state_dict())
    try:  # A step that changes nothing, so that what can fail fails here.
        with warnings.catch_warnings(action="ignore"), _isolated(0, images.device):
            compiled = torch.compile(forward, dynamic=False, options=options)
            with _autocast(images.device, precision):
                loss, _ = compiled(images, labels)
            loss.backward()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"torch.compile fails ({reason}); training runs uncompiled", stacklevel=4)
        return None
    finally:
        network.load_state_dict(before)
    # Another size would be compiled anew: the last batch runs as it is.
    return lambda x, y: compiled(x, y) if len(x) == len(images) else forward(x, y)


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
    precision = resolve_precision(precision, device)
    images, labels = _to_device(network.config, device, images, labels)
    loss_sum = correct = done = 0
    for logits in _logits(network.to(device), images, precision):
        target = labels[done : done + len(logits)]
        # Python's sum is in float64, which not every device has. Reading a number stalls a GPU,
        # but only once for 4096 images.
        loss_sum += nn.functional.cross_entropy(logits, target, reduction="sum").item()
        correct += (logits.argmax(1) == target).sum().item()
        done += len(logits)
    return loss_sum / done, correct / done


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


# ---- device, precision, data ---------------------------------------------------------------------


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device; ``auto`` is the first CUDA GPU if there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _one_line_error(f"no device {str(device)!r} here"):
        device = torch.device(device)
        torch.empty(1, device=device)
    return device


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *_DTYPES)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``.

    ``auto`` is fp16 on CUDA (the poster's Apex O1), bf16 on a CPU with instructions for it, else
    fp32. A CPU that has to emulate bf16 is ten times slower with it.
    """
    _check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp16"
    has = torch.cpu.get_capabilities()
    has_bf16 = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    # The cache of cast weights is emptied where the outermost autocast ends. Inside another one,
    # as in `_isolated`, it would outlive a step, and the next one would compute with old weights.
    return torch.autocast(device.type, _DTYPES[precision], precision != "fp32", cache_enabled=False)


# Threads share PyTorch's random state: one at a time may draw from it.
_RANDOM_STATE = threading.RLock()


@contextlib.contextmanager
def _isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch and disable the caller's autocast; afterwards restore both."""
    gpus = [device] if device.type == "cuda" else []
    with _RANDOM_STATE, torch.random.fork_rng(gpus), torch.autocast(device.type, enabled=False):
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
    """Return what results depend on beside the settings: PyTorch, device, threads."""
    device = resolve_device(device)
    cpu_name = torch.cpu.get_capabilities().get("cpu_name", "")
    return {
        "torch": torch.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _as_tensor(values) -> Tensor:
    if isinstance(values, Tensor):
        return values
    with _one_line_error("images and labels must be arrays of integers"):
        array = np.asarray(values)
        if array.dtype == object:  # a column of a table, for example
            array = np.array(array.tolist())
        # PyTorch takes no negative strides, no foreign byte order and no read-only memory.
        return torch.as_tensor(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _to_device(config, device, images, labels=None) -> tuple[Tensor, Tensor | None]:
    """Check that images and labels fit the network; return both on the device, images as uint8."""
    size, channels, classes = config["image_size"], config["in_channels"], config["num_classes"]
    shape = (size, size) if channels == 1 else (size, size, channels)
    images = _as_tensor(images)
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        given = f"{images.dtype} of {tuple(images.shape)}"
        raise ModelError(f"images must be uint8, one or more of {shape}, not {given}")
    if labels is None:
        return images.to(device), None
    labels = _as_tensor(labels)
    is_integer = labels.dtype != torch.bool and torch.can_cast(labels.dtype, torch.int64)
    fits = is_integer and labels.shape == images.shape[:1]
    if not fits or labels.long().min() < 0 or labels.long().max() >= classes:
        raise ModelError(f"labels must be {len(images)} integers from 0 to {classes - 1}")
    return images.to(device), labels.long().to(device)


def _as_input(images: Tensor) -> Tensor:  # (B, H, W) or (B, H, W, C) uint8
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.float().div_(255)  # (B, C, H, W); the poster's whole preprocessing


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ModelError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


@contextlib.contextmanager
def _one_line_error(what: str, kind: type[ModelError] = ModelError) -> Iterator[None]:
    """Raise `kind` instead of any error: damaged files raise more types than anyone can list."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise kind(f"{what} ({reason})") from None


# ---- files ---------------------------------------------------------------------------------------


def save_network(network: PosterCNN, path: str | os.PathLike, pixels: str | None = None) -> None:
    """Write weights, `config` and `pixels` to `path`; the same network is the same bytes.

    `pixels` is "raw", or "stretched" if each training image's darkest value was moved to 0 and its
    brightest to 255. By default it is the network's own, which `load_network` sets.
    """
    pixels = pixels or network.pixels
    _check_choice("pixels", pixels, ("raw", "stretched"))
    _save({"config": network.config, "pixels": pixels, "network": network.state_dict()}, path)


def load_network(path: str | os.PathLike) -> PosterCNN:
    """Return a network that `save_network` wrote, on the CPU; no code in the file is run."""
    with _one_line_error(f"{path} is no saved network"):
        content = _load(path)
        network = build(content["config"])
        network.load_state_dict(content["network"])
        network.pixels = content["pixels"]
        return network


def _save(content: dict[str, Any], path: str | os.PathLike) -> None:
    # Not straight to the file: torch.save would write its name into it, and hide why it fails.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _write(buffer.getvalue(), path)


def _write(content: bytes, path: str | os.PathLike) -> None:
    """Write a file that is there complete or not at all."""
    path = Path(path).resolve()  # a link stays, the file that it points to is replaced
    # A name of its own: workers that outlive a killed search may write the same checkpoint.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(path: str | os.PathLike) -> None:
    """Raise an error before the work if `_write` would fail after it."""
    path = Path(path)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ModelError(f"cannot write {path}: no such folder, or not a regular file")


def _load(path: str | os.PathLike) -> Any:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load does not compare the archive's checksums
            raise ValueError("it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- command line --------------------------------------------------------------------------------


def _layers_text(network: PosterCNN) -> str:
    rows = layer_table(network)
    lines = [
        f"{type(network).__name__}: {sum(row[2] for row in rows):,} parameters, "
        f"{sum(row[3] for row in rows):,} multiply-accumulates (MACs) per image",
        f"{'layer':<12}{'output':>10}{'parameters':>12}{'MACs':>10}",
    ]
    for name, shape, parameters, macs in rows:
        lines.append(f"{name:<12}{'x'.join(map(str, shape)):>10}{parameters:>12,}{macs:>10,}")
    return "\n".join(lines)


def _apply(model: str, images_path: str, output: str, device: str) -> str:
    """Write the classes and softmax probabilities of unlabelled images; return what was done."""
    _check_writable(output)
    network = load_network(model)
    with _one_line_error(f"{images_path} is no npz of test_images or images"):
        archive = np.load(images_path, allow_pickle=False)
        images = archive["test_images" if "test_images" in archive else "images"]
    images, _ = _to_device(network.config, resolve_device(device), images)
    if network.pixels == "stretched":
        images = _stretch(images)
    logits = predict(network, images, device=device).double()  # (N, num_classes)
    columns = [np.arange(len(logits)), logits.argmax(1), logits.softmax(1)]
    header = ",".join(["id,predicted", *(f"probability_{k}" for k in range(logits.shape[1]))])
    text = io.BytesIO()
    np.savetxt(text, np.column_stack(columns), "%.9g", ",", header=header, comments="")
    _write(text.getvalue(), output)
    return f"wrote {output}: {len(images):,} images"


def _stretch(images: Tensor) -> Tensor:  # (N, ...) uint8
    """Move each image's darkest value to 0 and its brightest to 255, flat images excepted."""
    values = images.flatten(1).int()  # (N, H * W * C)
    low, high = values.aminmax(dim=1, keepdim=True)  # (N, 1)
    stretched = (values - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched, values).view_as(images).to(torch.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a network's layers, or apply a saved network; 0 done, 2 refused, 130 interrupted."""
    parser = argparse.ArgumentParser("model.py", allow_abbrev=False)
    parser.add_argument("--network", choices=NETWORKS, default="PosterCNN", help="to print")
    commands = parser.add_subparsers(dest="command")
    apply = commands.add_parser("apply", help="to images, into a CSV", allow_abbrev=False)
    apply.add_argument("model", metavar="MODEL.pt", help="written by save_network")
    apply.add_argument("images", metavar="IMAGES.npz", help="with test_images or images, uint8")
    apply.add_argument("output", metavar="OUT.csv", help="id, predicted class, probabilities")
    apply.add_argument("--device", default="auto", help="default: a GPU if there is one")
    options = parser.parse_args(argv)
    with contextlib.suppress(AttributeError):  # stdout is closed, or a test's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.command == "apply":
            text = _apply(options.model, options.images, options.output, options.device)
        else:
            text = _layers_text(NETWORKS[options.network]())
        print(text, flush=True)
    except (ModelError, OSError) as error:
        if isinstance(error, OSError):  # perhaps of stdout, which Python flushes at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            return 0
        print(f"model.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
