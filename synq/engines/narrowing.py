"""Linear layers without the features that nothing reads, and short ways from a layer to the axes that its reader wants.

Attention computes query, key and value as one linear layer and takes a third of its features each, on a grid of its
own. A program has one layer for each of them: with only the features that are read, after them at most one `Reshape`
and one `Transpose`, whatever the network writes in between.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from synq.engines.program import Dense, Grid, Reshape, Slice, Step, Transpose
from synq.engines.simulation import moved

Shapes = dict[str, tuple[int, ...]]


def narrowed(
    steps: list[Step], shapes: Mapping[str, tuple[int, ...]], grids: Mapping[str, Grid]
) -> tuple[list[Step], Shapes, dict[str, Grid]]:
    """Return steps whose linear layers have only the features that are read, and shapes and grids of all values.

    A layer changes if all that reads it are movements, one after the other, that choose some of its features.

    Args:
        steps: In order of execution.
        shapes: Of each value, without N.
        grids: Of each value with codes.
    """
    result, found, on_grid = list(steps), dict(shapes), dict(grids)
    for layer in [step for step in steps if isinstance(step, Dense)]:
        moves = _moves_after(layer, result)
        for count in range(len(moves), 0, -1):
            if (new := _replaced(layer, moves[:count], found)) is not None:
                dropped = [layer.output, *(move.output for move in moves[:count])]
                for name in dropped:
                    found.pop(name)
                for step, shape in new:
                    found[step.output] = shape
                    if layer.output in grids:
                        on_grid[step.output] = grids[layer.output]
                place = result.index(layer)
                kept = [step for step in result if step is not layer and step not in moves[:count]]
                result = [*kept[:place], *(step for step, _ in new), *kept[place:]]
                break
    return result, found, on_grid


def _moves_after(layer: Dense, steps: list[Step]) -> list[Step]:
    moves: list[Step] = []
    value = layer.output
    while True:
        readers = [step for step in steps if value in step.inputs]
        if len(readers) != 1 or not isinstance(readers[0], Reshape | Slice | Transpose):
            return moves
        moves.append(readers[0])
        value = readers[0].output


def _replaced(
    layer: Dense, moves: list[Step], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Step, tuple[int, ...]]] | None:
    """Return a layer with fewer features and the movements after it, with their shapes; None if that is no change."""
    if not any(isinstance(move, Slice) for move in moves):
        return None
    shape = shapes[layer.output]
    features = shape[-1]
    positions = torch.arange(int(torch.tensor(shape).prod())).reshape(1, *shape)
    for move in moves:
        assert isinstance(move, Reshape | Slice | Transpose)
        positions = moved(move, positions, None)
    positions = positions[0]
    read = (positions % features).unique()
    first, count = int(read[0]), len(read)
    if count == features or int(read[-1]) - first + 1 != count:
        return None
    positions = positions // features * count + positions % features - first
    view = _as_view(positions, (*shape[:-1], count))
    if view is None:
        return None
    last = moves[-1].output
    rows = slice(first, first + count)
    parts = {"weight": layer.weight[rows], "weight_scale": layer.weight_scale[rows], "bias": layer.bias[rows]}
    made, final = (*shape[:-1], count), tuple(positions.shape)
    whole, axes = view
    if whole == made == final:
        return [(replace(layer, **parts, output=last), final)]  # type: ignore[arg-type]
    steps: list[tuple[Step, tuple[int, ...]]] = [(replace(layer, **parts), made)]  # type: ignore[arg-type]
    turned = axes != tuple(range(len(axes)))
    name = layer.output
    if whole != made:
        output = f"{layer.output}.view" if turned else last
        steps.append((Reshape(inputs=(name,), output=output, layer=layer.layer, shape=whole), whole))
        name = output
    if turned:
        order = (0, *(axis + 1 for axis in axes))
        steps.append((Transpose(inputs=(name,), output=last, layer=layer.layer, axes=order), final))
    return steps


def _as_view(positions: Tensor, source: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the shape and the order of axes by which a tensor becomes another with the same values; None if it cannot.

    Args:
        positions: At each position of the other tensor the flat position in the tensor.
        source: Shape of the tensor.
    """
    strides = []
    for axis, size in enumerate(positions.shape):
        steps = positions.diff(dim=axis).unique() if size > 1 else torch.tensor([0])
        if len(steps) != 1:
            return None
        strides.append(int(steps[0]))
    if int(positions.flatten()[0]) != 0 or positions.numel() != int(torch.tensor(source).prod()):
        return None
    # An axis of one position may be anywhere: in front of the next one, so that the order stays.
    for axis in range(len(strides) - 1, -1, -1):
        if positions.shape[axis] == 1:
            after = axis + 1 < len(strides)
            strides[axis] = strides[axis + 1] * positions.shape[axis + 1] if after else 1
    order = sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))
    whole = tuple(positions.shape[axis] for axis in order)
    ends = [strides[axis] for axis in order]
    dense = all(large == small * size for (large, small), size in zip(pairwise(ends), whole[1:], strict=True))
    if not dense or ends[-1] != 1:
        return None
    return whole, tuple(order.index(axis) for axis in range(len(order)))
