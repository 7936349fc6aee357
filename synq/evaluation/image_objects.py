"""Images that are Python objects: arrays, tensors, Pillow images, data sets and iterables of them, as uint8 pixels.

What an object holds is either read exactly by these rules or rejected in one line:

    uint8                          read: (C, H, W) of a tensor; (H, W), (H, W, C) or (C, H, W) of an array
    float in [0, 1]                read: value * 255, rounded; so the result of ToTensor() is the image it was made from
    other floats, other integers   rejected: normalized images have no known range
    Pillow images                  read as image files are (`labeled_images`)
    a dict, a pair                 its image and label, or the first and second entry
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synq.evaluation.labeled_images import check_object, fit_object
from synq.teacher.preprocessing import Preprocessing

IMAGE_KEYS = ("image", "img", "pixel_values", "images", "x")
LABEL_KEYS = ("label", "labels", "target", "class", "y", "fine_label")
SLACK = 1e-4
"""Largest value by which a float may leave [0, 1], as resizing with a bicubic filter and rounding make it."""


class ImageObjects:
    """The images of an object, and their labels if it has them, in order.

    A data set (with a length and an index) is read when its images are needed; any other iterable is read once and
    kept, as uint8.

    Attributes:
        labels: (N,) int64, or None where the images are not labeled.
        digest: SHA-256 of pixels, sizes, labels if they are needed, and which images are Pillow's, which are resized
            in another way; 64 hexadecimal digits.
        sizes: The different sizes (height, width) of the images.
        has_pictures: Whether some are Pillow images, which are resized as image files are.
    """

    def __init__(self, data: Any, name: str, *, labeled: bool) -> None:
        """Read all images once, to check them and to compute their digest.

        Args:
            data: (images, labels), a data set or an iterable of images or (image, label), or batches of them; without
                labels also an array or tensor of images.
            name: Argument that they were given by, for messages.
            labeled: Whether labels are needed.

        Raises:
            ValueError: There is no image, one has a type or range that is not read, or labels are missing.
        """
        self.name = name
        self._get, count, labels = _opened(data, name, labeled=labeled)
        digest, sizes, found = hashlib.sha256(), set(), []
        self.has_pictures = False
        for index in range(count):
            item = self._get(index)
            picture, label = _parts(item, name) if labels is None else (item, labels[index])
            pixels = self._pixels(picture)
            self.has_pictures |= _is_picture(picture)
            sizes.add((int(pixels.shape[1]), int(pixels.shape[2])))
            kind = " Pillow" if _is_picture(picture) else ""
            digest.update(f"{tuple(pixels.shape)} {label if labeled else None}{kind}\n".encode())
            digest.update(pixels.contiguous().numpy().tobytes())
            found.append(label)
        if count == 0:
            raise ValueError(f"`{name}` must hold images, but is empty")
        self._count, self._has_parts = count, labels is None
        self.sizes, self.digest = sizes, digest.hexdigest()
        self.labels: Tensor | None = None
        if labeled:
            self.labels = torch.tensor([_label(label, name) for label in found], dtype=torch.int64)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Iterable[int], size: tuple[int, int, int], rule: Preprocessing) -> Tensor:
        """Return images (n, C, H, W) uint8; of different sizes, or Pillow images, at the size of the teacher.

        Args:
            indices: In [0, len(self)).
            size: (C, H, W) of the teacher.
            rule: How Pillow images of another size are resized and cropped.
        """
        return torch.stack([self._fitted(index, size, rule) for index in indices])

    def contents(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Yield the size and the pixels of images as bytes, for a digest."""
        for index in indices:
            pixels = self._pixels(self._picture(index))
            yield f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes()

    def _picture(self, index: int) -> Any:
        item = self._get(index)
        return _parts(item, self.name)[0] if self._has_parts else item

    def _pixels(self, picture: Any) -> Tensor:
        return picture_pixels(picture, self.name) if _is_picture(picture) else array_pixels(picture, self.name)

    def _fitted(self, index: int, size: tuple[int, int, int], rule: Preprocessing) -> Tensor:
        pixels = self._pixels(self._picture(index))
        if pixels.shape[0] not in (1, size[0]):
            raise ValueError(
                f"`{self.name}` must hold images for a teacher of {size[0]} channel(s), but has some of {len(pixels)}"
            )
        pixels = pixels.expand(size[0], -1, -1)
        if len(self.sizes) == 1 and (tuple(pixels.shape[1:]) == size[1:] or not self.has_pictures):
            return pixels
        return fit_object(pixels, size, rule, self.name)


def picture_pixels(picture: Any, name: str) -> Tensor:
    """Return a Pillow image as (C, H, W) uint8, C = 1 for gray and 3 for color; see `labeled_images`."""
    return check_object(picture, name)


def array_pixels(values: Any, name: str) -> Tensor:
    """Return one image, a tensor or an array, as (C, H, W) uint8.

    Raises:
        ValueError: Its shape, type or range is not read.
    """
    is_tensor = isinstance(values, Tensor)
    pixels = values.detach().cpu() if is_tensor else torch.from_numpy(np.array(_as_array(values, name)))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and not is_tensor and pixels.shape[2] in (1, 3, 4) and pixels.shape[0] not in (1, 3):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or 0 in pixels.shape:
        layout = "(C, H, W) of a tensor, or (H, W) or (H, W, C) of an array"
        raise ValueError(f"`{name}` must hold images {layout}, but got one of shape {tuple(pixels.shape)}")
    return _bytes_of(pixels, name)


def _bytes_of(pixels: Tensor, name: str) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise ValueError(f"`{name}` must hold images of type uint8 or float in [0, 1], but got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -SLACK and high <= 1 + SLACK):  # also for NaN
        raise ValueError(
            f"`{name}` must hold images of type uint8 or float in [0, 1], not normalized ones (leave out "
            f"transforms.Normalize), but got values from {low:.3g} to {high:.3g}"
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _as_array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, str | bytes | Mapping) or not (hasattr(values, "__array__") or isinstance(values, list)):
        raise ValueError(f"`{name}` must hold images (tensors, arrays, Pillow images), but got {type(values).__name__}")
    return np.asarray(values)


def _is_picture(value: Any) -> bool:
    """Return whether a value is a Pillow image; its class is not imported here."""
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def _opened(data: Any, name: str, *, labeled: bool) -> tuple[Callable[[int], Any], int, Sequence[Any] | None]:
    """Return a function of an index, the number of items, and the labels if they are separate.

    With separate labels (None for each unlabeled image) an item is an image, else it may be an image and a label.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(_is_batch(part) for part in data):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"`{name}` must have a label for each image, but has {len(labels)} for {len(images)}")
        return images.__getitem__, len(images), [_number(label) for label in labels]
    if _is_batch(data) and not _has_pairs(data):
        if labeled:
            raise ValueError(f"`{name}` must have labels, as (images, labels), but got {type(data).__name__} alone")
        return data.__getitem__, len(data), [None] * len(data)
    if isinstance(data, Mapping):
        form = "(images, labels)" if labeled else "its images"
        keys = ", ".join(map(str, data))
        raise ValueError(f"`{name}` must be images or a data set, but got a dict of {keys:.80}: give {form} from it")
    if not _is_stream(data) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return data.__getitem__, len(data), None
    if not hasattr(data, "__iter__"):
        raise ValueError(f"`{name}` must be images, a data set or an iterable of them, but got {type(data).__name__}")
    batches = isinstance(data, torch.utils.data.DataLoader) and data.batch_sampler is not None
    kept = list(_kept(data, name, batches=batches))
    return kept.__getitem__, len(kept), None


def _kept(data: Iterable[Any], name: str, *, batches: bool) -> Iterator[Any]:
    """Yield (image, label) of every item, as uint8 and Pillow images, the items of a batch one after the other."""
    for item in data:
        images, labels = _parts(item, name)
        if not batches and not (isinstance(images, Tensor) and images.ndim == 4):
            yield (images if _is_picture(images) else array_pixels(images, name), labels)
            continue
        for number, picture in enumerate(images):
            yield (array_pixels(picture, name), None if labels is None else labels[number])


def _parts(item: Any, name: str) -> tuple[Any, Any]:
    """Return image and label of an item; the label is None where it has none."""
    if isinstance(item, Mapping):
        found = [next((item[key] for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if found[0] is None:
            raise ValueError(f"`{name}` must hold items with a key `image`, but got {', '.join(map(str, item))}")
        return found[0], found[1]
    if isinstance(item, tuple | list) and item and not isinstance(item[0], int | float):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _label(value: Any, name: str) -> int:
    value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must have a whole number as the label of each image, but got {value!r:.80}")
    return value


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _is_batch(value: Any) -> bool:
    """Return whether a value is an array, tensor or list with one entry per image."""
    return isinstance(value, Tensor | list | np.ndarray)


def _has_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], tuple | Mapping)


def _is_stream(data: Any) -> bool:
    """Return whether an object can only be iterated, although it may have a length and inherit an index."""
    return isinstance(data, torch.utils.data.DataLoader | torch.utils.data.IterableDataset)
