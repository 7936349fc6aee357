"""Layers with a weight: convolutions, linear layers, and batch norms that do not follow one."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from synq.engines.aten.builder import Builder, without_batch
from synq.engines.aten.moves import reshaped, transposed
from synq.engines.aten.symbols import Call, Codes, Pending, Symbol, made
from synq.engines.program import Convolution, Dense, Layer
from synq.quant.integer_form import codes_of
from synq.quant.layers import QuantConv2d, QuantLinear


@dataclass(frozen=True)
class LayerWeight:
    """The weight of a quantized layer, as an operand."""

    name: str
    layer: QuantConv2d | QuantLinear


def convolution(builder: Builder, call: Call) -> Symbol:
    """Lower a convolution (N, C, H, W) -> (N, C_out, H', W')."""
    source = builder.codes(call, call.argument("input"))
    if len(source.shape) != 3:
        builder.reject(call, "it reads a tensor that is not (N, C, H, W)")
    weight, name = _weight(builder, call)
    kernel, dilation = weight["weight"].shape[2:], call.numbers("dilation")
    template = Convolution(
        inputs=(source.name,),
        output="",
        layer=name,
        **weight,
        stride=_pair(call.numbers("stride")),
        padding=_padding(call, (kernel[0], kernel[1]), dilation),
        dilation=_pair(dilation),
        groups=int(call.argument("groups")),
    )
    return _with_bias(template, call)


def dense(builder: Builder, call: Call) -> Symbol:
    """Lower a linear layer (N, ..., C) -> (N, ..., C_out)."""
    source = builder.codes(call, call.argument("input"))
    weight, name = _weight(builder, call)
    return _with_bias(Dense(inputs=(source.name,), output="", layer=name, **weight), call)


def batch_norm(builder: Builder, call: Call) -> list[Any]:
    """Lower a batch norm with running statistics: fold it into the layer that it follows, or make it one."""
    symbol = call.argument("input")
    mean, variance = (call.argument(name) for name in ("running_mean", "running_var"))
    weight, bias = call.argument("weight"), call.argument("bias")
    if mean is None or variance is None:
        builder.reject(call, "it normalizes by the statistics of the batch")
    factor = 1.0 / (variance.double() + float(call.argument("eps"))).sqrt()
    factor = factor if weight is None else factor * weight.double()
    offset = -mean.double() * factor
    offset = offset if bias is None else offset + bias.double()
    return [channel_affine(builder, call, symbol, factor, offset, axis=1), None, None]


def channel_affine(
    builder: Builder, call: Call, symbol: Any, factor: Tensor, offset: Tensor, *, axis: int, folds: bool = True
) -> Symbol:
    """Return ``factor[c] x + offset[c]``, c along ``axis``: folded into a layer, or as a depthwise 1 x 1 convolution.

    Args:
        builder: The program.
        call: The operator.
        symbol: Its operand.
        factor, offset: (C,) or one element, float64.
        axis: Axis of the channels; 0 is N.
        folds: Whether the result of a layer may be folded.
    """
    if isinstance(symbol, Pending) and folds and _is_foldable(symbol, axis, factor.numel()):
        assert symbol.factor is not None and symbol.offset is not None
        return replace(symbol, factor=symbol.factor * factor, offset=symbol.offset * factor + offset)
    codes = builder.codes(call, symbol)
    shape = codes.shape
    channels = shape[axis - 1]
    order = (0, axis, *(a for a in range(1, len(shape) + 1) if a != axis))
    ordered = transposed(builder, codes, order)
    rest = ordered.shape[1:]
    flat = ordered if len(shape) == 3 else reshaped(builder, ordered, (channels, _product(rest), 1))
    largest = builder.largest_code
    template = Convolution(
        inputs=(flat.name,),
        output="",
        layer=call.layer,
        weight=torch.full((channels, 1, 1, 1), largest, dtype=torch.int8),
        weight_scale=torch.full((channels,), 1.0 / largest, dtype=torch.float64),
        bias=torch.zeros(channels, dtype=torch.int32),
        weight_bits=largest.bit_length() + 1,
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=channels,
    )
    result = replace(
        made(template, flat.shape),
        factor=factor.double().expand(channels).clone(),
        offset=offset.double().expand(channels).clone(),
    )
    if flat is ordered and ordered is codes:
        return result
    back = tuple(order.index(a) for a in range(len(order)))

    def restored(value: Codes) -> Codes:
        return transposed(builder, reshaped(builder, value, (channels, *rest)), back)

    return replace(result, shape=shape, moves=(restored,))


def affine_by_constant(
    builder: Builder, call: Call, symbol: Any, factor: Tensor, offset: Tensor, shape: tuple[int, ...]
) -> Symbol | None:
    """Return ``factor x + offset`` for constants of one element or that vary along one axis; None for others.

    Args:
        builder: The program.
        call: The operator.
        symbol: Its operand x, of ``shape`` (without N).
        factor, offset: Broadcastable to (N, *shape).
        shape: Of the result.
    """
    rank = len(shape) + 1
    factor, offset = (without_batch(call, builder, t.double(), rank) for t in (factor, offset))
    varying = [a for a in range(rank) if max(factor.shape[a], offset.shape[a]) > 1]
    if len(varying) > 1 or any(max(factor.shape[a], offset.shape[a]) != shape[a - 1] for a in varying):
        return None
    axis = varying[0] if varying else channel_axis(symbol)
    return channel_affine(builder, call, symbol, factor.flatten(), offset.flatten(), axis=axis)


def channel_axis(symbol: Any) -> int:
    """Return the axis of the channels of a layer's result: the last of a linear layer, else the second."""
    if isinstance(symbol, Pending) and isinstance(symbol.template, Dense):
        return len(symbol.shape)
    return 1


def is_layer_result(symbol: Any) -> bool:
    """Return whether factors and offsets can be folded into the layer whose result this is."""
    return isinstance(symbol, Pending) and isinstance(symbol.template, Layer) and not symbol.is_clamped


def folds_into(symbol: Any, factor: Tensor, offset: Tensor) -> bool:
    """Return whether constants that broadcast with the result of a layer can be folded into it.

    Args:
        symbol: The result, or another symbol.
        factor, offset: With all axes of the result, N first, or with none.
    """
    if not is_layer_result(symbol):
        return False
    channels = channel_axis(symbol)
    for constant in (factor, offset):
        others = constant.numel() if constant.ndim == 0 else constant.numel() // constant.shape[channels]
        if others > 1:
            return False
    return not symbol.moves or max(factor.numel(), offset.numel()) == 1


def _is_foldable(symbol: Pending, axis: int, count: int) -> bool:
    if not is_layer_result(symbol):
        return False
    return count == 1 or (not symbol.moves and axis == channel_axis(symbol))


def _weight(builder: Builder, call: Call) -> tuple[dict[str, Any], str]:
    operand = call.argument("weight")
    if not isinstance(operand, LayerWeight):
        builder.reject(call, "its weight is not that of a quantized layer")
    codes = codes_of(operand.layer)
    largest = 2 ** (codes.bits - 1) - 1
    if bool(codes.zero_point.any()) or int(codes.codes.abs().max()) > largest:
        builder.reject(
            call, f"its weight must have symmetric codes within +-{largest}, as quantizers placed for an engine have"
        )
    return {
        "weight": codes.codes,
        "weight_scale": codes.scale,
        "bias": torch.zeros(len(codes.codes), dtype=torch.int32),
        "weight_bits": codes.bits,
    }, operand.name


def _with_bias(template: Convolution | Dense, call: Call) -> Pending:
    bias, count = call.argument("bias"), len(template.weight)
    return replace(
        made(template, call.shape),
        factor=torch.ones(count, dtype=torch.float64),
        offset=torch.zeros(count, dtype=torch.float64) if bias is None else bias.double(),
    )


def _padding(call: Call, kernel: tuple[int, int], dilation: tuple[int, ...]) -> tuple[int, int, int, int]:
    given = call.argument("padding")
    if given == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
        return before[0], before[1], total[0] - before[0], total[1] - before[1]
    top, left = (0, 0) if given == "valid" else call.numbers("padding")
    return top, left, top, left


def _pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def _product(numbers: tuple[int, ...]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
