"""The program of a student while it is lowered: steps are appended when a result gets a grid, or is read in floats."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor

from synq.engines.aten.capture import BATCH
from synq.engines.aten.folding import folded
from synq.engines.aten.symbols import (
    UNIT,
    Call,
    Codes,
    OperatorRejectedError,
    Pending,
    Symbol,
    is_choice,
    limits,
)
from synq.engines.float_program import (
    FloatConcatenation,
    FloatFunction,
    FloatProduct,
    FloatStep,
    FloatSum,
    MatrixProduct,
)
from synq.engines.onnxruntime_functions import KERNEL_FUNCTIONS
from synq.engines.program import (
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    Grid,
    Layer,
    Limited,
    Movement,
    Product,
    Quantize,
    Rejected,
    Step,
    Sum,
)
from synq.quant.placement import FLOAT_BRANCHES


@dataclass
class Builder:
    """The program so far.

    Attributes:
        target: Name of the engine.
        largest_code: Of the weights of BatchNorms that become layers.
        steps, grids, shapes: As in `Program`.
        input_size: (C, H, W) of one image.
        float_trunk: Whether what no quantizer rounds is computed in floats, and not rejected.
    """

    target: str
    largest_code: int
    float_trunk: bool = False
    steps: list[Step] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    makers: dict[str, Step] = field(default_factory=dict)
    _dequantized: dict[str, Codes] = field(default_factory=dict)
    _in_floats: dict[tuple[object, ...], tuple[Pending, Codes]] = field(default_factory=dict)

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
        if self.float_trunk and (grid is None or isinstance(template, FloatStep)):
            made = self._base_in_floats(pending, name if grid is None else f"{name}.float")
            if grid is not None:
                step = Quantize(inputs=(made.name,), output=self.unique(name), layer=name)
                made = self.add(step, made.shape, grid, 0, grid.quant_max)
            for movement in pending.moves:
                made = movement(made)
            return made
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
            if self.float_trunk and symbol.grid is None:
                self.reject(call, f"it reads {symbol.name!r} before a quantizer")
            return symbol
        if not isinstance(symbol, Pending):
            self.reject(call, "it reads a constant tensor where it must read an activation")
        grid = UNIT if isinstance(symbol.template, Rejected) else self.kept_grid(symbol)
        if grid is None:
            self.reject(call, f"it reads {type(symbol.template).__name__} {symbol.template.layer!r} before a quantizer")
        return self.round(symbol, grid, symbol.template.layer)

    def floats(self, call: Call, symbol: Any) -> Codes:
        """Return the floats of an operand, of a network with a trunk of floats.

        Raises:
            ValueError: If it is a constant.
        """
        if isinstance(symbol, Pending):
            return self.round(symbol, None, symbol.template.layer)
        if not isinstance(symbol, Codes):
            self.reject(call, "it reads a constant tensor where it must read an activation")
        if symbol.grid is None:
            return symbol
        return self._floats_of(symbol.name)

    def _floats_of(self, codes: str) -> Codes:
        """Return the floats of codes, of which there is one `Dequantize`."""
        if codes not in self._dequantized:
            step = Dequantize(inputs=(codes,), output=self.unique(f"{codes}.floats"), layer=codes)
            self._dequantized[codes] = self.add(step, self.shapes[codes], None)
        return self._dequantized[codes]

    def _base_in_floats(self, pending: Pending, name: str) -> Codes:
        """Append the step of a result in floats, without the movements after it, unless it was appended before."""
        key = (id(pending.template), id(pending.factor), id(pending.offset), pending.bounds)
        if key not in self._in_floats:
            made = self._step_in_floats(pending, name)
            if pending.is_clamped:
                made = self._clamped_in_floats(pending, made)
            self._in_floats[key] = pending, made  # the result is kept, so that nothing else gets its identity
        return self._in_floats[key][1]

    def _step_in_floats(self, pending: Pending, name: str) -> Codes:
        template = pending.template
        if isinstance(template, Quantize):
            return Codes(name=template.inputs[0], shape=pending.made_shape, grid=None)
        changes: dict[str, Any] = {"output": self.unique(name)}
        if isinstance(template, Dense):
            assert pending.factor is not None and pending.offset is not None
            changes |= folded(template, pending.factor, pending.offset, self.grids[template.inputs[0]], None)
        if isinstance(template, FloatStep | Dense | MatrixProduct):
            return self.add(replace(template, **changes), pending.made_shape, None)
        inputs = tuple(self._floats_of(value).name for value in template.inputs)
        common: dict[str, Any] = {"inputs": inputs, "layer": template.layer, **changes}
        match template:
            case Sum():
                return self.add(FloatSum(**common), pending.made_shape, None)
            case Product():
                return self.add(FloatProduct(**common), pending.made_shape, None)
            case Concatenation():
                return self.add(FloatConcatenation(**common, axis=template.axis), pending.made_shape, None)
            case Elementwise() if template.function in KERNEL_FUNCTIONS:
                step = FloatFunction(**common, function=template.function, arguments=template.arguments)
                return self.add(step, pending.made_shape, None)
        raise ValueError(
            f"`quant.target` {self.target} must have a form of every operation in floats, but there is none for "
            f"{type(template).__name__} in layer {template.layer!r}. Set `quant.target` to research, which exports any "
            "network"
        )

    def _clamped_in_floats(self, pending: Pending, value: Codes) -> Codes:
        """Append the ReLU or ReLU6 of floats."""
        names = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6"}
        if pending.bounds not in names:
            raise ValueError(
                f"`quant.target` {self.target} must have a form of every operation in floats, but there is none for a "
                f"clamp to {pending.bounds} in layer {pending.template.layer!r}: put it before a layer, or set "
                "`quant.target` to research"
            )
        function = names[pending.bounds]
        output = self.unique(f"{value.name}.{function}")
        step = FloatFunction(inputs=(value.name,), output=output, layer=pending.template.layer, function=function)
        return self.add(step, value.shape, None)

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
