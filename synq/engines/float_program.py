"""Steps of a program on floats: what a network with LayerNorm or attention computes between its integer layers.

Every value is in floats, but for the inputs of a matrix product of codes. A step that makes floats whose reader wants
codes is followed by `Quantize`, codes that it reads come from `Dequantize`.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from synq.engines.program import Limited, Step


@dataclass(frozen=True, kw_only=True)
class FloatStep(Step):
    """A step that reads and makes floats."""


@dataclass(frozen=True, kw_only=True)
class FloatSum(FloatStep):
    """Sum of two values whose shapes broadcast, such as a residual sum."""


@dataclass(frozen=True, kw_only=True)
class FloatProduct(FloatStep):
    """Product of two values whose shapes broadcast."""


@dataclass(frozen=True, kw_only=True)
class FloatConstant(FloatStep):
    """Sum or product of a value and a constant, such as an embedding of positions or a layer scale.

    Attributes:
        operation: What is done with the constant.
        constant: Float32, broadcast with the value, whose shape the result has; its first axis, that of N, has size 1.
    """

    operation: Literal["add", "mul"]
    constant: Tensor


@dataclass(frozen=True, kw_only=True)
class FloatFunction(FloatStep):
    """A function of single values.

    Attributes:
        function, arguments: As of `Elementwise`.
    """

    function: str
    arguments: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(FloatStep):
    """Normalization over the last axis: ``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Attributes:
        weight, bias: (C,) float32.
        eps: >= 0.
    """

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Softmax(FloatStep):
    """Softmax over the last axis."""


@dataclass(frozen=True, kw_only=True)
class FloatMean(FloatStep):
    """Mean over the last axis but one, which is dropped: (..., T, C) -> (..., C), C > 1."""


@dataclass(frozen=True, kw_only=True)
class FloatConcatenation(FloatStep):
    """Values side by side along ``axis`` >= 1."""

    axis: int


@dataclass(frozen=True, kw_only=True)
class FloatMatrixProduct(FloatStep):
    """Matrix product (..., M, K) x (..., K, N) -> (..., M, N) of floats; all axes but the last two are the same."""


@dataclass(frozen=True, kw_only=True)
class MatrixProduct(Limited):
    """The same of codes; if its output has no grid, it is in floats."""
