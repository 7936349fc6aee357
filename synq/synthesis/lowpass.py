"""Gaussian low-pass filter for images, which removes the high-frequency noise of synthesis.

x^F = F^-1(G . F(x)),    G_uv = exp(-D(u, v)^2 / (2 D0^2)),    D = distance from zero frequency in DFT bins
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from synq.common.scratch import check_space, scratch_tensor

LARGE_SET_BYTES = 2**28
"""Size from which filtered images are kept on disk: 21,845 images of 32 pixels, 446 of 224."""
FILTER_BATCH = 64
"""Images of a large set that are filtered at a time."""


def cutoff_in_bins(cutoff: float, unit: str, height: int, width: int) -> float:
    """Convert a cutoff D0 into DFT bins.

    0.5 "nyquist" is 8 bins at 32 x 32 pixels and 56 bins at 224 x 224; 40 "bins" is 40 bins at any size.

    Args:
        cutoff: D0 in ``unit``, > 0.
        unit: "bins", or "nyquist": a fraction of the Nyquist frequency of the shorter side, which is
            min(height, width) / 2 bins.
        height: pixels.
        width: pixels.

    Returns:
        D0 in bins, > 0.

    Raises:
        ValueError: if ``cutoff`` is not positive or ``unit`` is unknown.
    """
    if not cutoff > 0:
        raise ValueError(f"`lowpass_cutoff` must be > 0 (or absent for no filter), but got {cutoff}")
    if unit == "bins":
        return float(cutoff)
    if unit == "nyquist":
        return cutoff * min(height, width) / 2
    raise ValueError(f"`lowpass_unit` must be one of 'bins', 'nyquist', but got {unit!r}")


def gaussian_gain(
    height: int,
    width: int,
    cutoff_bins: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the filter's gain at each frequency of ``torch.fft.rfft2``.

    Worked numbers, corner of the spectrum / Nyquist on one axis: 32 px, D0 = 20: 0.53 / 0.73; 224 px, D0 = 80:
    0.14 / 0.38. A side of n pixels has frequencies at the integer bins 0, 1, ..., n/2, so in a non-square image one bin
    is one period per side on each axis.

    Args:
        height: pixels H >= 1.
        width: pixels W >= 1.
        cutoff_bins: D0 in DFT bins, > 0.
        device: of the result.
        dtype: of the result; default the global one.

    Returns:
        (H, W // 2 + 1) in [0, 1]; exactly 1 at [0, 0].

    Raises:
        ValueError: if ``cutoff_bins`` is not positive.

    Source: SynQ section 3, low-pass filter.
    """
    if not cutoff_bins > 0:
        raise ValueError(f"`cutoff_bins` must be > 0, but got {cutoff_bins}")
    # Times n: fftfreq counts in cycles per pixel, the formula in bins. float64 gives all devices the same gain.
    # fftfreq returns cycles per pixel; times n it is in bins. In float64, so that the gain is the same on every device.
    rows = torch.fft.fftfreq(height, dtype=torch.float64) * height
    cols = torch.fft.rfftfreq(width, dtype=torch.float64) * width
    distance_squared = rows[:, None] ** 2 + cols[None, :] ** 2
    gain = torch.exp(-distance_squared / (2.0 * cutoff_bins**2))
    return gain.to(device=device, dtype=dtype or torch.get_default_dtype())


STAGES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Radii of `StagedLowpass`, as fractions of the Nyquist frequency."""


class StagedLowpass:
    """Ideal low-pass filter whose radius grows in five equal stages: low frequencies are optimized first.

    Unlike the Gaussian filter it can be applied after every step: what it has let pass, it lets pass again unchanged.
    """

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        """Make the filter for images of a size in pixels."""
        self._size = height, width
        rows = torch.fft.fftfreq(height, dtype=torch.float64) * 2  # fractions of each axis' Nyquist frequency
        cols = torch.fft.rfftfreq(width, dtype=torch.float64) * 2
        distance = (rows[:, None] ** 2 + cols[None, :] ** 2).sqrt()
        # The last stage lets the lowest frequency of each axis pass, on however few pixels.
        radii = [*STAGES[:-1], max(STAGES[-1], 2 / min(height, width))]
        self._gains = [(distance <= radius + 1e-9).to(device, torch.float32) for radius in radii]

    def __call__(self, x: Tensor, done: float) -> Tensor:
        """Return images (N, C, H, W) without frequencies beyond the radius of the stage.

        Args:
            x: Images, floating point.
            done: Fraction of the steps that are done, in [0, 1].
        """
        gain = self._gains[min(int(done * len(STAGES)), len(STAGES) - 1)]
        return torch.fft.irfft2(torch.fft.rfft2(x) * gain.to(x.dtype), s=self._size)


@torch.no_grad()
def gaussian_lowpass(x: Tensor, cutoff_bins: float, batch: int = 512, out: Tensor | None = None) -> Tensor:
    """Apply the Gaussian low-pass filter to images; the mean of each channel is preserved.

    Args:
        x: images (N, C, H, W), floating point.
        cutoff_bins: D0 in DFT bins, > 0.
        batch: images filtered at a time; bounds the memory for the spectrum.
        out: output tensor, shaped like ``x``; None allocates a new one.

    Returns:
        ``out``, or a new tensor like ``x`` (same dtype and device). Half-precision images are filtered in float32.

    Raises:
        ValueError: if ``cutoff_bins`` is not positive.
    """
    height, width = x.shape[-2:]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    gain = gaussian_gain(height, width, cutoff_bins, device=x.device, dtype=work)
    out = torch.empty_like(x) if out is None else out
    if len(x) == 0:  # some FFT libraries reject an empty batch
        return out
    for source, target in zip(x.split(batch), out.split(batch), strict=True):
        spectrum = torch.fft.rfft2(source.to(work)) * gain
        target.copy_(torch.fft.irfft2(spectrum, s=(height, width)))
    return out


def lowpass_set(images: Tensor, cutoff_bins: float, folder: Path | None = None) -> Tensor:
    """Filter a whole set of images; the result of a large set is a memory-mapped file without a name.

    Args:
        images: (N, C, H, W).
        cutoff_bins: D0 in DFT bins, > 0.
        folder: Where the file lies, from ``LARGE_SET_BYTES`` on; None keeps every result in memory.

    Returns:
        (N, C, H, W), as ``gaussian_lowpass``.

    Raises:
        ValueError: if ``cutoff_bins`` is not positive.
        OSError: if the disk of ``folder`` has no space for the file.
    """
    if folder is None or images.nbytes < LARGE_SET_BYTES:
        return gaussian_lowpass(images, cutoff_bins)
    out = scratch_tensor(tuple(images.shape), images.dtype, folder)
    return gaussian_lowpass(images, cutoff_bins, FILTER_BATCH, out)


def check_lowpass_space(folder: Path, num_images: int, input_size: tuple[int, int, int], copies: int) -> None:
    """Raise if the disk of ``folder`` has no space for the filtered float32 images of ``copies`` processes.

    Args:
        folder: As for ``lowpass_set``.
        num_images: Size of the set, N.
        input_size: Channels, height, width of an image.
        copies: Processes of this machine, each of which filters the whole set.

    Raises:
        OSError: Names the folder, the space needed and the space free.
    """
    size = 4 * num_images * math.prod(input_size)
    if size >= LARGE_SET_BYTES:
        check_space(folder, size, copies)
