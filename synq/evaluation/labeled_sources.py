"""Sources of labeled images: location and decoding of the files of each supported set, as uint8 pixels."""

import difflib
import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor

DATA_DIR_VARIABLE = "SYNQ_DATA_DIR"
FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)  # Debian's package dataset-fashion-mnist
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
DIGITS_HELDOUT = 1 / 3
CROP_RATIO = 256 / 224


@dataclass(frozen=True)
class ImageSource:
    """All labels of a set, and a function that reads its images.

    Attributes:
        labels: (N,) int64.
        read: (indices (n,) int64, input size (C, H, W) of the teacher) -> images (n, C, H, W) uint8, C in {1, 3}.
            Sets with images of different sizes resize them to the input size.
    """

    labels: Tensor
    read: Callable[[Tensor, tuple[int, int, int]], Tensor]


def open_source(spec: str, *, num_classes: int, channels: int, data_dir: str | None) -> ImageSource:
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
        source = _npz(_locate(rest, spec))
    elif kind == "imagefolder" and rest:
        return _imagefolder(_locate(rest, spec), num_classes, channels)
    else:
        forms = ["digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder:PATH", "npz:FILE", "none"]
        near = difflib.get_close_matches(spec, forms, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"`evaluation.dataset` must be one of {', '.join(forms)}, but got {spec!r}{hint}")
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
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels of {where} must be ({len(images)},) integers, one per image, but got {labels.shape} {labels.dtype}"
        )
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))  # PyTorch warns about read-only arrays
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels

    def read(indices: Tensor, _: tuple[int, int, int]) -> Tensor:
        return pixels[indices].permute(0, 3, 1, 2)

    return ImageSource(torch.from_numpy(labels.astype(np.int64)), read)


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


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    Format: the bytes 00 00 08 ndim, then ndim big-endian uint32 sizes, then the values.

    Returns:
        A uint8 array of the shape in the file.

    Raises:
        ValueError: If the file is damaged or contains another type.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a readable gzip file, but is damaged: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, but starts with {raw[:4]!r}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} must contain {raw[3]} sizes after its first bytes, but is damaged: it is truncated")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
    if len(raw) - start != int(np.prod(shape)):
        raise ValueError(
            f"{path} must contain {shape} bytes, but is damaged: {len(raw) - start} bytes follow its header"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def _npz(path: Path) -> ImageSource:
    try:
        # Opened explicitly, because NumPy does not close the file of a damaged archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            missing = [key for key in ("x", "y") if key not in content.files]
            if missing:
                raise ValueError(f"it must contain arrays `x` and `y`, but has {', '.join(content.files) or 'none'}")
            images, labels = content["x"], content["y"]
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"npz file {path} cannot be used: {error}") from error
    return from_arrays(images, labels, str(path))


def _imagefolder(root: Path, num_classes: int, channels: int) -> ImageSource:
    """Open a folder of class folders; labels are the numbers in the folder names, or else the alphabetical order."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if folders and all(folder.name.isdecimal() for folder in folders):
        numbers = [int(folder.name) for folder in folders]  # by value: alphabetically, "10" precedes "2"
    elif len(folders) == num_classes:
        numbers = list(range(num_classes))
    else:
        raise ValueError(
            f"image folder {root} must contain one folder per class of the teacher ({num_classes}), "
            f"but has {len(folders)}; for a subset of the classes name each folder by its class index"
        )
    found = [
        (file, number)
        for folder, number in zip(folders, numbers, strict=True)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    files = [file for file, _ in found]

    def read(indices: Tensor, size: tuple[int, int, int]) -> Tensor:
        return torch.stack([_read_image(files[int(index)], size) for index in indices])

    return ImageSource(torch.tensor([number for _, number in found], dtype=torch.int64), read)


def _read_image(file: Path, size: tuple[int, int, int]) -> Tensor:
    """Read an image as (C, H, W) uint8: resize to size * 256 / 224, then center crop, as in ImageNet evaluation."""
    channels, height, width = size
    try:
        with Image.open(file) as opened:
            is_gray = opened.mode in ("1", "L")
            if channels == 1 and not is_gray:
                raise ValueError(
                    f"images must be grayscale for a teacher of 1 channel, but {file} has mode {opened.mode}"
                )
            image = opened.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {file} must be readable, but is damaged: {error}") from error
    scale = max(height * CROP_RATIO / image.height, width * CROP_RATIO / image.width)
    scaled = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    image = image.resize(scaled, Image.Resampling.BILINEAR)  # Pillow antialiases by a wider kernel when downscaling
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)


def _locate(path: str, spec: str) -> Path:
    found = Path(os.path.expandvars(path)).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"`evaluation.dataset` must name an existing path, but got {spec!r}")
    return found
