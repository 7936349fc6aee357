"""Random maps that attention is to look like during synthesis: a few blobs, as the things on a photograph.

Source: attention priors of SARDFQ, here on normalized maps.
"""

import torch
from torch import Tensor, fx

from synq.network.attention.locations import attention_of_images, attention_received

MOST_BLOBS = 5
LEAST_WIDTH, MOST_WIDTH = 0.05, 0.25
"""Bounds of the standard deviation of a blob, as fractions of the side of the map."""


class AttentionPrior:
    """Distance of the attention of the deeper half of a network from random maps, which are drawn once.

    Attributes:
        names: Nodes of the network whose outputs, the softmax (..., T, T), are compared.
    """

    def __init__(self, graph: fx.GraphModule, generator: torch.Generator) -> None:
        """Find the attention over all positions of the image.

        Args:
            graph: A graph from ``trace_classifier``.
            generator: CPU generator that draws the maps.
        """
        self._chosen = [one for one in attention_of_images(graph) if one.depth > 0.5]
        self.names = [one.nodes.probabilities for one in self._chosen]
        self._generator = generator
        self._maps: list[Tensor] = []

    def __call__(self, probabilities: list[Tensor]) -> Tensor:
        """Return the mean over attention, weighted by its depth, of the squared distance, a scalar with gradient.

        Args:
            probabilities: (..., T, T) of each of ``names``.
        """
        received = [attention_received(p, one.nodes) for p, one in zip(probabilities, self._chosen, strict=True)]
        if not self._maps or len(self._maps[0]) != len(received[0]):
            self._maps = [
                random_maps(len(values), one.nodes.heads, *one.grid, self._generator).to(values.device)
                for values, one in zip(received, self._chosen, strict=True)
            ]
        total = probabilities[0].new_zeros(())
        for values, maps, one in zip(received, self._maps, self._chosen, strict=True):
            share = values / (values.mean(-1, keepdim=True) + 1e-12)
            total = total + one.depth * (share - maps.to(share.dtype)).square().mean()
        return total / sum(one.depth for one in self._chosen)


def random_maps(count: int, heads: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return random mixtures of one to five normal distributions, (count, heads, height * width), each of mean 1.

    Args:
        count: Number of images.
        heads: Maps of an image.
        height: Rows of a map.
        width: Columns of a map.
        generator: CPU generator.
    """
    shape = (count, heads, MOST_BLOBS, 1, 1)
    number = torch.randint(1, MOST_BLOBS + 1, shape[:2], generator=generator)[..., None, None, None]
    top, left, weight, spread = (torch.rand(shape, generator=generator) for _ in range(4))
    width_of_blob = LEAST_WIDTH + (MOST_WIDTH - LEAST_WIDTH) * spread
    rows = (torch.arange(height)[:, None] + 0.5) / height
    columns = (torch.arange(width)[None, :] + 0.5) / width
    squared = (rows - top).square() + (columns - left).square()
    blobs = (0.2 + weight) * (-squared / (2 * width_of_blob.square())).exp()
    is_used = torch.arange(MOST_BLOBS)[:, None, None] < number
    maps = (blobs * is_used).sum(2).flatten(2) + 1e-6  # a blob between the positions of a tiny map would give zeros
    return maps / maps.mean(-1, keepdim=True)
