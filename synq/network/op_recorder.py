"""Recording of what every node of a traced network does: the operators that it executes, reduced to its traits."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synq.network.aten_groups import EMPTY
from synq.network.aten_traits import OperatorCall, in_sequence, operator_traits
from synq.network.op_traits import TRAITS, OpKind, OpTraits, node_module, traits_of

_UNCHANGED = OpTraits(kind=OpKind.PASSIVE, keeps_values=True, elementwise=True, positively_homogeneous=True)
"""Traits of a tensor that a node reads, before an operator is applied to it."""


@torch.no_grad()
def record_traits(traced: fx.GraphModule, sample: Tensor) -> None:
    """Run a network once, and store the traits of every operation in the ``meta`` of its node.

    Nodes that a quantizer may follow get a name that no method of a module has (``x.cpu()`` is ``cpu_1``), because the
    quantizer is registered under it.

    Args:
        traced: A graph in evaluation mode, without in-place operations.
        sample: (N, C, H, W) images with N >= 2.
    """
    _Recorder(traced).run(sample)
    for node in traced.graph.nodes:
        read_by_layer = any(traits_of(user).kind is OpKind.LAYER for user in node.users)
        if hasattr(nn.Module, node.name) and (read_by_layer or traits_of(node).kind > OpKind.PASSIVE):
            node._rename(f"{node.name}_1")
    traced.recompile()


class _Recorder(fx.Interpreter):
    """Run a graph node by node, following which tensors depend on the image, and how."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        # Tensors of tuples that a node returned: what was done to a part is known to the node that takes it out.
        self.parts: dict[fx.Node, dict[int, tuple[Tensor, OpTraits]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call_"):
            return super().run_node(n)
        mode = _OperatorMode()
        for position, source in enumerate(n.all_input_nodes):
            if source.op != "placeholder" and (TRAITS not in source.meta or not _depends(source)):
                mode.add_constants(self.env[source])
                continue
            parts = self.parts.get(source, {})
            for tensor in _tensors(self.env[source]):
                _, traits = parts.get(id(tensor), (tensor, _of_dtype(tensor, _UNCHANGED)))
                mode.add_activation(tensor, replace(traits, reads=(position,)))
        mode.add_constants((n.args, n.kwargs))
        with mode:
            value = super().run_node(n)
        assert isinstance(self.module, fx.GraphModule)
        n.meta[TRAITS] = self._traits(node_module(self.module, n), mode, value)
        if not isinstance(value, Tensor):
            self.parts[n] = {id(t): (t, mode.known[id(t)]) for t in _tensors(value) if id(t) in mode.known}
        return value

    def _traits(self, module: nn.Module | None, mode: "_OperatorMode", value: Any) -> OpTraits:
        if mode.rejected is not None and value is not None:  # an assertion on values returns nothing
            return mode.rejected
        outputs = [mode.traits_of(tensor) for tensor in _tensors(value)]
        if not outputs:
            return OpTraits(kind=OpKind.NUMBER)
        reads = tuple(sorted({position for traits in outputs for position in traits.reads}))
        kind = max(traits.kind for traits in outputs)
        if kind > OpKind.SELECTOR and isinstance(module, nn.Conv2d | nn.Linear):
            return OpTraits(kind=OpKind.LAYER, reads=reads)
        if kind > OpKind.SELECTOR and isinstance(module, _BatchNorm):
            return OpTraits(kind=OpKind.NORM, reads=reads)
        if isinstance(value, Tensor):
            return outputs[0]
        # A tuple is no activation: what was done to its parts is seen where they are taken out.
        unknown = next((traits for traits in outputs if traits.kind is OpKind.UNKNOWN), None)
        values = [traits for traits in outputs if traits.kind > OpKind.SELECTOR]
        keeps_values = bool(values) and all(traits.keeps_values for traits in values)
        return unknown or OpTraits(kind=min(kind, OpKind.STRUCTURAL), reads=reads, keeps_values=keeps_values)


class _OperatorMode(TorchDispatchMode):
    """Follow, within one node, what the executed operators do to the tensors that depend on the image."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: to keep torch.compile out, PyTorch would import it here, which takes many seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, OpTraits] = {}
        self.rejected: OpTraits | None = None
        self._constants: set[int] = set()
        self._empty: set[int] = set()  # tensors without content yet, and views of them
        self._alive: list[Tensor] = []  # an identity is unique only while its tensor exists

    def add_activation(self, tensor: Tensor, traits: OpTraits) -> None:
        """Follow a tensor that depends on the image."""
        self._alive.append(tensor)
        self.known[id(tensor)] = traits

    def add_constants(self, value: Any) -> None:
        """Take note of the tensors in ``value`` that do not."""
        self._alive += _tensors(value)
        self._constants.update(id(tensor) for tensor in _tensors(value) if id(tensor) not in self.known)

    def traits_of(self, tensor: Tensor) -> OpTraits:
        """Return the traits of the operators between the inputs of the node and one of its tensors."""
        if id(tensor) in self.known:
            return self.known[id(tensor)]
        if id(tensor) in self._constants or not self.known or isinstance(tensor, nn.Parameter):
            return OpTraits(kind=OpKind.CONSTANT)
        return OpTraits(kind=OpKind.UNKNOWN, reason="it computes a tensor without an operator of PyTorch")

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute an operator, and record it."""
        blank = self._blank_storages(func, args, kwargs or {})
        outputs = func(*args, **(kwargs or {}))
        activations = frozenset(id(t) for t in _tensors((args, kwargs)) if id(t) in self.known)
        call = OperatorCall(operator=func, args=args, kwargs=kwargs or {}, outputs=outputs, activations=activations)
        if call.is_random:
            self.rejected = OpTraits(kind=OpKind.UNKNOWN, reason="it draws random numbers")
        changed = [*_tensors(outputs), *call.written()]
        if call.name in EMPTY or (func.is_view and any(id(t) in self._empty for t in call.tensors())):
            self._empty.update(id(tensor) for tensor in changed)
        if not activations:
            self.add_constants(changed)
            return outputs
        inputs = [self.known[id(tensor)] for tensor in call.tensors() if id(tensor) in activations]
        traits = in_sequence(inputs, operator_traits(call))
        second = in_sequence(inputs, operator_traits(call, 1)) if len(changed) > 1 else traits
        if not changed and traits.kind is OpKind.UNKNOWN:  # the image's values leave as numbers
            self.rejected = traits
        values = [part for part in inputs if part.kind is not OpKind.SELECTOR] or inputs
        reads = tuple(sorted({position for part in values for position in part.reads}))
        for position, tensor in enumerate(changed):
            if traits.kind is OpKind.CONSTANT:
                self.known.pop(id(tensor), None)
                self.add_constants(tensor)
            else:
                self.add_activation(
                    tensor, _of_dtype(tensor, replace(second if position == 1 else traits, reads=reads))
                )
        for tensor in call.written():
            self._written_through(tensor, blank)
        return outputs

    def _blank_storages(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        """Return the storages that an operator will overwrite and that hold zeros, or nothing yet."""
        if not func._schema.is_mutable:
            return set()
        call = OperatorCall(operator=func, args=args, kwargs=kwargs, outputs=None, activations=frozenset())
        written = {tensor.untyped_storage().data_ptr() for tensor in call.written()}
        held = [t for t in self._alive if t.untyped_storage().data_ptr() in written and id(t) not in self.known]
        filled = {t.untyped_storage().data_ptr() for t in held if id(t) not in self._empty and bool(t.any())}
        return written - filled

    def _written_through(self, part: Tensor, blank: set[int]) -> None:
        """Take note that the tensors of which ``part`` is a view contain what was written to it."""
        storage = part.untyped_storage().data_ptr()
        for tensor in list(self._alive):
            if tensor is part or id(part) not in self.known or tensor.untyped_storage().data_ptr() != storage:
                continue
            inside = [self.known[id(t)] for t in (tensor, part) if id(t) in self.known]
            keeps_values = id(tensor) in self.known or storage in blank
            traits = in_sequence(inside, OpTraits(kind=OpKind.STRUCTURAL, keeps_values=keeps_values))
            reads = tuple(sorted({position for held in inside for position in held.reads}))
            self.add_activation(tensor, _of_dtype(tensor, replace(traits, reads=reads)))


def _of_dtype(tensor: Tensor, traits: OpTraits) -> OpTraits:
    """Return the traits of a tensor: what is not floating point is a mask or an index."""
    if tensor.dtype.is_floating_point or traits.kind is OpKind.UNKNOWN:
        return traits
    return OpTraits(kind=OpKind.SELECTOR, operators=traits.operators, reads=traits.reads)


def _depends(source: fx.Node) -> bool:
    traits = source.meta[TRAITS]
    assert isinstance(traits, OpTraits)
    return traits.kind not in (OpKind.CONSTANT, OpKind.NUMBER)


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in tree_leaves(value) if isinstance(part, Tensor)]
