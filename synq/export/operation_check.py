"""Check operation by operation whether ``torch.onnx`` can export a network, before the whole network is exported.

Some operations have no ONNX translation, and the exporter's message does not name the layer. Others are exported as
another operation, because a setting is lost: ``antialias`` of an interpolation, for example. In a quantized network
such a difference may stay below every tolerance. So each operation with settings that are not known to be exported
correctly is exported in a small model, all in one, and its result in ONNX Runtime is compared with PyTorch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from synq.common.error_text import first_line, innermost
from synq.export.verify import open_session
from synq.network.op_traits import OpKind, node_module, operation_name, traits_of
from synq.quant.integer_layers import ChannelAffine, DequantizedActivation, IntegerActivation, IntegerLayer

KNOWN = frozenset(
    {
        *("relu", "leaky_relu", "_prelu_kernel", "hardtanh", "elu", "celu", "gelu", "silu", "mish"),
        *("hardswish", "hardsigmoid", "sigmoid", "tanh", "abs", "exp"),
        *("mul", "div", "add", "sub", "rsub", "neg", "sum", "mean", "cat", "stack"),
        *("max_pool2d_with_indices", "adaptive_max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "permute", "transpose", "t"),
        *("slice", "select", "index", "expand", "unsqueeze", "squeeze", "clone", "detach", "alias", "_to_copy"),
        *("view", "_unsafe_view"),
    }
)
"""Operators of PyTorch that are exported correctly with all settings but KNOWN_EXCEPT, as the test of this module
verifies: common networks need no check, which takes seconds."""
KNOWN_SPELLINGS = KNOWN | {
    *("prelu", "relu6", "selu", "truediv", "multiply", "divide", "concat", "narrow", "chunk", "split", "unbind"),
    *("getitem", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "to", "float", "type_as"),
    *("max_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "dropout", "dropout2d", "stochastic_depth"),
}
"""Names of functions and methods that the exporter meets as KNOWN operators. Others, such as ``hstack``, it translates
by themselves, though PyTorch executes the same operators."""
KNOWN_EXCEPT = frozenset({"AdaptiveMaxPool2d", "AdaptiveAvgPool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"})
"""Spellings of KNOWN operations that are checked unless their output is one value per channel."""
TOLERANCE = 1e-3
"""Largest difference of a value, relative to the largest value of the output, that is only rounding."""


@dataclass
class _Probe:
    """One small graph for several operations; the inputs of each are placeholders of the recorded shapes.

    Masks and indices are computed in it, as in the network.

    Attributes:
        graph: Their graph.
        inputs: Placeholders by shape; operands of one operation have different ones.
        outputs: Result of each operation.
    """

    net: fx.GraphModule
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[tuple[tuple[int, ...], int], fx.Node] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)

    def add(self, node: fx.Node) -> None:
        """Add an operation."""
        copies: dict[fx.Node, fx.Node] = {}

        def source(node: fx.Node) -> fx.Node:
            if node not in copies:
                shape = node.meta.get("shape")
                # A parameter, a size, one of several results, or a mask or indices, which random numbers cannot be.
                if node.op == "get_attr" or shape is None or traits_of(node).kind <= OpKind.SELECTOR:
                    copies[node] = self.graph.node_copy(node, source)
                else:
                    copies[node] = self.placeholder(shape, len(copies))
            return copies[node]

        self.outputs.append(self.graph.node_copy(node, source))

    def placeholder(self, shape: tuple[int, ...], position: int) -> fx.Node:
        """Return the placeholder of a shape for an operand."""
        if (shape, position) not in self.inputs:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                made = self.graph.placeholder(f"x{len(self.inputs)}")
            self.inputs = {(shape, position): made, **self.inputs}  # placeholders are in the opposite order
        return self.inputs[shape, position]

    def model(self) -> nn.Module:
        """Return the network that computes all operations."""
        self.graph.output(tuple(self.outputs))
        return fx.GraphModule(self.net, self.graph).eval()

    def samples(self) -> tuple[Tensor, ...]:
        """Return a random input for each placeholder."""
        generator = torch.Generator().manual_seed(0)
        return tuple(1.5 * torch.randn(shape, generator=generator) for shape, _ in self.inputs)


def unexportable_operations(form: fx.GraphModule) -> list[str]:
    """Return a line for each operation that ``torch.onnx`` cannot export or exports as another one; empty: none.

    Args:
        form: A network from ``integer_form``, with recorded shapes.
    """
    chosen: dict[object, fx.Node] = {}
    for node in form.graph.nodes:
        if _is_checked(form, node):
            chosen.setdefault(_settings(form, node), node)
    return _faults(form, list(chosen.values()))


def describe(net: fx.GraphModule, node: fx.Node) -> str:
    """Return the operation of a node with its settings, the node's name and the layer's."""
    module = node_module(net, node)
    if module is None:
        given = ((key, value) for key, value in node.kwargs.items() if value is not None)
        parts = [*map(str, _plain(node.args)), *(f"{key}={value}" for key, value in given)]
        return f"{operation_name(node)}({', '.join(parts)}) of node {node.name}"
    named = "" if str(node.target).replace(".", "_") == node.name else f" (layer {node.target})"
    return f"{' '.join(repr(module).split())} of node {node.name}{named}"


def _plain(arguments: Sequence[object]) -> list[object]:
    return [part for part in arguments if not isinstance(part, fx.Node)]


def _is_checked(form: fx.GraphModule, node: fx.Node) -> bool:
    module, traits = node_module(form, node), traits_of(node)
    if node.op not in ("call_module", "call_function", "call_method") or node.meta.get("shape") is None:
        return False
    if isinstance(module, IntegerLayer | IntegerActivation | DequantizedActivation | ChannelAffine):
        return False
    if not any(source.meta.get("shape") is not None for source in node.all_input_nodes):
        return False
    if traits.kind in (OpKind.LAYER, OpKind.NORM):  # those of a float network
        return False
    spelling = operation_name(node) if module is None else type(module).__name__
    if spelling in KNOWN_EXCEPT:
        return any(size != 1 for size in node.meta["shape"][2:])
    if module is None and spelling not in KNOWN_SPELLINGS:
        return True
    return traits.kind is OpKind.UNKNOWN or not {*traits.operators} <= KNOWN


def _settings(form: fx.GraphModule, node: fx.Node) -> object:
    """Return what two operations have in common that need to be checked only once."""
    shapes = tuple(source.meta.get("shape") for source in node.all_input_nodes)
    module = node_module(form, node)
    arguments = repr(_plain(node.args)), repr(node.kwargs)
    return (node.op, str(node.target), arguments, shapes) if module is None else (repr(module), arguments, shapes)


def _faults(form: fx.GraphModule, nodes: list[fx.Node]) -> list[str]:
    """Return the lines of some operations; halves are exported separately until the operation is found."""
    if not nodes:
        return []
    probe = _Probe(form)
    for node in nodes:
        probe.add(node)
    net, samples = probe.model(), probe.samples()
    with torch.no_grad():
        wanted = net(*samples)
    try:
        found = _in_onnx_runtime(net, samples)
    except Exception as error:  # torch.onnx and ONNX Runtime raise many types, all with the same meaning
        if len(nodes) > 1:
            half = len(nodes) // 2
            return _faults(form, nodes[:half]) + _faults(form, nodes[half:])
        return [f"{describe(form, nodes[0])} has no ONNX export ({reason(error)})"]
    lines = []
    for node, reference, result in zip(nodes, wanted, found, strict=True):
        difference = _difference(reference, result)
        if not difference <= TOLERANCE:
            lines.append(f"{describe(form, node)} becomes another operation in ONNX (relative error {difference:.2g})")
    return lines


def _in_onnx_runtime(net: nn.Module, samples: tuple[Tensor, ...]) -> list[Tensor]:
    from synq.export.onnx_exporter import export_by_torch  # takes seconds: common networks need no check

    model = export_by_torch(net, samples)
    session = open_session(model.SerializeToString(), threads=1)
    feed = {value.name: sample.numpy() for value, sample in zip(session.get_inputs(), samples, strict=True)}
    return [torch.from_numpy(values) for values in session.run(None, feed)]


def _difference(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinity for another shape, or NaN elsewhere."""
    if reference.shape != found.shape or not torch.equal(reference.isfinite(), found.isfinite()):
        return float("inf")
    reference, found = reference.double().nan_to_num(0, 0, 0), found.double().nan_to_num(0, 0, 0)
    return float((reference - found).abs().max() / reference.abs().max().clamp(min=1e-6))


def reason(error: BaseException) -> str:
    """Return the message of an exporter's innermost error in one line."""
    return first_line(innermost(error))
