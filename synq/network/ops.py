"""Classification of the nodes of a traced network for quantization: layers, non-linearities, everything else."""

from collections.abc import Container

from torch import fx, nn

from synq.network.op_traits import OpKind, OpTraits, is_passive, node_module, operation_name, traits_of


def classify(net: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the layers with a weight and the non-linearities of a network, each in order of execution.

    Tensors that depend on parameters only (a reshaped scale) are not activations, and neither are sizes.

    Args:
        net: A graph from ``trace_classifier``, with shapes recorded.

    Returns:
        Two lists of nodes: convolutions and linear layers; operations whose output is a quantization point under
        ``act_points = "relu"``.

    Raises:
        ValueError: If an operation on activations is not in the table of `op_traits.py`, if there is no layer with a
            weight, or if the network ends in a softmax.
    """
    layers: list[fx.Node] = []
    nonlinear: list[fx.Node] = []
    activations: set[fx.Node] = set()
    for node in net.graph.nodes:
        traits = traits_of(net, node)
        sources = [source for source in node.all_input_nodes if source in activations]
        is_number = _is_number(net, node)
        if node.op == "placeholder" or (sources and not is_number):
            activations.add(node)
        if traits.kind is OpKind.LAYER:
            layers.append(node)
        elif node.op in ("placeholder", "output") or not sources or is_number or traits.kind is OpKind.PASSIVE:
            continue
        elif not _is_known(node, traits):
            raise _rejection(net, node)
        elif traits.kind is OpKind.NONLINEAR or _is_nonlinear_product(node, traits.kind, activations):
            nonlinear.append(node)
    last = next(node for node in reversed(net.graph.nodes) if node.op == "output").all_input_nodes[0]
    while is_passive(net, last):
        last = last.all_input_nodes[0]
    if operation_name(last) == "softmax" or isinstance(node_module(net, last), nn.Softmax):
        raise ValueError(
            f"teacher must return logits, but its last operation, {last.name!r}, is a softmax: return its input"
        )
    if not layers:
        raise ValueError("teacher must have a convolution or linear layer to quantize, but none was found in its graph")
    return layers, nonlinear


def value_sources(net: fx.GraphModule, points: Container[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Return, for every activation, the quantization points that its values come from.

    Values may be pooled, normalized, reshaped or concatenated on the way. The output of a layer comes from no point,
    and neither does a sum or product of different activations, which is a new value. The sum of two pools of one point
    comes from that point.

    Args:
        net: A graph with shapes recorded.
        points: Nodes whose outputs are quantized.

    Returns:
        For each activation the set of its points, possibly empty.
    """
    sources_of: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in net.graph.nodes:
        # Sizes and reshaped parameters lead to no activation.
        sources = [sources_of[source] for source in node.all_input_nodes if source in sources_of]
        if node in points:
            sources_of[node] = frozenset([node])
        elif node.op == "placeholder" or traits_of(net, node).kind is OpKind.LAYER:
            sources_of[node] = frozenset()
        elif sources and not _is_number(net, node):
            of_one = len(sources) == 1 or (len({*sources}) == 1 and len(sources[0]) == 1)
            kept = sources if of_one or traits_of(net, node).joins else []
            sources_of[node] = frozenset().union(*kept)
    return sources_of


def _is_number(net: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether ``node`` is a size or another plain number."""
    return node.meta.get("shape") is None and traits_of(net, node).kind is OpKind.NUMBER


def _is_known(node: fx.Node, traits: OpTraits) -> bool:
    """Return whether the table knows an operation on activations; a function must return one tensor or parts of one."""
    if node.op != "call_module" and node.meta.get("shape") is None:
        return traits.returns_tuple
    return traits.kind not in (OpKind.UNKNOWN, OpKind.NUMBER)


def _is_nonlinear_product(node: fx.Node, kind: OpKind, activations: set[fx.Node]) -> bool:
    """Return whether an activation is multiplied or divided by an activation, not by a number or a parameter."""
    are_activations = [isinstance(f, fx.Node) and f in activations for f in (*node.args, *node.kwargs.values())]
    if kind is OpKind.QUOTIENT:
        return any(are_activations[1:])
    return kind is OpKind.PRODUCT and sum(are_activations) > 1


def _rejection(net: fx.GraphModule, node: fx.Node) -> ValueError:
    module = node_module(net, node)
    operation = operation_name(node) if module is None else type(module).__name__
    return ValueError(
        f"teacher must be built of operations whose quantization is known, but node {node.name!r} is {operation}: "
        "its tensors would stay float. Write it with Conv2d, Linear and standard activations"
    )
