"""Exact integer sums of convolutions and linear layers, in float arithmetic that PyTorch has fast kernels for.

    sums = sum over the receptive field of (x - zero_point) * weight

A float32 number holds every whole number up to 2^24. Where the sum of all absolute products cannot exceed it, every
partial sum is exact in float32, in whatever order a kernel adds. A layer beyond that is split into parts of its input
channels that fit, whose sums are added in float64; a single channel that does not fit is summed in float64 as a whole.

On a GPU all sums are float64 (exact up to 2^53): its float32 convolutions may use TF32, Winograd's or Fourier
transforms, which round.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.engines.program import Convolution, Dense, Grid, Layer

FLOAT32_WHOLE = 2**24
"""Largest number up to which float32 holds every whole number."""
ACCUMULATOR_MAX = 2**31 - 1
"""Largest sum of an engine, which accumulates in int32."""


def largest_sum(step: Layer, grid: Grid) -> int:
    """Return a bound of the absolute sum, with the bias, that a layer can reach for codes of its input's grid."""
    distance = max(grid.zero_point, grid.quant_max - grid.zero_point)
    products = step.weight.long().abs().flatten(1).sum(1) * distance
    return int((products + step.bias.long().abs()).max())


class ExactSums(nn.Module):
    """Exact sums of one layer, without its bias.

    Args:
        step: The layer.
        grid: Grid of its input.

    Raises:
        ValueError: If a sum with its bias could exceed the int32 accumulator of an engine.
    """

    weight: Tensor

    def __init__(self, step: Layer, grid: Grid) -> None:
        super().__init__()
        bound = largest_sum(step, grid)
        if bound > ACCUMULATOR_MAX:
            raise ValueError(
                f"the sums of a layer must stay within int32, but `{step.layer or step.output}` can reach {bound}: "
                "use larger scales for its weight or input, so that its bias has a smaller code"
            )
        self.step, self.zero_point = step, grid.zero_point
        self.parts = _parts(step.weight, max(grid.zero_point, grid.quant_max - grid.zero_point))
        self.register_buffer("weight", step.weight.to(torch.int8), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the sums of codes as float64.

        Args:
            codes: (N, C, H, W) or (..., C_in) whole numbers in float32.
        """
        x = codes - self.zero_point
        if x.device.type != "cpu" or not self.parts:
            return self._products(x.double(), self.weight.double())
        weight = self.weight.float()
        if len(self.parts) == 1:
            return self._products(x, weight).double()
        sums = [self._part(x, weight, start, stop).double() for start, stop in self.parts]
        return torch.stack(sums).sum(0)

    def _part(self, x: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        """Return the sums over the input channels start..stop of every group."""
        if isinstance(self.step, Dense):
            return self._products(x[..., start:stop], weight[:, start:stop])
        assert isinstance(self.step, Convolution)
        grouped = x.unflatten(1, (self.step.groups, -1))[:, :, start:stop]
        return self._products(grouped.flatten(1, 2), weight[:, start:stop])

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        step = self.step
        if isinstance(step, Dense):
            return F.linear(x, weight)
        assert isinstance(step, Convolution)
        top, left, bottom, right = step.padding
        if (top, left) == (bottom, right):
            padding = (top, left)
        else:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        with torch.backends.nnpack.flags(enabled=False):  # its transforms round
            return F.conv2d(x, weight, None, step.stride, padding, step.dilation, step.groups)


def _parts(weight: Tensor, distance: int) -> list[tuple[int, int]]:
    """Return ranges of input channels whose sums are exact in float32, [] if a single channel's are not.

    Args:
        weight: (C_out, C_in, ...) int8.
        distance: Largest ``|x - zero_point|``.
    """
    sums = weight.long().abs().flatten(2).sum(2) if weight.ndim > 2 else weight.long().abs()
    channels = (sums * distance).T  # (C_in, C_out)
    parts, start = [], 0
    total = torch.zeros_like(channels[0])
    for channel, products in enumerate(channels):
        if int(products.max()) > FLOAT32_WHOLE:
            return []
        if int((total + products).max()) > FLOAT32_WHOLE:
            parts.append((start, channel))
            start, total = channel, torch.zeros_like(total)
        total = total + products
    return [*parts, (start, len(channels))]
