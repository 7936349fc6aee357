"""Attention of a network as maps over the image, and how similar its tokens are, for the report of a run."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from synq.diagnostics.probe_parts import SIMILARITY_BINS
from synq.network.attention.locations import (
    ImageAttention,
    attention_of_images,
    attention_received,
    locate_attention,
    softmaxes,
)
from synq.network.tracing import with_outputs

BATCH_SIZE = 16
"""Images per forward pass: the maps of all heads are in memory."""


def shown_attention(traced: fx.GraphModule) -> ImageAttention | None:
    """Return the attention of a network that is shown, the last one over an image; None if it has no attention.

    Args:
        traced: A graph from ``trace_classifier``.

    Raises:
        ValueError: No attention of the network is over the positions of one image, but all are over windows, or of
            several images together.
    """
    found = attention_of_images(traced)
    if not found and locate_attention(traced):
        raise ValueError("attention of this network is in windows, so that there is no map of the whole image")
    if not found and softmaxes(traced):
        raise ValueError("no axis of this network's attention keeps images apart, so that there is no map of one image")
    return found[-1] if found else None


def place_of(shown: ImageAttention) -> str:
    """Return which attention it is, for a caption."""
    whose = "the class token" if shown.nodes.extra else "all queries"
    return f"the attention at {100 * shown.depth:.0f} % of the depth, of {whose}, mean over {shown.nodes.heads} heads"


@torch.no_grad()
def attention_of(
    networks: Mapping[str, tuple[fx.GraphModule, str]], shown: ImageAttention, images: Tensor
) -> dict[str, np.ndarray]:
    """Return by network what the image's positions get of its attention, the mean over heads.

    With extra tokens, it is the attention of the first one, the class token; else the mean over all queries.

    Args:
        networks: By name a network and its node of the softmax (..., T, T).
        shown: The attention.
        images: (N, C, H, W), normalized.

    Returns:
        Maps (N, height, width) of its grid, each of sum 1 at most.
    """
    maps = {}
    for name, (net, node) in networks.items():
        tapped, parts = with_outputs(net, [node]), []
        for batch in images.split(BATCH_SIZE):
            received = attention_received(tapped(batch)[1], shown.nodes)
            parts.append(received.mean(-2).reshape(len(batch), *shown.grid))
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
            tokens = attention.by_image(values).mean(-3)[..., attention.extra :, :]
            normed = nn.functional.normalize(tokens.double(), dim=-1)
            cosines = normed @ normed.transpose(-2, -1)
            different = ~torch.eye(cosines.shape[-1], dtype=torch.bool)
            found = torch.histc(cosines[..., different].clamp(-1, 1), SIMILARITY_BINS, -1, 1)
            counts += found / found.sum() * len(batch)
    shares: np.ndarray = (counts / counts.sum()).numpy()
    return shares
