"""Functions of single values as ONNX Runtime computes them in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines.program import Elementwise

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}
"""Float32 values -> float32 values, by the name of the function."""


def function_values(step: Elementwise, x: Tensor) -> Tensor:
    """Return the float32 outputs of a function.

    Args:
        step: The function and its arguments.
        x: Float32 inputs of any shape.

    Raises:
        ValueError: If ONNX Runtime's arithmetic of the function is not known.
    """
    if step.function not in FUNCTIONS:
        raise ValueError(
            f"`function` must be one of {', '.join(FUNCTIONS)} for onnxruntime, but got {step.function} at "
            f"`{step.layer}`: use another target, or replace the function"
        )
    return FUNCTIONS[step.function](x, **step.arguments)
