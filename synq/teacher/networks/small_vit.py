"""A vision transformer for small images, the architecture of a bundled teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with one layer for query, key and value: (N, T, C) -> (N, T, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token gathers from all."""
        count, tokens, channels = x.shape
        query, key, value = self.qkv(x).reshape(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        gathered = F.scaled_dot_product_attention(query, key, value)
        return self.proj(gathered.transpose(1, 2).reshape(count, tokens, channels))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a perceptron of four times the channels."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (N, T, C) after both residual sums."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A vision transformer with a class token: (N, C, H, W) -> logits (N, K)."""

    def __init__(
        self, channels: int, depth: int, heads: int, *, classes: int, input_size: tuple[int, int, int], patch: int
    ) -> None:
        super().__init__()
        in_channels, height, width = input_size
        self.patches = nn.Conv2d(in_channels, channels, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(torch.randn(1, (height // patch) * (width // patch) + 1, channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalized images."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vision_transformer(
    channels: int, depth: int, heads: int, *, classes: int, input_size: tuple[int, int, int], patch: int
) -> VisionTransformer:
    """Build an untrained vision transformer.

    Args:
        channels: Width of the tokens, a multiple of ``heads``.
        depth: Number of blocks, >= 1.
        heads: Heads of each attention, >= 1.
        classes: Number of logits, >= 2.
        input_size: (C, H, W) of the images; H and W are multiples of ``patch``.
        patch: Side of a patch in pixels.

    Raises:
        ValueError: If an argument is outside its range.

    Source: Dosovitskiy et al., ICLR 2021; LayerNorm before each part.
    """
    for name, value, low in (("depth", depth, 1), ("heads", heads, 1), ("classes", classes, 2), ("patch", patch, 1)):
        if value < low:
            raise ValueError(f"`{name}` must be at least {low}, but got {value}")
    if channels < 1 or channels % heads:
        raise ValueError(f"`channels` must be a multiple of the {heads} heads, but got {channels}")
    if any(side % patch for side in input_size[1:]):
        raise ValueError(f"`patch` must divide height and width, but got {patch} for {input_size[1:]}")
    return VisionTransformer(channels, depth, heads, classes=classes, input_size=input_size, patch=patch)
