"""Rewrite the convolutions of an ONNX model as integer matrix products, which run with integer kernels.

ONNX Runtime replaces a convolution between Q/DQ pairs by an integer kernel only if its output is quantized immediately,
and then rounds its bias to the scale of the products; its ConvInteger is not faster than float. Matrix products have
its best integer kernel, and neither restriction. With codes x of the activation and zero_point z_x, codes q of the
weight and zero points z_c, and the k x k patches of the image concatenated (im2col):

    codes (N, C, H, W) -> (N, H, W, C) -> pad with z_x -> k^2 slices, concatenated: (N, H', W', k^2 C)
    y_c = sum (x - z_x) (q_c - z_c)                MatMulInteger with (k^2 C, C_out), Cast
    -> (N, C_out, H', W')

The result is that of the convolution of integer values (`onnx_graph.py`). The patches are bytes, k^2 times the size of
the activation. ONNX Runtime moves and cancels the transpositions.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

MIN_CHANNELS = 8
"""Smallest number of input channels: with fewer, as in an image, the patches would be copied byte by byte."""
MAX_KERNEL_PIXELS = 49
"""Largest kernel that is rewritten, in pixels: 7 x 7."""


def convs_to_integer_matmul(model: onnx.ModelProto) -> None:
    """Rewrite, in place, each convolution of a quantized activation with an integer weight as a matrix product.

    A convolution is not rewritten if its input is not the direct output of a Q/DQ pair, if it has groups, few input
    channels, a very large kernel or a bias, or if the size of its output is dynamic.

    Args:
        model: A model from `write_container`, with codes of 8-bit types.
    """
    graph = model.graph
    sizes = {
        value.name: tuple(part.dim_value for part in value.type.tensor_type.shape.dim)[2:]
        for value in shape_inference.infer_shapes(model).graph.value_info
    }
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[NodeProto] = []
    for node in graph.node:
        activation, weight = (
            (dequantized.get(name) for name in node.input[:2]) if node.op_type == "Conv" else (None, None)
        )
        size = sizes.get(node.output[0], ())
        if activation is None or weight is None or not _is_rewritten(node, initializers[weight.input[0]], size):
            nodes.append(node)
            continue
        builder = _GraphBuilder(node.output[0])
        codes, scales, zero_points = (numpy_helper.to_array(initializers[name]) for name in weight.input)
        assert (scales == 1).all() and numpy_helper.to_array(initializers[activation.input[1]]) == 1, "integer values"
        _add_matmul(builder, node, activation, codes, zero_points, size)
        nodes += builder.nodes
        graph.initializer.extend(builder.initializers)
    required, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):  # drops nodes that only the replaced convolutions have read
        if required.intersection(node.output):
            kept.append(node)
            required.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _is_rewritten(node: NodeProto, codes: TensorProto, size: tuple[int, ...]) -> bool:
    attributes = _attributes(node)
    return (
        len(node.input) == 2  # no bias: the integer form adds it in its shift
        and len(size) == 2
        and all(size)
        and codes.dims[1] >= MIN_CHANNELS
        and int(np.prod(codes.dims[2:])) <= MAX_KERNEL_PIXELS
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


class _GraphBuilder:
    """Nodes and initializers that replace one node; their names start with that of its output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, values: NDArray[Any]) -> str:
        """Add an initializer, and return its name."""
        self.initializers.append(numpy_helper.from_array(values, f"{self.name}.constant_{len(self.initializers)}"))
        return str(self.initializers[-1].name)

    def integers(self, *values: int) -> str:
        """Add an int64 initializer, such as the indices of an operation, and return its name."""
        return self.constant(np.array(values, np.int64))

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [name or f"{self.name}.{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def _add_matmul(
    builder: _GraphBuilder,
    node: NodeProto,
    activation: NodeProto,
    codes: NDArray[Any],
    zero_points: NDArray[Any],
    size: tuple[int, ...],
) -> None:
    """Add the nodes that compute the convolution ``node`` as an integer matrix product.

    Args:
        builder: Receives the nodes and initializers.
        node: The convolution.
        activation: DequantizeLinear node of its input.
        codes: (C_out, C_in, k, k) of the weight.
        zero_points: (C_out,) of the weight.
        size: (H', W') of its output.
    """
    attributes = _attributes(node)
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    x, _, x_zero_point = activation.input
    x = builder.add("Transpose", x, perm=[0, 2, 3, 1])
    if any((top, left, bottom, right)):
        x = builder.add("Pad", x, builder.integers(0, top, left, 0, 0, bottom, right, 0), x_zero_point)
    patches = []
    for offset in np.ndindex(*codes.shape[2:]):
        first = [position * dilation for position, dilation in zip(offset, dilations, strict=True)]
        last = [begin + (count - 1) * stride for begin, count, stride in zip(first, size, strides, strict=True)]
        stops = builder.integers(*(end + 1 for end in last))
        patches.append(
            builder.add("Slice", x, builder.integers(*first), stops, builder.integers(1, 2), builder.integers(*strides))
        )
    x = builder.add("Concat", *patches, axis=3)
    matrix = codes.transpose(2, 3, 1, 0).reshape(-1, len(codes))
    same = bool((zero_points == zero_points[0]).all())  # all engines support a scalar zero_point
    w_zero_point = builder.constant(zero_points[0] if same else zero_points)
    sums = builder.add("MatMulInteger", x, builder.constant(np.ascontiguousarray(matrix)), x_zero_point, w_zero_point)
    values = builder.add("Cast", sums, to=TensorProto.FLOAT)
    builder.add("Transpose", values, name=node.output[0], perm=[0, 3, 1, 2])
