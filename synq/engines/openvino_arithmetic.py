"""The arithmetic of OpenVINO's low-precision kernels on x86, as close as it is known: not to the last bit.

l and h are the values of the smallest and largest code of an output's grid, i the inverse of its step:

    l = fl(-z s),  h = fl((255 - z) s),  i = fl(255 / fl(h - l))

    image                rint(fl(fl(clamp(x, l, h) i) + fl(-l i)))
    layer                v = fl(fl(acc fl(s_x s_w)) + fl(bias s_x s_w)), the bias not in acc;  rint(fma(v, i, z))
    convolution fused    its own output is limited to its grid's range and not rounded (`Sum.unrounded`);
    into a sum           z_b = 0, as after a ReLU: in steps u = s_b of the other input, l_c, h_c, i_c of its grid:
                           f = fl(i_c fl(fl(fl(h_c / u) - fl(l_c / u)) / 255)),  t = fl(clamp(fl(v f)) + B),
                           rint(fma(t, fl(255 / fl(fl(h / u) - fl(l / u))), z))
                         else t = fl(clamp(v, l_c, h_c) + fl((B - z_b) s_b));  rint(fma(t, i, z))
    pools, functions     in floats;  rint(fma(v, i, z))

Measured with OpenVINO 2026.4.1: layers and images equal in every code, fused sums with z_b = 0 in nearly every code
(0 of 13 million), others but for about one in 100,000, because the order of float operations is not known there. So
classes agree, and logits of deep networks differ by steps of their last layer's input (docs/engines.md).
"""

import torch
from torch import Tensor

from synq.engines.arithmetic import float32, fma
from synq.engines.onnxruntime_arithmetic import dequantized
from synq.engines.program import Grid, Layer, Program, Quantize, Sum
from synq.engines.standard_arithmetic import StandardArithmetic

TOP = 255
"""Largest code of UINT8, in which all grids are kept."""


class OpenVinoArithmetic(StandardArithmetic):
    """OpenVINO on x86 processors, with floats in float32 (``INFERENCE_PRECISION_HINT`` f32).

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._units: dict[str, float] = {}  # step of the other input of a sum, by the branch that is fused into it
        for step in program.steps:
            if isinstance(step, Sum) and step.unrounded is not None:
                other = self.grid(step.inputs[1 - step.unrounded])
                if other.zero_point == 0:
                    self._units[step.inputs[step.unrounded]] = other.scale

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
        limits = [dequantized(float32(code, values), grid) for code in (step.low, step.high)]
        if step.output not in self._units:
            return values.clamp(*limits)
        unit, (low, high, inverse) = float32(self._units[step.output], values), _range(grid, values)
        factor = inverse * ((high / unit - low / unit) / float32(TOP, values))
        return (values * factor).clamp(*(limit / unit for limit in limits))

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        if step.unrounded is None or step.inputs[step.unrounded] not in self._units:
            return super().sum(step, a, b)
        grid, unit = self.grid(step.output), float32(self._units[step.inputs[step.unrounded]], a)
        low, high, _ = _range(grid, a)
        inverse = float32(TOP, a) / (high / unit - low / unit)
        return torch.round(fma(a + b, inverse, float(grid.zero_point)))


def _range(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, h and i of a grid."""
    scale = float32(grid.scale, like)
    low, high = scale * -float(grid.zero_point), scale * float(TOP - grid.zero_point)
    return low, high, float32(TOP, like) / (high - low)
