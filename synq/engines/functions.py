"""The functions of single values that a program may have, defined by PyTorch in float64."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines.program import Elementwise


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return scale * torch.where(x > 0, x, alpha * torch.expm1(input_scale * x))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "affine": lambda x, factor=1.0, offset=0.0: x * factor + offset,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "mish": F.mish,
    "elu": _elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "abs": torch.abs,
    "exp": torch.exp,
    "erf": torch.erf,
    "sqrt": torch.sqrt,
    "pow": lambda x, exponent: x**exponent,
}
"""float64 values and the arguments of the function -> float64 values."""


def exact_values(step: Elementwise, x: Tensor) -> Tensor:
    """Return the float64 outputs of a function, rounded to float32; 0 where it has no value.

    Args:
        step: The function and its arguments.
        x: Inputs of any shape.

    Raises:
        ValueError: If the function is not in `FUNCTIONS`.
    """
    if step.function not in FUNCTIONS:
        raise ValueError(
            f"`function` must be one of {', '.join(FUNCTIONS)}, but got {step.function} at `{step.layer}`: replace it "
            "by one of them"
        )
    values = FUNCTIONS[step.function](x.double(), **step.arguments).float()
    return values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
