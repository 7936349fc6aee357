"""Nodes of the functions of single values.

A function of codes is one of these, in this order:

- nothing, or a Clip on codes, if every code stays the same but for limits: a change of grid by a factor, a ReLU;
- a pair of DequantizeLinear and QuantizeLinear for any other change of grid, where no operation may read codes;
- a float operation between DequantizeLinear and QuantizeLinear, where its rounding is known (`has_kernel`);
- a table, which Gather looks codes up in.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from synq.engines.onnxruntime_functions import has_kernel
from synq.engines.program import Elementwise
from synq.engines.standard_arithmetic import GATE
from synq.export.qdq.graph import QuantizedGraph

KINDS: dict[str, tuple[str, int]] = {
    "sigmoid": ("Sigmoid", 13),
    "leaky_relu": ("LeakyRelu", 13),
    "hardsigmoid": ("HardSigmoid", 13),
    "hardswish": ("HardSwish", 14),
    "tanh": ("Tanh", 13),
    "gelu": ("Gelu", 20),
    "gelu_tanh": ("Gelu", 20),
}
"""Operation of a function that is a single one, and the operator set in which it appeared."""


def write_function(graph: QuantizedGraph, step: Elementwise, table: Tensor) -> None:
    """Append the nodes of a function.

    Args:
        graph: The graph.
        step: The function.
        table: (quant_max + 1,), the output code of each code of its input, limited.
    """
    source, name, label = step.inputs[0], graph.name(step.output), step.layer or step.output
    if not graph.form.computes_codes:
        _write_in_floats(graph, step, table)
        return
    codes = torch.arange(float(len(table)))
    low, high = int(table.min()), int(table.max())
    if torch.equal(table, codes.clamp(low, high)):
        if (low, high) == (0, len(table) - 1):
            graph.rename(step.output, source)
        else:
            graph.limit(graph.name(source), name, (low, high))
    elif has_kernel(step):
        _write_kernel(graph, step)
    else:
        indices = graph.node(
            "Cast", [graph.name(source)], graph.unique(f"{name}.index"), f"{label}.cast", to=TensorProto.INT32
        )
        values = graph.constant(f"{name}.table", table.numpy().astype(np.uint8))
        graph.node("Gather", [values, indices], name, label, axis=0)


def _write_in_floats(graph: QuantizedGraph, step: Elementwise, table: Tensor) -> None:
    """Append the nodes of a function for an engine that computes nothing on codes."""
    same_grid = graph.grids.get(step.output) == graph.grids[step.inputs[0]]
    if step.function != "identity":
        _write_kernel(graph, step)
    elif same_grid and torch.equal(table, torch.arange(float(len(table)))):
        graph.rename(step.output, step.inputs[0])
    else:
        graph.quantize(graph.floats(step.inputs[0]), step.output, (step.low, step.high))


def _write_kernel(graph: QuantizedGraph, step: Elementwise) -> None:
    x, name, label, limits = (
        graph.floats(step.inputs[0]),
        graph.name(step.output),
        step.layer or step.output,
        (step.low, step.high),
    )
    if step.function == "silu":
        gate = graph.node("Sigmoid", [x], graph.unique(f"{name}.gate"), f"{label}.sigmoid")
        if graph.form.batch:  # QNN: each operation between a pair
            pair = (
                graph.constant(f"{name}.gate.scale", np.float32(GATE.scale)),
                graph.constant(f"{name}.gate.zero_point", graph.code(GATE.zero_point)),
            )
            codes = graph.node("QuantizeLinear", (gate, *pair), graph.unique(f"{gate}.codes"), f"{gate}.quantize")
            gate = graph.node("DequantizeLinear", (codes, *pair), graph.unique(f"{codes}.float"), f"{gate}.dequantize")
        graph.finish("Mul", [x, gate], step, limits)
    elif step.function == "affine":
        _write_affine(graph, step)
    else:
        kind, opset = KINDS[step.function]
        graph.need_opset(opset)
        graph.finish(kind, [x], step, limits, **attributes(step.function, step.arguments))


def attributes(function: str, arguments: Mapping[str, float]) -> dict[str, Any]:
    """Return the attributes of the node of a function."""
    match function:
        case "leaky_relu":
            return {"alpha": arguments.get("negative_slope", 0.01)}
        case "hardsigmoid":
            return {"alpha": 1 / 6, "beta": 0.5}
        case "gelu_tanh":
            return {"approximate": "tanh"}
    return {}


def _write_affine(graph: QuantizedGraph, step: Elementwise) -> None:
    """Write a multiplication, an addition or both; a factor of 1 and an offset of 0 change no bit."""
    x, name, label = graph.floats(step.inputs[0]), graph.name(step.output), step.layer or step.output
    operands = [
        (kind, part, np.float32(step.arguments.get(part, neutral)))
        for kind, part, neutral in (("Mul", "factor", 1.0), ("Add", "offset", 0.0))
    ]
    used = [(kind, part, value) for kind, part, value in operands if value != (1.0 if kind == "Mul" else 0.0)]
    for number, (kind, part, value) in enumerate(used or operands[:1]):
        inputs = [x, graph.constant(f"{name}.{part}", value)]
        if number + 1 < len(used):
            x = graph.node(kind, inputs, graph.unique(f"{name}.scaled"), f"{label}.{part}")
        else:
            graph.finish(kind, inputs, step, (step.low, step.high))
