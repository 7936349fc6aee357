"""What an operator reads and returns while a student is lowered: codes, or a result that nothing has rounded yet."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from synq.engines.aten.capture import BATCH
from synq.engines.aten.folding import folded
from synq.engines.program import (
    Convolution,
    Dequantize,
    Elementwise,
    Grid,
    Layer,
    Limited,
    Movement,
    Quantize,
    Rejected,
    Step,
)
from synq.network.aten_traits import OperatorCall
from synq.quant.fake_quant import quantize
from synq.quant.placement import FLOAT_BRANCHES


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
    """

    layer: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its first output, without N."""
        return self.shapes[0][1:]

    def numbers(self, name: str, length: int = 2) -> tuple[int, ...]:
        """Return an argument that is one number or a list of ``length`` numbers as ``length`` numbers."""
        value = self.argument(name)
        values = [value] if isinstance(value, int) else list(value)
        return tuple(int(v) for v in (values * length if len(values) == 1 else values))


@dataclass
class Builder:
    """The program so far.

    Attributes:
        target: Name of the engine.
        largest_code: Of the weights of BatchNorms that become layers.
        steps, grids, shapes: As in `Program`.
        input_size: (C, H, W) of one image.
    """

    target: str
    largest_code: int
    steps: list[Step] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    makers: dict[str, Step] = field(default_factory=dict)

    def reject(self, call: Call, reason: str) -> NoReturn:
        """Raise the error of an operator without a form."""
        raise OperatorRejectedError(self.target, call, reason)

    def unique(self, wanted: str) -> str:
        """Return ``wanted``, with a number appended if a value has this name."""
        name, count = wanted, 0
        while name in self.shapes:
            count += 1
            name = f"{wanted}_{count}"
        return name

    def add(self, step: Step, shape: tuple[int, ...], grid: Grid | None, low: int = 0, high: int = 0) -> Codes:
        """Append a step, and return the value that it makes."""
        self.steps.append(step)
        self.makers[step.output] = step
        self.shapes[step.output] = shape
        if grid is not None:
            self.grids[step.output] = grid
        return Codes(name=step.output, shape=shape, grid=grid, low=low, high=high)

    def move(self, source: Codes, template: Movement, shape: tuple[int, ...], *, adds_zeros: bool = False) -> Codes:
        """Append a movement of ``source``, whose inputs and output are filled in."""
        suffix = type(template).__name__.lower()
        name, layer = self.unique(f"{source.name}.{suffix}"), template.layer or source.name
        step = replace(template, inputs=(source.name,), output=name, layer=layer)
        low, high = source.low, source.high
        if adds_zeros and source.grid is not None:
            low, high = min(low, source.grid.zero_point), max(high, source.grid.zero_point)
        return self.add(step, shape, source.grid, low, high)

    def round(self, pending: Pending, grid: Grid | None, name: str) -> Codes:
        """Append the step of a result, and the movements after it; return the value on ``grid``, or in floats."""
        template = pending.template
        changes: dict[str, Any] = {"output": self.unique(name)}
        if isinstance(template, Layer):
            assert pending.factor is not None and pending.offset is not None
            source = self.grids[template.inputs[0]]
            changes |= folded(template, pending.factor, pending.offset, source, grid)
        low, high = (0, 0) if grid is None else limits(grid, *pending.bounds)
        if isinstance(template, Limited):
            changes |= {"low": low, "high": high}
        made = self.add(replace(template, **changes), pending.made_shape, grid, low, high)
        for movement in pending.moves:
            made = movement(made)
        return made

    def codes(self, call: Call, symbol: Any) -> Codes:
        """Return the codes of an operand; the result of a choice between codes is on their grid.

        Raises:
            ValueError: If a result is read that no quantizer has rounded, or a constant.
        """
        if isinstance(symbol, Codes):
            return symbol
        if not isinstance(symbol, Pending):
            self.reject(call, "it reads a constant tensor where it must read an activation")
        grid = UNIT if isinstance(symbol.template, Rejected) else self.kept_grid(symbol)
        if grid is None:
            self.reject(call, f"it reads {type(symbol.template).__name__} {symbol.template.layer!r} before a quantizer")
        return self.round(symbol, grid, symbol.template.layer)

    def addend(self, call: Call, symbol: Any) -> Codes:
        """Return an operand of a sum: codes, or the floats of a convolution that its engine fuses into the sum.

        Raises:
            ValueError: As `codes`.
        """
        fusable = isinstance(symbol, Pending) and isinstance(symbol.template, Convolution)
        if self.target in FLOAT_BRANCHES and fusable and not symbol.is_clamped and not symbol.moves:
            return self.round(symbol, None, symbol.template.layer)
        return self.codes(call, symbol)

    def kept_grid(self, pending: Pending) -> Grid | None:
        """Return the grid of the inputs if the result needs no other one: it was only clamped, or put side by side."""
        template = pending.template
        grids = {self.grids.get(name) for name in template.inputs}
        grid = grids.pop()
        if grids or grid is None or not (is_choice(template) or type(template).__name__ == "Concatenation"):
            return None
        low, high = limits(grid, *pending.bounds)
        for code, bound, end in ((low, pending.bounds[0], 0), (high, pending.bounds[1], grid.quant_max)):
            value = grid.scale * (code - grid.zero_point)
            if code != end and abs(value - bound) > 1e-6 * abs(bound):
                return None
        return grid

    def finished(self, symbol: Symbol, name: str) -> Codes:
        """Return the logits in floats."""
        if isinstance(symbol, Pending):
            return self.round(symbol, None, name)
        if symbol.grid is None:
            return symbol
        step = Dequantize(inputs=(symbol.name,), output=self.unique(name), layer=name)
        return self.add(step, symbol.shape, None)


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


def without_batch(call: Call, builder: Builder, constant: Tensor, rank: int) -> Tensor:
    """Return a constant operand for one image: of ``rank`` axes, the first of size 1.

    Raises:
        ValueError: If it differs from image to image.
    """
    shaped = constant.detach().reshape((1,) * (rank - constant.ndim) + tuple(constant.shape))
    if shaped.shape[0] == BATCH:
        if not bool((shaped == shaped[:1]).all()):
            builder.reject(call, "a constant depends on the image's position in the batch")
        shaped = shaped[:1]
    return shaped
