"""The arithmetic of ONNX Runtime's integer kernels on x86 (CPU provider, optimization level extended or all).

s and z are the scale and zero point of a grid, acc the exact sum of a layer with its bias; each line is measured
bit-equal with ONNX Runtime 1.32.0 on processors with AVX-512 VNNI (`tests/engines/test_onnxruntime_arithmetic.py`).

    QuantizeLinear            rint(fl(x / s)) + z
    QLinearConv, QGemm        rint(fl(fl(acc) m)) + z_y,                  m = fl(fl(s_x s_w) / s_y)
    QGemm, floats out         fl(fl(acc) fl(s_x s_w))
    QLinearMatMul             rint(fl(fl(acc) m)) + z_y of two activations, m = fl(fl(s_a s_b) / s_y)
    MatMulIntegerToFloat      fl(fl(acc) fl(s_a s_b))
    QLinearAdd                rint(fma(A, r_a, fma(B, r_b, f))),          r = fl(s / s_y), A the first input,
                              f = fl(z_y - fma(r_a, z_a, fl(r_b z_b)))
    QLinearMul                rint(fl(fl((A - z_a)(B - z_b) r) + z_y)),   r = fl(fl(s_a s_b) / s_y)
    QLinearConcat             rint(fl(fl((x - z_x) s_x) / s_y)) + z_y
    QLinearGlobalAveragePool  rint(fl(fl(sum(x - z_x)) m)) + z_y,         m = fl(s_x / fl(s_y H W))
    QLinearAveragePool        v = fl((x - z_x) s_x) added one by one in float32, row by row of the window;
                              rint(fl(fl(fl(sum / count) / s_y) + z_y))

Two of them add the zero point before they round, so that ties fall the other way where it is odd. On ARM, sums and
pools use fixed-point multipliers and round differently; processors without VNNI saturate sums of 8-bit weights in 16
bits. Steps on floats are in `onnxruntime_floats.py`. The sources are ONNX Runtime's ``onnxruntime/core/mlas/lib``
(quantize, qladd, qlmul, qlgavgpool) and ``onnxruntime/contrib_ops/cpu/quantization``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines import onnxruntime_floats as floats
from synq.engines.arithmetic import Arithmetic, float32, fma
from synq.engines.exact_sums import FLOAT32_WHOLE
from synq.engines.float_program import (
    FloatConcatenation,
    FloatConstant,
    FloatFunction,
    FloatMatrixProduct,
    FloatMean,
    FloatProduct,
    FloatStep,
    FloatSum,
    LayerNorm,
    MatrixProduct,
    Softmax,
)
from synq.engines.onnxruntime_functions import native_values
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


class OnnxRuntimeArithmetic(Arithmetic):
    """ONNX Runtime on x86 processors.

    Args:
        program: The program.

    Raises:
        ValueError: If a sum has an unrounded input or the output of a convolution has no grid.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.reject_unrounded_sums()
        self.avx512 = floats.has_avx512()
        for step in program.steps:
            if isinstance(step, Convolution) and step.output not in program.grids:
                raise ValueError(
                    f"the output of a convolution must have a grid, but that of `{step.layer}` has none: ONNX Runtime "
                    "would compute it in float; quantize it"
                )

    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        return quantized(x, self.grid(step.output))

    def dequantize(self, step: Dequantize, codes: Tensor) -> Tensor:
        return dequantized(codes, self.grid(step.inputs[0]))

    def convolution(self, step: Convolution, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._requantized(step, (sums + bias).float(), weight_scale)

    def dense(self, step: Dense, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        total = (sums + bias).float()
        if self.has_grid(step.output):
            return self._requantized(step, total, weight_scale)
        return total * (float32(self.grid(step.inputs[0]).scale, total) * weight_scale)

    def _requantized(self, step: Layer, total: Tensor, weight_scale: Tensor) -> Tensor:
        grid = self.grid(step.output)
        scale = float32(self.grid(step.inputs[0]).scale, total) * weight_scale
        return torch.round(total * (scale / float32(grid.scale, total))) + grid.zero_point

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        (grid_a, grid_b), grid = self.input_grids(step), self.grid(step.output)
        ratio_a = float32(grid_a.scale, a) / float32(grid.scale, a)
        ratio_b = float32(grid_b.scale, a) / float32(grid.scale, a)
        zeros = fma(ratio_a, float(grid_a.zero_point), ratio_b * float32(grid_b.zero_point, a))
        offset = float32(grid.zero_point, a) - zeros
        return torch.round(fma(a, ratio_a, fma(b, ratio_b, offset)))

    def product(self, step: Product, a: Tensor, b: Tensor) -> Tensor:
        (grid_a, grid_b), grid = self.input_grids(step), self.grid(step.output)
        ratio = float32(grid_a.scale, a) * float32(grid_b.scale, a) / float32(grid.scale, a)
        return torch.round((a - grid_a.zero_point) * (b - grid_b.zero_point) * ratio + grid.zero_point)

    def concatenation(self, step: Concatenation, parts: Sequence[Tensor]) -> Tensor:
        grid = self.grid(step.output)
        grids = self.input_grids(step)
        codes = [quantized(dequantized(part, own), grid) for part, own in zip(parts, grids, strict=True)]
        return torch.cat(codes, dim=step.axis)

    def global_average_pool(self, step: GlobalAveragePool, codes: Tensor) -> Tensor:
        own, grid = self.grid(step.inputs[0]), self.grid(step.output)
        total = (codes.double() - own.zero_point).sum((2, 3), keepdim=True).float()
        pixels = float32(codes.shape[2] * codes.shape[3], codes)
        factor = float32(own.scale, codes) / (float32(grid.scale, codes) * pixels)
        return torch.round(total * factor) + grid.zero_point

    def average_pool(self, step: AveragePool, codes: Tensor) -> Tensor:
        grid = self.grid(step.output)
        values = dequantized(codes, self.grid(step.inputs[0]))
        total = window_sums(step, values)
        counted = torch.full_like(values[:1, :1], 1.0)
        count = (
            window_sums(step, counted) if not step.count_padding else float32(step.kernel[0] * step.kernel[1], codes)
        )
        return torch.round(total / count / float32(grid.scale, codes) + grid.zero_point)

    def elementwise(self, step: Elementwise, codes: Tensor) -> Tensor:
        own, grid = self.grid(step.inputs[0]), self.grid(step.output)
        return quantized(native_values(step, dequantized(codes, own)), grid)

    def matrix_product(self, step: MatrixProduct, a: Tensor, b: Tensor) -> Tensor:
        grid_a, grid_b = (self.grid(value) for value in step.inputs)
        total = exact_product(a - grid_a.zero_point, b - grid_b.zero_point, (grid_a, grid_b)).float()
        scale = float32(grid_a.scale, total) * float32(grid_b.scale, total)
        if not self.has_grid(step.output):
            return total * scale
        grid = self.grid(step.output)
        return torch.round(total * (scale / float32(grid.scale, total))) + grid.zero_point

    def float_step(self, step: FloatStep, inputs: Sequence[Tensor]) -> Tensor:
        x = inputs[0]
        match step:
            case FloatSum():
                return x + inputs[1]
            case FloatProduct():
                return x * inputs[1]
            case FloatConstant():
                constant = step.constant.to(x.device)
                return x + constant if step.operation == "add" else x * constant
            case FloatFunction():
                return native_values(Elementwise(**vars(step)), x)
            case LayerNorm():
                return floats.layer_norm(x, step.weight.to(x.device), step.bias.to(x.device), step.eps)
            case Softmax():
                return floats.softmax(x, avx512=self.avx512)
            case FloatMean():
                return floats.mean(x)
            case FloatConcatenation():
                return torch.cat(list(inputs), dim=step.axis)
            case FloatMatrixProduct():
                return floats.matrix_product(x, inputs[1])
        raise TypeError(f"no arithmetic for {type(step).__name__}")


def exact_product(a: Tensor, b: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """Return the matrix product of whole numbers, exactly: in float32 where no sum can exceed 2^24.

    Args:
        a: (..., M, K) codes minus their zero point.
        b: (..., K, N), too.
        grids: Of the codes.
    """
    first, second = (max(grid.zero_point, grid.quant_max - grid.zero_point) for grid in grids)
    fits = a.shape[-1] * first * second <= FLOAT32_WHOLE and a.device.type == "cpu"
    return a @ b if fits else a.double() @ b.double()


def quantized(x: Tensor, grid: Grid) -> Tensor:
    """Return ``rint(fl(x / s)) + z`` of floats, not limited to the grid's codes."""
    return torch.round(x / float32(grid.scale, x)) + grid.zero_point


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """Return ``fl((q - z) s)`` of codes."""
    return (codes - grid.zero_point) * float32(grid.scale, codes)


def window_sums(step: AveragePool, values: Tensor) -> Tensor:
    """Return the float32 sums over the windows of a pool, added one by one, row by row; padding adds 0.

    Args:
        step: The pool.
        values: (N, C, H, W) float32.

    Returns:
        (N, C, H', W').
    """
    top, left, bottom, right = step.padding
    padded = F.pad(values, (left, right, top, bottom))
    (height, width), (down, across) = step.kernel, step.stride
    rows, columns = (padded.shape[2] - height) // down + 1, (padded.shape[3] - width) // across + 1
    total = torch.zeros_like(padded[:, :, :1, :1])
    for y in range(height):
        for x in range(width):
            total = (
                total + padded[:, :, y : y + down * (rows - 1) + 1 : down, x : x + across * (columns - 1) + 1 : across]
            )
    return total
