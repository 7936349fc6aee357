"""Ranges whose scale is a power of two."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine_nets import SIZE, traced
from support.student_tools import Residual
from synq.config.quant import QuantConfig
from synq.quant.fake_quant import choose_qparams
from synq.quant.layers import ActQuantizer
from synq.quant.observers import HistogramObserver
from synq.quant.power_of_two import mse_power_of_two_range, power_of_two_range
from synq.quant.student import observe_ranges, quantize_model

ENDS = st.floats(-1e4, 1e4, width=32)


def qparams(low: float, high: float, quant_max: int) -> tuple[float, int]:
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), 0, quant_max)
    return float(scale), int(zero_point)


@settings(max_examples=200, deadline=None)
@given(ENDS, ENDS, st.integers(2, 8))
def test_the_smallest_power_that_covers_a_range(first: float, second: float, bits: int) -> None:
    low, high, quant_max = min(first, second, 0.0), max(first, second, 0.0), 2**bits - 1
    if high - low < 1e-5:
        return
    found = power_of_two_range(low, high, quant_max)
    scale, zero_point = qparams(*found, quant_max)
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    assert found == (-zero_point * scale, (quant_max - zero_point) * scale) and found[0] <= low and high <= found[1]
    half = scale / 2
    assert math.ceil(-low / half) + math.ceil(high / half) > quant_max, "no finer scale covers it"


def test_examples_and_empty_ranges() -> None:
    assert power_of_two_range(-1.0, 2.0, 15) == (-1.0, 2.75)
    assert power_of_two_range(0.0, 255.0, 255) == (0.0, 255.0) and power_of_two_range(0.5, 256.0, 255) == (0.0, 510.0)
    assert power_of_two_range(0.0, 0.0, 255) == (0.0, 0.0)
    counts = torch.zeros(4)
    assert mse_power_of_two_range(counts, -1.0, 2.0, 15) == (-1.0, 2.75)


def error(values: torch.Tensor, found: tuple[float, float], quant_max: int) -> float:
    scale, zero_point = qparams(*found, quant_max)
    codes = (torch.round(values.double() / scale) + zero_point).clamp(0, quant_max)
    return float(((codes - zero_point) * scale - values.double()).abs().pow(2.4).mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier"])
def test_the_least_error_over_scales_and_zero_points(kind: str, bits: int) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    values = values.relu() if kind == "rectified" else values
    if kind == "outlier":
        values[0] = 30.0
    quant_max, low, high = 2**bits - 1, float(values.min()), float(values.max())
    histogram = HistogramObserver(low, high)
    histogram.update(values)
    found = mse_power_of_two_range(histogram.counts, low, high, quant_max)
    scale, zero_point = qparams(*found, quant_max)
    assert math.frexp(scale)[0] == 0.5 and found == (-zero_point * scale, (quant_max - zero_point) * scale)
    tried = [
        error(values, (-point * 2.0**k, (quant_max - point) * 2.0**k), quant_max)
        for k in range(-12, 3)
        for point in range(0, quant_max + 1, 1 if bits == 4 else 8)
    ]
    assert error(values, found, quant_max) <= 1.02 * min(tried), "but for the width of a bin"


@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_all_activations_of_a_student_have_such_scales(rule: str) -> None:
    net = traced(Residual(), SIZE)
    images = torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(0))
    scales = {}
    for chosen in (False, True):
        quant = QuantConfig(target="openvino", weight_bits=8, act_bits=4, power_of_two_scales=chosen)
        student = quantize_model(net, quant).net
        observe_ranges(student, images, act_range=rule)  # type: ignore[arg-type]
        found = [module for module in student.modules() if isinstance(module, ActQuantizer)]
        scales[chosen] = [math.frexp(float(module.scale))[0] == 0.5 for module in found]
        assert all("power of two" in repr(module) for module in found) == chosen
    assert all(scales[True]) and len(scales[True]) > 5 and not any(scales[False])
