"""Measurements on a finished run that its report draws, as plain NumPy arrays."""

from dataclasses import dataclass

import numpy as np

from synq.runs.record import RunRecord

NUM_BINS = 60
SIMILARITY_BINS = 50
"""Bins of the histogram of the similarities of tokens over [-1, 1]."""
REACH = 1.5
"""Histograms of an activation quantizer's input extend to this multiple of the range's largest absolute bound."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Synthetic images of some classes, before and after the low-pass filter.

    Attributes:
        before, after: Pixel values (classes, images, H, W, 1 or 3) in [0, 1], clipped at black and white.
        classes: The class of each row.
        num_images: Number of images in the whole set.
        channels: Number of channels; unless it is 1 or 3, only the first channel is shown.
        clipped: Fraction (0..1) of the pixels in `before` that were outside [0, 1].
    """

    before: np.ndarray
    after: np.ndarray
    classes: tuple[int, ...]
    num_images: int
    channels: int
    clipped: float


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Amplitude spectra (two-dimensional DFT) of several sets of images.

    Attributes:
        amplitudes: Mean |DFT| (H, W) by name of the set, zero frequency in the center.
        profiles: Radial profile (R,) by name: entry r is the mean at distances r - 1/2 .. r + 1/2 DFT bins from zero.
        cutoff: The filter's D0 in DFT bins; None without a filter.
        counts: Number of images by name.
    """

    amplitudes: dict[str, np.ndarray]
    profiles: dict[str, np.ndarray]
    cutoff: float | None
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted classes of teacher and student on the same images.

    Attributes:
        source: Description of the images.
        labeled: Whether `labels` are ground truth; otherwise they are the target classes of synthetic images.
        labels, teacher, student: Classes (N,).
        difficulty: 1 - the teacher's probability of the label, (N,) in [0, 1].
    """

    source: str
    labeled: bool
    labels: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    difficulty: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Maps of several networks on the same images: class activation maps, or attention.

    Attributes:
        source: Description of the images.
        images: Pixel values (N, H, W, 1 or 3) in [0, 1].
        labels: Classes (N,) of the images, which class activation maps explain.
        maps: Maps (N, h, w), not normalized, by name of the network.
    """

    source: str
    images: np.ndarray
    labels: np.ndarray
    maps: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of several networks on the same images, and the similarities of the teacher's tokens.

    Attributes:
        maps: What each position gets of the attention, by name of the network, or why there are no maps.
        place: Which attention the maps are of, for a caption.
        similarities: Histogram of the cosines of tokens over [-1, 1], as shares, by name of a set of images.
        counts: Number of images by name of the set.
    """

    maps: Maps | str
    place: str
    similarities: dict[str, np.ndarray]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Signal-to-quantization-noise ratio (SQNR) of one layer, in dB.

    Attributes:
        name: Name of the module.
        bits: Bits of its weight.
        weight_db: SQNR of the weight.
        output_db: SQNR of the output, with all layers before it quantized too.
    """

    name: str
    bits: int
    weight_db: float
    output_db: float


@dataclass(frozen=True, kw_only=True)
class RangeCount:
    """Histogram of the input of one activation quantizer.

    Attributes:
        name: Name of the module.
        bits: Its bit-width.
        low, high: Bounds of its range.
        shares: Fraction (0..1) of the values in each of NUM_BINS equal bins over -REACH .. REACH times
            max(-low, high); values outside are counted in the first and last bin.
        clipped: Fraction (0..1) of the values outside the range.
    """

    name: str
    bits: int
    low: float
    high: float
    shares: np.ndarray
    clipped: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measurements on a finished run; one that could not be made is a string with the reason.

    `attention` is None for a network without.
    """

    record: RunRecord
    images: ImageGrid | str
    spectra: Spectra | str
    predictions: Predictions | str
    maps: Maps | str
    attention: Attention | str | None
    layers: list[LayerError] | str
    ranges: list[RangeCount] | str
