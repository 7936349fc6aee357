"""Operators that move, choose or repeat values: steps on codes, which are exact in every engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from synq.engines.aten.builder import Builder
from synq.engines.aten.capture import BATCH
from synq.engines.aten.symbols import Call, Codes, Symbol, moved
from synq.engines.float_program import FloatConcatenation
from synq.engines.program import Concatenation, NearestResize, Pad, Reshape, Slice, Transpose

LARGEST_PIECES = 64
"""Number of pieces up to which a choice of positions is written as slices side by side."""


def reshaped(builder: Builder, codes: Codes, shape: tuple[int, ...]) -> Codes:
    """Return the codes in another shape (without N); consecutive reshapes are one step."""
    maker = builder.makers.get(codes.name)
    source = maker.inputs[0] if isinstance(maker, Reshape) else codes.name
    if builder.shapes[source] == shape:
        return _renamed(codes, source, shape)
    if shape == codes.shape:
        return codes
    return builder.move(
        _renamed(codes, source, builder.shapes[source]), Reshape(inputs=(), output="", shape=shape), shape
    )


def transposed(builder: Builder, codes: Codes, axes: Sequence[int]) -> Codes:
    """Return the codes with axes (0 is N, and stays) in another order."""
    if list(axes) == list(range(len(axes))):
        return codes
    shape = tuple(codes.shape[a - 1] for a in axes[1:])
    return builder.move(codes, Transpose(inputs=(), output="", axes=tuple(axes)), shape)


def sliced(builder: Builder, codes: Codes, axis: int, start: int, stop: int, step: int = 1) -> Codes:
    """Return the positions start, start + step, ... below stop along an axis >= 1."""
    size = codes.shape[axis - 1]
    if (start, stop, step) == (0, size, 1):
        return codes
    count = len(range(start, stop, step))
    shape = _with(codes.shape, axis, count)
    return builder.move(codes, Slice(inputs=(), output="", axis=axis, start=start, stop=stop, step=step), shape)


def padded(builder: Builder, codes: Codes, before: Sequence[int], after: Sequence[int]) -> Codes:
    """Return the codes with zeros around; a number for each axis, N first, all >= 0."""
    if not any(before) and not any(after):
        return codes
    shape = tuple(n + b + a for n, b, a in zip(codes.shape, before[1:], after[1:], strict=True))
    template = Pad(inputs=(), output="", before=tuple(before), after=tuple(after))
    return builder.move(codes, template, shape, adds_zeros=True)


def side_by_side(builder: Builder, pieces: list[Codes], axis: int) -> Codes:
    """Return codes of one grid side by side."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    shape = _with(first.shape, axis, sum(piece.shape[axis - 1] for piece in pieces))
    low, high = min(piece.low for piece in pieces), max(piece.high for piece in pieces)
    name = builder.unique(f"{first.name}.concatenation")
    inputs = tuple(piece.name for piece in pieces)
    if first.grid is None:
        joined = FloatConcatenation(inputs=inputs, output=name, layer=first.name, axis=axis)
        return builder.add(joined, shape, None)
    step = Concatenation(inputs=inputs, output=name, layer=first.name, axis=axis, low=low, high=high)
    return builder.add(step, shape, first.grid, low, high)


def chosen(builder: Builder, call: Call, codes: Codes, axis: int, positions: list[int]) -> Codes:
    """Return the codes at ``positions`` along an axis >= 1, which may repeat and be in any order."""
    size, count = codes.shape[axis - 1], len(positions)
    repeats = count // size if size else 0
    if repeats > 1 and axis in (2, 3) and len(codes.shape) == 3 and positions == [p // repeats for p in range(count)]:
        factors = (repeats, 1) if axis == 2 else (1, repeats)
        maker = builder.makers[codes.name]
        if isinstance(maker, NearestResize):  # of the other axis, a moment ago
            factors = (factors[0] * maker.factors[0], factors[1] * maker.factors[1])
            codes = _renamed(codes, maker.inputs[0], builder.shapes[maker.inputs[0]])
        shape = (codes.shape[0], codes.shape[1] * factors[0], codes.shape[2] * factors[1])
        return builder.move(codes, NearestResize(inputs=(), output="", factors=factors), shape)
    runs = _runs(positions)
    if len(runs) > LARGEST_PIECES:
        builder.reject(call, f"it takes positions in {len(runs)} pieces, more than {LARGEST_PIECES}")
    return side_by_side(builder, [sliced(builder, codes, axis, *run) for run in runs], axis)


def _runs(positions: list[int]) -> list[tuple[int, int, int]]:
    """Return positions as slices (start, stop, step) with steps >= 1."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(positions):
        step = positions[at + 1] - positions[at] if at + 1 < len(positions) else 1
        last = at
        while step >= 1 and last + 1 < len(positions) and positions[last + 1] - positions[last] == step:
            last += 1
        runs.append((positions[at], positions[last] + 1, step if last > at else 1))
        at = last + 1
    return runs


def broadcast(builder: Builder, call: Call, codes: Codes, shape: tuple[int, ...]) -> Codes:
    """Return the codes with axes of size 1 repeated to ``shape`` (without N, of the same number of axes)."""
    for axis, (size, wanted) in enumerate(zip(codes.shape, shape, strict=True), 1):
        if size != wanted:
            codes = chosen(builder, call, codes, axis, [0] * wanted)
    return codes


def view(builder: Builder, call: Call) -> Symbol:
    """Lower every reshape that keeps images apart."""
    symbol = _operand(builder, call)
    _check_images(builder, call)
    return moved(symbol, call.shape, lambda codes: reshaped(builder, codes, call.shape))


def slice_axis(builder: Builder, call: Call) -> Symbol:
    """Lower a slice with constant ends."""
    symbol, axis = _operand(builder, call), _axis(builder, call)
    size = (call.shapes[0][0], *symbol.shape)[axis]
    start, stop, step = slice(call.argument("start"), call.argument("end"), call.argument("step")).indices(size)
    if (start, stop, step) == (0, size, 1):
        return symbol
    _check_axis(builder, call, axis)
    return moved(symbol, call.shape, lambda codes: sliced(builder, codes, axis, start, stop, step))


def select(builder: Builder, call: Call) -> Symbol:
    """Lower the choice of one position of an axis, which is dropped."""
    symbol, axis = _operand(builder, call), _axis(builder, call)
    _check_axis(builder, call, axis)
    index = int(call.argument("index")) % symbol.shape[axis - 1]
    return moved(
        symbol,
        call.shape,
        lambda codes: reshaped(builder, sliced(builder, codes, axis, index, index + 1), call.shape),
    )


def split(builder: Builder, call: Call) -> list[Symbol]:
    """Lower a split into parts."""
    symbol, axis = _operand(builder, call), _axis(builder, call)
    _check_axis(builder, call, axis)
    parts: list[Symbol] = []
    start = 0
    for shape in call.shapes:
        stop = start + shape[axis]

        def part(codes: Codes, start: int = start, stop: int = stop) -> Codes:
            return sliced(builder, codes, axis, start, stop)

        parts.append(moved(symbol, shape[1:], part))
        start = stop
    return parts


def repeat(builder: Builder, call: Call) -> Symbol:
    """Lower the repetition of axes, of size 1 (expand) or of any size (repeat)."""
    symbol = _operand(builder, call)
    _check_images(builder, call)
    rank = len(call.shape)
    kept = (1,) * (rank - len(symbol.shape)) + tuple(symbol.shape)
    if rank != len(symbol.shape):
        builder.reject(call, "it adds an axis in front of the images")

    def repeated(codes: Codes) -> Codes:
        for axis, (size, wanted) in enumerate(zip(kept, call.shape, strict=True), 1):
            if size != wanted:
                codes = chosen(builder, call, codes, axis, list(range(size)) * (wanted // size))
        return codes

    return moved(symbol, call.shape, repeated)


def pad(builder: Builder, call: Call) -> Symbol:
    """Lower padding by zeros, or by values of the tensor (reflect, replicate, circular); negative padding cuts off."""
    symbol = _operand(builder, call)
    given = [int(n) for n in call.argument("pad")]
    mode = call.argument("mode") or "constant"
    rank = len(symbol.shape) + 1
    before, after = [0] * rank, [0] * rank
    for place in range(len(given) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = given[2 * place], given[2 * place + 1]
    if before[0] or after[0]:
        _check_axis(builder, call, 0)
    if mode == "constant" and (call.argument("value") or 0) != 0 and max(*before, *after) > 0:
        builder.reject(call, f"it pads with {call.argument('value')}, and only zero is on every grid")

    def with_padding(codes: Codes) -> Codes:
        if mode != "constant":
            for axis in range(1, rank):
                if before[axis] or after[axis]:
                    rows = _padded_positions(codes.shape[axis - 1], before[axis], after[axis], mode)
                    codes = chosen(builder, call, codes, axis, rows)
            return codes
        for axis in range(1, rank):
            size = codes.shape[axis - 1]
            codes = sliced(builder, codes, axis, max(-before[axis], 0), size - max(-after[axis], 0))
        return padded(builder, codes, [max(n, 0) for n in before], [max(n, 0) for n in after])

    return moved(symbol, call.shape, with_padding)


def _padded_positions(size: int, before: int, after: int, mode: str) -> list[int]:
    positions = range(-before, size + after)
    if mode == "circular":
        return [p % size for p in positions]
    if mode == "replicate":
        return [min(max(p, 0), size - 1) for p in positions]
    return [size - 1 - abs(size - 1 - abs(p)) for p in positions]  # reflect


def by_positions(builder: Builder, call: Call) -> Symbol:
    """Lower operators that choose positions axis by axis, by what they do to the numbers of the positions."""
    symbol = _operand(builder, call)
    _check_images(builder, call)
    rank = len(symbol.shape) + 1
    if len(call.shape) != rank - 1:
        builder.reject(call, "it changes the number of axes")
    # With as many images as in the capture: an index by arange(batch) chooses among them, too.
    sizes = (call.shapes[0][0], *symbol.shape)
    chosen_rows: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(sizes):
        numbers = torch.arange(size, dtype=torch.float32).reshape([-1 if a == axis else 1 for a in range(rank)])
        args = tuple(numbers.expand(sizes) if a is symbol else a for a in call.args)
        kwargs = {key: numbers.expand(sizes) if a is symbol else a for key, a in call.kwargs.items()}
        found = call.operator(*args, **kwargs).movedim(axis, 0).flatten(1)
        if found.shape[0] != call.shapes[0][axis] or not bool((found == found[:, :1]).all()):
            builder.reject(call, "it moves values from one axis to another")
        rows = [int(p) for p in found[:, 0]]
        if rows != list(range(size)):
            if axis == 0:
                builder.reject(call, "it moves the axis of the images")
            chosen_rows.append((axis, rows))

    def by_rows(codes: Codes) -> Codes:
        for axis, rows in chosen_rows:
            codes = chosen(builder, call, codes, axis, rows)
        return codes

    return moved(symbol, call.shape, by_rows)


def put(builder: Builder, call: Call) -> Symbol:
    """Lower the replacement of a slice (or one position) of a tensor of zeros, or of codes on the same grid."""
    base, source, axis = call.argument("self"), call.argument("src"), _axis(builder, call)
    _check_axis(builder, call, axis)
    size = call.shape[axis - 1]
    if call.name == "select_scatter":
        start = int(call.argument("index")) % size
        stop, step = start + 1, 1
    else:
        start, stop, step = slice(call.argument("start"), call.argument("end"), call.argument("step")).indices(size)
    if step != 1:
        builder.reject(call, f"it writes to every {step}th position")
    piece = builder.codes(call, source)
    piece = reshaped(builder, piece, _with(call.shape, axis, stop - start))
    if isinstance(base, Tensor):
        if bool(base.any()):
            builder.reject(call, "it writes into a constant that is not zero")
        before, after = [0] * (len(call.shape) + 1), [0] * (len(call.shape) + 1)
        before[axis], after[axis] = start, size - stop
        return padded(builder, piece, before, after)
    whole = builder.codes(call, base)
    if whole.grid != piece.grid:
        builder.reject(call, "it writes values of one grid into a tensor on another")
    parts = [sliced(builder, whole, axis, 0, start)] if start else []
    parts += [piece] + ([sliced(builder, whole, axis, stop, size)] if stop < size else [])
    return side_by_side(builder, parts, axis)


def same(builder: Builder, call: Call) -> Symbol:
    """Lower what returns its input: a copy, a dropout at rest, a conversion between types of floats."""
    return _operand(builder, call, "src") if call.name == "copy" else _operand(builder, call)


def _operand(builder: Builder, call: Call, name: str = "") -> Symbol:
    first = call.argument(name) if name else call.args[0]
    if isinstance(first, Tensor) or first is None:
        builder.reject(call, "it reads an activation as an index or size")
    return first  # type: ignore[no-any-return]


def _axis(builder: Builder, call: Call) -> int:
    rank = len(call.shapes[0]) + (1 if call.name in ("select", "unbind") else 0)
    return int(call.argument("dim") or 0) % rank


def _check_axis(builder: Builder, call: Call, axis: int) -> None:
    if axis == 0:
        builder.reject(call, "it works on the axis of the images")


def _check_images(builder: Builder, call: Call) -> None:
    first = call.shapes[0][0] if call.shapes[0] else 1
    if first % BATCH or (first != BATCH and not builder.float_trunk):
        builder.reject(call, "it mixes the images of a batch")


def _renamed(codes: Codes, name: str, shape: tuple[int, ...]) -> Codes:
    return Codes(name=name, shape=shape, grid=codes.grid, low=codes.low, high=codes.high)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[: axis - 1], size, *shape[axis:])


MOVES: dict[str, Callable[[Builder, Call], Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "squeeze", "unsqueeze", "reshape", "flatten", "unflatten"), view),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split"), split),
    **dict.fromkeys(("expand", "repeat"), repeat),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(
        ("upsample_nearest2d", "_upsample_nearest_exact2d", "index", "index_select", "flip", "roll"), by_positions
    ),
    **dict.fromkeys(("slice_scatter", "select_scatter"), put),
    **dict.fromkeys(
        ("clone", "alias", "detach", "_to_copy", "lift_fresh_copy", "contiguous", "dropout", "copy", "positive"), same
    ),
    "slice": slice_axis,
    "select": select,
}
"""Lowering of each operator by its name."""
