"""Where the images come from and how they are split.

The poster's images are public as TissueMNIST (MedMNIST v2, CC BY 4.0), a 125 MB file that is
downloaded once into ~/.medmnist, where the medmnist package keeps it too. Any other file in
MedMNIST's layout, a folder of images beside a CSV (the authors' own format) and scikit-learn's
embedded digits, which need no network, load through the same function:

    image_data = load("auto")                        # uint8 images, int64 labels
    split = poster_split(len(image_data.labels))     # 120,000 / 30,000 / 50,000 indices

`python data.py SOURCE` prints a summary. Needs numpy; scikit-learn only for the digits, Pillow
only for a folder of images. This file imports no sibling: it can be copied alone.
"""

import argparse
import csv
import hashlib
import http.client
import io
import itertools
import math
import operator
import os
import queue
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: two downloads at once are then not kept apart
    fcntl = None

Progress = Callable[[int, int], None]


class RemoteFile(NamedTuple):
    """A file on a server: its URL, its size in bytes, its MD5 in hexadecimal."""

    url: str
    size: int
    md5: str


# Zenodo record 10519652 (MedMNIST v2); the medmnist package states the same MD5.
TISSUEMNIST = RemoteFile(
    "https://zenodo.org/records/10519652/files/tissuemnist.npz?download=1",
    124_962_739,
    "ebe78ee8b05294063de985d821c1c34b",
)
TISSUEMNIST_CLASSES = (
    "Collecting Duct, Connecting Tubule",
    "Distal Convoluted Tubule",
    "Glomerular endothelial cells",
    "Interstitial endothelial cells",
    "Leukocytes",
    "Podocytes",
    "Proximal Tubule Segments",
    "Thick Ascending Limb",
)
POSTER_TOTAL = 200_000  # the poster: 120,000 train + 30,000 validation + 50,000 test
MIN_IMAGE_SIZE = 8  # pixels; three 2x2 poolings in the poster's network leave one
CHUNK = 1 << 20  # bytes moved at a time
SOURCES = "auto, tissuemnist, digits, FILE.npz or FOLDER"


class DataError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class NoNetworkError(DataError):
    """No connection could be made at all: no name, refused, timed out, no proxy tunnel."""


class DigitsFallbackWarning(UserWarning):
    """The embedded digits stand in for TissueMNIST."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set in memory.

    Attributes
    ----------
    images : ndarray of uint8, shape (N, H, H) or (N, H, H, 3)
    labels : ndarray of int64, shape (N,)
        In 0..K-1, every class present.
    class_names : tuple of str, length K
    name : str
        "tissuemnist", "digits", or the stem of the file or the name of the folder.
    source : str
        What was loaded: a URL, a path or a description.
    md5 : str
        Of the npz file; for digits and folders, of the image bytes followed by the label bytes
        (little-endian int64).
    official : dict of str to ndarray of int64, or None
        Indices of the source's own "train", "valid" and "test" parts.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    source: str
    md5: str
    official: dict[str, np.ndarray] | None

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)


class Split(NamedTuple):
    """Disjoint int64 index arrays of the three parts."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


# ---------------------------------------------------------------------------------- splits


def poster_split(n: int, seed: int = 0) -> Split:
    """Shuffle n images and cut 60/15/25 %, from 200,000 of them where there are that many.

    Parameters
    ----------
    n : int
        Number of images; TissueMNIST's 236,386 give 120,000 / 30,000 / 50,000.
    seed : int, optional
        0 to 2**32 - 1.

    Raises
    ------
    DataError
        If a part would be empty, or the seed is out of range.
    """
    n, seed = operator.index(n), operator.index(seed)
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is out of range: choose one of 0..{2**32 - 1}")
    total = min(n, POSTER_TOTAL)
    train_end, valid_end = total * 60 // 100, total * 75 // 100
    if not 0 < train_end < valid_end < total:
        raise DataError(f"{n} images are too few to split 60/15/25 %: use at least 6")
    # RandomState's stream is frozen by numpy's policy (NEP 19); Generator's may change with a
    # release of numpy, and the split with it.
    order = np.random.RandomState(seed).permutation(n)[:total].astype(np.int64)
    return Split(order[:train_end], order[train_end:valid_end], order[valid_end:])


def official_split(image_data: ImageData) -> Split:
    """Return the source's own parts, or raise DataError where it has none."""
    if image_data.official is None:
        raise DataError(f"{image_data.source}: no official split; use the poster's")
    return Split(**image_data.official)


def folders_split(image_data: ImageData, seed: int = 0) -> Split:
    """Test on all of the source's own test part; shuffle its train part and cut that 80/20 %.

    What the authors did with their two folders: 150,000 images give 120,000 / 30,000.

    Raises
    ------
    DataError
        If the source has no parts of its own, or its train part fewer than two images.
    """
    train, _, test = official_split(image_data)
    order = np.random.RandomState(seed).permutation(train)
    end = len(order) * 80 // 100
    if end == 0:
        raise DataError(f"{len(order)} images are too few to split 80/20 %: use at least 2")
    return Split(order[:end], order[end:], test)


def tuning_split(split: Split, n: int = 10_000, seed: int = 0) -> Split:
    """Draw n images to search hyperparameters on, cut 80/20 %, and none of the test images.

    Parameters
    ----------
    split : Split
        Of the whole data set; the images are drawn from its train and validation parts.
    n : int, optional
        How many, or all of them where there are fewer; the poster's 10,000.
    seed : int, optional
        0 to 2**32 - 1.

    Returns
    -------
    Split
        Its test part is empty.

    Raises
    ------
    DataError
        If there are fewer than two images.
    """
    pool = np.concatenate([split.train, split.valid])
    drawn = np.random.RandomState(seed).permutation(pool)[:n]
    end = len(drawn) * 80 // 100
    if end == 0:
        raise DataError(f"{len(drawn)} images are too few to search on: use at least 2")
    return Split(drawn[:end], drawn[end:], drawn[:0])


# -------------------------------------------------------------------------------- download


class _HttpsRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme != "https":
            fp.close()
            raise DataError(f"redirect to {newurl} refused: not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_url(url: str, start: int, timeout: float) -> http.client.HTTPResponse:
    """Ask for a URL's bytes from `start` on.

    A socket's timeout holds for each address of a host and not for name resolution. A thread
    that can be left behind bounds the whole.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    answers = queue.SimpleQueue()

    def ask():
        try:
            opener = urllib.request.build_opener(_HttpsRedirect)
            answers.put(opener.open(request, timeout=timeout))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=1.5 * timeout)
    except queue.Empty:
        raise urllib.error.URLError(TimeoutError("no connection in time")) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _fetch(remote: RemoteFile, file: BinaryIO, timeout: float, progress: Progress | None) -> None:
    """Append to `file` what it lacks of the remote file, and never more than that."""
    size = remote.size
    have = file.seek(0, os.SEEK_END)
    if have > size:
        have = file.truncate(0)
    if have == size:  # an earlier run was killed before its check
        return
    try:
        response = _open_url(remote.url, have, timeout)
    except urllib.error.HTTPError as error:
        if not have or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        have = file.truncate(0)
        response = _open_url(remote.url, have, timeout)
    with response:
        start = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        if length not in (None, str(size - start)):
            raise DataError(f"the server offers {length} bytes, expected {size - start}")
        offered = response.headers.get("Content-Range")
        if start and offered not in (f"bytes {start}-{size - 1}/{n}" for n in (size, "*")):
            file.truncate(0)  # so that the next run asks for the whole file
            raise DataError(
                f"the server offers {offered}, expected bytes {start}-{size - 1}/{size}"
            )
        if have > start:  # the server ignores Range
            have = file.truncate(0)
        while have < size:
            chunk = response.read1(min(CHUNK, size - have))
            if not chunk:
                raise DataError(f"the transfer broke off after {have} of {size} bytes")
            file.write(chunk)
            have += len(chunk)
            if progress:
                progress(have, size)


def _lock(file: BinaryIO, part: Path) -> None:
    """Keep the unfinished file for this process, or raise DataError."""
    if fcntl is None:
        return
    busy = DataError(f"another process is downloading {part}: wait for it")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return  # a file system without locks (Lustre's default): as on Windows
    # The other process may have finished and renamed the file between our open and our lock.
    if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
        raise busy


def download(
    remote: RemoteFile, path: str | Path, timeout: float = 10.0, progress: Progress | None = None
) -> None:
    """Download a file, or go on where a broken download stopped, and check it.

    What has arrived is kept as NAME.part and gets the target's name only after its size and MD5
    were found right, so the same call after a kill at any moment goes on.

    Parameters
    ----------
    remote : RemoteFile
    path : str or Path
        Target; a missing folder is made.
    timeout : float, optional
        Seconds without an answer or a byte after which to give up. Nothing is tried twice.
    progress : callable(done_bytes, total_bytes), optional

    Raises
    ------
    NoNetworkError
        If no connection could be made at all.
    DataError
        If the server refuses, the transfer breaks, the bytes are wrong, another process is
        downloading to the same place, or the target cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            _lock(file, part)
            _fetch(remote, file, timeout, progress)
            file.seek(0)
            md5 = _md5(file)
            if fcntl is None:
                file.close()  # Windows renames and removes closed files only
            if md5 != remote.md5:
                part.unlink()
                raise DataError(f"MD5 {md5}, expected {remote.md5}")
            part.replace(path)
    except (OSError, http.client.HTTPException, DataError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, "reason", None)
        # An HTTP status (its reason is a string) and a refused certificate are answers.
        unreachable = isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)
        kind, cause = (NoNetworkError, reason) if unreachable else (DataError, error)
        raise kind(f"download of {remote.url} to {path} failed: {cause}") from error


def _md5(file: BinaryIO) -> str:
    # usedforsecurity: hosts in FIPS mode refuse MD5 otherwise.
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ------------------------------------------------------------------------- MedMNIST's layout


class _Header(NamedTuple):
    """What is known of an array inside an npz before it is read."""

    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of the first array byte in the entry


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open an npz; whatever the libraries raise on damaged bytes becomes one DataError."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; a source is {SOURCES}")
        with path.open("rb") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, ast, tokenize: no documented, closed set
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a readable npz ({what}); get the file again") from error


def _headers(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> dict[str, _Header]:
    """Read the headers of the named arrays, and refuse what the file cannot hold."""
    counts = Counter(archive.namelist())
    if missing := [name for name in names if f"{name}.npy" not in counts]:
        raise DataError(f"{path}: no array {', '.join(missing)}; MedMNIST's layout is expected")
    if twice := [name for name in names if counts[f"{name}.npy"] > 1]:
        raise DataError(f"{path}: duplicate array {', '.join(twice)}; write the file again")
    packed = sum(archive.getinfo(f"{name}.npy").compress_size for name in names)
    if packed > path.stat().st_size:
        raise DataError(f"{path}: arrays claim more bytes than the file has; get it again")
    return {name: _header(f"{path}: {name}", archive, f"{name}.npy") for name in names}


def _header(where: str, archive: zipfile.ZipFile, entry_name: str) -> _Header:
    entry = archive.getinfo(entry_name)
    # Bytes that an entry can hold: deflate makes at most 1032 of one.
    capacity = {
        zipfile.ZIP_STORED: entry.compress_size,
        zipfile.ZIP_DEFLATED: 1032 * (entry.compress_size + 1),
    }.get(entry.compress_type)
    if capacity is None:
        raise DataError(f"{where} has an unknown compression; write it with numpy.savez")
    with archive.open(entry) as stream:
        # numpy's own limit is 10,000 bytes; a longer header may be a decompression bomb.
        head = io.BytesIO(stream.read(10_240))
    version = np.lib.format.read_magic(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with warnings.catch_warnings(action="ignore"):  # of headers by Python 2, which are fine
        shape, fortran_order, dtype = readers[version](head)
    if dtype.hasobject:
        raise DataError(f"{where} is an object array (a pickle), which is never loaded")
    if fortran_order:
        raise DataError(f"{where} is in Fortran order; save numpy.ascontiguousarray of it")
    if not shape or min(shape) < 1:
        raise DataError(f"{where} is empty (shape {shape})")
    size = head.tell() + math.prod(shape) * dtype.itemsize
    if size != entry.file_size or size > capacity:
        raise DataError(f"{where} claims {size} bytes, which the file cannot hold; get it again")
    return _Header(entry, shape, dtype, head.tell())


def _check_images(where: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8:
        raise DataError(f"{where} has dtype {dtype}, expected uint8")
    if len(shape) != 3 and (len(shape) != 4 or shape[3] != 3):
        raise DataError(f"{where} has shape {shape}, expected (N,H,W) or (N,H,W,3)")
    height, width = shape[1:3]
    if height != width:
        raise DataError(f"{where} has {height}x{width} pixels, expected square images")
    if height < MIN_IMAGE_SIZE:
        raise DataError(f"{where} has {height}x{width} pixels, smaller than {MIN_IMAGE_SIZE}")


def _check_labels(where: str | Path, labels: np.ndarray) -> tuple[str, ...]:
    """Return class names for labels that are 0..K-1, every class present."""
    top = int(labels.max())
    if labels.min() < 0:
        raise DataError(f"{where}: negative labels (down to {labels.min()}); use 0..K-1")
    if top >= len(labels):
        raise DataError(f"{where}: fewer images ({len(labels)}) than classes (labels up to {top})")
    absent = np.flatnonzero(np.bincount(labels) == 0).tolist()
    _refuse(where, f"labels of 0..{top} have no image, so labels are out of range", absent)
    if top == 0:
        raise DataError(f"{where}: one class only; two or more are needed")
    return tuple(f"class {k}" for k in range(top + 1))


def _read(archive: zipfile.ZipFile, header: _Header, out: np.ndarray | None = None) -> np.ndarray:
    """Decompress one array straight to its place: the whole is never held twice."""
    array = np.empty(header.shape, header.dtype) if out is None else out
    view = memoryview(array.reshape(-1).view(np.uint8))
    with archive.open(header.entry) as stream:
        stream.read(header.offset)
        done = 0
        while count := stream.readinto(view[done : done + CHUNK]):
            done += count
        if done < len(view) or stream.read(1):  # zipfile checks the CRC at the entry's end
            raise EOFError(f"{header.entry.filename} does not end where it should")
    return array


def _load_npz(path: Path, expected: RemoteFile | None = None) -> ImageData:
    """Load a file in MedMNIST's layout; everything is checked before anything is allocated."""
    with _opened(path) as file:
        md5 = _md5(file)
        if expected and md5 != expected.md5:
            raise DataError(
                f"{path}: {file.tell()} bytes, MD5 {md5}, expected {expected.size} bytes, MD5 "
                f"{expected.md5}: remove the file"
            )
        archive = zipfile.ZipFile(file)
        parts = ("train", "val", "test")
        headers = _headers(path, archive, [f"{p}_{a}" for p in parts for a in ("images", "labels")])
        pairs = [(headers[f"{p}_images"], headers[f"{p}_labels"]) for p in parts]
        first = pairs[0][0].shape[1:]
        for part, (images, labels) in zip(parts, pairs, strict=True):
            where = f"{path}: {part}_labels"
            _check_images(f"{path}: {part}_images", images.dtype, images.shape)
            if images.shape[1:] != first:
                raise DataError(f"{path}: {part}_images and train_images differ in image shape")
            if labels.dtype.kind not in "iu":
                raise DataError(f"{where} has dtype {labels.dtype}, expected integers")
            if labels.shape[1:] not in ((), (1,)):
                raise DataError(f"{where} has shape {labels.shape}: multi-label is not supported")
            if images.shape[0] != labels.shape[0]:
                raise DataError(f"{where}: {labels.shape[0]} labels for {images.shape[0]} images")
        ends = np.cumsum([images.shape[0] for images, _ in pairs]).tolist()
        rows = [slice(*bounds) for bounds in itertools.pairwise([0, *ends])]
        all_images = np.empty((ends[-1], *first), np.uint8)
        all_labels = np.empty(ends[-1], np.int64)
        for part, (images, labels) in zip(rows, pairs, strict=True):
            _read(archive, images, out=all_images[part])
            all_labels[part] = _read(archive, labels).ravel()
    class_names = _check_labels(path, all_labels)
    index = np.arange(ends[-1], dtype=np.int64)
    return ImageData(
        images=all_images,
        labels=all_labels,
        class_names=TISSUEMNIST_CLASSES if md5 == TISSUEMNIST.md5 else class_names,
        name=path.stem,
        source=expected.url if expected else str(path),
        md5=md5,
        official={name: index[part] for name, part in zip(Split._fields, rows, strict=True)},
    )


def _refuse(where: str | Path, problem: str, items: Iterable) -> None:
    """Raise DataError if there are items with a problem: count them and name the first."""
    if items := sorted(items):
        some = ", ".join(map(str, items[:3])) + ", ..." * (len(items) > 3)
        raise DataError(f"{where}: {len(items)} {problem}: {some}")


# --------------------------------------------------------------------------- embedded digits


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits: {error}: pip install -r requirements.txt") from error
    digits = load_digits()
    source = "scikit-learn load_digits, 8x8 enlarged to 28x28"
    images = _enlarge_digits(digits.images.astype(np.int64))
    return _without_file(images, digits.target, tuple("0123456789"), "digits", source)


def _without_file(
    images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], name: str, source: str
) -> ImageData:
    """Return the ImageData of arrays that come from no npz: the MD5 is over their bytes."""
    labels = labels.astype(np.int64)
    digest = hashlib.md5(images, usedforsecurity=False)
    digest.update(labels.astype("<i8"))
    return ImageData(images, labels, class_names, name, source, digest.hexdigest(), official=None)


def _enlarge_digits(images: np.ndarray) -> np.ndarray:
    """Enlarge (N,8,8) integers 0..16 to (N,28,28) uint8 0..255, bilinear, edge clamped.

    Half-pixel centres put target pixel i at (i + 1/2) * 8/28 - 1/2 = (4 i - 5) / 14 of the
    source: every weight is a whole number of 14ths, so integers give the same bytes everywhere.
    """
    position = np.clip(4 * np.arange(28) - 5, 0, 7 * 14)
    low, weight = position // 14, position % 14
    high = np.minimum(low + 1, 7)
    rows = images[:, low] * (14 - weight)[:, None] + images[:, high] * weight[:, None]
    both = rows[:, :, low] * (14 - weight) + rows[:, :, high] * weight
    full = 14 * 14 * 16  # what the brightest pixel has become
    return ((both * 255 + full // 2) // full).astype(np.uint8, order="C")


# -------------------------------------------------------------------------- folder of images


def _image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, or else in its one subfolder that has some."""
    subfolders = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    for places in ([folder], subfolders):
        found = [files for place in places if (files := _images_in(place))]
        if len(found) == 1:
            return found[0]
    raise DataError(
        f"{folder}: .jpg, .jpeg or .png images must be in the folder itself or in one subfolder; "
        f"found {len(found)} subfolders with images"
    )


def _images_in(place: Path) -> list[Path]:
    return [
        path
        for path in sorted(place.iterdir())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    ]


def _read_label_file(folder: Path) -> tuple[Path, dict[int, int]]:
    """Read the one CSV with the columns `Id,Cell type` in the folder, or else beside it."""
    for place in (folder, folder.resolve().parent):
        tables = {path: _read_table(path) for path in sorted(place.glob("*.csv"))}
        tables = {path: rows for path, rows in tables.items() if rows is not None}
        if tables:
            break
    if len(tables) != 1:
        names = ", ".join(path.name for path in tables) or "none"
        raise DataError(
            f"{folder}: one UTF-8 CSV with columns Id,Cell type expected; found {names}"
        )
    path, rows = tables.popitem()
    whole = re.compile(r"-?[0-9]{1,18}")  # what an int64 holds
    wrong = (f"{i},{k}" for i, k in rows if not (whole.fullmatch(i) and whole.fullmatch(k)))
    _refuse(path, "rows whose Id or Cell type is not an integer", wrong)
    counts = Counter(int(i) for i, _ in rows)
    _refuse(path, "duplicate ids", (i for i, count in counts.items() if count > 1))
    return path, {int(i): int(label) for i, label in rows}


def _read_table(path: Path) -> list[tuple[str, str]] | None:
    """Return (Id, Cell type) of every row, or None where the CSV has other columns."""
    with path.open(encoding="utf-8-sig", newline="") as file, suppress(UnicodeError, csv.Error):
        reader = csv.DictReader(file, restval="")
        if {"Id", "Cell type"} <= set(reader.fieldnames or ()):
            return [(row["Id"], row["Cell type"]) for row in reader]
    return None


def _decode(folder: Path, files: Sequence[Path], progress: Progress | None) -> np.ndarray:
    """Decode the first channel of JPEG and PNG files of one square size to (N, H, H) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{folder}: {error}: a folder of images needs Pillow: "
            "pip install -r requirements-figures.txt"
        ) from error

    def first_channel(path: Path) -> np.ndarray | None:
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                # Palettes and bits are not yet intensities.
                plain = image.convert("RGB") if image.mode in ("1", "P") else image
                return np.asarray(plain.getchannel(0))
        except Exception:  # Pillow raises at least six kinds for damaged files
            return None

    images, unreadable, missized = None, [], []
    with ThreadPool() as pool:  # Pillow decodes outside the interpreter lock
        for i, image in enumerate(pool.imap(first_channel, files, chunksize=64)):
            if image is None or image.dtype != np.uint8:
                unreadable.append(files[i].name)
                continue
            if images is None:
                _check_images(str(files[i]), image.dtype, (1, *image.shape))
                images = np.empty((len(files), *image.shape), np.uint8)
            if image.shape == images.shape[1:]:
                images[i] = image
            else:
                missized.append(files[i].name)
            if progress:
                progress(i + 1, len(files))
    _refuse(folder, "images are not readable as 8-bit JPEG or PNG", unreadable)
    _refuse(folder, f"images differ in size from {files[0].name}", missized)
    return images


def _list_folder(folder: Path) -> tuple[Path, list[Path], np.ndarray]:
    """Return the CSV of the authors' format, the image files in order of id, and their labels."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = _image_files(folder)
    csv_path, label_of = _read_label_file(folder)
    _refuse(
        folder,
        "image names are not an integer id",
        (path.name for path in files if not re.fullmatch("[0-9]{1,18}", path.stem)),
    )
    ids = Counter(int(path.stem) for path in files)
    _refuse(folder, "ids have more than one image", (i for i, count in ids.items() if count > 1))
    _refuse(folder, f"images have no row in {csv_path.name}", ids.keys() - label_of.keys())
    _refuse(folder, f"rows of {csv_path.name} have no image", label_of.keys() - ids.keys())
    files.sort(key=lambda path: int(path.stem))
    return csv_path, files, np.array([label_of[int(path.stem)] for path in files], np.int64)


def _read_folder(
    csv_path: Path, files: list[Path], labels: np.ndarray, root: Path, progress: Progress | None
) -> np.ndarray:
    """Decode the images of a folder, or take them from the cache."""
    stats = [(path.name, path.stat()) for path in (*files, csv_path)]
    key = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()
    cache = root / f"folder-{hashlib.md5(key, usedforsecurity=False).hexdigest()}.npz"
    try:
        images = load_images(cache)[1]
    except DataError:  # not there yet, or damaged
        images = _decode(files[0].parent, files, progress)
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # the cache saves time and nothing else
            root.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    np.savez(file, images=images, labels=labels)
                temporary.replace(cache)
            finally:
                temporary.unlink(missing_ok=True)
    return images


def load_folders(
    train: str | Path,
    test: str | Path | None = None,
    root: str | Path = "~/.medmnist",
    progress: Progress | None = None,
) -> ImageData:
    """Load one folder in the authors' format, or two: labelled images, and test images.

    Parameters
    ----------
    train, test : str or Path
        Folders of JPEG or PNG files named by integer id beside a CSV with the columns
        `Id,Cell type`. The classes are those of both; with `test`, the `official` parts are the
        first folder (train), nothing (valid) and the second: see `folders_split`.
    root : str or Path, optional
        Folder of what was decoded.
    progress : callable(done_images, total_images), optional
        Called while decoding a folder.

    Raises
    ------
    DataError
        If a folder is not as described, or their images differ in size.
    """
    folders = [Path(train)] if test is None else [Path(train), Path(test)]
    try:
        listed = [_list_folder(folder) for folder in folders]
        labels = np.concatenate([labels for _, _, labels in listed])
        class_names = _check_labels(" and ".join(str(path) for path, _, _ in listed), labels)
        parts = [_read_folder(*found, Path(root).expanduser(), progress) for found in listed]
    # RuntimeError: no home folder for the ~ of root; MemoryError: images too large to decode.
    except (OSError, RuntimeError, MemoryError) as error:
        raise DataError(f"{' and '.join(map(str, folders))}: {error}") from error
    where = " and ".join(map(str, folders))
    if len({images.shape[1:] for images in parts}) > 1:
        sizes = " and ".join("{1}x{2}".format(*images.shape) for images in parts)
        raise DataError(f"{where}: the images differ in size ({sizes} pixels)")
    images = np.concatenate(parts)
    loaded = _without_file(images, labels, class_names, folders[0].resolve().name, where)
    if test is None:
        return loaded
    index, end = np.arange(len(labels), dtype=np.int64), len(parts[0])
    official = {"train": index[:end], "valid": index[:0], "test": index[end:]}
    return replace(loaded, official=official)


# -------------------------------------------------------------------------------------- load


def load(
    source: str | Path = "auto",
    root: str | Path = "~/.medmnist",
    download: bool = True,
    progress: Progress | None = None,
) -> ImageData:
    """Load a labelled data set.

    Parameters
    ----------
    source : str or Path, optional
        "tissuemnist", "digits", a file in MedMNIST's layout (uint8 images, integer labels), a
        folder of JPEG or PNG files named by integer id beside a CSV with the columns
        `Id,Cell type`, or "auto": TissueMNIST from `root`, else from the network, else, where
        there is no network, the digits, with a DigitsFallbackWarning.
    root : str or Path, optional
        Folder of what was downloaded or decoded.
    download : bool, optional
        Whether the network may be used.
    progress : callable(done, total), optional
        Called with bytes while downloading, with images while decoding a folder.

    Raises
    ------
    DataError
        If the source does not exist, is damaged, or is not what the networks can learn from.
    """
    try:
        if source in ("auto", "tissuemnist"):
            return _load_tissuemnist(source, Path(root).expanduser(), download, progress)
        if source == "digits":
            return _load_digits()
        path = Path(source)
        if path.is_dir():
            return load_folders(path, None, root, progress)
        return _load_npz(path)
    # RuntimeError: no home folder for the ~ of root; MemoryError: images too large to decode.
    except (OSError, RuntimeError, MemoryError) as error:
        raise DataError(f"{source}: {error}") from error


def _load_tissuemnist(
    source: str, root: Path, may_download: bool, progress: Progress | None
) -> ImageData:
    path = root / "tissuemnist.npz"
    try:
        if not path.exists():
            if not may_download:
                raise NoNetworkError(f"{path}: no such file, and download is off")
            download(TISSUEMNIST, path, progress=progress)
        return _load_npz(path, TISSUEMNIST)
    except DataError as error:
        if source == "auto" and isinstance(error, NoNetworkError):
            message = f"the embedded digits stand in for TissueMNIST: {error}"
            warnings.warn(message, DigitsFallbackWarning, stacklevel=3)
            return _load_digits()
        raise DataError(
            f"{error}; run again, or fetch {TISSUEMNIST.url} by hand to {path} "
            f"(MD5 {TISSUEMNIST.md5}), or use the embedded images (--data digits)"
        ) from error


def load_images(
    source: str | Path, progress: Progress | None = None
) -> tuple[list[str], np.ndarray]:
    """Load images that need no labels.

    Parameters
    ----------
    source : str or Path
        A folder of JPEG or PNG files (first channel), or an npz with an array `test_images`
        (MedMNIST's layout) or `images`.
    progress : callable(done_images, total_images), optional
        Called while decoding a folder.

    Returns
    -------
    ids : list of str
        File names without suffix, in sorted order; for an npz, "0" to "N-1".
    images : ndarray of uint8, shape (N, H, H) or (N, H, H, 3)

    Raises
    ------
    DataError
        If the source does not exist, is damaged, or its images are not of one square size.
    """
    path = Path(source)
    try:
        if path.is_dir():
            files = sorted(_image_files(path), key=lambda file: file.stem)
            ids = Counter(file.stem for file in files)
            _refuse(path, "ids have more than one image", (i for i, n in ids.items() if n > 1))
            return list(ids), _decode(path, files, progress)
    except (OSError, MemoryError) as error:
        raise DataError(f"{source}: {error}") from error
    with _opened(path) as file:
        archive = zipfile.ZipFile(file)
        name = "test_images" if "test_images.npy" in archive.namelist() else "images"
        header = _headers(path, archive, [name])[name]
        _check_images(f"{path}: {name}", header.dtype, header.shape)
        images = _read(archive, header)
    return [str(i) for i in range(len(images))], images


# -------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a data set and return the exit status."""
    parser = argparse.ArgumentParser(prog="data.py", description="Print a data set's summary.")
    # One line, without the usage.
    parser.error = lambda message: parser.exit(2, f"data.py: error: {message}\n")
    parser.add_argument("source", nargs="?", default="auto", metavar="SOURCE", help=SOURCES)
    source = parser.parse_args(argv).source

    def progress(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,}", end="\n" * (done == total), file=sys.stderr)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DigitsFallbackWarning)
            image_data = load(source, progress=progress if sys.stderr.isatty() else None)
        for warning in caught:
            print(f"data.py: warning: {warning.message}", file=sys.stderr)
        splits = {"poster": poster_split(len(image_data.labels))}
    except DataError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if image_data.official:
        splits["official"] = official_split(image_data)
    lines = [
        f"name    {image_data.name}",
        f"source  {image_data.source}",
        f"md5     {image_data.md5}",
        f"images  {len(image_data.images):,}, shape {image_data.images.shape[1:]}",
    ]
    counts = np.bincount(image_data.labels)
    for k, (name, count) in enumerate(zip(image_data.class_names, counts, strict=True)):
        lines.append(f"class {k:<3} {count:>8,} {count / counts.sum():6.1%}  {name}")
    for name, split in splits.items():
        sizes = ", ".join(f"{part} {len(index):,}" for part, index in split._asdict().items())
        lines.append(f"{name} split: {sizes}")
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
