"""Quantization points of a student for an engine: which tensors are on a grid, and at which bit-width.

An engine runs on integers, so every tensor that depends on the image is put on a grid before anything reads it:

    image                                                       a point
    LAYER [-> BatchNorm] [-> ReLU | ReLU6 | clamp(0, c)]        one point, after the last: one step of the engine
    sum [-> ReLU | ...],  BatchNorm without a layer [-> ReLU | ...]     the same
    product, concatenation, average pool, any other function    a point
    max pool, reshape, slice, pad, transpose, nearest resize    none: values of one tensor, on its grid

Each element of a chain is the only reader of the one before, or of what returns that unchanged. The logits of a linear
layer stay float where the engine returns floats. OpenVINO fuses a convolution into the sum that reads it, which clamps
and does not round its output; TensorRT fuses one whose output is no point.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.config.quant import BYTE_BITS, QuantConfig
from synq.network.op_traits import OpKind, is_activation, is_passive, node_module, traits_of, value_inputs
from synq.network.tracing import tensor_inputs
from synq.quant.bit_patterns import BitPatterns

FLOAT_LOGITS = ("onnxruntime", "openvino", "tensorrt")
"""Engines that return the logits of a linear layer in float, from its integer sums."""
LOGITS_HEADROOM = 2.0
"""Factor by which the range of logits on a grid exceeds that of the synthetic images. Real images reach beyond it, and
clipped logits are equal: a CIFAR-100 ResNet-20 lost 15 points at W8A8 without (docs/results/LOG.md)."""
FUSING_SUMS = ("openvino",)
"""Engines that fuse a convolution into the sum that reads it, and clamp its output without rounding it."""
FLOAT_BRANCHES = ("tensorrt",)
"""Engines that fuse a convolution into the sum that reads it if its output is in float: only the other branch is
quantized."""
SYMMETRIC_ACTIVATIONS = ("tensorrt",)
"""Engines whose activations are INT8 with zero point 0."""

Chain = tuple[fx.Node, ...]
"""Nodes that an engine computes in one step, each the only reader of the one before; the last one is quantized."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One quantized tensor of a student for an engine.

    Attributes:
        chain: Nodes of the step that computes it; it is the output of the last. The image is a single node.
        bits: Bit-width, 2 to 8.
        rounded: Whether it is rounded to its grid, else only clamped to the grid's range.
        at_end: Whether its bit-width is that of the first or last layer, by its place.
        headroom: Factor by which its range exceeds the observed one.
        symmetric: Whether the values of its grid are symmetric around 0.
    """

    chain: Chain
    bits: int
    rounded: bool = True
    headroom: float = 1.0
    at_end: bool = False
    symmetric: bool = False

    @property
    def node(self) -> fx.Node:
        """Return the node whose output it is."""
        return self.chain[-1]


def target_points(net: fx.GraphModule, layers: list[fx.Node], quant: QuantConfig, names: BitPatterns) -> list[Point]:
    """Return the quantized tensors of a student for `quant.target`, in order of execution.

    Tensors that no layer has computed have the bit-width of the first layer; those after the last layer, and its input,
    that of the last layer; all others that a layer reads act_bits. Those that only sums, products, pools and functions
    read have `BYTE_BITS`: engines store each code in a byte and multiply nothing by it, so that fewer bits save neither
    bytes nor time. On a CIFAR-10 ResNet-20, W4A4, 4 bits for them cost more than all other rounding
    (docs/results/LOG.md).

    Args:
        net: A graph from ``trace_classifier``.
        layers: Its layers, from ``classify``.
        quant: With a target that is an engine.
        names: Bit-widths by node, which take precedence.
    """
    chains = step_chains(net)
    first_bits, last_bits = quant.end_bits
    after, before = _reached(net, layers, backward=False), _reached(net, layers, backward=True)
    read_by = {node: grid_source(tensor_inputs(node)[0], chains) for node in layers}
    read, inputs = {*read_by.values()}, {read_by[node] for node in layers if node.target == layers[-1].target}
    floats = {logits_chain(net, chains)} if quant.target in FLOAT_LOGITS else set()
    if quant.target in FLOAT_BRANCHES:
        floats |= {chains[node] for node in unrounded(net, chains) if not is_rectifier(node)}
    clamped = unrounded(net, chains) if quant.target in FUSING_SUMS else set()
    output = next(node for node in net.graph.nodes if node.op == "output")
    logits = grid_source(value_inputs(output)[0], chains)
    points = []
    for node, chain in chains.items():
        if chain in floats:
            continue
        by_place = first_bits if node not in after else last_bits if node not in before or node in inputs else None
        by_name = names.width(node.name)
        points.append(
            Point(
                chain=chain,
                bits=by_name or by_place or (quant.act_bits if node in read else BYTE_BITS),
                rounded=node not in clamped,
                headroom=LOGITS_HEADROOM if node is logits else 1.0,
                at_end=by_name is None and by_place is not None,
                symmetric=quant.target in SYMMETRIC_ACTIVATIONS,
            )
        )
    return points


def step_chains(net: fx.GraphModule) -> dict[fx.Node, Chain]:
    """Return the steps in which an engine computes a network, by their last node, in the order of these.

    Args:
        net: A graph from ``trace_classifier``.

    Returns:
        The image as a single node, and every operation that computes new values, with those folded into it.
    """
    chains: dict[fx.Node, Chain] = {}
    inside: set[fx.Node] = set()
    on_grid: set[fx.Node] = set()
    for node in net.graph.nodes:
        if node.op == "output" or not is_activation(node) or node in inside:
            continue
        if moves_one(node) and value_inputs(node)[0] in on_grid:
            on_grid.add(node)
        elif node.meta.get("shape") is not None:  # a tuple is quantized where its parts are taken out
            chain = _chain(net, node)
            chains[chain[-1]] = chain
            inside.update(chain)
            on_grid.add(chain[-1])
    return {node: chains[node] for node in net.graph.nodes if node in chains}


def with_same_grid(net: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Return, for the activations that are no point of an engine, the node whose output has their grid.

    That is the last node of the step that computes them, or the one whose values they move.

    Args:
        net: A graph from ``trace_classifier``.
    """
    chains = step_chains(net)
    found = {node: chain[-1] for chain in chains.values() for node in chain[:-1]}
    for node in net.graph.nodes:
        source = (
            value_inputs(node)[0] if node not in found and node.op.startswith("call_") and moves_one(node) else None
        )
        if node not in chains and source is not None:
            found[node] = found.get(source, source)
    return found


def moves_one(node: fx.Node) -> bool:
    """Return whether ``node`` only moves or chooses values of one tensor, so that its output is on the same grid."""
    return traits_of(node).keeps_values and len(value_inputs(node)) == 1


def value_readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the values of ``node``, in order: not those that read its size."""
    return [user for user in node.users if user.op == "output" or traits_of(user).kind is not OpKind.NUMBER]


def norm_after(net: fx.GraphModule, layer: fx.Node) -> fx.Node | None:
    """Return the batch norm that is the only reader of a layer's output and scales its channels, or None."""
    readers = value_readers(layer)
    module = node_module(net, readers[0]) if len(readers) == 1 else None
    if not isinstance(module, _BatchNorm) or module.running_var is None:
        return None
    # The channels of a linear layer are the last axis of its output, those of a batch norm the second.
    on_channels = isinstance(node_module(net, layer), nn.Conv2d) or len(layer.meta["shape"]) == 2
    return readers[0] if on_channels else None


def is_sum(node: fx.Node) -> bool:
    """Return whether ``node`` adds two different activations of one shape."""
    inputs = value_inputs(node)
    shapes = {source.meta.get("shape") for source in inputs}
    plain = traits_of(node).operators == ("add",) and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2
    return bool(plain) and len(inputs) == 2 and shapes == {node.meta.get("shape")}


def is_rectifier(node: fx.Node) -> bool:
    """Return whether ``node`` is a ReLU, a ReLU6 or another clamp to [0, c]: limits of the codes of a step."""
    low, high = traits_of(node).limits or (-1.0, -1.0)
    return low == 0.0 < high


def grid_source(node: fx.Node, chains: Iterable[fx.Node]) -> fx.Node:
    """Return the quantized node on whose grid the values of ``node`` are, which may be the same node.

    Args:
        node: An activation of the graph before quantizers were inserted.
        chains: Last nodes of the steps, from ``step_chains``.
    """
    while node not in chains and moves_one(node):
        (node,) = value_inputs(node)
    return node


def logits_chain(net: fx.GraphModule, chains: dict[fx.Node, Chain]) -> Chain | None:
    """Return the step whose output is the logits if it is a linear layer that nothing else reads, else None."""
    node = next(node for node in net.graph.nodes if node.op == "output")
    while node not in chains:
        (node,) = value_inputs(node)
        in_order = node in chains or is_passive(node) or {*traits_of(node).operators} == {"slice"}
        if len(value_readers(node)) > 1 or not in_order:  # a flip joins parts, for which engines need codes
            return None
    chain = chains[node]
    return chain if isinstance(node_module(net, chain[0]), nn.Linear) and not is_rectifier(node) else None


def unrounded(net: fx.GraphModule, chains: dict[fx.Node, Chain]) -> set[fx.Node]:
    """Return the last nodes of the convolutions that OpenVINO fuses into the sum that reads them.

    A convolution that only this sum reads; of two, the first input of the sum. If the other input of the sum is also
    the input of that convolution, none is fused.
    """
    found: set[fx.Node] = set()
    for chain in chains.values():
        if not is_sum(chain[0]):
            continue
        inputs = [_same_tensor(source) for source in value_inputs(chain[0])]
        fusable = [node for node in inputs if node in chains and _is_read_once_convolution(net, chains[node])]
        if not fusable:
            continue
        (other,) = (node for node in inputs if node is not fusable[0])
        if _same_tensor(tensor_inputs(chains[fusable[0]][0])[0]) is not other:
            found.add(fusable[0])
    return found


def _chain(net: fx.GraphModule, node: fx.Node) -> Chain:
    chain = [node]
    kind = traits_of(node).kind
    if kind is OpKind.LAYER and (norm := norm_after(net, node)) is not None:
        chain.append(norm)
    if kind in (OpKind.LAYER, OpKind.NORM) or is_sum(node):
        between, readers = [], value_readers(chain[-1])
        while len(readers) == 1 and _same_tensor(readers[0]) is not readers[0]:  # an identity, or a dropout at rest
            between += readers
            readers = value_readers(readers[0])
        chain += [*between, *readers] if len(readers) == 1 and is_rectifier(readers[0]) else []
    return tuple(chain)


def _reached(net: fx.GraphModule, layers: list[fx.Node], *, backward: bool) -> set[fx.Node]:
    """Return the layers and the nodes that depend on one; or, backward, the nodes that a layer depends on."""
    if backward:
        found: set[fx.Node] = set()
        for node in reversed(net.graph.nodes):
            if node in layers or node in found:
                found.update(value_inputs(node))
        return found
    reached = set(layers)
    for node in net.graph.nodes:
        if any(source in reached for source in value_inputs(node)):
            reached.add(node)
    return reached


def _same_tensor(node: fx.Node) -> fx.Node:
    """Return the node whose output ``node`` returns unchanged (a dropout, an identity), which may be the same node."""
    while (
        node.op.startswith("call_")
        and is_passive(node)
        and value_inputs(node)[0].meta.get("shape") == node.meta.get("shape")
    ):
        (node,) = value_inputs(node)
    return node


def _is_read_once_convolution(net: fx.GraphModule, chain: Chain) -> bool:
    readers = value_readers(chain[-1])
    while len(readers) == 1 and _same_tensor(readers[0]) is chain[-1]:
        readers = value_readers(readers[0])
    return isinstance(node_module(net, chain[0]), nn.Conv2d) and len(readers) == 1
