"""A program as a PyTorch module of quantize, dequantize and float operators, the form that ExecuTorch's XNNPACK fuses.

    codes -> dequantize -> conv2d, add, mean ... -> relu or hardtanh -> quantize -> codes

Each reader dequantizes a value with a call of its separate, which keeps the network in one delegate. Codes are int8:
those of the program minus 128. A float bias is rounded back to its code by the engine.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.engines.kernels import check_kernels, unsupported
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
    Limited,
    MaxPool,
    NearestResize,
    Pad,
    Product,
    Program,
    Quantize,
    Reshape,
    Slice,
    Step,
    Sum,
    Transpose,
)
from synq.engines.xnnpack_arithmetic import pool_as_convolution
from synq.export.mobile.ranges import check_ratio, kernel_weight_scale

OFFSET = 128
"""Codes of a program minus it are int8."""
INT8 = (-128, 127, torch.int8)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "affine": lambda x, factor=1.0, offset=0.0: x * factor + offset,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
"""Functions that the engine computes as `XnnpackArithmetic` does, by name."""


class QuantizedModule(nn.Module):
    """A program for ExecuTorch: images (N, C, H, W) -> logits (N, K), both float32.

    Args:
        program: The program.

    Raises:
        ValueError: If the engine has no exact integer kernel for a step.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        check_kernels(program)
        self.steps = [_as_layer(program, step) for step in program.steps]
        for number, step in enumerate(self.steps):
            if isinstance(step, Layer):
                self._register(number, step)
            elif isinstance(step, Sum | Product):
                check_ratio(program, step, "executorch")

    def _register(self, number: int, step: Layer) -> None:
        if step.output not in self.program.grids:
            cure = "give its output a grid, and dequantize it"
            raise ValueError(unsupported("executorch", f"`{step.layer}` is a layer with an output in floats: {cure}"))
        source, output = self.program.grids[step.inputs[0]], self.program.grids[step.output]
        scale = kernel_weight_scale(step, source, output)
        steps = scale * torch.tensor(source.scale, dtype=torch.float32)
        bias = (step.bias.double() * steps).float()
        self.register_buffer(f"weight_{number}", step.weight.to(torch.int8))
        self.register_buffer(f"scale_{number}", scale)
        self.register_buffer(f"zero_{number}", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer(f"bias_{number}", bias)

    def forward(self, images: Tensor) -> Tensor:
        values = {self.program.image: images}
        for number, step in enumerate(self.steps):
            inputs = [self._real(values[name], self.program.grids.get(name)) for name in step.inputs]
            real = self._computed(number, step, inputs)
            grid = self.program.grids.get(step.output)
            if grid is None:
                values[step.output] = real
            elif isinstance(step, Elementwise) and step.function == "identity":
                values[step.output] = self._on_another_grid(step, real, grid)
            else:
                values[step.output] = _quantized(step, real, grid)
        return values[self.program.logits]

    def _real(self, value: Tensor, grid: Grid | None) -> Tensor:
        if grid is None:
            return value
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return dequantize(value, grid.scale, grid.zero_point - OFFSET, *INT8)

    def _computed(self, number: int, step: Step, inputs: list[Tensor]) -> Tensor:
        """Return the real output of a step before it is limited and rounded."""
        x = inputs[0]
        match step:
            case Quantize() | Dequantize():
                return x
            case Convolution():
                return self._convolution(number, step, x)
            case Dense():
                return F.linear(x, self._weight(number), self.get_buffer(f"bias_{number}"))
            case Sum():
                return x + inputs[1]
            case Product():
                return x * inputs[1]
            case Concatenation():
                return torch.cat(self._on_one_grid(step, inputs), dim=step.axis)
            case GlobalAveragePool():
                return x.mean((2, 3), keepdim=True)
            case Elementwise():
                return FUNCTIONS[step.function](x, **step.arguments)
            case MaxPool():
                return self._max_pool(step, x)
            case Reshape():
                return x.reshape(len(x), *step.shape)
            case Transpose():
                return x.permute(step.axes)
            case Slice():
                return x[(slice(None),) * step.axis + (slice(step.start, step.stop, step.step),)]
            case Pad():
                sides = [side for pair in zip(step.before[::-1], step.after[::-1], strict=True) for side in pair]
                return F.pad(x, sides)
            case NearestResize():
                return F.interpolate(x, scale_factor=[float(factor) for factor in step.factors], mode="nearest")
        raise ValueError(unsupported("executorch", f"`{step.layer}` is a step {type(step).__name__}"))

    def _weight(self, number: int) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        names = (f"weight_{number}", f"scale_{number}", f"zero_{number}")
        return dequantize(*(self.get_buffer(name) for name in names), 0, *INT8)

    def _convolution(self, number: int, step: Convolution, x: Tensor) -> Tensor:
        top, left, bottom, right = step.padding
        padding = (top, left)
        if padding != (bottom, right):
            padded = F.pad(x, (left, right, top, bottom))
            grid = self.program.grids[step.inputs[0]]
            x, padding = self._real(_rounded(padded, grid), grid), (0, 0)
        bias = self.get_buffer(f"bias_{number}")
        return F.conv2d(x, self._weight(number), bias, step.stride, padding, step.dilation, step.groups)

    def _on_one_grid(self, step: Concatenation, inputs: list[Tensor]) -> list[Tensor]:
        grid = self.program.grids[step.output]
        return [
            part if _scale(self.program.grids[name]) == _scale(grid) else self._real(_rounded(part, grid), grid)
            for name, part in zip(step.inputs, inputs, strict=True)
        ]

    def _on_another_grid(self, step: Elementwise, real: Tensor, grid: Grid) -> Tensor:
        """Return the codes of a value that is moved onto another grid and limited there, in this order.

        XNNPACK fuses a clamp into the layer before it, which would then round onto the grid after the clamp only.
        """
        if _scale(self.program.grids[step.inputs[0]]) == _scale(grid):
            return _quantized(step, real, grid)
        codes = _rounded(real, grid)
        unlimited = (step.low, step.high) == (0, OFFSET + INT8[1])
        return codes if unlimited else _quantized(step, self._real(codes, grid), grid)

    def _max_pool(self, step: MaxPool, x: Tensor) -> Tensor:
        return F.max_pool2d(x, step.kernel, step.stride, step.padding[:2], step.dilation)


def _as_layer(program: Program, step: Step) -> Step:
    """Return an average pool as the convolution that it is; other steps as they are."""
    if not isinstance(step, AveragePool):
        return step
    return pool_as_convolution(step, program.shapes[step.inputs[0]][0])


def _scale(grid: Grid) -> tuple[float, int]:
    return grid.scale, grid.zero_point


def _rounded(real: Tensor, grid: Grid) -> Tensor:
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return quantize(real, grid.scale, grid.zero_point - OFFSET, *INT8)


def _quantized(step: Step, real: Tensor, grid: Grid) -> Tensor:
    """Return the codes of a real output, limited by what XNNPACK fuses into the operator.

    Where the limits are those of int8, rounding saturates there. A ReLU too many would cost time: after a pool or a
    reshape it is not fused, and the operator would run in float.
    """
    low, high = 0, OFFSET + INT8[1]
    if isinstance(step, Limited):
        low, high = step.low, step.high
    elif isinstance(step, Quantize):
        high = grid.quant_max
    if (low, high) == (0, OFFSET + INT8[1]):
        return _rounded(real, grid)
    if (low, high) == (grid.zero_point, OFFSET + INT8[1]):
        real = F.relu(real)
    else:
        smallest, largest = ((code - grid.zero_point) * grid.scale for code in (low, high))
        real = F.hardtanh(real, smallest, largest)
    return _rounded(real, grid)
