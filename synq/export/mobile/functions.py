"""Functions of single values as operators of LiteRT.

XNNPACK evaluates ``DEQUANTIZE, function, QUANTIZE`` at every code when it loads a file, and then runs a table; so it
does with LOGISTIC, TANH and ELU on codes. A SiLU, whose input has two readers, stays in floats. Functions that the
format does not have are tables in the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature

import numpy as np
import torch

from synq.engines.kernels import unsupported
from synq.engines.program import Elementwise
from synq.engines.xnnpack_arithmetic import XnnpackArithmetic
from synq.export.mobile.emitter import OFFSET, Emitter

RELU6 = 3
"""Number of the fused activation."""


@dataclass(frozen=True)
class Link:
    """One operator of a chain.

    Attributes:
        operator: Of the format.
        options: Name of its table of options.
        operand: Constant as second input; None: it has none.
        gated: Whether the second input is the function's own.
        values: Attributes of the table.
    """

    operator: str
    options: str = ""
    operand: float | None = None
    gated: bool = False
    values: dict[str, object] = field(default_factory=dict)


def _plus(value: float, activation: int = 0) -> Link:
    return Link("ADD", "Add", value, values={"fusedActivationFunction": activation})


def _times(value: float) -> Link:
    return Link("MUL", "Mul", value)


GATE = Link("MUL", "Mul", gated=True)
CHAINS: dict[str, Callable[..., list[Link]]] = {
    "identity": list,
    "relu": lambda: [Link("RELU")],
    "relu6": lambda: [Link("RELU6")],
    "leaky_relu": lambda negative_slope=0.01: [Link("LEAKY_RELU", "LeakyRelu", values={"alpha": negative_slope})],
    "elu": lambda: [Link("ELU")],
    "gelu": lambda: [Link("GELU", "Gelu", values={"approximate": False})],
    "gelu_tanh": lambda: [Link("GELU", "Gelu", values={"approximate": True})],
    "sigmoid": lambda: [Link("LOGISTIC")],
    "tanh": lambda: [Link("TANH")],
    "hardswish": lambda: [Link("HARD_SWISH", "HardSwish")],
    "hardsigmoid": lambda: [_plus(3.0, RELU6), _times(1 / 6)],
    "affine": lambda factor=1.0, offset=0.0: [_times(factor), _plus(offset)],
    "silu": lambda: [Link("LOGISTIC"), GATE],
}
"""Operators by the name of the function, from its arguments; with other arguments it is a table."""
ON_CODES = ("sigmoid", "tanh", "elu")
"""Functions whose operator has a kernel on codes that is the same table."""


def emit_function(emitter: Emitter, step: Elementwise) -> None:
    """Add the operators of a function of single values.

    Raises:
        ValueError: If the network without quantization is written and the engine has no such float operator.
    """
    chain = _chain(step)
    if chain is None and not emitter.floats:
        _emit_table(emitter, step)
        return
    if chain is None:
        text = f"`{step.layer}` is the function {step.function} in floats: time another network"
        raise ValueError(unsupported("litert", text))
    [source] = emitter.inputs(step)
    if step.function in ON_CODES and not emitter.floats:
        emitter.emit(step, chain[0].operator, [source])
        return
    shape = emitter.shape(step.output)
    first = source
    if not emitter.floats:
        first = emitter.tensor(f"{step.output}.input", shape, None)
        emitter.graph.operator("DEQUANTIZE", [source], first, 2, "Dequantize")
    current = first
    for link in chain:
        inputs = [current]
        if link.operand is not None:
            inputs.append(emitter.real(link.operand))
        elif link.gated:
            inputs.append(first)
        output = emitter.tensor(f"{step.output}.{link.operator.lower()}", shape, None)
        emitter.graph.operator(link.operator, inputs, output, 1, link.options, **link.values)
        current = output
    if emitter.floats:
        emitter.tensors[step.output] = current
    else:
        emitter.emit(step, "QUANTIZE", [current], options="Quantize")


def _chain(step: Elementwise) -> list[Link] | None:
    """Return the operators of a function; None if there are none for it or for its arguments."""
    make = CHAINS.get(step.function)
    if make is None or not step.arguments.keys() <= signature(make).parameters.keys():
        return None
    return make(**step.arguments)


def _emit_table(emitter: Emitter, step: Elementwise) -> None:
    """Add a table in which GATHER looks codes up: exact for any function, at the cost of three operators."""
    own, grid, shape = emitter.grid(step.inputs[0]), emitter.grid(step.output), emitter.shape(step.output)
    assert own is not None and grid is not None
    codes = XnnpackArithmetic(emitter.program).elementwise(step, torch.arange(own.quant_max + 1.0))
    table = codes.clamp(step.low, step.high).numpy().astype(np.int32) - OFFSET
    numbers = emitter.graph.activation(f"{step.output}.cast", shape, dtype="int32")
    emitter.graph.operator("CAST", emitter.inputs(step), numbers, 1, "Cast")
    index = emitter.graph.activation(f"{step.output}.index", shape, dtype="int32")
    offset = emitter.numbers(emitter.offsets[step.inputs[0]])
    emitter.graph.operator("ADD", [numbers, offset], index, 1, "Add")
    zero_point = grid.zero_point - OFFSET
    constant = emitter.graph.constant(f"{step.output}.table", table.astype(np.int8), [grid.scale], zero_point)
    output = emitter.tensor(step.output, shape, grid)
    emitter.graph.operator("GATHER", [constant, index], output, 2, "Gather", axis=0)
    emitter.tensors[step.output], emitter.offsets[step.output] = output, OFFSET
