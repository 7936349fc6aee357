"""The integer program of a student: what an inference engine is given to run, without the engine's own arithmetic.

A program is a list of steps on named values. A value with a `Grid` holds integer codes, any other holds floats. Steps
define *what* is computed (a convolution of these codes, a sum onto that grid); *how* its result is rounded differs from
engine to engine and is the matter of their arithmetic. The same program is simulated in PyTorch and written to files,
so that a file and its simulation cannot differ in structure.

Activation codes are 0..quant_max, weights are symmetric: the real value of a weight is ``weight_scale[c] * weight[c]``.
A ReLU or ReLU6 after a step is not a separate step but the limits of the codes of its output (``low`` and ``high``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Quantization grid of an activation: the real value of code q is ``scale * (q - zero_point)``.

    Attributes:
        scale: > 0, a float32 value.
        zero_point: In [0, quant_max].
        quant_max: Largest code, 2^bits - 1 for 2 to 8 bits.
    """

    scale: float
    zero_point: int
    quant_max: int

    @property
    def bits(self) -> int:
        """Return the bit-width."""
        return self.quant_max.bit_length()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation.

    Attributes:
        inputs: Names of the values that it reads, in order.
        output: Name of the value that it makes.
        layer: Name of the layer or node of the network that it comes from, for messages.
    """

    inputs: tuple[str, ...]
    output: str
    layer: str = ""


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Floats to codes on the output's grid."""


@dataclass(frozen=True, kw_only=True)
class Dequantize(Step):
    """Codes to floats."""


@dataclass(frozen=True, kw_only=True)
class Limited(Step):
    """A step whose output codes are limited.

    Attributes:
        low, high: Smallest and largest code: 0 and quant_max, or less where an activation is folded into the step. A
            ReLU has the output's zero_point as ``low``, a ReLU6 the code of 6 as ``high``.
    """

    low: int = 0
    high: int = 255


@dataclass(frozen=True, kw_only=True)
class Layer(Limited):
    """A step with a weight.

    Attributes:
        weight: int8 codes, output channels first.
        weight_scale: (C_out,) float32 > 0.
        bias: (C_out,) int32 on the grid of scale ``input scale * weight_scale``.
        weight_bits: Bit-width of the codes, 2 to 8: they are in [-(2^(bits-1) - 1), 2^(bits-1) - 1].
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    weight_bits: int


@dataclass(frozen=True, kw_only=True)
class Convolution(Layer):
    """Convolution of (N, C, H, W) with a weight (C_out, C / groups, kernel height, kernel width).

    Padding is the input's zero_point.

    Attributes:
        stride, dilation: Down and right.
        padding: At the top, left, bottom and right, each >= 0.
        groups: C for a depthwise convolution.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """Linear layer on the last axis, (..., C_in) -> (..., C_out); if its output has no grid, it is in floats."""


@dataclass(frozen=True, kw_only=True)
class Sum(Limited):
    """Sum of two values of one shape.

    Attributes:
        unrounded: Position of the input that the engine fuses into the sum: limited but not rounded (OpenVINO), or in
            floats (TensorRT); None where both are rounded.
    """

    unrounded: int | None = None


@dataclass(frozen=True, kw_only=True)
class Product(Limited):
    """Product of two values whose shapes broadcast, such as a map (N, C, H, W) and a gate (N, C, 1, 1)."""


@dataclass(frozen=True, kw_only=True)
class Concatenation(Limited):
    """Values side by side along ``axis`` (0 is N), each moved onto the output's grid."""

    axis: int


@dataclass(frozen=True, kw_only=True)
class GlobalAveragePool(Limited):
    """Mean over height and width: (N, C, H, W) -> (N, C, 1, 1)."""


@dataclass(frozen=True, kw_only=True)
class AveragePool(Limited):
    """Mean over windows.

    Attributes:
        kernel, stride: Down and right.
        padding: At the top, left, bottom and right.
        count_padding: Whether positions of the padding count, as zeros.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    count_padding: bool


@dataclass(frozen=True, kw_only=True)
class Elementwise(Limited):
    """A function of single values: a table of codes, or floats in between.

    Attributes:
        function: Its name: sigmoid, hardsigmoid, hardswish, leaky_relu, elu, gelu, tanh, relu, affine and so on.
        arguments: Its numbers by name, such as ``negative_slope``; a function of fixed form has none.
    """

    function: str
    arguments: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rejected(Step):
    """An operator without an integer form: only a survey lists it, no program that is run or written has it.

    Attributes:
        operator: Its name in PyTorch.
        reason: Why it has none.
    """

    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Movement(Step):
    """A step that moves or chooses codes: input and output have one grid."""


@dataclass(frozen=True, kw_only=True)
class MaxPool(Movement):
    """Maximum over windows; padding never wins.

    Attributes:
        kernel, stride, dilation: Down and right.
        padding: At the top, left, bottom and right; what a partial last window (ceil_mode) needs is included.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Reshape(Movement):
    """The same codes in the shape ``(-1, *shape)``."""

    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transpose(Movement):
    """Axes in another order; ``axes[0]`` is 0."""

    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slice(Movement):
    """Positions start, start + step, ... below stop along ``axis``, each as a number of positions >= 0."""

    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class Pad(Movement):
    """Zeros (the code zero_point) around: ``before`` and ``after`` have a number for each axis, N first."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NearestResize(Movement):
    """(N, C, H, W) to a multiple of height and width, each pixel repeated."""

    factors: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SpaceToDepth(Movement):
    """The pixels of each block of b x d pixels become channels: (N, C, H, W) to (N, b * d * C, H / b, W / d).

    Channel (i * d + j) * C + c is channel c of the pixel in row i and column j of the block.

    Attributes:
        block: Its rows b and columns d.
    """

    block: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A student as steps on codes.

    Attributes:
        target: Name of the engine whose forms it has.
        image: Name of the input, floats (N, C, H, W), normalized.
        logits: Name of the output, (N, K).
        steps: In order of execution.
        grids: Of each value that holds codes.
        shapes: Of every value, without N.
    """

    target: str
    image: str
    logits: str
    steps: tuple[Step, ...]
    grids: dict[str, Grid]
    shapes: dict[str, tuple[int, ...]]

    def layers(self) -> Iterator[Layer]:
        """Yield the steps with a weight."""
        return (step for step in self.steps if isinstance(step, Layer))

    def readers(self, value: str) -> list[Step]:
        """Return the steps that read a value."""
        return [step for step in self.steps if value in step.inputs]
