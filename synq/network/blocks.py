"""Partition of a traced network into blocks, at the tensors that the rest of the network is computed from."""

from typing import Any

from torch import fx

from synq.network.op_traits import BATCH, OpKind, is_passive, operation_name, traits_of
from synq.network.ops import classify


def cut_nodes(traced: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes after which the network reads no other earlier activation, in order of execution.

    The graph can be cut at such a node: its output is the only input of what follows. A tensor inside one branch of a
    residual block is not a cut, because the other branch is read later too; the sum is one. The image is the first.
    Parameters and sizes do not count: a size that was read earlier is known, but for the number of images, which every
    later tensor has too.

    Args:
        traced: A graph from ``trace_classifier``, with shapes recorded.
    """
    nodes = list(traced.graph.nodes)
    position = {node: number for number, node in enumerate(nodes)}
    sizes = {node for node in nodes if _is_size(node)}
    last_use = {node: max((position[user] for user in node.users if user not in sizes), default=-1) for node in nodes}
    found: list[fx.Node] = []
    depends: set[fx.Node] = set()
    live: set[fx.Node] = set()
    for node in nodes:
        if node.op == "output" or not (node.op == "placeholder" or depends.intersection(node.all_input_nodes)):
            continue
        if node in sizes:
            continue
        depends.add(node)
        live = {value for value in live | {node} if last_use[value] > position[node]}
        if live == {node} and node.meta.get("shape") is not None:
            found.append(node)
    return found


def block_ends(traced: fx.GraphModule) -> list[fx.Node]:
    """Return the output nodes of the network's blocks in order of execution; the logits are the last.

    A block has at least one convolution or linear layer, and passes one tensor to the next block. Of several cut nodes
    between the last layer of a block and the first of the next, the non-linearity is taken, else the last one that
    neither pools nor reshapes.

    ResNet-20 has 11 blocks: the ReLU of the stem, the ReLU of every residual block, the logits. VGG: every ReLU.
    MobileNetV2: every sum, and every layer of a bottleneck without a shortcut.

    Args:
        traced: A graph from ``trace_classifier``, with shapes recorded.
    """
    layers, nonlinear = classify(traced)
    position = {node: number for number, node in enumerate(traced.graph.nodes)}
    layer_positions = [position[layer] for layer in layers]
    groups: dict[int, list[fx.Node]] = {}
    for node in cut_nodes(traced):
        layers_before = sum(layer_position <= position[node] for layer_position in layer_positions)
        if layers_before > 0:
            groups.setdefault(layers_before, []).append(node)
    ends = []
    for group in groups.values():
        activated = [node for node in group if node in nonlinear]
        computed = [node for node in group if not _only_moves(node)]
        ends.append((activated or computed or group)[-1])
    return ends


def _only_moves(node: fx.Node) -> bool:
    return is_passive(node) or traits_of(node).resamples


def segment(traced: fx.GraphModule, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """Return the subgraph that computes the output of ``end`` from the output of ``start``; submodules are shared.

    Args:
        traced: A graph of a teacher or a student.
        start: One of its ``cut_nodes``, or the quantizer directly after one.
        end: A later node.

    Raises:
        ValueError: If ``end`` depends on the image other than through ``start``.
    """
    needed: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is not start and node not in needed:
            needed.add(node)
            if not _is_size(node):
                pending.extend(node.all_input_nodes)
    graph = fx.Graph()
    images = graph.placeholder("x")
    copies: dict[fx.Node, Any] = {start: images}
    for node in traced.graph.nodes:
        if node in needed:
            if node.op == "placeholder":
                raise ValueError(
                    f"`start` must be the only input of the segment that ends at {end.name}, but got {start.name}"
                )
            if _is_size(node) and node.all_input_nodes[0] not in copies:
                copies[node] = _size_of(graph, node, images)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return fx.GraphModule(traced, graph, class_name=f"{type(traced).__name__}Segment").eval()


def _is_size(node: fx.Node) -> bool:
    """Return whether ``node`` reads sizes of a tensor (N, ...), which are known up to the number of images."""
    if traits_of(node).kind is not OpKind.NUMBER or not node.all_input_nodes:
        return False
    shape = node.all_input_nodes[0].meta.get("shape") or ()
    reads_sizes = operation_name(node) in ("size", "dim", "ndimension") or node.args[1:] in (("shape",), ("ndim",))
    return bool(reads_sizes and shape[:1] == (BATCH,))


def _size_of(graph: fx.Graph, node: fx.Node, x: fx.Node) -> Any:
    """Return what ``node`` reads of the sizes of its tensor, with the number of images of ``x``."""
    shape = node.all_input_nodes[0].meta["shape"]
    if operation_name(node) in ("dim", "ndimension") or node.args[1:] == ("ndim",):
        return len(shape)
    sizes = (graph.call_method("size", (x, 0)), *shape[1:])
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return sizes[axis] if isinstance(axis, int) else sizes
