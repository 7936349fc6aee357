"""Nodes of the steps on floats, and of matrix products of two activations."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from synq.engines.float_program import (
    FloatConcatenation,
    FloatConstant,
    FloatFunction,
    FloatMatrixProduct,
    FloatMean,
    FloatProduct,
    FloatStep,
    FloatSum,
    LayerNorm,
    MatrixProduct,
    Softmax,
)
from synq.engines.onnxruntime_floats import mean_weights
from synq.export.qdq.functions import KINDS, attributes
from synq.export.qdq.graph import QuantizedGraph

_PLAIN: dict[type[FloatStep], str] = {FloatSum: "Add", FloatProduct: "Mul", FloatMatrixProduct: "MatMul"}


def write_product(graph: QuantizedGraph, step: MatrixProduct) -> None:
    """Append a matrix product of codes, whose result is codes or floats."""
    graph.finish("MatMul", [graph.floats(value) for value in step.inputs], step, (step.low, step.high))


def write_floats(graph: QuantizedGraph, step: FloatStep, rows: tuple[int, ...]) -> None:
    """Append the nodes of a step on floats.

    Args:
        graph: The graph, with the values that the step reads.
        step: The step.
        rows: Sizes of the axes of its first input between N and the last one.

    Raises:
        TypeError: If the kind of the step is not known.
    """
    inputs, name = [graph.name(value) for value in step.inputs], graph.name(step.output)
    match step:
        case FloatConstant():
            kind = "Add" if step.operation == "add" else "Mul"
            graph.finish(kind, [*inputs, graph.constant(f"{name}.constant", _floats(step.constant))], step, None)
        case FloatFunction():
            _write_function(graph, step)
        case LayerNorm():
            graph.need_opset(17)
            parts = [("weight", step.weight), ("bias", step.bias)]
            constants = [graph.constant(f"{name}.{part}", _floats(value)) for part, value in parts]
            graph.finish("LayerNormalization", [*inputs, *constants], step, None, axis=-1, epsilon=step.eps)
        case Softmax():
            graph.finish("Softmax", inputs, step, None, axis=-1)
        case FloatMean():
            _write_mean(graph, step, rows[-1])
        case FloatConcatenation():
            graph.finish("Concat", inputs, step, None, axis=step.axis)
        case _ if type(step) in _PLAIN:
            graph.finish(_PLAIN[type(step)], inputs, step, None)
        case _:
            raise TypeError(f"no nodes for {type(step).__name__}")


def _floats(values: Tensor) -> npt.NDArray[np.float32]:
    return values.detach().cpu().numpy().astype(np.float32)


def _write_function(graph: QuantizedGraph, step: FloatFunction) -> None:
    (x,), name, label = [graph.name(value) for value in step.inputs], graph.name(step.output), step.layer or step.output
    match step.function:
        case "silu":
            gate = graph.node("Sigmoid", [x], graph.unique(f"{name}.gate"), f"{label}.sigmoid")
            graph.finish("Mul", [x, gate], step, None)
        case "relu":
            graph.finish("Relu", [x], step, None)
        case "relu6":
            ends = [graph.constant(f"{name}.{end}", np.float32(value)) for end, value in (("low", 0.0), ("high", 6.0))]
            graph.finish("Clip", [x, *ends], step, None)
        case _:
            kind, opset = KINDS[step.function]
            graph.need_opset(opset)
            graph.finish(kind, [x], step, None, **attributes(step.function, step.arguments))


def _write_mean(graph: QuantizedGraph, step: FloatMean, count: int) -> None:
    """Write a mean as a matrix product of two rows, whose order of sums is known, and take the first."""
    (x,), name, label = [graph.name(value) for value in step.inputs], graph.name(step.output), step.layer or step.output
    weights = graph.constant(f"{name}.weights", _floats(mean_weights(count)))
    rows = graph.node("MatMul", [weights, x], graph.unique(f"{name}.rows"), f"{label}.rows")
    first = graph.constant(f"{name}.first", np.int64(0))
    graph.node("Gather", [rows, first], name, label, axis=-2)
