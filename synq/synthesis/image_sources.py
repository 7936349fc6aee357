"""Parametrizations of a shard's images: pixels, latent vectors with a generator, or a class-conditional generator."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from synq.config.run import SynthesisConfig
from synq.synthesis.generators import ImageGenerator
from synq.synthesis.lowpass import StagedLowpass
from synq.synthesis.start_noise import WHITE, StartNoise
from synq.teacher.pixel_range import PixelRange


class ParameterGroup(NamedTuple):
    """Parameters with a common learning rate.

    Attributes:
        setting: Name of the setting of `synthesis` with the learning rate, for messages.
        lr: Initial learning rate.
        parameters: Leaf tensors on the device that require a gradient.
    """

    setting: str
    lr: float
    parameters: Sequence[Tensor]


class ImageSource(Protocol):
    """Interface of a synthesis method to the optimization loop.

    Labels are assigned outside the source: image i of every batch belongs to label i of the shard.
    """

    groups: list[ParameterGroup]
    """The optimized parameters."""

    def images(self) -> Tensor:
        """Return the images (N, C, H, W) of the next step, on the device; after the last step, the final images.

        No pixel is outside the range that was given to `make_source`.
        """
        ...

    def constrain(self, done: float) -> None:
        """Bring parameters back to where images are possible, after each step of the optimizer.

        Args:
            done: Fraction of the steps that are done, in (0, 1].
        """
        ...


class PixelSource:
    """Optimizes the pixels directly, initialized with noise of the distribution `start`.

    Projected gradient descent: each step may leave the range of pixels, and is then clamped to it. A clamp between
    pixels and network instead would give no gradient outside the range, so that a pixel that has left it never returns.
    """

    def __init__(
        self,
        num_images: int,
        input_size: tuple[int, int, int],
        *,
        config: SynthesisConfig,
        generator: torch.Generator,
        device: torch.device,
        start: StartNoise,
        pixel_range: PixelRange | None = None,
    ) -> None:
        pixels = start.apply(torch.randn((num_images, *input_size), generator=generator))
        self._range = pixel_range
        self._stages = StagedLowpass(*input_size[1:], device) if config.low_first else None
        if self._stages is not None:
            pixels = self._stages(pixels.to(device), 0.0).cpu()
        if pixel_range is not None:
            pixel_range.clamp_(pixels)
        self._pixels = pixels.to(device, memory_format=torch.channels_last).requires_grad_()
        self.groups = [ParameterGroup("lr", config.lr, [self._pixels])]

    def images(self) -> Tensor:
        return self._pixels

    def constrain(self, done: float) -> None:
        if self._stages is not None:
            with torch.no_grad():
                self._pixels.copy_(self._stages(self._pixels, done))
        if self._range is not None:
            self._range.clamp_(self._pixels)


class GivenImages:
    """Holds finished images (N, C, H, W), which a method of the user made; nothing is optimized."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.groups: list[ParameterGroup] = []

    def images(self) -> Tensor:
        return self._images

    def constrain(self, done: float) -> None:
        """Do nothing: there is no step."""


class LatentSource:
    """Optimizes one latent vector per image, initialized with N(0, 1), and one generator per shard.

    Source: Genie (CVPR 2023), section 3.1.
    """

    def __init__(
        self,
        num_images: int,
        input_size: tuple[int, int, int],
        *,
        config: SynthesisConfig,
        generator: torch.Generator,
        device: torch.device,
        pixel_range: PixelRange | None = None,
    ) -> None:
        self._range = pixel_range
        latents = torch.randn((num_images, config.latent_dim), generator=generator)
        self._latents = latents.to(device).requires_grad_()
        self._network = _make_network(config, input_size, generator, device)
        weights = list(self._network.parameters())
        self.groups = [
            ParameterGroup("lr", config.lr, [self._latents]),
            ParameterGroup("generator_lr", config.generator_lr, weights),
        ]

    def images(self) -> Tensor:
        return _clamped(self._network(self._latents), self._range)

    def constrain(self, done: float) -> None:
        """Do nothing: the parameters are not pixels, and the images are clamped where they are made."""


class GeneratorSource:
    """Optimizes one class-conditional generator per shard; each step draws new noise.

    Every batch has the labels of the shard, which are already balanced, instead of newly drawn labels: each image gets
    new noise, so the order of the labels carries no information, and a generator that serves one shard needs no class
    that the shard lacks.

    Source: GDFQ (ECCV 2020), section 3.2. Its code conditions on the class in two ways: it multiplies the noise with an
    embedding of the class, or, for ImageNet, uses conditional batch normalization. We always use the latter: the sign
    of the product depends on the noise, and the generator does not learn the classes from it within a few hundred
    steps. GDFQ trains one generator for the whole training; here each shard has a separate one, so that shards are
    independent of each other and of the process that synthesizes them.
    """

    def __init__(
        self,
        labels: Tensor,
        input_size: tuple[int, int, int],
        *,
        config: SynthesisConfig,
        generator: torch.Generator,
        device: torch.device,
        pixel_range: PixelRange | None = None,
    ) -> None:
        self._range = pixel_range
        classes, rows = labels.cpu().unique(return_inverse=True)
        self._rows = rows.to(device)
        self._network = _make_network(config, input_size, generator, device, len(classes))
        self._shape = (labels.numel(), config.latent_dim)
        self._generator = generator
        self.groups = [ParameterGroup("generator_lr", config.generator_lr, list(self._network.parameters()))]

    def images(self) -> Tensor:
        # Drawn on the CPU, so that the values do not depend on the device; pinned memory makes the copy asynchronous.
        noise = torch.randn(self._shape, generator=self._generator, pin_memory=self._rows.is_cuda)
        images = self._network(noise.to(self._rows.device, non_blocking=True), self._rows)
        return _clamped(images, self._range)

    def constrain(self, done: float) -> None:
        """Do nothing: the parameters are not pixels, and the images are clamped where they are made."""


def _clamped(images: Tensor, pixel_range: PixelRange | None) -> Tensor:
    return images if pixel_range is None else pixel_range.clamp(images)


def _make_network(
    config: SynthesisConfig,
    input_size: tuple[int, int, int],
    generator: torch.Generator,
    device: torch.device,
    num_classes: int = 1,
) -> ImageGenerator:
    network = ImageGenerator(config.latent_dim, input_size, generator, num_classes)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_source(
    labels: Tensor,
    input_size: tuple[int, int, int],
    *,
    config: SynthesisConfig,
    generator: torch.Generator,
    device: torch.device,
    start: StartNoise = WHITE,
    pixel_range: PixelRange | None = None,
) -> ImageSource:
    """Create the image source of one shard for `config.method`.

    Args:
        labels: Shape (N,), int64: the target class of each image.
        input_size: Channels, height, width in pixels.
        config: Method, learning rates, dimension of the latent vectors.
        generator: CPU generator for the initial values and for the noise of each step.
        device: Device of the images.
        start: Distribution of the initial pixels; generators ignore it.
        pixel_range: Range of normalized pixels; None for no bounds.
    """
    if config.method == "gdfq":
        return GeneratorSource(
            labels, input_size, config=config, generator=generator, device=device, pixel_range=pixel_range
        )
    count = labels.numel()
    if config.method == "genie":
        return LatentSource(
            count, input_size, config=config, generator=generator, device=device, pixel_range=pixel_range
        )
    return PixelSource(
        count, input_size, config=config, generator=generator, device=device, start=start, pixel_range=pixel_range
    )
