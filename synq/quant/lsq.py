"""Fake quantization whose step is trained with the weights (LSQ).

    x^ = s (clamp(round(x / s) + zero_point, quant_min, quant_max) - zero_point)         as in ``fake_quant.py``, bit by bit

    d x^ / d x = 1 inside the range, 0 outside                                           straight through the rounding
    d x^ / d s = code - zero_point - x / s inside, code - zero_point outside             code: the clamped one

The gradient of s is multiplied by 1 / sqrt(n quant_max), n the number of values that share s, so that a step moves, relative to its size,
about as fast as a weight does. The zero point is an integer and stays.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, sections 2.1 and 2.2. There n counts the values of one image, and so it
does here: a figure that holds for any batch and any number of processes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synq.quant.fake_quant import SCALE_EPS, _along, _pass_band


def gradient_factor(count: int, quant_max: int) -> float:
    """Return 1 / sqrt(``count`` ``quant_max``); ``count``: values of one image, or weights of one channel, that share the step."""
    return 1.0 / math.sqrt(max(count, 1) * quant_max)


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    rectified: bool = False,
) -> Tensor:
    """Quantize and dequantize as ``fake_quantize`` does, with a gradient for ``scale`` too.

    For x = 0.8 and s = 0.5 the code is 2, x^ = 1.0 and d x^ / d s = 2 - 1.6 = 0.4; for x = 9 with quant_max = 15 and zero point 0,
    d x^ / d s = 15.

    A step below ``SCALE_EPS`` is used as ``SCALE_EPS``, with the gradient passed on, so that it can return; the optimiser's hook
    (``optimizers.py``) keeps steps far above. NaN comes through, in x as in the scale, to the result and to the scale's gradient.

    Args:
        x: Floating point, any shape; the result and the gradient have its dtype and memory layout.
        scale: One element (``axis`` None) or (x.shape[axis],), floating point.
        zero_point: int32, same shape, within [quant_min, quant_max].
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: Channel axis of ``x``, or None for one step for the whole tensor.
        grad_factor: Multiplies the gradient of ``scale``.
        rectified: Take the ReLU of ``x`` first, in the same passes; the zero point must be ``quant_min``.

    Returns:
        Tensor like ``x``.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if axis is None and on_cpu and not torch.compiler.is_compiling():
        offset = int(zero_point)
        whole: Tensor = _LearnedOnCpu.apply(x, scale, quant_min - offset, quant_max - offset, grad_factor, rectified)
        return whole
    offsets = _along(zero_point, x.ndim, axis)
    source = x.relu() if rectified else x
    bounds = (quant_min - offsets, quant_max - offsets)
    rounded: Tensor = _Learned.apply(source, _along(scale, x.ndim, axis), *bounds, grad_factor)
    return rounded


class _Learned(torch.autograd.Function):
    """Any broadcastable ``scale``, ``low`` and ``high``, in operations that a compiler can fuse; only the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, factor: float) -> Tensor:
        step = scale.clamp(min=SCALE_EPS)
        ctx.save_for_backward(x, step, low, high)
        ctx.factor = factor
        work = torch.promote_types(x.dtype, torch.float32)
        steps = (x.to(work) * (1.0 / step).to(work)).round_()
        return torch.clamp(steps, low, high).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step, low, high = ctx.saved_tensors
        work = torch.promote_types(x.dtype, torch.float32)
        ratio = x.to(work) * (1.0 / step).to(work)
        steps = ratio.round()
        kept = torch.clamp(steps, low, high)
        inside = kept == steps
        pull = (kept - ratio.where(inside, 0.0)) * gradient
        to_scale = pull.sum_to_size(step.shape).to(step.dtype) * ctx.factor
        return torch.where(inside, gradient, 0.0), to_scale, None, None, None


class _LearnedOnCpu(torch.autograd.Function):
    """The same for one step, without a mask: see ``fake_quant.py`` for the pass band that replaces it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float, rectified: bool) -> Tensor:
        ctx.shape, ctx.dtype, ctx.factor = scale.shape, scale.dtype, factor
        step = float(scale.clamp(min=SCALE_EPS))
        inverse = float(np.float32(1) / np.float32(step))
        below, above = _pass_band(inverse, low, high)
        ctx.band, ctx.step = (0.0 if rectified else below, above), step
        out = torch.mul(x, inverse).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, out = ctx.saved_tensors
        passed = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *ctx.band, grad_input=passed)
        # x^ - x inside and x^ outside is s times the derivative. Subtracted before the sum: two sums would cancel digits.
        moved = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(x, x, *ctx.band, grad_input=moved)
        moved = torch.sub(out, moved, out=moved).mul_(gradient)
        to_scale = moved.sum().mul_(ctx.factor / ctx.step).to(ctx.dtype).reshape(ctx.shape)
        return passed, to_scale, None, None, None, None
