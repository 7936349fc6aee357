"""The optimiser of a fine-tuning: weights and learned quantization steps in groups of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synq.config.run import FinetuneConfig
from synq.quant.fake_quant import SCALE_EPS
from synq.quant.layers import step_parameters

TINY = 1e-12
LEAST_NORM = 1e-3
"""Norm that a weight tensor counts with at least, so that one of zeros can learn."""
SMALLEST_STEP = 1 / 64
"""A learned step is kept at or above this share of its first value."""


def make_optimizer(net: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters of ``net`` that require a gradient.

    Every group holds "lr_factor", by which the learning rate of a step of training is to be multiplied: 1 for the weights,
    ``step_lr_factor`` for learned steps, which have no weight decay either: pulled to zero, a step would be no regularisation.

    Args:
        net: The student; its learned steps hold their first values.
        config: Optimiser, momentum, weight decay, step_lr_factor.
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
    """Shrink, in place, the gradient of each weight tensor whose norm exceeds ``share`` of the tensor's own.

    ``grad_clip`` bounds the whole step. In networks of depthwise convolutions a few small tensors take nearly all of it: their relative
    change is then ten times that of any layer of a ResNet, and fine-tuning with the same learning rate ruins them. Vectors (biases, scale and
    shift of batch norms, steps) are left alone: near zero their norm says nothing. Nothing waits for the device.

    Args:
        parameters: Those with a gradient count.
        share: None does not clip.

    Source: adaptive gradient clipping (arXiv 2102.06171), section 4, there by rows.
    """
    weights: list[Tensor] = [p for p in parameters if p.dim() > 1 and p.grad is not None]
    if share is None or not weights:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    own = torch._foreach_norm(weights)
    found = torch._foreach_norm(gradients)
    factors = [(share * w.clamp(min=LEAST_NORM) / (g + TINY)).clamp(max=1.0) for w, g in zip(own, found, strict=True)]
    torch._foreach_mul_(gradients, factors)


def keep_positive(optimizer: torch.optim.Optimizer, steps: Sequence[Tensor]) -> None:
    """After every step of ``optimizer``, lift each of the learned ``steps`` to ``SMALLEST_STEP`` of its present value at least.

    The steps themselves are trained, not their logarithms: LSQ's factor makes the update of s itself commensurate with that of a
    weight. So one large update could carry s to zero or below, where the grid ends. It is set back after the update (a projection),
    and every reader of a scale finds it positive. NaN stays NaN, for the loss to show.
    """
    if not steps:
        return
    floors = [(step.detach() * SMALLEST_STEP).clamp(min=SCALE_EPS) for step in steps]

    @torch.no_grad()
    def project(*_: object) -> None:
        for step, floor in zip(steps, floors, strict=True):
            torch.maximum(step, floor, out=step)

    optimizer.register_step_post_hook(project)
