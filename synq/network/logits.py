"""Logits of a network for many images, in batches."""

import itertools

import torch
from torch import Tensor, nn


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return the logits of images, on the device and in the dtype of the network's parameters.

    Args:
        net: (N, C, H, W) -> logits (N, K). Without floating-point parameters and buffers, images stay as they are.
        images: (N, C, H, W), N >= 1.
        batch_size: Images per forward pass, >= 1.

    Returns:
        (N, K).
    """
    tensors = itertools.chain(net.parameters(), net.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), images)
    return torch.cat([net(batch.to(like)) for batch in images.split(batch_size)])
