"""Labeled real images, used only to report accuracy; no other part of the package may read a real image.

Each set is a map-style data set of (normalized image, label) for one teacher. It knows the index of each entry in the
full set, so that fixed subsets consist of the same images under any limit.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from synq.evaluation.labeled_sources import ImageSource, open_source


class LabeledSet(Dataset[tuple[Tensor, int]]):
    """Labeled images, preprocessed for one teacher.

    Attributes:
        name: The spec of the set.
        labels: (N,) int64, on the CPU.
        indices: (N,) int64, index of each image in the full set.
        num_total: Number of images in the full set.
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
        """Return one normalized image, (C, H, W) float32, and its label."""
        images, labels = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a batch.

        Args:
            indices: (n,) int64, in [0, len(self)).

        Returns:
            Normalized images (n, C, H, W) float32, and labels (n,) int64.
        """
        raw = self._source.read(self.indices[indices], self._input_size)
        images = fit_images(raw, self._input_size)
        return (images - self._mean) / self._std, self.labels[indices]

    def fingerprint(self) -> str:
        """Return a digest (16 hexadecimal digits) of all labels, all indices in the full set, and the first 64 images.

        It distinguishes two sets with the same name without reading gigabytes of images.
        """
        images, _ = self.batch(torch.arange(min(64, len(self))))
        digest = hashlib.sha256(f"{self.num_total} {tuple(images.shape)}".encode())
        for part in (self.labels, self.indices, images):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def selection_mask(self, fraction: float) -> Tensor:
        """Return the mask (N,), bool, of the images that settings may be selected on; independent of the limit."""
        return selection_mask(self.num_total, fraction)[self.indices]


def load_labeled(
    spec: str,
    teacher_input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    num_classes: int,
    data_dir: str | None = None,
    limit: int | None = None,
) -> LabeledSet:
    """Load a set of labeled images for one teacher.

    Images of another size are resized bilinearly with antialiasing (folders: shorter side to size * 256 / 224, center
    crop). Grayscale images are repeated for a teacher of three channels; color images for a teacher of one channel are
    rejected.

    Args:
        spec: digits (or digits:train), cifar10, cifar100, fashion-mnist, imagefolder:PATH or npz:FILE.
        teacher_input_size: (C, H, W).
        mean, std: Normalization per channel, for images in [0, 1].
        num_classes: Number of classes K; labels must be in [0, K).
        data_dir: Folder of named sets, into which they are also downloaded; None means $SYNQ_DATA_DIR, or ./data if
            that is not set.
        limit: Maximum number of images; None for all. The subset is fixed (selected by a hash of the index, in the
            original order), and a smaller subset is contained in a larger one.

    Raises:
        ValueError: If the spec is unknown, a file is damaged or has an unsupported layout, or labels or channels do
            not match the teacher.
        FileNotFoundError: If a file or folder does not exist.
        ConnectionError: If a named set must be downloaded but cannot be.
    """
    source = open_source(spec, num_classes=num_classes, channels=teacher_input_size[0], data_dir=data_dir)
    num_total = len(source.labels)
    if num_total == 0:
        raise ValueError(f"data set {spec} must contain images, but is empty")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels of {spec} must be in 0..{num_classes - 1} (the teacher has {num_classes} classes), "
            f"but got {low}..{high}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"`num_images` must be at least 1, but got {limit}")
    indices = torch.arange(num_total)
    if limit is not None and limit < num_total:
        indices = _ranks(num_total, "limit").argsort()[:limit].sort().values
    return LabeledSet(spec, source, indices, teacher_input_size, mean, std)


def selection_mask(num_images: int, fraction: float) -> Tensor:
    """Return the mask of the images that settings may be selected on: those whose hash is below ``fraction``.

    The split is fixed: whether image i is selected depends only on i, not on the number of images.

    Args:
        num_images: Size of the full set.
        fraction: Expected fraction of selected images, in [0, 1].

    Returns:
        (num_images,) bool.

    Raises:
        ValueError: If ``fraction`` is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`selection_fraction` must be in 0..1, but got {fraction}")
    return _ranks(num_images, "selection") < fraction


def fit_images(images: Tensor, input_size: tuple[int, int, int]) -> Tensor:
    """Scale images to [0, 1], and resize and expand them to the teacher's input size and channels.

    Args:
        images: (N, C, H, W) uint8, C in {1, 3}.
        input_size: (C, H, W) of the teacher.

    Returns:
        (N, C, H, W) float32 in [0, 1].

    Raises:
        ValueError: If the channels do not match and the images are not grayscale.
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
    """Return a hash of index and purpose for each image, (num_images,) float64, uniform in [0, 1)."""

    def rank(index: int) -> float:
        return int.from_bytes(hashlib.sha256(f"{purpose}:{index}".encode()).digest()[:6], "big") / 2**48

    return torch.tensor([rank(index) for index in range(num_images)], dtype=torch.float64)
