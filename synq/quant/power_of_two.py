"""Ranges of activations whose scale is a power of two, which makes float operations of an engine exact.

A range of such a grid is (-z 2^k, (quant_max - z) 2^k) with a zero point z in 0..quant_max. Its ends, their difference
and the inverse of the scale have no rounding error in float32, so `choose_qparams` returns 2^k and z for it.
"""

import math

import torch
from torch import Tensor

from synq.quant.observers import quantization_errors

FINER = 3
"""How many halvings of the covering scale are tried."""
MOST_ZERO_POINTS = 65
"""How many zero points are tried at each scale."""


def power_of_two_range(low: float, high: float, quant_max: int) -> tuple[float, float]:
    """Return the smallest range with a power of two as scale that includes [low, high] and zero.

    ``power_of_two_range(-1.0, 2.0, 15)`` is (-1.0, 2.75): the scale is 0.25 and the zero point 4. With 0.125 the codes
    would reach over 1.875 only.

    Args:
        low, high: The range, finite, low <= high.
        quant_max: Largest code; the smallest is 0.

    Returns:
        (lo, hi) as described above; (0.0, 0.0) if the range is empty.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 0.0, 0.0
    exponent = math.ceil(math.log2((high - low) / quant_max))
    while not _fits(low, high, 2.0**exponent, quant_max):  # both ends are rounded outwards
        exponent += 1
    scale = 2.0**exponent
    least, most = math.ceil(-low / scale), quant_max - math.ceil(high / scale)
    zero_point = min(max(round(-low / scale), least), most)
    return -zero_point * scale, (quant_max - zero_point) * scale


@torch.no_grad()
def mse_power_of_two_range(
    counts: Tensor, bin_min: float, bin_max: float, quant_max: int, norm: float = 2.4
) -> tuple[float, float]:
    """Return the range with a power of two as scale that minimizes sum_b counts_b |c_b - q(c_b)|^norm.

    The scale that covers all values is tried, and `FINER` smaller ones, which clip; for each, zero points from that
    which keeps the lower end to that which keeps the upper one.

    Args:
        counts: (bins,), >= 0, from ``HistogramObserver``.
        bin_min: Lower edge of the first bin.
        bin_max: Upper edge of the last bin.
        quant_max: Largest code; the smallest is 0.
        norm: Exponent p > 0.

    Returns:
        (lo, hi) as ``power_of_two_range``.
    """
    whole = power_of_two_range(bin_min, bin_max, quant_max)
    hist = counts.detach().to("cpu", torch.float64)
    if whole == (0.0, 0.0) or float(hist.sum()) <= 0:
        return whole
    candidates = [whole]
    for halvings in range(1, FINER + 1):
        scale = (whole[1] - whole[0]) / quant_max / 2**halvings
        kept_low = min(quant_max, math.ceil(-min(bin_min, 0.0) / scale))
        kept_high = max(0, quant_max - math.ceil(max(bin_max, 0.0) / scale))
        tried = torch.linspace(min(kept_low, kept_high), max(kept_low, kept_high), MOST_ZERO_POINTS).round()
        candidates += [(-point * scale, (quant_max - point) * scale) for point in tried.unique().tolist()]
    bin_width = (float(bin_max) - float(bin_min)) / len(hist)
    centers = float(bin_min) + (torch.arange(len(hist), dtype=torch.float64) + 0.5) * bin_width
    used = hist > 0
    unit = max(-whole[0], whole[1])  # magnitude 1: |error|^norm of small activations would underflow in float32
    lows, highs = (torch.tensor(ends) / unit for ends in zip(*candidates, strict=True))
    values, weights = (centers[used] / unit).float(), (hist[used] / hist.sum()).float()
    errors = quantization_errors(values, weights, lows, highs, (0, quant_max), norm, symmetric=False)
    return candidates[int(errors.argmin())]


def _fits(low: float, high: float, scale: float, quant_max: int) -> bool:
    return math.ceil(-low / scale) + math.ceil(high / scale) <= quant_max
