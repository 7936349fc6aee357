"""Integer weights and biases of a layer with what follows it: a bias, a batch norm, factors and offsets per channel."""

from typing import Any

import torch
from torch import Tensor

from synq.engines.program import Grid, Layer

LARGEST_SUM = 2**31 - 1
LARGEST_BIAS = 2**30
"""A channel whose bias has a larger code, because its weights are nearly zero, gets a larger weight scale."""
SMALLEST_GAIN = 2.0**-30
"""Smallest factor from a layer's sum to its output codes: XNNPACK accepts no factor below 2^-32."""


def folded(layer: Layer, factor: Tensor, offset: Tensor, source: Grid, output: Grid | None) -> dict[str, Any]:
    """Return the ``weight``, ``weight_scale`` and ``bias`` of a layer whose result is multiplied and shifted.

        y_c = f_c s_x s_c sum (x - z_x) q_c + b_c  =  s_x s'_c (sum (x - z_x) q'_c + bias_c)

    with s'_c = |f_c| s_c, rounded once, q'_c = sign(f_c) q_c and bias_c = rint(b_c / fl(s_x s'_c)), where fl() is the
    float32 product that engines compute. If the bias of a channel would not fit into 32 bits, because its weights are
    (nearly) zero, s'_c is larger and the codes are rounded again, which changes the output by less than it resolves.

    Args:
        layer: Its ``weight`` and ``weight_scale`` are q and s; s may be float64.
        factor: f, (C_out,) float64.
        offset: b, (C_out,) float64.
        source: Grid of the layer's input.
        output: Grid of its output; None if it stays in floats.

    Raises:
        ValueError: If a sum of products can exceed 32 bits.
    """
    codes = layer.weight.double() * _channels(factor.sign(), layer.weight)
    scale = layer.weight_scale.double() * factor.abs()
    largest_sum = source.quant_max * layer.weight.flatten(1).double().abs().sum(1)
    room = (LARGEST_SUM - largest_sum).clamp(max=LARGEST_BIAS)
    if bool((room <= 0).any()):
        raise ValueError(
            f"layer {layer.layer!r} must add up to less than 2^31, so that 32 bits hold its sum, but its sum can reach "
            f"{int(largest_sum.max())}: choose fewer `quant.weight_bits`, or set `quant.target` to research"
        )
    smallest = offset.abs() / (source.scale * room)
    gain = SMALLEST_GAIN * (1.0 if output is None else output.scale / source.scale)
    smallest = (smallest * (1 + 2.0**-20)).clamp(min=gain)
    raised = torch.maximum(scale, smallest)
    codes = torch.where(_channels(scale < smallest, codes), (codes * _channels(scale / raised, codes)).round(), codes)
    scale = raised.float()
    product = (torch.tensor(source.scale, dtype=torch.float32) * scale).double()
    bias = (offset / product).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale, "bias": bias.to(torch.int32)}


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
