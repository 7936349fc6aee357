"""What an operation of a network's graph is to a quantizer: a layer with a weight, a non-linearity, or neither."""

from collections.abc import Container

from torch import fx, nn

from synq.network.tracing import JOINING_NAMES, is_passive, node_module, operation_name

_NONLINEAR_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax),
)
_NONLINEAR_NAMES = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "prelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softplus",
        "softmax",
        "clamp",
        "clip",
        "clamp_min",
        "abs",
        "square",
        "pow",
        "sqrt",
        "exp",
    ]
)
# Linear or value-preserving operations: what they put out is a sum or a selection of what was quantized before.
_STRUCTURAL_MODULES = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d),
    nn.AdaptiveAvgPool1d,
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.Sequential),
)
_STRUCTURAL_NAMES = frozenset(
    [
        "add",
        "sub",
        "neg",
        "cat",
        "concat",
        "stack",
        "pad",
        "getitem",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "transpose",
        "permute",
        "t",
        "unsqueeze",
        "expand",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool1d",
        "avg_pool2d",
        "max_pool2d",
        "adaptive_max_pool2d",
        "mean",
        "sum",
        "interpolate",
        "pixel_shuffle",
        "channel_shuffle",
        "clone",
        "detach",
        "roll",
        "flip",
        "unflatten",
        "type_as",
        "movedim",
    ]
)
_NORM_MODULES = (nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm)
# Answers that are no tensor. The plain numbers among them lead to no activation; the tuples hold parts of one.
_NUMBER_NAMES = frozenset(["getattr", "size", "dim", "ndimension", "numel", "stride", "shape", "_assert"])
_TUPLE_NAMES = frozenset(["chunk", "split", "unbind", "getitem", "add"])


def classify(net: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """Sort the nodes into layers with a weight and non-linearities, each in order of execution.

    What depends on parameters only (a scale, reshaped) is no activation, and neither are sizes.

    Args:
        net: A graph from ``trace_classifier``, shapes recorded.

    Returns:
        Convolutions and linear layers; operations whose output is a new set of values.

    Raises:
        ValueError: If an operation is neither and not known to be harmless, if there is no layer, or if the network ends in a softmax.
    """
    layers: list[fx.Node] = []
    nonlinear: list[fx.Node] = []
    activations: set[fx.Node] = set()
    for node in net.graph.nodes:
        module, name = node_module(net, node), operation_name(node)
        is_number = _is_number(node)
        sources = [source for source in node.all_input_nodes if source in activations]
        if node.op == "placeholder" or (sources and not is_number):
            activations.add(node)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(node)
            continue
        if node.op in ("placeholder", "output") or not sources or is_number or is_passive(net, node):
            continue
        if module is not None:
            if isinstance(module, _NONLINEAR_MODULES):
                nonlinear.append(node)
            elif not isinstance(module, (*_STRUCTURAL_MODULES, *_NORM_MODULES)):
                raise _refusal(node, type(module).__name__)
        elif node.meta.get("shape") is None:
            if name not in _TUPLE_NAMES:
                raise _refusal(node, name)
        elif name in _NONLINEAR_NAMES:
            nonlinear.append(node)
        elif name in ("mul", "multiply", "truediv", "div", "divide", "true_divide"):
            if _is_nonlinear_product(node, name, activations):
                nonlinear.append(node)
        elif name != "batch_norm" and name not in _STRUCTURAL_NAMES:
            raise _refusal(node, name)
    last = next(node for node in reversed(net.graph.nodes) if node.op == "output").all_input_nodes[0]
    while is_passive(net, last):
        last = last.all_input_nodes[0]
    if operation_name(last) == "softmax" or isinstance(node_module(net, last), nn.Softmax):
        raise ValueError(
            f"teacher must return logits, but its last operation, {last.name!r}, is a softmax: return what enters it"
        )
    if not layers:
        raise ValueError("teacher must have a convolution or linear layer to quantize, but none was found in its graph")
    return layers, nonlinear


def made_of(net: fx.GraphModule, points: Container[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Return, for every activation, those `points` whose values it holds: as they are, pooled, normalised, reshaped or joined.

    What a layer makes holds none, and neither does a sum or product of different activations: it is a new value. A sum of two pools of
    one point holds that point.

    Args:
        net: A graph with its shapes recorded.
        points: Nodes that make activations.
    """
    held: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in net.graph.nodes:
        # Sizes and reshaped parameters lead to no activation.
        sources = [held[source] for source in node.all_input_nodes if source in held]
        if node in points:
            held[node] = frozenset([node])
        elif node.op == "placeholder" or isinstance(node_module(net, node), (nn.Conv2d, nn.Linear)):
            held[node] = frozenset()
        elif sources and not _is_number(node):
            of_one = len(sources) == 1 or (len({*sources}) == 1 and len(sources[0]) == 1)
            kept = sources if of_one or operation_name(node) in JOINING_NAMES else []
            held[node] = frozenset().union(*kept)
    return held


def _is_number(node: fx.Node) -> bool:
    """Tell whether ``node`` is a size or another plain number."""
    return node.op != "call_module" and node.meta.get("shape") is None and operation_name(node) in _NUMBER_NAMES


def _is_nonlinear_product(node: fx.Node, name: str, activations: set[fx.Node]) -> bool:
    """By a number or a parameter it is a scale; of two activations (a gate, a square), or under 1, it is non-linear."""
    factors = [*node.args, *node.kwargs.values()]
    if "div" in name:
        return any(factor in activations for factor in factors[1:] if isinstance(factor, fx.Node))
    return sum(isinstance(factor, fx.Node) and factor in activations for factor in factors) > 1


def _refusal(node: fx.Node, operation: str) -> ValueError:
    return ValueError(
        f"teacher must be built of operations whose quantization is known, but node {node.name!r} is {operation}: "
        "its tensors would stay float. Write it with Conv2d, Linear and standard activations"
    )
