"""The arithmetic of OpenVINO's low-precision kernels on x86, as close as it is known: not to the last bit.

l and h are the values of the smallest and largest code of an output's grid, i the inverse of its step:

    l = fl(-z s),  h = fl((255 - z) s),  i = fl(255 / fl(h - l))

    image                rint(fl(fl(clamp(x, l, h) i) + fl(-l i)))
    layer                v = fl(fl(acc fl(s_x s_w)) + fl(bias s_x s_w)), the bias not in acc;  rint(fma(v, i, z))
    convolution fused    in steps of the other input B, u = s_b, with l_c, h_c and i_c of the convolution's own grid:
    into a sum           f = fl(i_c fl(fl(fl(h_c / u) - fl(l_c / u)) / 255)),  t = fl(clamp(fl(v f)) + (B - z_b)),
                         rint(fma(t, fl(255 / fl(fl(h / u) - fl(l / u))), z)):
                         the convolution is limited to its grid's range and not rounded (`Sum.unrounded`)
    pools, functions     in floats;  rint(fma(v, i, z))

Measured with OpenVINO 2026.4.1: layers and images equal in every code, fused sums but for about one code in 100,000,
because the order of its float operations is not known. So classes agree, and logits of deep networks differ by steps of
their last layer's input (docs/engines.md).
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
        sums = [step for step in program.steps if isinstance(step, Sum) and step.unrounded is not None]
        self._units = {step.inputs[step.unrounded]: self.grid(step.inputs[1 - step.unrounded]) for step in sums}  # type: ignore[operator]

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
        if step.output in self._units:
            return self._branch(step, values)
        return self.rounded(values, self.grid(step.output)) if self.has_grid(step.output) else values

    def _branch(self, step: Layer, values: Tensor) -> Tensor:
        """Return the output of a layer that is fused into a sum: limited, in steps of the sum's other input."""
        unit, grid = float32(self._units[step.output].scale, values), self.grid(step.output)
        low, high, inverse = _range(grid, values)
        factor = inverse * ((high / unit - low / unit) / float32(TOP, values))
        limits = (dequantized(float32(code, values), grid) / unit for code in (step.low, step.high))
        return (values * factor).clamp(*limits)

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        if step.unrounded is None:
            return super().sum(step, a, b)
        branch, codes = (a, b) if step.unrounded == 0 else (b, a)
        other, grid = self.grid(step.inputs[1 - step.unrounded]), self.grid(step.output)
        unit, (low, high, _) = float32(other.scale, codes), _range(grid, codes)
        inverse = float32(TOP, codes) / (high / unit - low / unit)
        return torch.round(fma(branch + (codes - other.zero_point), inverse, float(grid.zero_point)))


def _range(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return l, h and i of a grid."""
    scale = float32(grid.scale, like)
    low, high = scale * -float(grid.zero_point), scale * float(TOP - grid.zero_point)
    return low, high, float32(TOP, like) / (high - low)
