"""The optimizer of fine-tuning, with parameter groups for weights and for learned step sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synq.config.run import FinetuneConfig
from synq.quant.layers import step_parameters
from synq.quant.lsq import keep_positive

TINY = 1e-12
MIN_NORM = 1e-3
"""Minimum norm of a weight tensor in `clip_relative`, so that a tensor of zeros can learn."""


def make_optimizer(net: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters of ``net`` that require a gradient.

    Each group has the key "lr_factor", by which the scheduled learning rate is to be multiplied: 1 for weights,
    ``step_lr_factor`` for learned step sizes. These have no weight decay: shrinking a step size does not regularize.

    Args:
        net: The student; its learned step sizes are initialized.
        config: Optimizer, momentum, weight decay, step_lr_factor.
    """
    steps = [step for step in step_parameters(net) if step.requires_grad]
    known = {id(step) for step in steps}
    weights = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": weights, "lr_factor": 1.0}]
    if steps:
        factor = config.step_lr_factor
        groups.append({"params": steps, "lr_factor": factor, "lr": config.lr * factor, "weight_decay": 0.0})
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adam":
        betas = (config.momentum, 0.999)
        optimizer = torch.optim.Adam(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    else:
        momentum, decay = config.momentum, config.weight_decay
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)
    keep_positive(optimizer, steps)
    return optimizer


@torch.no_grad()
def clip_relative(parameters: Sequence[nn.Parameter], share: float | None) -> None:
    """Clip, in place, the norm of the gradient of each weight tensor to ``share`` times the norm of the tensor.

    ``grad_clip`` bounds the whole step. In networks with depthwise convolutions a few small tensors take nearly all of
    it: their relative change is then ten times that of any layer of a ResNet, and fine-tuning with the same learning
    rate destroys them. Vectors (biases, batch-norm parameters, step sizes) are not clipped: near zero their norm has no
    meaning. There is no host synchronization.

    Args:
        parameters: Parameters; those without a gradient are skipped.
        share: Maximum ratio of the norms, > 0; None does not clip.

    Source: adaptive gradient clipping (arXiv 2102.06171), section 4, there by rows.
    """
    weights: list[Tensor] = [p for p in parameters if p.dim() > 1 and p.grad is not None]
    if share is None or not weights:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
    factors = [(share * w.clamp(min=MIN_NORM) / (g + TINY)).clamp(max=1.0) for w, g in norms]
    torch._foreach_mul_(gradients, factors)
