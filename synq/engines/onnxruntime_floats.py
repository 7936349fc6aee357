"""LayerNorm, softmax, matrix products and means in floats as ONNX Runtime 1.32.0 computes them on x86, to the last bit.

fl() rounds to float32; sums are float32 in the order that is given here, each measured equal with the engine
(`tests/engines/test_onnxruntime_floats.py`).

    LayerNormalization  mu = fl(mean in float64); d = fl(x - mu); 8 lanes, lane j sums fma(d, d, .) over j, j + 8, ...;
                        t_j = lane_j + lane_(j+4), j < 4; v = (t_0 + t_2) + (t_1 + t_3); of the n mod 8 values that are
                        left, four at a time are added one by one as fl(d d), the last ones by fma(d, d, v);
                        i = fl(1 / fl(sqrt(fl(fl(v / n) + eps)))); y = fma(fl(d i), gamma, beta);  n >= 8
    Softmax             e = exp(max(x - max, lowest)); lanes summed in order, a missing value 0: 16 with AVX-512, then
                        lane_j + lane_(j+8), else 8; neighbors twice, then both halves; y = fl(e fl(1 / sum))
    MatMul              fma(a_k, b_k, .) in the order of k from 0, in blocks whose sums are added; several rows
    mean                MatMul with fl(1 / n): the order of ReduceMean and GlobalAveragePool depends on sizes

float32 ``torch.sqrt`` is not correctly rounded on CPUs, so that the root is taken in float64. Sources: ONNX Runtime's
``onnxruntime/core/mlas/lib`` (compute.cpp, sgemm.cpp and its kernels for AVX-512) and
``onnxruntime/core/providers/cpu/nn/layer_norm_impl.cc``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines.arithmetic import fma
from synq.engines.onnxruntime_functions import CACHED, exponential, float32_number

LEAST_FEATURES = 8
"""Number of values below which LayerNormalization sums in an order that is not known."""
LANES, HALF = 8, 4
"""Values of a vector of AVX2, and half of them."""
_EXP = tuple(
    float.fromhex(text)
    for text in (
        *("0x1.694p-10", "0x1.125edcp-7", "0x1.555b5ap-5", "0x1.55545p-3", "0x1.fffff6p-2"),
        *("0x1p0", "0x1p0"),
    )
)
_LOWEST = {True: -103.9720840454, False: -88.3762626647949}
"""Input to which the exponential of a softmax is limited, with AVX-512 and without."""
_BLOCK = 128
"""Rows and columns that a matrix product takes at a time, unless one side is smaller."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return x (..., n) normalized over its last axis.

    Args:
        x: Float32, n >= `LEAST_FEATURES`.
        weight, bias: (n,) float32.
        eps: Added to the variance.
    """
    rows = x.reshape(-1, x.shape[-1]).split(_cached_rows(x))
    return torch.cat([_normalized(part, weight, bias, eps) for part in rows]).reshape(x.shape)


def _cached_rows(x: Tensor) -> int:
    return max(CACHED // x.shape[-1], 1)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    count = x.shape[-1]
    centered = x - x.double().mean(-1, keepdim=True).float()
    whole = count // LANES * LANES
    lanes = torch.zeros_like(centered[..., :LANES])
    for start in range(0, whole, LANES):
        part = centered[..., start : start + LANES]
        lanes = fma(part, part, lanes)
    half = lanes[..., :HALF] + lanes[..., HALF:]
    total = (half[..., 0] + half[..., 2]) + (half[..., 1] + half[..., 3])
    for place in range(whole, count):
        value = centered[..., place]
        in_four = place < whole + (count - whole) // HALF * HALF
        total = total + value * value if in_four else fma(value, value, total)
    root = (total / count + float32_number(eps)).double().sqrt().float()
    return fma(centered * (1 / root).unsqueeze(-1), weight, bias)


def softmax(x: Tensor, *, avx512: bool) -> Tensor:
    """Return the softmax of x (..., n) over its last axis.

    Args:
        x: Float32.
        avx512: Whether the processor has AVX-512.
    """
    rows = x.reshape(-1, x.shape[-1]).split(_cached_rows(x))
    return torch.cat([_softmax(part, avx512=avx512) for part in rows]).reshape(x.shape)


def _softmax(x: Tensor, *, avx512: bool) -> Tensor:
    powers = exponential((x - x.amax(-1, keepdim=True)).clamp(min=float32_number(_LOWEST[avx512])), _EXP)
    width = 2 * LANES if avx512 else LANES
    vectors = F.pad(powers, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width)).unbind(-2)
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    if avx512:
        total = total[..., :LANES] + total[..., LANES:]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return powers * (1 / total)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product of a (..., M, K) and b (..., K, N), float32, M > 1."""
    depth, block = a.shape[-1], _depth_of_blocks(a.shape[-1], b.shape[-1])
    total = None
    left, right = a.double(), b.double()
    for start in range(0, depth, block):
        part = torch.zeros((), dtype=torch.float32, device=a.device)
        for k in range(start, min(start + block, depth)):
            part = torch.addcmul(part.double(), left[..., :, k : k + 1], right[..., k : k + 1, :]).float()
        total = part if total is None else total + part
    assert total is not None
    return total


def _depth_of_blocks(depth: int, columns: int) -> int:
    """Return the number of products that are summed before blocks are added."""
    width, block = _BLOCK, _BLOCK
    if columns >= depth:
        return block
    while width > 16 and width // 2 >= columns:
        block, width = block * 2, width // 2
    return block


def mean(x: Tensor) -> Tensor:
    """Return the mean of x (..., T, C) over T, as a matrix product with `mean_weights`, C > 1."""
    return matrix_product(mean_weights(x.shape[-2]).to(x.device), x)[..., 0, :]


def mean_weights(count: int) -> Tensor:
    """Return the matrix (2, count) whose product with a matrix has its mean over rows, twice.

    Single rows have another order of sums, and ReduceMean and GlobalAveragePool one that depends on sizes.
    """
    return torch.full((2, count), float32_number(1 / count))


def has_avx512() -> bool:
    """Return whether the processor has AVX-512, which decides how a softmax is summed."""
    return bool(torch.cpu._is_avx512_supported())
