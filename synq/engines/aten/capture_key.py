"""What decides the graph that a student is captured as: its operations, modules and shapes, and no value of a tensor.

A run captures its student before any work, at each evaluation and at its export. Only weights and ranges differ then,
so that the graph of the first time serves again.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx, nn

_FIELDS = frozenset(nn.Module().__dict__)
"""Fields of every module: tensors and children, which are listed by name, and hooks."""
_STATELESS = frozenset(["", "torch", "_operator", "operator", "builtins", "math", "synq"])
"""Packages whose functions depend on their arguments alone; "" has those of C extensions, such as torch's own."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _UnknownValueError(Exception):
    """A module has an attribute of which equality cannot be decided."""


def capture_key(net: fx.GraphModule, input_size: tuple[int, int, int]) -> Hashable | None:
    """Return a key that is equal for networks whose captured graphs are equal; None if that cannot be decided.

    Args:
        net: The network whose quantizers are opaque operators.
        input_size: (C, H, W) of one image.
    """
    first: dict[int, str] = {}
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    shapes = tuple((name, t.shape, t.dtype, t.stride(), first.setdefault(id(t), name)) for name, t in tensors)
    try:
        modules = tuple((name, *_description(part)) for name, part in net.named_modules(remove_duplicate=False))
    except _UnknownValueError:
        return None
    return input_size, modules, shapes


def _description(module: nn.Module) -> tuple[Hashable, ...]:
    fields = vars(module)
    if module.training or any(value for name, value in fields.items() if name.endswith("_hooks")):
        raise _UnknownValueError
    if isinstance(module, fx.GraphModule):
        if "forward" in fields or not all(_is_stateless(node, module) for node in module.graph.nodes):
            raise _UnknownValueError
        functions = tuple(node.target for node in module.graph.nodes if node.op == "call_function")
        return "graph", module.code, functions
    own = ((name, value) for name, value in sorted(fields.items()) if name not in _FIELDS)
    kind: Any = type(module)
    return kind, tuple((name, _plain(value)) for name, value in own)


def _is_stateless(node: fx.Node, module: fx.GraphModule) -> bool:
    """Return whether a node depends on its arguments and on tensors alone, and on no variable of Python."""
    if node.op == "get_attr":
        owner: Any = module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return isinstance(owner, torch.Tensor)
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    home = (getattr(node.target, "__module__", None) or "").partition(".")[0]
    return home in _STATELESS


def _plain(value: Any) -> Hashable:
    if isinstance(value, float):
        return float, repr(value)  # 0.0 and -0.0 are equal, and two NaN are not
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_plain(one) for one in value)
    if isinstance(value, torch._ops.OpOverload):
        return value
    raise _UnknownValueError
