"""Where the images come from, how they are known, stretched and split.

The poster's images are public as TissueMNIST (MedMNIST v2, CC BY 4.0): 125 MB, downloaded once into
~/.medmnist, where the medmnist package keeps them too. MedMNIST's other sets, any file in their
layout, and scikit-learn's digits, which need no internet, load the same way:

    image_data = load("auto")              # uint8 images (N, H, H), int64 labels (N,)
    parts = split(image_data, "poster")    # 120,000 / 30,000 / 50,000 indices
    train_images = stretch(image_data.images[parts.train])

MedMNIST's layout is an npz of six arrays: `train_images`, `val_images`, `test_images`, uint8 of
shape (N, H, H) or (N, H, H, 3), and `train_labels`, `val_labels`, `test_labels`, integers of shape
(N, 1) or (N,). `convert` makes such a file of the authors' folders of JPEG or PNG files.

    python data.py [SOURCE]                                     what is in it; default: auto
    python data.py convert TRAIN_FOLDER [TEST_FOLDER] OUT.npz   make a file of folders

For all functions: images are uint8 arrays (N, H, W) or (N, H, W, C), a seed is an integer from 0 to
2**32 - 1, and bad input raises `DataError`. Needs scikit-learn for the digits, Pillow to convert.
"""

import contextlib
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

# The 2D sets of MedMNIST v2 with one label per image, and the MD5 of NAME.npz (28x28 pixels), as in
# the medmnist package. ChestMNIST, the only other 2D set, has several labels per image.
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
# The MD5s of files with TissueMNIST's images: the official one, and 236,300 of its 236,386 images,
# shuffled and in one part. These are the 100 files of the folder TissueMNIST/subsets of the public
# repository OpenMined/datasets, merged, at commit df8a8363968cdc95214050e9695eb92faa861042.
TISSUEMNIST = (MEDMNIST["tissuemnist"], "f9bd3585a9d40024bd1e216e53f30861")
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
    """A labelled image data set in memory."""

    images: np.ndarray  # uint8 (N, H, H) or (N, H, H, 3); the network's three poolings need H >= 8
    labels: np.ndarray  # int64 (N,) in 0..K-1, every class present
    class_names: tuple[str, ...]  # K of them
    name: str  # "digits", the name of the set with this MD5, or the file's name without its suffix
    source: str  # what was loaded: the set's name, or the path as it was given
    md5: str  # of the npz file; for the digits, of the images' bytes followed by the labels'
    official: Split | None  # the file's own parts

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)


def ids(images: np.ndarray) -> np.ndarray:
    """Return (N,) strings: the first 16 hexadecimal digits of the SHA-256 of each image's bytes."""
    return np.array([hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images], "U16")


def stretch(images: np.ndarray) -> np.ndarray:
    """Return the images with each one's values stretched to 0..255, as the authors' images are.

    A value x becomes ``(x - low) * 255 // (high - low)``, where low and high are the image's lowest
    and highest value in any channel. A flat image stays as it is.
    """
    pixel_axes = tuple(range(1, images.ndim))
    low = images.min(axis=pixel_axes, keepdims=True)
    high = images.max(axis=pixel_axes, keepdims=True)
    flat = low == high
    low[flat], high[flat] = 0, 255  # with which the formula changes nothing
    stretched = np.multiply(images - low, 255, dtype=np.uint16)
    stretched //= high - low
    return stretched.astype(np.uint8)


def split(image_data: ImageData, name: str, seed: int = 0) -> Split:
    """Split by `poster_split` ("poster") or `official_split` ("official")."""
    if name == "poster":
        return poster_split(image_data.images, seed)
    if name == "official":
        return official_split(image_data)
    raise DataError(f"split {name!r} is unknown: choose poster or official")


def official_split(image_data: ImageData) -> Split:
    """Return the file's own parts, none of which may be empty."""
    parts = image_data.official
    if parts is None or min(map(len, parts)) == 0:
        raise DataError(f"{image_data.name} has no official split into three: use the poster's")
    return parts


def poster_split(images: np.ndarray, seed: int = 0) -> Split:
    """Sort images by a key and cut the first 200,000, or all of fewer, 60/15/25 %.

    The key is the SHA-256 of ``f"{seed} "`` and the image's bytes, so the parts are the same images
    whatever order a file has. Equal images keep the file's order. At least 6 images are needed.
    """
    if len(images) < 6:
        raise DataError(f"{len(images)} images are too few to split 60/15/25 %: use at least 6")
    prefix = f"{seed} ".encode()
    keys = [hashlib.sha256(prefix + image.tobytes()).hexdigest() for image in images]
    order = np.argsort(keys, kind="stable")[:200_000]
    return Split(*np.split(order, [len(order) * 60 // 100, len(order) * 75 // 100]))


def tuning_split(split: Split, n: int = 10_000, seed: int = 0) -> Split:
    """Draw n train and validation images, or all of fewer, and cut them 80/20 %; test is empty."""
    return _draw(np.concatenate([split.train, split.valid]), n, seed)


def _draw(indices: np.ndarray, n: int, seed: int) -> Split:
    """Draw n indices, or all of fewer, and cut them 80/20 %."""
    # RandomState's stream is frozen (numpy's NEP 19); Generator's may change with a release.
    drawn = np.random.RandomState(seed).permutation(indices)[:n]
    end = len(drawn) * 80 // 100
    return Split(drawn[:end], drawn[end:], drawn[:0])


def load(
    source: str | Path = "auto",
    root: str | Path = "~/.medmnist",
    download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load a labelled data set.

    Parameters
    ----------
    source : str or Path, optional
        A name in MEDMNIST: its file in `root`, downloaded if missing; the MD5 is always checked.
        "auto": TissueMNIST, or, where no connection can be made, the digits, with a UserWarning
        that says why. "digits": scikit-learn's, enlarged to 28x28. Else the path of an npz file.
    root : str or Path, optional
        Folder of the downloaded files.
    download : bool, optional
        Whether to download. If not, a set that is missing in `root` is a DataError.
    progress : callable(done_bytes, total_bytes), optional
        Called while downloading.
    """
    if source == "digits":
        return _load_digits()
    name = "tissuemnist" if source == "auto" else str(source)
    if name not in MEDMNIST:
        path = _expand(source)
        if not path.is_file():
            names = ", ".join(["auto", "digits", *MEDMNIST])
            raise DataError(f"{source}: no such npz file, nor one of {names}")
        return _load_npz(path, name, _md5(path.read_bytes()))

    path = _expand(root) / f"{name}.npz"
    url = URL.format(name=name)
    by_hand = f"run again, or fetch {url} by hand to {path} (MD5 {MEDMNIST[name]})"
    try:
        if download and not path.exists():
            _download(url, path, progress)
        md5 = _md5(path.read_bytes())
    except (OSError, http.client.HTTPException) as error:
        # An HTTP status, whose reason is a string, and a refused certificate are answers.
        reason = getattr(error, "reason", None)
        unreachable = isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)
        if source == "auto" and unreachable:
            why = f"the digits stand in for TissueMNIST: no connection to {url}: {reason}"
            warnings.warn(why, stacklevel=2)
            return _load_digits()
        why = str(getattr(error, "strerror", None) or error)  # without the path once more
        raise DataError(f"{path}: {why}: choose another root, {by_hand}") from error
    if md5 != MEDMNIST[name]:
        raise DataError(f"{path} has MD5 {md5}: remove it and {by_hand}")
    return _load_npz(path, name, md5)


def _expand(path: str | Path) -> Path:
    """Return a path with its ~ expanded."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or one without a home
        raise DataError(f"{path}: {error} Set HOME, or name a path without ~") from error


def _md5(content: bytes) -> str:
    # Hosts in FIPS mode refuse an MD5 for security.
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(url: str, path: Path, progress: Callable[[int, int], None] | None) -> None:
    """Download to PATH.part, from where an earlier download stopped; then rename it."""
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


def _load_npz(path: Path, source: str, md5: str) -> ImageData:
    """Load a file in MedMNIST's layout; a part may be empty, a class may not."""
    try:
        # Given a path, np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            images = [npz[f"{part}_images"] for part in PARTS]
            # The reshaping fails unless there is one label per image.
            pairs = zip(PARTS, images, strict=True)
            labels = [npz[f"{part}_labels"].reshape(len(pixels)) for part, pixels in pairs]
        ends = np.cumsum([len(part_labels) for part_labels in labels])
        images = np.concatenate(images, dtype=np.uint8, casting="no")
        # Booleans and integers of any size and byte order pass, other types do not.
        labels = np.concatenate(labels, dtype=np.int64, casting="same_kind")
    except Exception as error:  # of numpy, zipfile, zlib, ast: no documented, closed set
        problem = "not of MedMNIST's layout, damaged, or too large for the memory here"
        raise DataError(f"{path}: {problem} ({error!r})") from error
    _check(path, images, labels)
    class_names = tuple(f"class {k}" for k in np.unique(labels))
    name = next((name for name, known in MEDMNIST.items() if known == md5), path.stem)
    if md5 in TISSUEMNIST:
        name, class_names = "tissuemnist", TISSUEMNIST_CLASSES
    official = Split(*np.split(np.arange(len(images)), ends[:-1]))
    return ImageData(images, labels, class_names, name, source, md5, official)


def _check(where: str | Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise DataError unless images are squares, and labels as `ImageData` has them."""
    side = max(images.shape[1:], default=0)
    if side < 8 or images.shape[1:] not in ((side, side), (side, side, 3)):
        raise DataError(f"{where}: images {images.shape}, not (N, H, H) or (N, H, H, 3), H >= 8")
    classes = np.unique(labels).tolist()
    if len(classes) < 2 or classes != list(range(len(classes))):
        problem = "labels must be 0 to K-1, every class present, K at least 2"
        raise DataError(f"{where}: {problem}; found {classes[:20]}")


def _load_digits() -> ImageData:
    """Load scikit-learn's 8x8 digits as 28x28: each pixel 3x3 times, with two black ones around."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images.astype(np.int64) * 255 // 16).astype(np.uint8)  # 16 is the brightest
    images = np.pad(grey.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    labels = digits.target.astype(np.int64)
    md5 = _md5(images.tobytes() + labels.tobytes())
    return ImageData(images, labels, tuple("0123456789"), "digits", "digits", md5, official=None)


def convert(train_folder: str | Path, test_folder: str | Path | None, path: str | Path) -> None:
    """Convert the authors' folders of images to an npz in MedMNIST's layout.

    A folder has JPEG or PNG files of one size, named by id, a decimal number, padded or not. One
    CSV with the columns `Id,Cell type` lies beside them, or else in the folder's parent. Of colour
    images the first channel is taken. `path` must not exist, but its folder must.

    As the authors did, the images of `train_folder`, in ascending order of id, are shuffled with
    seed 0 and cut 80/20 % into train and validation images: 150,000 give 120,000 / 30,000. All of
    `test_folder` is the test part. If it is None, the first folder is split by `poster_split`.
    """
    path = _expand(path)
    if path.exists() or not path.parent.is_dir():
        raise DataError(f"{path}: name a new file in a folder that exists")
    pairs = _list_images(_expand(train_folder))
    num_train = len(pairs)
    if test_folder is not None:
        pairs += _list_images(_expand(test_folder))
    images = _decode([file for file, _ in pairs])
    labels = np.array([label for _, label in pairs])
    _check("the folders", images, labels)
    if test_folder is None:
        parts = poster_split(images)
    else:
        test = np.arange(num_train, len(pairs))
        parts = _draw(np.arange(num_train), num_train, seed=0)._replace(test=test)
    arrays = {}
    for part, index in zip(PARTS, parts, strict=True):
        arrays |= {f"{part}_images": images[index], f"{part}_labels": labels[index, None]}
    temporary = path.with_name(path.name + ".tmp.npz")
    try:
        np.savez(temporary, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _list_images(folder: Path) -> list[tuple[Path, int]]:
    """Return a folder's image files and their labels, in ascending order of id."""
    visible = folder.glob("[!.]*")  # macOS leaves hidden ._NAME.png
    paths = [path for path in visible if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    tables = [*folder.glob("[!.]*.csv")] or [*folder.resolve().parent.glob("[!.]*.csv")]
    if not paths or len(tables) != 1:
        problem = "JPEG or PNG files expected in it, and one CSV in it or else in its parent"
        raise DataError(f"{folder}: {problem}; found {len(paths)} and {len(tables)}")
    try:
        files = sorted((_decimal(path.stem), path) for path in paths)
        with tables[0].open(encoding="utf-8-sig", newline="") as table:
            records = list(csv.DictReader(table, restval=""))
        rows = sorted((_decimal(row["Id"]), _decimal(row["Cell type"])) for row in records)
    except (ValueError, KeyError, csv.Error) as error:
        problem = f"images' names, and Id and Cell type in {tables[0]}, must be decimal digits"
        raise DataError(f"{folder}: {problem}; found {error}") from error
    num_files = Counter(image_id for image_id, _ in files)
    num_rows = Counter(image_id for image_id, _ in rows)
    wrong = sorted(i for i in num_files | num_rows if num_files[i] != 1 or num_rows[i] != 1)
    if wrong:
        problem = f"every id must have one image and one row in {tables[0].name}"
        raise DataError(f"{folder}: {problem}; {len(wrong)} have not, such as {wrong[0]}")
    return [(path, label) for (_, path), (_, label) in zip(files, rows, strict=True)]


def _decimal(text: str) -> int:
    # int() would read 1_23 as 123. 18 digits fit int64.
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ValueError(repr(text))
    return int(text)


def _decode(files: Sequence[Path]) -> np.ndarray:
    """Decode the first channel of JPEG and PNG files of one size to (N, height, width) uint8."""
    from PIL import Image

    decoded = []
    for file in files:
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                # Of CMYK the first channel is a negative, and 16 bits do not fit.
                if image.mode not in ("1", "P", "L", "LA", "RGB", "RGBA"):
                    raise ValueError(f"mode {image.mode}")
                decoded.append(np.asarray(image.convert("RGB").getchannel("R")))
            if decoded[-1].shape != decoded[0].shape:
                raise ValueError(f"{decoded[-1].shape}, {files[0]} {decoded[0].shape}")
        except Exception as error:  # Pillow raises at least six kinds for damaged files
            problem = "not a readable 8-bit grey or RGB file, JPEG or PNG, of the others' size"
            raise DataError(f"{file}: {problem} ({error})") from error
    return np.stack(decoded)


def _summary(image_data: ImageData) -> str:
    """Return the lines that `main` prints of a data set."""
    images = image_data.images
    lines = [f"{field:<9} {getattr(image_data, field)}" for field in ("name", "source", "md5")]
    lines.append(f"images    uint8 {images.shape}")
    lines.append(f"mean grey {images.mean():.2f} raw, {stretch(images).mean():.2f} stretched")
    maxima = images.max(axis=tuple(range(1, images.ndim)))
    lines.append(f"brightest {maxima.mean():.2f} raw, mean of the images' maxima")
    for name in ("poster", "official"):
        with contextlib.suppress(DataError):  # a split that this set does not have
            sizes = map(len, split(image_data, name))
            lines.append("{:<9} {:,} train, {:,} valid, {:,} test".format(name, *sizes))
    counts = np.bincount(image_data.labels)
    for k, (name, count) in enumerate(zip(image_data.class_names, counts, strict=True)):
        lines.append(f"class {k:<3} {count:>8,} {count / counts.sum():6.1%}  {name}")
    return "\n".join(lines)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # at exit, Python would fail again on what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _show(done: int, total: int) -> None:
    if sys.stderr and sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done:,} of {total:,} bytes", end=end, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a data set, or convert folders and print it of the result."""
    with contextlib.suppress(AttributeError):  # stdout is closed, or a test's
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    source = words[-1] if words else "auto"
    try:
        match words:
            case ["-h" | "--help"]:
                _print(__doc__ or "data.py [SOURCE]")
                return 0
            case ["convert", train_folder, path]:
                convert(train_folder, None, path)
            case ["convert", train_folder, test_folder, path]:
                convert(train_folder, test_folder, path)
            case ["convert", *_] | [_, _, *_]:
                raise DataError("expected [SOURCE], or convert TRAIN_FOLDER [TEST_FOLDER] OUT.npz")
        _print(_summary(load(source, progress=_show)))
    except BrokenPipeError:  # `| head` has read enough
        return 0
    except (DataError, ImportError, OSError, MemoryError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
