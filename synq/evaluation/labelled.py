"""Labelled real images, for reporting accuracy only. Nothing else of the package may read a real image.

Every set is an indexable data set of (normalised image, label) for one teacher, and knows which image of the full set each entry
is, so that fixed subsets stay the same subsets under any limit.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from synq.evaluation.labelled_sources import ImageSource, open_source


class LabelledSet(Dataset[tuple[Tensor, int]]):
    """Labelled images as one teacher wants to see them.

    Attributes:
        name: the spec it was loaded from.
        labels: (N,) int64 on the CPU.
        indices: (N,) int64, number of each image in the full set.
        num_total: images in the full set.
    """

    def __init__(
        self,
        name: str,
        source: ImageSource,
        indices: Tensor,
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.name = name
        self.indices = indices
        self.labels = source.labels[indices]
        self.num_total = len(source.labels)
        self._source = source
        self._input_size = input_size
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image (C, H, W) float32, normalised, and its label."""
        images, labels = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) float32, normalised, and labels (n,) int64 for ``indices`` (n,) int64 in [0, len)."""
        raw = self._source.read(self.indices[indices], self._input_size)
        images = fit_images(raw, self._input_size)
        return (images - self._mean) / self._std, self.labels[indices]

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits over all labels, their numbers in the full set, and the first 64 images.

        Tells two sets of one name apart without reading gigabytes of images.
        """
        images, _ = self.batch(torch.arange(min(64, len(self))))
        digest = hashlib.sha256(f"{self.num_total} {tuple(images.shape)}".encode())
        for part in (self.labels, self.indices, images):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def selection_mask(self, fraction: float) -> Tensor:
        """(N,) bool: the part of this set that settings may be chosen on; the same images under any limit."""
        return selection_mask(self.num_total, fraction)[self.indices]


def load_labelled(
    spec: str,
    teacher_input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    num_classes: int,
    data_dir: str | None = None,
    limit: int | None = None,
) -> LabelledSet:
    """Open a labelled set for one teacher.

    Images of another size are resized bilinearly with antialiasing (folders: shorter side to size * 256 / 224, centre crop);
    grey images are repeated for a teacher of three channels; colour images for a teacher of one channel are refused.

    Args:
        spec: digits (or digits:train), cifar10, cifar100, fashion-mnist, imagefolder:PATH or npz:FILE.
        teacher_input_size: (C, H, W).
        mean, std: per channel, for images in [0, 1].
        num_classes: labels must lie in [0, num_classes).
        data_dir: folder in which sets asked for by name lie or are put; None = $SYNQ_DATA_DIR, or ./data where that is unset.
        limit: number of images; None or more than there are = all. The subset is fixed (chosen by a hash of the image's number,
            kept in order), and a smaller one lies within a larger one.

    Raises:
        ValueError: if the spec is unknown, a file is damaged or of another layout, or labels or channels do not fit.
        FileNotFoundError: if a file or folder does not exist.
        ConnectionError: if a set asked for by name has to be fetched and cannot be.
    """
    source = open_source(spec, num_classes=num_classes, channels=teacher_input_size[0], data_dir=data_dir)
    num_total = len(source.labels)
    if num_total == 0:
        raise ValueError(f"data set {spec} must hold images, but is empty")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels of {spec} must lie in 0..{num_classes - 1} (the teacher has {num_classes} classes), but got {low}..{high}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"`num_images` must be at least 1, but got {limit}")
    indices = torch.arange(num_total)
    if limit is not None and limit < num_total:
        indices = _ranks(num_total, "limit").argsort()[:limit].sort().values
    return LabelledSet(spec, source, indices, teacher_input_size, mean, std)


def selection_mask(num_images: int, fraction: float) -> Tensor:
    """Which images settings may be chosen on: those whose hashed number falls below ``fraction``.

    Fixed for ever, whatever the number of images: image i is chosen or not by i alone.

    Args:
        num_images: size of the full set.
        fraction: in [0, 1].

    Returns:
        (num_images,) bool.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`selection_fraction` must lie in 0..1, but got {fraction}")
    return _ranks(num_images, "selection") < fraction


def fit_images(images: Tensor, input_size: tuple[int, int, int]) -> Tensor:
    """Scale images to [0, 1] and fit them to the teacher's size and channels.

    Args:
        images: (N, C, H, W) uint8, C in {1, 3}.
        input_size: (C, H, W) of the teacher.

    Returns:
        (N, C, H, W) float32 in [0, 1].

    Raises:
        ValueError: if the channels cannot be fitted.
    """
    channels, height, width = input_size
    scaled = images.to(torch.float32) / 255
    if scaled.shape[1] != channels:
        if scaled.shape[1] != 1:
            raise ValueError(f"images must have {channels} channel(s) for this teacher, but have {scaled.shape[1]}")
        scaled = scaled.expand(-1, channels, -1, -1)
    if scaled.shape[2:] != (height, width):
        scaled = F.interpolate(scaled, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled


def _ranks(num_images: int, purpose: str) -> Tensor:
    """(num_images,) float64 in [0, 1): an evenly spread number for every image, from its number and the purpose alone."""

    def rank(index: int) -> float:
        return int.from_bytes(hashlib.sha256(f"{purpose}:{index}".encode()).digest()[:6], "big") / 2**48

    return torch.tensor([rank(index) for index in range(num_images)], dtype=torch.float64)
