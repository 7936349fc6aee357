"""Write convolutions of an ONNX model as products of integer matrices, so that they run in integers whatever follows them.

ONNX Runtime turns a convolution between Q/DQ pairs into an integer one only where its result is quantized at once, and then rounds its
bias to the grid of the products; its ConvInteger is no faster than float. A product of matrices is its best integer kernel, and needs
neither. With codes x of the activation, its zero point z_x, codes q of the weight, zero points z_c, and the k x k patches of the image side
by side:

    codes (N, C, H, W) -> (N, H, W, C) -> pad with z_x -> k^2 slices, stacked: (N, H', W', k^2 C)
    y_c = sum (x - z_x) (q_c - z_c)                MatMulInteger with (k^2 C, C_out), Cast
    -> (N, C_out, H', W')

This is what the convolution of whole numbers gives (`onnx_file.py`). The patches are bytes, k^2 times the activation. ONNX Runtime moves the transpositions to where they meet
and cancel.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

MIN_CHANNELS = 8
"""Least input channels of a convolution that is rewritten: of fewer, as of an image, the patches are made byte by byte."""
MAX_PATCHES = 49
"""Largest kernel that is rewritten, in pixels: 7 x 7."""


def use_integer_products(model: onnx.ModelProto) -> None:
    """Rewrite, in place, each convolution of a quantized activation with an integer weight.

    What stays a convolution: one whose input is not quantized right before it; one in groups, of few channels, or of a very large kernel;
    one with a bias of its own; one whose size in pixels is not fixed.

    Args:
        model: A model of `write_onnx` whose codes are in whole bytes.
    """
    graph = model.graph
    sizes = {
        value.name: tuple(part.dim_value for part in value.type.tensor_type.shape.dim)[2:]
        for value in shape_inference.infer_shapes(model).graph.value_info
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[NodeProto] = []
    for node in graph.node:
        activation, weight = (readers.get(name) for name in node.input[:2]) if node.op_type == "Conv" else (None, None)
        size = sizes.get(node.output[0], ())
        if activation is None or weight is None or not _is_rewritten(node, constants[weight.input[0]], size):
            nodes.append(node)
            continue
        made = _Nodes(node.output[0])
        codes, scales, zero_points = (numpy_helper.to_array(constants[name]) for name in weight.input)
        assert (scales == 1).all() and numpy_helper.to_array(constants[activation.input[1]]) == 1, "whole numbers"
        _write_product(made, node, activation, codes, zero_points, size)
        nodes += made.nodes
        graph.initializer.extend(made.constants)
    wanted, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):  # without what the convolutions alone have read
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _is_rewritten(node: NodeProto, codes: TensorProto, size: tuple[int, ...]) -> bool:
    attributes = _attributes(node)
    return (
        len(node.input) == 2  # no bias: the integer form adds it behind
        and len(size) == 2
        and all(size)
        and codes.dims[1] >= MIN_CHANNELS
        and int(np.prod(codes.dims[2:])) <= MAX_PATCHES
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


class _Nodes:
    """Nodes and constants that take one node's place; their names begin with that of its output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, values: NDArray[Any]) -> str:
        """Add a constant; returns its name."""
        self.constants.append(numpy_helper.from_array(values, f"{self.name}.constant_{len(self.constants)}"))
        return str(self.constants[-1].name)

    def integers(self, *values: int) -> str:
        """Add whole numbers, as the indices of an operation."""
        return self.constant(np.array(values, np.int64))

    def then(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [name or f"{self.name}.{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def _write_product(
    made: _Nodes,
    node: NodeProto,
    activation: NodeProto,
    codes: NDArray[Any],
    zero_points: NDArray[Any],
    size: tuple[int, ...],
) -> None:
    """Write the convolution ``node`` as a product of matrices.

    Args:
        made: Where the nodes go.
        node: The convolution.
        activation: What dequantizes its input.
        codes: (C_out, C_in, k, k), those of the weight.
        zero_points: (C_out,).
        size: (H', W') of its output.
    """
    attributes = _attributes(node)
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    x, _, x_zero_point = activation.input
    x = made.then("Transpose", x, perm=[0, 2, 3, 1])
    if any((top, left, bottom, right)):
        x = made.then("Pad", x, made.integers(0, top, left, 0, 0, bottom, right, 0), x_zero_point)
    patches = []
    for offset in np.ndindex(*codes.shape[2:]):
        first = [place * dilation for place, dilation in zip(offset, dilations, strict=True)]
        last = [begin + (count - 1) * stride for begin, count, stride in zip(first, size, strides, strict=True)]
        stops = made.integers(*(end + 1 for end in last))
        patches.append(
            made.then("Slice", x, made.integers(*first), stops, made.integers(1, 2), made.integers(*strides))
        )
    x = made.then("Concat", *patches, axis=3)
    matrix = codes.transpose(2, 3, 1, 0).reshape(-1, len(codes))
    same = bool((zero_points == zero_points[0]).all())  # one for all is the case every engine knows
    columns = made.constant(zero_points[0] if same else zero_points)
    sums = made.then("MatMulInteger", x, made.constant(np.ascontiguousarray(matrix)), x_zero_point, columns)
    values = made.then("Cast", sums, to=TensorProto.FLOAT)
    made.then("Transpose", values, name=node.output[0], perm=[0, 3, 1, 2])
