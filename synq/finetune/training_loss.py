"""The loss of one fine-tuning step: the student's response compared with the teacher's to the same images."""

import torch
from torch import Tensor, nn

from synq.config.finetune import FinetuneConfig
from synq.finetune.own_term import LossInputs, own_term
from synq.finetune.responses import Response, TappedNetwork
from synq.losses import LossWeights, kd_kl, synq_loss
from synq.teacher.pixel_range import PixelRange


def loss_weights(config: FinetuneConfig) -> LossWeights:
    """Return the loss weights of a configuration."""
    return LossWeights(
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        cam_weight=config.cam_weight,
        feature_weight=config.feature_weight,
        attention_weight=config.attention_weight,
        kd_temperature=config.kd_temperature,
        difficulty_threshold=config.difficulty_threshold,
        top2=config.hard_labels == "top2",
    )


def training_loss(
    model: nn.Module,
    student: TappedNetwork,
    target: Response,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    harder: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run one forward pass of the student and return the SynQ loss on it.

    Args:
        model: ``student.net``, wrapped by DDP if there are several processes, so that gradients are averaged.
        student: Computes the maps from the outputs of ``model``.
        target: The teacher's response to the same images.
        images: (N, C, H, W), filtered; N is the number of images of this process.
        labels: (N,) int64, assigned labels.
        config: Weights, temperature and threshold.
        harder: Result of ``harder_images``, if `perturb_weight` is above 0.

    Returns:
        (loss, terms by name): means over the N images. N is the same on every process, so the mean over processes is
        the mean over the global batch.
    """
    count = len(images)
    # One forward pass for both: DDP averages the gradients of one forward pass only.
    outputs = model(images if harder is None else torch.cat([images, harder[0]]))
    response = student.response(outputs, labels)
    loss, terms = synq_loss(
        response.logits,
        response.cam,
        target.logits,
        target.cam,
        labels,
        loss_weights(config),
        student_blocks=response.blocks,
        teacher_blocks=target.blocks,
        student_heads=response.heads,
        teacher_heads=target.heads,
    )
    if (term := own_term(config)) is not None:
        inputs = LossInputs(
            student_logits=response.logits,
            teacher_logits=target.logits.detach(),
            labels=labels,
            student_map=response.cam,
            teacher_map=None if target.cam is None else target.cam.detach(),
        )
        own = term(inputs).mean()
        loss, terms["own"] = loss + config.own_weight * own, own.detach()
    if harder is not None:
        perturbed = kd_kl(outputs[0][count:], harder[1], config.kd_temperature).mean()
        loss, terms["perturbed"] = loss + config.perturb_weight * perturbed, perturbed.detach()
    if config.kd_weight == 0 and config.ce_weight == 0:  # DDP waits for the gradients of all parameters
        loss = loss + 0.0 * outputs[0].sum()
    return loss, terms


def harder_images(
    student: TappedNetwork,
    teacher: TappedNetwork,
    images: Tensor,
    labels: Tensor,
    size: float,
    pixel_range: PixelRange | None = None,
) -> tuple[Tensor, Tensor]:
    """Return adversarially perturbed images (N, C, H, W), harder for the student, and the teacher's logits (N, K).

    x + size * sign(d CE(student(x), label) / d x), clamped to ``pixel_range``; the gradient bypasses DDP's reducer and
    reaches no parameter.

    Source: sample difficulty promotion of HAST (CVPR 2023); the difficulty 1 - p_label rises where the cross-entropy
        does.
    """
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(student.net(pixels)[0], labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    harder = (images + size * gradient.sign()).detach()
    if pixel_range is not None:
        pixel_range.clamp_(harder)
    with torch.no_grad():
        return harder, teacher.net(harder)[0]
