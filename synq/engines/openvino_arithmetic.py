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

from collections.abc import Sequence

import torch
from torch import Tensor

from synq.engines.arithmetic import Arithmetic, float32, fma
from synq.engines.functions import exact_values
from synq.engines.onnxruntime_arithmetic import dequantized, window_sums
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Grid,
    Layer,
    Product,
    Quantize,
    Sum,
)

TOP = 255
"""Largest code of UINT8, in which all grids are kept."""


class OpenVinoArithmetic(Arithmetic):
    """OpenVINO on x86 processors, with floats in float32 (``INFERENCE_PRECISION_HINT`` f32)."""

    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        grid = self.grid(step.output)
        low, high, inverse = _range(grid, x)
        return torch.round(x.clamp(low, high) * inverse + (-low * inverse))

    def dequantize(self, step: Dequantize, codes: Tensor) -> Tensor:
        return dequantized(codes, self.grid(step.inputs[0]))

    def convolution(self, step: Convolution, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._layer(step, sums, weight_scale, bias)

    def dense(self, step: Dense, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._layer(step, sums, weight_scale, bias)

    def _layer(self, step: Layer, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        scale = float32(self.grid(step.inputs[0]).scale, weight_scale) * weight_scale
        values = sums.float() * scale + bias.float() * scale
        if not self.has_grid(step.output):
            return values
        grid = self.grid(step.output)
        if self.is_rounded(step.output):
            return _codes(values, grid)
        low, high = (dequantized(float32(code, values), grid) for code in (step.low, step.high))
        return values.clamp(low, high)

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        parts = [
            part if number == step.unrounded else dequantized(part, grid)
            for number, (part, grid) in enumerate(zip((a, b), self.input_grids(step), strict=True))
        ]
        return _codes(parts[0] + parts[1], self.grid(step.output))

    def product(self, step: Product, a: Tensor, b: Tensor) -> Tensor:
        first, second = (dequantized(part, grid) for part, grid in zip((a, b), self.input_grids(step), strict=True))
        return _codes(first * second, self.grid(step.output))

    def concatenation(self, step: Concatenation, parts: Sequence[Tensor]) -> Tensor:
        grid, grids = self.grid(step.output), self.input_grids(step)
        codes = [_codes(dequantized(part, own), grid) for part, own in zip(parts, grids, strict=True)]
        return torch.cat(codes, dim=step.axis)

    def global_average_pool(self, step: GlobalAveragePool, codes: Tensor) -> Tensor:
        values = dequantized(codes, self.grid(step.inputs[0])).double().mean((2, 3), keepdim=True).float()
        return _codes(values, self.grid(step.output))

    def average_pool(self, step: AveragePool, codes: Tensor) -> Tensor:
        values = dequantized(codes, self.grid(step.inputs[0]))
        count = float32(step.kernel[0] * step.kernel[1], codes)
        if not step.count_padding:
            count = window_sums(step, torch.ones_like(values[:1, :1]))
        return _codes(window_sums(step, values) / count, self.grid(step.output))

    def elementwise(self, step: Elementwise, codes: Tensor) -> Tensor:
        values = exact_values(step, dequantized(codes, self.grid(step.inputs[0])))
        return _codes(values, self.grid(step.output)) if self.has_grid(step.output) else values


def _range(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, h and i of a grid."""
    scale = float32(grid.scale, like)
    low, high = scale * -float(grid.zero_point), scale * float(TOP - grid.zero_point)
    return low, high, float32(TOP, like) / (high - low)


def _codes(values: Tensor, grid: Grid) -> Tensor:
    """Return ``rint(fma(v, i, z))`` of floats, not limited."""
    return torch.round(fma(values, _range(grid, values)[2], float(grid.zero_point)))
