"""Modules of an integer form (`integer_form.py`): layers with integer weights, and quantization of activations."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from synq.quant.fake_quant import SCALE_EPS
from synq.quant.layers import ActQuantizer

Operations = Literal["plain", "onnx", "torch"]
"""Operations of an integer form: plain arithmetic, to run it; or the quantization ops of an export format.

"torch" multiplies by 1 / scale where the others divide by the scale, which rounds differently at some ties.
"""


@torch.library.custom_op("synq::quantize_per_tensor", mutates_args=())
def quantize_per_tensor(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    """Quantize ``x`` to uint8 codes, dividing by ``scale`` like ONNX QuantizeLinear.

    PyTorch's kernels multiply by 1 / scale, which rounds differently at some ties.

    Args:
        x: Any shape, float.
        scale: > 0.
        zero_point: Code of zero, in [0, quant_max].
        quant_max: Largest code, at most 255.

    Returns:
        uint8, shape of ``x``.
    """
    return _codes(x, scale, zero_point, quant_max).to(torch.uint8)


@quantize_per_tensor.register_fake
def _(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _codes(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    step = x.new_tensor(scale)  # on a GPU, division by a Python number becomes multiplication by 1 / scale
    return (x / step).round_().add_(zero_point).clamp_(0, quant_max)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Integer codes of a per-channel quantized weight: ``scale[c] (codes[c] - zero_point[c])``.

    Attributes:
        codes: (C_out, ...) int8, in [-2^(bits-1), 2^(bits-1) - 1].
        scale: (C_out,) float32, > 0.
        zero_point: (C_out,) int32, in the range of the codes.
        bits: Bit-width, 2..8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def bounds(self) -> tuple[int, int]:
        """Return ``(quant_min, quant_max)`` of the codes."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


class IntegerWeight(nn.Module):
    """Store the integer codes of a weight, and return them minus their zero points."""

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
        if operations == "plain":  # computed once, not in every forward pass
            zero_point = codes.zero_point.reshape(-1, *[1] * (codes.codes.ndim - 1))
            self.register_buffer("integers", (codes.codes - zero_point).float(), persistent=False)
        else:
            self.register_buffer("ones", torch.ones_like(codes.scale), persistent=False)

    def forward(self) -> Tensor:
        """Return ``codes - zero_point`` (C_out, ...), integer values in float32."""
        if self.operations == "plain":
            return self.integers
        weight: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.ones, self.zero_point, 0, self.quant_min, self.quant_max, torch.int8
        )
        return weight

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class IntegerActivation(nn.Module):
    """Quantize an activation to integer codes minus their zero_point.

    Args:
        quantizer: An activation quantizer with an observed range.
        operations: "plain" and "onnx" divide by the scale, "torch" multiplies by its inverse, as PyTorch's op does.
    """

    def __init__(self, quantizer: ActQuantizer, operations: Operations) -> None:
        super().__init__()
        self.bits, self.quant_max, self.operations = quantizer.bits, quantizer.quant_max, operations
        self.scale = max(float(quantizer.scale), SCALE_EPS) if quantizer.has_range else 1.0
        self.zero_point = int(quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``codes - zero_point`` of ``x``, same shape, integer values in float32."""
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


class DequantizedActivation(nn.Module):
    """Dequantize an activation for operations without a gain, such as a sum or pooling."""

    def __init__(self, activation: IntegerActivation) -> None:
        super().__init__()
        self.activation = (activation,)  # a tuple, because an attribute would be registered as a submodule

    def forward(self, integers: Tensor) -> Tensor:
        """Return ``scale * integers``, same shape."""
        return integers * self.activation[0].scale


class IntegerLayer(nn.Module):
    """Layer with an integer weight, followed by a gain and a shift (C_out,); subclasses define the linear operation."""

    gain: Tensor
    shift: Tensor | None

    def __init__(self, codes: Codes, gain: Tensor, shift: Tensor | None, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.fill(codes, gain, shift)

    def fill(self, codes: Codes, gain: Tensor, shift: Tensor | None) -> None:
        """Set the integer codes of the weight, the gain (C_out,) and the shift (C_out,) or None."""
        self.integer_weight = IntegerWeight(codes, self.operations)
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in float32; the argument has the name that it has in PyTorch's layers."""
        out = self.apply_weight(input, self.integer_weight()) * self.per_channel(self.gain)
        return out if self.shift is None else out + self.per_channel(self.shift)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the linear operation of the layer with ``weight`` and without a bias."""
        raise NotImplementedError

    def per_channel(self, values: Tensor) -> Tensor:
        """Reshape values (C_out,) to broadcast over the output."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """Convolution with an integer weight: (N, C_in, H, W) -> (N, C_out, H', W')."""

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
        if self.padding_mode == "circular":
            x, padding = _circular_pad(x, *self.outer_padding), 0
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self.outer_padding, mode=self.padding_mode), 0
        return F.conv2d(x, weight, None, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def per_channel(self, values: Tensor) -> Tensor:
        """Reshape values to (C_out, 1, 1)."""
        return values.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.stride}, {self.padding}, {self.dilation}, {self.groups}, {self.padding_mode}"


def _circular_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Pad ``x`` (N, C, H, W) with its opposite edges; as slices, because few engines have ONNX's Pad of mode wrap."""
    height, width = x.shape[2:]
    x = torch.cat([x[..., width - left :], x, x[..., :right]], 3)
    return torch.cat([x[:, :, height - top :], x, x[:, :, :bottom]], 2)


class IntegerLinear(IntegerLayer):
    """Linear layer with an integer weight: (..., C_in) -> (..., C_out)."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply ``x`` by ``weight``."""
        return F.linear(x, weight)

    def per_channel(self, values: Tensor) -> Tensor:
        """Return values, (C_out,)."""
        return values


class ChannelAffine(nn.Module):
    """Batch norm that is not folded into a layer, ``gain[c] x + shift[c]``.

    Args:
        gain, shift: (C,) float32.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``gain x + shift`` for ``input`` x (N, C, ...); the argument has the name that it has in PyTorch's."""
        shape = (-1, *[1] * (input.ndim - 2))
        return input * self.gain.reshape(shape) + self.shift.reshape(shape)
