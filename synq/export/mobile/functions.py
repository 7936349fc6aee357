"""Functions of single values as operators of LiteRT.

XNNPACK evaluates ``DEQUANTIZE, function, QUANTIZE`` at every code when it loads a file, and then runs a table; so it
does with LOGISTIC, TANH and ELU on codes. A SiLU, whose input has two readers, stays in floats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from synq.engines.program import Elementwise
from synq.export.mobile.emitter import Emitter
from synq.export.mobile.rejections import unsupported

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
"""Operators by the name of the function; its arguments are those of PyTorch's function."""
ON_CODES = ("sigmoid", "tanh", "elu")
"""Functions whose operator has a kernel on codes that is the same table."""


def emit_function(emitter: Emitter, step: Elementwise) -> None:
    """Add the operators of a function of single values.

    Raises:
        ValueError: If the engine has no such function, or with other arguments only.
    """
    if step.function not in CHAINS:
        choices = ", ".join(sorted(CHAINS))
        cure = f"use one of {choices}, or export with `--target exact`"
        raise ValueError(unsupported("litert", step, f"the function {step.function}", cure))
    try:
        chain = CHAINS[step.function](**step.arguments)
    except TypeError:
        given = f"{step.function} with {', '.join(step.arguments)}"
        raise ValueError(unsupported("litert", step, given)) from None
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
