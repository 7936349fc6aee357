"""Uniform affine quantization: codes, ranges and the simulated ("fake") form that training uses.

    s = max((beta - alpha) / (quant_max - quant_min), eps)                 alpha = min(min, 0), beta = max(max, 0)
    zero_point = clamp(round(quant_min - alpha / s), quant_min, quant_max)
    q = clamp(round(x * (1 / s)) + zero_point, quant_min, quant_max)       x^ = s (q - zero_point)

Rounding is half to even everywhere. Zero lies on the grid always, so zero padding and ReLU's zeros stay exact.

PyTorch has fused ops for the simulated form. On CPU they convert value by value and take three times as long as the same arithmetic in
four vectorised passes; on CUDA the one per channel waits twice for the device, to check its zero points. Each is used where it is the
fastest, and all give the same finite numbers (docs/results/BENCHMARKS.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_BITS = 2
MAX_BITS = 8
SCALE_EPS = 1e-8
"""Smallest step. Only guards the division for a channel that is zero throughout: its codes are all `zero_point`, its values 0."""


def quant_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code.

    ``quant_bounds(4, signed=True)`` is (-8, 7) (weights), ``quant_bounds(4, signed=False)`` is (0, 15) (activations).

    Args:
        bits: width of a code, 2..8.
        signed: two's complement codes if True, codes from 0 otherwise.

    Returns:
        ``(quant_min, quant_max)``, both inclusive.

    Raises:
        ValueError: if ``bits`` is outside 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"`bits` must lie in {MIN_BITS}..{MAX_BITS}, but got {bits}")
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


@torch.no_grad()
def choose_qparams(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, eps: float = SCALE_EPS
) -> tuple[Tensor, Tensor]:
    """Step and zero point of a range; the range is first widened to hold zero.

    ``choose_qparams(tensor(-1.0), tensor(2.0), 0, 15)`` gives scale 0.2 and zero_point 5: the codes 0, 5, 15 stand for -1, 0, 2.
    A NaN in the range gives a NaN scale (and a valid zero point), so that it reaches the loss and is seen there.

    Args:
        min_val: lower ends, any shape (one per tensor or per channel).
        max_val: upper ends, same shape.
        quant_min: smallest code.
        quant_max: largest code.
        eps: smallest step, > 0.

    Returns:
        ``(scale, zero_point)``: float32 > 0 and int32 in [quant_min, quant_max], shape of ``min_val``. Never part of a graph.

    Source: METHOD section 1, "Ours". The paper centres the grid on its range (floor(w/s - z + 1/2)) and may leave zero between two
    codes; ours keeps zero exact, so that training, PyTorch's fused ops and ONNX Q/DQ compute the same thing.
    """
    alpha = min_val.float().clamp(max=0.0)
    beta = max_val.float().clamp(min=0.0)
    scale = ((beta - alpha) / (quant_max - quant_min)).clamp(min=eps)
    zero_point = torch.round(quant_min - alpha / scale).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(nan=float(quant_min)).to(torch.int32)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Quantize and dequantize: ``x^ = s (clamp(round(x / s) + zero_point) - zero_point)``.

    The gradient is straight-through: passed on unchanged where the unclamped code lies in [quant_min, quant_max], zero elsewhere;
    scale and zero point get none.

    The result has the dtype of ``x``, also under autocast (which leaves this alone): float32 stays float32 and the layer behind
    casts it, bfloat16 in gives bfloat16 out, with the code computed in float32 and ``x^`` rounded to bfloat16 (relative error up to
    2^-8; codes themselves are exact). Do not count on NaN coming through: PyTorch's own kernel, used on CUDA for whole tensors, turns it
    into some code.

    Args:
        x: floating point, any shape.
        scale: float32, one element (``axis`` None) or shape (x.shape[axis],).
        zero_point: int32, same shape, within [quant_min, quant_max].
        quant_min: smallest code.
        quant_max: largest code.
        axis: channel axis of ``x``, or None for one range for the whole tensor.

    Returns:
        Tensor like ``x``.
    """
    if axis is None and not torch.compiler.is_compiling():
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
        offset = int(zero_point)
        whole: Tensor = _RoundedOnCpu.apply(x, float(scale), quant_min - offset, quant_max - offset)
        return whole
    offsets = _along(zero_point, x.ndim, axis)
    rounded: Tensor = _Rounded.apply(x, _along(scale, x.ndim, axis), quant_min - offsets, quant_max - offsets)
    return rounded


def fake_quantize_rectified(x: Tensor, scale: Tensor, quant_max: int) -> Tensor:
    """``fake_quantize(relu(x), scale, 0, 0, quant_max)`` in the passes of the second alone, values and gradients the same.

    With a zero point of 0 the clamp at code 0 is the ReLU; the gradient passes where x > 0 and the code is at most ``quant_max``.

    Args:
        x: float32 on the CPU, any shape.
        scale: float32, one element.
        quant_max: largest code.

    Returns:
        Tensor like ``x``.
    """
    rounded: Tensor = _RoundedOnCpu.apply(x, float(scale), 0, quant_max, True)
    return rounded


class _Rounded(torch.autograd.Function):
    """``s clamp(round(x / s), low, high)`` for any broadcastable ``scale``, ``low`` and ``high``, in operations that a compiler can fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        steps = (x.to(work) * (1.0 / scale).to(work)).round_()
        kept = torch.clamp(steps, low, high)
        ctx.save_for_backward(kept == steps)
        return kept.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient.where(inside, 0.0), None, None, None


class _RoundedOnCpu(torch.autograd.Function):
    """The same for one range: the input is saved, and no mask is written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, rectified: bool = False) -> Tensor:
        inverse = float(np.float32(1) / np.float32(scale))
        ctx.save_for_backward(x)
        below, above = _pass_band(inverse, low, high)
        ctx.band = (0.0, above) if rectified else (below, above)
        return torch.mul(x, inverse).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        # The derivative of hardtanh: the gradient where band[0] < x < band[1], else 0. One vectorised pass, which also leaves the result
        # in the layout of x: the gradient of a padded shortcut comes in another, and the layers behind would be slow on it.
        passed = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *ctx.band, grad_input=passed)
        return passed, None, None, None, None


@lru_cache(maxsize=4096)
def _pass_band(inverse: float, low: int, high: int) -> tuple[float, float]:
    """Largest float32 whose code lies below ``low``, and smallest one whose code lies above ``high``.

    Rounding and multiplication by a positive number are monotonic, so that between the two every code is inside.
    """
    factor = np.float32(inverse)
    ends = []
    with np.errstate(over="ignore"):  # a range up to the largest float has its edge at infinity
        for bound, outwards in ((low, -np.float32(np.inf)), (high, np.float32(np.inf))):
            ends.append(float(_edge(factor, inverse, bound, outwards)))
    return ends[0], ends[1]


def _edge(factor: np.float32, inverse: float, bound: int, outwards: np.float32) -> np.float32:
    """Return the first float32 on the way outwards whose code is beyond ``bound``."""
    sign = 1 if outwards > 0 else -1
    edge = np.float32((bound + sign / 2) / inverse)
    while sign * np.rint(edge * factor) > sign * bound:  # outside: come in
        edge = np.nextafter(edge, -outwards)
    while sign * np.rint(edge * factor) <= sign * bound:  # inside: the first one that is out
        edge = np.nextafter(edge, outwards)
    return edge


def _along(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Per-channel values viewed so that they broadcast along ``axis`` of a tensor with ``ndim`` dimensions."""
    if axis is None:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


@torch.no_grad()
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Integer codes, exactly those inside :func:`fake_quantize`.

    The fused op multiplies by ``1 / scale`` rounded to float32 rather than dividing by ``scale``; the two differ at some ties, so the
    same is done here.

    Args:
        x: floating point, any shape, finite.
        scale: see :func:`fake_quantize`.
        zero_point: see :func:`fake_quantize`.
        quant_min: smallest code.
        quant_max: largest code.
        axis: see :func:`fake_quantize`.

    Returns:
        int32 codes, shape of ``x``, in [quant_min, quant_max].
    """
    values = x if x.dtype == torch.float64 else x.float()
    inverse = _along(1.0 / scale, x.ndim, axis).to(values.dtype)
    offset = _along(zero_point, x.ndim, axis)
    # Clamp before the cast: a float beyond int32 has no defined integer.
    steps = torch.round(values * inverse).clamp(quant_min - quant_max, quant_max - quant_min)
    return (steps.to(torch.int32) + offset).clamp(quant_min, quant_max).to(torch.int32)


@torch.no_grad()
def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of integer codes, ``x^ = s (q - zero_point)``, bit for bit those of :func:`fake_quantize` on ``dtype``.

    Args:
        q: integer codes, any shape.
        scale: see :func:`fake_quantize`.
        zero_point: see :func:`fake_quantize`.
        axis: see :func:`fake_quantize`.
        dtype: floating dtype of the ``x`` the codes came from.

    Returns:
        Tensor of ``dtype``, shape of ``q``.
    """
    # PyTorch's per-tensor kernel multiplies in float32 even for float64 input, its per-channel kernel in float64.
    work = torch.float64 if dtype == torch.float64 and axis is not None else torch.float32
    steps = (q - _along(zero_point, q.ndim, axis)).to(work)
    return (steps * _along(scale, q.ndim, axis).to(work)).to(dtype)
