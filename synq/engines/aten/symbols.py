"""What an operator reads and returns while a student is lowered: codes, or a result that nothing has rounded yet."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from synq.engines.aten.capture import BATCH
from synq.engines.program import Elementwise, Grid, Quantize, Step
from synq.network.aten_traits import OperatorCall
from synq.quant.fake_quant import quantize


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A value of the program.

    Attributes:
        name: Its name.
        shape: Without N.
        grid: None if it is in floats.
        low, high: Its codes lie between them.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid | None
    low: int = 0
    high: int = 0


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A result that nothing has rounded yet: a step without output grid, and what is folded into it.

    Attributes:
        template: The step, without output and limits.
        shape: Of the result, without N.
        factor, offset: Of a layer, (C_out,) float64: its result times ``factor`` plus ``offset`` is meant.
        bounds: The result is clamped to them.
        moves: Movements of the result, which are executed on its codes.
        made_shape: Of the result before them.
    """

    template: Step
    shape: tuple[int, ...]
    made_shape: tuple[int, ...]
    factor: Tensor | None = None
    offset: Tensor | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    moves: tuple[Callable[[Codes], Codes], ...] = ()

    @property
    def is_clamped(self) -> bool:
        """Whether bounds are set."""
        return self.bounds != (-math.inf, math.inf)

    def clamped(self, low: float, high: float) -> "Pending":
        """Return the result clamped to [low, high]."""
        bounds = (min(max(self.bounds[0], low), high), max(min(self.bounds[1], high), low))
        return replace(self, bounds=bounds)


Symbol = Codes | Pending


@dataclass(frozen=True, kw_only=True)
class Turned:
    """A value with its axes in an order in which N is not the first: views of it are taken from the value itself.

    Attributes:
        symbol: The value, N first.
        axes: Axis of the value (0 is N) at each place.
        merged: Whether axis 0 is N with the first axis of the value, see `Call`; the others count from 1 after it.
    """

    symbol: Symbol
    axes: tuple[int, ...]
    merged: bool = False


UNIT = Grid(scale=1 / 128, zero_point=128, quant_max=255)
"""Grid of a rejected result in a survey, where nothing rounds it: any other would do."""


class OperatorRejectedError(ValueError):
    """An operator has no integer form.

    Attributes:
        reason: Why, without the operator's name.
    """

    def __init__(self, target: str, call: "Call", reason: str) -> None:
        super().__init__(
            f"`quant.target` {target} must have an integer form of every operation, but there is none for "
            f"{call.name} in layer {call.layer!r}: {reason}. Set `quant.target` to research, which exports any network"
        )
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Call(OperatorCall):
    """One operator, with symbols and constants in place of tensors.

    Attributes:
        layer: Name of the layer or node that it comes from.
        shapes: Of its outputs, with N.
        merged: Whether its first operand has windows or tokens of all images along its first axis: as a symbol it has
            an axis more.
    """

    layer: str
    shapes: tuple[tuple[int, ...], ...]
    merged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its first output, without N; an axis of windows of all images becomes one of each image."""
        first, *others = self.shapes[0]
        return tuple(others) if first == BATCH else (first // BATCH, *others)

    def numbers(self, name: str, length: int = 2) -> tuple[int, ...]:
        """Return an argument that is one number or a list of ``length`` numbers as ``length`` numbers."""
        value = self.argument(name)
        values = [value] if isinstance(value, int) else list(value)
        return tuple(int(v) for v in (values * length if len(values) == 1 else values))


def is_choice(step: Step) -> bool:
    """Return whether a step returns codes of its input, within limits."""
    return isinstance(step, Elementwise) and step.function == "identity"


def quantized_image(name: str, shape: tuple[int, ...]) -> Pending:
    """Return the images, which no quantizer has rounded yet."""
    return Pending(template=Quantize(inputs=(name,), output="", layer=name), shape=shape, made_shape=shape)


def made(template: Step, shape: tuple[int, ...]) -> Pending:
    """Return the result of a step."""
    return Pending(template=template, shape=shape, made_shape=shape)


def limits(grid: Grid, low: float, high: float) -> tuple[int, int]:
    """Return the codes of a clamp to [low, high], rounded as the quantizer rounds."""
    bounds = torch.tensor([low, high], dtype=torch.float32)
    scale, zero_point = torch.tensor(grid.scale), torch.tensor(grid.zero_point, dtype=torch.int32)
    first, last = (int(code) for code in quantize(bounds, scale, zero_point, 0, grid.quant_max))
    return first, last


def moved(symbol: Symbol, shape: tuple[int, ...], movement: Callable[[Codes], Codes]) -> Symbol:
    """Return a symbol after a movement; that of a result is executed after its rounding."""
    if isinstance(symbol, Codes):
        return movement(symbol)
    return replace(symbol, shape=shape, moves=(*symbol.moves, movement))
