"""Attention of a network as maps over the image, and how similar its tokens are, for the report of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from synq.diagnostics.probe_parts import SIMILARITY_BINS
from synq.network.attention.locations import AttentionNodes, is_of_image, locate_attention
from synq.network.attention.token_map import grid_of, layer_grids
from synq.network.tracing import with_outputs

BATCH_SIZE = 16
"""Images per forward pass: the maps of all heads are in memory."""


@dataclass(frozen=True, kw_only=True)
class ShownAttention:
    """The attention of a traced network that is shown: the last one over all positions of the image.

    Attributes:
        nodes: The attention.
        height, width: Size of the map that its tokens are, without the extra ones.
        index, count: Place of the attention among all, from 1, and their number.
    """

    nodes: AttentionNodes
    height: int
    width: int
    index: int
    count: int

    @property
    def text(self) -> str:
        """Which attention it is, for a caption."""
        whose = "the class token" if self.nodes.extra else "all queries"
        return f"attention {self.index} of {self.count}, of {whose}, mean over {self.nodes.heads} heads"


def shown_attention(traced: fx.GraphModule) -> ShownAttention | None:
    """Return the attention of a network that is shown, None if it has no attention.

    Args:
        traced: A graph from ``trace_classifier``.

    Raises:
        ValueError: No attention of the network is over the positions of one image, but all are over windows.
    """
    found = locate_attention(traced)
    by_name = {node.name: node for node in traced.graph.nodes}
    grids = layer_grids(traced)
    for number, nodes in reversed(list(enumerate(found, 1))):
        grid = grid_of(nodes.tokens, grids)
        if grid is not None and is_of_image(by_name[nodes.scores].meta["shape"]):
            return ShownAttention(nodes=nodes, height=grid[0], width=grid[1], index=number, count=len(found))
    if found:
        raise ValueError("attention of this network is in windows, so that there is no map of the whole image")
    return None


@torch.no_grad()
def attention_of(
    networks: Mapping[str, tuple[fx.GraphModule, str]], shown: ShownAttention, images: Tensor
) -> dict[str, np.ndarray]:
    """Return by network what the image's positions get of its attention, the mean over heads.

    With extra tokens, it is the attention of the first one, the class token; else the mean over all queries.

    Args:
        networks: By name a network and its node of the softmax (N, heads, T, T).
        shown: The attention.
        images: (N, C, H, W), normalized.

    Returns:
        Maps (N, height, width), each of sum 1 at most.
    """
    maps = {}
    for name, (net, node) in networks.items():
        tapped, extra = with_outputs(net, [node]), shown.nodes.extra
        parts = []
        for batch in images.split(BATCH_SIZE):
            _, probabilities = tapped(batch)
            heads = probabilities if probabilities.dim() == 4 else probabilities.unsqueeze(-3)
            received = heads[..., 0, extra:] if extra else heads.mean(-2)
            parts.append(received.mean(-2).reshape(len(batch), shown.height, shown.width))
        maps[name] = torch.cat(parts).double().numpy()
    return maps


@torch.no_grad()
def token_similarities(traced: fx.GraphModule, images: Tensor) -> np.ndarray:
    """Return the histogram of the cosines between the tokens of an image that attention gathers.

    Args:
        traced: A graph from ``trace_classifier``, with attention.
        images: (N, C, H, W), normalized.

    Returns:
        Shares (SIMILARITY_BINS,) over [-1, 1], the mean over images and all attention of the network.
    """
    attentions = locate_attention(traced)
    tapped = with_outputs(traced, [attention.gathered for attention in attentions])
    counts = torch.zeros(SIMILARITY_BINS, dtype=torch.float64)
    for batch in images.split(BATCH_SIZE):
        _, *gathered = tapped(batch)
        for values, attention in zip(gathered, attentions, strict=True):
            tokens = (values.mean(-3) if attention.heads > 1 else values)[..., attention.extra :, :]
            normed = nn.functional.normalize(tokens.double(), dim=-1)
            cosines = normed @ normed.transpose(-2, -1)
            different = ~torch.eye(cosines.shape[-1], dtype=torch.bool)
            found = torch.histc(cosines[..., different].clamp(-1, 1), SIMILARITY_BINS, -1, 1)
            counts += found / found.sum() * len(batch)
    shares: np.ndarray = (counts / counts.sum()).numpy()
    return shares
