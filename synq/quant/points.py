"""Quantized activations of a student: which tensors, at which bit-width, and who reads them quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from synq.config.quant import RESEARCH, QuantConfig
from synq.network.attention.locations import softmaxes
from synq.network.op_traits import is_passive, traits_of, value_inputs
from synq.network.ops import classify, products, value_sources
from synq.network.tracing import tensor_inputs
from synq.quant.bit_patterns import BitPatterns, layer_names
from synq.quant.float_trunk import has_float_trunk, moved_on_grid, trunk_points
from synq.quant.placement import target_points, with_same_grid

NORMS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm"})
"""Operators that normalize by the values of an image."""
NOT_ROUNDED = "clamped, not rounded"
"""Note on a tensor that an engine clamps to its range and adds without rounding it."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """How one activation is quantized.

    Attributes:
        bits: Bit-width, 2 to 8.
        readers: Nodes that read it quantized.
        rounded: Whether it is rounded to its grid, else only clamped to the grid's range.
        at_end: Whether its bit-width is that of the first or last layer, by its place.
        headroom: Factor by which its range exceeds the observed one.
        symmetric: Whether the values of its grid are symmetric around 0.
        logarithmic: Whether the values of its grid are powers, as for the softmax of attention.
    """

    bits: int
    readers: list[fx.Node]
    rounded: bool = True
    headroom: float = 1.0
    at_end: bool = False
    symmetric: bool = False
    logarithmic: bool = False


def quantized_activations(
    net: fx.GraphModule, quant: QuantConfig, names: BitPatterns
) -> dict[fx.Node, QuantizedTensor]:
    """Return the activations that are quantized, by the node that computes them, in order of execution.

    Args:
        net: A graph from ``trace_classifier``, its layers quantized or not.
        quant: Its target, or act_points, is the rule; and the bit-widths.
        names: Bit-widths of single activations, which take precedence.

    Raises:
        ValueError: If an operation is unknown, or names give a tensor two bit-widths.
    """
    layers, nonlinear = classify(net)
    if quant.target != RESEARCH:
        return _by_target(net, layers, quant, names)
    if quant.act_points == "relu" and not reads_inputs(net):
        return _after_nonlinear(net, layers, nonlinear, quant, names)
    points = _before_layers(layers, products(net), quant, names)
    if quant.softmax == "log":
        points |= {node: replace(points[node], logarithmic=True) for node in _probabilities(net) if node in points}
    if quant.act_points == "relu":
        points = {node: point for node, point in points.items() if not _precedes(node, layers)}
    return points


def _probabilities(net: fx.GraphModule) -> set[fx.Node]:
    """Return the softmax of each attention, and what only reshapes or returns it."""
    by_name = {node.name: node for node in net.graph.nodes}
    pending = [by_name[name] for name in softmaxes(net)]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        found.add(node)
        pending += [user for user in node.users if is_passive(user) and user not in found]
    return found


def reads_inputs(net: fx.GraphModule) -> bool:
    """Return whether ``act_points`` "relu" means the inputs of layers and products, the image excepted.

    That is the placement of the literature for attention: the output of a LayerNorm or softmax is a non-linear
    function, and so is no value of a residual sum, which stays float. So have networks with normalizations by the
    values of an image, which are non-linear functions, too.

    Args:
        net: A graph from ``trace_classifier``, its layers quantized or not.
    """
    return bool(products(net)) or any(NORMS.intersection(traits_of(node).operators) for node in net.graph.nodes)


def bits_and_notes(
    net: fx.GraphModule, quant: QuantConfig, points: Mapping[fx.Node, QuantizedTensor]
) -> tuple[dict[fx.Node, int], dict[fx.Node, str]]:
    """Return the bit-width of each activation that is on a grid, and notes, for the cost of a student.

    For an engine a step has the bit-width of its last node, and what moves values that of the tensor they come from.

    Args:
        net: The graph of `quantized_activations`, before quantizers are inserted.
        quant: As there.
        points: From there.
    """
    bits = {node: point.bits for node, point in points.items()}
    notes = {node: NOT_ROUNDED for node, point in points.items() if not point.rounded}
    if quant.target == RESEARCH:
        return bits, notes
    if has_float_trunk(net):
        moved = moved_on_grid(net, {node: point.readers for node, point in points.items()})
        for node, source in moved.items():
            bits[node], notes[node] = points[source].bits, f"on the grid of {source.name}"
        return bits, notes
    for node, carrier in with_same_grid(net).items():
        if carrier in points:
            bits[node], notes[node] = points[carrier].bits, f"on the grid of {carrier.name}"
    return bits, notes


def layer_bits(
    layers: list[fx.Node], bits: int, first_bits: int | None, last_bits: int | None, by_name: BitPatterns
) -> dict[fx.Node, int]:
    """Return the bit-width of each layer: by name, else of the first or last layer, else ``bits``."""
    bits_of = dict.fromkeys(layers, bits)
    for node in layers:
        if node.target == layers[-1].target and last_bits is not None:
            bits_of[node] = last_bits
        if node.target == layers[0].target and first_bits is not None:
            bits_of[node] = first_bits
        bits_of[node] = by_name.width(*layer_names(str(node.target))) or bits_of[node]
    return bits_of


def _by_target(
    net: fx.GraphModule, layers: list[fx.Node], quant: QuantConfig, names: BitPatterns
) -> dict[fx.Node, QuantizedTensor]:
    """Return the quantized activations of a student for an engine."""
    if has_float_trunk(net):
        return {
            point.node: QuantizedTensor(bits=point.bits, readers=point.readers, at_end=point.at_end)
            for point in trunk_points(net, layers, quant, names)
        }
    return {
        point.node: QuantizedTensor(
            bits=point.bits,
            readers=list(point.node.users),
            rounded=point.rounded,
            at_end=point.at_end,
            headroom=point.headroom,
            symmetric=point.symmetric,
        )
        for point in target_points(net, layers, quant, names)
    }


def _after_nonlinear(
    net: fx.GraphModule, layers: list[fx.Node], nonlinear: list[fx.Node], quant: QuantConfig, names: BitPatterns
) -> dict[fx.Node, QuantizedTensor]:
    """Return the quantized activations under act_points "relu"."""
    at_end: set[fx.Node] = set()
    if quant.last_bits is not None and quant.last_bits_for_input:
        calls = [node for node in layers if node.target == layers[-1].target]
        sources = value_sources(net, {*nonlinear})
        at_end = {point for node in calls for point in sources.get(tensor_inputs(node)[0], ())}
    return {
        node: QuantizedTensor(
            bits=names.width(node.name) or (quant.last_bits if node in at_end else None) or quant.act_bits,
            readers=list(node.users),
            at_end=node in at_end,
        )
        for node in nonlinear
    }


def _precedes(node: fx.Node, layers: list[fx.Node]) -> bool:
    """Return whether an activation is computed from the image by no layer."""
    pending, seen = [node], {node}
    while pending:
        last = pending.pop()
        if last in layers:
            return False
        new = [source for source in value_inputs(last) if source not in seen]
        seen.update(new)
        pending += new
    return True


def _before_layers(
    layers: list[fx.Node], multiplied: list[fx.Node], quant: QuantConfig, names: BitPatterns
) -> dict[fx.Node, QuantizedTensor]:
    """Return the quantized activations under act_points "inputs": what layers and matrix products read."""
    input_bits = layer_bits(layers, quant.act_bits, quant.first_bits, quant.last_bits, names)
    read_by: dict[fx.Node, list[fx.Node]] = {}
    for node in layers:
        read_by.setdefault(tensor_inputs(node)[0], []).append(node)
    for node in multiplied:
        for source in dict.fromkeys(tensor_inputs(node)):
            read_by.setdefault(source, []).append(node)
    order = {node: place for place, node in enumerate(layers[0].graph.nodes)}
    points = {
        source: QuantizedTensor(
            bits=(names.width(source.name) if {*readers} & {*multiplied} else None)
            or max(input_bits.get(node, quant.act_bits) for node in readers),
            readers=readers,
        )
        for source, readers in sorted(read_by.items(), key=lambda item: order[item[0]])
    }
    for node in layers:
        named, point = names.width(*layer_names(str(node.target))), points[tensor_inputs(node)[0]]
        if named not in (None, point.bits):
            others = ", ".join(str(reader.target) for reader in point.readers if reader is not node)
            raise ValueError(
                "`quant.layer_act_bits` must set one bit-width for layers that read the same tensor, but got "
                f"{named} for {node.target} and {point.bits} for {others}"
            )
    return points
