"""The arithmetic of OpenVINO's low-precision kernels on x86, as close as it is known: not to the last bit.

l and h are the values of the smallest and largest code of an output's grid, i the inverse of its step:

    l = fl(-z s),  h = fl((255 - z) s),  i = fl(255 / fl(h - l))

    image                rint(fl(fl(clamp(x, l, h) i) + fl(-l i)))
    layer                v = fl(fl(acc fl(s_x s_w)) + fl(bias s_x s_w)), the bias not in acc;  rint(fma(v, i, z))
    convolution fused    t = fl(clamp(v, l_c, h_c) + fl((B - z_b) s_b));  rint(fma(t, i, z)):
    into a sum           its own output is limited to its grid's range and not rounded (`Sum.unrounded`)
    pools, functions     in floats;  rint(fma(v, i, z))

Measured with OpenVINO 2026.4.1: layers and images equal in every code, fused sums but for about one code in 100,000,
because the order of its float operations is not known. So classes agree, and logits of deep networks differ by steps of
their last layer's input (docs/engines.md).
"""

import torch
from torch import Tensor

from synq.engines.arithmetic import float32, fma
from synq.engines.onnxruntime_arithmetic import dequantized
from synq.engines.program import Grid, Layer, Quantize
from synq.engines.standard_arithmetic import StandardArithmetic

TOP = 255
"""Largest code of UINT8, in which all grids are kept."""


class OpenVinoArithmetic(StandardArithmetic):
    """OpenVINO on x86 processors, with floats in float32 (``INFERENCE_PRECISION_HINT`` f32)."""

    def rounded(self, values: Tensor, grid: Grid) -> Tensor:
        """Return ``rint(fma(v, i, z))`` of floats, not limited."""
        return torch.round(fma(values, _range(grid, values)[2], float(grid.zero_point)))

    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        grid = self.grid(step.output)
        low, high, inverse = _range(grid, x)
        return torch.round(x.clamp(low, high) * inverse + (-low * inverse))

    def _layer(self, step: Layer, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        scale = float32(self.grid(step.inputs[0]).scale, weight_scale) * weight_scale
        values = sums.float() * scale + bias.float() * scale
        if not self.has_grid(step.output):
            return values
        grid = self.grid(step.output)
        if self.is_rounded(step.output):
            return self.rounded(values, grid)
        low, high = (dequantized(float32(code, values), grid) for code in (step.low, step.high))
        return values.clamp(low, high)


def _range(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, h and i of a grid."""
    scale = float32(grid.scale, like)
    low, high = scale * -float(grid.zero_point), scale * float(TOP - grid.zero_point)
    return low, high, float32(TOP, like) / (high - low)
