"""The student as an engine runs it: integer weights with their scales, activations that pass through integers.

The student of the fine-tuning keeps float weights and rounds them in every forward pass. Its integer form is another network with the
same logits, to float rounding: its layers hold the codes, and its quantizers are two operations that every exchange format has,

    quantize     code = clamp(round(x / s) + z, quant_min, quant_max)
    dequantize   x^ = s (code - z)

written as ``quantized_decomposed`` operations of PyTorch, so that ``torch.export`` and ``torch.onnx`` know them.

A batch norm is a gain and a shift of each channel behind its layer. Folded into the layer's scale it would cost nothing, but a scale that is rounded
anew moves a whole channel by the same last digit, and where few codes are many products lie on an edge between two: of 512 images the logits
of a W3A3 ResNet-20 moved by more than 0.001 on 18, on none with the gain apart. So the integer form is the student to the last bit.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.fake_quant import SCALE_EPS
from synq.quant_layers import ActQuantizer, QuantConv2d, QuantLinear
from synq.tracing import node_module

BiasPlace = Literal["layer", "apart"]
"""Who adds a bias: the layer, or an operation behind it. Engines round the bias of a layer to the grid of its products."""


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


@torch.no_grad()
def codes_of(layer: QuantConv2d | QuantLinear) -> Codes:
    """Return the integer weight of a student's layer, on the CPU."""
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.qparams(layer.weight)
    return Codes(
        codes=quantizer.codes(layer.weight).to("cpu", torch.int8),
        scale=scale.to("cpu", torch.float32).clone(),
        zero_point=zero_point.to("cpu", torch.int32).clone(),
        bits=quantizer.bits,
    )


class IntegerWeight(nn.Module):
    """Holds an integer weight and gives its values."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits, (self.quant_min, self.quant_max) = codes.bits, codes.bounds
        for name in ("codes", "scale", "zero_point"):
            self.register_buffer(name, getattr(codes, name).contiguous())

    def forward(self) -> Tensor:
        """Return the weight (C_out, ...) in float32."""
        weight: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, 0, self.quant_min, self.quant_max, torch.int8
        )
        return weight

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class IntegerActivation(nn.Module):
    """Takes an activation through unsigned codes and back.

    Args:
        quantizer: An activation quantizer with its range.
    """

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self.bits, self.quant_max = quantizer.bits, quantizer.quant_max
        self.scale = max(float(quantizer.scale), SCALE_EPS) if quantizer.has_range else 1.0
        self.zero_point = int(quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on its grid, same shape, float32."""
        grid = (self.scale, self.zero_point, 0, self.quant_max, torch.uint8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid)
        values: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *grid)
        return values

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale:.6g}, zero_point={self.zero_point}"


class IntegerLayer(nn.Module):
    """A layer with an integer weight; subclasses say what it does with it."""

    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, bias_place: BiasPlace) -> None:
        super().__init__()
        self.bias_place = bias_place
        self.fill(codes, bias)

    def fill(self, codes: Codes, bias: Tensor | None) -> None:
        """Set the weight and the bias (C_out,), both held as they are."""
        self.integer_weight = IntegerWeight(codes)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in float32; the arithmetic is that of integers times two scales."""
        if self.bias is None or self.bias_place == "layer":
            return self.apply_weight(x, self.integer_weight(), self.bias)
        return self.apply_weight(x, self.integer_weight(), None) + self.bias.reshape(self.bias_shape())

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Do what the layer does, with this weight and bias."""
        raise NotImplementedError

    def bias_shape(self) -> tuple[int, ...]:
        """Return the shape in which the bias broadcasts over the output."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """Convolution (N, C_in, H, W) -> (N, C_out, H', W') with an integer weight."""

    def __init__(self, layer: nn.Conv2d, codes: Codes, bias: Tensor | None, bias_place: BiasPlace) -> None:
        super().__init__(codes, bias, bias_place)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        self.outer_padding = list(layer._reversed_padding_repeated_twice)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve ``x`` with ``weight``."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.outer_padding, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.stride}, {self.padding}, {self.dilation}, {self.groups}, {self.padding_mode}"

    def bias_shape(self) -> tuple[int, ...]:
        """Return (C_out, 1, 1)."""
        return (-1, 1, 1)


class IntegerLinear(IntegerLayer):
    """Linear layer (..., C_in) -> (..., C_out) with an integer weight."""

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply ``x`` by ``weight``."""
        return F.linear(x, weight, bias)

    def bias_shape(self) -> tuple[int, ...]:
        """Return (C_out,)."""
        return (-1,)


class ChannelAffine(nn.Module):
    """A batch norm in evaluation mode as what it computes, ``gain[c] x + shift[c]``, with two numbers a channel instead of four.

    Args:
        norm: A batch norm with running statistics; what it has below it stays below.

    Attributes:
        gain: (C,) float32.
        shift: (C,) float32.
    """

    gain: Tensor
    shift: Tensor
    zeros: Tensor
    ones: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        zeros, ones = torch.zeros_like(norm.running_var), torch.ones_like(norm.running_var)
        # By the norm's own kernel: its answers to one and to zero are the two numbers to the last bit, however it multiplies and adds.
        gain = F.batch_norm(ones[None, :, None], zeros, norm.running_var, norm.weight, zeros, eps=norm.eps)
        shift = F.batch_norm(
            zeros[None, :, None], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        self.register_buffer("gain", gain.flatten())
        self.register_buffer("shift", shift.flatten())
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("ones", ones, persistent=False)
        for name, child in norm.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``gain x + shift`` for ``x`` (N, C, ...), by the kernel of the batch norm, in one pass."""
        return F.batch_norm(x, self.zeros, self.ones, self.gain, self.shift, training=False, eps=0.0)


@torch.no_grad()
def integer_form(net: fx.GraphModule, *, bias_place: BiasPlace = "layer", empty: bool = False) -> fx.GraphModule:
    """Return the integer form of a student's network; the student is not touched.

    Args:
        net: The network of a ``Student``, its ranges observed.
        bias_place: Who adds the biases; by the layers, as in the student, its logits are the student's on this machine to the last bit.
        empty: Whether ranges may be missing: what comes back is to be filled.

    Returns:
        (N, C, H, W) -> logits (N, K), float32, on the CPU, in evaluation mode, without gradients. Every node keeps its name.

    Raises:
        RuntimeError: If an activation has no range yet.
    """
    form = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    for node in list(form.graph.nodes):
        module = node_module(form, node)
        if isinstance(module, ActQuantizer):
            if not module.has_range and not empty:
                raise RuntimeError("activation ranges must be observed before the student becomes integers")
            form.set_submodule(str(node.target), IntegerActivation(module))
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            form.set_submodule(str(node.target), ChannelAffine(module))
        elif isinstance(module, QuantConv2d | QuantLinear):
            codes, bias = codes_of(module), None if module.bias is None else module.bias.detach().float().clone()
            layer: nn.Module
            if isinstance(module, QuantConv2d):
                layer = IntegerConv2d(module, codes, bias, bias_place)
            else:
                layer = IntegerLinear(codes, bias, bias_place)
            form.set_submodule(str(node.target), layer)
    form.delete_all_unused_submodules()
    form.graph.lint()
    form.recompile()
    return form.eval()
