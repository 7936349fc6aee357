"""Cut a network's graph into blocks, at the tensors that all the rest of the network is computed from."""

from torch import fx

from synq.network.op_traits import is_passive, traits_of
from synq.network.ops import classify


def cut_nodes(traced: fx.GraphModule) -> list[fx.Node]:
    """Return, in order of execution, the nodes whose output alone the rest of the network reads.

    A tensor inside one branch of a residual block is none, because the other branch is read behind it too; the sum is one. The image
    is the first. Parameters and sizes do not count as read.

    Args:
        traced: A graph from ``trace_classifier``, shapes recorded.
    """
    nodes = list(traced.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    found: list[fx.Node] = []
    depends: set[fx.Node] = set()
    live: set[fx.Node] = set()
    for node in nodes:
        if node.op == "output" or not (node.op == "placeholder" or depends.intersection(node.all_input_nodes)):
            continue
        depends.add(node)
        live = {value for value in live | {node} if last_use[value] > place[node]}
        if live == {node} and node.meta.get("shape") is not None:
            found.append(node)
    return found


def block_ends(traced: fx.GraphModule) -> list[fx.Node]:
    """Return the outputs of the network's blocks in order of execution; the logits are the last.

    A block holds at least one convolution or linear layer; two blocks share nothing but one tensor. Of several nodes between the last
    layer of a block and the first of the next, the non-linearity is taken, else the last that is neither a pool nor a reshaping.

    ResNet-20: the stem's ReLU, the ReLU of every residual block, the logits: 11. VGG: every ReLU. MobileNetV2: every sum, and every
    layer of a bottleneck without a shortcut.

    Args:
        traced: A graph from ``trace_classifier``, shapes recorded.
    """
    layers, nonlinear = classify(traced)
    place = {node: number for number, node in enumerate(traced.graph.nodes)}
    layer_places = [place[layer] for layer in layers]
    groups: dict[int, list[fx.Node]] = {}
    for node in cut_nodes(traced):
        layers_before = sum(position <= place[node] for position in layer_places)
        if layers_before > 0:
            groups.setdefault(layers_before, []).append(node)
    ends = []
    for group in groups.values():
        activated = [node for node in group if node in nonlinear]
        computed = [node for node in group if not _only_moves(traced, node)]
        ends.append((activated or computed or group)[-1])
    return ends


def _only_moves(traced: fx.GraphModule, node: fx.Node) -> bool:
    return is_passive(traced, node) or traits_of(traced, node).resamples


def segment(traced: fx.GraphModule, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """Return the part of a network that computes the output of ``end`` from that of ``start``; submodules are shared.

    Args:
        traced: A graph of a teacher or a student.
        start: One of its ``cut_nodes``, or the quantizer right behind one.
        end: A later one.

    Raises:
        ValueError: If ``end`` needs more than ``start`` and parameters.
    """
    needed: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not start and node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    for node in traced.graph.nodes:
        if node in needed:
            if node.op == "placeholder":
                raise ValueError(f"`start` must be all that {end.name} is computed from, but got {start.name}")
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return fx.GraphModule(traced, graph, class_name=f"{type(traced).__name__}Segment").eval()
