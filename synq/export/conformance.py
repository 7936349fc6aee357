"""Published rules of TensorRT and of QNN's HTP for Q/DQ graphs, checked on an ONNX file.

Neither engine runs here: TensorRT needs an NVIDIA GPU, HTP a Qualcomm processor. Students of the targets tensorrt and
qnn have files that keep all rules. A file without violations has the form that the documents ask for; that the engine
builds it, is fast or returns the student's logits has not been measured.

TensorRT ("Working with Quantized Types" of the TensorRT developer guide; ``docs/operators.md`` of onnx-tensorrt):

- Quantization is symmetric: every zero point is 0, so activations and weights are INT8 and not UINT8.
- Activations have one scale per tensor, weights one per tensor or output channel.
- DequantizeLinear reads INT8 (or FP8, or INT4 in blocks): a bias is float, not INT32.
- Scales are constants, and no other operation computes on the integers between QuantizeLinear and DequantizeLinear.

QNN HTP ("QNN Execution Provider" of the ONNX Runtime documentation; quantization pages of the Qualcomm AI Engine Direct
SDK):

- Shapes are static, the batch too.
- Activations are UINT8 or UINT16 with any zero point, one scale per tensor.
- Weights are 8 or 4 bits; those with a scale per output channel are signed and symmetric (zero point 0).
- Biases are INT32 with zero point 0 and the scale ``input scale * weight scale``.
- Every operation reads DequantizeLinear and is followed by QuantizeLinear, the last one too.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

Engine = Literal["tensorrt", "qnn"]
"""Engines whose rules are known here."""
ENGINES: tuple[Engine, ...] = ("tensorrt", "qnn")
LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
"""Operations with a weight, their second input."""
Q, DQ = "QuantizeLinear", "DequantizeLinear"


class _Graph:
    """A graph with its constants and the makers and readers of its values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        self._fixed = {"", *self.constants}
        for node in model.graph.node:  # each after those that make its inputs, as the standard demands
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if self._fixed.issuperset(node.input):
                self._fixed.update(node.output)

    def nodes(self, *kinds: str) -> Iterator[NodeProto]:
        """Yield the nodes of some kinds."""
        return (node for node in self.proto.node if node.op_type in kinds)

    def is_constant(self, name: str) -> bool:
        """Return whether a value does not depend on the image; an input that is left out ("") does not."""
        return name in self._fixed

    def array(self, name: str) -> npt.NDArray[Any] | None:
        """Return a constant of the file, or None if the value is computed."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def zero_points(self, node: NodeProto) -> npt.NDArray[Any]:
        """Return the zero points of a Q or DQ node; the default is UINT8 0."""
        found = self.array(node.input[2]) if len(node.input) > 2 else None
        return np.zeros((), np.uint8) if found is None else found

    def activations(self) -> Iterator[NodeProto]:
        """Yield the Q and DQ nodes of values that depend on the image."""
        return (node for node in self.nodes(Q, DQ) if not self.is_constant(node.input[0]))

    def parameters(self) -> Iterator[NodeProto]:
        """Yield the DQ nodes of weights and biases."""
        return (node for node in self.nodes(DQ) if self.is_constant(node.input[0]))

    def is_bias(self, node: NodeProto) -> bool:
        """Return whether a DQ node makes the third input of a layer."""
        readers = self.readers.get(node.output[0], [])
        return any(reader.op_type in LAYERS and list(reader.input[2:3]) == [node.output[0]] for reader in readers)


def violations(model: onnx.ModelProto, target: Engine) -> list[str]:
    """Return the rules of an engine that a file breaks, one line for each node and rule; none if it conforms.

    Args:
        model: An ONNX model with QuantizeLinear and DequantizeLinear.
        target: The engine: tensorrt, or qnn for its HTP.

    Raises:
        ValueError: If the target has no rules here.
    """
    if target not in _RULES:
        raise ValueError(f"`target` must be one of {', '.join(_RULES)}, but got {target}: only these have rules here")
    graph = _Graph(model)
    return [found for rule in _RULES[target] for found in rule(graph)]


def _one_scale(graph: _Graph) -> Iterator[str]:
    for node in graph.activations():
        scale = graph.array(node.input[1])
        if scale is None:
            yield f"{node.name}: the scale must be a constant, but it is computed: store it in the file"
        elif scale.size != 1:
            yield f"{node.name}: an activation must have one scale, but got {scale.size}: quantize it per tensor"


def _no_computation_on_codes(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes(Q):
        for reader in graph.readers.get(node.output[0], []):
            if reader.op_type != DQ:
                yield (
                    f"{reader.name}: codes must be read by {DQ} only, but {reader.op_type} reads those of {node.name}: "
                    "compute in floats between two pairs of nodes, or use the full range of 8 bits"
                )


def _symmetric(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes(Q, DQ):
        zero_points = graph.zero_points(node)
        if zero_points.dtype == np.uint8:
            yield f"{node.name}: codes must be INT8, but they are UINT8: store code - 128"
        if zero_points.any():
            largest = int(zero_points.flatten()[np.abs(zero_points.astype(np.int64)).argmax()])
            yield f"{node.name}: zero points must be 0, but got {largest}: quantize symmetrically"


def _float_bias(graph: _Graph) -> Iterator[str]:
    for node in graph.parameters():
        if _code_type(graph, node) == TensorProto.INT32:
            yield f"{node.name}: {DQ} must read INT8, but it reads INT32: store the bias in float"


def _weights_per_output_channel(graph: _Graph) -> Iterator[str]:
    for node in graph.parameters():
        scale = graph.array(node.input[1])
        if scale is None or scale.size == 1 or graph.is_bias(node):
            continue
        for reader in graph.readers.get(node.output[0], []):
            axis, expected = _attribute(node, "axis", 1), _output_axis(reader)
            if reader.op_type in LAYERS and axis != expected:
                yield (
                    f"{node.name}: scales must be along the output channels (axis {expected}), but got axis {axis}: "
                    "quantize each output channel"
                )


def _static_shapes(graph: _Graph) -> Iterator[str]:
    for value in (*graph.proto.input, *graph.proto.output):
        axes = value.type.tensor_type.shape.dim
        dynamic = [axis.dim_param or "?" for axis in axes if not axis.dim_value]
        if dynamic:
            yield f"{value.name}: shapes must be static, but got the axis {dynamic[0]}: fix the batch"


def _unsigned_activations(graph: _Graph) -> Iterator[str]:
    for node in graph.activations():
        kind = graph.zero_points(node).dtype
        if kind not in (np.uint8, np.uint16):
            yield f"{node.name}: activations must be UINT8 or UINT16, but got {kind.name.upper()}: add 128 to the codes"


def _signed_channels(graph: _Graph) -> Iterator[str]:
    for node in graph.parameters():
        scale = graph.array(node.input[1])
        if graph.is_bias(node) or scale is None or scale.size == 1:
            continue
        kind, zero_points = _code_type(graph, node), graph.zero_points(node)
        if kind not in (TensorProto.INT8, TensorProto.INT4):
            name = TensorProto.DataType.Name(kind) if kind else "computed codes"
            yield f"{node.name}: weights per channel must be INT8 or INT4, but got {name}: store signed codes"
        if zero_points.any():
            yield f"{node.name}: weights per channel must have zero points 0, but some are not: quantize symmetrically"


def _integer_bias(graph: _Graph) -> Iterator[str]:
    for layer in graph.nodes(*LAYERS):
        if len(layer.input) < 3 or not layer.input[2]:
            continue
        nodes = [graph.makers.get(name) for name in layer.input[:3]]
        source, weight, bias = nodes
        if bias is None or bias.op_type != DQ or _code_type(graph, bias) != TensorProto.INT32:
            yield f"{layer.name}: the bias must be INT32, but it is not: quantize it with input scale * weight scale"
            continue
        if source is None or weight is None or source.op_type != DQ or weight.op_type != DQ:
            continue
        scales = [graph.array(node.input[1]) for node in (source, weight, bias)]
        if any(scale is None for scale in scales):
            continue
        x, w, b = (np.asarray(scale, np.float64) for scale in scales)
        if not np.allclose(np.broadcast_to(b, (x * w).shape), x * w, rtol=1e-6, atol=0):
            yield f"{layer.name}: the bias scale must be input scale * weight scale, but it is not: quantize it so"


def _between_pairs(graph: _Graph) -> Iterator[str]:
    for node in graph.proto.node:
        if node.op_type in (Q, DQ) or graph.is_constant(node.output[0]):
            continue
        codes = graph.makers.get(node.input[0])
        if codes is not None and codes.op_type == Q:
            continue  # reported as a computation on codes
        for name in node.input:
            maker = graph.makers.get(name)
            if name and not graph.is_constant(name) and (maker is None or maker.op_type != DQ):
                yield f"{node.name}: inputs must come from {DQ}, but `{name}` does not: quantize it"
        readers = graph.readers.get(node.output[0], [])
        if not readers or any(reader.op_type != Q for reader in readers):
            yield f"{node.name}: the output must be read by {Q} only, but it is not: quantize it, logits too"


def _code_type(graph: _Graph, node: NodeProto) -> int:
    """Return the type of the constant that a DQ node reads; 0 if it is computed."""
    constant = graph.constants.get(node.input[0])
    return 0 if constant is None else constant.data_type


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _output_axis(layer: NodeProto) -> int:
    """Return the axis of the output channels in the weight of a layer."""
    return 0 if layer.op_type == "Conv" or _attribute(layer, "transB", 0) else 1


_RULES: dict[str, tuple[Callable[[_Graph], Iterator[str]], ...]] = {
    "tensorrt": (_one_scale, _no_computation_on_codes, _symmetric, _float_bias, _weights_per_output_channel),
    "qnn": (
        *(_one_scale, _no_computation_on_codes, _static_shapes, _unsigned_activations, _signed_channels),
        *(_weights_per_output_channel, _integer_bias, _between_pairs),
    ),
}
