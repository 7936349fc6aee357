"""Sources of labeled images: location and decoding of the files of each supported set, as uint8 pixels."""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from synq.config.plugins import DATASET_SOURCE, known
from synq.evaluation.labeled_arrays import read_idx, read_npz
from synq.evaluation.labeled_images import IMAGE_SUFFIXES, OTHER_SUFFIXES, check_image, read_image
from synq.teacher.preprocessing import Preprocessing

FORMS = ("digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder:PATH", "npz:FILE", "none")
"""Specs of labeled images."""
DATA_DIR_VARIABLE = "SYNQ_DATA_DIR"
FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)  # Debian's package dataset-fashion-mnist
DIGITS_HELDOUT = 1 / 3
DECODED_FIRST = 5_000
"""Largest number of image files of which every one is decoded before the run; of more, only those that look damaged."""
MAX_SCALE = 8
"""Largest factor by which arrays of images are enlarged or reduced to the teacher's size; 28 for 224 is 8."""
_CHUNK = 1024
"""Images of an array that are hashed at a time."""


@dataclass(frozen=True)
class ImageSource:
    """All labels of a set, and a function that reads its images.

    Attributes:
        labels: (N,) int64.
        read: (indices (n,) int64, input size (C, H, W) of the teacher) -> images (n, C, H, W) uint8, C in {1, 3}.
            Sets with images of different sizes resize them to the input size.
        contents: indices (n,) int64 -> the stored bytes of these images, for a digest. Files are checked on the way.
        size: Height and width of the stored images; None if they differ.
    """

    labels: Tensor
    read: Callable[[Tensor, tuple[int, int, int]], Tensor]
    contents: Callable[[Tensor], Iterator[bytes]]
    size: tuple[int, int] | None = None


def open_source(
    spec: str, *, num_classes: int, channels: int, data_dir: str | None, rule: Preprocessing
) -> ImageSource:
    """Open the set of a spec; see `synq.evaluation.labeled.load_labeled` for specs, arguments and errors."""
    root = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser()
    kind, _, rest = spec.partition(":")
    if kind == "digits" and rest in ("", "train"):
        return _digits(train=rest == "train")
    if kind in ("cifar10", "cifar100") and not rest:
        source = _torchvision_set(kind.upper(), root)
    elif kind == "fashion-mnist" and not rest:
        source = _fashion_mnist(root)
    elif kind == "npz" and rest:
        path = _locate(rest, spec)
        images, labels = read_npz(path)
        source = from_arrays(images, labels, str(path))
    elif kind == "imagefolder" and rest:
        return _imagefolder(_locate(rest, spec), num_classes, channels, rule)
    else:
        added = known(DATASET_SOURCE)
        near = difflib.get_close_matches(spec, [*FORMS, *added], n=1) or difflib.get_close_matches(kind, added, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        forms = ", ".join((*FORMS[:-1], *added, *DATASET_SOURCE.forms, FORMS[-1]))
        raise ValueError(f"`evaluation.dataset` must be one of {forms}, but got {spec!r}{hint}")
    found = source.read(torch.arange(min(1, len(source.labels))), (channels, 0, 0)).shape[1]
    if found not in (channels, 1):
        raise ValueError(f"images of {spec} must match a teacher of {channels} channel(s), but have {found}")
    return source


def from_arrays(images: Any, labels: Any, where: str) -> ImageSource:
    """Create an image source from arrays.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, C in {1, 3}.
        labels: (N,) integers.
        where: Name of the source, for messages.

    Raises:
        ValueError: If a shape or dtype is not supported.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        layout = "(N, H, W) or (N, H, W, C) uint8 with C = 1 or 3"
        raise ValueError(f"images of {where} must be {layout}, but got {images.shape} {images.dtype}")
    if 0 in images.shape[1:3]:
        raise ValueError(f"images of {where} must have at least one pixel, but have {images.shape[1:3]}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels of {where} must be ({len(images)},) integers, one per image, but got {labels.shape} {labels.dtype}"
        )
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))  # PyTorch warns about read-only arrays
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels

    def read(indices: Tensor, _: tuple[int, int, int]) -> Tensor:
        return pixels[indices].permute(0, 3, 1, 2)

    def contents(indices: Tensor) -> Iterator[bytes]:
        return (pixels[part].contiguous().numpy().tobytes() for part in indices.split(_CHUNK))

    size = (images.shape[1], images.shape[2])
    return ImageSource(torch.from_numpy(labels.astype(np.int64)), read, contents, size)


def digits_heldout_mask(num_images: int) -> np.ndarray:
    """Return the mask (num_images,), bool, of the held-out third of `digits`.

    The split is fixed: image i is held out if the SHA-256 of "digits:i", scaled to [0, 1), is below 1/3.
    """
    ranks = [
        int(hashlib.sha256(f"digits:{index}".encode()).hexdigest()[:12], 16) / 2**48 for index in range(num_images)
    ]
    return np.array(ranks) < DIGITS_HELDOUT


def _digits(train: bool) -> ImageSource:
    """Load scikit-learn's 8 x 8 digits (1,797 images, values 0..16), scaled to 0..255; no download."""
    from sklearn.datasets import load_digits  # a slow import that only this set needs

    images, labels = load_digits(return_X_y=True)
    keep = digits_heldout_mask(len(images)) != train
    pixels = np.rint(images[keep].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return from_arrays(pixels, labels[keep].astype(np.int64), "digits")


def _torchvision_set(name: str, root: Path) -> ImageSource:
    """Load the official test split of CIFAR from ``root``, and download it first if it is missing."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    try:
        found = kind(root, train=False, download=False)
    except RuntimeError:  # torchvision's "not found or corrupted"
        found = _download(name, root, lambda: kind(root, train=False, download=True))
    return from_arrays(found.data, found.targets, name.lower())


def _download(name: str, root: Path, fetch: Callable[[], Any]) -> Any:
    """Download a set once: a lock makes the other processes wait and then find the files."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f".{name}.lock"):
            return fetch()
    except (RuntimeError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ConnectionError(
            f"data set {name.lower()} must be in {root} or be reachable, but the download failed: {error}; "
            "download it on another machine and give its folder as `evaluation.data_dir`"
        ) from error


def _fashion_mnist(root: Path) -> ImageSource:
    """Load the 10,000 test images from ``root`` or Debian's package, or download them into ``root``."""
    names = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    inside = (root, root / "fashion-mnist", root / "FashionMNIST" / "raw")
    for folder in (*inside, *FASHION_MNIST_FOLDERS):
        files = [next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None) for name in names]
        # MNIST uses the same file names, so the path of the folder must contain "fashion".
        if files[0] is not None and files[1] is not None and "fashion" in folder.resolve().as_posix().lower():
            return from_arrays(read_idx(files[0]), read_idx(files[1]), str(folder))
    from torchvision import datasets

    found = _download("fashion-mnist", root, lambda: datasets.FashionMNIST(root, train=False, download=True))
    return from_arrays(found.data.numpy(), found.targets.numpy(), "fashion-mnist")


def _imagefolder(root: Path, num_classes: int, channels: int, rule: Preprocessing) -> ImageSource:
    """Open a folder of class folders; labels are the numbers in the folder names, or else the alphabetical order."""
    if channels not in (1, 3):
        raise ValueError(f"image folder {root} must be for a teacher of 1 or 3 channels, but it has {channels}")
    if not root.is_dir():
        raise NotADirectoryError(f"`evaluation.dataset` must name a folder after imagefolder:, but got the file {root}")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if folders and all(folder.name.isascii() and folder.name.isdecimal() for folder in folders):
        numbers = [int(folder.name) for folder in folders]  # by value: alphabetically, "10" precedes "2"
        twice = sorted({folder.name for folder in folders if numbers.count(int(folder.name)) > 1})
        if twice:
            raise ValueError(f"image folder {root} must have one folder per class, but has {' and '.join(twice)}")
    elif len(folders) == num_classes:
        numbers = list(range(num_classes))
    else:
        raise ValueError(
            f"image folder {root} must contain one folder per class of the teacher ({num_classes}), "
            f"but has {len(folders)}; for a subset of the classes name each folder by its class index"
        )
    found = [
        (file, number) for folder, number in zip(folders, numbers, strict=True) for file in image_files(folder, root)
    ]
    files = [file for file, _ in found]

    def read(indices: Tensor, size: tuple[int, int, int]) -> Tensor:
        return torch.stack([read_image(files[int(index)], size, rule) for index in indices])

    def contents(indices: Tensor) -> Iterator[bytes]:
        for index in indices:
            file = files[int(index)]
            data = file.read_bytes()
            check_image(file, data, channels, whole=len(indices) <= DECODED_FIRST)
            yield len(data).to_bytes(8, "big") + data

    return ImageSource(torch.tensor([number for _, number in found], dtype=torch.int64), read, contents)


def image_files(folder: Path, root: Path) -> list[Path]:
    """Return the image files below a folder, sorted, without hidden ones; reject images that cannot be read.

    Args:
        folder: The folder, at any depth of which files are taken.
        root: The folder that the user named, for messages.

    Raises:
        ValueError: It has an image of a kind that is not read.
    """
    inside = sorted(file for file in folder.rglob("*") if not _is_hidden(file.relative_to(folder)))
    other = [file for file in inside if file.suffix.lower() in OTHER_SUFFIXES and file.is_file()]
    if other:
        raise ValueError(
            f"image folder {root} must hold images as {', '.join(IMAGE_SUFFIXES)}, but has {other[0]}: convert it and "
            "those like it, or take them out"
        )
    return [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _locate(path: str, spec: str) -> Path:
    found = Path(os.path.expandvars(path)).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"`evaluation.dataset` must name an existing path, but got {spec!r}")
    return found
