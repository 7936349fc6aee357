"""What the ONNX standard makes of a file with QuantizeLinear and DequantizeLinear: floats between codes.

    QuantizeLinear     rint(fl(x / s)) + z
    DequantizeLinear   fl((q - z) s)
    everything else    in floats

Engines that do not run here (TensorRT, QNN) are given such files; how their integer kernels round is not published. The
sums of a layer are exact here and rounded once, ``fl(acc fl(s_x s_w) + fl(bias s_x s_w))``, where an implementation in
float32 rounds after each addition: a code that lies next to a tie may differ by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from synq.engines.arithmetic import Arithmetic, float32
from synq.engines.functions import exact_values
from synq.engines.onnxruntime_arithmetic import dequantized, quantized, window_sums
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

GATE = Grid(scale=1 / 256, zero_point=0, quant_max=255)
"""Grid of a sigmoid between two operations of QNN, whose kernel has this one only."""


class StandardArithmetic(Arithmetic):
    """Q/DQ as the ONNX standard defines it.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.rounds_gates = program.target == "qnn"

    def rounded(self, values: Tensor, grid: Grid) -> Tensor:
        """Return the codes of the float result of an operation, not limited to those of the grid."""
        return quantized(values, grid)

    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        return quantized(x, self.grid(step.output))

    def dequantize(self, step: Dequantize, codes: Tensor) -> Tensor:
        return dequantized(codes, self.grid(step.inputs[0]))

    def convolution(self, step: Convolution, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._layer(step, sums, weight_scale, bias)

    def dense(self, step: Dense, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return self._layer(step, sums, weight_scale, bias)

    def _layer(self, step: Layer, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        scale = float32(self.grid(step.inputs[0]).scale, weight_scale) * weight_scale
        values = (sums * scale.double() + (bias.float() * scale).double()).float()
        return self.rounded(values, self.grid(step.output)) if self.is_rounded(step.output) else values

    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        first, second = (
            part if number == step.unrounded else dequantized(part, self.grid(value))
            for number, (part, value) in enumerate(zip((a, b), step.inputs, strict=True))
        )
        return self.rounded(first + second, self.grid(step.output))

    def product(self, step: Product, a: Tensor, b: Tensor) -> Tensor:
        first, second = (dequantized(part, grid) for part, grid in zip((a, b), self.input_grids(step), strict=True))
        return self.rounded(first * second, self.grid(step.output))

    def concatenation(self, step: Concatenation, parts: Sequence[Tensor]) -> Tensor:
        grid, grids = self.grid(step.output), self.input_grids(step)
        codes = [self.rounded(dequantized(part, own), grid) for part, own in zip(parts, grids, strict=True)]
        return torch.cat(codes, dim=step.axis)

    def global_average_pool(self, step: GlobalAveragePool, codes: Tensor) -> Tensor:
        values = dequantized(codes, self.grid(step.inputs[0])).double().mean((2, 3), keepdim=True).float()
        return self.rounded(values, self.grid(step.output))

    def average_pool(self, step: AveragePool, codes: Tensor) -> Tensor:
        values = dequantized(codes, self.grid(step.inputs[0]))
        count = float32(step.kernel[0] * step.kernel[1], codes)
        if not step.count_padding:
            count = window_sums(step, torch.ones_like(values[:1, :1]))
        return self.rounded(window_sums(step, values) / count, self.grid(step.output))

    def elementwise(self, step: Elementwise, codes: Tensor) -> Tensor:
        x = dequantized(codes, self.grid(step.inputs[0]))
        if self.rounds_gates and step.function == "silu":
            gate = quantized(torch.sigmoid(x.double()).float(), GATE).clamp(0, GATE.quant_max)
            values = x * dequantized(gate, GATE)
        else:
            values = exact_values(step, x)
        return self.rounded(values, self.grid(step.output)) if self.has_grid(step.output) else values
