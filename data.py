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
import urllib.request
import warnings
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
        Of the npz file; for the digits, of the images' bytes followed by the labels'.
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


# ---- splits: a seed is an integer from 0 to 2**32 - 1 --------------------------------------------


def split(image_data: ImageData, name: str, seed: int = 0) -> Split:
    """Split by `poster_split` ("poster") or `official_split` ("official"); else a DataError."""
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

    TissueMNIST's 236,386 give 120,000 / 30,000 / 50,000. Raises DataError if n is below 6.
    """
    if n < 6:
        raise DataError(f"{n} images are too few to split 60/15/25 %: use at least 6")
    return _draw(np.arange(n), 200_000, seed, 60, 75)


def tuning_split(split: Split, n: int = 10_000, seed: int = 0) -> Split:
    """Draw n of a split's train and validation images, or all of fewer, and cut them 80/20 %.

    The poster's search had 10,000. The test part is empty.
    """
    return _draw(np.concatenate(split[:2]), n, seed, 80, 100)


def _draw(images: np.ndarray, n: int, seed: int, *percents: int) -> Split:
    """Draw n images, or all of fewer, and cut them at two percentages."""
    # RandomState's stream is frozen (numpy's NEP 19); Generator's may change with a release.
    drawn = np.random.RandomState(seed).permutation(images)[:n]
    return Split(*np.split(drawn, [len(drawn) * percent // 100 for percent in percents]))


# ---- load ----------------------------------------------------------------------------------------


def load(
    source: str | Path = "auto",
    root: str | Path = "~/.medmnist",
    download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load a labelled data set; raises DataError if it is missing, damaged, or of another layout.

    Parameters
    ----------
    source : str or Path, optional
        A name in MEDMNIST: from `root`, or else from the network, its MD5 checked in either case.
        "auto": TissueMNIST, or, where no connection can be made, the digits, with a UserWarning
        that says why. "digits": scikit-learn's, enlarged to 28x28. Else the path of an npz file.
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
    path = Path(source)
    if name in MEDMNIST:
        path, url = Path(root).expanduser() / f"{name}.npz", URL.format(name=name)
        by_hand = f"fetch {url} by hand to {path} (MD5 {MEDMNIST[name]})"
        try:
            if not path.exists():
                if not download:
                    raise ConnectionError("downloading is off")
                _download(url, path, progress)
        except (OSError, http.client.HTTPException) as error:
            # An HTTP status, whose reason is a string, and a refused certificate are answers.
            reason = getattr(error, "reason", None)
            unreachable = isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)
            if source == "auto" and unreachable:
                why = f"the digits stand in for TissueMNIST: no connection to {url}: {reason}"
                warnings.warn(why, stacklevel=2)
                return _load_digits()
            why = f"{path}: no such file, and no download ({error})"
            raise DataError(f"{why}: name its root, run again, or {by_hand}") from error
    elif not path.is_file():
        names = ", ".join(["auto", "digits", *MEDMNIST])
        raise DataError(f"{path}: no such npz file, nor one of {names}; see python data.py --help")
    with path.open("rb") as file:  # hosts in FIPS mode refuse an MD5 for security
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != MEDMNIST.get(name, md5):
        raise DataError(f"{path} has MD5 {md5}: remove it and run again, or {by_hand}")
    return _load_npz(path, md5)


def _download(url: str, path: Path, progress: Callable[[int, int], None] | None) -> None:
    """Download a file, or go on where a killed or broken download stopped.

    What has arrived is PATH.part. Two processes at once write the same bytes to the same places.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # The last byte is asked for again: to a complete part, a server would have nothing to add.
    done = max(part.stat().st_size - 1, 0) if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
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
    part.replace(path)


def _load_npz(path: Path, md5: str) -> ImageData:
    """Load a file in MedMNIST's layout; a part may be empty, a class may not."""
    try:
        # Given a path, np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            labels = [npz[f"{part}_labels"] for part in PARTS]
            ends = np.cumsum([0, *map(len, labels)])
            labels = np.concatenate(labels, axis=None)
            for part, start, end in zip(PARTS, ends[:-1], ends[1:], strict=True):
                pixels = npz[f"{part}_images"]
                if part == "train":
                    images = np.empty((ends[-1], *pixels.shape[1:]), np.uint8)
                rows = images[start:end]
                if pixels.dtype != np.uint8 or pixels.shape != rows.shape:
                    found = f"{part}_images are {pixels.dtype} {pixels.shape}"
                    raise ValueError(f"{found}, expected uint8 {rows.shape}")
                rows[:] = pixels
                del pixels  # before the next is read, so that only one part is in memory twice
    except Exception as error:  # of numpy, zipfile, zlib, ast: no documented, closed set
        problem = "not of MedMNIST's layout, damaged, or too large for the memory here"
        raise DataError(f"{path}: {problem} ({error!r})") from error
    _check(path, images, labels)
    names = tuple(f"class {k}" for k in np.unique(labels))
    names = TISSUEMNIST_CLASSES if md5 == MEDMNIST["tissuemnist"] else names
    parts = Split(*map(np.arange, ends[:-1], ends[1:]))
    return ImageData(images, labels.astype(np.int64), names, path.stem, str(path), md5, parts)


def _check(where: str | Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise DataError unless images are squares, and labels as `ImageData` has them."""
    side = max(images.shape[1:], default=0)
    if side < 8 or images.shape[1:] not in ((side, side), (side, side, 3)):
        raise DataError(f"{where}: images {images.shape}, not (N, H, H) or (N, H, H, 3), H >= 8")
    classes = np.unique(labels).tolist()
    usable = labels.dtype.kind in "iu" and len(labels) == len(images) and len(classes) >= 2
    if not usable or classes != list(range(len(classes))):
        raise DataError(
            f"{where}: labels must be 0 to K-1, one an image, every class present, K at least 2; "
            f"found {len(labels)} {labels.dtype}, the lowest {classes[:20]}"
        )


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Enlarged bilinearly with clamped edges: pixel i of 28 lies at (i + 1/2) * 8/28 - 1/2 =
    # (4 i - 5) / 14 of 8. Every weight is whole 14ths, so integers give the same bytes everywhere.
    position = np.clip(4 * np.arange(28) - 5, 0, 7 * 14)
    weights = np.maximum(14 - abs(position[:, None] - 14 * np.arange(8)), 0)
    images = weights @ digits.images.astype(np.int64) @ weights.T
    full = 14 * 14 * 16  # what the brightest pixel, 16, has become
    images = ((images * 255 + full // 2) // full).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    md5 = hashlib.md5(images.tobytes() + labels.tobytes(), usedforsecurity=False).hexdigest()
    source = "scikit-learn load_digits, 8x8 enlarged to 28x28"
    return ImageData(images, labels, tuple("0123456789"), "digits", source, md5, official=None)


# ---- the authors' folders ------------------------------------------------------------------------


def convert(train_folder: str | Path, test_folder: str | Path | None, path: str | Path) -> None:
    """Convert the authors' format to an npz in MedMNIST's layout.

    A folder has JPEG or PNG files named by integer id, padded or not; one CSV with the columns
    `Id,Cell type` lies beside them, or else in the folder's parent. Of colour images the first
    channel is taken. Raises DataError if a folder or an image is not so, or sizes differ.

    Parameters
    ----------
    train_folder : str or Path
        Its images, in ascending order of id, are shuffled with seed 0 and cut 80/20 % into train
        and validation images, as the authors did: 150,000 give 120,000 / 30,000.
    test_folder : str or Path or None
        All of it is the test part. None: the first folder is split by `poster_split`.
    path : str or Path
        The npz; must not exist.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already: name a new file")
    pairs = _list_images(Path(train_folder))
    n = len(pairs)
    if test_folder is None:
        parts = poster_split(n)
    else:
        pairs += _list_images(Path(test_folder))
        parts = _draw(np.arange(n), n, 0, 80, 100)._replace(test=np.arange(n, len(pairs)))
    files, labels = zip(*pairs, strict=True)
    images, labels = _decode(files), np.array(labels)
    _check("the folders", images, labels)
    arrays = {}
    for part, index in zip(PARTS, parts, strict=True):
        arrays |= {f"{part}_images": images[index], f"{part}_labels": labels[index, None]}
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def _list_images(folder: Path) -> list[tuple[Path, int]]:
    """Return a folder's image files and their labels, in ascending order of id."""
    visible = folder.glob("[!.]*")  # macOS leaves hidden ._NAME.png
    paths = [path for path in visible if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    tables = [*folder.glob("[!.]*.csv")] or [*folder.resolve().parent.glob("[!.]*.csv")]
    if not paths or len(tables) != 1:
        problem = "JPEG or PNG files expected in it, and one CSV in it or else in its parent"
        raise DataError(f"{folder}: {problem}; found {len(paths)} and {len(tables)}")
    try:
        files = sorted((int(path.stem), path) for path in paths)
        with tables[0].open(encoding="utf-8-sig", newline="") as table:
            rows = sorted((int(row["Id"]), int(row["Cell type"])) for row in csv.DictReader(table))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        problem = f"images' names, and Id and Cell type in {tables[0]}, must be integers"
        raise DataError(f"{folder}: {problem}: {error!r}") from error
    num_files, num_rows = Counter(i for i, _ in files), Counter(i for i, _ in rows)
    if unpaired := sorted((num_files - num_rows) | (num_rows - num_files)):
        problem = f"every id must have one image and one row in {tables[0].name}"
        raise DataError(f"{folder}: {problem}; {len(unpaired)} have not, such as {unpaired[0]}")
    return [(path, label) for (_, path), (_, label) in zip(files, rows, strict=True)]


def _decode(files: Sequence[Path]) -> np.ndarray:
    """Decode the first channel of JPEG and PNG files of one size to (N, height, width) uint8."""
    from PIL import Image

    for row, file in enumerate(files):
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                # Palettes and bits are not yet intensities.
                plain = image.convert("RGB") if image.mode in ("1", "P") else image
                pixels = np.asarray(plain.getchannel(0))
            if row == 0:
                images = np.empty((len(files), *pixels.shape), np.uint8)
            if pixels.dtype != np.uint8 or pixels.shape != images.shape[1:]:
                raise ValueError(f"{pixels.dtype} {pixels.shape}, {files[0]} {images.shape[1:]}")
            images[row] = pixels
        except Exception as error:  # Pillow raises at least six kinds for damaged files
            problem = "not a readable 8-bit JPEG or PNG file of the others' size"
            raise DataError(f"{file}: {problem} ({error})") from error
    return images


# ---- command line --------------------------------------------------------------------------------


def _print_summary(image_data: ImageData) -> None:
    for field in ("name", "source", "md5"):
        print(f"{field:<9} {getattr(image_data, field)}")
    print(f"images    uint8 {image_data.images.shape}")
    n = len(image_data.labels)
    splits = {"poster": poster_split(n) if n > 5 else None, "official": image_data.official}
    for kind, parts in splits.items():
        if parts:
            print("{:<9} {:,} train, {:,} valid, {:,} test".format(kind, *map(len, parts)))
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
            case ["convert", train_folder, *test_folder, _] if len(test_folder) <= 1:
                convert(train_folder, *test_folder or [None], source)
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
