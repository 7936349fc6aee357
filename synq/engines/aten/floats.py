"""Operators in floats, between the integer layers of a network with LayerNorm or attention."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synq.engines.aten.builder import Builder, without_batch
from synq.engines.aten.moves import padded, reshaped, transposed
from synq.engines.aten.symbols import Call, Codes, Pending, Symbol, made, moved
from synq.engines.float_program import (
    FloatConcatenation,
    FloatConstant,
    FloatFunction,
    FloatMatrixProduct,
    FloatMean,
    FloatStep,
    LayerNorm,
    MatrixProduct,
    Softmax,
)
from synq.engines.onnxruntime_floats import LEAST_FEATURES
from synq.engines.onnxruntime_functions import KERNEL_FUNCTIONS


def on_grids(*symbols: Any) -> bool:
    """Return whether all operands are codes, so that an integer step can read them."""
    return all(isinstance(symbol, Codes) and symbol.grid is not None for symbol in symbols)


def in_floats(builder: Builder, *symbols: Any) -> bool:
    """Return whether an operator of these activations is computed in floats: on a trunk, if one of them is."""
    return builder.float_trunk and not on_grids(*symbols)


def combined(builder: Builder, call: Call, kind: type[FloatStep], first: Any, second: Any) -> Symbol:
    """Return a sum or product in floats of two activations, whose shapes broadcast."""
    a, b = (builder.floats(call, symbol) for symbol in (first, second))
    if len(a.shape) != len(b.shape):
        builder.reject(call, "its operands have different numbers of axes")
    return made(kind(inputs=(a.name, b.name), output="", layer=call.layer), call.shape)


def with_constants(builder: Builder, call: Call, symbol: Any, factor: Tensor, offset: Tensor) -> Symbol:
    """Return ``factor x + offset`` in floats, each operation rounded; a factor of 1 and an offset of 0 are none."""
    result: Symbol = symbol
    for operation, constant, neutral in (("mul", factor, 1.0), ("add", offset, 0.0)):
        if bool((constant == neutral).all()):
            continue
        x = builder.floats(call, result)
        step = FloatConstant(
            inputs=(x.name,),
            output="",
            layer=call.layer,
            operation=operation,  # type: ignore[arg-type]
            constant=constant.float().reshape((1,) * (len(x.shape) + 1 - constant.ndim) + tuple(constant.shape)),
        )
        result = made(step, call.shape)
    return result


def joined(builder: Builder, call: Call, operands: list[Any], axis: int) -> Symbol:
    """Return tensors side by side in floats: constants are added where zeros were put.

    A single activation among constants is padded, on its codes if it has any.
    """
    activations = [operand for operand in operands if not isinstance(operand, Tensor)]
    rank = len(call.shapes[0])
    if len(activations) > 1:
        if len(activations) < len(operands):
            builder.reject(call, "it puts several activations and a constant side by side")
        inputs = tuple(builder.floats(call, operand).name for operand in activations)
        return made(FloatConcatenation(inputs=inputs, output="", layer=call.layer, axis=axis), call.shape)
    place = next(number for number, operand in enumerate(operands) if not isinstance(operand, Tensor))
    sizes = [operand.shape[axis] if isinstance(operand, Tensor) else 0 for operand in operands]
    before, after = [0] * rank, [0] * rank
    before[axis], after[axis] = sum(sizes[:place]), sum(sizes[place:])
    source = activations[0]
    source = builder.floats(call, source) if isinstance(source, Pending) else source
    x = padded(builder, source, before, after)
    hidden = torch.zeros(1, *source.shape, dtype=torch.float64)
    parts = [
        without_batch(call, builder, operand.double(), rank) if isinstance(operand, Tensor) else hidden
        for operand in operands
    ]
    return with_constants(builder, call, x, torch.ones(()), torch.cat(parts, axis))


def function(builder: Builder, call: Call, symbol: Any, name: str, arguments: dict[str, float]) -> Symbol:
    """Return a function of single values in floats."""
    if name not in KERNEL_FUNCTIONS:
        builder.reject(call, f"in floats it must be one of {', '.join(sorted(KERNEL_FUNCTIONS))}")
    x = builder.floats(call, symbol)
    step = FloatFunction(inputs=(x.name,), output="", layer=call.layer, function=name, arguments=arguments)
    return made(step, x.shape)


def clamped(builder: Builder, call: Call, x: Codes, low: float, high: float) -> Symbol:
    """Return floats clamped to [low, high], as a ReLU or ReLU6."""
    names = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6"}
    if (low, high) not in names:
        builder.reject(call, "in floats a clamp must be a ReLU or ReLU6")
    return function(builder, call, x, names[low, high], {})


def layer_norm(builder: Builder, call: Call) -> Symbol:
    """Lower a LayerNorm over the last axis."""
    x = builder.floats(call, call.argument("input"))
    count = x.shape[-1]
    if [int(size) for size in call.argument("normalized_shape")] != [count]:
        builder.reject(call, "it normalizes over several axes")
    if count < LEAST_FEATURES:
        builder.reject(call, f"the order of its sums is not known below {LEAST_FEATURES} features")
    weight, bias = (
        torch.full((count,), neutral) if value is None else value.detach().float()
        for value, neutral in ((call.argument("weight"), 1.0), (call.argument("bias"), 0.0))
    )
    eps = float(call.argument("eps"))
    step = LayerNorm(inputs=(x.name,), output="", layer=call.layer, weight=weight, bias=bias, eps=eps)
    return made(step, x.shape)


def softmax(builder: Builder, call: Call) -> Symbol:
    """Lower a softmax over the last axis."""
    x = builder.floats(call, call.argument("self"))
    if int(call.argument("dim")) % (len(x.shape) + 1) != len(x.shape):
        builder.reject(call, "it normalizes over another axis than the last")
    return made(Softmax(inputs=(x.name,), output="", layer=call.layer), x.shape)


def matrix_product(builder: Builder, call: Call) -> Symbol:
    """Lower the product of two activations, of codes if both are."""
    operands = [call.argument(name) for name in ("self", "other")]
    if not all(isinstance(operand, Codes | Pending) for operand in operands):
        builder.reject(call, "it multiplies by a constant matrix, which is no layer with a weight")
    codes = on_grids(*operands)
    if not codes and not builder.float_trunk:
        builder.reject(call, "it reads an activation before a quantizer")
    a, b = (builder.codes(call, operand) if codes else builder.floats(call, operand) for operand in operands)
    if len(a.shape) < 2 or a.shape[:-2] != b.shape[:-2]:
        builder.reject(call, f"its operands {a.shape} and {b.shape} are repeated along an axis")
    if not codes and a.shape[-2] == 1:
        builder.reject(call, "the order of its sums is not known for a single row")
    kind = MatrixProduct if codes else FloatMatrixProduct
    return made(kind(inputs=(a.name, b.name), output="", layer=call.layer), call.shape)


def mean(builder: Builder, call: Call, symbol: Any, axes: list[int]) -> Symbol:
    """Return the mean over axes >= 1 in floats."""
    x = builder.floats(call, symbol)
    kept = [axis for axis in range(1, len(x.shape) + 1) if axis not in axes]
    sizes = [[x.shape[axis - 1] for axis in part] for part in (axes, kept)]
    count, rest = (math.prod(part) for part in sizes)
    if rest == 1:
        builder.reject(call, "it takes the mean of all values of an image")
    ordered = reshaped(builder, transposed(builder, x, [0, *axes, *kept]), (count, rest))
    result = made(FloatMean(inputs=(ordered.name,), output="", layer=call.layer), (rest,))
    return moved(result, call.shape, lambda value: reshaped(builder, value, call.shape))


FLOATS: dict[str, Callable[[Builder, Call], Any]] = {
    "layer_norm": layer_norm,
    "_softmax": softmax,
    "matmul": matrix_product,
}
"""Lowering of each operator by its name."""
