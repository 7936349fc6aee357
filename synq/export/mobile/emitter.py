"""The values of a program as tensors of a LiteRT graph, with the limits of their codes.

The format has int8 codes, ``code - offset``. The offset of a value is chosen so that the limits of its step cost
nothing where possible: the saturation of int8 is one limit, a fused ReLU another. Codes 0..15 of a convolution with
ReLU, for example, are 112..127: a sum above 15 saturates, one below 0 is rectified.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from synq.engines.program import Grid, Limited, Movement, Program, Step
from synq.export.mobile.channels_last import Moves, Shape, memory_shape
from synq.export.mobile.flat_graph import FlatGraph

OFFSET = 128
"""Of a value that may have all codes 0..255."""
TOP = 127
"""Largest int8 code."""
NONE, RELU = 0, 1
"""Numbers of fused activations in the format."""


@dataclass(frozen=True)
class Limits:
    """How the codes of a step are limited.

    Attributes:
        offset: Codes minus it are int8.
        activation: Fused activation, NONE or RELU.
        lowest, highest: Code at which a MAXIMUM or MINIMUM follows; None: not needed.
    """

    offset: int
    activation: int = NONE
    lowest: int | None = None
    highest: int | None = None


def limits_of(low: int, high: int, zero_point: int, fuses: bool) -> Limits:
    """Return the cheapest way to limit codes to ``low..high``.

    Args:
        low, high: In 0..255.
        zero_point: Of the grid.
        fuses: Whether the operator takes a fused activation.
    """
    rectified = fuses and low == zero_point
    if high == OFFSET + TOP:
        activation = RELU if rectified and low > 0 else NONE
        return Limits(OFFSET, activation, low if low > 0 and not rectified else None)
    if zero_point > high or (low == 0 and not rectified):
        return Limits(OFFSET, NONE, low if low > 0 else None, high)
    return Limits(high - TOP, RELU if rectified else NONE, None if rectified else low)


class Emitter:
    """Tensors of the values of a program.

    Args:
        program: The program.
        floats: Whether all values are float32, as in the network without quantization.
    """

    def __init__(self, program: Program, floats: bool) -> None:
        self.program, self.floats, self.graph = program, floats, FlatGraph()
        self.tensors: dict[str, int] = {}
        self.offsets: dict[str, int] = {}

    def shape(self, value: str) -> Shape:
        """Return the shape of a value in memory, without N."""
        return memory_shape(self.program.shapes[value])

    def rank(self, value: str) -> int:
        """Return the number of axes of a value, N included."""
        return len(self.program.shapes[value]) + 1

    def grid(self, value: str) -> Grid | None:
        """Return the grid of a value; None if it holds floats, as all do without quantization."""
        return None if self.floats else self.program.grids.get(value)

    def inputs(self, step: Step) -> list[int]:
        """Return the tensors of the inputs of a step."""
        return [self.tensors[value] for value in step.inputs]

    def numbers(self, values: Any) -> int:
        """Add a constant of int32 numbers, such as axes."""
        return self.graph.constant("numbers", np.asarray(values, np.int32))

    def real(self, value: float) -> int:
        """Add a constant of one float."""
        return self.graph.constant("number", np.asarray(value, np.float32))

    def tensor(self, name: str, shape: Shape, grid: Grid | None, offset: int = OFFSET) -> int:
        """Add a tensor.

        Args:
            name: Of a value, or of a part of one.
            shape: In memory, without N.
            grid: None for floats.
            offset: Of its codes.
        """
        return self.graph.activation(name, shape, None if grid is None else (grid.scale, grid.zero_point - offset))

    def limits(self, step: Step, fuses: bool = False) -> Limits:
        """Return how the codes of the output of a step are limited; floats only know the ReLU.

        Args:
            step: The step.
            fuses: Whether its operator takes a fused activation.
        """
        grid = self.program.grids.get(step.output)
        if isinstance(step, Movement) or grid is None:
            return Limits(self.offsets.get(step.inputs[0], OFFSET))
        low, high = (step.low, step.high) if isinstance(step, Limited) else (0, grid.quant_max)
        if self.floats:
            return Limits(OFFSET, RELU if fuses and low == grid.zero_point else NONE)
        return limits_of(low, high, grid.zero_point, fuses)

    def emit(
        self,
        step: Step,
        operator: str,
        inputs: list[int],
        version: int = 1,
        options: str = "",
        fuses: bool = False,
        **values: object,
    ) -> None:
        """Add the operator that computes the output of a step and, where needed, what limits its codes.

        Args:
            step: The step.
            operator: Of the format.
            inputs: Tensors that it reads.
            version: Of the operator.
            options: Name of its table of options.
            fuses: Whether that table has a fused activation.
            values: Other attributes of the table.
        """
        grid, shape, limits = self.grid(step.output), self.shape(step.output), self.limits(step, fuses)
        if fuses:
            values["fusedActivationFunction"] = limits.activation
        current = self.tensor(step.output, shape, grid, limits.offset)
        self.graph.operator(operator, inputs, current, version, options, **values)
        for limit, code in (("MAXIMUM", limits.lowest), ("MINIMUM", limits.highest)):
            if code is not None and grid is not None:
                bound = np.array([code - limits.offset], np.int8)
                constant = self.graph.constant(limit.lower(), bound, [grid.scale], grid.zero_point - limits.offset)
                limited = self.tensor(step.output, shape, grid, limits.offset)
                self.graph.operator(limit, [current, constant], limited, 2, "MaximumMinimum")
                current = limited
        self.tensors[step.output], self.offsets[step.output] = current, limits.offset

    def moved(self, step: Step, moves: Moves) -> None:
        """Add the reshapes and transpositions that make the output of a step from its input."""
        current, shape = self.tensors[step.inputs[0]], self.shape(step.inputs[0])
        offset = self.offsets.get(step.inputs[0], OFFSET)
        for kind, axes in moves:
            shape = axes[1:] if kind == "reshape" else tuple(shape[axis - 1] for axis in axes[1:])
            current = self.move(kind, axes, current, shape, self.grid(step.inputs[0]), offset)
        self.tensors[step.output], self.offsets[step.output] = current, offset

    def move(self, kind: str, axes: Shape, source: int, shape: Shape, grid: Grid | None, offset: int) -> int:
        """Add one reshape or transposition and return its output.

        Args:
            kind: ``reshape`` or ``transpose``.
            axes: The new shape with -1 for N, or the permutation.
            source: Tensor that it reads.
            shape: Of the output, without N.
            grid: Of the tensor.
            offset: Of its codes.
        """
        output = self.tensor(kind, shape, grid, offset)
        inputs = [source, self.numbers(axes)]
        if kind == "reshape":
            self.graph.operator("RESHAPE", inputs, output, 1, "Reshape", newShape=list(axes))
        else:
            self.graph.operator("TRANSPOSE", inputs, output, 2, "Transpose")
        return output

    def requantized(self, value: str, grid: Grid, offset: int) -> int:
        """Return a value on another grid: through floats, which the engine replaces by a table.

        Args:
            value: It holds codes.
            grid, offset: Of the result.
        """
        tensor, own = self.tensors[value], self.grid(value)
        if own is None or (own.scale, own.zero_point - self.offsets[value]) == (grid.scale, grid.zero_point - offset):
            return tensor
        real = self.tensor(f"{value}.real", self.shape(value), None)
        self.graph.operator("DEQUANTIZE", [tensor], real, 2, "Dequantize")
        output = self.tensor(f"{value}.requantized", self.shape(value), grid, offset)
        self.graph.operator("QUANTIZE", [real], output, 1, "Quantize")
        return output
