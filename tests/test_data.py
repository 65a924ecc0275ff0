"""data.py: images, splits, sources, damage, download, conversion. All within 127.0.0.1."""

import hashlib
import http.server
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import unittest.mock
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import data

U8 = np.uint8
NOWHERE = "http://127.0.0.1:1/{name}.npz"


def arrays(sizes=(8, 4, 4), shape=(8, 8)):
    """Random images of four classes in MedMNIST's layout."""
    rng, made = np.random.RandomState(0), {}
    for part, n in zip(data.PARTS, sizes, strict=True):
        made[f"{part}_images"] = rng.randint(0, 256, (n, *shape), U8)
        made[f"{part}_labels"] = (np.arange(n) % 4).astype(U8)[:, None]
    return made


def write(path, save=np.savez, **changes):
    save(path, **{k: v for k, v in (arrays() | changes).items() if v is not None})
    return path


@pytest.fixture(autouse=True)
def nothing_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    urllib.request.install_opener(None)  # which would remember an earlier proxy
    monkeypatch.setattr(data, "URL", NOWHERE)


def test_ids_are_sha256_of_the_bytes_in_c_order():
    images = np.random.RandomState(0).randint(0, 256, (4, 9, 8, 3), U8)
    for view in (images, images.transpose(0, 3, 2, 1), images[:0]):
        values = [bytes(image.ravel().tolist()) for image in view]
        ids = data.ids(view)
        assert ids.tolist() == [hashlib.sha256(v).hexdigest()[:16] for v in values]
        assert ids.dtype == np.dtype("U16")


def stretched_by_hand(image):
    """Return the values of an image by the formula, in Python's integers."""
    values = image.ravel().tolist()
    low, high = min(values), max(values)
    if low == high:
        return values
    return [(value - low) * 255 // (high - low) for value in values]


@pytest.mark.parametrize("shape", [(8, 8), (8, 9, 3)])
def test_stretch_is_the_formula_image_by_image(shape):
    rng = np.random.RandomState(0)
    lows, widths = rng.randint(0, 128, 50), rng.randint(1, 129, 50)
    images = np.array([rng.randint(a, a + w, shape) for a, w in zip(lows, widths, strict=True)], U8)
    images[:3] = np.array([0, 7, 255], U8).reshape(3, *[1] * len(shape))  # flat images
    images[3].flat[:2] = 0, 255  # the whole scale already
    images[4].flat[:] = np.arange(images[4].size) % 2 + 254
    before = images.copy()
    stretched = data.stretch(images)
    assert (stretched.dtype, stretched.shape) == (U8, images.shape)
    assert [image.ravel().tolist() for image in stretched] == [*map(stretched_by_hand, images)]
    assert np.array_equal(stretched[:4], images[:4])
    assert np.array_equal(images, before)
    assert data.stretch(images[:0]).shape == (0, *shape)


def counter(n):
    """Return n different images of four pixels."""
    return np.arange(n, dtype="<u4").view(U8).reshape(n, 2, 2)


@pytest.mark.parametrize(
    ("n", "digest"), [(236_386, "29c4890d0566ead7"), (236_300, "87f290e31ef9cc91")]
)
def test_the_poster_has_200_000_images_the_same_for_ever(n, digest):
    split = data.poster_split(counter(n))
    tuning = data.tuning_split(split)
    assert [len(part) for part in (*split, *tuning)] == [120_000, 30_000, 50_000, 8_000, 2_000, 0]
    assert len(np.unique(np.concatenate(split))) == 200_000
    assert np.isin(np.concatenate(tuning), np.concatenate(split[:2])).all()
    assert {part.dtype for part in (*split, *tuning)} == {np.dtype(np.int64)}
    indices = np.concatenate(split + tuning).astype("<i8")
    assert hashlib.sha256(indices).hexdigest()[:16] == digest


@pytest.mark.parametrize(("n", "sizes"), [(1797, (1078, 269, 450)), (6, (3, 1, 2))])
def test_poster_split_sorts_by_sha256_of_seed_and_pixels(n, sizes):
    images = counter(n)
    images[n // 2 :] = images[: n - n // 2]  # equal images keep the file's order
    keys = [hashlib.sha256(b"3 " + bytes(image.ravel().tolist())).digest() for image in images]
    split = data.poster_split(images, seed=3)
    assert tuple(map(len, split)) == sizes
    assert np.concatenate(split).tolist() == sorted(range(n), key=lambda i: (keys[i], i))
    assert not np.array_equal(split.train, data.poster_split(images, seed=4).train)
    assert [len(part) for part in data.tuning_split(split, 4)] == [3, 1, 0]


def test_splits_do_not_depend_on_the_order_of_the_file():
    images = np.random.RandomState(0).randint(0, 256, (100, 8, 8, 3), U8)
    images[90:] = images[:10]
    shuffled = images[np.random.RandomState(1).permutation(100)]
    split, other = data.poster_split(images), data.poster_split(shuffled)
    assert not np.array_equal(split.train, other.train)
    parts = zip(split + data.tuning_split(split), other + data.tuning_split(other), strict=True)
    for part, other_part in parts:
        assert np.array_equal(images[part], shuffled[other_part])


@pytest.mark.parametrize(
    ("name", "official", "message"),
    [
        ("poster", None, "5 images are too few to split 60/15/25 %"),
        ("official", None, "cells has no official split"),
        ("official", data.Split([0, 1], [], [2]), "cells has no official split"),
        ("random", None, "split 'random' is unknown"),
    ],
)
def test_split_that_cannot_be(name, official, message):
    image_data = data.ImageData(counter(5), None, (), "cells", "", "", official)
    with pytest.raises(data.DataError, match=message):
        data.split(image_data, name)


def test_digits():
    from sklearn.datasets import load_digits

    original, digits = load_digits(), data.load("digits")
    content = digits.images.tobytes() + digits.labels.astype("<i8").tobytes()
    assert digits.md5 == hashlib.md5(content).hexdigest() == "e293a59c261b1f3f286b2578f799f110"
    assert (digits.images.shape, digits.images.dtype) == ((1797, 28, 28), U8)
    assert (digits.name, digits.source, digits.official) == ("digits", "digits", None)
    assert digits.class_names == tuple("0123456789") and digits.num_classes == 10
    assert digits.labels.tolist() == original.target.tolist()
    for y, x in np.ndindex(28, 28):
        inside = min(y, x) >= 2 and max(y, x) < 26
        grey = original.images[:, (y - 2) // 3, (x - 2) // 3] if inside else np.zeros(1797)
        assert np.array_equal(digits.images[:, y, x], np.floor(grey / 16 * 255))


@pytest.mark.parametrize(
    ("save", "shape", "dtype"),
    [(np.savez, (8, 8), "<u8"), (np.savez_compressed, (11, 11, 3), ">i2")],
)
def test_npz(tmp_path, save, shape, dtype):
    made = arrays(shape=shape)
    made |= {f"{part}_labels": made[f"{part}_labels"].astype(dtype) for part in data.PARTS}
    made["val_labels"] = made["val_labels"][:, 0].astype("i1")
    made["train_images"] = np.asfortranarray(made["train_images"])
    path = write(tmp_path / "cells.npz", save, **made)
    loaded = data.load(str(path))
    assert (loaded.images.dtype, loaded.labels.dtype) == (U8, np.int64)
    assert loaded.labels.tolist() == [0, 1, 2, 3] * 4
    assert (loaded.name, loaded.source) == ("cells", str(path))
    assert loaded.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    assert loaded.class_names == ("class 0", "class 1", "class 2", "class 3")
    for part, index in zip(data.PARTS, data.split(loaded, "official"), strict=True):
        assert index.dtype == np.int64
        assert np.array_equal(loaded.images[index], made[f"{part}_images"])


def test_name_and_class_names_follow_the_md5(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.npz")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    assert data.load(path).name == "mine"
    monkeypatch.setitem(data.MEDMNIST, "octmnist", md5)
    loaded = data.load(path)
    assert (loaded.name, loaded.source, loaded.class_names[3]) == ("octmnist", str(path), "class 3")
    assert data.TISSUEMNIST[0] == data.MEDMNIST["tissuemnist"]
    monkeypatch.setattr(data, "TISSUEMNIST", (data.TISSUEMNIST[0], md5))
    loaded = data.load(path)
    assert (loaded.name, loaded.source) == ("tissuemnist", str(path))
    assert loaded.class_names == data.TISSUEMNIST_CLASSES


def test_all_images_may_be_in_one_part(tmp_path):
    loaded = data.load(write(tmp_path / "a.npz", **arrays((16, 0, 0))))
    assert [len(part) for part in loaded.official] == [16, 0, 0]


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.npz")
    monkeypatch.setitem(data.MEDMNIST, "octmnist", hashlib.md5(path.read_bytes()).hexdigest())
    assert data.load("~/a.npz").source == "~/a.npz"
    path.rename(tmp_path / "octmnist.npz")
    assert data.load("octmnist", "~", download=False).source == "octmnist"
    for words in ("~no-such-user/a",), ("octmnist", "~no-such-user/a"):
        with pytest.raises(data.DataError, match=r"^~no-such-user/a: .* without ~$"):
            data.load(*words)


BAD_ARRAYS = [
    (dict(val_images=None), "not of MedMNIST's layout.*val_images is not a file"),
    (dict(train_images=np.zeros((8, 8, 8))), "Cannot cast.* to dtype.'uint8'"),
    (dict(test_images=np.zeros((4, 9, 9), U8)), "array dimensions .* must match exactly"),
    (arrays() | dict(val_labels=[0] * 5, test_labels=[0] * 3), "cannot reshape array of size 5"),
    (arrays(shape=(8, 8, 4)), r"\(16, 8, 8, 4\), not"),
    (arrays(shape=(8, 9)), r"\(16, 8, 9\), not"),
    (arrays(shape=(7, 7)), r"\(16, 7, 7\), not .*, H >= 8"),
    (arrays(shape=()), r"\(16,\), not"),
    (dict(val_labels=np.zeros((4, 14), U8)), "cannot reshape array of size 56"),
    (dict(val_labels=np.array([0, 1, 2, 3], object)), "damaged.*Object arrays cannot be loaded"),
    (dict(val_labels=np.zeros((4, 1))), "Cannot cast.* to dtype.'int64'"),
    (dict(val_labels=np.array([0, 1, 2, -2])), r"every class present.* found \[-2, 0, 1, 2, 3\]"),
    (dict(val_labels=np.array([0, 1, 2, 5])), r"found \[0, 1, 2, 3, 5\]"),
    (arrays((1, 1, 1)), r"K at least 2; found \[0\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS)
def test_bad_arrays(tmp_path, changes, message):
    path = write(tmp_path / "bad.npz", **changes)
    with pytest.raises(data.DataError, match=f"^{path}: .*{message}"):
        data.load(path)


def test_an_array_too_large_for_the_memory(tmp_path):
    path = write(tmp_path / "a.npz")
    small, huge = b"(8, 8, 8), }".ljust(25), b"(1000000000, 100, 100), }"
    path.write_bytes(path.read_bytes().replace(small, huge))
    with pytest.raises(data.DataError, match="damaged, or too large for the memory"):
        data.load(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_never_passes_and_never_escapes(tmp_path, save):
    path = write(tmp_path / "a.npz", save)
    good, content, rng = data.load(path), path.read_bytes(), random.Random(0)
    refused = 0
    for i in range(400):
        damaged, at = bytearray(content), rng.randrange(len(content))
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if i % 10 else damaged[:at])
        try:
            loaded = data.load(path)
        except data.DataError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert np.array_equal(loaded.images, good.images)
            assert np.array_equal(loaded.labels, good.labels)
    assert refused > 200


class Handler(http.server.BaseHTTPRequestHandler):
    def do_CONNECT(self):
        self.send_error(403)

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.asked.append(asked)
        content = server.content[int(asked[6:-1]) if server.status == 206 else 0 :]
        self.send_response(server.status if content else 416)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if server.cut else content)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on 127.0.0.1 that has a small data set in TissueMNIST's place."""
    content = write(tmp_path / "served.npz", **arrays((800, 100, 100), (28, 28))).read_bytes()
    monkeypatch.setitem(data.MEDMNIST, "tissuemnist", hashlib.md5(content).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content, running.status, running.cut, running.asked = content, 206, False, []
        running.target = tmp_path / "tissuemnist.npz"
        running.part = tmp_path / "tissuemnist.npz.part"
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{running.server_port}/{{name}}.npz?d=1")
        threading.Thread(target=running.serve_forever, args=[0.01]).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("source", ["auto", "tissuemnist"])
def test_download_once(server, tmp_path, source):
    target = tmp_path / "new" / "tissuemnist.npz"
    loaded = data.load(source, target.parent)
    assert target.read_bytes() == server.content
    assert (loaded.name, loaded.source) == ("tissuemnist", "tissuemnist")
    assert data.load(source, target.parent, download=False).md5 == loaded.md5
    assert len(server.asked) == 1


def test_download_goes_on_after_a_cut(server, tmp_path):
    server.cut, half, on_disk = True, len(server.content) // 2, []
    with pytest.raises(data.DataError, match=f"broke off after {half:,} of .*run again, or"):
        data.load("auto", tmp_path, progress=lambda *_: on_disk.append(server.part.stat().st_size))
    assert half / 2 < on_disk[-2] < half  # a kill would have left that
    server.cut = False
    data.load("auto", tmp_path)
    assert server.asked == ["bytes=0-", f"bytes={half - 1}-"]


@pytest.mark.parametrize("status", [206, 200])  # 200: the server begins anew
@pytest.mark.parametrize("length", [0, 1, 100_000, None])
def test_download_goes_on_from_any_place(server, tmp_path, status, length):
    server.status = status
    server.part.write_bytes(server.content[:length])
    calls = []
    data.load("tissuemnist", tmp_path, progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(server.content), len(server.content))
    assert server.target.read_bytes() == server.content
    assert not server.part.exists()


def test_wrong_bytes_are_found(server, tmp_path):
    for damaged in (server.part, server.target):  # left by something else, or fetched by hand
        damaged.write_bytes(bytes(100))
        with pytest.raises(data.DataError, match=r"has MD5 .*: remove it and run again, or"):
            data.load("auto", tmp_path)
        server.target.unlink()
    data.load("auto", tmp_path)


@pytest.mark.parametrize(
    ("scheme", "status", "download", "message"),
    [("http", 404, True, "404"), ("https", 206, True, "SSL"), ("http", 206, False, "No such file")],
)
def test_no_digits_where_a_connection_is(server, monkeypatch, scheme, status, download, message):
    server.status = status
    monkeypatch.setattr(data, "URL", data.URL.replace("http", scheme))
    by_hand = rf"fetch {scheme}://127.0.0.1:.* by hand to {server.target} \(MD5 "
    with pytest.raises(data.DataError, match=f"{message}.*choose another root.*{by_hand}"):
        data.load("auto", server.target.parent, download)


@pytest.mark.parametrize(
    ("url", "why"), [(NOWHERE, "refused"), ("https://host.invalid/{name}.npz", "403")]
)
def test_no_connection(server, tmp_path, capsys, monkeypatch, url, why):
    monkeypatch.setattr(data, "URL", url)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")  # opens no tunnel
    with pytest.warns(UserWarning, match=f"digits stand in for TissueMNIST: .*{why}"):
        assert data.main([]) == 0
    assert "name      digits" in capsys.readouterr().out
    with pytest.raises(data.DataError, match=f"{why}.* by hand"):
        data.load("breastmnist")


LABELS = {7: 0, 12: 1, 100: 1, 3: 0, 50: 2}


def pixels_of(ids):
    return np.array([np.add.outer(np.arange(28), np.arange(28)) + i for i in ids], U8)


def table(rows, name="labels.csv", columns="Id,Cell type"):
    lines = [columns, *(f"{i:05d},{label}" for i, label in rows.items())]
    return lambda folder: (folder / name).write_text("\n".join(lines), "utf-8-sig")


def folder_of(place, labels, digits=6, suffix="png"):
    """Images whose pixels tell their id, named by padded ids, and a CSV beside them."""
    image_module = pytest.importorskip("PIL.Image")
    place.mkdir()
    for i in labels:
        image_module.fromarray(pixels_of([i])[0]).save(place / f"{i:0{digits}d}.{suffix}")
    table(labels)(place)
    return place


@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("JPEG", 3)])
def test_convert_two_folders_as_the_authors_did(tmp_path, capsys, suffix, tolerance):
    train = folder_of(tmp_path / "train", LABELS, 6, suffix)
    test = folder_of(tmp_path / "test", {10: 1, 9: 2}, 1, suffix)
    (train / "._000003.png").touch()  # as macOS leaves them
    path = tmp_path / "cells.npz"
    assert data.main(["convert", str(train), str(test), str(path)]) == 0
    assert "official  4 train, 1 valid, 2 test" in capsys.readouterr().out
    loaded = data.load(path)
    shuffled = np.random.RandomState(0).permutation([3, 7, 12, 50, 100])
    parts = shuffled[:4], shuffled[4:], [9, 10]
    for index, ids in zip(data.split(loaded, "official"), parts, strict=True):
        assert loaded.labels[index].tolist() == [(LABELS | {10: 1, 9: 2})[i] for i in ids]
        difference = loaded.images[index].astype(int) - pixels_of(ids)
        assert np.abs(difference).max() <= tolerance


def test_convert_one_folder_as_the_poster_is_split(tmp_path):
    train = folder_of(tmp_path / "train", {i: i % 2 for i in range(20)})
    shutil.move(train / "labels.csv", tmp_path / "labels.csv")  # beside the folder
    assert data.main(["convert", str(train), str(tmp_path / "cells.npz")]) == 0
    loaded = data.load(tmp_path / "cells.npz")
    assert [len(part) for part in loaded.official] == [12, 3, 5]
    images = pixels_of(range(20))
    order = np.concatenate(data.poster_split(images))
    assert np.array_equal(loaded.images, images[order])
    assert loaded.labels.tolist() == (order % 2).tolist()


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_the_first_channel_of_every_mode(tmp_path, mode):
    train = folder_of(tmp_path / "train", LABELS)
    image = pytest.importorskip("PIL.Image").new("RGB", (28, 28))
    image.paste((255, 0, 255) if "RGB" in mode else (255, 255, 255), (0, 0, 9, 28))
    image.convert(mode).save(train / "000003.png")
    data.convert(train, train, tmp_path / "cells.npz")
    images = data.load(tmp_path / "cells.npz").images  # all of `train` is the test part too
    assert images[-5, 5, [0, 20]].tolist() == [255, 0]


def image(name, size=(28, 28), mode="L", kind=None):
    module = "PIL.Image"
    return lambda folder: pytest.importorskip(module).new(mode, size).save(folder / name, kind)


BAD_FOLDERS = [
    (lambda folder: [p.unlink() for p in folder.glob("*.png")], "JPEG or PNG .* found 0 and 1"),
    (table(LABELS, name="more.csv"), "one CSV in it or else in its parent; found 5 and 2"),
    (lambda folder: (folder / "labels.csv").unlink(), "found 5 and 0"),
    (lambda folder: (folder / "000003.png").unlink(), "row in labels.csv; 1 have not, such as 3"),
    (table({3: 0, 7: 1, 50: 2}), "2 have not, such as 12"),
    (image("03.png"), "1 have not, such as 3"),
    (lambda f: [image("3.jpg")(f), table(LABELS, columns="Id,Cell type\n3,0")(f)], "such as 3"),
    (image("1_23.png"), "images' names, .* must be decimal digits; found '1_23'"),
    (image("٣.png"), "digits; found '٣'"),
    (table({3: 1.5}), "Id and Cell type in .*labels.csv, must be decimal digits; found '1.5'"),
    (table(LABELS, columns="Id,Cell type\n8," + "9" * 19), "digits; found '9{19}'"),
    (table(LABELS, columns="Id,Cell type\n3"), "digits; found ''"),
    (table(LABELS, columns="id,label"), "digits; found 'Id'"),
    (table(LABELS | {3: 4}), r"every class present.* found \[0, 1, 2, 4\]"),
    (lambda folder: os.truncate(folder / "000012.png", 50), "000012.png: not a readable"),
    (image("000012.png", mode="I;16"), r"000012.png: not a readable 8-bit .*\(mode I;16\)"),
    (image("000012.png", mode="CMYK", kind="JPEG"), r"000012.png: .*\(mode CMYK\)"),
    (image("000012.png", (14, 14)), r"12.png: .* of the others' size .*\(14, 14\), .*\(28, 28\)"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS)
def test_bad_folder(tmp_path, spoil, message):
    train = folder_of(tmp_path / "train", LABELS)
    spoil(train)
    with pytest.raises(data.DataError, match=message):
        data.convert(train, train, tmp_path / "cells.npz")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_convert_leaves_no_half_file(tmp_path, monkeypatch):
    train = folder_of(tmp_path / "train", LABELS)
    monkeypatch.setattr(Path, "replace", unittest.mock.Mock(side_effect=OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        data.convert(train, train, tmp_path / "cells.npz")
    assert [*tmp_path.iterdir()] == [train]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "digit: no such npz file, nor one of auto, digits, tissuemnist, .*"),
        (["."], r"\.: no such npz file, .*"),
        (["a", "b"], "expected .*"),
        (["convert", "a"], "expected .*"),
        (["convert", "a", "b", "c", "d"], "expected .*"),
        (["a" * 300], ".*a{300}.*"),  # too long for a file's name
        (["convert", "a", "b", "."], r"\.: name a new file .*"),
        (["convert", "a", "no-such-folder/b.npz"], "no-such-folder/b.npz: name a new file .*"),
        (["~no-such-user/a"], "~no-such-user/a: .*"),
        (["convert", "a", "b.npz"], "a: JPEG or PNG files expected .*"),
        (["digits"], "import of sklearn.*"),
    ],
)
def test_main_errors_are_one_line(capsys, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert data.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"data\.py: error: {message}\n", err)


def test_main_interrupted(monkeypatch):
    monkeypatch.setattr(data, "load", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    assert data.main(["digits"]) == 130


def test_alone_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    shutil.copy(data.__file__, tmp_path / "data.py")
    path = write(tmp_path / "café.npz")
    images = np.concatenate([made for name, made in arrays().items() if "images" in name])
    stretched = [stretched_by_hand(image) for image in images]
    brightest = np.mean([image.max() for image in images])

    def run(words):
        options = dict(cwd=tmp_path, shell=True, capture_output=True, text=True)
        return subprocess.run(f"'{sys.executable}' {words}", check=False, **options)

    shown = run("data.py café.npz")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        r"name      caf\xe9",
        r"source    caf\xe9.npz",
        f"md5       {hashlib.md5(path.read_bytes()).hexdigest()}",
        "images    uint8 (16, 8, 8)",
        f"mean grey {images.mean():.2f} raw, {np.mean(stretched):.2f} stretched",
        f"brightest {brightest:.2f} raw, mean of the images' maxima",
        "poster    9 train, 3 valid, 4 test",
        "official  8 train, 4 valid, 4 test",
        *(f"class {k}          4  25.0%  class {k}" for k in range(4)),
    ]
    script = "import data, sys; print({'sklearn', 'PIL', 'torch'} & {*sys.modules})"
    assert run(f'-c "{script}"').stdout == "set()\n"
    full = r"data\.py: error: .*No space left on device\n"
    for output, status, error in ((">&-", 0, ""), ("| :", 0, ""), (">/dev/full", 2, full)):
        shown = run(f"data.py café.npz {output}")
        assert shown.returncode == status and re.fullmatch(error, shown.stderr)
