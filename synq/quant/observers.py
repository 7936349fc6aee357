"""Ranges of weights and activations: plain minimum and maximum, and ranges clipped to the least error.

Nothing here keeps a moving average. Activation ranges are observed once, over a fixed set of images, and then frozen; the running
minimum and maximum over that set need no decay and no bias correction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from synq.quant.fake_quant import choose_qparams, fake_quantize, quant_bounds

_HISTC_CHUNK = 2**23
"""Elements counted at a time: histc counts in the input's dtype, and float32 stops counting at 2^24 per bin."""

_WEIGHT_RATIOS = tuple(round(1.0 - 0.02 * i, 2) for i in range(41))
"""1.00, 0.98, ..., 0.20: at 2 bits the best clip of a normal channel is near a third of its maximum."""


@torch.no_grad()
def minmax_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every output channel.

    Args:
        weight: (C_out, ...), at least two dimensions.

    Returns:
        ``(min_val, max_val)``, each (C_out,), detached.
    """
    weight = weight.detach()
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)  # so that flattening is a view, not a copy
    flat = weight.flatten(1)
    return flat.amin(dim=1), flat.amax(dim=1)  # aminmax takes four times as long on CPU


class RangeObserver:
    """Smallest and largest value of all tensors shown to it (per tensor, no decay).

    Attributes:
        min_val: float tensor (), +inf before the first update.
        max_val: float tensor (), -inf before the first update.
    """

    def __init__(self) -> None:
        self.min_val = torch.tensor(math.inf)
        self.max_val = torch.tensor(-math.inf)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Widen the range by ``x`` (any shape, at least one element). Does not wait for the device."""
        low, high = torch.aminmax(x.detach())
        self.min_val = torch.minimum(self.min_val.to(low), low)
        self.max_val = torch.maximum(self.max_val.to(high), high)

    def range(self) -> tuple[float, float]:
        """``(min, max)`` of everything seen.

        Raises:
            ValueError: if nothing was seen, or a value seen was NaN or infinite.
        """
        low, high = float(self.min_val), float(self.max_val)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"observed activations must be finite and at least one, but got the range ({low}, {high})")
        return low, high


class HistogramObserver:
    """Counts of values in equal bins over a known range (second pass, after a :class:`RangeObserver`).

    Exact zeros of non-negative data are left out: zero is on every grid, so it has no error, while counted at the centre of the first
    bin the many zeros behind a ReLU would pull the range towards themselves.

    Attributes:
        counts: float64 (bins,).
        bin_min: lower edge of the first bin.
        bin_max: upper edge of the last bin.
    """

    def __init__(self, bin_min: float, bin_max: float, bins: int = 2048) -> None:
        """Start empty.

        Args:
            bin_min: smallest value expected; smaller ones fall into the first bin.
            bin_max: largest value expected, >= ``bin_min``; larger ones fall into the last bin.
            bins: number of bins, > 0.

        Raises:
            ValueError: if an end is not finite, or the ends are in the wrong order.
        """
        low, high = float(bin_min), float(bin_max)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"`bin_min <= bin_max` must hold and both be finite, but got ({low}, {high})")
        if bins < 1:
            raise ValueError(f"`bins` must be at least 1, but got {bins}")
        self.bin_min, self.bin_max = low, high
        self.counts = torch.zeros(bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count the values of ``x`` (any shape, finite)."""
        self.counts = self.counts.to(x.device)
        if self.bin_min == self.bin_max:  # histc reads equal ends as "take the data's own"
            self.counts[0] += x.numel()
            return
        for part in x.detach().flatten().split(_HISTC_CHUNK):
            values = part if part.dtype == torch.float64 else part.float()
            values = values.clamp(self.bin_min, self.bin_max)
            self.counts += torch.histc(values, len(self.counts), self.bin_min, self.bin_max).to(torch.float64)
            if self.bin_min == 0.0:
                self.counts[0] -= (values == 0).sum()


def _range_errors(
    values: Tensor, weights: Tensor, lows: Tensor, highs: Tensor, bounds: tuple[int, int], norm: float
) -> Tensor:
    """Weighted error sum_b weights_b |v_b - q(v_b)|^norm of M ranges at once: values, weights (B,), lows, highs (M,) -> (M,)."""
    scale, zero_point = choose_qparams(lows, highs, *bounds)
    rows = max(1, 2**17 // len(values))  # a block that stays in the processor's cache
    parts = []
    for s, z in zip(scale.split(rows), zero_point.split(rows), strict=True):
        offset = z[:, None].to(values.dtype)
        codes = (values * (1.0 / s)[:, None]).round_().add_(offset).clamp_(bounds[0], bounds[1]).sub_(offset)
        parts.append(codes.mul_(s[:, None]).sub_(values).abs_().pow_(norm) @ weights)
    return torch.cat(parts)


@torch.no_grad()
def mse_range(
    counts: Tensor, bin_min: float, bin_max: float, quant_min: int, quant_max: int, norm: float = 2.4
) -> tuple[float, float]:
    """Range (lo, hi) with the least sum_b counts_b |c_b - q(c_b; lo, hi)|^norm, c_b the centre of bin b.

    Both ends are shrunk independently from the full range widened to hold zero; an end at zero stays there. First the whole grid of
    shrink factors (48 x 48 for data of two signs, 192 for one sign), then three rounds around the best with a quarter of the step
    each. The full range is a candidate, so the error is never above that of min-max.

    Args:
        counts: (bins,), >= 0, from :class:`HistogramObserver`.
        bin_min: lower edge of the first bin.
        bin_max: upper edge of the last bin.
        quant_min: smallest code.
        quant_max: largest code.
        norm: exponent p > 0. 2 is the mean squared error; a larger one clips less.

    Returns:
        ``(lo, hi)`` with lo <= 0 <= hi, to be given to ``choose_qparams``.

    Raises:
        ValueError: if ``norm`` is not positive.

    Source: the p ~ 2.4 reconstruction norm of AdaRound / BRECQ initialisations (METHOD section 3); the search is ours.
    """
    if norm <= 0:
        raise ValueError(f"`mse_norm` must be > 0, but got {norm}")
    low, high = min(float(bin_min), 0.0), max(float(bin_max), 0.0)
    hist = counts.detach().to("cpu", torch.float64)
    if low == high or float(hist.sum()) <= 0:
        return low, high
    width = (float(bin_max) - float(bin_min)) / len(hist)
    centres = float(bin_min) + (torch.arange(len(hist), dtype=torch.float64) + 0.5) * width
    used = hist > 0
    values, weights = centres[used].float(), (hist[used] / hist.sum()).float()
    # Work on data of largest magnitude 1: |error|^norm of tiny activations would underflow in float32.
    unit = max(-low, high)
    values = values / unit

    best_error, best = math.inf, (1.0, 1.0)
    points = 48 if low < 0 < high else 192
    step = 1.0 / points
    grid_low = grid_high = torch.arange(points, 0, -1) * step
    for _ in range(4):
        shrink_low = grid_low if low < 0 else torch.ones(1)
        shrink_high = grid_high if high > 0 else torch.ones(1)
        pairs = torch.cartesian_prod(shrink_low, shrink_high)
        errors = _range_errors(
            values, weights, pairs[:, 0] * (low / unit), pairs[:, 1] * (high / unit), (quant_min, quant_max), norm
        )
        index = int(errors.argmin())
        if float(errors[index]) < best_error:
            best_error, best = float(errors[index]), (float(pairs[index, 0]), float(pairs[index, 1]))
        step /= 4
        around = torch.arange(-4, 5) * step
        grid_low, grid_high = (best[0] + around).clamp(1e-4, 1.0), (best[1] + around).clamp(1e-4, 1.0)
    return best[0] * low, best[1] * high


@torch.no_grad()
def mse_weight_ratio(weight: Tensor, bits: int, norm: float = 2.4) -> Tensor:
    """Share of each output channel's min-max range with the least sum |w - q(w)|^norm.

    The ratio is chosen once; the ranges in training are ``ratio * minmax`` of the live weights. Both ends shrink by one ratio, so that
    it keeps its meaning while the weights move. Ties go to the larger ratio; 1 is a candidate, so no channel gets worse than min-max.

    Args:
        weight: (C_out, ...), floating point.
        bits: width of the signed codes, 2..8.
        norm: exponent p > 0.

    Returns:
        (C_out,) in [0.2, 1.0], dtype float32, device of ``weight``.

    Raises:
        ValueError: if ``bits`` or ``norm`` is out of range.
    """
    if norm <= 0:
        raise ValueError(f"`mse_norm` must be > 0, but got {norm}")
    bounds = quant_bounds(bits, signed=True)
    flat = weight.detach().flatten(1).float()
    min_val, max_val = minmax_per_channel(flat)
    # Channels scaled to magnitude 1 for the same reason as above; a zero channel keeps ratio 1.
    unit = torch.maximum(-min_val, max_val).clamp(min=torch.finfo(torch.float32).tiny)
    flat, min_val, max_val = flat / unit[:, None], min_val / unit, max_val / unit
    best_error = torch.full_like(min_val, math.inf)
    best_ratio = torch.ones_like(min_val)
    for ratio in _WEIGHT_RATIOS:
        scale, zero_point = choose_qparams(min_val * ratio, max_val * ratio, *bounds)
        error = fake_quantize(flat, scale, zero_point, *bounds, axis=0).sub_(flat).abs_().pow_(norm).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, torch.full_like(best_ratio, ratio), best_ratio)
    return best_ratio
