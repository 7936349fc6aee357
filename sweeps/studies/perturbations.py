"""Candidate fidelity measures and image perturbations for the study of label-free objectives.

A measure maps the logits of teacher and student on the same images to one value per image, lower is better. A
perturbation maps held-out images to ones closer to the teacher's decision boundary: on unperturbed synthetic images the
teacher is certain, and so is nearly every student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from synq.evaluation.fidelity import centered, kl
from synq.evaluation.harder_views import mixed
from synq.synthesis.lowpass import cutoff_in_bins, gaussian_lowpass


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return KL(student || teacher) of each image at T = 1, in nats; arguments and result as for `kl`."""
    return kl(student_logits, teacher_logits)


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the total variation distance sum_k |p_k - q_k| / 2 of each image, in [0, 1]; arguments as for `kl`."""
    return (teacher_logits.double().softmax(1) - student_logits.double().softmax(1)).abs().sum(1) / 2


def logit_angle(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return 1 - cosine similarity of the centered logits of each image, in [0, 2]; arguments as for `kl`."""
    return 1 - F.cosine_similarity(centered(teacher_logits), centered(student_logits), dim=1)


def margin_mse(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the squared difference of margins of each image; arguments as for `kl`.

    The margin is the logit of the teacher's class minus the largest other logit.
    """
    best = teacher_logits.argmax(1, keepdim=True)
    return (_margin(student_logits.double(), best) - _margin(teacher_logits.double(), best)).square()


def _margin(logits: Tensor, best: Tensor) -> Tensor:
    others = logits.scatter(1, best, -torch.inf)
    return logits.gather(1, best)[:, 0] - others.amax(1)


def hard_cross_entropy(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the cross-entropy -log q_c of each image in nats, c the teacher's class; arguments as for `kl`."""
    return F.cross_entropy(student_logits.double(), teacher_logits.argmax(1), reduction="none")


def doubtful_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return KL at T = 1 weighted by the entropy of the teacher's prediction, of each image; arguments as for `kl`."""
    p = teacher_logits.double().softmax(1)
    return -torch.xlogy(p, p).sum(1) * kl(teacher_logits, student_logits)


def feature_distance(teacher_features: Tensor, student_features: Tensor) -> Tensor:
    """Return ||A_teacher - A_student||^2 / ||A_teacher||^2 of each image.

    Args:
        teacher_features: (N, C, H, W), the input of the global pooling.
        student_features: (N, C, H, W), the same of the student, fake-quantized.

    Returns:
        (N,) float64, >= 0.
    """
    teacher, student = teacher_features.double().flatten(1), student_features.double().flatten(1)
    return (student - teacher).square().sum(1) / teacher.square().sum(1).clamp_min(1e-12)


def cut_mixed(images: Tensor, partner: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Replace a random rectangle of each image, ``area`` of its pixels, by the same region of its partner.

    Args:
        images: (N, C, H, W).
        partner: (N,) int64 row numbers, or (N,) of other images of the same batch.
        area: Share of the pixels that is replaced, in (0, 1).
        generator: CPU generator.

    Returns:
        (N, C, H, W).

    Source: CutMix (Yun et al. 2019), without labels.
    """
    inside = _rectangles(images, area, generator)
    return torch.where(inside, images[partner.to(images.device)], images)


def erased(images: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Replace a random rectangle of each image by the mean of the set; arguments as for `cut_mixed`."""
    mean, _ = _spread(images)
    return torch.where(_rectangles(images, area, generator), mean, images)


def _rectangles(images: Tensor, area: float, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    side = (max(1, round(height * area**0.5)), max(1, round(width * area**0.5)))
    top = torch.randint(0, height - side[0] + 1, (count, 1), generator=generator)
    left = torch.randint(0, width - side[1] + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    in_rows, in_columns = (rows >= top) & (rows < top + side[0]), (columns >= left) & (columns < left + side[1])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None].to(images.device)


def noisy(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of ``sigma`` standard deviations of each channel of the set.

    Args:
        images: (N, C, H, W).
        sigma: >= 0; at 1 the noise has the standard deviation of the images.
        generator: CPU generator.

    Returns:
        (N, C, H, W).
    """
    _, std = _spread(images)
    return images + sigma * std * _normal(images, generator)


def shaded(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Add 1/f noise, whose spectrum is that of photographs; arguments as for `noisy`."""
    _, std = _spread(images)
    pink, _ = _natural_spectrum(_normal(images, generator), keep_amplitude=False)
    return images + sigma * std * pink


def reweighted(images: Tensor) -> Tensor:
    """Rescale every frequency so that its mean amplitude over the set is 1/f, as in photographs; phases are kept."""
    mean, std = _spread(images)
    standard, _ = _natural_spectrum((images - mean) / std, keep_amplitude=True)
    return mean + std * standard


def drowned(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blend with Gaussian noise of the set's mean and standard deviation: share x + (1 - share) noise."""
    mean, std = _spread(images)
    return share * images + (1 - share) * (mean + std * _normal(images, generator))


def _natural_spectrum(x: Tensor, keep_amplitude: bool) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * height
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)[None] * width
    gain = (1 / (rows.square() + columns.square()).sqrt().clamp_min(1.0)).to(x)
    spectrum = torch.fft.rfft2(x)
    if keep_amplitude:
        gain = gain / spectrum.abs().square().mean((0, 1), keepdim=True).sqrt().clamp_min(1e-6)
    out = torch.fft.irfft2(spectrum * gain, s=(height, width))
    return out / _spread(out)[1].clamp_min(1e-6), gain


def _normal(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator).to(images)


def faded(images: Tensor, contrast: float) -> Tensor:
    """Lower the contrast to mean + contrast (x - mean), with the set's mean of each channel; contrast in [0, 1]."""
    mean, _ = _spread(images)
    return mean + contrast * (images - mean)


def low_passed(images: Tensor, cutoff: float) -> Tensor:
    """Apply a Gaussian low-pass filter to images (N, C, H, W); ``cutoff`` in units of the Nyquist frequency."""
    return gaussian_lowpass(images, cutoff_in_bins(cutoff, "nyquist", *images.shape[-2:]))


def zoomed(images: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Crop a random square of ``size`` of each side and resize it to the whole image, bilinearly.

    Args:
        images: (N, C, H, W).
        size: Share of each side that is kept, in (0, 1]; above 1 the border is mirrored.
        generator: CPU generator.

    Returns:
        (N, C, H, W).
    """
    count = len(images)
    shift = (2 * torch.rand((count, 2), generator=generator) - 1) * abs(1 - size)
    matrix = torch.zeros((count, 2, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = size
    matrix[:, :, 2] = shift
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def adversarial(images: Tensor, net: Callable[[Tensor], Tensor], epsilon: float) -> Tensor:
    """Take one FGSM step against the teacher's prediction: x + epsilon std sign(d CE(net(x), predicted class) / dx).

    Args:
        images: (N, C, H, W), on the device of ``net``.
        net: The teacher, from images to logits (N, K).
        epsilon: Step size in standard deviations of each channel of the set.

    Returns:
        (N, C, H, W), detached.

    Source: fast gradient sign method (Goodfellow et al. 2015).
    """
    _, std = _spread(images)
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = net(x)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1), reduction="sum"), x)
    return images + epsilon * std * slope.sign()


@torch.no_grad()
def on_boundary(images: Tensor, partner: Tensor, net: Callable[[Tensor], Tensor], steps: int = 6) -> Tensor:
    """Blend each image with its partner up to the teacher's decision boundary, by bisection of the share over [0, 1].

    Args:
        images: (N, C, H, W), on the device of ``net``.
        partner: (N,) int64 row numbers.
        net: The teacher, from images to logits (N, K).
        steps: Bisection steps; the share is found to 2^-steps.

    Returns:
        (N, C, H, W), just on the image's side of the boundary.
    """
    original = net(images).argmax(1)
    low, high = torch.zeros(len(images), device=images.device), torch.ones(len(images), device=images.device)
    for _ in range(steps):
        middle = (low + high) / 2
        stays = net(mixed(images, partner, middle)).argmax(1) == original
        low, high = torch.where(stays, low, middle), torch.where(stays, middle, high)
    return mixed(images, partner, high)


def _spread(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over the whole set, (1, C, 1, 1)."""
    mean = images.mean((0, 2, 3), keepdim=True)
    return mean, (images - mean).square().mean((0, 2, 3), keepdim=True).sqrt()
