"""The arithmetic of XNNPACK's integer kernels on x86 processors, as LiteRT and ExecuTorch run them.

s and z are the scale and zero point of a grid, acc the exact sum of a layer with its bias; fl() rounds to float32,
rint() rounds halves to even. Codes are those of the program; the engines hold them as int8, less 128. That changes the
results of three steps only: x and z of products and global pools are those of int8, since z is added before rounding,
and the average pool that leaves out its padding rounds halves away from the 0 of int8.

    quantize        rint(fl(x fl(1 / s))) + z
    convolution, dense, average pool (its sum with the weight scale fl(1 / (height width)))
                    rint(fl(fl(acc) m)) + z_y,                      m = fl(fl(s_x s_w) / s_y)
    sum             ((A - z_a) m_a + (B - z_b) m_b + 2^(k-1)) >> k, + z_y, with r = fl(s / s_y),
                    k = 20 - floor(log2(max(r_a, r_b))), m = round(r 2^k)
    product         rint(fl(fl(p fl(1 / s_y)) + z_y)),              p = fl(fl((A - z_a) s_a) fl((B - z_b) s_b))
    global pool     rint(fl(fl(sum(x) m) + b)),                     m = fl(fl(s_x / s_y) fl(1 / n)), n = height width,
                                                                    b = fl(z_y - fl(fl(n z_x) m))
    function f      rint(fl(f(fl((x - z_x) s_x)) fl(1 / s_y))) + z_y, also for f(x) = x: a value moved onto another grid
    average pool without its padding
                    sum(x - 128) / count on the input's grid, halves away from 0, + 128; then moved onto the output's

Source: measured in LiteRT 2.3.0 and ExecuTorch 1.5.1 on an Intel Xeon with AVX-512 VNNI. In LiteRT, with random grids:
sums 0 of 81,920 codes differ, sigmoid, tanh, ELU and GELU 0 of 409,600 each, hardswish 0 of
204,800, moves onto another grid 0 of 409,600, average pools without padding 0 of 24,720; every function of
`synq.engines.functions` 0 of 15,360. Its operator QUANTIZE from codes to codes has a multiplier of 8 bits only: 3,092
of 81,920 codes differ from the rule above, so files go through floats instead. Programs: see the tests of
`synq.export.tflite` and `synq.export.executorch`. Random codes hide the order of roundings, so results within a unit of
the last place of a half (`tests/support/near_ties.py`) were compared in LiteRT, too: products, global pools,
convolutions and moves 0 of 200 each; with z_y added after rounding 70 of the products differ.
"""

from collections.abc import Callable, Sequence
from math import floor, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines.arithmetic import Arithmetic, float32
from synq.engines.functions import exact_values
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
    Program,
    Quantize,
    Sum,
)

SIGNED_ZERO = 128
"""Code of the program that is 0 as int8."""
SUM_BITS = 20
"""Bits of the larger multiplier of a sum below its leading one."""


class XnnpackArithmetic(Arithmetic):
    """XNNPACK on x86 processors.

    Args:
        program: The program.

    Raises:
        ValueError: If a sum has an unrounded input, or a layer's output has no grid.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.reject_unrounded_sums()
        for step in program.steps:
            if isinstance(step, Layer) and step.output not in program.grids:
                raise ValueError(
                    f"the output of a layer must have a grid for {program.target}, but that of `{step.layer}` has "
                    "none: quantize it, and dequantize the logits"
                )

    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        return quantized(x, self.grid(step.output))

    def dequantize(self, step: Dequantize, codes: Tensor) -> Tensor:
        return dequantized(codes, self.grid(step.inputs[0]))

    def convolution(self, step: Convolution, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._requantized(step, sums + self._bias(step, weight_scale, bias), weight_scale)

    def dense(self, step: Dense, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._requantized(step, sums + self._bias(step, weight_scale, bias), weight_scale)

    def _bias(self, step: Layer, weight_scale: Tensor, bias: Tensor) -> Tensor:
        """Return the bias codes that the engine has: ExecuTorch is given floats and rounds them to codes."""
        if self.program.target != "executorch":
            return bias
        scale = float32(self.grid(step.inputs[0]).scale, bias) * weight_scale
        return torch.round((bias * scale).float() / scale).double()

    def _requantized(self, step: Layer | AveragePool, sums: Tensor, weight_scale: Tensor) -> Tensor:
        grid = self.grid(step.output)
        scale = float32(self.grid(step.inputs[0]).scale, sums) * weight_scale
        return torch.round(sums.float() * (scale / float32(grid.scale, sums))) + grid.zero_point

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        (grid_a, grid_b), grid = self.input_grids(step), self.grid(step.output)
        shift, (first, second) = sum_multipliers(grid_a, grid_b, grid)
        total = (a - grid_a.zero_point).double() * first + (b - grid_b.zero_point).double() * second
        return (torch.floor(total / 2**shift + 0.5) + grid.zero_point).float()

    def product(self, step: Product, a: Tensor, b: Tensor) -> Tensor:
        (grid_a, grid_b), grid = self.input_grids(step), self.grid(step.output)
        inverse = 1 / float32(grid.scale, a)
        real = dequantized(a, grid_a) * dequantized(b, grid_b)
        return torch.round(real * inverse + (grid.zero_point - SIGNED_ZERO)) + SIGNED_ZERO

    def concatenation(self, step: Concatenation, parts: Sequence[Tensor]) -> Tensor:
        grids = zip(parts, self.input_grids(step), strict=True)
        return torch.cat([moved_onto(part, own, self.grid(step.output)) for part, own in grids], dim=step.axis)

    def global_average_pool(self, step: GlobalAveragePool, codes: Tensor) -> Tensor:
        own, grid = self.grid(step.inputs[0]), self.grid(step.output)
        count = float32(codes.shape[2] * codes.shape[3], codes)
        factor = float32(own.scale, codes) / float32(grid.scale, codes) * (1 / count)
        offset = (grid.zero_point - SIGNED_ZERO) - (own.zero_point - SIGNED_ZERO) * count * factor
        total = (codes.double() - SIGNED_ZERO).sum((2, 3), keepdim=True).float()
        return torch.round(total * factor + offset) + SIGNED_ZERO

    def average_pool(self, step: AveragePool, codes: Tensor) -> Tensor:
        own = self.grid(step.inputs[0])
        if step.count_padding or not any(step.padding):
            sums = window_sums(step, codes - own.zero_point).double()
            return self._requantized(step, sums, float32(pool_scale(step), codes))
        count = window_sums(step, torch.ones_like(codes[:1, :1]))
        mean = window_sums(step, codes - SIGNED_ZERO).double() / count
        rounded = torch.floor(mean.abs() + 0.5) * mean.sign() + SIGNED_ZERO
        return moved_onto(rounded.float(), own, self.grid(step.output))

    def elementwise(self, step: Elementwise, codes: Tensor) -> Tensor:
        reals = dequantized(codes, self.grid(step.inputs[0]))
        return quantized(function_values(step, reals), self.grid(step.output))


def quantized(x: Tensor, grid: Grid) -> Tensor:
    """Return ``rint(fl(x fl(1 / s))) + z`` of floats, not limited to the grid's codes."""
    inverse = float32(1.0, x) / float32(grid.scale, x)
    return torch.round(x * inverse) + grid.zero_point


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """Return ``fl((q - z) s)`` of codes."""
    return (codes - grid.zero_point) * float32(grid.scale, codes)


def moved_onto(codes: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Return codes on another grid; the same ones if the grids are equal.

    Args:
        codes: On the grid ``own``.
        own: Their grid.
        grid: The new one.
    """
    if (own.scale, own.zero_point) == (grid.scale, grid.zero_point):
        return codes
    return quantized(dequantized(codes, own), grid)


def sum_multipliers(a: Grid, b: Grid, grid: Grid) -> tuple[int, tuple[int, int]]:
    """Return the shift k and the two multipliers of a sum: ``r = fl(s / s_y)``, ``m = round(r 2^k)``.

    Args:
        a, b: Grids of the inputs.
        grid: Of the output.

    Example:
        For equal scales r is 1, k is 20 and both multipliers are 2^20.
    """
    scale = torch.tensor(grid.scale, dtype=torch.float32)
    ratios = [float(torch.tensor(own.scale, dtype=torch.float32) / scale) for own in (a, b)]
    shift = SUM_BITS - floor(log2(max(ratios)))
    first, second = (round(ratio * 2.0**shift) for ratio in ratios)
    return shift, (first, second)


def pool_scale(step: AveragePool) -> float:
    """Return the weight scale of an average pool as a convolution: 1 / (height x width) in float32."""
    return float(torch.tensor(1.0) / (step.kernel[0] * step.kernel[1]))


def pool_as_convolution(step: AveragePool, channels: int) -> Convolution:
    """Return the depthwise convolution with weight codes 1 that an average pool is, its padding counted.

    Args:
        step: The pool.
        channels: Of its input.
    """
    return Convolution(
        inputs=step.inputs,
        output=step.output,
        layer=step.layer,
        low=step.low,
        high=step.high,
        weight=torch.ones(channels, 1, *step.kernel, dtype=torch.int8),
        weight_scale=torch.full((channels,), pool_scale(step)),
        bias=torch.zeros(channels, dtype=torch.int32),
        weight_bits=8,
        stride=step.stride,
        padding=step.padding,
        dilation=(1, 1),
        groups=channels,
    )


def window_sums(step: AveragePool, values: Tensor) -> Tensor:
    """Return the sums over the windows of a pool; padding adds 0.

    Args:
        step: The pool.
        values: (N, C, H, W) float32, whole numbers, so that sums are exact.

    Returns:
        (N, C, H', W').
    """
    top, left, bottom, right = step.padding
    return F.avg_pool2d(F.pad(values, (left, right, top, bottom)), step.kernel, step.stride, divisor_override=1)


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) * float32(1 / 6, x)


def _affine(x: Tensor, factor: float = 1.0, offset: float = 0.0) -> Tensor:
    return x * float32(factor, x) + float32(offset, x)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * float32(negative_slope, x))


NATIVE: dict[str, Callable[..., Tensor]] = {
    "affine": _affine,
    "leaky_relu": _leaky_relu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "silu": lambda x: x * torch.sigmoid(x.double()).float(),
}
"""Functions of more than one float32 operation, as the engine orders them. All others are rounded once: the engine's
exponentials differ from that by a unit in the last place now and then, which a code shows only next to a tie."""


def function_values(step: Elementwise, x: Tensor) -> Tensor:
    """Return the float32 outputs of a function of single values.

    Args:
        step: The function and its arguments.
        x: Float32.

    Raises:
        ValueError: If the function is not known.
    """
    if step.function in NATIVE:
        return NATIVE[step.function](x, **step.arguments)
    return exact_values(step, x)
