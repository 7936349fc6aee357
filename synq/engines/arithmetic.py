"""What an engine's arithmetic has to define, and the float32 operations that all of them are written in.

Codes are float32 tensors of whole numbers: every code and every difference of two codes is exact, and pools and
convolutions of them have fast kernels. Engines round to float32 after each operation, in an order that differs from
engine to engine; an arithmetic spells that order out. In formulas, fl() rounds to float32, rint() rounds halves to
even and

    fma(a, b, c) = fl(a b + c)    with one rounding
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from synq.config.quant import FLOAT_TRUNKS
from synq.engines.float_program import FloatStep, MatrixProduct
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Grid,
    Product,
    Program,
    Quantize,
    Step,
    Sum,
)


def float32(value: float, like: Tensor) -> Tensor:
    """Return a number as a float32 tensor without axes, on the device of another tensor.

    Dividing by a Python number is not the same: on CUDA, PyTorch then multiplies by its reciprocal.
    """
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return ``fl(a b + c)`` with a single rounding.

    The product of two float32 numbers is exact in float64. Their sum with c is too, unless their exponents are so far
    apart that a second rounding could matter only when the first ends exactly between two float32 numbers.

    Args:
        a: Float32.
        b, c: Float32 values, broadcast with a.
    """
    return (a.double() * b).add_(c).float()


class Arithmetic(ABC):
    """How one engine computes the steps of a program, to the last bit.

    `Simulation` calls one method per step, and afterwards limits codes to the ``low..high`` of the step (0..quant_max
    for Quantize). Floats, of an output without a grid or with one that is left unrounded (`Sum.unrounded`), stay as a
    method returns them.

    Args:
        program: The program that it runs.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._unrounded = unrounded_values(program)

    def reject_unrounded_sums(self) -> None:
        """Raise ValueError if a sum leaves an input unrounded, which this engine does not."""
        for step in self.program.steps:
            if isinstance(step, Sum) and step.unrounded is not None:
                raise ValueError(
                    f"`unrounded` must be None for {self.program.target}, but got {step.unrounded} at `{step.layer}`: "
                    "lower the student for this target"
                )

    def grid(self, value: str) -> Grid:
        """Return the grid of a value that holds codes.

        Raises:
            KeyError: If the value holds floats.
        """
        return self.program.grids[value]

    def input_grids(self, step: Sum | Product | Concatenation) -> list[Grid]:
        """Return the grids of the inputs of a step, in order."""
        return [self.grid(value) for value in step.inputs]

    def has_grid(self, value: str) -> bool:
        """Return whether a value holds codes."""
        return value in self.program.grids

    @abstractmethod
    def quantize(self, step: Quantize, x: Tensor) -> Tensor:
        """Return the codes of floats of any shape."""

    @abstractmethod
    def dequantize(self, step: Dequantize, codes: Tensor) -> Tensor:
        """Return the floats of codes of any shape."""

    @abstractmethod
    def convolution(self, step: Convolution, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        """Return the codes of a convolution, or floats where its output has no grid or is not rounded.

        Args:
            step: The convolution.
            sums: (N, C_out, H', W') float64, the exact integer sums of ``(x - zero_point) * weight`` without the bias.
            weight_scale: (C_out, 1, 1) float32, on the device of the sums.
            bias: (C_out, 1, 1) float64 whole numbers, on the device of the sums.
        """

    @abstractmethod
    def dense(self, step: Dense, sums: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        """Return the codes of a linear layer, or floats where its output has no grid.

        Args:
            step: The linear layer.
            sums: (..., C_out) float64, the exact integer sums without the bias.
            weight_scale: (C_out,) float32.
            bias: (C_out,) float64 whole numbers.
        """

    @abstractmethod
    def sum(self, step: Sum, a: Tensor, b: Tensor) -> Tensor:
        """Return the codes of the sum of two values of one shape."""

    @abstractmethod
    def product(self, step: Product, a: Tensor, b: Tensor) -> Tensor:
        """Return the codes of the product of two values whose shapes broadcast."""

    @abstractmethod
    def concatenation(self, step: Concatenation, parts: Sequence[Tensor]) -> Tensor:
        """Return the codes of values side by side along ``step.axis``."""

    @abstractmethod
    def global_average_pool(self, step: GlobalAveragePool, codes: Tensor) -> Tensor:
        """Return the codes (N, C, 1, 1) of the means over height and width."""

    @abstractmethod
    def average_pool(self, step: AveragePool, codes: Tensor) -> Tensor:
        """Return the codes of the means over windows."""

    @abstractmethod
    def elementwise(self, step: Elementwise, codes: Tensor) -> Tensor:
        """Return the codes of a function of single values.

        Its input has a grid, so that a function of one value is a table: `Simulation` calls this once, with every code
        of the input's grid in order, and looks the outputs up.

        Args:
            step: The function.
            codes: (quant_max + 1,), 0, 1, ... quant_max of the input's grid.
        """

    def matrix_product(self, step: MatrixProduct, a: Tensor, b: Tensor) -> Tensor:
        """Return the codes of a matrix product of two activations, or floats where its output has no grid.

        Args:
            step: The product.
            a: (..., M, K) codes.
            b: (..., K, N) codes.

        Raises:
            ValueError: If the engine's arithmetic of it is not known.
        """
        raise self._unknown(step)

    def float_step(self, step: FloatStep, inputs: Sequence[Tensor]) -> Tensor:
        """Return the floats of a step on floats.

        Raises:
            ValueError: If the engine's arithmetic of it is not known.
        """
        raise self._unknown(step)

    def _unknown(self, step: Step) -> ValueError:
        return ValueError(
            f"`quant.target` must be {' or '.join(FLOAT_TRUNKS)} for a network with {type(step).__name__}, but got "
            f"{self.program.target} for `{step.layer}`; research exports any network"
        )

    def is_rounded(self, value: str) -> bool:
        """Return whether a value holds codes, and not the floats that a sum reads limited but not rounded."""
        return self.has_grid(value) and value not in self._unrounded


def table(arithmetic: Arithmetic, step: Elementwise) -> Tensor:
    """Return the output of a function for every code of its input, within the limits of the step.

    Returns:
        (quant_max + 1,) codes, or floats if the output has no grid.

    Raises:
        ValueError: If the input holds floats.
    """
    if not arithmetic.has_grid(step.inputs[0]):
        raise ValueError(
            f"the input of a function must hold codes, but `{step.inputs[0]}` of `{step.layer or step.output}` "
            "holds floats: quantize it"
        )
    values = arithmetic.elementwise(step, torch.arange(arithmetic.grid(step.inputs[0]).quant_max + 1.0))
    return values.clamp(step.low, step.high) if arithmetic.is_rounded(step.output) else values


def unrounded_values(program: Program) -> frozenset[str]:
    """Return the values that their Sum reads limited but not rounded (`Sum.unrounded`)."""
    return frozenset(
        step.inputs[step.unrounded] for step in program.steps if isinstance(step, Sum) and step.unrounded is not None
    )
