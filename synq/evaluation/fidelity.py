"""How far a student is from its teacher without labels: measures of two networks' answers, and views that make images harder.

A measure maps the logits of teacher and student on the same images to one value an image, lower is better. A view maps held-out
images to perturbed ones, nearer to where the teacher changes its mind: on plain synthetic images it is certain, and so is any student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from synq.losses import kd_kl
from synq.synthesis.lowpass import cutoff_in_bins, gaussian_lowpass

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


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(student || teacher) of each image at T = 1, in nats; arguments and result as of `kl`."""
    return kl(student_logits, teacher_logits)


def jensen_shannon(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, of each image; in [0, ln 2]. Arguments as of `kl`."""
    p, q = teacher_logits.double().softmax(1), student_logits.double().softmax(1)
    log_middle = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny).log()
    return (torch.xlogy(p, p) - p * log_middle + torch.xlogy(q, q) - q * log_middle).sum(1) / 2


def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """sum_k |p_k - q_k| / 2 of each image, in [0, 1]. Arguments as of `kl`."""
    return (teacher_logits.double().softmax(1) - student_logits.double().softmax(1)).abs().sum(1) / 2


def disagreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """100 where the largest logits belong to different classes, else 0: the mean is a percentage. Arguments as of `kl`."""
    return 100.0 * (teacher_logits.argmax(1) != student_logits.argmax(1)).double()


def logit_mse(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean over classes of the squared difference of logits without their mean, of each image. Arguments as of `kl`."""
    return (_centred(student_logits) - _centred(teacher_logits)).square().mean(1)


def logit_angle(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """1 - cosine between the logits without their mean, of each image, in [0, 2]: blind to scale. Arguments as of `kl`."""
    return 1 - F.cosine_similarity(_centred(teacher_logits), _centred(student_logits), dim=1)


def margin_mse(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Squared difference of margins of each image; margin: logit of the teacher's class minus the largest other one.

    Arguments as of `kl`.
    """
    best = teacher_logits.argmax(1, keepdim=True)
    return (_margin(student_logits.double(), best) - _margin(teacher_logits.double(), best)).square()


def hard_cross_entropy(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """-log q_c of each image, c the teacher's class, in nats. Arguments as of `kl`."""
    return F.cross_entropy(student_logits.double(), teacher_logits.argmax(1), reduction="none")


def doubtful_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL at T = 1 times the entropy of the teacher's answer: images on which it is certain do not count. Arguments as of `kl`."""
    p = teacher_logits.double().softmax(1)
    return -torch.xlogy(p, p).sum(1) * kl(teacher_logits, student_logits)


def feature_distance(teacher_features: Tensor, student_features: Tensor) -> Tensor:
    """||A_teacher - A_student||^2 / ||A_teacher||^2 of each image.

    Args:
        teacher_features: (N, C, H, W), the tensor that enters the pool.
        student_features: (N, C, H, W), the same after its fake quantization.

    Returns:
        (N,) float64, >= 0.
    """
    wanted, got = teacher_features.double().flatten(1), student_features.double().flatten(1)
    return (got - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)


def _centred(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def _margin(logits: Tensor, best: Tensor) -> Tensor:
    others = logits.scatter(1, best, -torch.inf)
    return logits.gather(1, best)[:, 0] - others.amax(1)


def _spread(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the whole set, (1, C, 1, 1)."""
    mean = images.mean((0, 2, 3), keepdim=True)
    return mean, (images - mean).square().mean((0, 2, 3), keepdim=True).sqrt()


def partners(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each image one of another class: uniformly over all such images.

    Args:
        labels: (N,) int64.
        generator: CPU generator.

    Returns:
        (N,) int64 row numbers; the next row where all images are of one class.
    """
    labels = labels.cpu()
    allowed = labels[:, None] != labels[None, :]
    draw = torch.rand(allowed.shape, generator=generator, dtype=torch.float64)
    chosen = draw.masked_fill(~allowed, -1).argmax(1)
    return torch.where(allowed.any(1), chosen, (torch.arange(len(labels)) + 1) % len(labels))


def mixed(images: Tensor, partner: Tensor, share: Tensor | float) -> Tensor:
    """Blend each image with its partner: share x_i + (1 - share) x_partner(i).

    Args:
        images: (N, C, H, W).
        partner: (N,) int64 row numbers, from `partners`.
        share: Part of the image itself, in [0, 1]: one for all, or (N,).

    Returns:
        (N, C, H, W).

    Source: mixup (Zhang et al. 2018), on images alone.
    """
    part = torch.as_tensor(share, dtype=images.dtype).reshape(-1, 1, 1, 1).to(images.device)
    return part * images + (1 - part) * images[partner.to(images.device)]


def cut_mixed(images: Tensor, partner: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Replace a random rectangle of each image, ``area`` of its pixels, by the same place of its partner.

    Args:
        images: (N, C, H, W).
        partner: (N,) int64 row numbers, or (N,) of other images of the same batch.
        area: Share of the pixels that is replaced, in (0, 1).
        generator: CPU generator.

    Returns:
        (N, C, H, W).

    Source: CutMix (Yun et al. 2019), on images alone.
    """
    inside = _rectangles(images, area, generator)
    return torch.where(inside, images[partner.to(images.device)], images)


def erased(images: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Replace a random rectangle of each image, ``area`` of its pixels, by the mean of the set. Arguments as of `cut_mixed`."""
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
        sigma: >= 0; 1 is as much noise as image.
        generator: CPU generator.

    Returns:
        (N, C, H, W).
    """
    _, std = _spread(images)
    return images + sigma * std * _normal(images, generator)


def shaded(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """As `noisy`, with 1/f noise: large soft patches of light and colour, whose spectrum is that of photographs."""
    _, std = _spread(images)
    pink, _ = _natural_spectrum(_normal(images, generator), keep_amplitude=False)
    return images + sigma * std * pink


def reweighted(images: Tensor) -> Tensor:
    """Give the set the spectrum of photographs: amplitudes of every frequency on average 1/f, phases and each image's own excess kept."""
    mean, std = _spread(images)
    standard, _ = _natural_spectrum((images - mean) / std, keep_amplitude=True)
    return mean + std * standard


def drowned(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blend towards Gaussian noise of the set's mean and standard deviation: share x + (1 - share) noise."""
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
    """Lower the contrast: mean + contrast (x - mean), the mean of each channel of the set; contrast in [0, 1]."""
    mean, _ = _spread(images)
    return mean + contrast * (images - mean)


def low_passed(images: Tensor, cutoff: float) -> Tensor:
    """Filter images (N, C, H, W) by a Gaussian low-pass of ``cutoff`` of the Nyquist frequency."""
    return gaussian_lowpass(images, cutoff_in_bins(cutoff, "nyquist", *images.shape[-2:]))


def zoomed(images: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Cut a random square of ``size`` of each side and enlarge it (bilinear) to the whole image.

    Args:
        images: (N, C, H, W).
        size: Share of each side that is kept, in (0, 1]; above 1 the edges are mirrored.
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
    """One step against the teacher's confidence: x + epsilon std sign(d CE(net(x), its own class) / dx).

    Args:
        images: (N, C, H, W), on the device of ``net``.
        net: The teacher: images to logits (N, K).
        epsilon: Step in standard deviations of each channel of the set.

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
    """Blend each image with its partner to where the teacher leaves the image's class: bisection of the share over [0, 1].

    Args:
        images: (N, C, H, W), on the device of ``net``.
        partner: (N,) int64 row numbers.
        net: The teacher: images to logits (N, K).
        steps: Halvings; the share is found to 2^-steps.

    Returns:
        (N, C, H, W): just on the image's side of the boundary.
    """
    own = net(images).argmax(1)
    low, high = torch.zeros(len(images), device=images.device), torch.ones(len(images), device=images.device)
    for _ in range(steps):
        middle = (low + high) / 2
        stays = net(mixed(images, partner, middle)).argmax(1) == own
        low, high = torch.where(stays, low, middle), torch.where(stays, middle, high)
    return mixed(images, partner, high)


OBJECTIVES: dict[str, Measure] = {
    "kl": kl,
    "kl_t4": lambda teacher_logits, student_logits: kl(teacher_logits, student_logits, 4.0),
    "jensen_shannon": jensen_shannon,
    "disagreement": disagreement,
    "logit_mse": logit_mse,
}
"""What a sweep may minimise, on the held-out images as they are: no view has ranked settings better than these. Measures that a
student can make smaller than the teacher itself does (`hard_cross_entropy`: by more certain answers) are not among them."""
