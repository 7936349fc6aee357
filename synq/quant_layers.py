"""Layers of a quantized student: convolution and linear layers with fake-quantized weights, and activation quantizers.

A layer holds what its integer form needs and nothing else: observing ranges happens outside (``students.py``), so no
forward pass can move a range.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.fake_quant import choose_qparams, fake_quantize, quant_bounds
from synq.observers import minmax_per_channel


class WeightQuantizer(nn.Module):
    """Per-output-channel asymmetric fake quantization of a weight, with ranges taken from the live weight.

    The range of channel c is ``clip_ratio[c] * [min w_c, max w_c]``, recomputed at every call and detached, so that it
    follows the weights through fine-tuning. Codes are signed.

    Args:
        num_channels: Number of output channels C.
        bits: Width, 2..8.

    Source: SynQ section 3 (min-max, per channel); the clip ratio is ours, 1 reproduces min-max.
    """

    clip_ratio: Tensor

    def __init__(self, num_channels: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = quant_bounds(bits, signed=True)
        self.enabled = True
        self.register_buffer("clip_ratio", torch.ones(num_channels))

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale (C,) float32, zero_point (C,) int32) of ``weight`` (C, ...)."""
        low, high = minmax_per_channel(weight.detach())
        ratio = self.clip_ratio.float()  # float32 also in a network cast to float64: the native op takes no other
        return choose_qparams(low.float() * ratio, high.float() * ratio, self.quant_min, self.quant_max)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized ``weight``, same shape; gradients pass straight through inside the range."""
        if not self.enabled:
            return weight
        scale, zero_point = self.qparams(weight)
        return fake_quantize(weight, scale, zero_point, self.quant_min, self.quant_max, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class ActQuantizer(nn.Module):
    """Per-tensor asymmetric fake quantization of an activation with a static range. Codes are unsigned.

    Args:
        bits: Width, 2..8.

    Raises:
        RuntimeError: In forward, when no range was set: an unset range must not pass as a result.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = quant_bounds(bits, signed=False)
        self.enabled = True
        self.has_range = False
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def set_range(self, low: float, high: float) -> None:
        """Freeze the range to [min(low, 0), max(high, 0)].

        Raises:
            ValueError: If an end is not finite.
        """
        bounds = torch.tensor([low, high], dtype=torch.float32)
        if not bool(torch.isfinite(bounds).all()):
            raise ValueError(f"activation range must be finite, but got [{low}, {high}]")
        scale, zero_point = choose_qparams(bounds[0], bounds[1], self.quant_min, self.quant_max)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.has_range = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized ``x``, same shape."""
        if not self.enabled:
            return x
        if not self.has_range:
            raise RuntimeError("activation ranges must be observed before the student runs: call observe_ranges first")
        return fake_quantize(x, self.scale.float(), self.zero_point, self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self.has_range = bool(torch.isfinite(self.scale))


class QuantConv2d(nn.Conv2d):
    """Convolution whose weight is fake-quantized once per forward; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, bits: int) -> "QuantConv2d":
        """Take over the parameters of ``conv`` (shared, not copied)."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.weight_quantizer = WeightQuantizer(conv.out_channels, bits).to(conv.weight.device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Linear layer whose weight is fake-quantized once per forward; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, linear: nn.Linear, bits: int) -> "QuantLinear":
        """Take over the parameters of ``linear`` (shared, not copied)."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer = WeightQuantizer(linear.out_features, bits).to(linear.weight.device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return the weight that ``layer`` multiplies with: fake-quantized where it is quantized. Detached, (C_out, ...)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return layer.weight_quantizer(weight.detach())
    return weight.detach()


@contextmanager
def quantizers_bypassed(network: nn.Module) -> Iterator[None]:
    """Run ``network`` in float inside the ``with`` block: every quantizer is the identity there."""
    quantizers = [m for m in network.modules() if isinstance(m, (WeightQuantizer, ActQuantizer))]
    before = [q.enabled for q in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled
