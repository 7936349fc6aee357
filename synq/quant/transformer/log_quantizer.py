"""Fake quantization of probabilities on a logarithmic grid, for the softmax of attention.

    code = clamp(round(-log2(p / s) / step), 0, quant_max)        p^ = s 2^(-step code), and 0 for the largest code

s is the largest probability, step a power of two whose codes reach down to s / 128 at least: 1 or 1/2 (powers of the
square root of two) at 4 bits, down to 1/32 at 8, whichever has the smallest error on the observed values. Attention
spreads most of its weight over many small probabilities, for which a uniform grid over [0, s] has only a few codes. At
8 bits a uniform grid has enough and is the more accurate one: the grid with the smaller KL divergence is kept, for all
attentions. Engines have no integer kernel for logarithms: target research only.

Source: log2 of FQ-ViT (Lin et al., IJCAI 2022), section 4.3; log sqrt 2 of RepQ-ViT (Li et al., ICCV 2023), section
3.3. There s is 1 and the smallest value 2^(-step quant_max); here a code of zero, so that no small probability grows.
The choices of the step and of the grid are ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from synq.quant.fake_quant import SCALE_EPS
from synq.quant.keep_best import Synchronize, keep_closest
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer
from synq.quant.observers import HistogramObserver

STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
"""Candidate steps in octaves."""
OCTAVES = 7
"""Number of octaves that the codes of a step smaller than the largest must span."""
UNIFORM = 0.0
"""Value of `LogQuantizer.step` for a uniform grid."""
SMALLEST = 2.0**-126
"""Smallest normal float32, whose logarithm is finite; with 8 bits codes reach beyond it, and it is taken for zero."""


class LogQuantizer(ActQuantizer):
    """Per-tensor fake quantization of values >= 0 on a logarithmic grid with a static range.

    Args:
        bits: Bit-width, 2..8.
        learned: Whether the scale s is a parameter (LSQ).

    Attributes:
        step: In octaves; `UNIFORM` for a uniform grid.
    """

    step: Tensor

    def __init__(self, bits: int, learned: bool = False) -> None:
        super().__init__(bits, learned=learned)
        self.register_buffer("step", torch.tensor(STEPS[0]))
        self.octaves = STEPS[0]  # the same as a number, which exporters take for a constant

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set s to ``high``, or the scale of a uniform grid over [0, ``high``]; ``low`` must be finite.

        Raises:
            ValueError: If a bound is not finite.
        """
        super().set_range(0.0 * low, high)
        if self.is_logarithmic:
            self.scale.fill_(max(high, SCALE_EPS))

    @property
    def is_logarithmic(self) -> bool:
        """Whether the grid is not uniform."""
        return self.octaves != UNIFORM

    @torch.no_grad()
    def set_step(self, octaves: float) -> None:
        """Set the step, or `UNIFORM`; the range is to be observed afterwards."""
        self.step.fill_(octaves)
        self.octaves = octaves

    @torch.no_grad()
    def fit_step(self, histogram: HistogramObserver, norm: float) -> None:
        """Choose the step with the smallest error sum of |p - p^|^norm over a histogram of values in [0, s]."""
        width = (histogram.bin_max - histogram.bin_min) / len(histogram.counts)
        values = histogram.bin_min + (torch.arange(len(histogram.counts), dtype=torch.float64) + 0.5) * width
        scale, counts = torch.tensor(histogram.bin_max, dtype=torch.float64), histogram.counts.cpu().double()
        steps = [step for step in STEPS if step == STEPS[0] or step * self.quant_max >= OCTAVES]
        errors = [
            float(counts @ (values - _on_grid(values, scale, step, self.quant_max)).abs().pow(norm)) for step in steps
        ]
        self.set_step(steps[errors.index(min(errors))])

    def with_scale(self, x: Tensor, scale: Tensor, grad_factor: float = 1.0, rectified: bool = False) -> Tensor:
        """Return ``x`` fake-quantized with another scale, which has a gradient; see `ActQuantizer.with_scale`."""
        source, held = (x.relu() if rectified else x), scale.float().clamp(min=SCALE_EPS)
        if torch.is_grad_enabled() and (source.requires_grad or held.requires_grad):
            if not self.is_logarithmic:
                return super().with_scale(x, scale, grad_factor, rectified)
            result: Tensor = _LogFakeQuantize.apply(source, held, self.octaves, self.quant_max, grad_factor)
            return result
        if not self.is_logarithmic:  # in operations that can be exported; the same values
            return (source * (1.0 / held)).round().clamp(0, self.quant_max).mul(held).to(x.dtype)
        return _on_grid(source, held, self.octaves, self.quant_max)

    def _quantized(self, x: Tensor) -> Tensor:
        return self.with_scale(x, self.scale.detach())

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", logarithmic, step {self.octaves:g}" if self.is_logarithmic else "")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.octaves = float(self.step)


def keep_best_grid(
    net: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    observe: Callable[[fx.GraphModule], object],
    synchronize: Synchronize = dict,
) -> dict[str, Any]:
    """Keep the uniform or the logarithmic grid of all softmax, whichever brings the student closer to the teacher.

    Args:
        net: Network of a student with ``softmax="log"``, changed in place.
        teacher: Graph of the float network that it approximates; not modified.
        images: (N, C, H, W) synthetic images on the device of both.
        observe: Sets the ranges of ``net``, from whatever they are.
        synchronize: Makes metrics the same on all processes.

    Returns:
        A report with "kept" ("uniform" or "log"), "kl" (mean KL(teacher || student) of each, in nats) and "steps" (by
        name of the softmax; 0 is uniform).
    """
    quantizers = {name: module for name, module in net.named_modules() if isinstance(module, LogQuantizer)}

    def change(step: float) -> None:
        for quantizer in quantizers.values():
            quantizer.set_step(step)
        observe(net)

    changes = {"uniform": partial(change, UNIFORM), "log": partial(change, STEPS[0])}
    kept, costs = keep_closest(net, teacher, images, changes, synchronize)
    steps = {name.removeprefix(ACT_QUANTIZERS): float(q.step) for name, q in quantizers.items()}
    return {"kept": kept, "kl": costs, "steps": steps}


def _on_grid(x: Tensor, scale: Tensor, step: float, quant_max: int) -> Tensor:
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
