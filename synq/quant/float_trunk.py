"""Quantization points of a student with LayerNorm or attention for an engine: integer layers on a trunk of floats.

Residual sums, LayerNorm, softmax and functions such as GELU stay in floats, between them layers and the two products of
attention run on integers:

    image, output of a convolution                        a point, at 8 bits
    input of a layer with a weight or of a matrix product a point, where it is made, if nothing else reads it

So a linear layer that a layer or product reads is on a grid, and one that a sum or a function reads returns floats.
Movements between the point and its reader are on codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from synq.config.quant import BYTE_BITS, FLOAT_TRUNKS, QuantConfig
from synq.network.op_traits import OpKind, node_module, traits_of, value_inputs
from synq.network.ops import products
from synq.network.tracing import tensor_inputs
from synq.quant.bit_patterns import BitPatterns
from synq.quant.placement import moves_one, step_chains, value_readers

NORMS = frozenset({"native_layer_norm"})
"""Operators that, like matrix products of two activations, make a network one with a trunk of floats."""


@dataclass(frozen=True, kw_only=True)
class TrunkPoint:
    """One quantized tensor of a student with a trunk of floats.

    Attributes:
        node: Node whose output it is.
        readers: Nodes that read it quantized.
        bits: Bit-width, 2 to 8.
        at_end: Whether its bit-width is that of the first or last layer, by its place.
    """

    node: fx.Node
    readers: list[fx.Node]
    bits: int
    at_end: bool = False


def has_float_trunk(net: fx.GraphModule) -> bool:
    """Return whether a network has operations that no engine computes in integers: LayerNorm, products of attention.

    Args:
        net: A graph from ``trace_classifier``, its layers quantized or not.
    """
    return bool(products(net)) or _has_norm(net)


def _has_norm(net: fx.GraphModule) -> bool:
    return any(NORMS.intersection(traits_of(node).operators) for node in net.graph.nodes)


def without_trunk(net: fx.GraphModule, target: str) -> str:
    """Return why an engine does not run a network, in one line.

    Args:
        net: With a trunk of floats.
        target: Name of the engine, not one of `FLOAT_TRUNKS`.
    """
    kinds = {"attention": bool(products(net)), "LayerNorm": _has_norm(net)}
    found = " and ".join(kind for kind, there in kinds.items() if there)
    return (
        f"`quant.target` must be {' or '.join(FLOAT_TRUNKS)} for a network with {found}, whose floats between integer "
        f"layers are known for that engine only, but got {target}; research exports any network"
    )


def trunk_points(
    net: fx.GraphModule, layers: list[fx.Node], quant: QuantConfig, names: BitPatterns
) -> list[TrunkPoint]:
    """Return the quantized tensors of a student with a trunk of floats, in order of execution.

    Args:
        net: A graph from ``trace_classifier``.
        layers: Its layers, from ``classify``.
        quant: With a target of `FLOAT_TRUNKS`.
        names: Bit-widths by node, which take precedence.
    """
    first_bits, last_bits = quant.end_bits
    last = [node for node in layers if node.target == layers[-1].target]
    multiplied = [] if quant.float_attention else products(net)
    read_by: dict[fx.Node, list[fx.Node]] = {}
    for node in layers:
        read_by.setdefault(tensor_inputs(node)[0], []).append(node)
    for node in multiplied:
        for source in dict.fromkeys(tensor_inputs(node)):
            read_by.setdefault(source, []).append(node)
    bits_of: dict[fx.Node, int] = {}
    readers_of: dict[fx.Node, list[fx.Node]] = {}
    ends: set[fx.Node] = set()
    for direct, readers in read_by.items():
        source, between = _made_at(direct)
        readers_of[source] = [between] if between is not None else readers
        by_place = last_bits if {*readers} & {*last} else first_bits if source.op == "placeholder" else None
        bits_of[source] = by_place or quant.act_bits
        ends |= {source} if by_place else set()
    for chain in step_chains(net).values():
        node = chain[-1]
        if isinstance(node_module(net, chain[0]), nn.Conv2d):
            readers_of[node] = list(node.users)
            bits_of.setdefault(node, BYTE_BITS)
    for source in list(readers_of):  # of an output that several read, what is on its grid anyway
        made = _grid_of(source)
        if made is not source and made in readers_of and bits_of[made] == bits_of[source]:
            del readers_of[source]
    points = []
    for node in net.graph.nodes:
        if node in readers_of:
            by_name = names.width(node.name)
            points.append(
                TrunkPoint(
                    node=node,
                    readers=readers_of[node],
                    bits=by_name or bits_of[node],
                    at_end=by_name is None and node in ends,
                )
            )
    return points


def moved_on_grid(net: fx.GraphModule, readers: Mapping[fx.Node, list[fx.Node]]) -> dict[fx.Node, fx.Node]:
    """Return, for the activations that move values of a point, the point.

    Args:
        net: The graph of `trunk_points`, before quantizers are inserted.
        readers: Readers of each point.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in net.graph.nodes:
        if node in readers or not node.op.startswith("call_") or not moves_one(node):
            continue
        (source,) = value_inputs(node)
        if source in found or node in readers.get(source, ()):
            found[node] = found.get(source, source)
    return found


def _made_at(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return where a tensor is made that movements without other readers bring to ``node``, and the first of these.

    Movements that drop values are not passed: the others of them would be quantized for nothing, and observed.
    """
    between = None
    while node.op.startswith("call_") and moves_one(node):
        (source,) = value_inputs(node)
        whole = source.meta.get("shape") is not None and _size(source) == _size(node)
        if not whole or len(value_readers(source)) > 1 or traits_of(source).kind is OpKind.UNKNOWN:
            break
        node, between = source, node
    return node, between


def _grid_of(node: fx.Node) -> fx.Node:
    while node.op.startswith("call_") and moves_one(node):
        (node,) = value_inputs(node)
    return node


def _size(node: fx.Node) -> int:
    total = 1
    for size in node.meta["shape"]:
        total *= size
    return total
