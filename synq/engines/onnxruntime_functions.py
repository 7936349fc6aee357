"""Functions of single values as ONNX Runtime 1.32.0 computes them in float32 on x86, to the last bit.

A kernel approximates an exponential by a polynomial, with Horner's rule in fma, so that it can be followed exactly:
each function here is measured equal on 200,003 values from -20 to 20, at any position in a vector. Softplus, Mish
and, rarely, Elu round the last values of an array differently from the others (findings/), so they are not among them.
They and all other functions are tables of codes in the file.

    Sigmoid      clamp(fl(fl(x P(x x)) / Q(x x)) + 1/2, 0, 1), |x| <= 18; QLinearSigmoid is a table of it
    Tanh         fl(fl(x P(x x)) / Q(x x)), |x| <= 9
    HardSigmoid  clamp(fl(fl(x / 6) + 1/2), 0, 1), with fl(1/6);   HardSwish  fl(x HardSigmoid(x))
    SiLU         fl(x Sigmoid(x))
    Gelu         fl(fl(x / 2) fl(erf(fl(x fl(sqrt(1/2)))) + 1))
                 fl(fl(x / 2) fl(tanh(fl(x fl(fl(fl(c_1 x) x) + c_0))) + 1)), approximate tanh

Source: ``onnxruntime/core/mlas/lib`` (logistic.cpp, tanh.cpp, erf.cpp, compute.cpp).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from synq.engines.arithmetic import fma
from synq.engines.functions import exact_values
from synq.engines.program import Elementwise

_LOGISTIC = (
    (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01),
    (
        *(6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06),
        *(1.70198817374094e-03, 1.16817656904453e-01, 9.93151921023180e-01),
    ),
)
_TANH = (
    (
        *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
        *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    ),
    (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
)
_ERF_SMALL = (-5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1, -3.76124859e-1, 1.28379151e-1)
_ERF_LARGE = (
    *(1.7294893e-5, -3.8320868e-4, 3.88393435e-3, -2.42545605e-2),
    *(1.06777847e-1, 6.34846687e-1, 1.28717512e-1),
)
_ERF_EXP = (1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0)

CACHED = 2**15
"""Values that a function reads at a time, so that what it computes in between stays in the cache of the processor."""


def native_values(step: Elementwise, x: Tensor) -> Tensor:
    """Return the float32 outputs of a function, as its kernel computes them if it has one, else the exact ones.

    Args:
        step: The function and its arguments.
        x: Float32 inputs of any shape, on the CPU.

    Raises:
        ValueError: If the function is not known.
    """
    if not has_kernel(step):
        return exact_values(step, x)
    parts = [_KERNELS[step.function](part, **step.arguments) for part in x.flatten().split(CACHED)]
    return torch.cat(parts).reshape(x.shape)


def has_kernel(step: Elementwise) -> bool:
    """Return whether a function is computed by a kernel of ONNX Runtime that is known exactly, and not by a table."""
    return step.function in _KERNELS


def float32_number(value: float) -> float:
    """Return a number rounded to float32."""
    return float(np.float32(value))


def exponential(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return an approximation of exp(x): ``2^m P(x - m ln 2)`` with m the nearest whole number to x / ln 2.

    Args:
        x: Float32.
        coefficients: Of P, the highest power first.
    """
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number
    exponent = fma(x, float32_number(1.44269504), magic) - magic
    rest = fma(exponent, float32_number(-0.693145752), x)
    rest = fma(exponent, float32_number(-1.42860677e-6), rest)
    return (_horner(rest, coefficients).double() * torch.pow(2.0, exponent.double())).float()


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return a polynomial, the highest power first, with an fma for each."""
    total = torch.full_like(x, float32_number(coefficients[0]))
    for coefficient in coefficients[1:]:
        total = fma(total, x, float32_number(coefficient))
    return total


def _rational(x: Tensor, largest: float, coefficients: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    x = x.clamp(-largest, largest)
    numerator, denominator = (_horner(x * x, part) for part in coefficients)
    return numerator * x / denominator


def _sigmoid(x: Tensor) -> Tensor:
    return (_rational(x, 18.0, _LOGISTIC) + 0.5).clamp(0.0, 1.0)


def _tanh(x: Tensor) -> Tensor:
    return _rational(x, 9.0, _TANH)


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x * float32_number(1 / 6) + 0.5).clamp(0.0, 1.0)


def _erf(x: Tensor) -> Tensor:
    size = x.abs().clamp(max=float32_number(3.925))
    small = fma(_horner(size * size, _ERF_SMALL), size, size)
    power = -fma(_horner(size, _ERF_LARGE), size, size)
    large = 1.0 - exponential(power, _ERF_EXP)
    return torch.where(size <= 0.921875, small, large).copysign(x)


def _gelu(x: Tensor) -> Tensor:
    return (x * 0.5) * (_erf(x * float32_number(math.sqrt(0.5))) + 1.0)


def _gelu_tanh(x: Tensor) -> Tensor:
    factor = math.sqrt(2 / math.pi)
    inner = x * float32_number(0.044715 * factor) * x + float32_number(factor)
    return (x * 0.5) * (_tanh(x * inner) + 1.0)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x >= 0, x, x * float32_number(negative_slope))


def _affine(x: Tensor, factor: float = 1.0, offset: float = 0.0) -> Tensor:
    return x * float32_number(factor) + float32_number(offset)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _sigmoid,
    "leaky_relu": _leaky_relu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "affine": _affine,
}
"""Float32 values and the arguments of the function -> float32 values."""
KERNEL_FUNCTIONS = frozenset({*_KERNELS, "relu", "relu6"})
"""Functions that are known exactly in floats, where no code makes them a table."""
