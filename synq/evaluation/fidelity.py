"""Label-free fidelity of a student to its teacher: measures of the distance between their logits.

A measure maps the logits of teacher and student for the same images to one value per image; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from synq.losses import kd_kl

Measure = Callable[[Tensor, Tensor], Tensor]
"""(teacher logits (N, K), student logits (N, K)) -> (N,), float64, lower is better."""


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, in nats.

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
    """Return the Jensen-Shannon divergence of each image in nats, in [0, ln 2]; arguments as for `kl`.

    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.
    """
    p, q = teacher_logits.double().softmax(1), student_logits.double().softmax(1)
    log_middle = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny).log()
    return (torch.xlogy(p, p) - p * log_middle + torch.xlogy(q, q) - q * log_middle).sum(1) / 2


def disagreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return 100 for each image whose predicted classes differ, else 0, so that the mean is in percent; as `kl`."""
    return 100.0 * (teacher_logits.argmax(1) != student_logits.argmax(1)).double()


def logit_mse(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the mean squared difference over classes of the centered logits, of each image; arguments as for `kl`."""
    return (centered(student_logits) - centered(teacher_logits)).square().mean(1)


def centered(logits: Tensor) -> Tensor:
    """Return logits (N, K) minus their mean over classes, float64."""
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def sqnr_db(reference: Tensor, found: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of ``found`` in dB; infinite if it equals ``reference``.

    10 log10(sum r^2 / sum (r - f)^2), sums over all elements.
    """
    signal, noise = reference.double().square().sum(), (reference.double() - found.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(signal / noise))


OBJECTIVES: dict[str, Measure] = {
    "kl": kl,
    "kl_t4": lambda teacher_logits, student_logits: kl(teacher_logits, student_logits, 4.0),
    "jensen_shannon": jensen_shannon,
    "disagreement": disagreement,
    "logit_mse": logit_mse,
}
"""Measures that a sweep may minimize, on unperturbed held-out images: no perturbation ranked settings better. Measures
that the teacher itself does not minimize (cross-entropy with the teacher's classes, which higher confidence lowers) are
excluded."""
