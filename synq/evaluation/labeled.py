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

from synq.common.notices import print_notice
from synq.config.run import EvaluationConfig
from synq.evaluation.labeled_memory import is_in_memory, is_own, open_memory, open_own
from synq.evaluation.labeled_sources import MAX_SCALE, ImageSource, open_source
from synq.teacher.preprocessing import Preprocessing, default_rule, overridden
from synq.teacher.teacher import Teacher

DIGEST_PREFIX = "v2-"
"""Start of the digests of whole sets; those of earlier versions, of the first 64 images, are 16 digits alone."""


class LabeledSet(Dataset[tuple[Tensor, int]]):
    """Labeled images, preprocessed for one teacher.

    Attributes:
        name: The spec of the set.
        labels: (N,) int64, on the CPU.
        indices: (N,) int64, index of each image in the full set.
        num_total: Number of images in the full set.
        rule: How images are brought to the teacher's size, as a text.
        has_files: Whether the images are files of different sizes (imagefolder), to which `Preprocessing` applies.
        is_resized: Whether images of another size than the teacher's may be among them.
    """

    def __init__(
        self,
        name: str,
        source: ImageSource,
        indices: Tensor,
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        rule: str,
    ) -> None:
        self.name = name
        self.rule = rule
        self.indices = indices
        self.labels = source.labels[indices]
        self.num_total = len(source.labels)
        self.has_files = source.size is None
        self.is_resized = source.size != input_size[1:]
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
        """Return a digest of everything that is measured: labels, indices, the stored images, rule and normalization.

        Every image is read once, and damaged files are found by that.

        Returns:
            "v2-" and 16 hexadecimal digits.

        Raises:
            OSError: If an image file cannot be opened.
            ValueError: If one is damaged or of a kind that is not read.
        """
        digest = hashlib.sha256(f"{self.num_total} {self._input_size} {self.rule}\n".encode())
        for part in (self.labels, self.indices, self._mean, self._std):
            digest.update(part.contiguous().numpy().tobytes())
        for content in self._source.contents(self.indices):
            digest.update(content)
        return DIGEST_PREFIX + digest.hexdigest()[:16]

    def earlier_fingerprint(self) -> str:
        """Return the digest of earlier versions: all labels and indices, and the first 64 images, normalized."""
        images, _ = self.batch(torch.arange(min(64, len(self))))
        digest = hashlib.sha256(f"{self.num_total} {tuple(images.shape)}".encode())
        for part in (self.labels, self.indices, images):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """Return what is measured, for a record: the set, its size, the rules of the subset and of the resizing."""
        subset = "all images"
        if len(self) < self.num_total:
            subset = (
                f'the {len(self)} images i of smallest SHA-256 of "limit:i": drawn from the whole set, the same in '
                "every run, contained in every larger subset"
            )
        return {
            "dataset": self.name,
            "num_total": self.num_total,
            "num_images": len(self),
            "subset": subset,
            "preprocessing": self.rule,
            "mean": self._mean.flatten().tolist(),
            "std": self._std.flatten().tolist(),
        }

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
    preprocessing: Preprocessing | None = None,
) -> LabeledSet:
    """Load a set of labeled images for one teacher.

    Image files (imagefolder) are resized and cropped by the rule `preprocessing`. Arrays of another size are resized
    whole, bilinearly with antialiasing; they are rejected if that distorts them, or scales them by more than 8.
    Grayscale images are repeated for a teacher of three channels; color images for a teacher of one channel are
    rejected.

    Args:
        spec: digits (or digits:train), cifar10, cifar100, fashion-mnist, imagefolder:PATH or npz:FILE, that of images
            in memory, or that of a function of the user.
        teacher_input_size: (C, H, W).
        mean, std: Normalization per channel, for images in [0, 1].
        num_classes: Number of classes K; labels must be in [0, K).
        data_dir: Folder of named sets, into which they are also downloaded; None means $SYNQ_DATA_DIR, or ./data if
            that is not set.
        limit: Maximum number of images; None for all. The subset is fixed (selected by a hash of the index, in the
            original order), and a smaller subset is contained in a larger one.
        preprocessing: Rule for image files; None: shorter side to size x 256 / 224, bilinear, center crop.

    Raises:
        ValueError: If the spec is unknown, a file is damaged or has an unsupported layout, or labels or channels do
            not match the teacher.
        FileNotFoundError: If a file or folder does not exist.
        ConnectionError: If a named set must be downloaded but cannot be.
    """
    rule = preprocessing or default_rule(teacher_input_size)
    if is_in_memory(spec):
        source = open_memory(spec, teacher_input_size, rule)
    elif is_own(spec):
        source = open_own(spec, teacher_input_size, rule)
    else:
        channels = teacher_input_size[0]
        source = open_source(spec, num_classes=num_classes, channels=channels, data_dir=data_dir, rule=rule)
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
    text = rule.describe() if source.size is None else resizing_rule(spec, source.size, teacher_input_size)
    return LabeledSet(spec, source, indices, teacher_input_size, mean, std, text)


def resizing_rule(spec: str, size: tuple[int, int], input_size: tuple[int, int, int]) -> str:
    """Return how arrays of images are brought to the teacher's size, as a text.

    Args:
        spec: The images, for messages.
        size: Their height and width.
        input_size: (C, H, W) of the teacher.

    Raises:
        ValueError: If that would distort them by more than rounding, or scale them by more than 8.
    """
    (height, width), (_, to_height, to_width) = size, input_size
    if size == (to_height, to_width):
        return "none: the images have the teacher's size"
    there, needed = f"{height} x {width}", f"{to_height} x {to_width}"
    # Within half a pixel of the shorter side, as resizing that keeps the aspect ratio rounds.
    if abs(height * to_width - width * to_height) > max(min(height, width), min(to_height, to_width)) / 2:
        raise ValueError(
            f"images of {spec} must have the aspect ratio of the teacher's input, {needed}, but are {there} and would "
            "be distorted: crop or pad them"
        )
    scale = max(to_height / height, height / to_height, to_width / width, width / to_width)
    if scale > MAX_SCALE:
        raise ValueError(
            f"images of {spec} must be within {MAX_SCALE} times the teacher's input, {needed}, but are {there}: "
            "resize them as the teacher was trained, or give the right `teacher.input_size`"
        )
    return f"resize whole images from {there} to {needed} (bilinear, antialiased), no crop"


def open_labeled(settings: EvaluationConfig, teacher: Teacher) -> LabeledSet | None:
    """Load the labeled images of a run, with the preprocessing of the teacher's weights; None if it has none.

    A resizing of arrays is reported once, unless the set is the teacher's own.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: As `load_labeled`.
    """
    spec = settings.dataset or teacher.default_dataset
    if spec is None or spec == "none":
        return None
    size = teacher.input_size
    rule = overridden(teacher.preprocessing or default_rule(size), size, settings.resize_size, settings.interpolation)
    labeled = load_labeled(
        spec,
        size,
        teacher.mean,
        teacher.std,
        num_classes=teacher.num_classes,
        data_dir=settings.data_dir,
        limit=settings.num_images,
        preprocessing=rule,
    )
    if not labeled.has_files:
        for name in ("resize_size", "interpolation"):
            if getattr(settings, name) is not None:
                raise ValueError(f"`evaluation.{name}` must be left out for {spec}: it is for image folders only")
        if labeled.is_resized and spec != teacher.default_dataset:
            print_notice(f"note: images of {spec}: {labeled.rule}")
    return labeled


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
