"""The parts of an integer form (`integer_form.py`): layers that hold codes, activations that become codes."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from synq.quant.fake_quant import SCALE_EPS
from synq.quant.layers import ActQuantizer

Operations = Literal["plain", "onnx", "torch"]
"""What an integer form is written in: arithmetic, to run; or operations that a file's format knows, to be exported. "torch" rounds otherwise."""


@torch.library.custom_op("synq::quantize_per_tensor", mutates_args=())
def quantize_per_tensor(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    """Return the codes of ``x`` as uint8, by a division as in ONNX: PyTorch's own kernels multiply by 1 / scale, which rounds otherwise.

    Args:
        x: Any shape, float.
        scale: Step, > 0.
        zero_point: Code of zero, in [0, quant_max].
        quant_max: Largest code, at most 255.
    """
    return _codes(x, scale, zero_point, quant_max).to(torch.uint8)


@quantize_per_tensor.register_fake
def _(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _codes(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    step = x.new_tensor(scale)  # a plain number would become a factor 1 / scale on a GPU
    return (x / step).round_().add_(zero_point).clamp_(0, quant_max)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """An integer weight: ``scale[c] (codes[c] - zero_point[c])``.

    Attributes:
        codes: (C_out, ...) int8, in [-2^(bits-1), 2^(bits-1) - 1].
        scale: (C_out,) float32, > 0.
        zero_point: (C_out,) int32, in the range of the codes.
        bits: Width, 2..8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


class IntegerWeight(nn.Module):
    """Holds the codes of a weight and gives them without their zero points."""

    codes: Tensor
    zero_point: Tensor
    integers: Tensor
    ones: Tensor

    def __init__(self, codes: Codes, operations: Operations) -> None:
        super().__init__()
        self.bits, (self.quant_min, self.quant_max) = codes.bits, codes.bounds
        self.operations = operations
        self.register_buffer("codes", codes.codes)
        self.register_buffer("zero_point", codes.zero_point)
        if operations == "plain":  # made once, not in every forward pass
            zero_point = codes.zero_point.reshape(-1, *[1] * (codes.codes.ndim - 1))
            self.register_buffer("integers", (codes.codes - zero_point).float(), persistent=False)
        else:
            self.register_buffer("ones", torch.ones_like(codes.scale), persistent=False)

    def forward(self) -> Tensor:
        """Return ``codes - zero_point`` (C_out, ...) in float32: whole numbers."""
        if self.operations == "plain":
            return self.integers
        weight: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.ones, self.zero_point, 0, self.quant_min, self.quant_max, torch.int8
        )
        return weight

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class IntegerActivation(nn.Module):
    """Takes an activation to its codes, without their zero point.

    Args:
        quantizer: An activation quantizer with its range.
        operations: "plain" and "onnx" divide by the scale, "torch" multiplies by its inverse, as PyTorch's own operation does.
    """

    def __init__(self, quantizer: ActQuantizer, operations: Operations) -> None:
        super().__init__()
        self.bits, self.quant_max, self.operations = quantizer.bits, quantizer.quant_max, operations
        self.scale = max(float(quantizer.scale), SCALE_EPS) if quantizer.has_range else 1.0
        self.zero_point = int(quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``codes - zero_point`` of ``x``, same shape, float32: whole numbers."""
        limits = (0, self.quant_max, torch.uint8)
        if self.operations == "plain":
            return _codes(x, self.scale, self.zero_point, self.quant_max).sub_(self.zero_point)
        if self.operations == "onnx":
            codes = torch.ops.synq.quantize_per_tensor(x, self.scale, self.zero_point, self.quant_max)
        else:
            codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, self.scale, self.zero_point, *limits)
        integers: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, 1.0, self.zero_point, *limits)
        return integers

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale:.6g}, zero_point={self.zero_point}"


class ActivationValues(nn.Module):
    """Gives the values behind an activation's codes, to what is no layer: a sum, a pool."""

    def __init__(self, activation: IntegerActivation) -> None:
        super().__init__()
        self.activation = (activation,)  # in a tuple, so as not to be a part of this one

    def forward(self, integers: Tensor) -> Tensor:
        """Return the values, same shape."""
        return integers * self.activation[0].scale


class IntegerLayer(nn.Module):
    """A layer with an integer weight, and a gain and a shift (C_out,) behind it; subclasses say what it does with the weight."""

    gain: Tensor
    shift: Tensor | None

    def __init__(self, codes: Codes, gain: Tensor, shift: Tensor | None, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.fill(codes, gain, shift)

    def fill(self, codes: Codes, gain: Tensor, shift: Tensor | None) -> None:
        """Set the codes of the weight, the gain and the shift."""
        self.integer_weight = IntegerWeight(codes, self.operations)
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in float32."""
        out = self.apply_weight(x, self.integer_weight()) * self.per_channel(self.gain)
        return out if self.shift is None else out + self.per_channel(self.shift)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Do what the layer does, with this weight and no bias."""
        raise NotImplementedError

    def per_channel(self, values: Tensor) -> Tensor:
        """Return values (C_out,) in the shape in which they broadcast over the output."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """Convolution (N, C_in, H, W) -> (N, C_out, H', W') with an integer weight."""

    def __init__(
        self, layer: nn.Conv2d, codes: Codes, gain: Tensor, shift: Tensor | None, operations: Operations
    ) -> None:
        super().__init__(codes, gain, shift, operations)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        self.outer_padding = list(layer._reversed_padding_repeated_twice)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``x`` with ``weight``."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.outer_padding, mode=self.padding_mode), 0
        return F.conv2d(x, weight, None, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def per_channel(self, values: Tensor) -> Tensor:
        """Return (C_out, 1, 1)."""
        return values.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.stride}, {self.padding}, {self.dilation}, {self.groups}, {self.padding_mode}"


class IntegerLinear(IntegerLayer):
    """Linear layer (..., C_in) -> (..., C_out) with an integer weight."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply ``x`` by ``weight``."""
        return F.linear(x, weight)

    def per_channel(self, values: Tensor) -> Tensor:
        """Return (C_out,)."""
        return values


class ChannelAffine(nn.Module):
    """A batch norm that stands behind no layer of its own, ``gain[c] x + shift[c]``.

    Args:
        gain, shift: (C,) float32.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``gain x + shift`` for ``x`` (N, C, ...)."""
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.gain.reshape(shape) + self.shift.reshape(shape)
