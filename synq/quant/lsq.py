"""Learned step size quantization (LSQ): fake quantization whose scale is trained with the weights.

    x^ = s (clamp(round(x / s) + zero_point, quant_min, quant_max) - zero_point)    bit-exact with ``fake_quantize``

    d x^ / d x = 1 inside the range, 0 outside                                      straight-through estimator
    d x^ / d s = code - zero_point - x / s inside, code - zero_point outside        code: after the clamp

The gradient of s is multiplied by 1 / sqrt(n quant_max), where n is the number of values that share s, so that the
relative updates of scales and weights have a similar magnitude. The zero_point is an integer and is not trained.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, sections 2.1 and 2.2. For activations n counts the
values of one image, as in the paper, so that it does not depend on the batch size or the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synq.quant.fake_quant import SCALE_EPS, _broadcast_to_axis, _gradient_band, times_scale

SMALLEST_STEP = 1 / 64
"""A learned step is kept at or above this share of its first value."""


def gradient_factor(count: int, quant_max: int) -> float:
    """Return the gradient scale of LSQ, 1 / sqrt(``count`` ``quant_max``).

    Args:
        count: Number of values of one image, or of weights of one channel, that share a scale.
        quant_max: Largest code.
    """
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
    """Quantize and dequantize like ``fake_quantize``, with a gradient for ``scale`` too.

    For x = 0.8 and s = 0.5 the code is 2, x^ = 1.0 and d x^ / d s = 2 - 1.6 = 0.4; for x = 9 with quant_max = 15 and
    zero_point = 0, d x^ / d s = 15.

    A scale below ``SCALE_EPS`` is replaced by ``SCALE_EPS`` in the forward pass, and still receives a gradient, so that
    it can grow again; the optimizer hook ``keep_positive`` keeps scales far above. A NaN in x or the scale propagates
    to the result and to the gradient of the scale.

    Args:
        x: Floating point, any shape; the result and the gradient have its dtype and memory layout.
        scale: One element (``axis`` None) or (x.shape[axis],), floating point.
        zero_point: int32, same shape, within [quant_min, quant_max].
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: Channel axis of ``x`` (per-channel), or None (per-tensor).
        grad_factor: Factor of the gradient of ``scale``.
        rectified: Whether to apply ReLU to ``x`` first, in the same passes; zero_point must be ``quant_min``.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if axis is None and on_cpu and not torch.compiler.is_compiling():
        offset = int(zero_point)
        whole: Tensor = _LearnedScalePerTensorCpu.apply(
            x, scale, quant_min - offset, quant_max - offset, grad_factor, rectified
        )
        return whole
    offsets = _broadcast_to_axis(zero_point, x.ndim, axis)
    source = x.relu() if rectified else x
    bounds = (quant_min - offsets, quant_max - offsets)
    rounded: Tensor = _LearnedScale.apply(source, _broadcast_to_axis(scale, x.ndim, axis), *bounds, grad_factor)
    return rounded


def clamp_to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, grad_factor: float = 1.0
) -> Tensor:
    """Clamp ``x`` to the values of the smallest and largest code, without rounding.

    The gradient of ``x`` passes between the two; that of ``scale`` is quant_min - zero_point below and quant_max -
    zero_point above, as in ``fake_quantize_learned``, and 0 between. For s = 0.5, zero_point 0 and quant_max 15, 0.8
    stays 0.8 and 9 becomes 7.5.

    Args:
        x: Floating point, any shape.
        scale: One element, float32; below ``SCALE_EPS`` it is replaced by ``SCALE_EPS``.
        zero_point: int32, one element, within [quant_min, quant_max].
        quant_min: Smallest code.
        quant_max: Largest code.
        grad_factor: Factor of the gradient of ``scale``.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    held = scale.detach().clamp(min=SCALE_EPS)
    step = (held + (scale - scale.detach()) * grad_factor).reshape(())  # the value of `held`, a factor on its gradient
    low, high = (quant_min - zero_point.reshape(())) * step, (quant_max - zero_point.reshape(())) * step
    work = torch.promote_types(x.dtype, torch.float32)
    return torch.clamp(x.to(work), low.to(work), high.to(work)).to(x.dtype)


class _LearnedScale(torch.autograd.Function):
    """Compute x^ for broadcastable ``scale``, ``low`` and ``high``, in fusible operations that save no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, factor: float) -> Tensor:
        step = scale.clamp(min=SCALE_EPS)
        ctx.save_for_backward(x, step, low, high)
        ctx.factor = factor
        work = torch.promote_types(x.dtype, torch.float32)
        steps = (x.to(work) * (1.0 / step).to(work)).round_()
        return times_scale(torch.clamp(steps, low, high), step, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step, low, high = ctx.saved_tensors
        work = torch.promote_types(x.dtype, torch.float32)
        ratio = x.to(work) * (1.0 / step).to(work)
        steps = ratio.round()
        clamped = torch.clamp(steps, low, high)
        inside = clamped == steps
        derivative = (clamped - ratio.where(inside, 0.0)) * gradient
        grad_scale = derivative.sum_to_size(step.shape).to(step.dtype) * ctx.factor
        return torch.where(inside, gradient, 0.0), grad_scale, None, None, None


class _LearnedScalePerTensorCpu(torch.autograd.Function):
    """Compute the same per tensor on the CPU, with the gradient band of ``fake_quant.py`` instead of a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float, rectified: bool) -> Tensor:
        ctx.shape, ctx.dtype, ctx.factor = scale.shape, scale.dtype, factor
        step = float(scale.clamp(min=SCALE_EPS))
        inverse = float(np.float32(1) / np.float32(step))
        below, above = _gradient_band(inverse, low, high)
        ctx.band, ctx.step = (0.0 if rectified else below, above), step
        out = torch.mul(x, inverse).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, out = ctx.saved_tensors
        grad_input = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *ctx.band, grad_input=grad_input)
        # s d x^ / d s is x^ - x inside the range and x^ outside. Subtracted before the sum: two sums would lose digits.
        derivative = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(x, x, *ctx.band, grad_input=derivative)
        derivative = torch.sub(out, derivative, out=derivative).mul_(gradient)
        grad_scale = derivative.sum().mul_(ctx.factor / ctx.step).to(ctx.dtype).reshape(ctx.shape)
        return grad_input, grad_scale, None, None, None, None


def keep_positive(optimizer: torch.optim.Optimizer, steps: Sequence[Tensor]) -> None:
    """Clamp each learned step, after every update by ``optimizer``, to at least ``SMALLEST_STEP`` of its current value.

    The steps themselves are trained, not their logarithms: LSQ's gradient scale makes the update of s commensurate with
    that of a weight, so a large update could make s zero or negative. This projection keeps every scale positive. NaN
    stays NaN, so that the loss shows it.
    """
    if not steps:
        return
    floors = [(step.detach() * SMALLEST_STEP).clamp(min=SCALE_EPS) for step in steps]

    @torch.no_grad()
    def project(*_: object) -> None:
        for step, floor in zip(steps, floors, strict=True):
            torch.maximum(step, floor, out=step)

    optimizer.register_step_post_hook(project)
