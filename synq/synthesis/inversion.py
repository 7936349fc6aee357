"""Turn a frozen classifier into images: optimise one shard, by any method, until the classifier sees its own training data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synq.config.run import SynthesisConfig
from synq.losses import inception_loss
from synq.network.bn_stats import BatchNormInputs, ChannelStatistics, bns_loss
from synq.synthesis.image_sources import Group, make_source
from synq.synthesis.start_noise import WHITE, StartNoise
from synq.synthesis.swing import SwingConvolutions, draw_swings

SHIFT_PARTS = 8
"""The random shift reaches up to 1/8 of the image's side: 4 pixels at 32, 28 at 224."""
PLATEAU_THRESHOLD = 1e-4
"""A loss counts as an improvement when it is lower than the best by this share of it."""
TERMS = ("total", "inception", "bns", "centers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inversion:
    """The images of one shard and what the teacher says of them. All on the CPU."""

    images: Tensor
    """Shape (N, C, H, W), float32, in the teacher's normalised space: the last state of the optimisation."""
    labels: Tensor
    """Shape (N,), int64: the labels assigned before, or, where the method uses none, the teacher's answers to these images."""
    terms: dict[str, float]
    """Loss terms of exactly these images, without augmentation: total, inception, bns, centers."""
    num_agree: int
    """Images whose largest logit is that of their label."""
    history: Tensor
    """Shape (iterations,), the loss before each step, of the augmented view."""
    statistics: dict[str, ChannelStatistics]
    """Batch-norm input statistics of these images, in order of execution."""


class PlateauLr:
    """A learning rate that falls when the loss stands still, kept on the device: reading it or the loss never waits for the GPU.

    After more than `patience` steps in a row without a loss below best * (1 - 1e-4) the rate is multiplied by `factor`. The same
    rule as torch.optim.lr_scheduler.ReduceLROnPlateau, which needs the loss as a Python number.
    """

    def __init__(self, lr: float, patience: int, factor: float, device: torch.device) -> None:
        self.lr = torch.tensor(lr, device=device)
        self._best = torch.tensor(torch.inf, device=device)
        self._num_bad = torch.zeros((), device=device)
        self._patience = patience
        self._factor = factor

    def step(self, loss: Tensor) -> None:
        """Take the loss of one step (a detached scalar; positive or zero) and change `lr` in place."""
        better = loss < self._best * (1 - PLATEAU_THRESHOLD)
        self._best = torch.where(better, loss, self._best)
        self._num_bad = torch.where(better, 0.0, self._num_bad + 1)
        stuck = self._num_bad > self._patience
        self.lr.copy_(torch.where(stuck, self.lr * self._factor, self.lr))
        self._num_bad = torch.where(stuck, 0.0, self._num_bad)


class CosineLr:
    """A learning rate that falls from `lr` to 0 by half a cosine over `iterations` steps; the loss is not looked at."""

    def __init__(self, lr: float, iterations: int, device: torch.device) -> None:
        self.lr = torch.tensor(lr, device=device)
        self._start = lr
        self._iterations = iterations
        self._done = 0

    def step(self, loss: Tensor) -> None:
        """Change `lr` in place; one step was done."""
        self._done += 1
        self.lr.fill_(self._start * 0.5 * (1 + math.cos(math.pi * self._done / self._iterations)))


def mirror_roll(images: Tensor, flip: bool, shift: tuple[int, int]) -> Tensor:
    """Mirror all images left to right (when `flip`) and move them in a circle by `shift` = (rows, columns) pixels.

    Circular, so that no pixel is lost and the batch-norm statistics of the first layer do not change.
    """
    if flip:
        images = images.flip(-1)
    return torch.roll(images, shift, (-2, -1)) if shift != (0, 0) else images


def _draw_views(
    augment: str, iterations: int, height: int, width: int, generator: torch.Generator
) -> list[tuple[bool, tuple[int, int]]]:
    """Draw the flips and shifts of all steps at once, as Python numbers: no step waits for the device to learn its shift."""
    if augment == "none":
        return [(False, (0, 0))] * iterations
    flips = torch.randint(0, 2, (iterations,), generator=generator).tolist()
    limits = (height // SHIFT_PARTS, width // SHIFT_PARTS)
    shifts = [torch.randint(-most, most + 1, (iterations,), generator=generator).tolist() for most in limits]
    return [(bool(flip), (down, right)) for flip, down, right in zip(flips, *shifts, strict=True)]


def _make_rate(lr: float, config: SynthesisConfig, iterations: int, device: torch.device) -> "CosineLr | PlateauLr":
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
    center_targets: Mapping[str, ChannelStatistics] | None = None,
    start: StartNoise = WHITE,
    device: torch.device | None = None,
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> Inversion:
    """Optimise one shard of images with Adam on whatever `config.method` makes them from.

    The cosine is ours: over a few hundred iterations the paper's plateau rule fires too late (the noise of lr 0.5 hides the plateau)
    or too early, and shards end 5 to 30 times further from the statistics (docs/results/LOG.md).

    L = inception_weight * mean_i (1 - p_i)^gamma CE_i + bns_weight * BNS(targets) + center_weight * bns_weight * BNS(center_targets)

    The first term is absent for zeroq and gaussian, which assign no labels; gaussian takes no step at all. Every rate of a method
    follows the schedule. The images after the last step are returned, not those of the lowest loss: each step sees another random
    view, so the lowest loss is mostly a lucky view. Nothing waits for the device inside the loop. Randomness is drawn on the CPU, so
    that the start does not depend on the device.

    Args:
        module: The teacher in eval mode, on `device`. Its parameters get no gradient and are not changed.
        labels: Shape (N,), int64, the class each image is to show.
        input_size: Channels, height, width in pixels.
        targets: Batch-norm statistics to reach, on `device`.
        config: Method, weights, learning rates, augmentation.
        generator: CPU generator of the start, the views and the swings, and of a generator's noise.
        iterations: Steps; None takes `config.iterations`.
        center_targets: A second set of statistics to reach, for some of the layers; None for none.
        start: The noise that pixels begin as: what `fit_start` found, or white. A generator has none.
        device: Where to compute; None is the CPU.
        on_iteration: Called after each step with the number of steps done and the loss (a tensor on the device).

    Raises:
        ValueError: If a term or a pixel is not finite at the end, with the term's name and the learning rates of the method.

    Source: SynQ (arXiv 2603.18423), section 3, step 1; hard samples: HAST (CVPR 2023); second target: TexQ (NeurIPS 2023); statistics
    alone: ZeroQ (CVPR 2020); the generators: `synq.synthesis.image_sources`.
    """
    assert not any(part.training for part in module.modules()), "the teacher must be in eval mode"
    device = torch.device("cpu") if device is None else device
    iterations = config.iterations if iterations is None else iterations
    iterations = 0 if config.method == "gaussian" else iterations
    source = make_source(labels, input_size, config=config, generator=generator, device=device, start=start)
    labels = labels.to(device)
    views = _draw_views(config.augment, iterations, *input_size[1:], generator)
    swings = draw_swings(module, iterations, generator) if config.swings else []
    rates = [_make_rate(group.lr, config, iterations, device) for group in source.groups]
    groups = [{"params": group.parameters, "lr": rate.lr} for group, rate in zip(source.groups, rates, strict=True)]
    # Fused: one kernel a step, and the only form that takes the learning rate as a device tensor.
    optimizer = torch.optim.Adam(groups, fused=True)
    parameters = [parameter for group in source.groups for parameter in group.parameters]
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, place in zip(parameters, gradients, strict=True):
        parameter.grad = place
    history = torch.zeros(iterations, device=device)

    def terms_of(logits: Tensor, statistics: Mapping[str, ChannelStatistics]) -> dict[str, Tensor]:
        gamma = config.hard_sample_gamma if config.assigns_labels else 0.0
        terms = {
            "inception": inception_loss(logits, labels, gamma).mean(),
            "bns": bns_loss(statistics, targets, config.bns_form),
            "centers": torch.zeros((), device=device),
        }
        total = config.bns_weight * terms["bns"]
        if config.assigns_labels:
            total = config.inception_weight * terms["inception"] + total
        if center_targets:
            terms["centers"] = bns_loss(statistics, center_targets, config.bns_form)
            total = total + config.center_weight * config.bns_weight * terms["centers"]
        return {"total": total, **terms}

    with BatchNormInputs(module) as inputs:
        with SwingConvolutions(module, swings) as swing:
            for step, (flip, shift) in enumerate(views):
                swing.turn(step)
                images = source.images()
                view = mirror_roll(images, flip, shift)
                # Never the pixels themselves: a teacher may normalise its input in place.
                logits = module(view.clone() if view is images else view)
                loss = terms_of(logits, inputs.take())["total"]
                # grad, not backward: nothing is left in the teacher, whatever its parameters ask for. Copied into place, because
                # the fused step wants gradient and parameter in one memory layout.
                for place, gradient in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                    place.copy_(gradient)
                loss = loss.detach()
                optimizer.step()
                for rate in rates:
                    rate.step(loss)
                history[step] = loss
                if on_iteration is not None:
                    on_iteration(step + 1, loss)
        with torch.no_grad():
            images = source.images()
            logits = module(images.clone())
            statistics = inputs.take()
            labels = labels if config.assigns_labels else logits.argmax(1)
            terms = {name: value.item() for name, value in terms_of(logits, statistics).items()}
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


def _check_finite(values: Mapping[str, float], groups: list[Group]) -> None:
    broken = [(name, value) for name, value in values.items() if not math.isfinite(value)]
    if not broken:
        return
    name, value = broken[0]
    if not groups:
        raise ValueError(f"`teacher` must give finite values on noise, but got {name} = {value}")
    fields = " and ".join(f"`synthesis.{group.setting}`" for group in groups)
    rates = ", ".join(f"{group.setting} {group.lr}" for group in groups)
    raise ValueError(
        f"{fields} must keep the optimisation finite, but got {name} = {value} with {rates}; lower "
        f"{'it' if len(groups) == 1 else 'them'}, or lower `synthesis.bns_weight`"
    )
