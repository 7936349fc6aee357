"""Parts of what a report shows of a finished run, as plain arrays."""

from dataclasses import dataclass

import numpy as np

from synq.runs.record import RunRecord

NUM_BINS = 60
REACH = 1.5
"""Inputs of an activation quantizer are counted up to this multiple of the larger end of its range."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Some synthetic images of each class, before and after the low-pass filter.

    Attributes:
        before, after: (classes, images, H, W, 1 or 3) in [0, 1], brightness of pixels; beyond black and white they are clipped.
        classes: The class of each row.
        num_images: Images of the whole set.
        channels: Channels of the images; of another number than 1 or 3 the first is shown.
        clipped: Share (0..1) of the pixels shown that lie beyond black or white.
    """

    before: np.ndarray
    after: np.ndarray
    classes: tuple[int, ...]
    num_images: int
    channels: int
    clipped: float


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Mean amplitudes of the two-dimensional Fourier transform.

    Attributes:
        amplitudes: (H, W) by name of the images, zero frequency in the middle.
        profiles: (R,) by name: means over rings, ring r of the frequencies r - 1/2 .. r + 1/2 DFT bins from zero.
        cutoff: The filter's D0 in DFT bins; None without a filter.
        counts: Images behind each.
    """

    amplitudes: dict[str, np.ndarray]
    profiles: dict[str, np.ndarray]
    cutoff: float | None
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of both networks to the same images.

    Attributes:
        source: What the images are, in words.
        labeled: Whether `labels` are true ones; else they are the classes that the images were made for.
        labels, teacher, student: (N,) classes.
        difficulty: (N,) 1 - the teacher's probability of the label.
    """

    source: str
    labeled: bool
    labels: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    difficulty: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Class-activation maps of the same images by several networks.

    Attributes:
        source: What the images are, in words.
        images: (N, H, W, 1 or 3) in [0, 1].
        labels: (N,) classes of the maps.
        maps: (N, h, w), raw, by the network's name.
    """

    source: str
    images: np.ndarray
    labels: np.ndarray
    maps: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Signal to quantization noise of one layer, in dB.

    Attributes:
        name: Module of the layer.
        bits: Width of its weight.
        weight_db: Of its weight alone.
        output_db: Of its output in the network, everything before it included.
    """

    name: str
    bits: int
    weight_db: float
    output_db: float


@dataclass(frozen=True, kw_only=True)
class RangeCount:
    """What enters one activation quantizer.

    Attributes:
        name: Its module.
        bits: Its width.
        low, high: Ends of its range.
        shares: (NUM_BINS,) shares (0..1) of the values in equal bins over -REACH .. REACH times the larger end; the outer bins hold
            what lies beyond.
        clipped: Share (0..1) of the values beyond the range.
    """

    name: str
    bits: int
    low: float
    high: float
    shares: np.ndarray
    clipped: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Parts of a run's page; a text says why a part is not there."""

    record: RunRecord
    images: ImageGrid | str
    spectra: Spectra | str
    answers: Answers | str
    maps: Maps | str
    layers: list[LayerError] | str
    ranges: list[RangeCount] | str
