"""Normal form of a traced graph, so that no later rule depends on how a call was written.

conv(input=x)  F.relu(input=x)  torch.add(x, other=y)   positional: conv(x), relu(x), add(x, y)
x.relu_()  z += y  x[:, 0] = y                          out of place; later readers of x read the result
len(x)                                                  x.size(0)
x.view(-1, 8)  x.view_as(y)                             x.reshape(-1, 8): quantizers may change the memory layout
x.squeeze() of (N, C, 1, 1)                             x.squeeze((2, 3)): a single image keeps its axis
x.detach()  x.data, where all logits come through it    x: images and weights before it need their gradients
"""

import builtins
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from synq.network.aliases import Aliases, assigned, read_result_instead
from synq.network.op_traits import node_module, operation_name

_INPLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_FILLS: dict[str, Callable[..., Tensor]] = {"zero": torch.zeros_like, "fill": torch.full_like}


def to_normal_form(traced: fx.GraphModule, aliases: Aliases) -> None:
    """Rewrite a graph into its normal form, in place; it computes the same.

    Args:
        traced: A graph in evaluation mode whose nodes have shapes, for a batch of two, in ``meta["shape"]``.
        aliases: Memory of the values of its nodes.

    Raises:
        ValueError: If an in-place operation has no counterpart, or changes another tensor in an unknown way.
    """
    for node in traced.graph.nodes:
        _to_positions(traced, node)
        if node.op == "call_function" and node.target is builtins.len and node.args[0].meta.get("shape") is not None:
            node.op, node.target, node.args = "call_method", "size", (node.args[0], 0)
        _to_reshape(node)
    _to_out_of_place(traced, aliases)
    _drop_detached(traced)
    _drop_shape_assertions(traced)


def _to_reshape(node: fx.Node) -> None:
    """Make a view, which takes only some memory layouts, a reshape, which takes all."""
    if node.op == "call_method" and node.target == "view_as":
        node.target = "reshape_as"
    is_dtype = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    if node.op == "call_method" and node.target == "view" and not is_dtype:
        node.target, node.kwargs = "reshape", {{"size": "shape"}.get(key, key): v for key, v in node.kwargs.items()}


def keep_image_axis(traced: fx.GraphModule) -> None:
    """Let ``squeeze`` drop the axes of size one that it drops for a batch of two, in place.

    Without axes, or with the axis of the images among them, it drops that axis too where there is a single image.

    Args:
        traced: As for ``to_normal_form``.
    """
    for node in list(traced.graph.nodes):
        if operation_name(node) != "squeeze" or node.op not in ("call_method", "call_function"):
            continue
        source = node.args[0]
        shape = source.meta["shape"]
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = range(len(shape)) if given is None else (given,) if isinstance(given, int) else given
        kept = tuple(sorted({axis % len(shape) for axis in axes if shape[axis] == 1}))
        if kept:
            node.args, node.kwargs = (source, kept), {}
        else:
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()


def _to_positions(traced: fx.GraphModule, node: fx.Node) -> None:
    """Move tensors that are passed by keyword, and what precedes them, to their positions."""
    is_function = node.op == "call_function"
    by_keyword = {name for name, value in node.kwargs.items() if isinstance(value, fx.Node) and _is_tensor(value)}
    by_keyword |= {name for name, value in node.kwargs.items() if isinstance(value, list | tuple) and not node.args}
    if not by_keyword or not (is_function or node.op == "call_module"):
        return
    if is_function and node.args and not by_keyword & {"other", "tensor1", "tensor2"}:
        return  # the first tensor has its position; layers written as functions name their weights
    called: Any = node.target if is_function else node_module(traced, node).forward  # type: ignore[union-attr]
    for names in _parameter_lists(called):
        args, kwargs = list(node.args), dict(node.kwargs)
        for name in names[len(args) :]:
            if name not in kwargs or not by_keyword & kwargs.keys():
                break
            args.append(kwargs.pop(name))
        if not by_keyword & kwargs.keys():
            node.args, node.kwargs = tuple(args), kwargs
            return


def _is_tensor(node: fx.Node) -> bool:
    return node.meta.get("shape") is not None


def _parameter_lists(called: Callable[..., Any]) -> list[list[str]]:
    """Return the names of the parameters that may be passed by position, for each overload of a function."""
    try:
        signatures = [inspect.signature(called)]
    except ValueError:  # compiled in C++
        signatures = get_signature_for_torch_op(called) or []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [[p.name for p in signature.parameters.values() if p.kind in positional] for signature in signatures]


def _drop_detached(traced: fx.GraphModule) -> None:
    """Remove what returns an activation without its gradient, if no other way leads from it to the logits.

    The layers before it could not be fine-tuned, and no image could be synthesized through it.
    """
    image = next(node for node in traced.graph.nodes if node.op == "placeholder")
    activations = {image}
    for node in traced.graph.nodes:
        if not activations.isdisjoint(node.all_input_nodes):
            activations.add(node)
    detached = [node for node in traced.graph.nodes if node in activations and _is_detached(node)]
    for node in detached:
        if node.args[0] in activations and node.args[0] not in _with_gradient(traced):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_detached(node: fx.Node) -> bool:
    if not _is_tensor(node) or node.op not in ("call_function", "call_method"):
        return False
    name = operation_name(node)
    return name in ("detach", "detach_") or (name == "getattr" and node.args[1:] == ("data",))


def _with_gradient(traced: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes from which a way without a detached tensor leads to the output."""
    found: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if node.op == "output" or (node in found and not _is_detached(node)):
            found.update(node.all_input_nodes)
    return found


def _to_out_of_place(traced: fx.GraphModule, aliases: Aliases) -> None:
    # Collected first: a module that is called twice works in place at both calls.
    inplace_modules = {module for module in traced.modules() if getattr(module, "inplace", False)}
    for module in inplace_modules:
        module.inplace = False  # type: ignore[assignment]
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is operator.setitem and _is_tensor(node.args[0]):
            node.target, node.meta["shape"] = assigned, node.args[0].meta["shape"]
            read_result_instead(node, node.args[0], aliases)
        elif not _is_tensor(node):  # ``n += 1`` on a Python number rebinds a name, it overwrites nothing
            node.target = _INPLACE_OPERATORS.get(node.target, node.target)  # type: ignore[arg-type]
        elif _without_overwriting(traced, node, inplace_modules):
            overwritten = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(overwritten, fx.Node) and _is_tensor(overwritten):
                read_result_instead(node, overwritten, aliases)
    traced.graph.lint()
    traced.recompile()


def _without_overwriting(traced: fx.GraphModule, node: fx.Node, inplace_modules: set[Any]) -> bool:
    """Make ``node`` call an operation that overwrites nothing; return whether it overwrote its first argument."""
    name = operation_name(node)
    ends_in_place = name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return node_module(traced, node) in inplace_modules
    if node.op == "call_function" and _inplace_position(node) is not None:
        position = _inplace_position(node)
        node.args = tuple(False if number == position else value for number, value in enumerate(node.args))
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        node.target = _INPLACE_OPERATORS[node.target]
        return True
    if name == "copy_" and node.op == "call_method":
        source: Any = node.args[1] if len(node.args) > 1 else node.kwargs["src"]
        whole: Any = ...
        node.op, node.target, node.args, node.kwargs = "call_function", assigned, (node.args[0], whole, source), {}
        return True
    if ends_in_place and name[:-1] in _FILLS:
        node.op, node.target = "call_function", _FILLS[name[:-1]]
        return True
    if node.op == "call_function" and ends_in_place:
        target = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        if target is None:
            raise ValueError(f"teacher must use known operations, but {node.name} calls {name}()")
        node.target = target
        return True
    if node.op == "call_method" and ends_in_place:
        if not hasattr(Tensor, name[:-1]):
            raise ValueError(f"teacher must use known operations, but {node.name} calls .{name}()")
        node.target = name[:-1]
        return True
    return False


def _inplace_position(node: fx.Node) -> int | None:
    """Return the position of a true argument ``inplace`` of a function, as in ``F.relu(x, True)``; None without one."""
    if not any(value is True for value in node.args):
        return None
    for names in _parameter_lists(node.target):  # type: ignore[arg-type]
        if "inplace" in names[: len(node.args)] and node.args[names.index("inplace")] is True:
            return names.index("inplace")
    return None


def _drop_shape_assertions(traced: fx.GraphModule) -> None:
    """Remove assertions about shapes: they passed for this input size, and each would count as a user of its tensor."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            condition = node.args[0] if node.args else None
            if not isinstance(condition, fx.Node) or condition.meta.get("shape") is None:
                traced.graph.erase_node(node)
