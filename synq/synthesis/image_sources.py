"""Where the images of a shard come from: pixels, latents behind a generator, or a generator of classes. One interface for the loop."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from synq.config.run import SynthesisConfig
from synq.synthesis.generators import ImageGenerator
from synq.synthesis.start_noise import WHITE, StartNoise


class Group(NamedTuple):
    """Parameters that share a learning rate.

    Attributes:
        setting: The setting of `synthesis` that holds the rate, for messages.
        lr: The rate at the start.
        parameters: Leaves on the device, which ask for gradient.
    """

    setting: str
    lr: float
    parameters: Sequence[Tensor]


class ImageSource(Protocol):
    """What the loop of synthesis asks of a method.

    The labels are not the source's: image i of every batch shows the i-th assigned label.
    """

    groups: list[Group]
    """What is optimised."""

    def images(self) -> Tensor:
        """Return the images of the next step, shape (N, C, H, W), on the device; after the last step, the images of the shard."""
        ...


class PixelSource:
    """The pixels themselves, which begin as the noise that `start` makes of N(0, 1)."""

    def __init__(
        self,
        num_images: int,
        input_size: tuple[int, int, int],
        *,
        config: SynthesisConfig,
        generator: torch.Generator,
        device: torch.device,
        start: StartNoise,
    ) -> None:
        pixels = start.shape(torch.randn((num_images, *input_size), generator=generator))
        self._pixels = pixels.to(device, memory_format=torch.channels_last).requires_grad_()
        self.groups = [Group("lr", config.lr, [self._pixels])]

    def images(self) -> Tensor:
        return self._pixels


class LatentSource:
    """One latent vector an image, which begins as N(0, 1), and a generator of the shard; both are optimised.

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
    ) -> None:
        latents = torch.randn((num_images, config.latent_dim), generator=generator)
        self._latents = latents.to(device).requires_grad_()
        self._network = _make_network(config, input_size, generator, device)
        weights = list(self._network.parameters())
        self.groups = [Group("lr", config.lr, [self._latents]), Group("generator_lr", config.generator_lr, weights)]

    def images(self) -> Tensor:
        return self._network(self._latents)


class GeneratorSource:
    """A conditional generator of the shard: each batch is made of fresh noise, by the scales and shifts of its labels.

    The labels of each batch are the shard's own, which are balanced already, and not drawn anew: noise is drawn for each image, so
    their order says nothing, and a generator that serves one shard needs no class that the shard does not have.

    Source: GDFQ (ECCV 2020), section 3.2. Its code has two ways to tell the class: by the noise multiplied with an embedding of the
    class, and by batch norms that are conditional, for ImageNet. We take the second for all: of the product, whose sign is the
    noise's, the generator does not learn the classes within a few hundred steps. There one generator serves the whole training; here
    each shard has its own, so that shards stay independent of each other and of whoever makes them.
    """

    def __init__(
        self,
        labels: Tensor,
        input_size: tuple[int, int, int],
        *,
        config: SynthesisConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        classes, rows = labels.cpu().unique(return_inverse=True)
        self._rows = rows.to(device)
        self._network = _make_network(config, input_size, generator, device, len(classes))
        self._shape = (labels.numel(), config.latent_dim)
        self._generator = generator
        self.groups = [Group("generator_lr", config.generator_lr, list(self._network.parameters()))]

    def images(self) -> Tensor:
        # Drawn on the CPU, so that it does not depend on the device; from pinned memory the copy does not wait for it either.
        noise = torch.randn(self._shape, generator=self._generator, pin_memory=self._rows.is_cuda)
        return self._network(noise.to(self._rows.device, non_blocking=True), self._rows)


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
) -> ImageSource:
    """Return where the images of one shard come from, by `config.method`.

    Args:
        labels: Shape (N,), int64, the class each image is to show.
        input_size: Channels, height, width in pixels.
        config: Method, learning rates, size of the latents.
        generator: CPU generator: of the start, and of the noise of each step.
        device: Where the images are to be.
        start: The noise that pixels begin as; a generator has none.
    """
    if config.method == "gdfq":
        return GeneratorSource(labels, input_size, config=config, generator=generator, device=device)
    if config.method == "genie":
        return LatentSource(labels.numel(), input_size, config=config, generator=generator, device=device)
    return PixelSource(labels.numel(), input_size, config=config, generator=generator, device=device, start=start)
