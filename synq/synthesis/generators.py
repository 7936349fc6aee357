"""Image generator: a small convolutional network from latent vectors to images of any size."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST, NARROWEST = 64, 32
"""Channels of the first feature map, and the lower bound; each upsampling halves the channels down to the bound."""
LARGEST_START = 8
"""Maximum length in pixels of the shorter side of the first feature map."""
SLOPE = 0.2
"""Negative slope of the leaky ReLU."""


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes (height, width) in pixels of a generator's feature maps, from the first to the image.

    Each size is half of the next, rounded up, so that every image size can be reached: 32 x 32 gives 8 x 8, 16 x 16,
    32 x 32; and 9 x 30 gives 5 x 15, 9 x 30. There is at least one upsampling, and as many as the first map needs for
    its shorter side to be at most `LARGEST_START`.

    Args:
        height: Image height in pixels, >= 1.
        width: Image width in pixels, >= 1.
    """
    doublings = max(1, math.ceil(math.log2(min(height, width) / LARGEST_START)))
    return [(math.ceil(height / 2**left), math.ceil(width / 2**left)) for left in range(doublings, -1, -1)]


class ConditionalBatchNorm(nn.Module):
    """Batch normalization with a separate scale and shift for each class.

    y_i = scale[class_i] * (x_i - mean) / sqrt(variance + eps) + shift[class_i]

    Mean and variance are always those of the batch; there are no running statistics.

    Args:
        num_classes: Number of classes K; 1 gives plain batch normalization.
        channels: Number of channels C. Scale and shift have shape (K, C).
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes, channels))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Normalize feature maps (N, C, H, W); `classes` has shape (N,), int64, in [0, num_classes)."""
        x = F.batch_norm(x, None, None, training=True)
        scale, shift = (F.embedding(classes, table)[:, :, None, None] for table in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)


class ImageGenerator(nn.Module):
    """Generator network: latent vectors -> linear -> (upsample by 2, 3 x 3 convolution) x n -> convolution -> images.

    Batch normalization with the statistics of the batch follows each layer, so the images of one batch depend on each
    other. The class is an input of the conditional scales and shifts. The scale and shift of the last normalization
    start at 1 and 0: the initial images have mean 0 and standard deviation 1 in each channel, like noise N(0, 1) in the
    teacher's normalized input space, and both parameters are trained.

    The weights are initialized to N(0, 1 / fan-in), drawn from `generator` only; PyTorch's global random state is
    neither read nor changed.

    Args:
        latent_dim: Dimension of the latent vectors.
        input_size: Channels, height, width of the images.
        generator: CPU generator for the initial weights.
        num_classes: Number of classes that the images are conditioned on; 1 for an unconditional generator.

    Source: the architecture of DCGAN (arXiv 1511.06434) with nearest-neighbor upsampling, as in GDFQ (ECCV 2020) and
    Genie (CVPR 2023). It deliberately differs from theirs: fewer channels and a smaller first map (0.5 instead of 50
    million weights at 224 pixels), and no tanh before the last batch normalization. At the learning rates that a few
    hundred steps need, the tanh saturates and the images stop changing.
    """

    def __init__(
        self, latent_dim: int, input_size: tuple[int, int, int], generator: torch.Generator, num_classes: int = 1
    ) -> None:
        super().__init__()
        channels, height, width = input_size
        self.sizes = map_sizes(height, width)
        num_channels = [max(NARROWEST, WIDEST >> index) for index in range(len(self.sizes))]
        with torch.device("meta"):  # allocates nothing, so the default initializers draw no random numbers
            self.linear = nn.Linear(latent_dim, num_channels[0] * math.prod(self.sizes[0]), bias=False)
            pairs = itertools.pairwise(num_channels)
            self.convolutions = nn.ModuleList(nn.Conv2d(old, new, 3, padding=1, bias=False) for old, new in pairs)
            self.to_image = nn.Conv2d(num_channels[-1], channels, 3, padding=1, bias=False)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for weight in self.parameters():
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(fan_in))
        self.norms = nn.ModuleList(ConditionalBatchNorm(num_classes, channel_count) for channel_count in num_channels)
        self.image_norm = ConditionalBatchNorm(1, channels)

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Tensor:
        """Generate images (N, C, H, W) in channels_last memory format.

        Args:
            latents: Shape (N, latent_dim).
            classes: Shape (N,), int64, in [0, num_classes); None is class 0 for all.
        """
        class_zero = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        classes = class_zero if classes is None else classes
        x = self.linear(latents).view(len(latents), *self.sizes[0], -1).permute(0, 3, 1, 2)
        x = self.norms[0](x, classes)
        for convolution, norm, size in zip(self.convolutions, self.norms[1:], self.sizes[1:], strict=True):
            x = F.interpolate(x, size=size, mode="nearest")
            x = F.leaky_relu(norm(convolution(x), classes), SLOPE)
        return self.image_norm(self.to_image(x), class_zero)
