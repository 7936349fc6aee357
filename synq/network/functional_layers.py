"""Rewriting of functional calls on the parameters of one module (``F.conv2d(x, self.weight)``) as layers.

timm writes its batch norms this way, with the activation inside the module, and convolutions with TensorFlow's padding
are usually written this way:

    bn: weight, bias, running_mean, running_var, act       F.batch_norm(x, bn.running_mean, ...), then bn.act
 -> bn: nn.BatchNorm2d with the same tensors, and act      bn(x), then bn.act
    conv: weight, bias, static_padding                     conv.static_padding(x), then F.conv2d(x, conv.weight, ...)
 -> conv: nn.Conv2d with the same tensors, static_padding  conv.static_padding(x), then conv(x)
    conv: weight, gain                                     F.conv2d(x, standardized(conv.weight) * conv.gain, ...)
 -> conv2d_layer: nn.Conv2d with the computed weight       conv2d_layer(x)

A weight or bias that the forward pass computes from parameters alone (weight standardization, a bias in parts) is the
same for every image. Its value becomes the parameter of the layer, as if it had been stored that way.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.op_traits import node_value

STATISTICS, AFFINE = ("running_mean", "running_var"), ("weight", "bias")
_SIGNATURES = {F.batch_norm: inspect.signature(F.batch_norm)}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def functions_as_layers(traced: fx.GraphModule) -> None:
    """Rewrite ``F.batch_norm``, ``F.conv2d`` and ``F.linear`` on the tensors of one module as a layer, in place.

    The layer has the module's name and the same tensors under the same names, so weight files still fit. Calls that
    leave out one of the tensors, or take some from another module, are not rewritten.

    Args:
        traced: A graph in evaluation mode whose nodes have shapes in ``meta["shape"]``.
    """
    of_images: set[fx.Node] = set()
    for node in list(traced.graph.nodes):
        if node.op == "placeholder" or any(source in of_images for source in node.all_input_nodes):
            of_images.add(node)
        if node.op != "call_function" or node not in of_images:
            continue
        if node.target is F.batch_norm:
            _norm_as_layer(traced, node)
        elif node.target in (F.conv2d, F.linear):
            _product_as_layer(traced, node)
            if node.op == "call_function":
                _computed_as_layer(traced, node, of_images)


def replace_layer(net: fx.GraphModule, name: str, layer: nn.Module) -> None:
    """Replace the submodule ``name`` by ``layer``; children of the old one that the graph calls move to the new one."""
    called = [f"{node.target}." for node in net.graph.nodes if node.op in ("call_module", "get_attr")]
    for child_name, child in net.get_submodule(name).named_children():
        if any(target.startswith(f"{name}.{child_name}.") for target in called):
            layer.add_module(child_name, child)
    net.set_submodule(name, layer)


def bare_holder(module: nn.Module) -> nn.Module:
    """Return a module with the submodules of ``module`` and without its tensors."""
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    return holder


def _norm_as_layer(traced: fx.GraphModule, node: fx.Node) -> None:
    if len(node.meta.get("shape") or ()) != 4:
        return
    bound = _SIGNATURES[F.batch_norm].bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    call = bound.arguments
    name = _owner({field: call[field] for field in (*STATISTICS, *AFFINE)})
    if call["training"] or name is None:
        return
    holder = traced.get_submodule(name)
    if not _holds(holder, _given(call), STATISTICS):
        return
    if type(holder) is nn.Module:  # made by torch.fx for the tensors and the submodules that the graph uses
        variance = holder.get_buffer("running_var")
        norm = nn.BatchNorm2d(
            len(variance), eps=call["eps"], affine=False, device=variance.device, dtype=variance.dtype
        )
        norm.affine = bool(holder._parameters)
        replace_layer(traced, name, _filled(norm, holder))
    elif not isinstance(holder, nn.BatchNorm2d) or holder.eps != call["eps"]:
        return
    _call_layer(node, name, call["input"])


def _product_as_layer(traced: fx.GraphModule, node: fx.Node) -> None:
    """Rewrite a convolution or linear product if its weight and bias are all the tensors of one module."""
    call: dict[str, Any] = {**_CONV_DEFAULTS, **dict(zip(_CONV_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    name = _owner({field: call[field] for field in AFFINE})
    if name is None:
        return
    holder = traced.get_submodule(name)
    settings = [call[key] for key in ("stride", "padding", "dilation", "groups")]
    tensors = {field for field, _ in (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False))}
    plain = (
        _holds(holder, _given(call), ())
        and tensors == _given(call)
        and not any(isinstance(v, fx.Node) for v in settings)
    )
    if not plain or holder.get_parameter("weight").dim() != (4 if node.target is F.conv2d else 2):
        return
    made = _conv_of(holder, call) if node.target is F.conv2d else _linear_of(holder)
    if type(holder) is nn.Module:
        replace_layer(traced, name, _filled(made, holder))
    elif repr(holder) != repr(made):  # a layer since an earlier call, which had other settings
        return
    _call_layer(node, name, call["input"])


@torch.no_grad()
def _computed_as_layer(traced: fx.GraphModule, node: fx.Node, of_images: set[fx.Node]) -> None:
    """Rewrite a convolution or linear product whose weight or bias is computed from parameters alone."""
    call: dict[str, Any] = {**_CONV_DEFAULTS, **dict(zip(_CONV_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    sources = {field: call[field] for field in AFFINE if call[field] is not None}
    computed = [source for source in sources.values() if isinstance(source, fx.Node) and source.op != "get_attr"]
    known = all(isinstance(source, fx.Node) and source not in of_images for source in sources.values())
    settings = [call[key] for key in ("stride", "padding", "dilation", "groups")]
    if not computed or not known or any(isinstance(value, fx.Node) for value in settings):
        return
    values = _Constants(traced)
    holder = nn.Module()
    needs_gradient = any(p.requires_grad for p in traced.parameters())
    for field, source in sources.items():
        value = values.of(source)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        holder.register_parameter(field, nn.Parameter(value.detach().clone(), requires_grad=needs_gradient))
    if holder.get_parameter("weight").dim() != (4 if node.target is F.conv2d else 2):
        return
    made = _conv_of(holder, call) if node.target is F.conv2d else _linear_of(holder)
    name = f"{node.name}_layer"
    traced.add_submodule(name, _filled(made, holder))
    _call_layer(node, name, call["input"])


class _Constants:
    """Values of the nodes of a graph that depend on parameters alone."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node, computing those before it."""
        pending = [node]
        while pending:
            last = pending[-1]
            missing = [source for source in last.all_input_nodes if source not in self.values]
            if missing:
                pending += missing
                continue
            pending.pop()
            if last not in self.values:
                self.values[last] = node_value(self.traced, last, self.values)
        return self.values[node]


def _conv_of(holder: nn.Module, call: dict[str, Any]) -> nn.Conv2d:
    weight, groups = holder.get_parameter("weight"), call["groups"]
    return nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=call["stride"],
        padding=call["padding"],
        dilation=call["dilation"],
        groups=groups,
        bias=holder._parameters.get("bias") is not None,
        device="meta",
    )


def _linear_of(holder: nn.Module) -> nn.Linear:
    outputs, inputs = holder.get_parameter("weight").shape
    return nn.Linear(inputs, outputs, bias=holder._parameters.get("bias") is not None, device="meta")


def _call_layer(node: fx.Node, name: str, x: fx.Node) -> None:
    node.op, node.target, node.args, node.kwargs = "call_module", name, (x,), {}


def _given(call: dict[str, Any]) -> set[str]:
    return {field for field in AFFINE if call[field] is not None}


def _owner(fields: dict[str, object]) -> str | None:
    """Return the name of the one module that has these tensors, each as the attribute of its argument's name."""
    owners = set()
    for field, source in fields.items():
        if source is None and field in AFFINE:
            continue
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        owner, _, attribute = str(source.target).rpartition(".")
        if attribute != field:
            return None
        owners.add(owner)
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _holds(holder: nn.Module, used: set[str], statistics: Iterable[str]) -> bool:
    """Return whether a module has the statistics as buffers and, as parameters, exactly the affine tensors used."""
    buffers, parameters = dict(holder.named_buffers(recurse=False)), dict(holder.named_parameters(recurse=False))
    held = {field for field in AFFINE if isinstance(getattr(holder, field, None), Tensor)}
    return set(statistics) <= buffers.keys() and held == used and used <= parameters.keys()


def _filled(layer: nn.Module, holder: nn.Module) -> nn.Module:
    """Register the tensors of ``holder`` in a new layer, and return it in evaluation mode."""
    for name, parameter in holder.named_parameters(recurse=False):
        layer.register_parameter(name, parameter)
    for name, buffer in holder.named_buffers(recurse=False):
        layer.register_buffer(name, buffer)
    return layer.eval()
