"""One weight whose rounding is learned: a number between the two codes around each value.

Source: AdaRound (Nagel et al., ICML 2020), section 3.2; that a weight stays off the middle of its cell is ours.
"""

import torch
from torch import Tensor

from synq.quant.layers import QuantConv2d, QuantLinear

ZETA, GAMMA = 1.1, -0.1
"""Ends to which the sigmoid is stretched, so that 0 and 1 are reached at finite V."""
REACH = 0.4
"""Largest distance of a weight from the middle of its cell, in steps; its edges are at 0.5."""


class SoftRounding:
    """One weight on its grid with a rounding that can be learned.

    Args:
        layer: A quantized layer with a stored scale.
    """

    def __init__(self, layer: QuantConv2d | QuantLinear) -> None:
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        shape = (-1, *[1] * (weight.ndim - 1))
        scale, zero_point = (part.reshape(shape) for part in quantizer.qparams(weight))
        self.low, self.high = quantizer.quant_min - zero_point, quantizer.quant_max - zero_point
        ratio = weight * (1.0 / scale).to(weight.dtype)
        self.scale, self.ratio = scale.to(weight.dtype), ratio
        self.floor, self.nearest = ratio.floor(), ratio.round().clamp(self.low, self.high)
        self.logits = torch.logit((ratio - self.floor - GAMMA) / (ZETA - GAMMA)).requires_grad_()

    def share(self) -> Tensor:
        """Return h(V), shape of the weight, in [0, 1]."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def weight(self) -> Tensor:
        """Return w^(V)."""
        return (self.floor + self.share()).clamp(self.low, self.high) * self.scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the learned codes, less the zero point, as floating numbers."""
        return (self.floor + (self.share() >= 0.5)).clamp(self.low, self.high)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """Return the weight within reach of the middles of its learned cells."""
        codes = self.codes()
        return (codes + (self.ratio - codes).clamp(-REACH, REACH)) * self.scale
