"""Sums, products and concatenations of activations, and arithmetic with constants."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from synq.engines.aten.builder import Builder, without_batch
from synq.engines.aten.floats import combined, in_floats, joined, with_constants
from synq.engines.aten.layers import affine_by_constant, folds_into, is_layer_result
from synq.engines.aten.moves import broadcast, padded, reshaped, sliced
from synq.engines.aten.symbols import Call, Codes, Pending, Symbol, made
from synq.engines.float_program import FloatProduct, FloatSum
from synq.engines.program import Concatenation, Elementwise, Grid, Product, Sum

_ZERO = torch.zeros((), dtype=torch.float64)


def add(builder: Builder, call: Call) -> Any:
    """Lower a sum or difference, of two activations or of one and a constant."""
    first, second = call.argument("self"), call.argument("other")
    alpha = float(call.argument("alpha") if call.argument("alpha") is not None else 1.0)
    if call.name == "rsub":
        first, second = second, first
    signs = (1.0, alpha if call.name == "add" else -alpha)
    if _is_constant(first) or _is_constant(second):
        symbol, sign, constant, other_sign = (
            (second, signs[1], first, signs[0]) if _is_constant(first) else (first, signs[0], second, signs[1])
        )
        return _with_constant(builder, call, symbol, sign, other_sign * _tensor(constant))
    if in_floats(builder, first, second):
        second = second if signs[1] == 1.0 else _with_constant(builder, call, second, signs[1], _ZERO)
        return combined(builder, call, FloatSum, first, second)
    operands = [builder.addend(call, operand) for operand in (first, second)]
    if operands[0] == operands[1] and signs == (1.0, -1.0):
        builder.reject(call, "it subtracts an activation from itself")
    terms = [_scaled(builder, call, codes, sign) for codes, sign in zip(operands, signs, strict=True)]
    if len(terms[0].shape) != len(terms[1].shape):
        builder.reject(call, "it adds tensors with different numbers of axes")
    terms = [broadcast(builder, call, codes, call.shape) for codes in terms]
    return made(Sum(inputs=(terms[0].name, terms[1].name), output="", layer=call.layer), call.shape)


def multiply(builder: Builder, call: Call) -> Any:
    """Lower a product, of two activations or of one and a constant."""
    first, second = call.argument("self"), call.argument("other")
    if _is_constant(first) or _is_constant(second):
        symbol, constant = (second, first) if _is_constant(first) else (first, second)
        return _with_constant(builder, call, symbol, _tensor(constant), _ZERO)
    if in_floats(builder, first, second):
        return combined(builder, call, FloatProduct, first, second)
    operands = [builder.codes(call, operand) for operand in (first, second)]
    if len(operands[0].shape) != len(operands[1].shape):
        builder.reject(call, "it multiplies tensors with different numbers of axes")
    return made(Product(inputs=(operands[0].name, operands[1].name), output="", layer=call.layer), call.shape)


def divide(builder: Builder, call: Call) -> Any:
    """Lower a division by a constant."""
    symbol, divisor = call.argument("self"), call.argument("other")
    if _is_constant(symbol) or not _is_constant(divisor) or call.argument("rounding_mode") is not None:
        builder.reject(call, "it divides by an activation, or rounds")
    return _with_constant(builder, call, symbol, 1.0 / _tensor(divisor), _ZERO)


def negate(builder: Builder, call: Call) -> Any:
    """Lower -x."""
    return _with_constant(builder, call, call.argument("self"), -1.0, _ZERO)


def concatenate(builder: Builder, call: Call) -> Any:
    """Lower tensors side by side; constants among them must be zeros."""
    rank = len(call.shapes[0])
    axis = int(call.argument("dim") or 0) % rank
    if axis == 0:
        builder.reject(call, "it works on the axis of the images")
    given = call.argument("tensors")
    if in_floats(builder, *(operand for operand in given if not isinstance(operand, Tensor))):
        return joined(builder, call, given, axis)
    if builder.float_trunk and any(isinstance(operand, Tensor) and bool(operand.any()) for operand in given):
        return joined(builder, call, given, axis)
    parts: list[Codes] = []
    zeros = [0]  # after each part; before the first one
    for operand in given:
        if isinstance(operand, Tensor):
            if bool(operand.any()):
                builder.reject(call, "one of its tensors is a constant that is not zero")
            zeros[-1] += int(operand.shape[axis])
        else:
            parts.append(builder.codes(call, operand))
            zeros.append(0)
    for place, codes in enumerate(parts):
        before, after = [0] * rank, [0] * rank
        before[axis], after[axis] = zeros[0] if place == 0 else 0, zeros[place + 1]
        parts[place] = padded(builder, codes, before, after)
    if len(parts) == 1:
        return parts[0]
    inputs = tuple(codes.name for codes in parts)
    return made(Concatenation(inputs=inputs, output="", layer=call.layer, axis=axis), call.shape)


def total(builder: Builder, call: Call) -> Any:
    """Lower the sum over an axis with two positions."""
    codes = builder.codes(call, call.argument("self"))
    axes = [int(axis) % (len(codes.shape) + 1) for axis in call.argument("dim") or []]
    if len(axes) != 1 or axes[0] == 0 or codes.shape[axes[0] - 1] != 2:
        builder.reject(call, "it adds up positions of one tensor. A mean over height and width has a form")
    halves = [sliced(builder, codes, axes[0], place, place + 1) for place in (0, 1)]
    first, second = (reshaped(builder, half, call.shape) for half in halves)
    return made(Sum(inputs=(first.name, second.name), output="", layer=call.layer), call.shape)


def _is_constant(operand: Any) -> bool:
    return isinstance(operand, Tensor | int | float)


def _tensor(operand: Any) -> Tensor:
    return torch.as_tensor(operand).detach().to(torch.float64)


def _with_constant(builder: Builder, call: Call, symbol: Any, factor: Any, offset: Tensor) -> Any:
    """Return ``factor x + offset``: folded into a layer, an element-wise step, or a convolution."""
    factor = torch.as_tensor(factor, dtype=torch.float64)
    if not isinstance(symbol, Pending | Codes):
        builder.reject(call, "it computes with an operand that is no tensor of images")
    rank = len(symbol.shape) + 1
    if symbol.shape != call.shape:
        builder.reject(call, "a constant has more positions than the activation")
    factor, offset = (without_batch(call, builder, t, rank) for t in (factor, offset))
    factor, offset = (t.flatten()[:1].reshape(()) if bool((t == t.flatten()[0]).all()) else t for t in (factor, offset))
    if builder.float_trunk and not folds_into(symbol, factor, offset):
        return with_constants(builder, call, symbol, factor, offset)
    if factor.ndim == 0 and offset.ndim == 0 and not is_layer_result(symbol):
        return _element_wise(builder, call, symbol, float(factor), float(offset))
    result = affine_by_constant(builder, call, symbol, factor, offset, call.shape)
    if result is None:
        builder.reject(call, "it adds or multiplies a constant that differs along more than one axis")
    return result


def _element_wise(builder: Builder, call: Call, symbol: Symbol, factor: float, offset: float) -> Symbol:
    if (factor, offset) == (1.0, 0.0):
        return symbol
    if isinstance(symbol, Pending) and isinstance(symbol.template, Elementwise) and not symbol.is_clamped:
        step = symbol.template
        if step.function == "affine":
            earlier = step.arguments
            arguments = {"factor": earlier["factor"] * factor, "offset": earlier["offset"] * factor + offset}
            return replace(symbol, template=replace(step, arguments=arguments))
    codes = builder.codes(call, symbol)
    return made(
        Elementwise(
            inputs=(codes.name,),
            output="",
            layer=call.layer,
            function="affine",
            arguments={"factor": factor, "offset": offset},
        ),
        codes.shape,
    )


def _scaled(builder: Builder, call: Call, codes: Codes, factor: float) -> Codes:
    """Return ``factor`` times the codes: the same codes on another grid, mirrored for a negative factor."""
    if factor == 1.0:
        return codes
    assert codes.grid is not None
    grid = codes.grid
    zero_point = grid.zero_point if factor > 0 else grid.quant_max - grid.zero_point
    scale = float(torch.tensor(grid.scale * abs(factor), dtype=torch.float32))
    result = made(
        Elementwise(
            inputs=(codes.name,),
            output="",
            layer=call.layer,
            function="affine",
            arguments={"factor": factor, "offset": 0.0},
        ),
        codes.shape,
    )
    scaled = Grid(scale=scale, zero_point=zero_point, quant_max=grid.quant_max)
    return builder.round(result, scaled, f"{codes.name}.scaled")


ARITHMETIC: dict[str, Callable[[Builder, Call], Any]] = {
    **dict.fromkeys(("add", "sub", "rsub"), add),
    "mul": multiply,
    "div": divide,
    "neg": negate,
    "cat": concatenate,
    "sum": total,
}
"""Lowering of each operator by its name."""
