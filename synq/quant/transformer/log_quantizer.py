"""Fake quantization of probabilities on a logarithmic grid, for the softmax of attention.

    code = clamp(round(-log2(p / s) / step), 0, quant_max)        p^ = s 2^(-step code), and 0 for the largest code

s is the largest probability, step 1 (powers of two) or 1/2 (powers of the square root of two), whichever has the
smaller error on the observed values. Attention spreads most of its weight over many small probabilities, for which a
uniform grid over [0, s] has only a few codes. Engines have no integer kernel for it: target research only.

Source: log2 of FQ-ViT (Lin et al., IJCAI 2022), section 4.3; log sqrt 2 of RepQ-ViT (Li et al., ICCV 2023), section
3.3. There s is 1 and the smallest value 2^(-step quant_max); here a code of zero, so that no small probability grows.
"""

from typing import Any

import torch
from torch import Tensor

from synq.quant.fake_quant import SCALE_EPS
from synq.quant.layers import ActQuantizer
from synq.quant.observers import HistogramObserver

STEPS = (1.0, 0.5)
"""Candidate steps in octaves."""
SMALLEST = 2.0**-126
"""Smallest normal float32, whose logarithm is finite; with 8 bits codes reach beyond it, and it is taken for zero."""


class LogQuantizer(ActQuantizer):
    """Per-tensor fake quantization of values >= 0 on a logarithmic grid with a static range.

    Args:
        bits: Bit-width, 2..8.
        learned: Whether the scale s is a parameter (LSQ).
    """

    step: Tensor

    def __init__(self, bits: int, learned: bool = False) -> None:
        super().__init__(bits, learned=learned)
        self.register_buffer("step", torch.tensor(STEPS[0]))

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set s to ``high``; ``low`` counts only for the check that both are finite.

        Raises:
            ValueError: If a bound is not finite.
        """
        super().set_range(low, high)
        self.scale.fill_(max(high, SCALE_EPS))
        self.zero_point.zero_()

    @torch.no_grad()
    def fit_step(self, histogram: HistogramObserver, norm: float) -> None:
        """Choose the step with the smallest error sum of |p - p^|^norm over a histogram of values in [0, s]."""
        width = (histogram.bin_max - histogram.bin_min) / len(histogram.counts)
        values = histogram.bin_min + (torch.arange(len(histogram.counts), dtype=torch.float64) + 0.5) * width
        scale, counts = torch.tensor(histogram.bin_max, dtype=torch.float64), histogram.counts.cpu().double()
        errors = [
            float(counts @ (values - _on_grid(values, scale, step, self.quant_max)).abs().pow(norm)) for step in STEPS
        ]
        self.step.fill_(STEPS[errors.index(min(errors))])

    def with_scale(self, x: Tensor, scale: Tensor, grad_factor: float = 1.0, rectified: bool = False) -> Tensor:
        """Return ``x`` fake-quantized with another scale, which has a gradient; see `ActQuantizer.with_scale`."""
        source, held = (x.relu() if rectified else x), scale.float().clamp(min=SCALE_EPS)
        if torch.is_grad_enabled() and (source.requires_grad or held.requires_grad):
            result: Tensor = _LogFakeQuantize.apply(source, held, float(self.step), self.quant_max, grad_factor)
            return result
        return _on_grid(source, held, self.step, self.quant_max)

    def _quantized(self, x: Tensor) -> Tensor:
        return self.with_scale(x, self.scale.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, logarithmic, step {float(self.step):g}"


def _on_grid(x: Tensor, scale: Tensor, step: Tensor | float, quant_max: int) -> Tensor:
    ratio = (x / scale).clamp(min=SMALLEST)
    codes = torch.round(-torch.log2(ratio) / step).clamp(min=0)
    is_kept = (codes < quant_max) & (ratio > SMALLEST)
    return torch.where(is_kept, torch.exp2(-codes * step), 0.0).to(x.dtype) * scale.to(x.dtype)


class _LogFakeQuantize(torch.autograd.Function):
    """The same with gradients: that of x passes up to the largest value that has code 0; d x^ / d s = (x^ - x) / s.

    Above it x^ is s, so that d x^ / d s is 1 there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, step: float, quant_max: int, factor: float) -> Tensor:
        result = _on_grid(x, scale, step, quant_max)
        ctx.save_for_backward(x, scale, result)
        ctx.step, ctx.factor = step, factor
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, result = ctx.saved_tensors
        inside = x <= scale * 2 ** (ctx.step / 2)
        slope = (result - x.where(inside, 0.0)) / scale
        grad_scale = (slope * gradient).sum().to(scale.dtype).reshape(scale.shape) * ctx.factor
        return gradient.where(inside, 0.0), grad_scale, None, None, None
