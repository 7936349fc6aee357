"""Classification of the nodes of a traced network for quantization: layers, non-linearities, everything else."""

from collections.abc import Container

import torch.nn.functional as F
from torch import fx, nn

from synq.network.op_traits import (
    OpKind,
    is_activation,
    node_module,
    operation_name,
    traits_of,
    value_inputs,
)


def classify(net: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the layers with a weight and the non-linearities of a network, each in order of execution.

    Tensors that do not depend on the image's values (a reshaped scale, ``zeros_like``) are not activations, and neither
    are sizes, masks and indices. A choice between two tensors (``torch.maximum``) is a non-linearity unless both were
    quantized before: then its values are on their grids.

    Args:
        net: A graph from ``trace_classifier``.

    Returns:
        Two lists of nodes: convolutions and linear layers; operations whose output is a quantization point under
        ``act_points = "relu"``.

    Raises:
        ValueError: If an operation on activations cannot be quantized, or if there is no layer with a weight.
    """
    layers: list[fx.Node] = []
    nonlinear: list[fx.Node] = []
    on_grid: set[fx.Node] = set()
    for node in net.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        traits, inputs = traits_of(node), value_inputs(node)
        if traits.kind is OpKind.UNKNOWN:
            raise _rejection(net, node)
        keeps_grid = traits.keeps_values and bool(inputs) and all(source in on_grid for source in inputs)
        if traits.kind is OpKind.LAYER:
            layers.append(node)
        elif traits.kind is OpKind.NONLINEAR or (traits.chooses and not keeps_grid):
            nonlinear.append(node)
            on_grid.add(node)
        elif keeps_grid:
            on_grid.add(node)
    if not layers:
        raise ValueError("teacher must have a convolution or linear layer to quantize, but none was found in its graph")
    return layers, nonlinear


def products(net: fx.GraphModule) -> list[fx.Node]:
    """Return the matrix products of two activations of a network, those of attention, in order of execution.

    Args:
        net: A graph from ``trace_classifier``.
    """
    return [node for node in net.graph.nodes if traits_of(node).kind is OpKind.PRODUCT]


def value_sources(net: fx.GraphModule, points: Container[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Return, for every activation, the quantization points that its values come from.

    Values may be pooled, normalized, reshaped or concatenated on the way. The output of a layer comes from no point,
    and neither does a sum or product of different activations, which is a new value. The sum of two pools of one point
    comes from that point.

    Args:
        net: A graph from ``trace_classifier``.
        points: Nodes whose outputs are quantized.

    Returns:
        For each activation the set of its points, possibly empty.
    """
    sources_of: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in net.graph.nodes:
        sources = [sources_of[source] for source in value_inputs(node) if source in sources_of]
        if node in points:
            sources_of[node] = frozenset([node])
        elif node.op == "placeholder" or traits_of(node).kind is OpKind.LAYER:
            sources_of[node] = frozenset()
        elif sources and is_activation(node):
            of_one = len(sources) == 1 or (len({*sources}) == 1 and len(sources[0]) == 1)
            kept = sources if of_one or traits_of(node).keeps_values else []
            sources_of[node] = frozenset().union(*kept)
    return sources_of


def _rejection(net: fx.GraphModule, node: fx.Node) -> ValueError:
    module = node_module(net, node)
    operation = operation_name(node) if module is None else type(module).__name__
    reason = _float_weight(node) or traits_of(node).reason or "it was not recorded by trace_classifier"
    return ValueError(
        f"teacher must be built of operations whose quantization is known, but node {node.name!r} is {operation}: "
        f"{reason}. Write it with Conv2d, Linear and standard activations"
    )


def _float_weight(node: fx.Node) -> str:
    """Return why a convolution or product of a function is no layer, "" for another operation."""
    if node.op != "call_function" or node.target not in (F.conv2d, F.linear):
        return ""
    weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(weight, fx.Node) or (is_activation(weight) and weight.op != "get_attr"):
        return ""
    if weight.op != "get_attr":
        return f"its weight is computed in the forward pass (by {operation_name(weight)!r}) and would stay float"
    found: object = node.graph.owning_module
    for part in str(weight.target).split("."):
        found = getattr(found, part, None)
    kind = "a parameter that is not the weight of one layer" if isinstance(found, nn.Parameter) else "a constant"
    return f"its weight {str(weight.target)!r} is {kind} and would stay float"
