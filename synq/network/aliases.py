"""Tensors of a forward pass that share memory, so that an in-place operation on one of them changes the others.

y = x;  y += 1                          x is y
y = x.view(n, -1);  y.mul_(2)           x is y in another shape
y = x[:, :4];  y.add_(1)                a part of x is y
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from synq.network.op_traits import operation_name

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
"""Operations that keep the order of the values."""


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``x`` in which the part at ``index`` is ``value``; the result of ``x[index] = value``.

    Args:
        x: Any shape.
        index: What Python passes for the part: numbers, slices, tensors, or a tuple of them.
        value: A number, or a tensor that broadcasts to the part.
    """
    copy = x.clone()
    copy[index] = value
    return copy


class Aliases:
    """Memory of the values of a graph's nodes, recorded while the graph runs."""

    def __init__(self) -> None:
        # The weak references outlive the tensors, so that no later storage takes the same address.
        self._memory: dict[fx.Node, tuple[StorageWeakRef, int, tuple[int, ...], tuple[int, ...], int]] = {}

    def record(self, node: fx.Node, value: object) -> None:
        """Record the value of a node."""
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            size = storage.nbytes() // max(value.element_size(), 1)
            geometry = (tuple(value.shape), value.stride(), int(value.storage_offset()))
            self._memory[node] = (StorageWeakRef(storage), size, *geometry)

    def share(self, node: fx.Node, other: fx.Node) -> None:
        """Record that the value of a new node has the memory of another's."""
        if other in self._memory:
            self._memory[node] = self._memory[other]

    def sharing(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """Yield the other nodes with memory of ``node``, and whether they have all of it in the same arrangement."""
        if node not in self._memory:
            return
        storage, size, *geometry = self._memory[node]
        for other, (its_storage, _, *its_geometry) in self._memory.items():
            if other is node or its_storage.cdata != storage.cdata:
                continue
            if its_geometry == geometry:
                yield other, True
            elif self._overlap(size, geometry, its_geometry):
                yield other, False

    @staticmethod
    def _overlap(size: int, one: list[Any], two: list[Any]) -> bool:
        written = torch.zeros(size, dtype=torch.bool)
        written.as_strided(*one).fill_(True)
        return bool(written.as_strided(*two).any())


def read_result_instead(node: fx.Node, overwritten: fx.Node, aliases: Aliases) -> None:
    """Let the nodes after ``node`` read its result where they read a tensor that it overwrites.

    Args:
        node: An operation that was in place, and now returns a new tensor.
        overwritten: Its first argument.
        aliases: Memory of the graph's values.

    Raises:
        ValueError: If the new value of an overlapping tensor is unknown.
    """
    position = {other: number for number, other in enumerate(node.graph.nodes)}

    def replace(old: fx.Node, make: Callable[[], fx.Node]) -> None:
        later = [user for user in old.users if position[user] > position[node]]
        # ``x[index] += y`` writes the result into x itself, in a separate node.
        if not later or any(user.target is operator.setitem and user.args[2] is node for user in later):
            return
        new = make()
        aliases.share(new, old)
        for user in later:
            user.replace_input_with(old, new)

    if node.target is assigned:
        aliases.share(node, overwritten)
    replace(overwritten, lambda: node)
    for other, is_same in list(aliases.sharing(overwritten)):
        if position.get(other, len(position)) >= position[node]:  # later, or removed
            continue
        if is_same:
            replace(other, lambda: node)
        else:
            replace(other, lambda other=other: _after(node, overwritten, other))  # type: ignore[misc]


def _after(node: fx.Node, overwritten: fx.Node, other: fx.Node) -> fx.Node:
    """Return a new node with the value of ``other`` after ``overwritten``, computed from it, became ``node``."""
    graph = node.graph
    is_view = bool(overwritten.args) and overwritten.args[0] is other
    with graph.inserting_after(node):
        if is_view and overwritten.op == "call_function" and overwritten.target is operator.getitem:
            made = graph.call_function(assigned, (other, overwritten.args[1], node))
        elif is_view and operation_name(overwritten) in _RESHAPES:
            made = graph.call_method("view_as", (node, other))
        else:
            raise ValueError(
                f"teacher must not overwrite parts of a tensor that is read later, but node {node.name!r} works in "
                f"place on a part of {other.name!r}: write it as x = f(x)"
            )
    made.meta["shape"] = other.meta.get("shape")
    return made
