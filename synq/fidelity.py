"""How far a student is from its teacher without labels: measures of two networks' answers, and views that make images harder.

A measure maps the logits of teacher and student on the same images to one value an image, lower is better. A view maps held-out
images to perturbed ones, nearer to where the teacher changes its mind: on plain synthetic images it is certain, and so is any student.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from synq.losses import kd_kl

Measure = Callable[[Tensor, Tensor], Tensor]
"""(teacher logits (N, K), student logits (N, K)) -> (N,), float64, lower is better."""


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, in nats.

    Teacher probabilities (3/4, 1/4) against (1/2, 1/2) at T = 1: 0.1308.

    Args:
        teacher_logits: (N, K).
        student_logits: (N, K).
        temperature: T > 0.

    Returns:
        (N,) float64, >= 0 up to rounding.
    """
    return kd_kl(student_logits.double(), teacher_logits.double(), temperature)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, of each image; in [0, ln 2]. Arguments as of `kl`."""
    p, q = teacher_logits.double().softmax(1), student_logits.double().softmax(1)
    log_middle = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny).log()
    return (torch.xlogy(p, p) - p * log_middle + torch.xlogy(q, q) - q * log_middle).sum(1) / 2


def disagreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """100 where the largest logits belong to different classes, else 0: the mean is a percentage. Arguments as of `kl`."""
    return 100.0 * (teacher_logits.argmax(1) != student_logits.argmax(1)).double()


def logit_mse(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean over classes of the squared difference of logits without their mean, of each image. Arguments as of `kl`."""
    return (centered(student_logits) - centered(teacher_logits)).square().mean(1)


def centered(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def sqnr_db(reference: Tensor, found: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of ``found`` in dB, 10 log10(sum r^2 / sum (r - f)^2); infinite where they are equal."""
    signal, noise = reference.double().square().sum(), (reference.double() - found.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(signal / noise))


@torch.no_grad()
def logits_of(net: fx.GraphModule, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), in batches."""
    like = next(net.parameters())
    return torch.cat([net(batch.to(like)) for batch in images.split(batch_size)])


OBJECTIVES: dict[str, Measure] = {
    "kl": kl,
    "kl_t4": lambda teacher_logits, student_logits: kl(teacher_logits, student_logits, 4.0),
    "jensen_shannon": jensen_shannon,
    "disagreement": disagreement,
    "logit_mse": logit_mse,
}
"""What a sweep may minimise, on the held-out images as they are: no view has ranked settings better than these. Measures that a
student can make smaller than the teacher itself does (`hard_cross_entropy`: by more certain answers) are not among them."""
