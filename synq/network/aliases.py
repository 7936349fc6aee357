"""Tensors of a forward pass that share memory, so that an in-place operation on one of them changes the others.

y = x;  y += 1                          x is y
y = x.view(n, -1);  y.mul_(2)           x is y in another shape
y = x[:, :4];  y.add_(1)                a part of x is y
y = x.transpose(1, 2)[0];  y.add_(1)    so is this one; z = x.mT, taken before, changes too
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from synq.network.op_traits import operation_name

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and offset of a tensor in its memory."""
Place = tuple[int, torch.dtype, Geometry]
"""A tensor's memory, its type, and where in it the tensor is: the nodes of one place are names of one tensor."""
_SWAPS, _MOVES = ("transpose", "swapaxes", "swapdims", "t", "mT", "T"), ("movedim", "moveaxis")
_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")


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
        self._memory: dict[fx.Node, tuple[StorageWeakRef, torch.dtype, Geometry]] = {}
        self._newest: dict[Place, fx.Node | None] = {}

    def record(self, node: fx.Node, value: object) -> None:
        """Record the value of a node."""
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            geometry = (tuple(value.shape), value.stride(), int(value.storage_offset()))
            self._memory[node] = (StorageWeakRef(storage), value.dtype, geometry)

    def place(self, node: fx.Node) -> Place | None:
        """Return the memory of a node; None if it has none, as the tuple of parts that ``chunk`` returns."""
        if node not in self._memory:
            return None
        storage, dtype, geometry = self._memory[node]
        return storage.cdata, dtype, geometry

    def replace(self, old: fx.Node, new: fx.Node | None) -> None:
        """Record that what was ``old`` is now ``new``, None if that is not known."""
        place = self.place(old)
        if place is not None:
            self._newest[place] = new
            if new is not None:
                self._memory[new] = self._memory[old]

    def newest(self, node: fx.Node) -> fx.Node | None:
        """Return the node that has the present value of a place, by any node that had an earlier one."""
        place = self.place(node)
        return node if place is None else self._newest.get(place, node)

    def sharing(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """Yield the other nodes with memory of ``node``, and whether they have all of it in the same arrangement."""
        place = self.place(node)
        for other in list(self._memory):
            its_place = self.place(other)
            if other is node or place is None or its_place is None or its_place[0] != place[0]:
                continue
            if its_place == place:
                yield other, True
            elif _overlap(_touched(place), _touched(its_place)):
                yield other, False

    def view_of(self, place: Place) -> tuple[fx.Node, fx.Node] | None:
        """Return the first node that took a place as a view of another one, and that other; None for a whole tensor."""
        for node in self._memory:
            if self.place(node) != place or not node.args or not isinstance(node.args[0], fx.Node):
                continue
            source = node.args[0]
            if self.place(source) is None and source.args and isinstance(source.args[0], fx.Node):
                source = source.args[0]  # the tensor that was split into parts
            its_place = self.place(source)
            if its_place is not None and its_place != place and its_place[0] == place[0]:
                return node, source
        return None

    def in_one_order(self, one: fx.Node, two: fx.Node) -> bool:
        """Return whether two nodes in the same memory have the same values in the same order, in any two shapes."""
        found = [self.place(node) for node in (one, two)]
        assert found[0] is not None and found[1] is not None
        return found[0][1] is found[1][1] and torch.equal(_elements(found[0][2]), _elements(found[1][2]))


def _elements(geometry: Geometry) -> Tensor:
    """Return the positions in memory of the values of a tensor, in order."""
    shape, strides, offset = geometry
    axes = [torch.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
    positions = torch.tensor(offset)
    for axis in axes:
        positions = positions.unsqueeze(-1) + axis
    return positions.flatten()


def _touched(place: Place) -> Tensor:
    """Return which bytes of its memory a tensor has, up to its last one."""
    _, dtype, geometry = place
    elements = _elements(geometry)
    touched = torch.zeros(int(elements.max()) + 1 if len(elements) else 0, dtype.itemsize, dtype=torch.bool)
    touched[elements] = True
    return touched.flatten()


def _overlap(one: Tensor, two: Tensor) -> bool:
    length = min(len(one), len(two))
    return bool((one[:length] & two[:length]).any())


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

    def replace(old: fx.Node, new: fx.Node | None) -> None:
        later = [user for user in old.users if position.get(user, -1) > position[node]]
        # ``x[index] += y`` writes the result into x itself, in a separate node.
        if any(user.target is operator.setitem and user.args[2] is node for user in later):
            return
        if later and new is None:
            raise ValueError(
                f"teacher must not overwrite parts of a tensor that is read later, but node {node.name!r} works in "
                f"place on a part of {old.name!r}: write it as x = f(x)"
            )
        aliases.replace(old, new)
        for user in later:
            assert new is not None
            user.replace_input_with(old, new)

    earlier = [
        (o, same) for o, same in aliases.sharing(overwritten) if position.get(o, position[node]) < position[node]
    ]
    views = _Views(node, overwritten, aliases)
    results = [(other, node if same else views.value(other)) for other, same in earlier]
    for other, new in [(overwritten, node), *results]:
        replace(other, new)


class _Views:
    """Values of the tensors that share memory with one that was overwritten, as new nodes of the graph after it."""

    def __init__(self, node: fx.Node, overwritten: fx.Node, aliases: Aliases) -> None:
        self.aliases, self.graph, self.last = aliases, node.graph, node
        self.made: dict[Place | fx.Node, fx.Node | None] = {}
        self.way: dict[Place, tuple[fx.Node, fx.Node]] = {}
        """For each place that the overwritten one is a view of: the view of it on the way, and what it is taken of."""
        place = aliases.place(overwritten)
        if place is not None:
            self.made[place] = node
        view = aliases.view_of(place) if place is not None else None
        while view is not None:
            above = aliases.place(view[1])
            assert above is not None
            if above in self.way or above == aliases.place(overwritten):
                break
            self.way[above] = view
            view = aliases.view_of(above)

    def value(self, other: fx.Node) -> fx.Node | None:
        """Return a node with the value of ``other`` now; None if it cannot be written with known operations."""
        place = self.aliases.place(other)
        assert place is not None
        if place not in self.made:
            self.made[place] = None
            self.made[place] = self._above(other, *self.way[place]) if place in self.way else self._below(other, place)
        return self.made[place]

    def _above(self, other: fx.Node, view: fx.Node, source: fx.Node) -> fx.Node | None:
        """Return ``other``, of which a view was overwritten: the view is put back into it."""
        part, old = self.value(view), self.aliases.newest(other)
        if part is None or old is None:
            return None
        if self.aliases.in_one_order(view, source):
            return self._add("call_method", "reshape_as", (part, old), other)
        given: tuple[Any, ...] = (*view.args[1:], *view.kwargs.values())
        name = str(view.args[1]) if operation_name(view) == "getattr" else operation_name(view)
        if name in _SWAPS:
            axes = {"t": (0, 1), "mT": (-2, -1), "T": (0, 1)}.get(name, given)
            return self._add("call_method", "transpose", (part, *axes), other)
        if name == "permute":
            dims = given[0] if isinstance(given[0], list | tuple) else given
            inverse = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
            return self._add("call_method", "permute", (part, *inverse), other)
        if name in _MOVES and "source" not in view.kwargs:
            return self._add("call_method", "movedim", (part, given[1], given[0]), other)
        if name == "diagonal":
            return self._add("call_function", torch.diagonal_scatter, (old, part, *view.args[1:]), other, view.kwargs)
        index = self._index(view, source)
        return None if index is None else self._add("call_function", assigned, (old, index, part), other)

    def _index(self, view: fx.Node, source: fx.Node) -> Any:
        """Return the index of a view, which takes a range or a position of one axis; None if it is not known."""
        parts = view.args[0]
        if view.target is operator.getitem and parts is source:
            return view.args[1]
        call = view if parts is source else parts
        assert isinstance(call, fx.Node)
        number = {"select": 0, "narrow": 0, "unbind": 0, **dict.fromkeys(_SPLITS, 1)}.get(operation_name(call))
        if number is None:
            return None
        axis = call.kwargs.get("dim", call.args[number + 1] if len(call.args) > number + 1 else 0)
        found = [self.aliases.place(node) for node in (source, view)]
        assert found[0] is not None and found[1] is not None
        (shape, strides, begin), (its_shape, _, its_begin) = (place[2] for place in found if place is not None)
        axis = axis % len(shape) if isinstance(axis, int) else 0
        if axis == 0:  # the number of images is not known
            return None
        first = (its_begin - begin) // strides[axis]
        one = operation_name(call) in ("select", "unbind")
        return (*(slice(None),) * axis, first if one else slice(first, first + its_shape[axis]))

    def _below(self, other: fx.Node, place: Place) -> fx.Node | None:
        """Return ``other``, a view of a tensor of which another view was overwritten: it is taken again."""
        view = self.aliases.view_of(place)
        if view is None:
            return None
        (taken, source), whole = view, self.value(view[1])
        if whole is None:
            return None
        parts = taken.args[0]
        assert isinstance(parts, fx.Node)
        if parts is not source:
            if parts not in self.made:
                self.made[parts] = self._add(parts.op, parts.target, (whole, *parts.args[1:]), parts, parts.kwargs)
            split = self.made[parts]
            assert split is not None
            whole = split
        return self._add(taken.op, taken.target, (whole, *taken.args[1:]), other, taken.kwargs)

    def _add(self, op: str, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: Any = None) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.create_node(op, target, args, dict(kwargs or {}))
        self.last.meta["shape"] = like.meta.get("shape")
        return self.last
