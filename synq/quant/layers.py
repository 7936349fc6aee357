"""Layers of a quantized student: convolution and linear layers with fake-quantized weights, and activation quantizers.

Quantizers do not observe: ranges are observed outside (``student.py``), so that no forward pass changes a range. A
learned scale is a parameter with the same name as the buffer of a fixed scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.quant.fake_quant import (
    SCALE_EPS,
    choose_centered_qparams,
    choose_qparams,
    fake_quantize,
    quant_bounds,
    quantize,
)
from synq.quant.lsq import clamp_to_grid, fake_quantize_learned, gradient_factor
from synq.quant.observers import minmax_per_channel, weight_qparams
from synq.quant.power_of_two import power_of_two_range

WeightSteps = Literal["live", "stored", "learned"]
"""Where the scale of a weight comes from: its current range at every call, a buffer, or a parameter."""
ACT_QUANTIZERS = "act_quantizers."
"""Prefix of the module name of an activation quantizer, followed by the name of the activation's node."""
PORTABLE_LIMIT = 64
"""Largest |code| of a weight that kernels which add pairs of products in 16 bits may read."""
SIMD_LANES = 16
"""Largest number of float32 values in a SIMD register (AVX-512; 8 with AVX2)."""


def weight_limit(bits: int, *, portable: bool) -> int:
    """Return the largest |code| of a symmetric weight: 2^(bits-1) - 1, or 64 at 8 bits if ``portable``.

    With codes within +-64 the sum of two products with unsigned 8-bit activations, at most 2 x 255 x 64 = 32,640, fits
    into the 16 bits in which x86 CPUs without VNNI add.

    Args:
        bits: Bit-width, 2..8.
        portable: As in `QuantConfig`; a depthwise layer, whose kernels add in 32 bits everywhere, needs no limit.
    """
    _, largest = quant_bounds(bits, signed=True)
    return min(largest, PORTABLE_LIMIT) if portable else largest


class WeightQuantizer(nn.Module):
    """Per-channel fake quantization of a weight, asymmetric or symmetric. Codes are signed.

    The range of output channel c is ``clip_ratio[c] * [min w_c, max w_c]``. "live": recomputed at every call and
    detached, so that it follows the weights during fine-tuning. "stored": computed once, by ``freeze``. "learned":
    computed once, then the scale is trained (LSQ) while the zero_point is fixed. Before ``freeze`` the latter two are
    the same as "live".

    A symmetric grid has the zero_point 0 and codes within +-``limit``, so that an engine's file may have it, and so
    that a negative factor of a batch norm that is folded into the layer only changes the signs of codes.

    Args:
        num_channels: Number of output channels C.
        bits: Bit-width, 2..8.
        steps: Where the scale comes from.
        limit: Largest |code| of a symmetric grid, see ``weight_limit``; None for an asymmetric one.

    Source: SynQ section 3 (min-max, per channel); the clip ratio is ours, 1 reproduces min-max. Learned: ``lsq.py``.
    """

    clip_ratio: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, num_channels: int, bits: int, steps: WeightSteps = "live", limit: int | None = None) -> None:
        super().__init__()
        self.bits, self.limit = bits, limit
        self.quant_min, self.quant_max = quant_bounds(bits, signed=True) if limit is None else (-limit, limit)
        self.enabled = True
        self.steps = steps
        self.has_range = False
        self.register_buffer("clip_ratio", torch.ones(num_channels))
        if steps != "live":
            _register_scale(self, (num_channels,), learned=steps == "learned")

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Compute and store scale and zero_point of ``weight`` (C, ...); does nothing if ``steps`` is "live"."""
        if self.steps == "live":
            return
        scale, zero_point = self._live_qparams(weight)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.has_range = True

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the detached ``(scale, zero_point)`` of ``weight`` (C, ...): (C,) float32 > 0 and (C,) int32."""
        if self.has_range:
            return self.scale.detach().float().clamp(min=SCALE_EPS), self.zero_point
        return self._live_qparams(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of ``weight`` (C, ...), same shape, int32."""
        return quantize(weight, *self.qparams(weight), self.quant_min, self.quant_max, axis=0)

    def _live_qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = minmax_per_channel(weight.detach())
        ratio = self.clip_ratio.float()  # also in float64 networks: the fused op accepts float32 only
        bounds = (self.quant_min, self.quant_max)
        return weight_qparams(low.float() * ratio, high.float() * ratio, *bounds, symmetric=self.limit is not None)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized ``weight``, same shape, with the straight-through gradient of ``fake_quantize``."""
        if not self.enabled:
            return weight
        if self.has_range and self.steps == "learned":
            factor = gradient_factor(weight[0].numel(), self.quant_max)
            bounds = (self.quant_min, self.quant_max)
            return fake_quantize_learned(weight, self.scale.float(), self.zero_point, *bounds, 0, factor)
        scale, zero_point = self.qparams(weight)
        return fake_quantize(weight, scale, zero_point, self.quant_min, self.quant_max, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, steps={self.steps}" + ("" if self.limit is None else f", limit={self.limit}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self.has_range = self.steps != "live" and bool(torch.isfinite(self.scale).all())


class ActQuantizer(nn.Module):
    """Per-tensor fake quantization of an activation with a static range, asymmetric or symmetric. Codes are unsigned.

    Args:
        bits: Bit-width, 2..8.
        learned: Whether the scale is a parameter (LSQ); the zero_point keeps its observed value.
        rounded: False only clamps to the values of the smallest and largest code, as an engine does that fuses a layer
            into the sum that reads it.
        headroom: Factor by which the range exceeds the observed one, >= 1.
        symmetric: Whether the zero_point is 2^(bits-1), so that codes minus it are signed with zero point 0.
        power_of_two: Whether the scale is a power of two; not with ``symmetric`` or ``learned``.

    Raises:
        RuntimeError: In forward, if no range has been set.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        learned: bool = False,
        rounded: bool = True,
        headroom: float = 1.0,
        symmetric: bool = False,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.rounded, self.headroom, self.symmetric = bits, rounded, headroom, symmetric
        self.power_of_two = power_of_two
        self.quant_min, self.quant_max = quant_bounds(bits, signed=False)
        self.enabled = True
        self.learned = learned
        self.has_range = False
        _register_scale(self, (), learned)

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set scale and zero_point for the range [min(low, 0), max(high, 0)], or one of its kind that includes it.

        Raises:
            ValueError: If a bound is not finite.
        """
        bounds = torch.tensor([low, high], dtype=torch.float32)
        if not bool(torch.isfinite(bounds).all()):
            raise ValueError(f"activation range must be finite, but got [{low}, {high}]")
        if self.power_of_two:
            bounds = torch.tensor(power_of_two_range(low, high, self.quant_max))
        choose = choose_centered_qparams if self.symmetric else choose_qparams
        scale, zero_point = choose(bounds[0], bounds[1], self.quant_min, self.quant_max)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.has_range = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized ``x``, same shape."""
        if not self.enabled:
            return x
        if not self.has_range:
            raise RuntimeError("activation ranges must be observed before the student runs: call observe_ranges first")
        return self.learned_forward(x) if self.learned else self._quantized(x)

    def _quantized(self, x: Tensor) -> Tensor:
        if not self.rounded:
            return clamp_to_grid(x, self.scale.float(), self.zero_point, self.quant_min, self.quant_max)
        return fake_quantize(x, self.scale.float(), self.zero_point, self.quant_min, self.quant_max)

    def learned_forward(self, x: Tensor, rectified: bool = False) -> Tensor:
        """Return the fake-quantized ``x``, or its ReLU if ``rectified``, with a gradient for the scale too (LSQ)."""
        return self.with_scale(x, self.scale, gradient_factor(x[:1].numel(), self.quant_max), rectified)

    def with_scale(self, x: Tensor, scale: Tensor, grad_factor: float = 1.0, rectified: bool = False) -> Tensor:
        """Return ``x`` fake-quantized with another scale, which has a gradient (LSQ).

        Args:
            x: Floating point, any shape.
            scale: One element > 0.
            grad_factor: Factor of the gradient of ``scale``.
            rectified: Whether to apply ReLU to ``x`` first; the zero_point must be 0.

        Returns:
            Tensor with the shape and dtype of ``x``.
        """
        bounds = (self.quant_min, self.quant_max)
        if self.rounded:
            return fake_quantize_learned(x, scale.float(), self.zero_point, *bounds, None, grad_factor, rectified)
        return clamp_to_grid(x.relu() if rectified else x, scale.float(), self.zero_point, *bounds, grad_factor)

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits}"
            + (", learned" if self.learned else "")
            + ("" if self.rounded else ", not rounded")
            + (", symmetric" if self.symmetric else "")
            + (", power of two" if self.power_of_two else "")
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self.has_range = bool(torch.isfinite(self.scale))


def _register_scale(module: nn.Module, shape: tuple[int, ...], learned: bool) -> None:
    """Register a scale of NaN (not observed yet), as a buffer or a parameter, and a zero_point of 0."""
    scale = torch.full(shape, float("nan"))
    if learned:
        module.register_parameter("scale", nn.Parameter(scale))
    else:
        module.register_buffer("scale", scale)
    module.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))


class QuantConv2d(nn.Conv2d):
    """Convolution whose weight is fake-quantized in every forward pass; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, bits: int, steps: WeightSteps = "live", limit: int | None = None
    ) -> "QuantConv2d":
        """Return a quantized layer with the parameters of ``conv`` (shared, not copied)."""
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
        layer.weight_quantizer = WeightQuantizer(conv.out_channels, bits, steps, limit).to(conv.weight.device)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W'); the argument has the name that it has in PyTorch's layer."""
        return self.convolve(input, self.weight_quantizer(self.weight))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``x`` (N, C_in, H, W) with ``weight``, which replaces the layer's weight and has its shape.

        A strided 1 x 1 kernel reads only every stride-th pixel. On a CPU, with few input channels and a gradient for
        ``weight``, these pixels are selected beforehand: in the backward pass, oneDNN's kernel for this case (`jit_1x1`
        on NHWC, up to 3.12 at least) writes past its workspace if C_in is below the number of SIMD lanes, which
        results in a crash, an endless loop or a wrong gradient.

        Source: oneDNN issue 6035; RepVGG applies such a layer to its images.
        """
        if (
            self._is_narrow_strided_pointwise()
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and weight.requires_grad
        ):
            stride_h, stride_w = self.stride
            return F.conv2d(x[:, :, ::stride_h, ::stride_w], weight, self.bias)
        return self._conv_forward(x, weight, self.bias)

    def _is_narrow_strided_pointwise(self) -> bool:
        pointwise = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid") and self.groups == 1
        return pointwise and self.stride != (1, 1) and self.in_channels < SIMD_LANES


class QuantLinear(nn.Linear):
    """Linear layer whose weight is fake-quantized in every forward pass; the bias stays float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(
        cls, linear: nn.Linear, bits: int, steps: WeightSteps = "live", limit: int | None = None
    ) -> "QuantLinear":
        """Return a quantized layer with the parameters of ``linear`` (shared, not copied)."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer = WeightQuantizer(linear.out_features, bits, steps, limit).to(linear.weight.device)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features); the argument has the name that it has in PyTorch's layer."""
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return the weight of ``layer``, fake-quantized if the layer is quantized; detached, (C_out, ...)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return layer.weight_quantizer(weight.detach()).detach()  # its scale may be a parameter
    return weight.detach()


@contextmanager
def quantizers_bypassed(network: nn.Module) -> Iterator[None]:
    """Disable all quantizers of ``network`` inside the ``with`` block, so that it runs in float."""
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
    """Return the learned scales of ``network``, without duplicates, in the order of its modules."""
    quantizers = [m for m in network.modules() if isinstance(m, (WeightQuantizer, ActQuantizer))]
    scales = (q._parameters.get("scale") for q in quantizers)
    return [scale for scale in scales if scale is not None]
