"""The range of normalized pixels: what an image that can exist may hold."""

from typing import NamedTuple

import torch
from torch import Tensor


class PixelRange(NamedTuple):
    """Normalized values of a black and a white pixel, per channel.

    Synthetic pixels are optimized, so that nothing but a bound keeps them where real pixels are. A network that
    quantizes its input clips to this range, and one that does not reads pixels that no image has; the two then see
    different images, and fine-tuning spends the weights on the difference.
    """

    low: Tensor
    """Shape (1, C, 1, 1)."""
    high: Tensor
    """Shape (1, C, 1, 1)."""

    def tolist(self) -> list[list[float]]:
        """Return the bounds as plain lists, [low per channel, high per channel]."""
        return [bound.flatten().tolist() for bound in self]

    def clamp(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W) with every pixel clamped to the range, differentiably."""
        return images.clamp(self.low.to(images), self.high.to(images))

    @torch.no_grad()
    def clamp_(self, images: Tensor) -> Tensor:
        """Clamp every pixel of ``images`` (N, C, H, W) in place, and return them."""
        return images.clamp_(self.low.to(images), self.high.to(images))
