"""Nodes of the functions of single values."""

from synq.engines.program import Elementwise
from synq.export.qdq.graph import QuantizedGraph


def write_function(graph: QuantizedGraph, step: Elementwise) -> None:
    """Append the nodes of a function."""
    kinds = {"relu": "Relu", "sigmoid": "Sigmoid", "leaky_relu": "LeakyRelu", "tanh": "Tanh", "hardswish": "HardSwish"}
    graph.finish(kinds[step.function], [graph.floats(step.inputs[0])], step, (step.low, step.high))
