"""model.py against exact figures and hand-written oracles. CPU only; nothing is timed."""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import pickle
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import model

TINY = {"num_features": 2, "num_classes": 2, "image_size": 8}
QUICK = replace(model.POSTER, num_features=2, batch_size=4, epochs=2)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (size, channels, classes)
    for size in (8, 9, 28, 33, 64)
    for channels, classes in ((1, 2), (3, 10))
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a network only gets slower by sharing out its work, most of all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed=0, **changes):
    return model.build(TINY | changes, seed)


def images(n=9, shape=(8, 8), seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def labels(n=9, classes=2):
    return np.arange(n) % classes


def fit(network, hyperparameters=QUICK, n=9, **options):
    """Train on n random images, validate on the first six of them."""
    x, y = images(n, (network.config["image_size"],) * 2), labels(n)
    options = {"device": "cpu", "precision": "fp32"} | options
    return model.fit(network, x, y, x[:6], y[:6], hyperparameters, **options)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first, second):
    """Bit for bit, NaN included."""
    assert first.keys() == second.keys()
    return all(
        first[k].dtype == second[k].dtype
        and first[k].numpy().tobytes() == second[k].numpy().tobytes()
        for k in first
    )


def untimed(history):
    return [record._replace(seconds=0.0) for record in history]


def one_line(error):
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---------------------------------------------------------------------------------- networks

CONV = ["Conv2d", "BatchNorm2d", "ReLU"]
POOL = [*CONV, "AvgPool2d"]
DENSE = ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
# shared/poster/FACTS.md, "Network": the figure's rows, and whether average pooling ends them.
POSTER_ROWS = [
    (CONV, (8, 28, 28)),
    (CONV, (8, 28, 28)),
    (CONV, (8, 28, 28)),
    (POOL, (16, 14, 14)),
    (CONV, (16, 14, 14)),
    (POOL, (32, 7, 7)),
    (POOL, (64, 3, 3)),
    (CONV, (128, 3, 3)),
    (["Flatten"], (1152,)),
    (["Linear", "ReLU", "Dropout"], (128,)),
    (["Linear"], (8,)),
]
WIDTHS = {"PosterCNN": (1, 1, 1, 2, 2, 4, 8, 16), "NephNet2D": (1, 2, 4, 8, 16)}
POOLED = {"PosterCNN": (4, 6, 7), "NephNet2D": (2, 3, 4)}  # counted from 1


def layers(network):
    """(name, module, output shape) of every layer in the order it is applied."""
    seen = []
    hooks = [
        m.register_forward_hook(
            lambda m, _, out: seen.append((type(m).__name__, m, tuple(out.shape[1:])))
        )
        for m in network.modules()
        if not list(m.children())
    ]
    size = network.config["image_size"]
    with torch.no_grad():
        network.eval()(torch.rand(2, network.config["in_channels"], size, size))
    for hook in hooks:
        hook.remove()
    return seen


def test_poster_network_is_the_figure():
    seen = layers(model.PosterCNN())
    assert [name for name, *_ in seen] == list(itertools.chain(*(r for r, _ in POSTER_ROWS)))
    ends = itertools.accumulate(len(names) for names, _ in POSTER_ROWS)
    assert [seen[end - 1][2] for end in ends] == [shape for _, shape in POSTER_ROWS]
    assert sum(p.numel() for p in model.PosterCNN().parameters()) == 250_904
    assert model.PosterCNN().config == {
        "network": "PosterCNN",
        "num_features": 8,
        "num_classes": 8,
        "in_channels": 1,
        "image_size": 28,
        "dropout": 0.5,
    }
    assert model.NephNet2D().config["num_features"] == 32


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(("size", "channels", "classes"), SHAPES)
def test_layers_of_other_sizes(name, size, channels, classes):
    f = 3
    config = {
        "num_features": f,
        "num_classes": classes,
        "in_channels": channels,
        "image_size": size,
        "dropout": 0.25,
    }
    network = model.NETWORKS[name](**config)
    assert network.config == {"network": name, **config}
    expected, parameters, macs, inputs, side = [], [], [], channels, size
    for i, multiple in enumerate(WIDTHS[name], 1):
        out = multiple * f
        expected += [(layer, (out, side, side)) for layer in CONV]
        parameters += [9 * inputs * out + out, 2 * out, 0]
        macs += [9 * inputs * out * side**2, 0, 0]
        if i in POOLED[name]:
            side //= 2
            expected.append(("AvgPool2d", (out, side, side)))
            parameters.append(0)
            macs.append(0)
        inputs = out
    flat, hidden = inputs * side**2, 16 * f
    expected += zip(DENSE, [(flat,), *[(hidden,)] * 3, (classes,)], strict=True)
    parameters += [0, flat * hidden + hidden, 0, 0, hidden * classes + classes]
    macs += [0, flat * hidden, 0, 0, hidden * classes]
    seen = layers(network)
    assert [(layer, shape) for layer, _, shape in seen] == expected
    network.train()
    rows = model.layer_table(network)
    assert network.training
    assert rows == [(*row, p, m) for row, p, m in zip(expected, parameters, macs, strict=True)]
    assert sum(p.numel() for p in network.parameters()) == sum(parameters)
    for _, module, _ in seen:
        if isinstance(module, torch.nn.Conv2d):
            assert (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            assert module.bias is not None
        if isinstance(module, torch.nn.AvgPool2d):
            assert module.kernel_size == 2
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.25


@pytest.mark.parametrize("name", WIDTHS)
def test_forward_is_the_layers_written_out(name):
    network = model.build({"network": name, "num_features": 2, "in_channels": 3}, seed=1).eval()
    g = torch.Generator().manual_seed(2)
    state = network.state_dict()
    for key, tensor in state.items():  # BatchNorm's own start would hide what it does
        if key.startswith("features") and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    x = torch.rand(2, 3, 28, 28, generator=g)
    groups = {}
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            groups.setdefault(key.rpartition(".")[0], []).append(tensor)
    groups = list(groups.values())
    *features, (w1, b1), (w2, b2) = groups
    out = x
    for i in range(len(WIDTHS[name])):
        (w, b), (gamma, beta, mean, var) = features[2 * i : 2 * i + 2]
        columns = functional.unfold(out, 3, padding=1)
        out = (w.flatten(1) @ columns + b[:, None]).view(2, -1, *out.shape[2:])
        shape = (1, -1, 1, 1)
        out = (out - mean.view(shape)) / (var + 1e-5).sqrt().view(shape)
        out = (out * gamma.view(shape) + beta.view(shape)).clamp(min=0)
        if i + 1 in POOLED[name]:
            h = out.shape[2] // 2
            out = out[..., : 2 * h, : 2 * h].reshape(2, -1, h, 2, h, 2).mean((3, 5))
    logits = (out.flatten(1) @ w1.T + b1).clamp(min=0) @ w2.T + b2
    with torch.no_grad():
        torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-4)


def test_poster_network_starts_as_pytorch_does():
    for module in model.build({}).modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < module.weight.abs().max() <= bound
            assert 0.5 * bound < module.bias.abs().max() <= bound


def test_nephnet_starts_kaiming_normal_with_standard_normal_biases():
    biases = []
    for module in model.build({"network": "NephNet2D"}).modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            w = module.weight.detach()
            sigma = math.sqrt(2 / w[0].numel())
            assert w.std().item() == pytest.approx(sigma, rel=0.12)
            assert abs(w.mean().item()) < 5 * sigma / math.sqrt(w.numel())
            beyond = (w.abs() > 2 * sigma).float().mean().item()
            assert 0.02 < beyond < 0.08  # 4.55 % of a normal, nothing of a uniform distribution
            biases.append(module.bias.detach())
    biases = torch.cat(biases)
    assert len(biases) == 32 * 31 + 512 + 8
    assert abs(biases.mean()) < 0.1
    assert biases.std().item() == pytest.approx(1, abs=0.08)
    assert 0.02 < (biases.abs() > 2).float().mean() < 0.08


@pytest.mark.parametrize("network", WIDTHS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 7},
        {"num_features": 0},
        {"num_classes": 1},
        {"in_channels": 0},
        {"num_features": 2.0},
        {"num_features": True},
        {"num_classes": "8"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"dropout": "0.5"},
        {"depth": 3},
        {"num_features": 10**9},
        {"num_features": 10**30},
    ],
)
def test_networks_refuse_what_they_cannot_be(network, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        model.build({"network": network} | wrong)
    one_line(error)


def test_build_refuses_an_unknown_network():
    with pytest.raises(ValueError, match=r"'ResNet'.*PosterCNN, NephNet2D") as error:
        model.build({"network": "ResNet"})
    one_line(error)


# --------------------------------------------------------------------------- hyperparameters


def test_hyperparameters_are_the_posters():
    # FACTS.md, "Hyperparameters": the printed column, then the authors' run.
    assert asdict(model.POSTER) == {
        "num_features": 8,
        "batch_size": 128,
        "learning_rate": 0.025,
        "weight_decay": 0.004,
        "momentum": 0.8,
        "nesterov": True,
        "dropout": 0.5,
        "patience": 5,
        "factor": 0.29,
        "epochs": 100,
    }
    assert model.Hyperparameters() == model.POSTER
    changed = {"learning_rate": 0.025336627337952815, "weight_decay": 0.0046684446208345}
    assert asdict(model.AUTHORS) == asdict(model.POSTER) | changed


BAD_VALUES = {
    "num_features": (0, -1, 1025, 8.0, True, "8", None, math.nan),
    "batch_size": (0, -1, 128.0, True, math.inf),
    "learning_rate": (0, 0.0, -0.1, math.nan, math.inf, -math.inf, True, "0.1", None),
    "weight_decay": (-1e-9, math.nan, math.inf, False),
    "momentum": (-0.1, 1, 1.0, 1.5, math.nan, True),
    "nesterov": (1, 0, None, "yes"),
    "dropout": (-0.1, 1, 1.0, math.nan, False),
    "patience": (-1, 5.0, True),
    "factor": (0, 0.0, 1, 1.0, -0.29, math.nan, True),
    "epochs": (0, -1, 1.0, True),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_hyperparameters_refuse(name, value):
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        model.Hyperparameters(**{name: value})
    one_line(error)


def test_hyperparameters_take_ints_for_floats_and_their_limits():
    taken = model.Hyperparameters(
        num_features=1024, batch_size=1, learning_rate=1, weight_decay=0, dropout=0, patience=0
    )
    for name, value in {"learning_rate": 1.0, "weight_decay": 0.0, "dropout": 0.0}.items():
        assert getattr(taken, name) == value
        assert type(getattr(taken, name)) is float
    assert model.Hyperparameters(momentum=0, nesterov=False).momentum == 0
    with pytest.raises(ValueError, match="nesterov"):
        model.Hyperparameters(momentum=0)
    with pytest.raises(FrozenInstanceError):
        model.POSTER.epochs = 5


# ---------------------------------------------------------------------- devices and precision


def test_precision_is_what_pays(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert model.resolve_precision("auto", cuda) == "fp16"
    for flags, expected in [
        ({}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert model.resolve_precision("auto", cpu) == expected
        assert model.resolve_precision("auto", cuda) == "fp16"
    for precision, device in itertools.product(PRECISIONS, (cpu, cuda)):
        assert model.resolve_precision(precision, device) == precision
    with pytest.raises(ValueError, match=r"'fp8'.*auto, fp32, bf16, fp16") as error:
        model.resolve_precision("fp8", cpu)
    one_line(error)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "", None])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=r"^no device ") as error:
        model.resolve_device(device)
    one_line(error)


@pytest.mark.parametrize("there", [False, True])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, there):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or torch.ones(1))
    expected = torch.device("cuda" if there else "cpu")
    assert [model.resolve_device(), model.resolve_device("cpu")] == [expected, torch.device("cpu")]
    assert asked == [expected, torch.device("cpu")]


def test_environment():
    told = model.environment("cpu")
    assert told["torch"] == torch.__version__
    assert told["device"] == "cpu"
    assert told["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns_an_easy_task(precision):
    """Dark against bright images; the convolutions run in the precision asked for, and no other."""
    x = np.repeat(np.array([20, 220] * 4, np.uint8), 64).reshape(8, 8, 8)
    y = labels(8)
    hyperparameters = replace(QUICK, epochs=8, dropout=0, learning_rate=0.1)
    histories = []
    for outside in (
        contextlib.nullcontext(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", torch.float16),
    ):
        network, seen = tiny(dropout=0.0, num_features=4), set()
        network.features[0].register_forward_hook(
            lambda module, _, out, seen=seen: seen.add((module.training, out.dtype))
        )
        with outside:
            history = model.fit(
                network, x, y, x, y, hyperparameters, device="cpu", precision=precision
            )
        assert seen == {(True, PRECISIONS[precision]), (False, PRECISIONS[precision])}
        assert all(t.isfinite().all() for t in network.state_dict().values())
        assert all(p.dtype == torch.float32 for p in network.parameters())
        histories.append(untimed(history))
    assert [r.epoch for r in history] == list(range(8))
    assert all(math.isfinite(value) for record in history for value in record)
    assert history[-1].train_loss < history[0].train_loss / 2
    assert history[-1].train_accuracy == 1
    assert histories[1:] == histories[:1] * 3


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling(tmp_path, overflow):
    """fp16: a step that overflows is skipped and halves the scale, any other is the plain step."""
    path = tmp_path / "training.pt"
    hyperparameters = replace(QUICK, epochs=1, dropout=0, batch_size=9)
    networks = {precision: tiny(dropout=0.0) for precision in ("fp32", "fp16")}
    if overflow:
        for network in networks.values():
            network.classifier[1].bias.data.fill_(1000)  # so the next layer's gradient is above 1
    before = {k: v.detach().clone() for k, v in networks["fp16"].named_parameters()}
    for precision, network in networks.items():
        fit(network, hyperparameters, precision=precision, checkpoint=path)
        content = torch.load(path, weights_only=True)
        path.unlink()
        assert (content["scaler"] == {}) == (precision == "fp32")
    parameters = {name: dict(n.named_parameters()) for name, n in networks.items()}
    assert content["scaler"]["scale"] == (2.0**15 if overflow else 2.0**16)
    assert content["scaler"]["_growth_tracker"] == (0 if overflow else 1)
    for key, start in before.items():
        after = parameters["fp16"][key].detach()
        if overflow:
            assert torch.equal(after, start)
            continue
        plain = parameters["fp32"][key].detach()
        torch.testing.assert_close(after, plain, rtol=0, atol=1e-3)
        assert (plain - start).abs().max() > 2e-3 or not key.endswith("weight") or key[0] == "f"
    assert any(not torch.equal(parameters["fp32"][k], start) for k, start in before.items())


def test_the_fused_optimizer_after_an_overflow_in_the_first_step(monkeypatch):
    """It is a GPU's, but PyTorch has one for the CPU too, which skips a step in the same way."""
    sgd, networks = torch.optim.SGD, []
    hyperparameters = replace(QUICK, epochs=14, dropout=0, batch_size=9, learning_rate=1e-4)
    for fused in (False, True):
        networks.append(tiny(dropout=0.0))
        networks[-1].classifier[1].bias.data.fill_(1000)
        monkeypatch.setattr(
            torch.optim, "SGD", lambda *a, on=fused, **k: sgd(*a, **{**k, "fused": on})
        )
        torch.use_deterministic_algorithms(True)  # which makes memory that was never set NaN
        try:
            fit(networks[-1], hyperparameters, precision="fp16")
        finally:
            torch.use_deterministic_algorithms(False)
    moved = networks[1].classifier[4].weight - tiny(dropout=0.0).classifier[4].weight
    assert moved.abs().max() > 1e-3, "every step has overflown"
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------- training


def documented_order(seed, epoch, n):
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)


@pytest.mark.parametrize(
    ("batch_size", "changes"),
    [
        (7, {}),
        (4, {}),
        (3, {}),  # 3 and 4: an image left over joins the last batch
        (4, {"nesterov": False}),
        (4, {"momentum": 0.0, "nesterov": False}),
        (4, {"weight_decay": 0.0}),
    ],
)
def test_training_is_sgd_written_out(monkeypatch, batch_size, changes):
    """Two epochs without torch.optim: v <- mv + g + dw, w <- w - lr (g + dw + mv)."""
    h = replace(
        QUICK, batch_size=batch_size, dropout=0, learning_rate=0.02, weight_decay=0.05, momentum=0.7
    )
    h = replace(h, **changes)
    network, oracle = tiny(dropout=0.0), tiny(dropout=0.0)
    monkeypatch.setattr(model, "_evaluation_batch", lambda _: 4)  # 6 validation images: 4 and 2
    history = fit(network, h, n=7, seed=5)
    x = torch.tensor(images(7)).unsqueeze(1).double() / 255
    y = torch.tensor(labels(7))
    oracle.double()
    velocity = [torch.zeros_like(p) for p in oracle.parameters()]
    sizes = {7: [7], 4: [4, 3], 3: [3, 4]}[batch_size]
    for epoch in range(2):
        losses, correct = [], 0
        oracle.train()
        for batch in documented_order(5, epoch, 7).split(sizes):
            logits = oracle(x[batch])
            loss = -logits.log_softmax(1)[range(len(batch)), y[batch]].sum() / len(batch)
            losses += [loss.item()] * len(batch)
            correct += (logits.argmax(1) == y[batch]).sum().item()
            gradients = torch.autograd.grad(loss, list(oracle.parameters()))
            with torch.no_grad():
                for w, v, g in zip(oracle.parameters(), velocity, gradients, strict=True):
                    d = g + h.weight_decay * w
                    v.copy_(h.momentum * v + d)
                    w -= h.learning_rate * (d + h.momentum * v if h.nesterov else v)
        with torch.no_grad():
            logits = oracle.eval()(x[:6])
        valid_loss = -logits.log_softmax(1)[range(6), y[:6]].mean().item()
        record = history[epoch]
        assert record.epoch == epoch
        assert record.learning_rate == h.learning_rate
        assert record.train_loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert record.valid_loss == pytest.approx(valid_loss, rel=1e-4)
        assert record.train_accuracy == correct / 7
        assert record.valid_accuracy == (logits.argmax(1) == y[:6]).sum().item() / 6
        assert record.seconds > 0
    for mine, theirs in zip(network.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=2e-5)


# The validation losses of the poster's own run, epochs 0 to 99: the column valid_loss of
# shared/poster/curves.csv, which comes from the authors' repository dw-dengwei/PML_coursework.
# fmt: off
POSTER_VALID_LOSSES = [
    1.323265, 1.258932, 1.293177, 1.163335, 1.186656, 1.151522, 1.220633, 1.117434, 1.606653,
    1.101050, 1.532899, 1.390226, 1.158890, 1.183084, 1.150091, 1.200036, 1.051273, 1.019847,
    1.046071, 1.235642, 1.023128, 1.077602, 1.045424, 1.088897, 0.982636, 1.080459, 1.009809,
    0.986563, 0.988421, 1.029972, 1.055193, 0.961695, 0.971009, 0.973231, 0.992266, 0.983815,
    0.975534, 0.996677, 0.978565, 0.978759, 0.980932, 0.983615, 0.991644, 0.985840, 0.984904,
    0.986718, 0.984983, 0.987274, 0.988375, 0.991313, 0.988619, 0.989167, 0.989392, 0.990060,
    0.988533, 0.989912, 0.989522, 0.989203, 0.990193, 0.991705, 0.989210, 0.991980, 0.990522,
    0.991733, 0.990964, 0.991068, 0.991744, 0.990154, 0.990451, 0.989746, 0.990580, 0.990829,
    0.990137, 0.989576, 0.989909, 0.991212, 0.988487, 0.990505, 0.991259, 0.991716, 0.991851,
    0.991818, 0.989569, 0.990989, 0.990626, 0.991040, 0.991488, 0.990706, 0.990554, 0.991208,
    0.989692, 0.990806, 0.991401, 0.990541, 0.990057, 0.989864, 0.991243, 0.989949, 0.990547,
    0.991509,
]
# fmt: on
# FACTS.md has those that show in the curves, 16 to 44. Once the rate stands still, so does the
# loss, and every sixth epoch without a better one lowers it.
POSTER_DROPS = [16, 24, 31, 38, 44, 50, 56, 62, 68, 74, 80, 86]


def test_learning_rate_drops_where_the_posters_did(monkeypatch):
    losses = iter(POSTER_VALID_LOSSES)
    monkeypatch.setattr(model, "_evaluate", lambda *_: (next(losses), 0.5))
    history = fit(tiny(), replace(model.POSTER, batch_size=4), n=4)
    assert [record.valid_loss for record in history] == POSTER_VALID_LOSSES
    rates = [record.learning_rate for record in history]
    assert [i for i in range(1, 100) if rates[i] != rates[i - 1]] == POSTER_DROPS
    for i, rate in enumerate(rates):
        drops = sum(epoch <= i for epoch in POSTER_DROPS)
        assert rate == pytest.approx(0.025 * 0.29**drops, rel=1e-12)


@pytest.mark.parametrize(("step", "drops"), [(2e-4, False), (5e-5, True)])
def test_a_loss_is_better_from_a_relative_1e_4(monkeypatch, step, drops):
    losses = iter([10.0, 10 * (1 - step), 10 * (1 - step) ** 2])
    monkeypatch.setattr(model, "_evaluate", lambda *_: (next(losses), 0.5))
    history = fit(tiny(), replace(QUICK, epochs=3, patience=0))
    assert (history[2].learning_rate < history[0].learning_rate) == drops


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (5, 4, [5]),
        (3, 128, [3]),
        (2, 1, [1, 1]),
    ],
)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_every_image_is_used_once_an_epoch(n, batch_size, sizes, channels):
    side = 16 if batch_size == 1 else 8
    shape = (side, side) if channels is None else (side, side, channels)
    x, y = images(n, shape), labels(n)
    network = tiny(image_size=side, in_channels=channels or 1)
    fed, steps = [], []
    network.register_forward_pre_hook(
        lambda module, inputs: fed.append(inputs[0]) if module.training else None
    )
    model.fit(
        network,
        x,
        y,
        x,
        y,
        replace(QUICK, batch_size=batch_size),
        device="cpu",
        precision="fp32",
        on_batch=lambda *step: steps.append(step),
    )
    assert [len(batch) for batch in fed] == sizes * 2
    done = list(itertools.accumulate(sizes))
    assert steps == [(epoch, count) for epoch in range(2) for count in done]
    # Divided by 255, channels first, and nothing else.
    planes = x[:, None] if channels is None else np.moveaxis(x, 3, 1)
    expected = planes.astype(np.float32) / np.float32(255)
    for epoch in range(2):
        part = torch.cat(fed[epoch * len(sizes) : (epoch + 1) * len(sizes)])
        assert np.array_equal(part.numpy(), expected[documented_order(0, epoch, n)])


def test_a_single_image_needs_pixels_for_batchnorm():
    for options in ({"n": 1}, {"n": 3, "hyperparameters": replace(QUICK, batch_size=1)}):
        with pytest.raises(ValueError, match="at least 2 images a batch") as error:
            fit(tiny(), **options)
        one_line(error)
    x, y = images(1, (16, 16)), labels(1)
    history = model.fit(tiny(image_size=16), x, y, x, y, QUICK, device="cpu", precision="fp32")
    assert len(history) == 2
    assert model.predict(tiny(), images(1), device="cpu").shape == (1, 2)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_arrays_and_tensors_are_the_same():
    x, y = images(), labels()
    results = []
    for a, b in [
        (x, y),
        (torch.tensor(x), torch.tensor(y)),
        (read_only(x), read_only(y.astype(np.uint8))),
        (np.asfortranarray(x)[..., None], y.astype(np.uint16)),
    ]:
        network = tiny(num_features=8)
        history = model.fit(network, a, b, a, b, QUICK, device="cpu", precision="fp32")
        logits = model.predict(network, a, device="cpu")
        results.append((untimed(history), weights(network), {"logits": logits}))
    assert not np.array_equal(results[0][2]["logits"][0], results[0][2]["logits"][1])
    for history, state, logits in results[1:]:
        assert history == results[0][0]
        assert same(state, results[0][1])
        assert same(logits, results[0][2])


@pytest.mark.parametrize(
    ("wrong", "channels"),
    [
        (images().astype(np.float32), 1),
        (images().astype(np.int64), 1),
        (images(shape=(8, 9)), 1),
        (images(shape=(16, 16)), 1),
        (images(shape=(8, 8, 3)), 1),
        (images(shape=(1, 8, 8)), 1),
        (images(), 3),
        (images(shape=(3, 8, 8)), 3),
        (images(shape=(8, 8, 1)), 3),
        (images(shape=(8,)), 1),
        (images()[0], 1),
        (images(0), 1),
        (np.uint8(3), 1),
        (np.array(["a"]), 1),
        (None, 1),
    ],
)
def test_images_that_do_not_fit(wrong, channels):
    good = images(shape=(8, 8, channels))
    network = tiny(in_channels=channels)
    before = weights(network)
    for train, valid in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError, match="images") as error:
            model.fit(network, train, labels(), valid, labels(), QUICK, device="cpu")
        one_line(error)
    with pytest.raises(ValueError, match="images") as error:
        model.predict(network, wrong, device="cpu")
    one_line(error)
    assert same(weights(network), before)


@pytest.mark.parametrize(
    "wrong",
    [
        labels(8),
        labels(10),
        labels()[:, None],
        labels().astype(np.float64),
        labels().astype(np.complex128),
        labels() - 1,
        labels() + 1,
        np.full(9, 2**64 - 1, np.uint64),
        np.array(list("aabbccdde")),
        None,
        0,
    ],
)
def test_labels_that_do_not_fit(wrong):
    for train, valid in ((wrong, labels()), (labels(), wrong)):
        with pytest.raises(ValueError, match="labels") as error:
            model.fit(tiny(), images(), train, images(), valid, QUICK, device="cpu")
        one_line(error)


def test_the_seed_decides_everything():
    runs = []
    for start, seed, noise in [(0, 0, 1), (0, 0, 2), (1, 0, 1), (0, 1, 1)]:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        network = tiny(start)
        initial = weights(network)
        history = fit(network, seed=seed, precision="bf16")
        model.predict(network, images(), device="cpu")
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((initial, weights(network), untimed(history)))
    first, again, other_start, other_seed = runs
    assert same(first[0], again[0])
    assert same(first[1], again[1])
    assert first[2] == again[2]
    assert same(first[0], other_seed[0])
    assert not same(first[0], other_start[0])
    assert not same(first[1], other_seed[1])
    assert not same(first[1], first[0])


def test_the_seed_decides_dropout():
    """One batch of all images: the order plays no part, so only dropout can differ."""
    one = replace(QUICK, batch_size=9, epochs=1)
    losses = {
        (seed, dropout): round(fit(tiny(dropout=dropout), one, seed=seed)[0].train_loss, 5)
        for seed in (0, 1)
        for dropout in (0.0, 0.5)
    }
    assert losses[0, 0.0] == losses[1, 0.0]
    assert losses[0, 0.5] != losses[1, 0.5]


def test_random_state_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), on_batch=stop_at(0, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("valid_losses", [[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]])
def test_the_last_epochs_weights_are_kept(monkeypatch, valid_losses):
    losses = iter(valid_losses)
    states = []

    def evaluate(network, *_):
        states.append(weights(network))
        return next(losses), 0.5

    monkeypatch.setattr(model, "_evaluate", evaluate)
    network = tiny()
    fit(network, replace(QUICK, epochs=3))
    assert len(states) == 3
    assert not same(states[0], states[2])
    assert same(weights(network), states[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_diverges(monkeypatch, tmp_path, bad):
    path = tmp_path / "training.pt"
    losses = iter([1.0, bad])
    monkeypatch.setattr(model, "_evaluate", lambda *_: (next(losses), 0.5))
    with pytest.raises(model.TrainingDivergedError, match=r"epoch 1 .*rate 0\.025\b") as error:
        fit(tiny(), replace(QUICK, epochs=3), checkpoint=path)
    one_line(error)
    assert len(torch.load(path, weights_only=True)["history"]) == 1


def test_a_training_loss_that_diverges(monkeypatch):
    monkeypatch.setattr(model, "_evaluate", lambda *_: (1.0, 0.5))
    with pytest.raises(model.TrainingDivergedError, match=r"epoch 0 .*rate 1e\+30\b"):
        fit(tiny(), replace(QUICK, learning_rate=1e30))


# ------------------------------------------------------------------------------- checkpoints

# A rate that falls after every epoch, so that the scheduler's state counts too.
LONG = replace(QUICK, epochs=5, patience=0, factor=0.5, learning_rate=0.05)


def stop_at(epoch, done=None):
    def stop(*now):
        if (now[0].epoch if done is None else now) == (epoch if done is None else (epoch, done)):
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    ("precision", "stop"),
    [
        ("fp32", {"on_epoch": stop_at(0)}),
        ("fp32", {"on_epoch": stop_at(4)}),
        ("fp32", {"on_batch": stop_at(0, 4)}),
        ("fp32", {"on_batch": stop_at(3, 4)}),
        ("bf16", {"on_epoch": stop_at(2)}),
        ("bf16", {"on_batch": stop_at(2, 9)}),
        ("fp16", {"on_epoch": stop_at(2)}),
        ("fp32", None),
        ("bf16", None),
    ],
)
def test_resuming_changes_nothing(monkeypatch, tmp_path, precision, stop):
    """Interrupted, or (None) asked for 2 epochs first and 5 later, as Hyperband does."""
    path = tmp_path / "training.pt"
    losses = [0.9, 0.8, 0.85, 0.86, 0.87]  # two drops

    def evaluate(network, *_):
        epoch = int(network.features[1].num_batches_tracked) // 2 - 1
        return losses[epoch], 0.5

    monkeypatch.setattr(model, "_evaluate", evaluate)
    straight = tiny()
    expected = fit(straight, LONG, precision=precision)
    assert len({r.learning_rate for r in expected}) == 3
    network = tiny()
    if stop is None:
        fit(network, replace(LONG, epochs=2), precision=precision, checkpoint=path)
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(network, LONG, precision=precision, checkpoint=path, **stop)
    resumed, told = tiny(seed=9 if path.exists() else 0), []
    history = fit(resumed, LONG, precision=precision, checkpoint=path, on_epoch=told.append)
    assert untimed(history) == untimed(expected)
    assert told == history
    assert same(weights(resumed), weights(straight))
    assert [p.name for p in path.parent.iterdir()] == ["training.pt"]
    again = tiny(seed=9)  # a finished run is not trained on
    assert fit(again, LONG, precision=precision, checkpoint=path) == history
    assert same(weights(again), weights(straight))


def test_loss_scale_is_resumed(tmp_path):
    path = tmp_path / "training.pt"
    one = replace(QUICK, epochs=1, batch_size=9)
    for epochs in (1, 2):
        network = tiny()
        network.classifier[1].bias.data.fill_(1e4)
        fit(network, replace(one, epochs=epochs), precision="fp16", checkpoint=path)
        assert torch.load(path, weights_only=True)["scaler"]["scale"] == 2.0 ** (16 - epochs)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.026},
        {"weight_decay": 0.005},
        {"momentum": 0.7},
        {"nesterov": False},
        {"batch_size": 5},
        {"patience": 6},
        {"factor": 0.3},
        {"dropout": 0.4},
        {"seed": 1},
        {"precision": "bf16"},
        {"n": 10},
        {"network": {"num_features": 3}},
        {"network": {"dropout": 0.25}},
        {"network": {"network": "NephNet2D"}},
        {"epochs": 1},
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    path = tmp_path / "training.pt"
    fit(tiny(), checkpoint=path)
    kept = path.read_bytes()
    options = dict(change)
    network = tiny(**options.pop("network", {}))
    before = weights(network)
    given = {k: options.pop(k) for k in ("seed", "precision", "n") if k in options}
    reason = "holds 2 epochs, more than the 1" if "epochs" in change else "of another run"
    with pytest.raises(model.CheckpointError, match=reason) as error:
        fit(network, replace(QUICK, **options), checkpoint=path, **given)
    assert str(path) in one_line(error)
    assert same(weights(network), before)
    assert path.read_bytes() == kept


class WritesAFile:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def forged(content, **options):
    """What model.py writes for `content`: torch.save's bytes, then their SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def damages(raw, trap):
    """(what, bytes) of many ways in which a file can be damaged."""
    rng = random.Random(0)
    yield "empty", b""
    yield "text", b"hello\n"
    for part in (1, 100, len(raw) // 2, len(raw) - 30, len(raw) - 1):
        yield f"cut to {part}", raw[:part]
    for place in (rng.randrange(len(raw)) for _ in range(100)):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.randrange(8)
        yield f"bit at {place}", bytes(flipped)
    pickled = pickle.dumps(WritesAFile(trap))
    yield "pickle", pickled
    yield "pickle with a digest", pickled + hashlib.sha256(pickled).digest()
    for content in (WritesAFile(trap), {"config": TINY, "run": WritesAFile(trap)}):
        for zipped in (True, False):
            yield "torch.save", forged(content, _use_new_zipfile_serialization=zipped)
    yield "bytes more", raw + b"more"
    for content in ([1], {}, {"config": None}, {"run": None}):
        yield repr(content), forged(content)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(WritesAFile(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "network"])
def test_a_damaged_file_is_refused(tmp_path, kind):
    path, trap = tmp_path / "file.pt", tmp_path / "trap"
    network = tiny()
    if kind == "checkpoint":
        fit(network, checkpoint=path)
    else:
        model.save_network(network, path)
    refused = 0
    for what, damaged in damages(path.read_bytes(), trap):
        path.write_bytes(damaged)
        try:
            if kind == "checkpoint":
                fresh = tiny()
                before = weights(fresh)
                fit(fresh, checkpoint=path)
            else:
                model.load_network(path)
        except model.CheckpointError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, what
            assert str(path) in str(error)
            assert kind == "network" or same(weights(fresh), before), what
        assert not trap.exists(), what
    assert refused == 118


@pytest.mark.parametrize("read", [model.load_network, lambda p: fit(tiny(), checkpoint=p)])
def test_a_file_that_cannot_be_read(tmp_path, read):
    with pytest.raises(model.CheckpointError, match="cannot read") as error:
        read(tmp_path)  # a folder
    one_line(error)


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
@pytest.mark.parametrize("kind", ["checkpoint", "network"])
def test_a_failing_write_keeps_the_old_file(monkeypatch, tmp_path, kind, failing):
    path = tmp_path / "file.pt"
    write = Path.write_bytes

    def fail(self, *arguments):
        if failing == "write_bytes":
            write(self, b"half of it")
        raise OSError(28, "No space left on device")

    def act(epochs):
        if kind == "network":
            model.save_network(tiny(seed=epochs), path)
        else:
            fit(tiny(), replace(QUICK, epochs=epochs), checkpoint=path)

    act(1)
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, fail)
        with pytest.raises(OSError, match="No space"):
            act(2)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    act(2)
    assert path.read_bytes() != old
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("outside", [None, torch.bfloat16])
def test_predictions_are_plain_float32(monkeypatch, name, outside):
    x = images(10, (8, 8, 3))
    network = tiny(network=name, num_features=8, in_channels=3, num_classes=5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.05)
    before = weights(network)
    monkeypatch.setattr(model, "_evaluation_batch", lambda _: 4)
    done = []
    with torch.autocast("cpu", torch.bfloat16, enabled=outside is not None):
        logits = model.predict(network, x, device="cpu", on_batch=done.append)
    assert done == [4, 8, 10]
    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (10, 5), "cpu")
    assert not logits.requires_grad
    assert not logits.is_inference()
    assert not network.training
    assert same(weights(network), before)
    with torch.no_grad():
        planes = torch.tensor(x).movedim(3, 1).float() / 255
        expected = copy.deepcopy(network).eval()(planes)
    assert expected.std(0).max() > 1e-3  # so that images can be told apart
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * scale)


def test_a_network_can_be_trained_on_after_predicting():
    network = tiny()
    model.predict(network, images(), device="cpu")
    before = weights(network)
    fit(network)
    assert not same(weights(network), before)


# ------------------------------------------------------------------------------- saved networks


@pytest.mark.parametrize("name", WIDTHS)
def test_a_saved_network_comes_back(tmp_path, name):
    network = tiny(network=name, in_channels=3, num_classes=5, dropout=0.25)
    network.features[1].running_mean.fill_(0.125)
    paths = [tmp_path / "a.pt", tmp_path / "another name.pt"]
    for path in paths:
        model.save_network(network, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(paths)
    state = torch.get_rng_state()
    loaded = model.load_network(paths[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(network)
    assert loaded.config == network.config
    assert loaded.classifier[3].p == 0.25
    assert same(weights(loaded), weights(network))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    x = images(shape=(8, 8, 3))
    given = {"logits": model.predict(loaded, x, device="cpu")}
    assert same(given, {"logits": model.predict(network, x, device="cpu")})
    # It can be trained on.
    model.fit(loaded, x, labels(), x, labels(), QUICK, device="cpu", precision="fp32")
    assert not same(weights(loaded), weights(network))


WRONG_CONFIGS = [
    {"num_features": 4},
    {"num_features": 1000},
    {"num_features": 10**9},
    {"num_features": 10**30},
    {"num_features": -1},
    {"num_features": None},
    {"num_classes": 3},
    {"in_channels": 3},
    {"image_size": 16},
    {"image_size": 10**12},
    {"dropout": 2.0},
    {"network": "NephNet2D"},
    {"network": "Linear"},
    {"network": ["PosterCNN"]},
    {"more": 1},
]


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_a_saved_config_that_does_not_fit_is_refused(monkeypatch, tmp_path, change):
    path = tmp_path / "model.pt"
    network = tiny()
    build, devices = model.build, set()

    def watched(config):
        built = build(config)
        devices.update(t.device.type for t in built.state_dict().values())
        return built

    monkeypatch.setattr(model, "build", watched)
    content = {"config": network.config | change, "network": network.state_dict()}
    path.write_bytes(forged(content))
    with pytest.raises(model.CheckpointError, match="is no saved network") as error:
        model.load_network(path)
    one_line(error)
    # No memory was taken for a width that the weights do not have.
    assert devices <= {"meta"}


def test_saved_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    network = tiny()
    good = network.state_dict()
    key = "features.3.weight"
    for wrong in (
        {k: v for k, v in good.items() if k != key},
        good | {"features.99.weight": torch.zeros(1)},
        good | {key: torch.zeros(1)},
        good | {key: torch.full_like(good[key], math.nan)},
        good | {"features.1.running_var": torch.tensor([1.0, math.inf])},
        good | {key: None},
        None,
        [1],
    ):
        path.write_bytes(forged({"config": network.config, "network": wrong}))
        with pytest.raises(model.CheckpointError, match="is no saved network") as error:
            model.load_network(path)
        one_line(error)
    path.write_bytes(forged({"config": network.config, "network": good}))
    assert same(weights(model.load_network(path)), weights(network))


# ------------------------------------------------------------------------------ command line


def alone(folder, *arguments):
    """Run model.py copied alone into an empty folder."""
    shutil.copy(model.__file__, folder / "model.py")
    return subprocess.run(
        [sys.executable, "-W", "error", "-I", "model.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line_alone_in_an_empty_folder(tmp_path):
    done = alone(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    shapes = [row[1] for row in rows if row[0] in ("Conv2d", "AvgPool2d", "Linear")]
    assert " ".join(shapes) == (
        "8@28x28 8@28x28 8@28x28 16@28x28 16@14x14 16@14x14 32@14x14 32@7x7 64@7x7 64@3x3 "
        "128@3x3 128 8"
    )
    assert rows[0] == ["layer", "output", "parameters", "MACs"]
    assert rows[-1] == ["total", "250,904", "4,932,736"]
    assert ["Linear", "128", "147,584", "147,456"] in rows


def test_command_line_refuses_alone(tmp_path):
    done = alone(tmp_path, "--num-features", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "model.py: error: num_features must be an integer from 1 up\n"


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        # 9 weights an input and output channel, 3 more numbers an output channel; then the dense.
        (
            ["--num-features", "1", "--num-classes", "2", "--image-size", "8"],
            9 * (1 + 1 + 1 + 2 + 4 + 8 + 32 + 128) + 3 * 35 + 17 * 16 + 34,
        ),
        (
            ["--network", "NephNet2D", "--in-channels", "3"],
            9 * 32 * (3 + 32 * (2 + 8 + 32 + 128)) + 3 * 32 * 31 + 4609 * 512 + 513 * 8,
        ),
    ],
)
def test_command_line_options(capsys, arguments, total):
    assert model.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["total", f"{total:,}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["--num-features", "x"],
        ["--network", "ResNet"],
        ["more"],
    ],
)
def test_command_line_bad_options(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        model.main(arguments)
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert printed.err.splitlines()[-1].startswith("model.py: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image-size", "7"],
        ["--num-classes", "1"],
        ["--in-channels", "0"],
        ["--num-features", str(10**30)],
    ],
)
def test_command_line_bad_values(capsys, arguments):
    assert model.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("model.py: error: ")


# ----------------------------------------------------------------------------------- compiling


def plainly_trained(network, x, y, hyperparameters, precision, seed, skipped=0):
    """Train by the shortest loop there is: no compiler, no layout, no index slices, no helpers."""
    steps = torch.optim.SGD(
        network.train().parameters(),
        lr=hyperparameters.learning_rate,
        momentum=hyperparameters.momentum,
        weight_decay=hyperparameters.weight_decay,
        nesterov=True,
        foreach=False,
    )
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for epoch in range(hyperparameters.epochs):
        with torch.random.fork_rng():
            digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            order = torch.randperm(len(x))
            torch.rand(skipped)  # dropout draws after these
            for batch in order.split(hyperparameters.batch_size):
                planes = torch.stack([torch.tensor(x[i])[None].float() / 255 for i in batch])
                enabled = precision != "fp32"
                with torch.autocast("cpu", PRECISIONS[precision], enabled=enabled):
                    loss = functional.cross_entropy(network(planes), torch.tensor(y)[batch])
                steps.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(steps)
                scaler.update()
    return network


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum((p - q).detach().double().square().sum() for p, q in pairs))


# 50 steps, one of five on a smaller batch; at a higher rate rounding would grow from step to step.
FIFTY = replace(QUICK, batch_size=16, epochs=10, learning_rate=0.002)


def to_compare(n=72):
    """Images whose upper half is brighter in class 1, and networks that start the same."""
    x = images(n)
    x[1::2, :4] //= 2
    return x, labels(n), [tiny(network="NephNet2D", dropout=0.5) for _ in range(4)]


@pytest.mark.parametrize(("precision", "compiler"), [*itertools.product(PRECISIONS, ("off", "on"))])
def test_the_fast_path_is_the_plain_loop(precision, compiler):
    """The same weights after 50 steps, dropout on: to float32's rounding, or to the precision's.

    What that is tells the plain loop, by how far it ends from itself in float32.
    """
    x, y, (start, fast, plain, exact) = to_compare()
    options = {"device": "cpu", "precision": precision, "compile": compiler, "seed": 3}
    model.fit(fast, x, y, x[:8], y[:8], FIFTY, **options)
    plainly_trained(plain, x, y, FIFTY, precision, 3)
    plainly_trained(exact, x, y, FIFTY, "fp32", 3)
    limit = max(1e-4 * distance(exact, start), 2 * distance(plain, exact))
    assert distance(fast, plain) < limit < 0.5 * distance(exact, start)
    assert [*fast.state_dict()] == [*plain.state_dict()]


def test_another_dropout_mask_would_show():
    """The comparison above can fail."""
    x, y, (start, one, other, _) = to_compare()
    plainly_trained(one, x, y, FIFTY, "fp32", 3)
    plainly_trained(other, x, y, FIFTY, "fp32", 3, skipped=100)
    assert distance(one, other) > 0.25 * distance(one, start)


def test_compiling_is_for_long_trainings(monkeypatch):
    """By the whole training's work, so that a resumed one decides as before."""
    decided = []
    monkeypatch.setattr(model, "_compiled", lambda *_: decided.append(1))
    macs = sum(row[3] for row in model.layer_table(tiny()))
    for below, expected in ((1, 1), (0, 0)):
        monkeypatch.setattr(model, "_COMPILE_FROM", macs * 9 * QUICK.epochs - below)
        fit(tiny())
        assert len(decided) == expected
        decided.clear()
    fit(tiny(), compile="on")
    monkeypatch.setattr(model, "_COMPILE_FROM", 0)
    fit(tiny(), compile="off")
    assert decided == [1]
    with pytest.raises(ValueError, match="no compile 'yes'; there are auto, on, off"):
        fit(tiny(), compile="yes")


def test_without_a_compiler_a_warning_says_so(monkeypatch):
    """And training is what it is without compiling."""

    def fails(*_, **options):
        def step(*batch):
            assert options["options"]["fallback_random"]
            raise RuntimeError("no C++ compiler\nand more lines")

        return step

    monkeypatch.setattr(torch, "compile", fails)
    network, plain = tiny(), tiny()
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler\); training runs uncompiled$"):
        fit(network, compile="on")
    fit(plain, compile="off")
    assert same(weights(network), weights(plain))


def test_compiled_and_plain_checkpoints_do_not_mix(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "_compiled", lambda step, *_: step)
    fit(tiny(), compile="on", checkpoint=tmp_path / "c")
    with pytest.raises(model.CheckpointError, match="compilation"):
        fit(tiny(), compile="off", checkpoint=tmp_path / "c")


def test_trials_in_threads_do_not_draw_from_each_others_random_state():
    """As on a Dask worker of several threads."""
    h = replace(QUICK, epochs=3, dropout=0.5)
    expected = [weights(n) for n in (tiny(), tiny()) if fit(n, h, n=30, seed=1)]
    networks = [tiny(), tiny()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda network: fit(network, h, n=30, seed=1), networks))
    assert all(same(weights(n), e) for n, e in zip(networks, expected, strict=True))
