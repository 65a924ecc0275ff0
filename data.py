"""Where the images come from and how they are split.

The poster's images are public as TissueMNIST (MedMNIST v2, CC BY 4.0), 125 MB that are downloaded
once into ~/.medmnist, where the medmnist package keeps them too. MedMNIST's other sets, any file
in their layout, and scikit-learn's embedded digits, which need no network, load the same way:

    image_data = load("auto")              # uint8 images (N, H, H), int64 labels (N,)
    parts = split(image_data, "poster")    # 120,000 / 30,000 / 50,000 indices
    train_images = image_data.images[parts.train]

MedMNIST's layout is an npz of six arrays: `train_images`, `val_images`, `test_images`, uint8 of
shape (N, H, H) or (N, H, H, 3), and `train_labels`, `val_labels`, `test_labels`, integers of shape
(N, 1) or (N,). `convert` makes such a file of the authors' folders of JPEG or PNG files.

Indices are int64. A seed is an integer from 0 to 2**32 - 1. A `progress` is called with (done,
total): bytes while downloading, images while converting. Whatever is wrong with an input is a
DataError.

On the command line: `python data.py [SOURCE]` prints a summary, `python data.py convert
TRAIN_FOLDER [TEST_FOLDER] OUT.npz` converts. Needs numpy; scikit-learn only for the digits, Pillow
only to convert.
"""

import argparse
import hashlib
import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

Progress = Callable[[int, int], None]

# The 2D sets of MedMNIST v2 with one label an image, and the MD5 of NAME.npz (28x28 pixels); the
# medmnist package states the same. ChestMNIST, the only other one, has several labels an image.
URL = "https://zenodo.org/records/10519652/files/{name}.npz?download=1"
MEDMNIST = {
    "tissuemnist": "ebe78ee8b05294063de985d821c1c34b",
    "pathmnist": "a8b06965200029087d5bd730944a56c1",
    "dermamnist": "0744692d530f8e62ec473284d019b0c7",
    "octmnist": "c68d92d5b585d8d81f7112f81e2d0842",
    "pneumoniamnist": "28209eda62fecd6e6a2d98b1501bb15f",
    "retinamnist": "bd4c0672f1bba3e3a89f0e4e876791e4",
    "breastmnist": "750601b1f35ba3300ea97c75c52ff8f6",
    "bloodmnist": "7053d0359d879ad8a5505303e11de1dc",
    "organamnist": "68e3f8846a6bd62f0c9bf841c0d9eacc",
    "organcmnist": "b9ceb9546e10131b32923c5bbeaea2b1",
    "organsmnist": "9ab87b696fb54e2a387ebe992d6ed5f1",
}
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
PARTS = ("train", "val", "test")  # MedMNIST's names of what Split calls train, valid, test
SOURCES = f"auto, digits, FILE.npz, or one of {', '.join(MEDMNIST)}"


class DataError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set in memory.

    Attributes
    ----------
    images : ndarray of uint8, shape (N, H, H) or (N, H, H, 3)
        H is at least 8: the three poolings of the poster's network leave one pixel of eight.
    labels : ndarray of int64, shape (N,)
        In 0..K-1, every class present.
    class_names : tuple of str, length K
    name : str
        The set's name, "digits", or the file's name without its suffix.
    source : str
        What was loaded: a path or a description.
    md5 : str
        Of the npz file; for the digits, of the image bytes followed by the label bytes
        (little-endian int64).
    official : dict of str to ndarray of int64, or None
        Indices of the file's own "train", "valid" and "test" parts.
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


# ---- splits --------------------------------------------------------------------------------------


def split(image_data: ImageData, name: str, seed: int = 0) -> Split:
    """Split a data set: "poster" is at random, "official" the file's own parts whatever the seed.

    Raises DataError if the name is unknown, and what poster_split and official_split raise.
    """
    if name == "poster":
        return poster_split(len(image_data.labels), seed)
    if name == "official":
        return official_split(image_data)
    raise DataError(f"split {name!r} is unknown: choose poster or official")


def poster_split(n: int, seed: int = 0) -> Split:
    """Shuffle n images and cut 60/15/25 %, of 200,000 of them where there are more.

    TissueMNIST's 236,386 images give 120,000 / 30,000 / 50,000. Raises DataError if a part would
    be empty.
    """
    total = min(n, POSTER_TOTAL)
    train_end, valid_end = total * 60 // 100, total * 75 // 100
    if not 0 < train_end < valid_end < total:
        raise DataError(f"{n} images are too few to split 60/15/25 %: use at least 6")
    order = _shuffled(np.arange(n), seed)[:total]
    return Split(order[:train_end], order[train_end:valid_end], order[valid_end:])


def official_split(image_data: ImageData) -> Split:
    """Return the file's own parts, or raise DataError if it has none or one of them is empty."""
    parts = image_data.official
    if parts is None or min(map(len, parts.values())) == 0:
        raise DataError(f"{image_data.name} has no official split into three: use the poster's")
    return Split(**parts)


def tuning_split(split: Split, n: int = 10_000, seed: int = 0) -> Split:
    """Draw n images to search hyperparameters on, and cut them 80/20 %; the test part is empty.

    They are drawn from a split's train and validation images, all of them where there are fewer
    than n; the poster's subset had 10,000. Raises DataError if there are fewer than two.
    """
    return _cut_80_20(np.concatenate([split.train, split.valid]), n, split.test[:0], seed)


def _cut_80_20(index: np.ndarray, n: int, test: np.ndarray, seed: int) -> Split:
    drawn = _shuffled(index, seed)[:n]
    end = len(drawn) * 80 // 100
    if end == 0:
        raise DataError(f"{len(drawn)} images are too few to split 80/20 %: use at least 2")
    return Split(drawn[:end], drawn[end:], test)


def _shuffled(index: np.ndarray, seed: int) -> np.ndarray:
    # RandomState's stream is frozen by numpy's policy (NEP 19); Generator's may change with a
    # release of numpy, and every split with it.
    try:
        return np.random.RandomState(seed).permutation(index).astype(np.int64)
    except ValueError as error:
        raise DataError(f"seed {seed}: {error}") from error


# ---- load ----------------------------------------------------------------------------------------


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
        A name in MEDMNIST: from `root`, or else from the network, its MD5 checked in either case.
        "auto": TissueMNIST, or, where no connection can be made, the digits, with a UserWarning
        that says why. "digits": scikit-learn's, enlarged to 28x28. Else a file in MedMNIST's
        layout.
    root : str or Path, optional
        Folder of the downloaded files.
    download : bool, optional
        Whether the network may be used; if not, a set that is not in `root` is a DataError.
    progress : callable(done_bytes, total_bytes), optional

    Raises
    ------
    DataError
        If the source does not exist, cannot be fetched, is damaged, or is not of that layout.
    """
    if source == "digits":
        return _load_digits()
    name = "tissuemnist" if source == "auto" else source
    if name not in MEDMNIST:
        path = Path(source)
        if path.is_dir():
            how = f"python data.py convert {path} OUT.npz"
            raise DataError(f"{path} is a folder: convert it first ({how})")
        if not path.is_file():
            raise DataError(f"{path}: no such file; a source is {SOURCES}")
        return _load_npz(path)
    url, md5, path = URL.format(name=name), MEDMNIST[name], Path(root).expanduser() / f"{name}.npz"
    by_hand = f"fetch {url} by hand to {path} (MD5 {md5}), or use --data digits"
    if not path.exists():
        if not download:
            raise DataError(f"{path}: no such file, and downloading is off; {by_hand}")
        try:
            _download(url, path, md5, progress)
        except (OSError, http.client.HTTPException, DataError) as error:
            # No name, refused, timed out, no proxy tunnel: no connection. An HTTP status, whose
            # reason is a string, and a refused certificate are answers.
            reason = getattr(error, "reason", None)
            unreachable = isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)
            if source == "auto" and unreachable:
                why = f"the digits stand in for TissueMNIST: no connection to {url}: {reason}"
                warnings.warn(why, UserWarning, stacklevel=2)
                return _load_digits()
            raise DataError(f"download failed: {error}; run again, or {by_hand}") from error
    if (found := _md5(path)) != md5:
        raise DataError(f"{path} has MD5 {found}, not {md5}: remove it and run again, or {by_hand}")
    return _load_npz(path)


def _download(url: str, path: Path, md5: str, progress: Progress | None) -> None:
    """Download a file, or go on where a killed or broken download stopped.

    What has arrived is PATH.part, and gets its name after its MD5 was found right; whatever went
    wrong, a server's bytes at the wrong place included, the MD5 finds. Two processes at once write
    the same bytes to the same places.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # seconds without a byte
            resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
            done = done if resumed else 0
            total = done + int(response.headers.get("Content-Length", 0))
            with part.open("r+b" if resumed else "wb") as file:
                file.seek(done)
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
        if done < total:  # http.client takes a lost connection for the end
            raise DataError(f"the connection broke off after {done:,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if not done or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing lies behind the part: it is complete, or too long, which the MD5 tells.
    if (found := _md5(part)) != md5:
        part.unlink()
        raise DataError(f"what arrived had MD5 {found}, not {md5}, and was removed")
    part.replace(path)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        # usedforsecurity: hosts in FIPS mode refuse MD5 otherwise.
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest()


def _load_npz(path: Path) -> ImageData:
    """Load a file in MedMNIST's layout; a part may be empty, a class may not."""
    md5 = _md5(path)
    if not zipfile.is_zipfile(path):  # np.load would speak of pickles
        raise DataError(f"{path}: not an npz file, or cut off: get or write it again")
    try:
        # Given a path, np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            images, labels, rows = _read_parts(path, npz)
    except DataError:
        raise
    except Exception as error:  # of numpy, zipfile, zlib, ast: no documented, closed set
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: damaged, or too large for the memory here ({what})") from error
    class_names = _class_names(path, np.unique(labels).tolist())
    if md5 == MEDMNIST["tissuemnist"]:
        class_names = TISSUEMNIST_CLASSES
    official = dict(zip(Split._fields, rows, strict=True))
    return ImageData(images, labels, class_names, path.stem, str(path), md5, official)


def _read_parts(
    path: Path, npz: np.lib.npyio.NpzFile
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return the images and labels of all parts, and the rows of each part."""
    names = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    _refuse(path, "arrays of MedMNIST's layout are missing", [n for n in names if n not in npz])
    labels = {part: npz[f"{part}_labels"] for part in PARTS}
    for part, found in labels.items():
        if found.dtype.kind not in "iu" or found.shape not in ((found.size,), (found.size, 1)):
            raise DataError(
                f"{path}: {part}_labels has dtype {found.dtype} and shape {found.shape}, expected "
                "integers (N,) or (N, 1): one label an image"
            )
    ends = np.cumsum([len(found) for found in labels.values()])
    rows = np.split(np.arange(ends[-1], dtype=np.int64), ends[:-1])
    images = None
    for part, index in zip(PARTS, rows, strict=True):
        found = npz[f"{part}_images"]
        _check_images(f"{path}: {part}_images", found)
        if images is None:
            images = np.empty((ends[-1], *found.shape[1:]), np.uint8)
        if found.shape != (expected := (len(index), *images.shape[1:])):
            raise DataError(
                f"{path}: {part}_images has shape {found.shape}, expected {expected}, as "
                f"{part}_labels and train_images have"
            )
        images[index] = found
        del found  # before the next is read, so that only one part is in memory twice
    return images, np.concatenate(list(labels.values()), axis=None).astype(np.int64), rows


def _check_images(where: str | Path, images: np.ndarray) -> None:
    square = images.ndim in (3, 4) and images.shape[1] == images.shape[2] >= 8
    if images.dtype != np.uint8 or not square or images.shape[3:] not in ((), (3,)):
        raise DataError(
            f"{where} has dtype {images.dtype} and shape {images.shape}, expected uint8 squares of "
            "at least 8 pixels, (N, H, H) or (N, H, H, 3)"
        )


def _class_names(where: str | Path, classes: list[int]) -> tuple[str, ...]:
    """Name the classes that occur, given in ascending order, or raise DataError."""
    if len(classes) < 2 or classes != list(range(len(classes))):
        some = ", ".join(map(str, classes[:20])) + ", ..." * (len(classes) > 20)
        raise DataError(
            f"{where}: labels must be 0 to K-1, every class present, K at least 2; found {some}"
        )
    return tuple(f"class {k}" for k in classes)


def _refuse(where: str | Path, problem: str, items: Collection) -> None:
    """Raise DataError if there are items with a problem: count them and name the first."""
    if items:
        some = ", ".join(map(str, sorted(items)[:3])) + ", ..." * (len(items) > 3)
        raise DataError(f"{where}: {len(items)} {problem}: {some}")


# ---- digits --------------------------------------------------------------------------------------


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits: {error}: pip install -r requirements.txt") from error
    digits = load_digits()
    images = _enlarge_digits(digits.images.astype(np.int64))
    labels = digits.target.astype(np.int64)
    md5 = hashlib.md5(images.tobytes() + labels.astype("<i8").tobytes(), usedforsecurity=False)
    source = "scikit-learn load_digits, 8x8 enlarged to 28x28"
    names = tuple("0123456789")
    return ImageData(images, labels, names, "digits", source, md5.hexdigest(), official=None)


def _enlarge_digits(images: np.ndarray) -> np.ndarray:
    """Enlarge (N, 8, 8) integers 0..16 to (N, 28, 28) uint8 0..255, bilinear, edge clamped.

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


# ---- the authors' folders ------------------------------------------------------------------------


def convert(
    train_folder: str | Path,
    test_folder: str | Path | None,
    path: str | Path,
    progress: Progress | None = None,
) -> None:
    """Convert the authors' format to an npz in MedMNIST's layout.

    A folder has JPEG or PNG files named by integer id, padded or not; one CSV with the columns
    `Id,Cell type` lies beside them, or else in the folder's parent. Of colour images the first
    channel is taken.

    Parameters
    ----------
    train_folder : str or Path
        Its images, in ascending order of id, are shuffled with seed 0 and cut 80/20 % into train
        and validation images, as the authors did: 150,000 give 120,000 / 30,000.
    test_folder : str or Path or None
        All of it is the test part. None: the first folder is split as `poster_split` does,
        60/15/25 %.
    path : str or Path
        The npz; must not exist.
    progress : callable(done_images, total_images), optional

    Raises
    ------
    DataError
        If a folder is not as described, images differ in size, or Pillow is missing.
    """
    path = Path(path)
    if path.exists() or path.suffix != ".npz":
        raise DataError(f"{path}: expected a new file whose name ends in .npz")
    files, labels = _list_images(Path(train_folder))
    if test_folder is None:
        parts = poster_split(len(files))
    else:
        test_files, test_labels = _list_images(Path(test_folder))
        index = np.arange(len(files) + len(test_files))
        parts = _cut_80_20(index[: len(files)], len(files), index[len(files) :], seed=0)
        files, labels = files + test_files, labels + test_labels
    where = train_folder if test_folder is None else f"{train_folder} and {test_folder}"
    classes = _class_names(where, sorted(set(labels)))
    images = _decode(files, progress)
    labels = np.array(labels, np.min_scalar_type(len(classes)))[:, None]  # uint8, as MedMNIST's
    arrays = {}
    for part, index in zip(PARTS, parts, strict=True):
        arrays |= {f"{part}_images": images[index], f"{part}_labels": labels[index]}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _list_images(folder: Path) -> tuple[list[Path], list[int]]:
    """Return a folder's image files in ascending order of id, and their labels."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    visible = folder.glob("[!.]*")  # macOS leaves hidden ._NAME.png
    files = [file for file in visible if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise DataError(f"{folder}: no .jpg, .jpeg or .png images in it (subfolders do not count)")
    for place in (folder, folder.resolve().parent):
        if tables := [path.name for path in sorted(place.glob("[!.]*.csv"))]:
            break
    if len(tables) != 1:
        found = ", ".join(tables) or "none"
        raise DataError(f"{folder}: one CSV expected in it, or else in its parent; found {found}")
    table = place / tables[0]
    try:
        with table.open(encoding="utf-8-sig") as file:
            columns = file.readline().replace('"', "").strip().split(",")
            wanted = [columns.index("Id"), columns.index("Cell type")]
            rows = np.loadtxt(file, np.int64, delimiter=",", quotechar='"', usecols=wanted, ndmin=2)
    except ValueError as error:
        raise DataError(f"{table}: columns Id,Cell type of integers expected: {error}") from error
    label_of = dict(rows.tolist())
    not_ids = [file.name for file in files if not file.stem.isdecimal()]
    _refuse(folder, "image names are not an integer id", not_ids)
    files.sort(key=lambda file: int(file.stem))
    ids = [int(file.stem) for file in files]
    for where, found in ((folder, ids), (table, rows[:, 0].tolist())):
        twice = [i for i, count in Counter(found).items() if count > 1]
        _refuse(where, "ids are there more than once", twice)
    _refuse(folder, f"images have no row in {table.name}", set(ids) - label_of.keys())
    _refuse(folder, f"rows of {table.name} have no image", label_of.keys() - set(ids))
    return files, [label_of[i] for i in ids]


def _decode(files: list[Path], progress: Progress | None) -> np.ndarray:
    """Decode the first channel of JPEG and PNG files of one square size to (N, H, H) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{error}: pip install -r requirements-figures.txt") from error

    def first_channel(file: Path) -> np.ndarray | None:
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                # Palettes and bits are not yet intensities.
                plain = image.convert("RGB") if image.mode in ("1", "P") else image
                return np.asarray(plain.getchannel(0))
        except Exception:  # Pillow raises at least six kinds for damaged files
            return None

    if (first := first_channel(files[0])) is None:
        raise DataError(f"{files[0]}: not a readable JPEG or PNG file")
    _check_images(files[0], first[None])
    images, wrong = np.empty((len(files), *first.shape), np.uint8), []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for start in range(0, len(files), 1024):  # bounds what waits in the pool
            decoded = pool.map(first_channel, files[start : start + 1024])
            for row, pixels in enumerate(decoded, start):
                if pixels is None or pixels.dtype != np.uint8 or pixels.shape != first.shape:
                    wrong.append(str(files[row]))
                else:
                    images[row] = pixels
            if progress:
                progress(row + 1, len(files))
    size = f"{len(first)}x{len(first)}"
    _refuse(files[0], f"images are damaged, or not {size} pixels of 8 bits as this one", wrong)
    return images


# ---- command line --------------------------------------------------------------------------------


def _summary(image_data: ImageData) -> str:
    counts = np.bincount(image_data.labels)
    n, height, width, *colour = image_data.images.shape
    lines = [
        f"name      {image_data.name}",
        f"source    {image_data.source}",
        f"md5       {image_data.md5}",
        f"images    {n:,}, {height}x{width} pixels, {'colour' if colour else 'grey'}",
    ]
    for name in ("poster", "official"):
        try:
            parts = split(image_data, name)._asdict().items()
            text = ", ".join(f"{len(index):,} {part}" for part, index in parts)
        except DataError as error:
            text = f"none: {error}"
        lines.append(f"{name:<9} {text}")
    for k, (name, count) in enumerate(zip(image_data.class_names, counts, strict=True)):
        lines.append(f"class {k:<3} {count:>8,} {count / n:6.1%}  {name}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a data set, or convert folders and print it of the result."""
    usage = "data.py [SOURCE] | data.py convert TRAIN_FOLDER [TEST_FOLDER] OUT.npz"
    parser = argparse.ArgumentParser(
        prog="data.py",
        usage=usage,
        description="Print a data set's summary, or convert folders of JPEG or PNG files beside "
        "a CSV `Id,Cell type` to one file (without TEST_FOLDER, it is split 60/15/25 %).",
    )
    parser.error = lambda message: parser.exit(2, f"data.py: error: {message}\n")  # one line
    parser.add_argument("words", nargs="*", metavar="SOURCE", help=f"{SOURCES}; default: auto")
    words = parser.parse_args(argv).words

    def progress(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,}", end="\n" * (done == total), file=sys.stderr)

    show = progress if sys.stderr.isatty() else None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            if words[:1] == ["convert"] and len(words) in (3, 4):
                _, train_folder, *test_folder, path = words
                convert(train_folder, test_folder[0] if test_folder else None, path, show)
                words = [path]
            elif len(words) > 1 or words == ["convert"]:
                parser.error(f"usage: {usage}")
            image_data = load(*words, progress=show)
        for warning in caught:
            print(f"data.py: warning: {warning.message}", file=sys.stderr)
        print(_summary(image_data), flush=True)
    except BrokenPipeError:  # `| head`: nothing more is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DataError, OSError, MemoryError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
