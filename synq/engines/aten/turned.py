"""Permutations of axes; with N in another place than the first for a while, as where attention takes q, k and v apart.

    (N, T, 3 H D) -> view (N, T, 3, H, D) -> permute (3, N, H, T, D) -> [0], [1], [2], each (N, H, T, D)

A program has N first everywhere: the choice is made on the value before the permutation.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from synq.engines.aten.builder import Builder
from synq.engines.aten.moves import reshaped, sliced, transposed
from synq.engines.aten.symbols import Call, Symbol, Turned, moved


def permute(builder: Builder, call: Call) -> Symbol | Turned:
    """Lower a permutation of axes."""
    operand, dims = call.args[0], [int(axis) for axis in call.argument("dims")]
    if not isinstance(operand, Turned):
        operand = Turned(symbol=operand, axes=tuple(range(len(dims))), merged=call.merged)
    return _in_order(builder, operand, operand.symbol, [operand.axes[axis % len(dims)] for axis in dims])


def _in_order(builder: Builder, value: Turned, symbol: Symbol, axes: Sequence[int]) -> Symbol | Turned:
    """Return a symbol with its axes in another order, numbered as those of ``value``."""
    if axes[0] != 0:
        return replace(value, symbol=symbol, axes=tuple(axes))
    order = (0, 1, *(axis + 1 for axis in axes[1:])) if value.merged else tuple(axes)
    shape = tuple(symbol.shape[axis - 1] for axis in order[1:])
    return moved(symbol, shape, lambda codes: transposed(builder, codes, order))


def _squeeze(builder: Builder, call: Call) -> Symbol | Turned:
    value, given = call.args[0], call.argument("dim")
    dropped = {value.axes[int(axis) % len(value.axes)] for axis in ([given] if isinstance(given, int) else given)}
    positions = [axis - 1 + value.merged for axis in dropped]
    if 0 in dropped or any(value.symbol.shape[place] != 1 for place in positions):
        builder.reject(call, "it drops an axis with several positions")
    kept = [axis for axis in range(len(value.axes)) if axis not in dropped]
    shape = tuple(size for place, size in enumerate(value.symbol.shape) if place not in positions)
    symbol = moved(value.symbol, shape, lambda codes: reshaped(builder, codes, shape))
    return _in_order(builder, value, symbol, [kept.index(axis) for axis in value.axes if axis in kept])


def _slice(builder: Builder, call: Call) -> Turned:
    value = call.args[0]
    axis = value.axes[int(call.argument("dim") or 0) % len(value.axes)]
    if axis == 0:
        builder.reject(call, "it works on the axis of the images")
    axis, shape = axis + value.merged, value.symbol.shape
    ends = slice(call.argument("start"), call.argument("end"), call.argument("step"))
    start, stop, step = ends.indices(shape[axis - 1])
    shape = (*shape[: axis - 1], len(range(start, stop, step)), *shape[axis:])
    symbol = moved(value.symbol, shape, lambda codes: sliced(builder, codes, axis, start, stop, step))
    return replace(value, symbol=symbol)


def _same(builder: Builder, call: Call) -> Any:
    return call.args[0]


TURNED: dict[str, Callable[[Builder, Call], Any]] = {
    "permute": permute,
    "slice": _slice,
    "squeeze": _squeeze,
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "dropout"), _same),
}
"""Lowering of the operators that may read a value whose first axis is not N, by name."""
