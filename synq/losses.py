"""Losses of synthesis and of synthesis-aware fine-tuning: pure functions, one value an image, reduced in one place.

Everything is computed in float32 at least, whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_DIFFICULTY = 1e-7
"""Floor of 1 - p below a power (about the spacing of float32 at 1). Under it the weight is constant, so its slope is 0, not inf."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _one_minus_p(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - p_label as the sum of the other probabilities: no digit is lost near p = 1, where the subtraction loses all."""
    others = F.softmax(_wide(logits), dim=1).scatter(1, labels[:, None], 0.0)
    return others.sum(dim=1).clamp(max=1.0)


@torch.no_grad()
def difficulty(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Difficulty of each image: delta = 1 - p_label, the teacher's doubt in the assigned label.

    Below 0.5 the teacher predicts the label for certain. Logits (20, 0) with label 0 give 2.06e-9, not 0.

    Args:
        teacher_logits: (N, K), of the very images that the student sees.
        labels: (N,) int64, assigned labels.

    Returns:
        (N,) in [0, 1] (never above 1, so a threshold of 1 keeps all), detached.

    Source: SynQ section 3, difficulty-aware loss.
    """
    return _one_minus_p(teacher_logits, labels)


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation loss T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, summed over classes.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K), detached here.
        temperature: T > 0; 1 is the paper's equation.

    Returns:
        (N,) >= 0 up to rounding.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"`kd_temperature` must be > 0, but got {temperature}")
    student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2


def masked_cross_entropy(student_logits: Tensor, labels: Tensor, keep_mask: Tensor) -> Tensor:
    """Cross-entropy of each kept image, exactly 0 (and without gradient) for the others.

    The caller divides by the number of *all* images. A mean over the kept ones would weight an image by how many others its rank kept.

    Args:
        student_logits: (N, K).
        labels: (N,) int64.
        keep_mask: (N,) bool.

    Returns:
        (N,) >= 0.
    """
    loss = F.cross_entropy(_wide(student_logits), labels, reduction="none")
    return torch.where(keep_mask, loss, torch.zeros_like(loss))


def cam_loss(teacher_map: Tensor, student_map: Tensor) -> Tensor:
    """Squared Frobenius distance ||S_teacher - S_student||_F^2 of each image's raw maps.

    Args:
        teacher_map: (N, H, W), detached here.
        student_map: (N, H, W).

    Returns:
        (N,) >= 0.
    """
    return (_wide(teacher_map.detach()) - _wide(student_map)).square().sum(dim=(1, 2))


def synq_loss(
    student_logits: Tensor,
    student_map: Tensor | None,
    teacher_logits: Tensor,
    teacher_map: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    cam_weight: float,
    difficulty_threshold: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of synthesis-aware fine-tuning, a mean over all N images.

        L = 1/N sum_i [ kd_weight KD_i + ce_weight 1{delta_i <= tau} CE_i + cam_weight CAM_i ]

    N counts every image, kept or not, so the average over equal parts of a batch is the loss of the batch (DDP averages gradients
    this way). A term of weight 0 is reported but stays out of the sum.

    Args:
        student_logits: (N, K).
        student_map: (N, H, W), or None for no CAM term (both maps or neither).
        teacher_logits: (N, K), of the same images.
        teacher_map: (N, H, W) or None.
        labels: (N,) int64.
        temperature: T of the distillation, > 0.
        kd_weight: weight of the distillation.
        ce_weight: lambda_CE.
        cam_weight: lambda_CAM.
        difficulty_threshold: tau in [0, 1]; 1 keeps all images.

    Returns:
        ``(loss, terms)``: the scalar to differentiate, and detached scalars "kd", "ce", "cam" (unweighted means over N) and "kept"
        (share of images with delta <= tau).

    Raises:
        ValueError: if only one of the maps is given.

    Source: SynQ algorithm 1; there T = 1 and kd_weight = 1.
    """
    if (student_map is None) != (teacher_map is None):
        raise ValueError("`student_map` and `teacher_map` must both be given or both be None, but got one of the two")
    keep = difficulty(teacher_logits, labels) <= difficulty_threshold
    kd = kd_kl(student_logits, teacher_logits, temperature).mean()
    ce = masked_cross_entropy(student_logits, labels, keep).mean()
    cam = torch.zeros_like(kd)
    if student_map is not None and teacher_map is not None:
        cam = cam_loss(teacher_map, student_map).mean()
    loss = torch.zeros_like(kd)
    for weight, term in ((kd_weight, kd), (ce_weight, ce), (cam_weight, cam)):
        if weight != 0:
            loss = loss + weight * term
    terms = {"kd": kd.detach(), "ce": ce.detach(), "cam": cam.detach(), "kept": keep.to(kd.dtype).mean()}
    return loss, terms


def inception_loss(logits: Tensor, labels: Tensor, hard_sample_gamma: float = 0.0) -> Tensor:
    """Inception loss of each image, weighted towards hard ones: (1 - p_label)^gamma * CE(logits, label).

    The weight lies in [0, 1]. It carries gradient; 1 - p is kept above 1e-7 below the power, where its slope is otherwise infinite for
    gamma < 1 and autograd's inf * 0 would be NaN.

    Args:
        logits: (N, K), teacher's answer to the images being made.
        labels: (N,) int64, classes wanted.
        hard_sample_gamma: gamma >= 0; 0 is plain cross-entropy.

    Returns:
        (N,) >= 0.

    Raises:
        ValueError: if ``hard_sample_gamma`` is negative.

    Source: HAST, hard-sample synthesis (SynQ appendix D); the floor is ours.
    """
    if not hard_sample_gamma >= 0:
        raise ValueError(f"`hard_sample_gamma` must be >= 0, but got {hard_sample_gamma}")
    loss = F.cross_entropy(_wide(logits), labels, reduction="none")
    if hard_sample_gamma == 0:
        return loss
    return _one_minus_p(logits, labels).clamp(min=_SMALLEST_DIFFICULTY) ** hard_sample_gamma * loss
