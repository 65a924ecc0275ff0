"""data.py: sources, damage, download, splits. No network beyond 127.0.0.1, nothing timed."""

import hashlib
import http.server
import io
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import data

PARTS = ("train", "val", "test")


def arrays(sizes=(8, 4, 4), shape=(8, 8), classes=4, seed=0):
    """Arrays in MedMNIST's layout, every class in every part that is large enough."""
    rng = np.random.RandomState(seed)
    made = {}
    for part, n in zip(PARTS, sizes, strict=True):
        made[f"{part}_images"] = rng.randint(0, 256, (n, *shape)).astype(np.uint8)
        made[f"{part}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    return made


def write(path, save=np.savez, drop=(), **changes):
    made = {k: v for k, v in (arrays() | changes).items() if k not in drop}
    save(path, **made)
    return path


def one_line(error):
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


# ------------------------------------------------------------------------------------ splits


def legacy_permutation(n, seed):
    """RandomState(seed).permutation(n) from its definition, on Python's own Mersenne Twister.

    Knuth's seeding (init_genrand of Matsumoto and Nishimura 2002), then Fisher-Yates from the
    end, each index by masked rejection of 32-bit words.
    """
    words = [seed]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + i) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*words, 624), None))
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (j := twister.getrandbits(32) & mask) > i:
            pass
        order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize(("n", "seed"), [(6, 0), (1797, 0), (1797, 2**32 - 1), (236_386, 0)])
def test_poster_split_is_the_frozen_shuffle(n, seed):
    split = data.poster_split(n, seed)
    order = legacy_permutation(n, seed)[:200_000]
    assert np.concatenate(split).tolist() == order
    assert all(part.dtype == np.int64 for part in split)


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (236_386, (120_000, 30_000, 50_000)),
        (200_000, (120_000, 30_000, 50_000)),
        (199_999, (119_999, 30_000, 50_000)),
        (1797, (1078, 269, 450)),
        (7, (4, 1, 2)),
    ],
)
def test_poster_split_sizes(n, sizes):
    split = data.poster_split(n)
    assert tuple(map(len, split)) == sizes
    everything = np.concatenate(split)
    assert len(np.unique(everything)) == sum(sizes)
    assert everything.min() >= 0
    assert everything.max() < n


@pytest.mark.parametrize("n", [-1, 0, 1, 2, 5])
def test_poster_split_refuses_an_empty_part(n):
    with pytest.raises(data.DataError, match="too few"):
        data.poster_split(n)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_poster_split_refuses_a_seed_out_of_range(seed):
    with pytest.raises(data.DataError, match=r"seed .* out of range"):
        data.poster_split(100, seed)


# ------------------------------------------------------------------------------------ digits


def test_digits_are_interpolated_exactly():
    from sklearn.datasets import load_digits

    original = load_digits()
    digits = data.load("digits")
    assert (digits.images.shape, digits.images.dtype) == ((1797, 28, 28), np.uint8)
    assert (digits.name, digits.official) == ("digits", None)
    assert digits.class_names == tuple("0123456789")
    assert digits.labels.tolist() == original.target.tolist()
    assert digits.labels.dtype == np.int64
    content = digits.images.tobytes() + digits.labels.astype("<i8").tobytes()
    assert digits.md5 == hashlib.md5(content).hexdigest()

    def sample(image, y, x):
        """Bilinear, half-pixel centres, edge clamped, by the textbook and in fractions."""
        value = Fraction(0)
        for weight_y, row in taps(y):
            for weight_x, column in taps(x):
                value += weight_y * weight_x * int(image[row, column])
        return int(value * 255 / 16 + Fraction(1, 2))

    def taps(i):
        position = Fraction(2 * i + 1, 2) * 8 / 28 - Fraction(1, 2)
        low = position.numerator // position.denominator
        weight = position - low
        return [(1 - weight, min(max(low, 0), 7)), (weight, min(max(low + 1, 0), 7))]

    for index in (0, 1796):
        expected = [[sample(original.images[index], y, x) for x in range(28)] for y in range(28)]
        assert digits.images[index].tolist() == expected


def test_enlarging_a_ramp_by_hand():
    ramp = np.broadcast_to(2 * np.arange(8), (1, 8, 8))  # columns 0, 2, .., 14
    row = data._enlarge_digits(ramp)[0, 5]
    # Column 2 lies at 3/14 of a source pixel: 2 * 3/14 * 255/16 = 6.83; column 13 at 47/14:
    # 107.01; column 27 beyond the last centre: 14 * 255/16 = 223.1.
    assert row[[0, 1, 2, 13, 27]].tolist() == [0, 0, 7, 107, 223]
    assert np.unique(data._enlarge_digits(np.full((1, 8, 8), 16))).tolist() == [255]


def test_no_official_split():
    with pytest.raises(data.DataError, match="no official split"):
        data.official_split(data.load("digits"))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match=r"pip install -r requirements\.txt"):
        data.load("digits")


# --------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (11, 11, 3)])
@pytest.mark.parametrize("label_dtype", ["u1", ">i2", "<u8", "i8"])
def test_npz(tmp_path, save, shape, label_dtype):
    made = arrays(shape=shape)
    for part in PARTS:
        made[f"{part}_labels"] = made[f"{part}_labels"].astype(label_dtype)
    made["val_labels"] = made["val_labels"][:, 0]
    path = write(tmp_path / "cells.npz", save, **made)
    loaded = data.load(str(path))
    everything = {w: np.concatenate([made[f"{p}_{w}"] for p in PARTS]) for w in ("images",)}
    assert np.array_equal(loaded.images, everything["images"])
    assert loaded.images.dtype == np.uint8
    assert loaded.labels.tolist() == [0, 1, 2, 3] * 4
    assert loaded.labels.dtype == np.int64
    assert (loaded.name, loaded.source) == ("cells", str(path))
    assert loaded.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    assert loaded.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert loaded.num_classes == 4
    split = data.official_split(loaded)
    for part, index in zip(PARTS, split, strict=True):
        assert index.dtype == np.int64
        assert np.array_equal(loaded.images[index], made[f"{part}_images"])


def test_npz_is_in_memory_once(tmp_path):
    path = write(tmp_path / "a.npz", **arrays((20_000, 100, 100), (28, 28)))
    size = 20_200 * 28 * 28
    tracemalloc.start()
    try:
        loaded = data.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded.images.nbytes == size
    assert size < peak < 1.5 * size


U8 = np.uint8
BAD_ARRAYS = {
    "no array": ({"drop": ("val_images", "test_labels")}, "no array val_images, test_labels"),
    "float images": ({"train_images": np.zeros((8, 8, 8))}, "train_images has dtype float64"),
    "float labels": ({"val_labels": np.zeros((4, 1))}, "val_labels has dtype float64"),
    "boolean labels": ({"val_labels": np.zeros(4, bool)}, "val_labels has dtype bool"),
    "object labels": ({"val_labels": np.array([0, 1, 2, 3], object)}, "val_labels is an object"),
    "lengths": ({"test_labels": np.zeros(5, U8)}, "test_labels: 5 labels for 4 images"),
    "image shapes": ({"val_images": np.zeros((4, 9, 9), U8)}, "val_images .* differ in image"),
    "gray and colour": ({"val_images": np.zeros((4, 8, 8, 3), U8)}, "differ in image shape"),
    "flat images": ({"train_images": np.zeros((8, 64), U8)}, r"expected \(N,H,W\)"),
    "four channels": ({"train_images": np.zeros((8, 8, 8, 4), U8)}, r"expected \(N,H,W\)"),
    "not square": ({"train_images": np.zeros((8, 8, 9), U8)}, "8x9 pixels, expected square"),
    "too small": ({"train_images": np.zeros((8, 7, 7), U8)}, "7x7 pixels, smaller than 8"),
    "negative": ({"val_labels": np.array([0, 1, -2, 3])}, r"negative labels \(down to -2\)"),
    "gap": ({"val_labels": np.array([0, 1, 2, 6])}, "2 labels .* out of range: 4, 5"),
    "from one": (
        {f"{p}_labels": np.r_[1:5, 1:5][:n] for p, n in zip(PARTS, (8, 4, 4), strict=True)},
        "1 labels .* out of range: 0",
    ),
    "one class": (
        {f"{p}_labels": np.zeros(n, int) for p, n in zip(PARTS, (8, 4, 4), strict=True)},
        "one class only",
    ),
    "few images": (
        {"val_labels": np.array([0, 1, 2, 10**12])},
        r"fewer images \(16\) than classes",
    ),
    "multi-label": ({"val_labels": np.zeros((4, 14), U8)}, "multi-label"),
    "no train": (
        {"train_images": np.zeros((0, 8, 8), U8), "train_labels": np.zeros(0, U8)},
        "train_images is empty",
    ),
    "no test": (
        {"test_images": np.zeros((0, 8, 8), U8), "test_labels": np.zeros(0, U8)},
        "test_images is empty",
    ),
    "scalar": ({"val_labels": np.uint8(3)}, "val_labels is empty"),
    "fortran": ({"train_images": np.asfortranarray(np.zeros((8, 8, 8), U8))}, "Fortran order"),
    "structured": ({"val_labels": np.zeros(4, [("é", "u1")])}, "not a readable npz|has dtype"),
}


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, changes, message):
    path = write(tmp_path / "bad.npz", **changes)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(path)
    assert str(path) in one_line(error)


class Writes:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_loaded(tmp_path):
    trap = np.empty(4, object)
    trap[:] = [Writes(tmp_path / "trap")] * 4
    path = write(tmp_path / "bad.npz", val_labels=trap)
    with pytest.raises(data.DataError, match="val_labels is an object array"):
        data.load(path)
    assert not (tmp_path / "trap").exists()
    np.load(path, allow_pickle=True)["val_labels"]
    assert (tmp_path / "trap").exists()  # so it was a trap


def npy(shape, content=b"", descr="|u1", fortran=False):
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def rewrite(path, replaced, compression=zipfile.ZIP_DEFLATED, extra=()):
    """Write the good arrays with some members' bytes replaced and some added."""
    with zipfile.ZipFile(write(path)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | replaced
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*members.items(), *extra]:
            archive.writestr(name, content)
    return path


def forge(path, name, file_size, compress_size=None):
    """Change the sizes that the zip's central directory states for a member."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    if compress_size is not None:
        struct.pack_into("<I", content, at + 20, compress_size)
    struct.pack_into("<I", content, at + 24, file_size)
    path.write_bytes(content)


TERABYTE = (10**9, 32, 32)
FOUR_GB = (4_000_000_000 // 1024, 32, 32)


@pytest.mark.parametrize("shape", [TERABYTE, (10**30, 8, 8), FOUR_GB])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_claims_too_much(tmp_path, shape, compression):
    content = npy(shape, bytes(1000))
    path = rewrite(tmp_path / "bad.npz", {"train_images.npy": content}, compression)
    check_refusal(path)
    if shape == FOUR_GB:  # the zip's own 32-bit sizes can be made to agree
        size = len(npy(shape)) + 4_000_000_000 // 1024 * 1024
        forge(path, "train_images.npy", size)
        check_refusal(path)
        forge(path, "train_images.npy", size, size)
        check_refusal(path)


def check_refusal(path, message=r"claim.* bytes"):
    """Refused before anything large is allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=message):
            data.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_header_that_inflates(tmp_path):
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 50_000_000) + b" " * 50_000_000
    path = rewrite(tmp_path / "bad.npz", {"train_images.npy": content})
    check_refusal(path, "not a readable npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable npz"),
        (b"\x93NUMPY\x01\x00", "not a readable npz"),
        (b"\x93NUMPY\x09\x00v\x00", "not a readable npz"),
        (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "not a readable npz"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 10_000, "not a readable npz"),
        (npy((8, 8, 8), bytes(511)), "claims"),
        (npy((8, 8, 8), bytes(513)), "claims"),
        (npy((-8, -8, 8), bytes(512)), "is empty"),
        (npy((8, 8, 8), bytes(512), fortran=True), "Fortran order"),
    ],
)
def test_a_bad_member(tmp_path, content, message):
    path = rewrite(tmp_path / "bad.npz", {"train_images.npy": content})
    with pytest.raises(data.DataError, match=message) as error:
        data.load(path)
    one_line(error)


def test_a_python_2_header_loads(tmp_path):
    good = data.load(write(tmp_path / "a.npz"))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        content = archive.read("train_images.npy").replace(b"(8, 8, 8), }   ", b"(8L, 8L, 8L), }")
    assert b"8L" in content
    path = rewrite(tmp_path / "b.npz", {"train_images.npy": content})
    assert np.array_equal(data.load(path).images, good.images)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unknown_compression(tmp_path, compression):
    path = rewrite(tmp_path / "bad.npz", {}, compression)
    with pytest.raises(data.DataError, match="unknown compression"):
        data.load(path)


def test_duplicate_member(tmp_path):
    extra = [("val_labels.npy", npy((4,), bytes(4)))]
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = rewrite(tmp_path / "bad.npz", {}, extra=extra)
    with pytest.raises(data.DataError, match="duplicate array val_labels"):
        data.load(path)


def test_encrypted_member(tmp_path):
    path = write(tmp_path / "bad.npz")
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="encrypted"):
        data.load(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_never_passes_and_never_escapes(tmp_path, save):
    path = write(tmp_path / "a.npz", save)
    good, content = data.load(path), path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(500):
        damaged = bytearray(content)
        if i % 10 == 0:
            damaged = damaged[: rng.randrange(len(content))]
        elif i % 10 == 1:
            at = rng.randrange(len(content))
            damaged[at : at + 50] = rng.randbytes(50)
        else:
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = data.load(path)
        except data.DataError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert np.array_equal(loaded.images, good.images)
            assert np.array_equal(loaded.labels, good.labels)
    assert refused > 250


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file; a source is auto, tissuemnist, digits"),
        (lambda path: path.write_bytes(b""), "not a readable npz"),
        (lambda path: path.write_text("<html>\n</html>"), "not a readable npz"),
        (lambda path: path.write_bytes(npy((9,), bytes(9))), "not a readable npz"),
        (lambda path: os.mkfifo(path), "no such file"),
        (lambda path: path.mkdir(), "images must be in the folder"),
    ],
)
def test_not_an_npz(tmp_path, make, message):
    path = tmp_path / "x\ny.npz"
    make(path)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(path)
    one_line(error)


@pytest.mark.parametrize("word", ["digit", "a\0b", "x" * 5000, "TissueMNIST"])
def test_unknown_source(word):
    with pytest.raises(data.DataError) as error:
        data.load(word)
    one_line(error)


# ---------------------------------------------------------------------------------- download


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` in the way that `server.mode` names."""

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.send_error(403)

    def do_GET(self):
        server, content = self.server, self.server.content
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        status, headers = 200, {"Content-Length": len(content)}
        if server.mode in ("404", "500"):
            return self.send_error(int(server.mode))
        if server.mode == "redirect":
            status, headers = 302, {"Location": f"http://127.0.0.1:{server.server_port}/b"}
        elif server.mode == "not satisfiable" and start:
            return self.send_error(416)
        elif start and server.mode != "ignores Range":
            offered = start - 1 if server.mode == "wrong range" else start
            status = 206
            headers = {"Content-Range": f"bytes {offered}-{len(content) - 1}/{len(content)}"}
            content = content[start:]
        if server.mode == "wrong length":
            headers = {"Content-Length": len(content) - 1}
        if server.mode == "oversize":
            content, headers = content + bytes(100_000), {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if server.mode == "breaks":
            content = content[: len(content) // 2]
        if server.mode == "stalls":
            self.wfile.write(content[: len(content) // 2])
            server.released.wait()
        elif status != 302:
            self.wfile.write(content)
        return None


@pytest.fixture
def server(tmp_path):
    """A server of a small data set on 127.0.0.1."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.content = write(tmp_path / "served.npz").read_bytes()
    running.mode, running.ranges, running.released = "plain", [], threading.Event()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.released.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def remote(server, monkeypatch):
    """That file in TissueMNIST's place."""
    content = server.content
    url = f"http://127.0.0.1:{server.server_port}/served.npz"
    file = data.RemoteFile(url, len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setattr(data, "TISSUEMNIST", file)
    return file


@pytest.fixture
def unreachable(monkeypatch):
    """A place where nothing listens in TissueMNIST's place."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.npz"
    file = data.RemoteFile(url, 100, "0" * 32)
    monkeypatch.setattr(data, "TISSUEMNIST", file)
    return file


def test_the_constants():
    assert data.TISSUEMNIST.size == 124_962_739
    assert data.TISSUEMNIST.md5 == "ebe78ee8b05294063de985d821c1c34b"
    assert len(data.TISSUEMNIST_CLASSES) == 8


@pytest.mark.parametrize("source", ["auto", "tissuemnist"])
def test_download_then_cache(tmp_path, server, remote, source, monkeypatch):
    monkeypatch.setattr(data, "TISSUEMNIST_CLASSES", ("a", "b", "c", "d"))
    calls = []
    root = tmp_path / "new" / "root"
    loaded = data.load(source, root, progress=lambda *call: calls.append(call))
    assert (root / "tissuemnist.npz").read_bytes() == server.content
    assert [path.name for path in root.iterdir()] == ["tissuemnist.npz"]
    assert calls[-1] == (remote.size, remote.size)
    assert (loaded.name, loaded.source, loaded.md5) == ("tissuemnist", remote.url, remote.md5)
    assert loaded.class_names == ("a", "b", "c", "d")
    again = data.load(source, root, download=False)
    assert np.array_equal(again.images, loaded.images)
    assert len(server.ranges) == 1


def test_wrong_cached_copy(tmp_path, server, remote):
    cached = tmp_path / "tissuemnist.npz"
    for content in (server.content[:-1], bytes(remote.size)):
        cached.write_bytes(content)
        with pytest.raises(data.DataError) as error:
            data.load("auto", tmp_path)
        found = hashlib.md5(content).hexdigest()
        for part in (str(cached), found, remote.md5, remote.url, "by hand", "--data digits"):
            assert part in one_line(error)
    assert not server.ranges


@pytest.mark.parametrize(
    ("mode", "message", "left"),
    [
        ("404", "404", 0),
        ("500", "500", 0),
        ("wrong length", "offers .* bytes, expected", 0),
        ("breaks", "broke off after", 0.5),
        ("redirect", "not https", 0),
        ("wrong content", "MD5 .* expected", None),
    ],
)
@pytest.mark.parametrize("source", ["auto", "tissuemnist"])
def test_failed_download_is_an_error(tmp_path, server, remote, mode, message, left, source):
    server.mode = mode
    if mode == "wrong content":
        server.content = bytes(remote.size)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(source, tmp_path)
    assert "--data digits" in one_line(error)
    assert "by hand" in str(error.value)
    assert not isinstance(error.value, data.NoNetworkError)
    assert len(server.ranges) == 1
    part = tmp_path / "tissuemnist.npz.part"
    assert (part.stat().st_size if part.exists() else None) == (
        None if left is None else int(remote.size * left)
    )
    assert not (tmp_path / "tissuemnist.npz").exists()


@pytest.mark.parametrize(
    ("mode", "requests"),
    [
        ("plain", ["bytes={half}-"]),
        ("ignores Range", ["bytes={half}-"]),
        ("not satisfiable", ["bytes={half}-", None]),
    ],
)
def test_resume(tmp_path, server, remote, mode, requests):
    target, half = tmp_path / "x.npz", remote.size // 2
    part = tmp_path / "x.npz.part"
    part.write_bytes(server.content[:half])
    server.mode = mode
    seen = []

    def progress(done, total):
        seen.append(part.stat().st_size)

    data.download(remote, target, progress=progress)
    assert target.read_bytes() == server.content
    assert not part.exists()
    assert max(seen) <= remote.size
    assert server.ranges == [r and r.format(half=half) for r in requests]


def test_oversize_is_cut_off(tmp_path, server, remote):
    server.mode = "oversize"
    data.download(remote, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_size == remote.size


@pytest.mark.parametrize("extra", [0, 7])
def test_a_part_that_is_complete_or_too_long(tmp_path, server, remote, extra):
    (tmp_path / "x.npz.part").write_bytes(server.content + bytes(extra))
    data.download(remote, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == server.content
    assert len(server.ranges) == (1 if extra else 0)


def test_wrong_range_then_afresh(tmp_path, server, remote):
    (tmp_path / "x.npz.part").write_bytes(server.content[:100])
    server.mode = "wrong range"
    with pytest.raises(data.DataError, match="offers bytes 99-"):
        data.download(remote, tmp_path / "x.npz")
    data.download(remote, tmp_path / "x.npz")
    assert server.ranges == ["bytes=100-", None]


def test_damaged_part_is_removed_then_afresh(tmp_path, server, remote):
    (tmp_path / "x.npz.part").write_bytes(bytes(100))
    with pytest.raises(data.DataError, match="MD5"):
        data.download(remote, tmp_path / "x.npz")
    data.download(remote, tmp_path / "x.npz")
    assert server.ranges == ["bytes=100-", None]


def test_interrupted_then_resumed(tmp_path, server, remote):
    def interrupt(done, total):
        raise KeyboardInterrupt

    server.mode = "stalls"
    with pytest.raises(KeyboardInterrupt):
        data.download(remote, tmp_path / "x.npz", progress=interrupt)
    server.mode = "plain"
    data.download(remote, tmp_path / "x.npz")
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.ranges[1])
    assert (tmp_path / "x.npz").read_bytes() == server.content


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_then_resumed(tmp_path, server, remote):
    server.content = bytes(4_000_000)
    big = data.RemoteFile(remote.url, 4_000_000, hashlib.md5(server.content).hexdigest())
    target, part = tmp_path / "x.npz", tmp_path / "x.npz.part"
    server.mode = "stalls"
    code = f"import data; data.download(data.RemoteFile{tuple(big)!r}, {str(target)!r})"
    home = Path(data.__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=home) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size > 10**6):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    server.mode = "plain"
    data.download(big, target)
    assert target.read_bytes() == server.content
    assert int(server.ranges[1].strip("bytes=-")) > 10**6


@pytest.mark.skipif(data.fcntl is None, reason="no locks here")
def test_two_downloads_to_one_place(tmp_path, server, remote):
    part = tmp_path / "x.npz.part"
    with part.open("ab") as other:
        data.fcntl.flock(other, data.fcntl.LOCK_EX)
        with pytest.raises(data.DataError, match="another process is downloading") as error:
            data.download(remote, tmp_path / "x.npz")
        one_line(error)
        assert part.stat().st_size == 0
        assert not server.ranges
    data.download(remote, tmp_path / "x.npz")


@pytest.mark.skipif(data.fcntl is None, reason="no locks here")
def test_the_other_download_finishes_between_open_and_lock(tmp_path, remote, monkeypatch):
    target, part = tmp_path / "x.npz", tmp_path / "x.npz.part"
    flock = data.fcntl.flock

    def finish_then_lock(*arguments):
        target.write_bytes(b"finished")
        part.unlink(missing_ok=True)
        flock(*arguments)

    monkeypatch.setattr(data.fcntl, "flock", finish_then_lock)
    with pytest.raises(data.DataError, match="another process"):
        data.download(remote, target)
    assert target.read_bytes() == b"finished"


def test_root_that_cannot_be_written(tmp_path, remote):
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match=r"download of .* failed") as error:
        data.load("auto", tmp_path / "file")
    one_line(error)


def test_full_disk(tmp_path, remote):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "x.npz.part").symlink_to("/dev/full")
    with pytest.raises(data.DataError, match="No space left"):
        data.download(remote, tmp_path / "x.npz")


def test_no_network(tmp_path, unreachable):
    with pytest.warns(data.DigitsFallbackWarning, match="refused") as caught:
        loaded = data.load("auto", tmp_path)
    assert loaded.name == "digits"
    assert len(caught) == 1
    with pytest.raises(data.NoNetworkError, match="refused"):
        data.download(unreachable, tmp_path / "x")
    with pytest.raises(data.DataError, match="by hand"):
        data.load("tissuemnist", tmp_path)


def test_download_off(tmp_path, server, remote):
    with pytest.warns(data.DigitsFallbackWarning, match="download is off"):
        assert data.load("auto", tmp_path, download=False).name == "digits"
    with pytest.raises(data.DataError, match="by hand"):
        data.load("tissuemnist", tmp_path, download=False)
    assert not server.ranges


def test_proxy_that_refuses_the_tunnel(tmp_path, server, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(data.NoNetworkError, match="403"):
        data.download(data.RemoteFile("https://host.invalid/x", 9, ""), tmp_path / "x")


def test_name_that_does_not_resolve(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(data.NoNetworkError, match="not known"):
        data.download(data.RemoteFile("https://host.invalid/x", 9, ""), tmp_path / "x")


def test_name_resolution_that_hangs(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: released.wait() and [])
    with pytest.raises(data.NoNetworkError, match="no connection in time"):
        data.download(data.RemoteFile("http://host.invalid/x", 9, ""), tmp_path / "x", timeout=0.1)
    released.set()


def test_server_that_falls_silent(tmp_path, server, remote):
    server.mode = "stalls"
    with pytest.raises(data.DataError, match="timed out") as error:
        data.download(remote, tmp_path / "x.npz", timeout=0.2)
    assert not isinstance(error.value, data.NoNetworkError)


# ------------------------------------------------------------------------------------ folder


LABELS = {7: 0, 12: 1, 100: 1, 3: 0}


@pytest.fixture
def folder(tmp_path):
    """Four images named by padded ids, their red channel twice the id, and a CSV beside them."""
    image_module = pytest.importorskip("PIL.Image")
    place = tmp_path / "cells"
    (place / "images").mkdir(parents=True)
    for i, suffix in zip(LABELS, ("png", "jpg", "JPEG", "png"), strict=True):
        pixels = np.full((28, 28, 3), 2 * i, np.uint8)
        if suffix == "png":
            pixels[..., 1:] = 255 - pixels[..., 1:]  # grey JPEG stays exact, colour may not
        image_module.fromarray(pixels).save(
            place / "images" / f"{i:0{1 if i == 12 else 6}d}.{suffix}"
        )
    (place / "images" / "._000003.png").touch()  # as macOS leaves them
    (place / ".thumbnails").mkdir()
    (place / ".thumbnails" / "1.png").touch()
    table(place, LABELS)
    return place


def table(place, labels, name="labels.csv", header="Id,Cell type"):
    rows = [f"{i:05d},{label}" for i, label in labels.items()]
    (place / name).write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def test_folder(folder, root):
    calls = []
    loaded = data.load(folder, root, progress=lambda *call: calls.append(call))
    assert (loaded.images.shape, loaded.images.dtype) == ((4, 28, 28), np.uint8)
    assert loaded.images[:, 5, 5].tolist() == [6, 14, 24, 200]  # ordered by id: 3, 7, 12, 100
    assert loaded.labels.tolist() == [0, 0, 1, 1]
    assert loaded.labels.dtype == np.int64
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (loaded.name, loaded.source, loaded.official) == ("cells", str(folder), None)
    content = loaded.images.tobytes() + loaded.labels.astype("<i8").tobytes()
    assert loaded.md5 == hashlib.md5(content).hexdigest()
    # The images beside the CSV, or the CSV beside the folder, are the same data set.
    assert data.load(folder / "images", root).md5 == loaded.md5
    shutil.move(folder / "labels.csv", folder / "images" / "labels.csv")
    assert data.load(folder / "images", root).md5 == loaded.md5


def test_folder_cache(folder, root, monkeypatch):
    first = data.load(folder, root)
    (cache,) = root.iterdir()
    decode = data._decode
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    assert data.load(folder, root).md5 == first.md5
    monkeypatch.setattr(data, "_decode", decode)
    content = bytearray(cache.read_bytes())
    for damaged in (b"", content[:1000], content[:600] + b"x" + content[601:]):
        cache.write_bytes(damaged)
        assert data.load(folder, root).md5 == first.md5
        assert cache.read_bytes() == content
    os.utime(folder / "images" / "000003.png", ns=(0, 0))
    data.load(folder, root)
    assert len(list(root.iterdir())) == 2


def test_folder_without_a_place_for_the_cache(folder, tmp_path):
    (tmp_path / "file").touch()
    assert data.load(folder, tmp_path / "file").labels.tolist() == [0, 0, 1, 1]


def test_folders_split_is_80_20_of_the_first_and_all_of_the_second():
    n, m = 150_000, 50_000
    index = np.arange(n + m)
    official = {"train": index[:n], "valid": index[:0], "test": index[n:]}
    image_data = data.ImageData(None, None, (), "", "", "", official)
    split = data.folders_split(image_data, seed=3)
    assert [len(part) for part in split] == [120_000, 30_000, 50_000]
    order = legacy_permutation(n, 3)
    assert split.train.tolist() == order[:120_000]
    assert split.valid.tolist() == order[120_000:]
    assert split.test.tolist() == list(range(n, n + m))


def test_two_folders(folder, root, tmp_path):
    second = shutil.copytree(folder, tmp_path / "second")
    table(folder, {3: 0, 7: 2, 12: 1, 100: 2})
    table(second, {3: 1, 7: 0, 12: 0, 100: 1})  # no image of class 2, which the first folder has
    shown = []
    loaded = data.load_folders(folder, second, root, lambda *of: shown.append(of))
    one = data.load(folder, root)
    assert loaded.labels.tolist() == [0, 2, 1, 2, 1, 0, 0, 1]
    np.testing.assert_array_equal(loaded.images, np.concatenate([one.images] * 2))
    content = loaded.images.tobytes() + loaded.labels.astype("<i8").tobytes()
    assert loaded.md5 == hashlib.md5(content).hexdigest()
    parts = {name: index.tolist() for name, index in loaded.official.items()}
    assert parts == {"train": [0, 1, 2, 3], "valid": [], "test": [4, 5, 6, 7]}
    assert shown[-1] == (4, 4)
    table(second, {3: 1, 7: 0, 12: 4, 100: 1})
    with pytest.raises(data.DataError, match=r"labels of 0..4 have no image.*: 3"):
        data.load_folders(folder, second, root)
    with pytest.raises(data.DataError, match="gone: no such folder"):
        data.load_folders(folder, tmp_path / "gone", root)


def remove(name):
    return lambda folder: (folder / "images" / name).unlink()


def copy(name, new):
    return lambda folder: shutil.copy(folder / "images" / name, folder / "images" / new)


def image(name, size=(28, 28), mode="RGB"):
    def save(folder):
        from PIL import Image

        Image.new(mode, size).save(folder / "images" / name)

    return save


def overwrite(name, content):
    return lambda folder: (folder / "images" / name).write_bytes(content)


def relabel(labels, **options):
    return lambda folder: table(folder, labels, **options)


def csv_text(text):
    return lambda folder: (folder / "labels.csv").write_bytes(text)


BAD_FOLDERS = {
    "missing image": (remove("000003.png"), "1 rows of labels.csv have no image: 3"),
    "many": (
        relabel(LABELS | {i: 0 for i in range(50, 60)}),
        r"10 rows of labels.csv have no image: 50, 51, 52, \.\.\.",
    ),
    "no row": (relabel({3: 0, 7: 1}), "2 images have no row in labels.csv: 12, 100"),
    "duplicate image": (copy("000003.png", "03.png"), "1 ids have more than one image: 3"),
    "duplicate row": (csv_text(b"Id,Cell type\n3,0\n03,1\n"), "1 duplicate ids: 3"),
    "name": (copy("000003.png", "cell3.png"), "1 image names are not an integer id: cell3.png"),
    "row id": (csv_text(b"Id,Cell type\n3,0\nx,1\n"), "1 rows .* not an integer: x,1"),
    "row label": (csv_text(b"Id,Cell type\n3,1.5\n"), "1 rows .* not an integer: 3,1.5"),
    "short row": (csv_text(b"Id,Cell type\n3\n"), "1 rows .* not an integer: 3,"),
    "huge id": (csv_text(b"Id,Cell type\n" + b"9" * 5000 + b",1\n"), "1 rows .* not an integer"),
    "negative": (relabel(LABELS | {3: -1}), "negative labels"),
    "one class": (relabel(dict.fromkeys(LABELS, 0)), "one class only"),
    "gap": (relabel(LABELS | {3: 3}), "out of range: 2"),
    "unreadable": (overwrite("000003.png", b"x"), "1 images are not readable .*: 000003.png"),
    "truncated": (
        lambda folder: os.truncate(folder / "images" / "12.jpg", 400),
        "1 images are not readable .*: 12.jpg",
    ),
    "16 bit": (image("000003.png", mode="I;16"), "1 images are not readable as 8-bit"),
    "missized": (image("000007.png", (32, 32)), "1 images differ in size from .*: 000007.png"),
    "not square": (image("000003.png", (28, 30)), "30x28 pixels, expected square"),
    "small": (image("000003.png", (7, 7)), "smaller than 8"),
    "no csv": (lambda folder: (folder / "labels.csv").unlink(), "found none"),
    "other csv": (relabel(LABELS, header="id,label"), "found none"),
    "empty csv": (csv_text(b""), "found none"),
    "binary csv": (csv_text(b"Id,Cell type\n\xff\xfe"), "found none"),
    "two csv": (relabel(LABELS, name="more.csv"), "found labels.csv, more.csv"),
    "two subfolders": (
        lambda folder: shutil.copytree(folder / "images", folder / "more"),
        "found 2 subfolders",
    ),
    "no images": (lambda folder: shutil.rmtree(folder / "images"), "found 0 subfolders"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder(folder, root, spoil, message):
    spoil(folder)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(folder, root)
    assert str(folder) in one_line(error)
    assert not root.exists()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_first_channel_of_every_mode(folder, root, mode):
    from PIL import Image

    value = {"1": 1}.get(mode, 255)
    picture = (
        Image.new("L", (28, 28), 0).convert(mode) if mode == "P" else Image.new(mode, (28, 28))
    )
    picture.paste(255 if mode == "P" else (value,) * len(picture.getbands()), (0, 0, 9, 28))
    name = "12.jpg" if mode == "CMYK" else "000003.png"
    picture.save(folder / "images" / name)
    row = 2 if mode == "CMYK" else 0
    assert data.load(folder, root).images[row, 5, [0, 20]].tolist() == [255, 0]


def test_folder_without_pillow(tmp_path, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "1.png").touch()
    (tmp_path / "2.png").touch()
    table(tmp_path, {1: 0, 2: 1})
    with pytest.raises(data.DataError, match=r"pip install -r requirements-figures\.txt"):
        data.load(tmp_path, root)


# ------------------------------------------------------------------------------- load_images


def test_images_of_a_folder(folder):
    ids, images = data.load_images(folder)
    assert ids == ["000003", "000007", "000100", "12"]
    assert images[:, 5, 5].tolist() == [6, 14, 200, 24]
    copy("000003.png", "000003.jpg")(folder)
    with pytest.raises(data.DataError, match="1 ids have more than one image: 000003"):
        data.load_images(folder)


def test_images_of_an_npz(tmp_path):
    made = arrays()
    ids, images = data.load_images(write(tmp_path / "a.npz"))
    assert ids == ["0", "1", "2", "3"]
    assert np.array_equal(images, made["test_images"])
    np.savez(tmp_path / "b.npz", images=made["train_images"])
    ids, images = data.load_images(tmp_path / "b.npz")
    assert len(ids) == 8
    assert np.array_equal(images, made["train_images"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"pictures": np.zeros(3)}, "no array images"),
        ({"images": np.zeros((3, 8, 8))}, "images has dtype float64"),
        ({"images": np.zeros((3, 8, 9), U8)}, "square"),
        ({"images": np.zeros((3, 8, 8), object)}, "object array"),
    ],
)
def test_bad_images(tmp_path, made, message):
    np.savez(tmp_path / "a.npz", **made)
    with pytest.raises(data.DataError, match=message):
        data.load_images(tmp_path / "a.npz")


def test_no_such_images(tmp_path):
    with pytest.raises(data.DataError, match="no such file"):
        data.load_images(tmp_path / "nothing")


# -------------------------------------------------------------------------------------- main


def test_main(tmp_path, capsys):
    path = write(tmp_path / "cells.npz")
    assert data.main([str(path)]) == 0
    out, err = capsys.readouterr()
    assert not err
    for part in (
        "cells",
        str(path),
        hashlib.md5(path.read_bytes()).hexdigest(),
        "16, shape (8, 8)",
        "class 3          4  25.0%  class 3",
        "poster split: train 9, valid 3, test 4",
        "official split: train 8, valid 4, test 4",
    ):
        assert part in out


def test_main_errors(tmp_path, capsys, monkeypatch):
    assert data.main([str(tmp_path / "nothing.npz")]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"data\.py: error: .*nothing\.npz: no such file; .*\n", err)

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    assert data.main(["digits"]) == 130


def test_main_warns_in_one_line(tmp_path, capsys, unreachable, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.main([]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"data\.py: warning: the embedded digits stand in for .*\n", err)
    assert "1,797" in out


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(data.__file__, tmp_path / "data.py")
    write(tmp_path / "cells.npz")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    shown = run("data.py", "cells.npz")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "poster split: train 9, valid 3, test 4" in shown.stdout
    wrong = run("data.py", "nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    imported = run("-c", "import data, sys; print({'sklearn', 'PIL', 'torch'} & {*sys.modules})")
    assert imported.stdout == "set()\n"
