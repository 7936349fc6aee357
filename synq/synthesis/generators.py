"""The network that turns random numbers into images, for synthesis by a generator: small, for any image size."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST, NARROWEST = 64, 32
"""Channels of the first map; each doubling of the size halves them, down to the second number."""
LARGEST_START = 8
"""Pixels of the shorter side of the first map, at most."""
SLOPE = 0.2
"""Slope of the leaky ReLU below zero."""


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes of a generator's maps, from the first, made of the latents, to the image's.

    Each is half of the next, rounded up, so any size is reached without a rest: 32 x 32 takes 8, 16, 32, and 9 x 30 takes 5 x 15,
    9 x 30. At least one doubling; as many as bring the shorter side to 8 or below.
    """
    doublings = max(1, math.ceil(math.log2(min(height, width) / LARGEST_START)))
    return [(math.ceil(height / 2**left), math.ceil(width / 2**left)) for left in range(doublings, -1, -1)]


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a scale and a shift for each class: y_i = scale[class_i] * (x_i - mean) / sqrt(variance + eps) + shift[class_i].

    Mean and variance are those of the batch, always: no running statistics are kept.

    Args:
        num_classes: Rows of the tables; 1 is the plain batch norm.
        channels: C.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes, channels))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the maps, shape (N, C, H, W), normalised; `classes` has shape (N,), int64."""
        x = F.batch_norm(x, None, None, training=True)
        scale, shift = (F.embedding(classes, table)[:, :, None, None] for table in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)


class ImageGenerator(nn.Module):
    """Latents -> linear -> first map -> (double the size, convolution 3 x 3) as often as needed -> convolution -> images.

    Batch norm with the statistics of the batch follows each layer, so the images of one batch belong together. The class enters by
    its scales and shifts. The last one begins at 1 and 0, so the first images have mean 0 and standard deviation 1 in each channel,
    as noise N(0, 1) in the teacher's normalised space has, and may drift to where the teacher wants them.

    The weights begin as N(0, 1 / fan-in), drawn from `generator` alone; PyTorch's global random state is neither read nor moved.

    Args:
        latent_dim: Numbers behind each image.
        input_size: Channels, height, width of the images.
        generator: CPU generator of the first weights.
        num_classes: Classes that the images are conditioned on; 1 for none.

    Source: the shape is that of DCGAN (arXiv 1511.06434) with nearest-neighbour doubling, as GDFQ (ECCV 2020) and Genie (CVPR 2023)
    have it. On purpose it is narrower than theirs and begins with a smaller map (at 224 pixels 0.5 million weights, not 50), and has
    no tanh before the last batch norm: at rates that a few hundred steps need, it saturates and the images stand still.
    """

    def __init__(
        self, latent_dim: int, input_size: tuple[int, int, int], generator: torch.Generator, num_classes: int = 1
    ) -> None:
        super().__init__()
        channels, height, width = input_size
        self.sizes = map_sizes(height, width)
        widths = [max(NARROWEST, WIDEST >> index) for index in range(len(self.sizes))]
        with torch.device("meta"):  # without memory, and so without a draw from the global random state
            self.linear = nn.Linear(latent_dim, widths[0] * math.prod(self.sizes[0]), bias=False)
            steps = itertools.pairwise(widths)
            self.convolutions = nn.ModuleList(nn.Conv2d(old, new, 3, padding=1, bias=False) for old, new in steps)
            self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=False)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for weight in self.parameters():
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(fan_in))
        self.norms = nn.ModuleList(ConditionalBatchNorm(num_classes, size) for size in widths)
        self.image_norm = ConditionalBatchNorm(1, channels)

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return images, shape (N, C, H, W), in the layout channels_last.

        Args:
            latents: Shape (N, latent_dim).
            classes: Shape (N,), int64, below `num_classes`; None is class 0 for all.
        """
        nothing = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        classes = nothing if classes is None else classes
        x = self.linear(latents).view(len(latents), *self.sizes[0], -1).permute(0, 3, 1, 2)
        x = self.norms[0](x, classes)
        for convolution, norm, size in zip(self.convolutions, self.norms[1:], self.sizes[1:], strict=True):
            x = F.interpolate(x, size=size, mode="nearest")
            x = F.leaky_relu(norm(convolution(x), classes), SLOPE)
        return self.image_norm(self.to_image(x), nothing)
