"""The way to make images that a user adds, `synthesis.method`: its inputs, its call, the checks of its images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from synq.common.progress import Bar
from synq.config.plugins import SYNTHESIS_METHOD
from synq.config.synthesis import SynthesisConfig
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher
from synq.teacher.user_code import added_function, called

SLACK = 1e-3
"""Part of the range of pixels by which a pixel may leave it, as rounding makes it; it is then clamped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisInputs:
    """What a synthesis method of a user is given, for one shard of N images.

    Images are normalized as the input of the network: a pixel of value p in [0, 1] is (p - mean) / std.
    """

    module: nn.Module
    """The classifier on `device`, in eval mode and frozen; it takes (N, C, H, W) and returns logits (N, K)."""
    labels: Tensor
    """(N,) int64 on `device`: the classes to make images for, balanced over the set."""
    input_size: tuple[int, int, int]
    """Channels, height and width of an image, in pixels."""
    mean: tuple[float, ...]
    """Mean per channel of the normalization."""
    std: tuple[float, ...]
    """Standard deviation per channel of the normalization."""
    generator: torch.Generator
    """Generator of random numbers on the CPU, seeded by `data_seed` and the number of the shard."""
    config: SynthesisConfig
    """Settings of the synthesis; a function may use any of them (iterations, lr, ...)."""
    device: torch.device
    """Device of the images."""
    progress: Callable[[float], None] = field(default=lambda done: None)
    """Takes the finished part of the shard, in [0, 1], for the progress bar; calls are optional."""

    def clamp(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W) with every pixel clamped to the range of real ones, differentiably."""
        return _pixel_range(self.mean, self.std).clamp(images)


OwnMethod = Callable[[SynthesisInputs], Any]


def own_method(config: SynthesisConfig) -> OwnMethod | None:
    """Return the synthesis method of a user, or None if the method is one of SynQ's.

    Raises:
        ValueError: There is no such function.
        FileNotFoundError: Its file does not exist.
    """
    return added_function(SYNTHESIS_METHOD, config.method) if config.is_added else None


def given_images(
    teacher: Teacher,
    module: nn.Module,
    labels: Tensor,
    config: SynthesisConfig,
    generator: torch.Generator,
    device: torch.device,
    bar: Bar,
) -> tuple[Tensor | None, Tensor]:
    """Return the images and labels of a shard as a method of the user makes them; None, and the labels, for SynQ's.

    Args:
        teacher: The teacher.
        module: Its classifier on `device`; the method gets a copy.
        labels: (N,) int64, on the CPU.
        config: Settings of the synthesis.
        generator: As in `SynthesisInputs`.
        device: Device of the images.
        bar: Progress bar, advanced by the number of finished images.

    Raises:
        ValueError: As `own_images`.
    """
    method, shown = own_method(config), 0.0
    if method is None:
        return None, labels

    def progress(done: float) -> None:
        nonlocal shown
        if not bar.disable and shown < done <= 1:
            bar.update((done - shown) * len(labels))
            shown = done

    inputs = SynthesisInputs(
        module=copy.deepcopy(module),
        labels=labels.to(device),
        input_size=teacher.input_size,
        mean=teacher.mean,
        std=teacher.std,
        generator=generator,
        config=config,
        device=device,
        progress=progress,
    )
    images, labels = own_images(method, inputs)
    progress(1.0)
    return images, labels


def own_images(method: OwnMethod, inputs: SynthesisInputs) -> tuple[Tensor, Tensor]:
    """Return the images (N, C, H, W), float32 and within the range of pixels, and labels (N,) that a method makes.

    Args:
        method: The function. It returns images, or (images, labels) if it makes them for other classes.
        inputs: Its inputs.

    Raises:
        ValueError: It fails, or returns no finite images of this number, size and range, or no such labels.
    """
    name = inputs.config.method
    count, size = len(inputs.labels), inputs.input_size
    rule = f"`synthesis.method` must return images ({count}, {', '.join(map(str, size))}), or (images, labels)"
    with torch.enable_grad():
        made = called(method, inputs, rule, name, seed=inputs.generator.initial_seed())
    is_pair = isinstance(made, tuple | list) and len(made) == 2
    images, labels = made if is_pair else (made, inputs.labels)
    if not isinstance(images, Tensor):
        raise ValueError(f"{rule}, but {name} returned {type(images).__name__}")
    if tuple(images.shape) != (count, *size):
        raise ValueError(f"{rule}, but {name} returned shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{rule}, normalized and of a float type, but {name} returned {images.dtype}")
    # A copy, because a method may keep what it returns, or return memory that it shares with the network.
    images = images.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(images.isfinite().all()):
        raise ValueError(f"{rule}, but {name} returned NaN or infinity")
    pixels = _pixel_range(inputs.mean, inputs.std)
    slack = SLACK * (pixels.high - pixels.low)
    outside = (images < pixels.low - slack) | (images > pixels.high + slack)
    if bool(outside.any()):
        channel = int(outside.sum((0, 2, 3)).argmax())
        low, high = (float(bound.flatten()[channel]) for bound in pixels)
        found = images[:, channel]
        raise ValueError(
            f"`synthesis.method` must return normalized pixels, in [{low:.4g}, {high:.4g}] for channel {channel}, but "
            f"{name} returned {float(found.min()):.4g} to {float(found.max()):.4g}: return inputs.clamp(images)"
        )
    return pixels.clamp_(images), _checked_labels(labels, inputs, name)


def _checked_labels(labels: Any, inputs: SynthesisInputs, name: str) -> Tensor:
    classes = _num_classes(inputs)
    rule = f"`synthesis.method` must return labels ({len(inputs.labels)},) int64 in 0..{classes - 1}"
    if not isinstance(labels, Tensor) or labels.shape != inputs.labels.shape or labels.dtype != torch.int64:
        is_tensor = isinstance(labels, Tensor)
        found = f"{tuple(labels.shape)} {labels.dtype}" if is_tensor else type(labels).__name__
        raise ValueError(f"{rule}, but {name} returned {found}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{rule}, but {name} returned {int(labels.min())}..{int(labels.max())}")
    return labels.detach().cpu().clone()


@torch.no_grad()
def _num_classes(inputs: SynthesisInputs) -> int:
    return int(inputs.module(torch.zeros(1, *inputs.input_size, device=inputs.device)).shape[1])


def _pixel_range(mean: tuple[float, ...], std: tuple[float, ...]) -> PixelRange:
    low, high = ([(bound - m) / s for m, s in zip(mean, std, strict=True)] for bound in (0.0, 1.0))
    return PixelRange(*(torch.tensor(bound).view(1, -1, 1, 1) for bound in (low, high)))
