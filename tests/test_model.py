"""model.py against exact figures and hand-written oracles. CPU only; nothing is timed."""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model

CPU = {"device": "cpu", "precision": "fp32", "compile": "off"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = {"num_features": 2, "num_classes": 2, "image_size": 8}
# Validated on the wrong labels, the loss rises and the rate falls after every epoch but the first.
QUICK = replace(model.POSTER, num_features=2, batch_size=16, epochs=4, learning_rate=0.01)
QUICK = replace(QUICK, patience=0, factor=0.5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small are slower with several threads."""
    with model.one_thread():
        yield


def tiny(seed=0, **changes):
    return model.build(TINY | changes, seed)


def images(n=9, shape=(8, 8), seed=0):
    """Random pixels, darker above where the label is 1."""
    pixels = np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)
    pixels[1::2, : shape[0] // 2] //= 2
    return pixels


def labels(n=9):
    return np.arange(n) % 2


def fit(network, hyperparameters=QUICK, n=65, **options):
    """Train on 65 images in batches of 16: the one left over joins the last batch."""
    x, y = images(n, (network.config["image_size"],) * 2), labels(n)
    return model.fit(network, x, y, x, 1 - y, hyperparameters, **CPU | options)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def distance(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return math.sqrt(sum((p - q).detach().double().square().sum() for p, q in pairs))


@contextlib.contextmanager
def refused(words, kind=model.ModelError):
    with pytest.raises(kind, match=words) as error:
        yield
    assert len(str(error.value).splitlines()) == 1


def stop_at(*place):
    """Interrupt the training at (epoch, images done)."""

    def stop(*now):
        if now == place:
            raise KeyboardInterrupt

    return stop


# ---- networks and hyperparameters ----------------------------------------------------------------

WIDTHS = {"PosterCNN": (1, 1, 1, 2, 2, 4, 8, 16), "NephNet2D": (1, 2, 4, 8, 16)}
POOLED = {"PosterCNN": [4, 6, 7], "NephNet2D": [2, 3, 4]}  # counted from 1


def test_poster_network_is_the_figure(capsys):
    assert model.main([]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("PosterCNN: 250,904 parameters, 4,932,736 multiply-accumulates")
    assert lines[0].split() == ["Conv2d", "8x28x28", "80", "56,448"]
    pooled = [line.split()[1] for line in lines if line.startswith("AvgPool2d")]
    assert pooled == ["16x14x14", "32x7x7", "64x3x3"]
    config = {"num_features": 8, "num_classes": 8, "in_channels": 1, "image_size": 28}
    assert model.PosterCNN().config == {"network": "PosterCNN", **config, "dropout": 0.5}
    assert model.NephNet2D().config["num_features"] == 32


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (33, 3)])
def test_a_network_is_its_layers_written_out(name, size, channels):
    config = {"network": name, "num_features": 3, "in_channels": channels, "image_size": size}
    network = model.build(config, seed=1).eval()
    state, macs = list(network.state_dict().values()), 0
    for tensor in state[:-4]:  # BatchNorm's own start would hide what it does
        if tensor.ndim == 1:
            tensor.add_(torch.linspace(0.1, 0.5, len(tensor)))
    x = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2))
    values, out = iter(state), x
    for i, width in enumerate(WIDTHS[name], 1):
        weight, bias, gamma, beta, mean, variance, _ = itertools.islice(values, 7)
        assert weight.shape == (3 * width, out.shape[1], 3, 3)
        out = functional.conv2d(out, weight, bias, padding=1)
        macs += weight.numel() * out.shape[2] * out.shape[3]
        out = functional.batch_norm(out, mean, variance, gamma, beta).relu()
        out = functional.avg_pool2d(out, 2) if i in POOLED[name] else out
    hidden, bias, last, last_bias = values
    out = functional.linear(out.flatten(1), hidden, bias).relu()
    with torch.no_grad():
        expected = functional.linear(out, last, last_bias)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    before = copy.deepcopy(network)
    rows = model.layer_table(network.train())
    assert network.training
    assert same(network, before)
    assert sum(row[3] for row in rows) == macs + hidden.numel() + last.numel()
    assert sum(row[2] for row in rows) == sum(p.numel() for p in network.parameters())


def test_weights_start_as_the_authors_did():
    """By PyTorch's default, uniform; NephNet2D's Kaiming-normal, its biases standard normal."""
    for name in WIDTHS:
        biases = []
        for module in model.build({"network": name, "num_features": 16}).modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                fan_in = module.weight[0].numel()
                uniform, kaiming = (1 / 3 / fan_in) ** 0.5, (2 / fan_in) ** 0.5
                expected = uniform if name == "PosterCNN" else kaiming
                assert module.weight.std().item() == pytest.approx(expected, rel=0.2)
                biases.append(module.bias.detach() / (uniform if name == "PosterCNN" else 1))
        assert torch.cat(biases).std().item() == pytest.approx(1, abs=0.1)


def test_hyperparameters_are_the_posters():
    # What it prints, then what the authors' run had.
    printed = {"num_features": 8, "batch_size": 128, "learning_rate": 0.025, "weight_decay": 0.004}
    printed |= {"momentum": 0.8, "nesterov": True, "dropout": 0.5, "patience": 5, "factor": 0.29}
    assert asdict(model.POSTER) == printed | {"epochs": 100}
    changed = {"learning_rate": 0.025336627337952815, "weight_decay": 0.0046684446208345}
    assert asdict(model.AUTHORS) == asdict(model.POSTER) | changed


def test_hyperparameters_of_another_type_or_out_of_range():
    """As YAML, JSON, NumPy or a spreadsheet may have them; an int is a float, and stays one."""
    wrong = {int: [1.0, "1", None, True, np.int64(1), -1], bool: ["false", None, 0.0, 1]}
    wrong[float] = ["1e-3", None, [0.1], True, 0.1j, np.float64(0.1)]
    wrong[float] += [-1e-9, math.nan, math.inf, 10**400]
    bad = [(field.name, value) for field in fields(model.POSTER) for value in wrong[field.type]]
    bad += [(name, 0) for name in ("num_features", "batch_size", "learning_rate", "factor")]
    bad += [("epochs", 0), ("momentum", 1), ("dropout", 1.0), ("factor", 1)]
    for name, value in bad:
        with refused(f"^{name} must be "):
            model.Hyperparameters(**{name: value})
    with refused("^nesterov must be False without momentum$"):
        model.Hyperparameters(momentum=0)
    lowest = {"momentum": 0, "nesterov": False, "weight_decay": 0, "dropout": 0, "patience": 0}
    assert type(model.Hyperparameters(**lowest).momentum) is int


# ---- device, precision, data ---------------------------------------------------------------------


def test_precision_is_what_pays(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name, expected in [("avx512_f", "fp32"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert model.resolve_precision("auto", cpu) == expected
        assert model.resolve_precision("auto", cuda) == "fp16"
    assert [model.resolve_precision(p, cpu) for p in DTYPES] == list(DTYPES)


def test_environment():
    found = model.environment("cpu")
    assert (found["torch"], found["device"], found["threads"]) == (torch.__version__, "cpu", 1)


@pytest.mark.parametrize(
    ("name", "words", "values"),
    [
        ("train_images", r"uint8, .* of \(8, 8\)", [images().astype(np.float32), images(0)]),
        ("train_images", "uint8", [images(9, (8, 9)), images(9, (8, 8, 3)), images(9, (1, 8, 8))]),
        ("train_images", "arrays of integers", [[[1], [1, 2]], ["a.png"], None]),
        ("valid_labels", "9 integers from 0 to 1", [labels(8), labels() + 1, labels() - 1]),
        ("valid_labels", "9 integers", [labels()[:, None], [], 1, np.uint64(2**63) + labels()]),
        ("valid_labels", "9 integers", [labels() * 1.0, labels() == 1, labels() + 2j]),
        ("valid_labels", "9 integers", [torch.tensor(labels()) / 2, labels().astype(object) / 2]),
        ("device", "no device '(tpu|cuda:99)' here", ["tpu", "cuda:99"]),
        ("precision", "^precision must be one of auto, fp32, bf16, fp16, not ", ["fp8", None]),
        ("compile", "^compile must be one of auto, on, off, not ", ["yes", True]),
        ("checkpoint", "^cannot write .*no such folder, or not a regular file", ["no/a.pt", "."]),
        ("hyperparameters", "num_features or dropout", [replace(QUICK, num_features=3)]),
        ("hyperparameters", "num_features or dropout", [replace(QUICK, dropout=0.4)]),
        ("hyperparameters", "^epoch 0: loss not finite", [replace(QUICK, learning_rate=1e30)]),
    ],
)
def test_fit_refuses(monkeypatch, tmp_path, name, words, values):
    """Before the first step, unless the loss is not finite."""
    monkeypatch.chdir(tmp_path)
    good = {"train_images": images(), "train_labels": labels(), "hyperparameters": QUICK}
    good |= {"valid_images": images(), "valid_labels": labels(), "checkpoint": "a.pt", **CPU}
    network = tiny()
    for value in values:
        with refused(words):
            model.fit(network, **good | {name: value})
    assert same(network, tiny()) or "not finite" in words
    assert not list(tmp_path.iterdir())


def test_images_need_8_pixels_and_batches_of_one_need_16():
    """Of 15 pixels, the third pooling leaves one: BatchNorm has one number per channel."""
    for name, size, batch in itertools.product(WIDTHS, [8, 15, 16], [(3, 1), (1, 128)]):
        network = tiny(network=name, image_size=size)
        with contextlib.nullcontext() if size == 16 else refused("^BatchNorm needs batches of 2"):
            fit(network, replace(QUICK, batch_size=batch[1], epochs=1), n=batch[0])
    with refused("images must be at least 8x8 pixels, not 7x7"):
        tiny(image_size=7)


def test_any_array_of_these_numbers_will_do():
    x, y = images(), labels()
    read_only = x.copy()
    read_only.flags.writeable = False
    fit(expected := tiny(), n=9)
    for given_images, given_labels in [
        (np.asfortranarray(x), y.astype(np.uint16)),
        (torch.tensor(x), y.tolist()),
        (read_only, y.astype(object)),
        (list(x), y.astype(">i4")),
        (x[::-1].copy()[::-1], y[::-1].copy()[::-1]),
        (x[:, :, ::-1].copy()[:, :, ::-1], torch.tensor(y, dtype=torch.int8)),
    ]:
        model.fit(network := tiny(), given_images, given_labels, x, 1 - y, QUICK, **CPU)
        assert same(network, expected)


# ---- training ------------------------------------------------------------------------------------


def plainly_trained(network, h, seed, skipped=0):
    """Train as `fit`, by the shortest loop there is; return one row of figures per epoch."""
    x, y = torch.tensor(images(65))[:, None].float() / 255, torch.tensor(labels(65))
    rule = {"momentum": 0.8, "weight_decay": h.weight_decay, "nesterov": True}
    optimizer = torch.optim.SGD(network.parameters(), h.learning_rate, **rule)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    scheduler, rows = plateau(optimizer, factor=h.factor, patience=h.patience), []
    for epoch in range(h.epochs):
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order, rate, losses, hits = torch.randperm(65), optimizer.param_groups[0]["lr"], [], 0
        torch.rand(skipped)  # dropout draws after these
        network.train()
        for batch in order.split([16, 16, 16, 17]):
            logits = network(x[batch])
            loss = functional.cross_entropy(logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(batch)
            hits += (logits.argmax(1) == y[batch]).sum().item()
        with torch.no_grad():
            logits = network.eval()(x)
        valid_loss = functional.cross_entropy(logits, 1 - y).item()
        valid_accuracy = (logits.argmax(1) == 1 - y).float().mean().item()
        rows.append((rate, np.mean(losses), valid_loss, hits / 65, valid_accuracy))
        scheduler.step(valid_loss)
    return rows


HAS_COMPILER = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("compiler", ["off", pytest.param("on", marks=needs_compiler)])
def test_training_is_pytorchs_plain_loop(compiler):
    """To float32's rounding: dropout, Nesterov, weight decay, plateau, the image left over."""
    start, network, plain, other = (tiny(network="NephNet2D") for _ in range(4))
    history = fit(network, seed=3, compile=compiler)
    with torch.random.fork_rng():
        rows = plainly_trained(plain, QUICK, 3)
        plainly_trained(other, QUICK, 3, skipped=100)
    assert distance(network, plain) < 1e-3 * distance(plain, start)
    assert distance(other, plain) > 0.1 * distance(plain, start)  # another dropout would show
    assert [record.epoch for record in history] == [0, 1, 2, 3]
    assert len({record.learning_rate for record in history}) == 3
    for (_, rate, *figures, seconds), (expected_rate, *expected) in zip(history, rows, strict=True):
        assert rate == pytest.approx(expected_rate, rel=1e-12)
        assert figures[:2] == pytest.approx(expected[:2], rel=1e-3)
        assert figures[2:] == pytest.approx(expected[2:], abs=1.5 / 65)  # one on the border
        assert seconds > 0
    rates, losses = [r.learning_rate for r in history], [r.valid_loss for r in history]
    assert model.learning_rates(QUICK, losses) == rates
    measured = model.evaluate(network, images(65), 1 - labels(65), device="cpu", precision="fp32")
    assert measured == (history[-1].valid_loss, history[-1].valid_accuracy)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (3, 128, [3]), (2, 1, [1, 1])],
)
def test_every_image_is_used_once_an_epoch(n, batch_size, sizes):
    steps, hyperparameters = [], replace(QUICK, batch_size=batch_size, epochs=2)
    fit(tiny(image_size=16), hyperparameters, n, on_batch=lambda *step: steps.append(step))
    assert steps == [(epoch, done) for epoch in (0, 1) for done in itertools.accumulate(sizes)]


@pytest.mark.parametrize("precision", DTYPES)
def test_every_precision_is_computed_in_and_learns(precision):
    network, seen = tiny(network="NephNet2D"), set()
    network.features[0].register_forward_hook(lambda m, _, out: seen.add((m.training, out.dtype)))
    losses = [record.train_loss for record in fit(network, precision=precision)]
    assert seen == {(True, DTYPES[precision]), (False, DTYPES[precision])}
    assert all(p.dtype == torch.float32 for p in network.parameters())
    # 1.2 times in fp16, whose first steps overflow; 1.35 times if weights are cast once per epoch.
    expected = fit(tiny(network="NephNet2D"))[0].train_loss
    assert losses[0] == pytest.approx(expected, rel=0.28)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("precision", DTYPES)
def test_what_the_caller_has_set_in_pytorch_changes_nothing(request, tmp_path, precision):
    """Neither its autocast, in the backward pass too, nor its default dtype."""
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    plain, path, found = torch.float32, tmp_path / "model.pt", []
    for dtype, cast in [(plain, None), (plain, "bf16"), (plain, "fp16"), (torch.float64, None)]:
        torch.set_default_dtype(dtype)
        with torch.autocast("cpu", DTYPES.get(cast), enabled=cast is not None):
            history = fit(network := tiny(), precision=precision)
            model.save_network(network, path)
            logits = model.predict(model.load_network(path), images(), device="cpu")
            loss = model.evaluate(network, images(), labels(), device="cpu", precision=precision)
            others = model.learning_rates(QUICK, [1, 2, 3]), model.layer_table(network)
        found.append(([record[:-1] for record in history], logits.tolist(), loss, others))
    assert found == found[:1] * len(found)


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        assert getattr(result, "dtype", None) != torch.float64
        return result


def test_the_device_needs_no_float64():
    with WithoutFloat64():
        fit(network := tiny())
        model.predict(network, images(), device="cpu")


def test_learning_rate_drops_where_the_posters_did():
    """As the poster's curves show in their first 45 epochs."""
    path = Path(model.__file__).parent / "results" / "reference" / "poster" / "history.csv"
    losses = np.loadtxt(path, delimiter=",", skiprows=1, usecols=2)[:45]
    rates = model.learning_rates(model.POSTER, losses)
    drops = [0, 16, 24, 31, 38, 44, 45]
    expected = [0.025 * 0.29**i for i in range(6) for _ in range(drops[i], drops[i + 1])]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_the_seeds_decide_everything():
    """PyTorch's global random state plays no part and is left as it was, after an error too."""
    networks = []
    for start, seed, noise in [(0, 0, 1), (0, 0, 2), (1, 0, 1), (0, 1, 1)]:
        torch.manual_seed(noise)
        before, network = torch.get_rng_state(), tiny(start)
        fit(network, seed=seed)
        model.predict(network, images(), device="cpu")
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(start), seed=seed, on_batch=stop_at(0, 16))
        assert torch.equal(torch.get_rng_state(), before)
        networks.append(network)
    assert [same(networks[0], network) for network in networks] == [True, True, False, False]


def test_trainings_in_threads_do_not_draw_from_each_others_random_state():
    """As on a Dask worker of several threads."""
    networks = [tiny() for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fit, networks[1:]))
    fit(networks[0])
    assert all(same(network, networks[0]) for network in networks)


# ---- checkpoints and saved networks --------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "place"),
    [("fp32", (0, 16)), ("fp32", (2, 32)), ("bf16", (2, 65)), ("fp16", (2, 16)), ("fp32", None)],
)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, precision, place):
    """Interrupted, or (None) asked for 2 epochs first and 4 later, as Hyperband does."""

    def start():
        network = tiny()
        if precision == "fp16":  # its gradients overflow, which lowers the loss scale
            network.features[1].bias.data.fill_(1000)
        return network

    path, straight, reported = tmp_path / "training.pt", start(), []
    options = {"precision": precision, "checkpoint": path, "seed": np.int64(0)}
    expected = fit(straight, precision=precision)
    if place is None:
        fit(start(), replace(QUICK, epochs=2), **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(start(), **options, on_batch=stop_at(*place))
    done = len(torch.load(path)["history"]) if path.exists() else 0
    history = fit(resumed := start(), **options, on_epoch=reported.append)
    assert [record[:-1] for record in history] == [record[:-1] for record in expected]
    assert reported == history[done:]
    assert same(resumed, straight)
    assert list(tmp_path.iterdir()) == [path]
    finished = path.read_bytes()
    assert fit(again := start(), **options) == history
    assert same(again, straight)
    assert path.read_bytes() == finished


def test_a_checkpoint_of_another_training_is_refused(monkeypatch, tmp_path):
    x, y, path = images(65), labels(65), tmp_path / "training.pt"
    good = {"train_images": x, "train_labels": y, "valid_images": x, "valid_labels": 1 - y}
    good |= {"hyperparameters": QUICK, **CPU, "checkpoint": path}
    model.fit(tiny(), **good)
    kept = path.read_bytes()
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    other_pixel = x.copy()
    other_pixel[64, 7, 7] ^= 1
    for start, changes in [
        ({"network": "NephNet2D"}, {}),
        ({"seed": 1}, {}),
        ({}, {"seed": 1}),
        ({}, {"hyperparameters": replace(QUICK, learning_rate=0.011)}),
        ({}, {"precision": "bf16"}),
        ({}, {"compile": "on"}),
        ({}, {"train_images": other_pixel}),
        ({}, {"train_labels": 1 - y}),
        ({}, {"valid_images": other_pixel}),
        ({}, {"valid_labels": y}),
    ]:
        network = tiny(**start)
        with refused(r"^remove .*training.pt.* of other images, labels", model.CheckpointError):
            model.fit(network, **good | changes)
        assert same(network, tiny(**start))
    with refused(r"it has 4 epochs\)$", model.CheckpointError):
        model.fit(tiny(), **good | {"hyperparameters": replace(QUICK, epochs=3)})
    assert path.read_bytes() == kept
    for damaged in (b"", b"hello", kept[:100], kept[:-1], kept.replace(b"history", b"hi5tory")):
        path.write_bytes(damaged)
        with refused("^remove .*training.pt", model.CheckpointError):
            model.fit(tiny(), **good)


class Trap:
    """Writes a file when unpickled."""

    def __reduce__(self):
        return Path("trap").touch, ()


def test_a_damaged_file_is_refused_or_does_no_harm(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, network, errors = Path("model.pt"), tiny(), 0
    model.save_network(network, path)
    good, content = path.read_bytes(), torch.load(path)
    bad = [b"", b"hello", good[:100], good[:-1]]
    lacking = {name: content[name] for name in ("config", "network")}  # the second edition's
    for other in ([1], {}, dict.fromkeys(content), lacking, content | {"config": Trap()}):
        torch.save(other, path)
        bad.append(path.read_bytes())
    for damaged in bad:
        path.write_bytes(damaged)
        with refused("^model.pt is no saved network "):
            model.load_network(path)
    for place in random.Random(0).sample(range(len(good)), 150):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert same(model.load_network(path), network)
        except model.ModelError:
            errors += 1
    assert errors > 75
    assert not Path("trap").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("trap").exists()  # the trap works


def test_a_failing_write_keeps_the_old_file(monkeypatch, tmp_path):
    """Two writers share no temporary file: a worker may outlive a killed search."""
    path, write, used = tmp_path / "model.pt", Path.write_bytes, set()
    model.save_network(tiny(), path)
    old = path.read_bytes()

    def fail(self, _):
        used.add(self)
        write(self, b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            model.save_network(tiny(seed=1), path)
    assert (path.read_bytes(), list(tmp_path.iterdir()), len(used)) == (old, [path], 2)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_saved_network_comes_back(tmp_path, name):
    network = tiny(network=name, in_channels=3, num_classes=np.int64(5), dropout=np.float64(0.25))
    network.features[1].running_mean.fill_(0.125)
    path, link = tmp_path / "a.pt", tmp_path / "link.pt"
    link.symlink_to("another name.pt")
    for written, pixels in [(path, "stretched"), (link, None), (path, "raw")]:
        model.save_network(network, written, pixels)
        model.save_network(model.load_network(written), written)
        loaded = model.load_network(written)
        assert loaded.pixels == (pixels or "raw")
        assert (type(loaded), loaded.config) == (type(network), network.config)
        assert same(loaded, network)
        assert all(p.requires_grad for p in loaded.parameters())
    assert link.is_symlink()
    assert path.read_bytes() == (tmp_path / "another name.pt").read_bytes()
    with refused("^pixels must be one of raw, stretched, not 'blue'"):
        model.save_network(network, path, pixels="blue")


# ---- prediction and compiling --------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDTHS)
def test_predictions_are_the_networks_in_float64(name):
    """Unfolded, one image at a time; without TF32, whatever autocast the caller is in."""
    x, seen, cudnn = images(130, (8, 8, 3)), [], torch.backends.cudnn
    network = tiny(network=name, num_features=8, in_channels=3, num_classes=5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.05)
    double = copy.deepcopy(network).double().eval()
    with torch.autocast("cpu", torch.bfloat16):
        options = {"device": "cpu", "on_batch": lambda n: seen.append((n, cudnn.allow_tf32))}
        logits = model.predict(network, x, **options)
    assert (seen, cudnn.allow_tf32) == ([(128, False), (130, False)], True)
    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (130, 5), "cpu")
    assert not (logits.requires_grad or logits.is_inference() or network.training)
    assert same(copy.deepcopy(network).double(), double)
    with torch.no_grad():
        planes = torch.tensor(x).movedim(3, 1).double() / 255
        expected = torch.cat([double(plane[None]) for plane in planes])
    assert expected.std(0).max() > 1e-3  # so that images can be told apart
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(logits.double(), expected, **tolerance)


def test_compiling_is_for_long_trainings_on_a_cpu():
    """The poster's network: 3e12 multiply-accumulates of 4,932,736 per image."""
    config, cpu = model.PosterCNN().config, torch.device("cpu")
    for images, epochs, expected in [(608_182, 1, "on"), (608_181, 1, "off"), (12_000, 51, "on")]:
        assert model.resolve_compile("auto", cpu, config, images, epochs) == expected
    assert model.resolve_compile("auto", torch.device("cuda"), config, 10**6, 100) == "off"
    for given in ("on", "off"):
        assert model.resolve_compile(given, torch.device("cuda"), config, 1, 1) == given


def test_without_a_compiler_a_warning_says_so_and_training_runs_uncompiled(monkeypatch):

    def compiled(step, **_):
        def failing(*batch):
            step(*batch)
            raise RuntimeError("no C++ compiler\nand more lines")

        return failing

    fit(plain := tiny())
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.warns(UserWarning, match=r"\(no C\+\+ compiler\); training runs uncompiled$"):
        fit(network := tiny(), compile="on")
    assert same(network, plain)


# ---- command line --------------------------------------------------------------------------------


def alone(folder, *arguments, **pipes):
    """Start model.py copied alone into an empty folder."""
    shutil.copy(model.__file__, folder / "model.py")
    command = [sys.executable, "-W", "error", "-I", "model.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | pipes
    return subprocess.Popen(command, cwd=folder, **pipes)


def test_the_file_works_alone(tmp_path):
    process = alone(tmp_path, "--network", "NephNet2D")
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    # 9 weights per pair of channels, 3 more numbers per output channel; then the dense layers.
    total = 9 * 32 * (1 + 32 * (2 + 8 + 32 + 128)) + 3 * 32 * 31 + 4609 * 512 + 513 * 8
    assert printed.startswith(f"NephNet2D: {total:,} parameters")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_cannot_be_written(tmp_path):
    """A pipe whose reader has ended; a full disk."""
    with alone(tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    with Path("/dev/full").open("w") as full, alone(tmp_path, stdout=full) as other:
        assert re.fullmatch("model.py: error: .*No space left.*\n", other.stderr.read())
    assert (process.returncode, other.returncode) == (0, 2)


def test_ctrl_c(monkeypatch):
    monkeypatch.setattr(model, "layer_table", mock.Mock(side_effect=KeyboardInterrupt))
    assert model.main([]) == 130


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder to work in, with a network and images to apply it to."""
    monkeypatch.chdir(tmp_path)
    model.save_network(tiny(num_classes=3), "model.pt")
    np.savez("images.npz", images=images(4))
    return tmp_path


def applied(network, source, output="out.csv"):
    """Apply a saved network; return the rows of the CSV."""
    assert model.main(["apply", network, source, output, "--device", "cpu"]) == 0
    header, *rows = Path(output).read_text().splitlines()
    assert header == "id,predicted,probability_0,probability_1,probability_2"
    return np.array([row.split(",") for row in rows], float)


@pytest.mark.parametrize("pixels", ["raw", "stretched"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_apply(folder, pixels, shape):
    """Narrow ranges, flat images, images that fill the range are stretched as by data.stretch."""
    ranges = [(0, 255), (0, 9), (100, 103), (7, 7), (255, 255), (0, 0), (13, 201), (254, 255)]
    x = np.uint8([np.linspace(*ends, math.prod(shape)).reshape(shape) for ends in ranges])
    np.savez("both.npz", images=x[:4], test_images=x)
    network = tiny(num_features=8, num_classes=3, in_channels=len(shape) * 2 - 3)
    given = data.stretch(x) if pixels == "stretched" else x
    network.classifier[4].weight.data *= 1000  # so that images differ in class
    network.classifier[4].bias.data -= model.predict(network, given, device="cpu").mean(0)
    model.save_network(network, "model.pt", pixels)
    rows = applied("model.pt", "both.npz")
    logits = model.predict(network, given, device="cpu").numpy().astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    assert len(set(logits.argmax(1))) > 1
    assert rows[:, :2].tolist() == list(map(list, enumerate(logits.argmax(1))))
    np.testing.assert_allclose(rows[:, 2:], powers / powers.sum(1, keepdims=True), rtol=1e-8)


def test_names_that_standard_output_cannot_write(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    applied("model.pt", "images.npz", "café.csv")
    assert sys.stdout.buffer.getvalue() == b"wrote caf\\xe9.csv: 4 images\n"
    monkeypatch.setattr(sys, "stdout", None)  # as if it were closed
    applied("model.pt", "images.npz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--net=PosterCNN", "unrecognized arguments: --net=PosterCNN"),
        ("--network ResNet", "invalid choice: 'ResNet'"),
        ("apply none.pt images.npz out.csv", "none.pt is no saved network .*No such file"),
        ("apply images.npz images.npz out.csv", "images.npz is no saved network"),
        ("apply model.pt none.npz out.csv", "none.npz is no npz .*No such file"),
        ("apply model.pt one.npy out.csv", "one.npy is no npz of test_images or images"),
        ("apply model.pt large.npz out.csv", r"not torch.uint8 of \(2, 16, 16\)"),
        ("apply stretched.pt floats.npz out.csv", "images must be uint8"),
        ("apply model.pt images.npz no/out.csv", "cannot write no/out.csv: no such folder"),
        ("apply model.pt images.npz pipe", "cannot write pipe: .* not a regular file"),
        ("apply model.pt images.npz out.csv --device tpu", "no device 'tpu'"),
    ],
)
def test_the_command_line_refuses_in_one_line(folder, capsys, arguments, words):
    """After the usage where argparse refuses."""
    model.save_network(tiny(), "stretched.pt", "stretched")
    np.save("one.npy", images())
    np.savez("large.npz", images=images(2, (16, 16)))
    np.savez("floats.npz", images=images() / 255)
    os.mkfifo("pipe")
    before = sorted(folder.rglob("*"))
    try:
        status = model.main(arguments.split())
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert re.fullmatch(f"(usage: (.*\n)+)?model.py.*: error: .*{words}.*\n", printed.err)
    assert sorted(folder.rglob("*")) == before
