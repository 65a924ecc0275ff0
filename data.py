"""Where the images come from and how they are split.

The poster's images are public as TissueMNIST (MedMNIST v2, CC BY 4.0): 125 MB, downloaded once into
~/.medmnist, where the medmnist package keeps them too. MedMNIST's other sets, any file in their
layout, and scikit-learn's embedded digits, which need no network, load the same way:

    image_data = load("auto")              # uint8 images (N, H, H), int64 labels (N,)
    parts = split(image_data, "poster")    # 120,000 / 30,000 / 50,000 indices
    train_images = image_data.images[parts.train]

MedMNIST's layout is an npz of six arrays: `train_images`, `val_images`, `test_images`, uint8 of
shape (N, H, H) or (N, H, H, 3), and `train_labels`, `val_labels`, `test_labels`, integers of shape
(N, 1) or (N,). `convert` makes such a file of the authors' folders of JPEG or PNG files.

On the command line:

    python data.py [SOURCE]                                     what is in it; default: auto
    python data.py convert TRAIN_FOLDER [TEST_FOLDER] OUT.npz   make a file of folders

Needs numpy; scikit-learn only for the digits, Pillow only to convert.
"""

import csv
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
PARTS = ("train", "val", "test")  # MedMNIST's names of what Split calls train, valid, test


class DataError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do."""


class Split(NamedTuple):
    """Disjoint int64 index arrays of the three parts."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


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
    official : Split or None
        The file's own parts.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    source: str
    md5: str
    official: Split | None

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)


# ---- splits --------------------------------------------------------------------------------------
# A seed is an integer from 0 to 2**32 - 1. RandomState's stream is frozen by numpy's policy
# (NEP 19); Generator's may change with a release of numpy, and every split with it.


def split(image_data: ImageData, name: str, seed: int = 0) -> Split:
    """Split a data set: "poster" is `poster_split`, "official" `official_split`.

    Raises DataError if the name is unknown, or the data set has no such split.
    """
    if name == "poster":
        return poster_split(len(image_data.labels), seed)
    if name == "official":
        return official_split(image_data)
    raise DataError(f"split {name!r} is unknown: choose poster or official")


def official_split(image_data: ImageData) -> Split:
    """Return the file's own parts; raises DataError if it has none or one of them is empty."""
    parts = image_data.official
    if parts is None or min(map(len, parts)) == 0:
        raise DataError(f"{image_data.name} has no official split into three: use the poster's")
    return parts


def poster_split(n: int, seed: int = 0) -> Split:
    """Shuffle n images and cut 60/15/25 %, of 200,000 of them where there are more.

    TissueMNIST's 236,386 images give 120,000 / 30,000 / 50,000. Raises DataError if a part would
    be empty.
    """
    if n < 6:
        raise DataError(f"{n} images are too few to split 60/15/25 %: use at least 6")
    total = min(n, 200_000)
    order = np.random.RandomState(seed).permutation(np.arange(n))[:total]
    train_end, valid_end = total * 60 // 100, total * 75 // 100
    return Split(order[:train_end], order[train_end:valid_end], order[valid_end:])


def tuning_split(split: Split, n: int = 10_000, seed: int = 0) -> Split:
    """Draw n images to search hyperparameters on, and cut them 80/20 %; the test part is empty.

    They are drawn from a split's train and validation images, all of them where there are fewer
    than n; the poster's subset had 10,000.
    """
    images = np.concatenate([split.train, split.valid])
    drawn = np.random.RandomState(seed).permutation(images)[:n]
    end = len(drawn) * 80 // 100
    return Split(drawn[:end], drawn[end:], split.test[:0])


# ---- load ----------------------------------------------------------------------------------------


def load(
    source: str | Path = "auto",
    root: str | Path = "~/.medmnist",
    download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load a labelled data set.

    Raises DataError if the source does not exist, cannot be fetched, is damaged, or is not of
    MedMNIST's layout.

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
        Called while downloading.
    """
    if source == "digits":
        return _load_digits()
    name = "tissuemnist" if source == "auto" else source
    if name not in MEDMNIST:
        return _load_npz(Path(source), None)
    path, url, md5 = Path(root).expanduser() / f"{name}.npz", URL.format(name=name), MEDMNIST[name]
    by_hand = f"fetch {url} by hand to {path} (MD5 {md5})"
    if not path.exists():
        if not download:
            raise DataError(
                f"{path}: no such file, and downloading is off: name its root, or {by_hand}"
            )
        try:
            _download(url, path, md5, progress)
        except (OSError, http.client.HTTPException) as error:
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
    return _load_npz(path, md5)


def _download(url: str, path: Path, md5: str, progress: Callable[[int, int], None] | None) -> None:
    """Download a file, or go on where a killed or broken download stopped.

    What has arrived is PATH.part until its MD5 was found right: that finds whatever goes wrong, a
    server's bytes at the wrong place included. Two processes at once write the same bytes to the
    same places.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # seconds without a byte
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server begins anew
                done = 0
            total = done + int(response.headers.get("Content-Length", 0))
            with part.open("r+b" if done else "wb") as file:
                file.seek(done)
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
        if done < total:  # http.client takes a lost connection for the end
            raise ConnectionError(f"the connection broke off after {done:,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if not done or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing lies behind the part: it is complete, or wrong.
    if (found := _md5(part)) != md5:
        part.unlink()
        raise ConnectionError(f"what arrived had MD5 {found}, not {md5}, and was removed")
    part.replace(path)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        # usedforsecurity: hosts in FIPS mode refuse MD5 otherwise.
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest()


def _load_npz(path: Path, md5: str | None) -> ImageData:
    """Load a file in MedMNIST's layout; a part may be empty, a class may not."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; a source is auto, digits, one of {', '.join(MEDMNIST)}, or a "
            "FILE.npz (of folders of images, `python data.py convert` makes one)"
        )
    if not zipfile.is_zipfile(path):  # np.load would speak of pickles
        raise DataError(f"{path}: not an npz file, or cut off: get or write it again")
    try:
        # Given a path, np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            images, labels, official = _read_parts(path, npz)
    except DataError:
        raise
    except Exception as error:  # of numpy, zipfile, zlib, ast: no documented, closed set
        problem = "not of MedMNIST's layout, damaged, or too large for the memory here"
        raise DataError(f"{path}: {problem} ({error!r})") from error
    md5, class_names = md5 or _md5(path), _class_names(path, labels)
    if md5 == MEDMNIST["tissuemnist"]:
        class_names = TISSUEMNIST_CLASSES
    return ImageData(images, labels, class_names, path.stem, str(path), md5, official)


def _read_parts(path: Path, npz: np.lib.npyio.NpzFile) -> tuple[np.ndarray, np.ndarray, Split]:
    """Return the images and labels of all parts, and the rows of each part."""
    labels = [npz[f"{part}_labels"] for part in PARTS]
    ends = np.cumsum([len(found) for found in labels])
    rows = Split(*np.split(np.arange(ends[-1]), ends[:-1]))
    images = None
    for part, index, found in zip(PARTS, rows, labels, strict=True):
        n = len(index)
        if found.dtype.kind not in "iu" or found.shape not in ((n,), (n, 1)):
            raise DataError(
                f"{path}: {part}_labels has dtype {found.dtype} and shape {found.shape}, expected "
                "integers (N,) or (N, 1): one label an image"
            )
        pixels = npz[f"{part}_images"]
        _check_images(f"{path}: {part}_images", pixels)
        if len(pixels) != n:
            raise DataError(f"{path}: {part} has {len(pixels)} images, but {n} labels")
        if images is None:
            images = np.empty((ends[-1], *pixels.shape[1:]), np.uint8)
        images[index] = pixels
        del pixels  # before the next is read, so that only one part is in memory twice
    return images, np.concatenate(labels, axis=None).astype(np.int64), rows


def _check_images(where: str | Path, images: np.ndarray) -> None:
    square = images.ndim in (3, 4) and images.shape[1] == images.shape[2] >= 8
    if images.dtype != np.uint8 or not square or images.shape[3:] not in ((), (3,)):
        raise DataError(
            f"{where} has dtype {images.dtype} and shape {images.shape}, expected uint8 squares of "
            "at least 8 pixels, (N, H, H) or (N, H, H, 3)"
        )


def _class_names(where: str | Path, labels: np.ndarray | list[int]) -> tuple[str, ...]:
    """Name the classes that occur, or raise DataError if they are not 0 to K-1."""
    classes = np.unique(labels).tolist()
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise DataError(
            f"{where}: labels must be 0 to K-1, every class present, K at least 2; "
            f"the lowest found are {classes[:20]}"
        )
    return tuple(f"class {k}" for k in classes)


# ---- digits --------------------------------------------------------------------------------------


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits

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


def convert(train_folder: str | Path, test_folder: str | Path | None, path: str | Path) -> None:
    """Convert the authors' format to an npz in MedMNIST's layout.

    A folder has JPEG or PNG files named by integer id, padded or not; one CSV with the columns
    `Id,Cell type` lies beside them, or else in the folder's parent. Of colour images the first
    channel is taken. Raises DataError if a folder is not as described, or images are damaged or
    differ in size.

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
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already: name a new file")
    files, labels = _list_images(Path(train_folder))
    n = len(files)
    if test_folder is None:
        parts = poster_split(n)
    else:
        test_files, test_labels = _list_images(Path(test_folder))
        files, labels = files + test_files, labels + test_labels
        order = np.random.RandomState(0).permutation(np.arange(n))
        end = n * 80 // 100
        parts = Split(order[:end], order[end:], np.arange(n, len(files)))
    _class_names("the folders", labels)  # refuses bad ones before minutes of decoding
    images, labels = _decode(files), np.array(labels)[:, None]
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
    visible = folder.glob("[!.]*")  # macOS leaves hidden ._NAME.png
    files = [file for file in visible if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise DataError(f"{folder}: no folder, or no .jpg, .jpeg or .png files right in it")
    tables = sorted(folder.glob("[!.]*.csv")) or sorted(folder.resolve().parent.glob("[!.]*.csv"))
    if len(tables) != 1:
        found = ", ".join(map(str, tables)) or "none"
        raise DataError(f"{folder}: one CSV expected in it, or else in its parent; found {found}")
    table = tables[0]
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [(int(row["Id"]), int(row["Cell type"])) for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{table}: columns Id,Cell type of integers expected: {error!r}") from error
    try:
        files.sort(key=lambda file: int(file.stem))
    except ValueError as error:
        raise DataError(f"{folder}: the images' names must be integer ids: {error}") from error
    ids = [int(file.stem) for file in files]
    num_files, num_rows = Counter(ids), Counter(i for i, _ in rows)
    unpaired = [i for i in sorted(num_files | num_rows) if not num_files[i] == num_rows[i] == 1]
    if unpaired:
        i = unpaired[0]
        raise DataError(
            f"{folder}: every id must have one image and one row in {table.name}; {len(unpaired)} "
            f"have not, such as {i} with {num_files[i]} images and {num_rows[i]} rows"
        )
    label_of = dict(rows)
    return files, [label_of[i] for i in ids]


def _decode(files: list[Path]) -> np.ndarray:
    """Decode the first channel of JPEG and PNG files of one square size to (N, H, H) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{error}: pip install -r requirements-figures.txt") from error
    images = None
    for row, file in enumerate(files):
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                # Palettes and bits are not yet intensities.
                plain = image.convert("RGB") if image.mode in ("1", "P") else image
                pixels = np.asarray(plain.getchannel(0))
        except Exception as error:  # Pillow raises at least six kinds for damaged files
            raise DataError(f"{file}: not a readable 8-bit JPEG or PNG file ({error})") from error
        _check_images(file, pixels[None])
        if images is None:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(f"{file} has {pixels.shape} pixels, {files[0]} {images.shape[1:]}")
        images[row] = pixels
    return images


# ---- command line --------------------------------------------------------------------------------


def _print_summary(image_data: ImageData) -> None:
    print(f"name      {image_data.name}")
    print(f"source    {image_data.source}")
    print(f"md5       {image_data.md5}")
    print(f"images    uint8 {image_data.images.shape}")
    train, valid, test = map(len, poster_split(len(image_data.labels)))
    print(f"poster    {train:,} train, {valid:,} valid, {test:,} test")
    if image_data.official is not None:
        train, valid, test = map(len, image_data.official)
        print(f"official  {train:,} train, {valid:,} valid, {test:,} test")
    counts = np.bincount(image_data.labels)
    for k, (name, count) in enumerate(zip(image_data.class_names, counts, strict=True)):
        print(f"class {k:<3} {count:>8,} {count / counts.sum():6.1%}  {name}")


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} bytes", end="\n" * (done == total), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a data set, or convert folders and print it of the result."""
    words = sys.argv[1:] if argv is None else argv
    source = words[-1] if words else "auto"
    try:
        match words:
            case ["-h" | "--help"]:
                print(__doc__)
                return 0
            case ["convert", train_folder, _]:
                convert(train_folder, None, source)
            case ["convert", train_folder, test_folder, _]:
                convert(train_folder, test_folder, source)
            case ["convert", *_] | [_, _, *_]:
                raise DataError("expected [SOURCE], or convert TRAIN_FOLDER [TEST_FOLDER] OUT.npz")
        _print_summary(load(source, progress=_show))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nothing more is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, ImportError, OSError, MemoryError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
