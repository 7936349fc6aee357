"""Uniform affine quantization: quantize, dequantize, and the fused fake quantization for training.

    s = max((beta - alpha) / (quant_max - quant_min), eps)                 alpha = min(min, 0), beta = max(max, 0)
    zero_point = clamp(round(quant_min - alpha / s), quant_min, quant_max)
    q = clamp(round(x * (1 / s)) + zero_point, quant_min, quant_max)       x^ = s (q - zero_point)

Rounding is half to even. Zero is always exactly representable, so zero padding and the zeros of ReLU have no error.

PyTorch has fused fake-quantize ops. On CPU they convert value by value and take three times as long as the same
arithmetic in four vectorized passes; on CUDA the per-channel op synchronizes twice with the host, to check its zero
points. Each op is used where it is the fastest, and all give the same finite numbers (docs/results/BENCHMARKS.md).
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
"""Smallest scale. It matters only for an all-zero channel, whose codes are all `zero_point` and whose values are 0."""


def quant_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest integer code of a bit-width.

    ``quant_bounds(4, signed=True)`` is (-8, 7) (weights), ``quant_bounds(4, signed=False)`` is (0, 15) (activations).

    Args:
        bits: Bit-width, 2..8.
        signed: Two's complement codes if True, codes from 0 otherwise.

    Returns:
        ``(quant_min, quant_max)``, both inclusive.

    Raises:
        ValueError: If ``bits`` is outside 2..8.
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
    """Return scale and zero_point of a range, which is first extended to include zero.

    ``choose_qparams(tensor(-1.0), tensor(2.0), 0, 15)`` gives scale 0.2 and zero_point 5: the codes 0, 5 and 15
    represent -1, 0 and 2. A NaN in the range gives a NaN scale (and a valid zero_point), so that it shows in the loss.

    Args:
        min_val: Minimum values, any shape (one per tensor or per channel).
        max_val: Maximum values, same shape.
        quant_min: Smallest code.
        quant_max: Largest code.
        eps: Smallest scale, > 0.

    Returns:
        ``(scale, zero_point)``: float32 > 0 and int32 in [quant_min, quant_max], shape of ``min_val``, without
        gradients.

    Source: asymmetric quantization of SynQ, section 3, changed on purpose: the paper centers the grid on the range
    (floor(w/s - z + 1/2)), so that zero may lie between two codes. Here zero is exactly representable, so that
    training, PyTorch's fused ops and ONNX QuantizeLinear/DequantizeLinear compute the same values.
    """
    alpha = min_val.float().clamp(max=0.0)
    beta = max_val.float().clamp(min=0.0)
    scale = ((beta - alpha) / (quant_max - quant_min)).clamp(min=eps)
    zero_point = torch.round(quant_min - alpha / scale).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(nan=float(quant_min)).to(torch.int32)


@torch.no_grad()
def choose_symmetric_qparams(min_val: Tensor, max_val: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return the scale and zero_point of a range on a symmetric grid, whose codes are -quant_max..quant_max.

    The scale is max(|min|, |max|) / quant_max, at least `SCALE_EPS`; the zero_point is 0. A range (-1, 2) and a
    quant_max of 127 give 2 / 127. A NaN in the range gives a NaN scale.

    Args:
        min_val: Minimum values, any shape (one per tensor or per channel).
        max_val: Maximum values, same shape.
        quant_max: Largest code.

    Returns:
        ``(scale, zero_point)``: float32 > 0 and int32, shape of ``min_val``, without gradients.
    """
    largest = torch.maximum(min_val.float().abs(), max_val.float().abs())
    scale = (largest / quant_max).clamp(min=SCALE_EPS)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


@torch.no_grad()
def choose_centered_qparams(min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return the scale and zero_point of a range on unsigned codes whose values are symmetric around 0.

    Codes minus the zero_point are those of ``choose_symmetric_qparams``, and one more at the lower end: a range (-1, 2)
    and codes 0..255 give the scale 2 / 127 and the zero_point 128.

    Args:
        min_val: Minimum values, any shape.
        max_val: Maximum values, same shape.
        quant_min: Smallest code, 0.
        quant_max: Largest code, 2^bits - 1.

    Returns:
        ``(scale, zero_point)`` as ``choose_qparams``.
    """
    largest = (quant_max - quant_min) // 2
    scale, zero_point = choose_symmetric_qparams(min_val, max_val, largest)
    return scale, zero_point + quant_max - largest


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Quantize and dequantize: ``x^ = s (clamp(round(x / s) + zero_point) - zero_point)``.

    The gradient is a straight-through estimator: it passes unchanged where the unclamped code lies in
    [quant_min, quant_max], and is zero elsewhere; scale and zero_point have no gradient.

    The result has the dtype of ``x``, also under autocast, which does not affect this function: float32 stays float32
    and the next layer casts it; bfloat16 gives bfloat16, with the code computed in float32 and ``x^`` rounded to
    bfloat16 (relative error up to 2^-8; codes are exact). NaN need not propagate: PyTorch's kernel, used for
    per-tensor quantization on CUDA, maps it to some code.

    Args:
        x: Floating point, any shape.
        scale: float32, one element (``axis`` None) or shape (x.shape[axis],).
        zero_point: int32, same shape, within [quant_min, quant_max].
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: Channel axis of ``x`` (per-channel), or None (per-tensor).

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    if axis is None and not torch.compiler.is_compiling():
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
        offset = int(zero_point)
        whole: Tensor = _FakeQuantizePerTensorCpu.apply(x, float(scale), quant_min - offset, quant_max - offset)
        return whole
    offsets = _broadcast_to_axis(zero_point, x.ndim, axis)
    rounded: Tensor = _FakeQuantize.apply(
        x, _broadcast_to_axis(scale, x.ndim, axis), quant_min - offsets, quant_max - offsets
    )
    return rounded


def fake_quantize_rectified(x: Tensor, scale: Tensor, quant_max: int) -> Tensor:
    """Compute ``fake_quantize(relu(x), scale, 0, 0, quant_max)`` in one function, with the same values and gradients.

    With a zero_point of 0 the clamp at code 0 is the ReLU; the gradient passes where x > 0 and the code is at most
    ``quant_max``.

    Args:
        x: float32 on the CPU, any shape.
        scale: float32, one element.
        quant_max: Largest code.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    rounded: Tensor = _FakeQuantizePerTensorCpu.apply(x, float(scale), 0, quant_max, True)
    return rounded


def times_scale(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes`` times ``scale`` in ``dtype``, in place of the codes in eager mode.

    What torch.compile traces must be a new tensor: in torch 2.11.0 an autograd.Function that returns what an operation
    has returned of its input (an in-place product, ``to`` of the same dtype) passes zeros back for every gradient,
    without an error; in 2.15.0 it does not. The compiler fuses the product.
    """
    if not torch.compiler.is_compiling():
        return codes.mul_(scale).to(dtype)
    product = codes * scale
    return product if product.dtype == dtype else product.to(dtype)


class _FakeQuantize(torch.autograd.Function):
    """Compute ``s clamp(round(x / s), low, high)`` for broadcastable s, low and high, in fusible operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        steps = (x.to(work) * (1.0 / scale).to(work)).round_()
        kept = torch.clamp(steps, low, high)
        ctx.save_for_backward(kept == steps)
        return times_scale(kept, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient.where(inside, 0.0), None, None, None


class _FakeQuantizePerTensorCpu(torch.autograd.Function):
    """Compute the same per tensor on the CPU: the input is saved for backward instead of a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, rectified: bool = False) -> Tensor:
        inverse = float(np.float32(1) / np.float32(scale))
        ctx.save_for_backward(x)
        below, above = _gradient_band(inverse, low, high)
        ctx.band = (0.0, above) if rectified else (below, above)
        return torch.mul(x, inverse).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        # The derivative of hardtanh: the gradient where band[0] < x < band[1], else 0. One vectorized pass, whose
        # result has the memory layout of x: the gradient of a padded shortcut has another one, which would slow down
        # the next layers.
        grad_input = torch.empty_like(x)
        torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *ctx.band, grad_input=grad_input)
        return grad_input, None, None, None, None


@lru_cache(maxsize=4096)
def _gradient_band(inverse: float, low: int, high: int) -> tuple[float, float]:
    """Return the largest float32 whose code is below ``low``, and the smallest one whose code is above ``high``.

    Rounding and multiplication by a positive number are monotonic, so every float32 between the two has a code in
    [low, high].
    """
    factor = np.float32(inverse)
    edges = []
    with np.errstate(over="ignore"):  # a range up to the largest float has its edge at infinity
        for bound, direction in ((low, -np.float32(np.inf)), (high, np.float32(np.inf))):
            edges.append(float(_edge(factor, inverse, bound, direction)))
    return edges[0], edges[1]


def _edge(factor: np.float32, inverse: float, bound: int, direction: np.float32) -> np.float32:
    """Return the first float32 in ``direction`` (+-inf) whose code is beyond ``bound``."""
    sign = 1 if direction > 0 else -1
    edge = np.float32((bound + sign / 2) / inverse)
    while sign * np.rint(edge * factor) > sign * bound:  # beyond: step back
        edge = np.nextafter(edge, -direction)
    while sign * np.rint(edge * factor) <= sign * bound:  # within: step to the first one beyond
        edge = np.nextafter(edge, direction)
    return edge


def _broadcast_to_axis(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Reshape per-channel ``values`` to broadcast along ``axis`` of an ``ndim``-dimensional tensor; None: a scalar."""
    if axis is None:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


@torch.no_grad()
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Return the integer codes of ``x``, exactly those of :func:`fake_quantize`.

    PyTorch's fused op multiplies by ``1 / scale`` rounded to float32 instead of dividing by ``scale``; the two differ
    at some ties, so this function multiplies too.

    Args:
        x: Floating point, any shape, finite.
        scale: See :func:`fake_quantize`.
        zero_point: See :func:`fake_quantize`.
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: See :func:`fake_quantize`.

    Returns:
        int32 codes, shape of ``x``, in [quant_min, quant_max].
    """
    values = x if x.dtype == torch.float64 else x.float()
    inverse = _broadcast_to_axis(1.0 / scale, x.ndim, axis).to(values.dtype)
    offset = _broadcast_to_axis(zero_point, x.ndim, axis)
    # Clamp before the cast: a float beyond int32 has no defined integer.
    steps = torch.round(values * inverse).clamp(quant_min - quant_max, quant_max - quant_min)
    return (steps.to(torch.int32) + offset).clamp(quant_min, quant_max).to(torch.int32)


@torch.no_grad()
def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values ``x^ = s (q - zero_point)`` of integer codes, bit-exact with :func:`fake_quantize`.

    Args:
        q: Integer codes, any shape.
        scale: See :func:`fake_quantize`.
        zero_point: See :func:`fake_quantize`.
        axis: See :func:`fake_quantize`.
        dtype: Floating dtype of the quantized ``x``.

    Returns:
        Tensor of ``dtype``, shape of ``q``.
    """
    # PyTorch's per-tensor kernel multiplies in float32 even for float64 input, its per-channel kernel in float64.
    work = torch.float64 if dtype == torch.float64 and axis is not None else torch.float32
    steps = (q - _broadcast_to_axis(zero_point, q.ndim, axis)).to(work)
    return (steps * _broadcast_to_axis(scale, q.ndim, axis).to(work)).to(dtype)
