"""Functions of single values: clamps, which become limits of codes, and all others."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from synq.engines.aten import floats
from synq.engines.aten.builder import Builder
from synq.engines.aten.symbols import Call, Codes, Symbol, limits, made
from synq.engines.program import Elementwise

_BOUNDS: dict[str, Callable[[Call], tuple[Any, Any]]] = {
    "relu": lambda call: (0.0, None),
    "relu6": lambda call: (0.0, 6.0),
    "hardtanh": lambda call: (call.argument("min_val"), call.argument("max_val")),
    "clamp": lambda call: (call.argument("min"), call.argument("max")),
    "clamp_min": lambda call: (call.argument("min"), None),
    "clamp_max": lambda call: (None, call.argument("max")),
    "maximum": lambda call: (_constant(call), None),
    "minimum": lambda call: (None, _constant(call)),
}
FUNCTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("sigmoid", "hardsigmoid", "hardswish", "silu", "mish", "tanh", "abs", "exp", "log_sigmoid", "erf", "sqrt"), ()
    ),
    "elu": ("alpha", "scale", "input_scale"),
    "leaky_relu": ("negative_slope",),
    "softplus": ("beta", "threshold"),
    "hardshrink": ("lambd",),
    "softshrink": ("lambd",),
}
"""Functions with the names of their arguments; both are PyTorch's."""


def clamp(builder: Builder, call: Call) -> Symbol:
    """Lower a clamp by constants: limits of the codes that the quantizer after it makes."""
    first = call.args[0] if not isinstance(call.args[0], Tensor) else call.args[1]
    low, high = (_number(builder, call, bound) for bound in _BOUNDS[call.name](call))
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not isinstance(first, Codes):
        if first.moves and not low <= 0.0 <= high and not isinstance(first, Tensor):
            builder.reject(call, "it excludes zero, after a movement of unrounded values")
        return first.clamped(low, high)  # type: ignore[no-any-return]
    if first.grid is None:
        if builder.float_trunk:
            return floats.clamped(builder, call, first, low, high)
        builder.reject(call, "it reads logits")
    codes = limits(first.grid, low, high)
    if codes[0] <= first.low and first.high <= codes[1]:
        return first
    step = Elementwise(inputs=(first.name,), output="", layer=call.layer, function="identity")
    return made(step, first.shape).clamped(low, high)


def function(builder: Builder, call: Call) -> Symbol:
    """Lower a function of single values."""
    arguments = {name: float(call.argument(name)) for name in FUNCTIONS.get(call.name, ())}
    name = call.name
    if name == "gelu" and call.argument("approximate") == "tanh":
        name = "gelu_tanh"
    elif name == "celu":
        alpha = float(call.argument("alpha"))
        name, arguments = "elu", {"alpha": alpha, "scale": 1.0, "input_scale": 1.0 / alpha}
    elif name == "square":
        name, arguments = "pow", {"exponent": 2.0}
    elif name == "pow":
        exponent = call.argument("exponent")
        if not isinstance(exponent, int | float):
            builder.reject(call, "its exponent is not a constant number")
        arguments = {"exponent": float(exponent)}
    elif name == "prelu":
        slope = call.argument("weight")
        if not isinstance(slope, Tensor) or slope.numel() != 1:
            builder.reject(call, "it has a slope for each channel; one slope for all has a form")
        name, arguments = "leaky_relu", {"negative_slope": float(slope)}
    if floats.in_floats(builder, call.args[0]):
        return floats.function(builder, call, call.args[0], name, arguments)
    codes = builder.codes(call, call.args[0])
    step = Elementwise(inputs=(codes.name,), output="", layer=call.layer, function=name, arguments=arguments)
    return made(step, codes.shape)


def _constant(call: Call) -> Any:
    return next((a for a in call.args[:2] if isinstance(a, Tensor)), call.args[1])


def _number(builder: Builder, call: Call, bound: Any) -> float | None:
    if bound is None:
        return None
    if isinstance(bound, Tensor) and bound.numel() == 1:
        return float(bound)
    if not isinstance(bound, int | float):
        builder.reject(call, "its bounds are not constant numbers")
    return float(bound)


POINTWISE: dict[str, Callable[[Builder, Call], Any]] = {
    **dict.fromkeys(_BOUNDS, clamp),
    **dict.fromkeys((*FUNCTIONS, "gelu", "celu", "square", "pow", "prelu"), function),
}
"""Lowering of each operator by its name."""
