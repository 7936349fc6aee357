"""Learnable rounding of one weight tensor (AdaRound): a variable in [0, 1] between the two codes next to each value.

Source: AdaRound (Nagel et al., ICML 2020), section 3.2. Ours: a weight keeps a distance of at most ``REACH`` from the
center of its cell.
"""

import torch
from torch import Tensor

from synq.quant.layers import QuantConv2d, QuantLinear

ZETA, GAMMA = 1.1, -0.1
"""Bounds of the stretched sigmoid, so that 0 and 1 are reached at a finite V."""
REACH = 0.4
"""Largest distance of a weight from the center of its cell, in units of its scale; the edges of the cell are at 0.5."""


class SoftRounding:
    """A weight on its quantization grid with a learnable rounding.

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

    def soft_rounding(self) -> Tensor:
        """Return the rectified sigmoid h(V), shape of the weight, in [0, 1]."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def weight(self) -> Tensor:
        """Return the softly rounded weight w^(V), shape of the weight."""
        return (self.floor + self.soft_rounding()).clamp(self.low, self.high) * self.scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the learned integer codes minus the zero point, in the dtype of the weight."""
        return (self.floor + (self.soft_rounding() >= 0.5)).clamp(self.low, self.high)

    @torch.no_grad()
    def hard_weight(self) -> Tensor:
        """Return the weight, clamped to ``REACH`` scales around its learned codes, which rounding to nearest gives."""
        codes = self.codes()
        return (codes + (self.ratio - codes).clamp(-REACH, REACH)) * self.scale
