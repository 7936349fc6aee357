"""A reference (textbook) fine-tuning step: the formulas one after another, with nothing shared between them.

Each batch of images is filtered when it is used. Logits come from one forward pass of each network and class-activation
maps from another, whose channel weights are d y_label / d A by autograd. Nothing is slower than its formula requires:
the derivative stops at A, the teacher records no graph before A, and student and quantizers are those of the fast step.
"""

import torch
from torch import Tensor

from synq.config.run import FinetuneConfig
from synq.finetune.responses import TappedNetwork
from synq.losses import cam_loss, difficulty, kd_kl, masked_cross_entropy
from synq.network.gradcam import autograd_weights, cam_map
from synq.synthesis.lowpass import gaussian_lowpass

PASSES = "teacher 2 F + B to A, student 2 F + 2 B + B to A"


def grad_cam(network: TappedNetwork, images: Tensor, labels: Tensor, *, learns: bool) -> Tensor:
    """Return the class-activation maps (N, H, W) of `labels`, by a separate forward pass and autograd.

    Args:
        network: The network, with logits and features A as outputs.
        images: (N, C, H, W).
        labels: (N,).
        learns: Whether the maps are differentiated again.
    """
    with torch.enable_grad():
        logits, features = network.net(images)
        alpha = autograd_weights(logits, features, labels, retain_graph=learns)
        return cam_map(features, alpha)


def textbook_loss(
    student: TappedNetwork,
    teacher: TappedNetwork,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    cutoff_bins: float | None,
) -> Tensor:
    """Return the loss of one batch, computed term by term.

    Args:
        student, teacher: The same networks as in the fast step.
        images: (N, C, H, W), not filtered yet.
        labels: (N,).
        config: Weights, temperature, threshold.
        cutoff_bins: Cutoff of the low-pass filter in DFT bins; None for no filter.
    """
    if cutoff_bins is not None:
        images = gaussian_lowpass(images, cutoff_bins)
    with torch.no_grad():
        teacher_logits = teacher.net(images)[0]
    logits = student.net(images)[0]
    teacher_map = grad_cam(teacher, images, labels, learns=False).detach()
    student_map = grad_cam(student, images, labels, learns=True)
    easy = difficulty(teacher_logits, labels) <= config.difficulty_threshold
    return (
        config.kd_weight * kd_kl(logits, teacher_logits, config.kd_temperature).mean()
        + config.ce_weight * masked_cross_entropy(logits, labels, easy).mean()
        + config.cam_weight * cam_loss(teacher_map, student_map).mean()
    )
