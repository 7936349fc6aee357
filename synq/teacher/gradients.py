"""Whether a classifier has a gradient: synthesis and fine-tuning need one, and some operators of PyTorch have none."""

import torch
from torch import fx

from synq.common.error_text import first_line


def check_gradient(graph: fx.GraphModule, input_size: tuple[int, int, int]) -> None:
    """Run one backward pass, for a single image.

    Args:
        graph: The traced classifier; no parameter requires a gradient.
        input_size: (C, H, W).

    Raises:
        ValueError: If PyTorch has no derivative for one of its operators (heaviside, floor_divide), or the logits do
            not depend on the image in a way that autograd can follow.
    """
    images = torch.zeros(1, *input_size).requires_grad_()
    with torch.enable_grad():
        logits = graph.forward(images * 1)  # not the leaf itself, which a graph may normalize in place
        try:
            logits.sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"teacher must have a gradient, but PyTorch has none for it ({first_line(error)}); write that "
                "operation with others: torch.where and comparisons for a step, torch.floor(x / y) for x // y"
            ) from error
