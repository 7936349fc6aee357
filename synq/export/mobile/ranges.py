"""Ratios of scales for which XNNPACK has kernels; outside them it aborts, or leaves the operator to other kernels."""

import torch
from torch import Tensor

from synq.engines.kernels import unsupported
from synq.engines.program import Grid, Layer, Product, Program, Sum

LARGEST_FACTOR, SMALLEST_FACTOR = 2.0**8, 2.0**-32
"""Of a layer's sums: from the second on, below the first."""
SUM_RATIOS = (2.0**-10, 2.0**8)
"""Of the larger input scale of a sum to the output's: from the first on, below the second."""
PRODUCT_RATIOS = (2.0**-16, 2.0**8)
"""Of the product of the input scales to the output's, likewise."""


def kernel_weight_scale(step: Layer, source: Grid, output: Grid) -> Tensor:
    """Return the weight scale (C_out,) in float32 with which the engine computes the same codes and has a kernel.

    The factor of a channel's sums is ``s_x s_w / s_y``. From 256 on, each sum but 0 saturates, as it does with 255;
    below 2^-32, each is rounded to 0, as it is with 2^-32. Both occur where a channel was 0 on all images.

    Args:
        step: The layer.
        source, output: Grids of its input and output.
    """
    scale = step.weight_scale.float()
    factor = torch.tensor(source.scale, dtype=torch.float32) * scale / torch.tensor(output.scale, dtype=torch.float32)
    unit = output.scale / source.scale
    scale = torch.where(factor >= LARGEST_FACTOR, torch.full_like(scale, (LARGEST_FACTOR - 1) * unit), scale)
    return torch.where(factor < SMALLEST_FACTOR, torch.full_like(scale, SMALLEST_FACTOR * (1 + 2.0**-20) * unit), scale)


def check_ratio(program: Program, step: Sum | Product, target: str) -> None:
    """Check that the engine has a kernel for the scales of a sum or a product.

    Args:
        program: The program.
        step: One of its steps.
        target: Name of the engine.

    Raises:
        ValueError: If it has none.
    """
    scales = [program.grids[name].scale for name in step.inputs]
    whole = max(scales) if isinstance(step, Sum) else scales[0] * scales[1]
    low, high = SUM_RATIOS if isinstance(step, Sum) else PRODUCT_RATIOS
    ratio = whole / program.grids[step.output].scale
    if not low <= ratio < high:
        kind = "a sum" if isinstance(step, Sum) else "a product"
        text = f"`{step.layer or step.output}` is {kind} with {ratio:.3g} times its output's scale: check that range"
        raise ValueError(unsupported(target, text))
