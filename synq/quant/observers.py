"""Observers and ranges of weights and activations: min-max, and clipping with the smallest quantization error.

There are no moving averages. Activation ranges are observed once, over a fixed set of calibration images, and are then
fixed; the minimum and maximum over that set need no decay and no bias correction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from synq.quant.fake_quant import (
    choose_centered_qparams,
    choose_qparams,
    choose_symmetric_qparams,
    fake_quantize,
    quant_bounds,
)

_HISTC_CHUNK = 2**23
"""Number of elements per call: histc counts in the dtype of its input, and float32 counts only up to 2^24 per bin."""

_WEIGHT_RATIOS = tuple(round(1.0 - 0.02 * i, 2) for i in range(41))
"""1.00, 0.98, ..., 0.20: at 2 bits the best clipping ratio of normally distributed weights is about a third."""


@torch.no_grad()
def minmax_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum and maximum weight of each output channel.

    Args:
        weight: (C_out, ...), at least two dimensions.

    Returns:
        ``(min_val, max_val)``, each (C_out,), detached.
    """
    weight = weight.detach()
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)  # so that flatten returns a view instead of a copy
    flat = weight.flatten(1)
    return flat.amin(dim=1), flat.amax(dim=1)  # aminmax takes four times as long on CPU


def weight_qparams(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scale and zero_point, each (C_out,), of the ranges of output channels on either kind of grid.

    Args:
        min_val, max_val: (C_out,), as from ``minmax_per_channel``.
        quant_min: Smallest code; -quant_max if ``symmetric``.
        quant_max: Largest code.
        symmetric: Whether the grid is that of ``choose_symmetric_qparams``, else that of ``choose_qparams``.
    """
    if symmetric:
        return choose_symmetric_qparams(min_val, max_val, quant_max)
    return choose_qparams(min_val, max_val, quant_min, quant_max)


class RangeObserver:
    """Per-tensor minimum and maximum over all observed tensors, without decay.

    Attributes:
        min_val: float tensor (), +inf before the first update.
        max_val: float tensor (), -inf before the first update.
    """

    def __init__(self) -> None:
        self.min_val = torch.tensor(math.inf)
        self.max_val = torch.tensor(-math.inf)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Extend the range to include ``x`` (any shape, at least one element). Does not synchronize with the device."""
        low, high = torch.aminmax(x.detach())
        self.min_val = torch.minimum(self.min_val.to(low), low)
        self.max_val = torch.maximum(self.max_val.to(high), high)

    def range(self) -> tuple[float, float]:
        """Return ``(min, max)`` of all observed values.

        Raises:
            ValueError: If nothing was observed, or a value was NaN or infinite.
        """
        low, high = float(self.min_val), float(self.max_val)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"observed activations must be finite and not empty, but got the range ({low}, {high})")
        return low, high


class HistogramObserver:
    """Histogram of values in equal bins over a known range (second pass, after a :class:`RangeObserver`).

    Exact zeros of non-negative data are not counted: zero is exactly representable, so it has no error, but counted at
    the center of the first bin the many zeros after a ReLU would bias the range towards zero.

    Attributes:
        counts: float64 (bins,).
        bin_min: Lower edge of the first bin.
        bin_max: Upper edge of the last bin.
    """

    def __init__(self, bin_min: float, bin_max: float, bins: int = 2048) -> None:
        """Create an empty histogram.

        Args:
            bin_min: Lower edge of the first bin; smaller values are counted there.
            bin_max: Upper edge of the last bin, >= ``bin_min``; larger values are counted there.
            bins: Number of bins, > 0.

        Raises:
            ValueError: If an edge is not finite, or ``bin_min > bin_max``.
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
        if self.bin_min == self.bin_max:  # for equal edges histc uses the range of the data
            self.counts[0] += x.numel()
            return
        for part in x.detach().flatten().split(_HISTC_CHUNK):
            values = part if part.dtype == torch.float64 else part.float()
            values = values.clamp(self.bin_min, self.bin_max)
            self.counts += torch.histc(values, len(self.counts), self.bin_min, self.bin_max).to(torch.float64)
            if self.bin_min == 0.0:
                self.counts[0] -= (values == 0).sum()


def quantization_errors(
    values: Tensor,
    weights: Tensor,
    lows: Tensor,
    highs: Tensor,
    bounds: tuple[int, int],
    norm: float,
    symmetric: bool,
) -> Tensor:
    """Return sum_b weights_b |v_b - fake_quantize(v_b)|^norm for each of M ranges.

    Args:
        values: v, (B,) floating point.
        weights: (B,).
        lows: Lower bounds of the ranges, (M,).
        highs: Upper bounds of the ranges, (M,).
        bounds: (quant_min, quant_max).
        norm: Exponent p > 0.
        symmetric: Whether the grids are those of ``choose_centered_qparams``.

    Returns:
        (M,).
    """
    choose = choose_centered_qparams if symmetric else choose_qparams
    scale, zero_point = choose(lows, highs, *bounds)
    rows = max(1, 2**17 // len(values))  # a block that fits into the CPU cache
    parts = []
    for s, z in zip(scale.split(rows), zero_point.split(rows), strict=True):
        offset = z[:, None].to(values.dtype)
        codes = (values * (1.0 / s)[:, None]).round_().add_(offset).clamp_(bounds[0], bounds[1]).sub_(offset)
        parts.append(codes.mul_(s[:, None]).sub_(values).abs_().pow_(norm) @ weights)
    return torch.cat(parts)


@torch.no_grad()
def mse_range(
    counts: Tensor,
    bin_min: float,
    bin_max: float,
    quant_min: int,
    quant_max: int,
    norm: float = 2.4,
    *,
    symmetric: bool = False,
) -> tuple[float, float]:
    """Return the range (lo, hi) that minimizes sum_b counts_b |c_b - q(c_b; lo, hi)|^norm, c_b the center of bin b.

    Both bounds are shrunk independently, starting from the full range extended to include zero; a bound at zero is
    fixed. A grid search over all shrink factors (48 x 48 if the data have two signs, 192 for one sign) is followed by
    three refinements around the best candidate, each with a quarter of the step. The full range is a candidate, so the
    error is never above that of min-max.

    Args:
        counts: (bins,), >= 0, from :class:`HistogramObserver`.
        bin_min: Lower edge of the first bin.
        bin_max: Upper edge of the last bin.
        quant_min: Smallest code.
        quant_max: Largest code.
        norm: Exponent p > 0. 2 is the mean squared error; a larger exponent clips less.
        symmetric: Whether the grid is that of ``choose_centered_qparams``; of the range only the larger bound matters.

    Returns:
        ``(lo, hi)`` with lo <= 0 <= hi, the arguments of ``choose_qparams`` or ``choose_centered_qparams``.

    Raises:
        ValueError: If ``norm`` is not positive.

    Source: the L_p norm, p = 2.4, with which AdaRound and BRECQ initialize scales; the search is ours.
    """
    if norm <= 0:
        raise ValueError(f"`mse_norm` must be > 0, but got {norm}")
    low, high = min(float(bin_min), 0.0), max(float(bin_max), 0.0)
    hist = counts.detach().to("cpu", torch.float64)
    if low == high or float(hist.sum()) <= 0:
        return low, high
    bin_width = (float(bin_max) - float(bin_min)) / len(hist)
    centers = float(bin_min) + (torch.arange(len(hist), dtype=torch.float64) + 0.5) * bin_width
    used = hist > 0
    values, weights = centers[used].float(), (hist[used] / hist.sum()).float()
    # Normalize to magnitude 1: |error|^norm of small activations would underflow in float32.
    unit = max(-low, high)
    values = values / unit

    best_error, best = math.inf, (1.0, 1.0)
    num_factors = 48 if low < 0 < high else 192
    step = 1.0 / num_factors
    grid_low = grid_high = torch.arange(num_factors, 0, -1) * step
    for _ in range(4):
        shrink_low = grid_low if low < 0 else torch.ones(1)
        shrink_high = grid_high if high > 0 else torch.ones(1)
        pairs = torch.cartesian_prod(shrink_low, shrink_high)
        errors = quantization_errors(
            values,
            weights,
            pairs[:, 0] * (low / unit),
            pairs[:, 1] * (high / unit),
            (quant_min, quant_max),
            norm,
            symmetric,
        )
        index = int(errors.argmin())
        if float(errors[index]) < best_error:
            best_error, best = float(errors[index]), (float(pairs[index, 0]), float(pairs[index, 1]))
        step /= 4
        around = torch.arange(-4, 5) * step
        grid_low, grid_high = (best[0] + around).clamp(1e-4, 1.0), (best[1] + around).clamp(1e-4, 1.0)
    return best[0] * low, best[1] * high


@torch.no_grad()
def mse_weight_ratio(weight: Tensor, bits: int, norm: float = 2.4, limit: int | None = None) -> Tensor:
    """Return the clipping ratio of each output channel's min-max range that minimizes sum |w - q(w)|^norm.

    The ratio is chosen once; during training the range is ``ratio * minmax`` of the current weights. Both bounds have
    the same ratio, so that it stays meaningful while the weights change. Ties are resolved in favor of the larger
    ratio; 1 is a candidate, so no channel has a larger error than with min-max.

    Args:
        weight: (C_out, ...), floating point.
        bits: Bit-width of the signed codes, 2..8.
        norm: Exponent p > 0.
        limit: Largest |code| of a symmetric grid; None takes the asymmetric grid of ``bits``.

    Returns:
        (C_out,) in [0.2, 1.0], float32, on the device of ``weight``.

    Raises:
        ValueError: If ``bits`` or ``norm`` is out of range.
    """
    if norm <= 0:
        raise ValueError(f"`mse_norm` must be > 0, but got {norm}")
    bounds = quant_bounds(bits, signed=True) if limit is None else (-limit, limit)
    flat = weight.detach().flatten(1).float()
    min_val, max_val = minmax_per_channel(flat)
    # Normalized to magnitude 1 for the same reason as in mse_range; an all-zero channel keeps ratio 1.
    unit = torch.maximum(-min_val, max_val).clamp(min=torch.finfo(torch.float32).tiny)
    flat, min_val, max_val = flat / unit[:, None], min_val / unit, max_val / unit
    best_error = torch.full_like(min_val, math.inf)
    best_ratio = torch.ones_like(min_val)
    for ratio in _WEIGHT_RATIOS:
        scale, zero_point = weight_qparams(min_val * ratio, max_val * ratio, *bounds, symmetric=limit is not None)
        error = fake_quantize(flat, scale, zero_point, *bounds, axis=0).sub_(flat).abs_().pow_(norm).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, torch.full_like(best_ratio, ratio), best_ratio)
    return best_ratio
