"""Losses of synthesis and of synthesis-aware fine-tuning: pure functions, one value per image.

Everything is computed in float32 at least, whatever the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_DIFFICULTY = 1e-7
"""Floor of 1 - p as the base of a power, about the spacing of float32 at 1: below it the gradient is 0 instead of
infinite."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _one_minus_p(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - p_label as the sum of the other probabilities: near p = 1 the subtraction would lose all precision."""
    others = F.softmax(_wide(logits), dim=1).scatter(1, labels[:, None], 0.0)
    return others.sum(dim=1).clamp(max=1.0)


@torch.no_grad()
def difficulty(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difficulty of each image, delta = 1 - p_label, with the teacher's probability of the assigned label.

    Below 0.5 the label is the teacher's prediction. Logits (20, 0) with label 0 give 2.06e-9, not 0.

    Args:
        teacher_logits: (N, K), for the same images as the student's.
        labels: (N,) int64, assigned labels.

    Returns:
        (N,) in [0, 1] (never above 1, so that a threshold of 1 keeps all), detached.

    Source: SynQ section 3, difficulty-aware loss.
    """
    return _one_minus_p(teacher_logits, labels)


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the distillation loss T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, in nats.

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
    """Return the cross-entropy of each kept image, and exactly 0 (without gradient) for the others.

    The caller divides by the number of *all* images. With a mean over the kept ones, the weight of an image would
    depend on how many others its process keeps.

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
    """Return the squared Frobenius distance ||S_teacher - S_student||_F^2 of each image's raw maps.

    Args:
        teacher_map: (N, H, W), detached here.
        student_map: (N, H, W).

    Returns:
        (N,) >= 0.
    """
    return (_wide(teacher_map.detach()) - _wide(student_map)).square().sum(dim=(1, 2))


def top2_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross-entropy of each image to the teacher's two most likely classes.

    Their probabilities are normalized to a sum of 1: teacher probabilities (0.6, 0.3, 0.1) give the target
    (2/3, 1/3, 0).

    Args:
        student_logits: (N, K), K >= 2.
        teacher_logits: (N, K), detached here.

    Returns:
        (N,) >= 0.
    """
    values, classes = _wide(teacher_logits.detach()).topk(2, dim=1)
    log_probabilities = F.log_softmax(_wide(student_logits), dim=1).gather(1, classes)
    return -(F.softmax(values, dim=1) * log_probabilities).sum(dim=1)


def feature_loss(student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor]) -> Tensor:
    """Return the relative squared distance of each image's block outputs, the mean over blocks.

    ||F_student - F_teacher||^2 / ||F_teacher||^2: relative, so that the loss weight is comparable between networks and
    no block dominates because its activations are large. A block whose teacher output is all zero has loss 0.

    Args:
        student_blocks: (N, C, H, W) each.
        teacher_blocks: The same shapes, detached here.

    Returns:
        (N,) >= 0.

    Raises:
        ValueError: If there is no block, or their numbers differ.

    Source: feature alignment of HAST (CVPR 2023); the relative form is ours.
    """
    _check_counts("feature alignment", "blocks", student_blocks, teacher_blocks)
    parts = []
    for student, teacher in zip(student_blocks, teacher_blocks, strict=True):
        target = _wide(teacher.detach()).flatten(1)
        size = target.square().sum(dim=1)
        gap = (_wide(student).flatten(1) - target).square().sum(dim=1)
        parts.append(torch.where(size > 0, gap / size.where(size > 0, torch.ones_like(size)), torch.zeros_like(gap)))
    return torch.stack(parts).mean(dim=0)


def _check_counts(term: str, what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not teacher or len(student) != len(teacher):
        raise ValueError(
            f"{term} needs as many {what} of the student as of the teacher, at least one, but got {len(student)} and "
            f"{len(teacher)}"
        )


STRUCTURE_C = 9e-4
"""C2 of SSIM, (0.03)^2: two channels that hardly vary over the positions count as equal."""


def attention_loss(student_heads: Sequence[Tensor], teacher_heads: Sequence[Tensor]) -> Tensor:
    """Return 1 - the structural similarity of what attention gathers, the mean over layers, heads and channels.

    For each channel of each head, over the T positions: (2 cov(s, t) + C) / (var(s) + var(t) + C). Equal outputs have
    the loss 0, also if they differ by a constant; opposite ones about 2.

    Args:
        student_heads: Outputs of attention, (N, heads, T, D) each, the heads of all windows of an image on one axis.
        teacher_heads: The same shapes, detached here.

    Returns:
        (N,) in [0, 2].

    Raises:
        ValueError: If there is no attention, or their numbers differ.

    Source: MimiQ (arXiv 2407.20021), section 4.2: its structural distillation of heads.
    """
    _check_counts("attention alignment", "attentions", student_heads, teacher_heads)
    parts = []
    for student, teacher in zip(student_heads, teacher_heads, strict=True):
        s, t = (_wide(x) - _wide(x).mean(-2, keepdim=True) for x in (student, teacher.detach()))
        covariance = (s * t).mean(-2)
        variances = s.square().mean(-2) + t.square().mean(-2)
        similarity = (2 * covariance + STRUCTURE_C) / (variances + STRUCTURE_C)
        parts.append(1 - similarity.flatten(1).mean(1))
    return torch.stack(parts).mean(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the terms of :func:`synq_loss`, the distillation temperature and the difficulty threshold.

    A term of weight 0 is reported but not added to the sum.
    """

    kd_weight: float = 1.0
    """Weight of the distillation loss."""
    ce_weight: float
    """lambda_CE, weight of the masked cross-entropy."""
    cam_weight: float
    """lambda_CAM, weight of the squared distance between the class activation maps."""
    feature_weight: float = 0.0
    """Weight of the feature alignment."""
    attention_weight: float = 0.0
    """Weight of the structural similarity of attention."""
    kd_temperature: float = 1.0
    """Temperature T of the distillation loss, > 0; 1 is the paper's equation."""
    difficulty_threshold: float
    """tau in [0, 1]: largest difficulty at which the cross-entropy counts; 1 keeps all images."""
    top2: bool = False
    """Whether the target of difficult images is the teacher's two most likely classes instead of none."""


def synq_loss(
    student_logits: Tensor,
    student_map: Tensor | None,
    teacher_logits: Tensor,
    teacher_map: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    *,
    student_blocks: Sequence[Tensor] = (),
    teacher_blocks: Sequence[Tensor] = (),
    student_heads: Sequence[Tensor] = (),
    teacher_heads: Sequence[Tensor] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of synthesis-aware fine-tuning, a mean over all N images, and its terms.

        L = 1/N sum_i [ kd_weight KD_i + ce_weight 1{delta_i <= tau} CE_i + cam_weight CAM_i + feature_weight FA_i
                          + attention_weight AA_i ]

    N counts all images, kept or not, so that the average over equal parts of a batch is the loss of the batch, as in
    DDP's averaging of gradients.

    Args:
        student_logits: (N, K).
        student_map: (N, H, W), or None for no CAM term (both maps or neither).
        teacher_logits: (N, K), for the same images.
        teacher_map: (N, H, W) or None.
        labels: (N,) int64.
        weights: Weights of the terms, T and tau.
        student_blocks: Block outputs (N, C, H, W) of the student for feature alignment; may be empty.
        teacher_blocks: Block outputs of the teacher, of the same shapes.
        student_heads: Outputs of the student's attention, as for `attention_loss`; may be empty.
        teacher_heads: Those of the teacher, of the same shapes.

    Returns:
        ``(loss, terms)``: the scalar to differentiate, and detached scalars "kd", "ce", "cam", "features", "attention"
        (unweighted means over N) and "kept" (share of images with delta <= tau).

    Raises:
        ValueError: if only one of the maps is given.

    Source: SynQ algorithm 1; there T = 1 and kd_weight = 1.
    """
    if (student_map is None) != (teacher_map is None):
        raise ValueError("`student_map` and `teacher_map` must both be given or both be None, but got one of the two")
    keep = difficulty(teacher_logits, labels) <= weights.difficulty_threshold
    kd = kd_kl(student_logits, teacher_logits, weights.kd_temperature).mean()
    ce = masked_cross_entropy(student_logits, labels, keep)
    if weights.top2:
        ce = ce + top2_cross_entropy(student_logits, teacher_logits).where(~keep, 0.0)
    terms = {"kd": kd, "ce": ce.mean(), "cam": torch.zeros_like(kd)}
    if student_map is not None and teacher_map is not None:
        terms["cam"] = cam_loss(teacher_map, student_map).mean()
    if teacher_blocks:
        terms["features"] = feature_loss(student_blocks, teacher_blocks).mean()
    if teacher_heads:
        terms["attention"] = attention_loss(student_heads, teacher_heads).mean()
    loss = torch.zeros_like(kd)
    weight_of = {
        "kd": weights.kd_weight,
        "ce": weights.ce_weight,
        "cam": weights.cam_weight,
        "features": weights.feature_weight,
        "attention": weights.attention_weight,
    }
    for name, weight in weight_of.items():
        if weight != 0 and name in terms:
            loss = loss + weight * terms[name]
    detached = {name: term.detach() for name, term in terms.items()}
    return loss, {**detached, "kept": keep.to(kd.dtype).mean()}


def inception_loss(logits: Tensor, labels: Tensor, hard_sample_gamma: float = 0.0) -> Tensor:
    """Return the hard-sample-weighted inception loss of each image: (1 - p_label)^gamma * CE(logits, label).

    The weight is in [0, 1] and has a gradient. 1 - p is clamped to at least 1e-7 in the power: its derivative at 0 is
    infinite for gamma < 1, and autograd's inf * 0 would be NaN.

    Args:
        logits: (N, K), the teacher's, for the images being synthesized.
        labels: (N,) int64, target classes.
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
