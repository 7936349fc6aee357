"""Model inversion: optimize one shard of images, by any method, to match the batch-norm statistics of a classifier.

A classifier without such statistics has the terms of its structure instead (`synq.synthesis.structure`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synq.config.run import SynthesisConfig
from synq.losses import inception_loss
from synq.network.bn_stats import BatchNormInputs, ChannelStatistics, bns_loss
from synq.synthesis.image_sources import GivenImages, ParameterGroup, make_source
from synq.synthesis.start_noise import WHITE, StartNoise
from synq.synthesis.structure import StructureTerms, recolored
from synq.synthesis.swing import SwingConvolutions, draw_swings
from synq.teacher.pixel_range import PixelRange

SHIFT_PARTS = 8
"""The random shift is at most 1/8 of the image's side: 4 pixels at 32, 28 at 224."""
PLATEAU_THRESHOLD = 1e-4
"""Relative threshold: a loss below best * (1 - threshold) counts as an improvement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inversion:
    """The synthesized images of one shard with their labels, losses and statistics; all tensors are on the CPU."""

    images: Tensor
    """Shape (N, C, H, W), float32, normalized as the teacher's input: the images after the last step."""
    labels: Tensor
    """Shape (N,), int64: the assigned labels, or the teacher's predictions if the method assigns none."""
    terms: dict[str, float]
    """Loss terms of the final images without augmentation: total, inception, bns, centers, and those of the structure
    if there are any: heads, entropy, prior, variation."""
    num_agree: int
    """Number of images whose label is the teacher's top-1 prediction."""
    history: Tensor
    """Shape (iterations,): the loss of the augmented images before each step."""
    statistics: dict[str, ChannelStatistics]
    """Statistics of the batch-norm inputs for the final images, by layer in order of execution."""


class PlateauLr:
    """Learning rate that is reduced when the loss stops improving, kept on the device to avoid synchronization.

    After more than `patience` consecutive steps without a loss below best * (1 - 1e-4), the rate is multiplied by
    `factor`. This is the rule of torch.optim.lr_scheduler.ReduceLROnPlateau, which needs the loss as a Python number
    and so would wait for the GPU at each step.
    """

    def __init__(self, lr: float, patience: int, factor: float, device: torch.device) -> None:
        self.lr = torch.tensor(lr, device=device)
        self._best = torch.tensor(torch.inf, device=device)
        self._num_bad = torch.zeros((), device=device)
        self._patience = patience
        self._factor = factor

    def step(self, loss: Tensor) -> None:
        """Update `lr` in place after one step; `loss` is a detached scalar tensor, >= 0."""
        better = loss < self._best * (1 - PLATEAU_THRESHOLD)
        self._best = torch.where(better, loss, self._best)
        self._num_bad = torch.where(better, 0.0, self._num_bad + 1)
        plateau = self._num_bad > self._patience
        self.lr.copy_(torch.where(plateau, self.lr * self._factor, self.lr))
        self._num_bad = torch.where(plateau, 0.0, self._num_bad)


class CosineLr:
    """Learning rate that decays from `lr` to 0 along half a cosine over `iterations` steps; the loss is ignored."""

    def __init__(self, lr: float, iterations: int, device: torch.device) -> None:
        self.lr = torch.tensor(lr, device=device)
        self._start = lr
        self._iterations = iterations
        self._done = 0

    def step(self, loss: Tensor) -> None:
        """Update `lr` in place after one step; `loss` is ignored."""
        self._done += 1
        self.lr.fill_(self._start * 0.5 * (1 + math.cos(math.pi * self._done / self._iterations)))


def mirror_roll(images: Tensor, flip: bool, shift: tuple[int, int]) -> Tensor:
    """Flip all images horizontally if `flip`, and shift them circularly.

    The shift is circular so that no pixel is lost and the statistics of the pixels do not change.

    Args:
        images: Shape (N, C, H, W).
        flip: Whether to flip left to right.
        shift: Rows and columns in pixels; positive shifts down and to the right.
    """
    if flip:
        images = images.flip(-1)
    return torch.roll(images, shift, (-2, -1)) if shift != (0, 0) else images


def _draw_views(
    config: SynthesisConfig, iterations: int, height: int, width: int, generator: torch.Generator
) -> list[tuple[bool, tuple[int, int]]]:
    """Draw the flips and shifts (rows, columns) of all steps as Python numbers, so that no step reads the device."""
    if config.augment == "none" and not config.shift_color:
        return [(False, (0, 0))] * iterations
    most_flips = 2 if config.augment == "flip_shift" else 1
    flips = torch.randint(0, most_flips, (iterations,), generator=generator).tolist()
    limits = (height // SHIFT_PARTS, width // SHIFT_PARTS)
    shifts = [torch.randint(-most, most + 1, (iterations,), generator=generator).tolist() for most in limits]
    return [(bool(flip), (down, right)) for flip, down, right in zip(flips, *shifts, strict=True)]


def _make_schedule(lr: float, config: SynthesisConfig, iterations: int, device: torch.device) -> "CosineLr | PlateauLr":
    if config.schedule == "plateau":
        return PlateauLr(lr, config.plateau_patience, config.plateau_factor, device)
    return CosineLr(lr, iterations, device)


def invert(
    module: nn.Module,
    labels: Tensor,
    input_size: tuple[int, int, int],
    targets: Mapping[str, ChannelStatistics],
    *,
    config: SynthesisConfig,
    generator: torch.Generator,
    iterations: int | None = None,
    given: Tensor | None = None,
    center_targets: Mapping[str, ChannelStatistics] | None = None,
    start: StartNoise = WHITE,
    pixel_range: PixelRange | None = None,
    structure: StructureTerms | None = None,
    device: torch.device | None = None,
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> Inversion:
    """Synthesize one shard of images by optimizing the parameters of `config.method` with Adam.

    L = inception_weight * mean_i (1 - p_i)^gamma CE_i
        + bns_weight * BNS(targets) + center_weight * bns_weight * BNS(center_targets)
        + head_weight * H + entropy_weight * E + prior_weight * P + variation_weight * V

    The first term is absent for zeroq and gaussian, which assign no labels; gaussian does no step at all. All learning
    rates of a method follow the same schedule. The cosine schedule is ours: over a few hundred iterations the plateau
    rule of the paper triggers too late (at lr 0.5 noise hides the plateau) or too early, and the final statistics are 5
    to 30 times further from the targets (docs/results/LOG.md).

    The images after the last step are returned, not those of the lowest loss: each step uses another random
    augmentation, so the lowest loss mostly reflects a favorable draw. The loop never synchronizes with the device.
    Random numbers are drawn on the CPU, so the initial values do not depend on the device.

    Args:
        module: The teacher in eval mode, on `device`. Its parameters get no gradient and are not changed.
        labels: Shape (N,), int64: the target class of each image.
        input_size: Channels, height, width in pixels.
        targets: Target batch-norm statistics by layer, on `device`; empty for a teacher without.
        config: Method, loss weights, learning rates, augmentation.
        generator: CPU generator for the initial values, the augmentation, the swing shifts and the noise of a
            conditional generator.
        iterations: Number of steps, >= 0; None means `config.iterations`.
        given: Finished images (N, C, H, W), of which only the loss terms and statistics are computed; None makes them.
        center_targets: Second set of target statistics for some of the layers, on `device`; None for no second target.
        start: Distribution of the initial pixels: the result of `fit_start`, or white noise. Generators ignore it.
        pixel_range: Range of normalized pixels, which no image leaves at any step; None for no bounds.
        structure: The teacher with terms of its structure, on `device`, which is run instead of `module`; None for no
            such terms.
        device: Device to compute on; None means the CPU.
        on_iteration: Callback after each step with the number of finished steps and the loss (a scalar on the device).

    Returns:
        Images, labels, loss terms and statistics of the shard, on the CPU.

    Raises:
        ValueError: If a loss term or a pixel is not finite at the end; the message names the term and the learning
            rates.

    Source: SynQ (arXiv 2603.18423), section 3, step 1; hard samples: HAST (CVPR 2023); second target: TexQ (NeurIPS
    2023); statistics only: ZeroQ (CVPR 2020); generators: see `synq.synthesis.image_sources`.
    """
    assert not any(part.training for part in module.modules()), "the teacher must be in eval mode"
    device = torch.device("cpu") if device is None else device
    iterations = config.iterations if iterations is None else iterations
    iterations = 0 if config.method == "gaussian" or given is not None else iterations
    source = (
        GivenImages(given.to(device))
        if given is not None
        else make_source(
            labels, input_size, config=config, generator=generator, device=device, start=start, pixel_range=pixel_range
        )
    )
    labels = labels.to(device)
    module = module if structure is None else structure.module
    views = _draw_views(config, iterations, *input_size[1:], generator)
    swings = draw_swings(module, iterations, generator) if config.swings else []
    schedules = [_make_schedule(group.lr, config, iterations, device) for group in source.groups]
    groups = [
        {"params": group.parameters, "lr": schedule.lr}
        for group, schedule in zip(source.groups, schedules, strict=True)
    ]
    # Fused: one kernel per step, and the only implementation that accepts the learning rate as a device tensor.
    optimizer = torch.optim.Adam(groups, fused=True) if groups else None
    parameters = [parameter for group in source.groups for parameter in group.parameters]
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, buffer in zip(parameters, gradients, strict=True):
        parameter.grad = buffer
    history = torch.zeros(iterations, device=device)

    def respond(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (module(images), {}) if structure is None else structure(images)

    def terms_of(
        logits: Tensor, statistics: Mapping[str, ChannelStatistics], looks: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        gamma = config.hard_sample_gamma if config.assigns_labels else 0.0
        nothing = torch.zeros((), device=device)
        terms = {
            "inception": inception_loss(logits, labels, gamma).mean(),
            "bns": bns_loss(statistics, targets, config.bns_form) if targets else nothing,
            "centers": nothing,
        }
        total = config.bns_weight * terms["bns"]
        if structure is not None:
            total = total + structure.total(looks)
        if config.assigns_labels:
            total = config.inception_weight * terms["inception"] + total
        if center_targets:
            terms["centers"] = bns_loss(statistics, center_targets, config.bns_form)
            total = total + config.center_weight * config.bns_weight * terms["centers"]
        return {"total": total, **terms, **looks}

    with BatchNormInputs(module) as inputs:
        with SwingConvolutions(module, swings) as swing:
            for step, (flip, shift) in enumerate(views):
                swing.set_step(step)
                images = source.images()
                view = mirror_roll(images, flip, shift)
                if config.shift_color:
                    view = recolored(view, 1 - step / iterations, generator)
                # A clone, because a teacher may normalize its input in place.
                logits, looks = respond(view.clone() if view is images else view)
                loss = terms_of(logits, inputs.take(), looks)["total"]
                # grad instead of backward, which would accumulate gradients in the teacher's parameters. Copied into
                # buffers, because the fused step needs gradient and parameter in the same memory format.
                for buffer, gradient in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                    buffer.copy_(gradient)
                loss = loss.detach()
                assert optimizer is not None
                optimizer.step()
                source.constrain((step + 1) / iterations)
                for schedule in schedules:
                    schedule.step(loss)
                history[step] = loss
                if on_iteration is not None:
                    on_iteration(step + 1, loss)
        with torch.no_grad():
            images = source.images()
            logits, looks = respond(images.clone())
            statistics = inputs.take()
            labels = labels if config.assigns_labels else logits.argmax(1)
            terms = {name: value.item() for name, value in terms_of(logits, statistics, looks).items()}
    result = images.detach().to("cpu", memory_format=torch.contiguous_format)
    _check_finite({**terms, "pixels": result.sum().item()}, source.groups if iterations else [])
    return Inversion(
        images=result,
        labels=labels.cpu(),
        terms=terms,
        num_agree=int((logits.argmax(1) == labels).sum()),
        history=history.cpu(),
        statistics={
            name: part._replace(mean=part.mean.cpu(), variance=part.variance.cpu()) for name, part in statistics.items()
        },
    )


def _check_finite(values: Mapping[str, float], groups: list[ParameterGroup]) -> None:
    not_finite = [(name, value) for name, value in values.items() if not math.isfinite(value)]
    if not not_finite:
        return
    name, value = not_finite[0]
    if not groups:
        raise ValueError(f"`teacher` must give finite values on noise, but got {name} = {value}")
    fields = " and ".join(f"`synthesis.{group.setting}`" for group in groups)
    rates = ", ".join(f"{group.setting} {group.lr}" for group in groups)
    raise ValueError(
        f"{fields} must keep the optimization finite, but got {name} = {value} with {rates}; lower "
        f"{'it' if len(groups) == 1 else 'them'}, or lower `synthesis.bns_weight`"
    )
