"""Layers of a quantized student: convolution and linear layers with fake-quantized weights, and activation quantizers.

A layer holds what its integer form needs and nothing else: observing ranges happens outside (``students.py``), so no
forward pass can move a range. Where steps are learned, the scale is a parameter under the very name that it has as a buffer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.quant.fake_quant import SCALE_EPS, choose_qparams, fake_quantize, quant_bounds, quantize
from synq.quant.lsq import fake_quantize_learned, gradient_factor
from synq.quant.observers import minmax_per_channel

WeightSteps = Literal["live", "stored", "learned"]
"""Where the scale of a weight comes from: its own range at every call, a buffer, or a parameter."""
ACT_QUANTIZERS = "act_quantizers."
"""What stands before the name of an activation in the name of its quantizer."""
VECTOR_WIDTH = 16
"""Most float32 values that an instruction of a CPU takes (AVX-512; 8 with AVX2)."""


class WeightQuantizer(nn.Module):
    """Per-output-channel asymmetric fake quantization of a weight. Codes are signed.

    The range of channel c is ``clip_ratio[c] * [min w_c, max w_c]``. "live": recomputed at every call and detached, so that it
    follows the weights through fine-tuning. "stored": taken once, by ``freeze``, and kept. "learned": taken once, then the scale
    is trained (LSQ); the zero point stays. Before ``freeze`` the latter two compute what "live" computes.

    Args:
        num_channels: Number of output channels C.
        bits: Width, 2..8.
        steps: Where the scale comes from.

    Source: SynQ section 3 (min-max, per channel); the clip ratio is ours, 1 reproduces min-max. Learned: ``learned_steps.py``.
    """

    clip_ratio: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, num_channels: int, bits: int, steps: WeightSteps = "live") -> None:
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = quant_bounds(bits, signed=True)
        self.enabled = True
        self.steps = steps
        self.has_range = False
        self.register_buffer("clip_ratio", torch.ones(num_channels))
        if steps != "live":
            _register_scale(self, (num_channels,), learned=steps == "learned")

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Store scale and zero point of the range of ``weight`` (C, ...), where they are to be stored."""
        if self.steps == "live":
            return
        scale, zero_point = self._live_qparams(weight)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.has_range = True

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale (C,) float32 > 0, zero_point (C,) int32), detached, that ``weight`` (C, ...) is rounded with."""
        if self.has_range:
            return self.scale.detach().float().clamp(min=SCALE_EPS), self.zero_point
        return self._live_qparams(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Return the integers that ``weight`` (C, ...) is rounded to, same shape, int32."""
        return quantize(weight, *self.qparams(weight), self.quant_min, self.quant_max, axis=0)

    def _live_qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = minmax_per_channel(weight.detach())
        ratio = self.clip_ratio.float()  # float32 also in a network cast to float64: the native op takes no other
        return choose_qparams(low.float() * ratio, high.float() * ratio, self.quant_min, self.quant_max)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized ``weight``, same shape; gradients pass straight through inside the range."""
        if not self.enabled:
            return weight
        if self.has_range and self.steps == "learned":
            factor = gradient_factor(weight[0].numel(), self.quant_max)
            bounds = (self.quant_min, self.quant_max)
            return fake_quantize_learned(weight, self.scale.float(), self.zero_point, *bounds, 0, factor)
        scale, zero_point = self.qparams(weight)
        return fake_quantize(weight, scale, zero_point, self.quant_min, self.quant_max, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, steps={self.steps}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self.has_range = self.steps != "live" and bool(torch.isfinite(self.scale).all())


class ActQuantizer(nn.Module):
    """Per-tensor asymmetric fake quantization of an activation with a static range. Codes are unsigned.

    Args:
        bits: Width, 2..8.
        learned: Whether the scale is a parameter (LSQ); the zero point stays as observed.

    Raises:
        RuntimeError: In forward, when no range was set: an unset range must not pass as a result.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, learned: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = quant_bounds(bits, signed=False)
        self.enabled = True
        self.learned = learned
        self.has_range = False
        _register_scale(self, (), learned)

    @torch.no_grad()
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
        if self.learned:
            return self.learned_forward(x)
        return fake_quantize(x, self.scale.float(), self.zero_point, self.quant_min, self.quant_max)

    def learned_forward(self, x: Tensor, rectified: bool = False) -> Tensor:
        """Return the fake-quantized ``x``, or its ReLU's, with a gradient for the scale too."""
        factor = gradient_factor(x[:1].numel(), self.quant_max)
        bounds = (self.quant_min, self.quant_max)
        return fake_quantize_learned(x, self.scale.float(), self.zero_point, *bounds, None, factor, rectified)

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (", learned" if self.learned else "")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self.has_range = bool(torch.isfinite(self.scale))


def _register_scale(module: nn.Module, shape: tuple[int, ...], learned: bool) -> None:
    """Give ``module`` a scale that is not known yet, as a buffer or a parameter, and a zero point."""
    scale = torch.full(shape, float("nan"))
    if learned:
        module.register_parameter("scale", nn.Parameter(scale))
    else:
        module.register_buffer("scale", scale)
    module.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))


class QuantConv2d(nn.Conv2d):
    """Convolution whose weight is fake-quantized once per forward; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, bits: int, steps: WeightSteps = "live") -> "QuantConv2d":
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
        layer.weight_quantizer = WeightQuantizer(conv.out_channels, bits, steps).to(conv.weight.device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return self.convolve(x, self.weight_quantizer(self.weight))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``x`` (N, C_in, H, W) with ``weight`` in place of the layer's own, shaped as that.

        A 1 x 1 kernel with a stride reads every stride-th pixel alone. Where a gradient of ``weight`` will be asked for on a CPU and there are
        few channels, those pixels are taken out before: oneDNN's own way of doing so (`jit_1x1` on NHWC, up to 3.12 at least) writes past its
        workspace if C_in is below a vector's width, in the backward pass; what follows is a crash, an endless loop or a wrong gradient.

        Source: oneDNN issue 6035; RepVGG has such a layer on its images.
        """
        if (
            self._is_thin_strided_point()
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and weight.requires_grad
        ):
            down, right = self.stride
            return F.conv2d(x[:, :, ::down, ::right], weight, self.bias)
        return self._conv_forward(x, weight, self.bias)

    def _is_thin_strided_point(self) -> bool:
        point = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid") and self.groups == 1
        return point and self.stride != (1, 1) and self.in_channels < VECTOR_WIDTH


class QuantLinear(nn.Linear):
    """Linear layer whose weight is fake-quantized once per forward; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, linear: nn.Linear, bits: int, steps: WeightSteps = "live") -> "QuantLinear":
        """Take over the parameters of ``linear`` (shared, not copied)."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer = WeightQuantizer(linear.out_features, bits, steps).to(linear.weight.device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return the weight that ``layer`` multiplies with: fake-quantized where it is quantized. Detached, (C_out, ...)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return layer.weight_quantizer(weight.detach()).detach()  # its scale may be a parameter
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


def step_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales of ``network``, each once, in the order of its modules."""
    quantizers = [m for m in network.modules() if isinstance(m, (WeightQuantizer, ActQuantizer))]
    scales = (q._parameters.get("scale") for q in quantizers)
    return [scale for scale in scales if scale is not None]
