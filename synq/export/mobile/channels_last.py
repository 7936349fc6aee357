"""Memory order of values in engines that keep the channels last.

A value (N, C, H, W) is kept as (N, H, W, C). One with more axes, such as the groups (N, G, C / G, H, W) of a channel
shuffle, likewise has its last two axes after N: (N, H, W, G, C / G), so that splitting and joining channels moves no
data. Values of up to three axes are kept in the order of the network.
"""

from math import prod

Shape = tuple[int, ...]
Moves = list[tuple[str, Shape]]
"""Operations in order: ("reshape", shape with -1 for N) or ("transpose", permutation of the axes in memory)."""


def memory_axes(rank: int) -> tuple[int, ...]:
    """Return the network's axes in the order of memory; N is axis 0.

    Args:
        rank: Number of axes, N included. Of 4 axes: (0, 2, 3, 1).
    """
    return tuple(range(rank)) if rank < 4 else (0, rank - 2, rank - 1, *range(1, rank - 2))


def memory_shape(shape: Shape) -> Shape:
    """Return the shape in memory of a value whose shape in the network is ``shape``, both without N."""
    return tuple(shape[axis - 1] for axis in memory_axes(len(shape) + 1)[1:])


def memory_axis(axis: int, rank: int) -> int:
    """Return where the network's axis ``axis`` is in memory, of a value of ``rank`` axes, N included."""
    return memory_axes(rank).index(axis)


def reshape_moves(source: Shape, target: Shape) -> Moves:
    """Return what makes a value of shape ``source`` one of ``target`` with its elements in the network's order.

    Args:
        source: Shape in the network, without N.
        target: New shape in the network, without N, of as many elements.

    Example:
        (8, 2, 2) -> (32,) is a transposition to (N, C, H, W) and a reshape; (8, 1, 1) -> (8,) is a reshape only.
    """
    if len(source) >= 3 and len(target) >= 3 and source[-2:] == target[-2:]:
        return [("reshape", (-1, *memory_shape(target)))]
    kept = memory_axes(len(source) + 1)
    back = tuple(kept.index(axis) for axis in range(len(kept)))
    moves: Moves = [] if _keeps_order(memory_shape(source), back) else [("transpose", back)]
    order = memory_axes(len(target) + 1)
    if _keeps_order(target, order):
        return [*moves, ("reshape", (-1, *memory_shape(target)))]
    return [*moves, ("reshape", (-1, *target)), ("transpose", order)]


def transpose_moves(source: Shape, axes: tuple[int, ...]) -> Moves:
    """Return what puts the network's axes of a value of shape ``source`` (without N) into the order ``axes``.

    Args:
        source: Shape in the network, without N.
        axes: Permutation of the network's axes, ``axes[0]`` is 0.
    """
    kept = memory_axes(len(axes))
    target = tuple(source[axis - 1] for axis in axes[1:])
    order = tuple(kept.index(axes[axis]) for axis in kept)
    if order == tuple(range(len(order))):
        return []
    if _keeps_order(memory_shape(source), order):
        return [("reshape", (-1, *memory_shape(target)))]
    return [("transpose", order)]


def _keeps_order(shape: Shape, order: tuple[int, ...]) -> bool:
    """Whether a permutation moves axes of size 1 only. N, of unknown size, must stay first."""
    moved = [axis for axis in order if axis == 0 or shape[axis - 1] != 1]
    return moved == sorted(moved) and prod(shape) > 0
