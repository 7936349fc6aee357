"""The nodes of each step of a program, in the form that ONNX Runtime and OpenVINO replace by integer kernels."""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from synq.engines.arithmetic import Arithmetic, table
from synq.engines.float_program import FloatStep, MatrixProduct
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Layer,
    Limited,
    MaxPool,
    Movement,
    NearestResize,
    Pad,
    Product,
    Quantize,
    Reshape,
    Slice,
    SpaceToDepth,
    Step,
    Sum,
    Transpose,
)
from synq.export.qdq.floats import write_floats, write_product
from synq.export.qdq.functions import write_function
from synq.export.qdq.graph import QuantizedGraph

INT4_BITS = 4
"""Largest bit-width of a weight that is stored as INT4."""
PACKED_BITS = 2
"""Largest bit-width of a weight that fits into a quarter of a byte."""
PACKED_ZERO = 2
"""Code of zero in a quarter of a byte."""


def write_step(
    graph: QuantizedGraph, step: Step, arithmetic: Arithmetic, rows: tuple[int, ...], *, pack_two_bits: bool
) -> None:
    """Append the nodes of a step.

    Args:
        graph: The graph, with the values that the step reads.
        step: The step.
        arithmetic: Of the engine, for tables.
        rows: Sizes of the axes of its first input between N and the last one.
        pack_two_bits: Whether weights of 2 bits take a quarter of a byte instead of half a byte.

    Raises:
        TypeError: If the kind of the step is not known.
    """
    match step:
        case Quantize():
            graph.quantize(graph.name(step.inputs[0]), step.output)
        case Dequantize():
            inputs = (graph.name(step.inputs[0]), *graph.scale_and_zero_point(step.inputs[0]))
            graph.node("DequantizeLinear", inputs, graph.name(step.output), step.layer or step.output)
        case Convolution():
            inputs = (graph.floats(step.inputs[0]), *_parameters(graph, step, pack_two_bits))
            graph.finish(
                "Conv",
                inputs,
                step,
                (step.low, step.high),
                kernel_shape=list(step.weight.shape[2:]),
                strides=list(step.stride),
                pads=list(step.padding),
                dilations=list(step.dilation),
                group=step.groups,
            )
        case Dense():
            _write_dense(graph, step, pack_two_bits, rows)
        case Elementwise():
            write_function(graph, step, table(arithmetic, step))
        case MatrixProduct():
            write_product(graph, step)
        case FloatStep():
            write_floats(graph, step, rows)
        case Limited():
            _write_limited(graph, step)
        case Pad() if step.inputs[0] in graph.grids and graph.form.computes_codes:
            _write_pad(graph, step)
        case SpaceToDepth():
            _write_blocks(graph, step, rows)
        case Movement():
            _write_movement(graph, step)
        case _:
            raise TypeError(f"no nodes for {type(step).__name__}")


def _write_limited(graph: QuantizedGraph, step: Limited) -> None:
    inputs, limits = [graph.floats(value) for value in step.inputs], (step.low, step.high)
    match step:
        case Sum():
            graph.finish("Add", inputs, step, limits)
        case Product():
            graph.finish("Mul", inputs, step, limits)
        case Concatenation():
            graph.finish("Concat", inputs, step, limits, axis=step.axis)
        case GlobalAveragePool():
            graph.finish("GlobalAveragePool", inputs, step, limits)
        case AveragePool():
            graph.finish(
                "AveragePool",
                inputs,
                step,
                limits,
                kernel_shape=list(step.kernel),
                strides=list(step.stride),
                pads=list(step.padding),
                count_include_pad=int(step.count_padding),
            )
        case _:
            raise TypeError(f"no nodes for {type(step).__name__}")


def _write_movement(graph: QuantizedGraph, step: Movement) -> None:
    """Write a movement between DequantizeLinear and QuantizeLinear of one grid: engines move the codes."""
    x, name = graph.floats(step.inputs[0]), graph.name(step.output)

    def numbers(part: str, values: tuple[int, ...]) -> str:
        return graph.constant(f"{name}.{part}", np.array(values, np.int64))

    match step:
        case MaxPool():
            graph.finish(
                "MaxPool",
                [x],
                step,
                None,
                kernel_shape=list(step.kernel),
                strides=list(step.stride),
                pads=list(step.padding),
                dilations=list(step.dilation),
            )
        case Reshape(shape=(_,)):
            graph.finish("Flatten", [x], step, None, axis=1)
        case Reshape():
            graph.finish("Reshape", [x, numbers("shape", (-1, *step.shape))], step, None)
        case Transpose():
            graph.finish("Transpose", [x], step, None, perm=list(step.axes))
        case Slice():
            ends = {"start": step.start, "stop": step.stop, "axis": step.axis, "step": step.step}
            graph.finish("Slice", [x, *(numbers(part, (value,)) for part, value in ends.items())], step, None)
        case Pad():
            graph.finish("Pad", [x, numbers("pads", (*step.before, *step.after))], step, None)
        case NearestResize():
            scales = graph.constant(f"{name}.factors", np.array((1, 1, *step.factors), np.float32))
            graph.finish(
                "Resize",
                [x, "", scales],
                step,
                None,
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        case _:
            raise TypeError(f"no nodes for {type(step).__name__}")


def _write_pad(graph: QuantizedGraph, step: Pad) -> None:
    """Pad codes: between DequantizeLinear and QuantizeLinear, ONNX Runtime would pad floats."""
    name = graph.name(step.output)
    pads = graph.constant(f"{name}.pads", np.array((*step.before, *step.after), np.int64))
    zero = graph.constant(f"{name}.padding", np.uint8(graph.grids[step.output].zero_point))
    graph.node("Pad", (graph.name(step.inputs[0]), pads, zero), name, step.layer or step.output)


def _write_blocks(graph: QuantizedGraph, step: SpaceToDepth, rows: tuple[int, ...]) -> None:
    """Make channels of the pixels of each block, on codes, moving one axis at a time.

    ONNX Runtime moves one axis ten times as fast as both, and 1.23 has no SpaceToDepth of UINT8.

    Args:
        graph: The graph.
        step: The step.
        rows: Channels and height of its input.
    """
    name, (down, across) = graph.name(step.output), step.block
    (channels, height), codes = rows, graph.name(step.inputs[0])
    moves: tuple[tuple[str, list[int]], ...] = (
        ("rows", [0, channels, height // down, down, -1]),
        ("rows.moved", [0, 3, 1, 2, 4]),
        ("columns", [0, down, channels, height // down, -1, across]),
        ("columns.moved", [0, 1, 5, 2, 3, 4]),
        ("channels", [0, channels * down * across, height // down, -1]),
    )
    for part, numbers in moves:
        output, label = graph.unique(f"{name}.{part}"), f"{name}.{part}"
        if part.endswith("moved"):
            codes = graph.node("Transpose", [codes], output, label, perm=numbers)
        else:
            shape = graph.constant(f"{label}.shape", np.array(numbers, np.int64))
            codes = graph.node("Reshape", [codes, shape], name if part == "channels" else output, label)


def _write_dense(graph: QuantizedGraph, step: Dense, pack_two_bits: bool, rows: tuple[int, ...]) -> None:
    """Write a linear layer as Gemm, which needs two axes: other inputs become rows, and their outputs rows again.

    Args:
        graph: The graph.
        step: The layer.
        pack_two_bits: See `write_step`.
        rows: Sizes of the axes between N and the features.
    """
    features = (len(step.weight), step.weight.shape[1])
    if not rows:
        inputs = (graph.floats(step.inputs[0]), *_parameters(graph, step, pack_two_bits))
        graph.finish("Gemm", inputs, step, (step.low, step.high), transB=1)
        return
    if not graph.form.computes_codes:
        _write_dense_in_floats(graph, step, pack_two_bits, rows)
        return
    name, label = graph.name(step.output), step.layer or step.output
    shape = graph.constant(f"{name}.rows", np.array((-1, features[1]), np.int64))
    codes = graph.node("Reshape", (graph.name(step.inputs[0]), shape), graph.unique(f"{name}.input"), f"{label}.input")
    floats = graph.unique(f"{codes}.dequantized")
    graph.node("DequantizeLinear", (codes, *graph.scale_and_zero_point(step.inputs[0])), floats, f"{codes}.dequantize")
    output = graph.unique(f"{name}.float")
    graph.node("Gemm", (floats, *_parameters(graph, step, pack_two_bits)), output, label, transB=1)
    shape = graph.constant(f"{name}.shape", np.array((-1, *rows, features[0]), np.int64))
    if step.output not in graph.grids:
        graph.node("Reshape", (output, shape), name, f"{label}.output")
        return
    flat = graph.unique(f"{name}.rows")
    graph.quantize(output, step.output, (step.low, step.high), name=flat)
    graph.node("Reshape", (flat, shape), name, f"{label}.output")


def _write_dense_in_floats(graph: QuantizedGraph, step: Dense, pack_two_bits: bool, rows: tuple[int, ...]) -> None:
    """Write the same for an engine that computes nothing on codes: each Reshape is between a pair of nodes, too."""
    name, label, source = graph.name(step.output), step.layer or step.output, step.inputs[0]
    features = (len(step.weight), step.weight.shape[1])
    shape = graph.constant(f"{name}.rows", np.array((-1, features[1]), np.int64))
    pair = graph.scale_and_zero_point(source)
    reshaped = graph.node("Reshape", (graph.floats(source), shape), graph.unique(f"{name}.input"), f"{label}.input")
    codes = graph.node("QuantizeLinear", (reshaped, *pair), graph.unique(f"{name}.input.codes"), f"{label}.quantize")
    x = graph.node("DequantizeLinear", (codes, *pair), graph.unique(f"{codes}.float"), f"{label}.dequantize")
    output = graph.unique(f"{name}.float")
    graph.node("Gemm", (x, *_parameters(graph, step, pack_two_bits)), output, label, transB=1)
    shape = graph.constant(f"{name}.shape", np.array((-1, *rows, features[0]), np.int64))
    if step.output not in graph.grids:
        graph.node("Reshape", (output, shape), name, f"{label}.output")
        return
    flat = graph.unique(f"{name}.rows")
    graph.quantize(output, step.output, (step.low, step.high), name=flat)
    pair = graph.scale_and_zero_point(step.output)
    values = graph.node("DequantizeLinear", (flat, *pair), graph.unique(f"{flat}.float"), f"{flat}.dequantize")
    reshaped = graph.node("Reshape", (values, shape), graph.unique(f"{name}.reshaped"), f"{label}.output")
    graph.node("QuantizeLinear", (reshaped, *pair), name, f"{name}.quantize")


def _parameters(graph: QuantizedGraph, step: Layer, pack_two_bits: bool) -> tuple[str, str]:
    """Return the names of the floats of a weight and a bias, which engines fold into the layer."""
    label = step.layer or graph.name(step.output)
    codes: npt.NDArray[np.int8] = step.weight.cpu().numpy().astype(np.int8)
    weight_scale = step.weight_scale.cpu().numpy().astype(np.float32)
    zero_point, is_int4 = 0, False
    if step.weight_bits <= PACKED_BITS and pack_two_bits and codes.size % 4 == 0:
        weight, zero_point = _quarter_bytes(graph, label, codes)
    elif step.weight_bits <= INT4_BITS and graph.form.int4:
        weight, name = graph.packed_constant(f"{label}.weight", codes), f"{label}.weight.cast"
        is_int4 = not graph.form.casts_int4
        if graph.form.casts_int4:
            # DequantizeLinear of INT4 keeps ONNX Runtime from fusing the layer; a Cast is folded when the file is
            # loaded.
            weight = graph.node("Cast", [weight], graph.unique(f"{name}.output"), name, to=TensorProto.INT8)
    else:
        weight = graph.constant(f"{label}.weight", codes)
    weight = _dequantized_parameter(
        graph, f"{label}.weight", weight, weight_scale, None if is_int4 else np.full(len(codes), zero_point, np.int8)
    )
    bias_codes = step.bias.cpu().numpy().astype(np.int32)
    bias_scale = np.float32(graph.grids[step.inputs[0]].scale) * weight_scale
    if graph.form.float_bias:
        return weight, graph.constant(f"{label}.bias", bias_codes.astype(np.float32) * bias_scale)
    bias = graph.constant(f"{label}.bias", bias_codes)
    return weight, _dequantized_parameter(graph, f"{label}.bias", bias, bias_scale, np.zeros(len(codes), np.int32))


def _dequantized_parameter(
    graph: QuantizedGraph,
    name: str,
    codes: str,
    scale: npt.NDArray[np.float32],
    zero_points: npt.NDArray[Any] | None,
) -> str:
    """Append DequantizeLinear with one scale per output channel; without zero points they are 0."""
    inputs = [codes, graph.constant(f"{name}.scale", scale)]
    if zero_points is not None:
        inputs.append(graph.constant(f"{name}.zero_point", zero_points))
    return graph.node("DequantizeLinear", inputs, graph.unique(f"{name}.dequantized"), f"{name}.dequantize", axis=0)


def _quarter_bytes(graph: QuantizedGraph, label: str, codes: npt.NDArray[np.int8]) -> tuple[str, int]:
    """Return the name of INT8 codes that are stored in 2 bits, four in a byte, and the zero point that they have.

    Shifted by 0, 2, 4 and 6 bits, the n bytes give the four quarters of the codes; engines do so at load.
    """
    quarters = (codes + PACKED_ZERO).astype(np.uint8).reshape(4, -1)
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    content = np.bitwise_or.reduce(quarters << shifts, axis=0, keepdims=True)
    parts: dict[str, npt.NDArray[Any] | np.generic] = {
        "packed": content,
        "shifts": shifts,
        "mask": np.uint8(3),
        "shape": np.array(codes.shape, np.int64),
    }
    names = [graph.constant(f"{label}.weight.{part}", value) for part, value in parts.items()]
    graph.need_opset(18)  # BitwiseAnd
    values = names[0]
    for kind, others, attributes in (
        ("BitShift", names[1:2], {"direction": "RIGHT"}),
        ("BitwiseAnd", names[2:3], {}),
        ("Reshape", names[3:], {}),
        ("Cast", [], {"to": TensorProto.INT8}),
    ):
        part = f"{label}.weight.{kind.lower()}"
        values = graph.node(kind, [values, *others], graph.unique(f"{part}.output"), part, **attributes)
    return values, PACKED_ZERO
