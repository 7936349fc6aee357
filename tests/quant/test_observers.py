import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import reference
from synq.quant.fake_quant import choose_qparams, fake_quantize, quant_bounds
from synq.quant.observers import HistogramObserver, RangeObserver, minmax_per_channel, mse_range, mse_weight_ratio


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def histogram(x: Tensor, bins: int = 2048) -> HistogramObserver:
    observer = RangeObserver()
    observer.update(x)
    counted = HistogramObserver(*observer.range(), bins=bins)
    counted.update(x)
    return counted


def centers(h: HistogramObserver) -> list[float]:
    width = (h.bin_max - h.bin_min) / len(h.counts)
    return [h.bin_min + (i + 0.5) * width for i in range(len(h.counts))]


def error_of(h: HistogramObserver, low: float, high: float, bounds: tuple[int, int], norm: float) -> float:
    return reference.quant_error(centers(h), h.counts.tolist(), low, high, *bounds, norm)


def test_weight_minmax() -> None:
    weight = randn(4, 3, 2, 2)
    low, high = minmax_per_channel(weight.clone().requires_grad_())
    assert low.tolist() == [float(w.min()) for w in weight]
    assert high.tolist() == [float(w.max()) for w in weight]
    assert not low.requires_grad and not high.requires_grad


def test_constant_reads_itself_at_every_step() -> None:
    # Trap 1. The published fault, a moving average corrected twice, reads 3,945 here at step 21.
    assert reference.ema_corrected_twice([1.0] * 21, 0.9) == pytest.approx(3945, abs=0.5)
    observer = RangeObserver()
    for _ in range(50):
        observer.update(torch.ones(2, 3))
        assert observer.range() == (1.0, 1.0)


def test_range_is_that_of_all_observed_values_in_any_order() -> None:
    parts = [randn(5, 4, seed=i) * (i + 1) for i in range(4)]
    whole = torch.cat(parts)
    for order in (parts, parts[::-1]):
        observer = RangeObserver()
        for part in order:
            observer.update(part)
        assert observer.range() == (float(whole.min()), float(whole.max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_range_rejects_values_that_are_not_finite(bad: float) -> None:
    observer = RangeObserver()
    with pytest.raises(ValueError, match="finite and not empty"):
        observer.range()
    observer.update(torch.tensor([0.0, bad]))
    observer.update(torch.tensor([1.0]))  # a later good batch must not hide it
    with pytest.raises(ValueError, match="finite"):
        observer.range()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_histogram_counts_every_value_once(dtype: torch.dtype) -> None:
    x = randn(7, 50).to(dtype)
    h = HistogramObserver(float(x.min()), float(x.max()), bins=16)
    for part in x:
        h.update(part)
    assert h.counts.dtype == torch.float64 and float(h.counts.sum()) == x.numel()
    width = (h.bin_max - h.bin_min) / 16
    want = [0] * 16
    for v in x.flatten().tolist():
        want[min(15, int((v - h.bin_min) / width))] += 1
    assert (
        sum(abs(a - b) for a, b in zip(h.counts.tolist(), want, strict=True)) <= 4
    )  # values on an edge may go either way


def test_histogram_leaves_out_the_zeros_of_a_relu_and_keeps_outliers() -> None:
    x = torch.tensor([0.0, 0.0, 0.1, 1.0, 2.0, 9.0])
    h = HistogramObserver(0.0, 2.0, bins=4)
    h.update(x)
    assert h.counts.tolist() == [1.0, 0.0, 1.0, 2.0]


def test_histogram_counts_past_the_limit_of_float32() -> None:
    # float32 stops counting at 2^24; the chunks keep every single call below it.
    h = HistogramObserver(0.0, 1.0, bins=1)
    h.update(torch.tensor(0.5).expand(2**24 + 3))
    assert float(h.counts[0]) == 2**24 + 3


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_histogram_rejects(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="`bin_min <= bin_max` must hold"):
        HistogramObserver(low, high)


SAMPLES = {
    "relu": randn(20000).relu(),
    "relu_heavy": (randn(20000) ** 3).relu(),
    "normal": randn(20000),
    "heavy": randn(20000) ** 3,
    "skewed": torch.where(randn(20000) > 0, randn(20000, seed=1).abs() * 5, randn(20000, seed=2).abs() * -0.3),
    "negative": -randn(20000).abs() - 1,
    "positive": randn(20000).abs() + 2,
    "tiny": randn(20000) * 1e-6,
    "outlier": torch.cat([randn(20000), torch.tensor([200.0])]),
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipped_error_is_never_above_minmax(name: str, bits: int) -> None:
    x, bounds = SAMPLES[name], quant_bounds(bits, False)
    h = histogram(x)
    low, high = mse_range(h.counts, h.bin_min, h.bin_max, *bounds)
    assert min(h.bin_min, 0.0) - 1e-12 <= low <= 0.0 <= high <= max(h.bin_max, 0.0) + 1e-12
    clipped = error_of(h, low, high, bounds, 2.4)
    assert clipped <= error_of(h, h.bin_min, h.bin_max, bounds, 2.4) * (1 + 1e-5)
    # And on the very data, not only on the histogram of it.
    errors = []
    for ends in ((low, high), (h.bin_min, h.bin_max)):
        scale, zero_point = choose_qparams(torch.tensor(ends[0]), torch.tensor(ends[1]), *bounds)
        errors.append(float((fake_quantize(x, scale, zero_point, *bounds) - x).double().abs().pow(2.4).sum()))
    assert errors[0] <= errors[1] * 1.02


@pytest.mark.parametrize("name", ["relu", "relu_heavy", "normal", "heavy", "skewed"])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_search_finds_the_best_quantizer_there_is(name: str, bits: int, norm: float) -> None:
    h = histogram(SAMPLES[name][:2000], bins=64)
    bounds = quant_bounds(bits, False)
    low, high = mse_range(h.counts, h.bin_min, h.bin_max, *bounds, norm)
    values = centers(h)
    best = reference.best_range_error(values, h.counts.tolist(), *bounds, norm, steps=150)
    assert error_of(h, low, high, bounds, norm) <= best * 1.01


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=24, max_size=24), st.floats(-5, 5), st.floats(0.01, 9), st.integers(2, 8))
def test_never_above_minmax_for_any_histogram(counts: list[int], start: float, span: float, bits: int) -> None:
    bounds = quant_bounds(bits, False)
    h = HistogramObserver(start, start + span, bins=24)
    h.counts = torch.tensor(counts, dtype=torch.float64)
    low, high = mse_range(h.counts, h.bin_min, h.bin_max, *bounds)
    full = error_of(h, h.bin_min, h.bin_max, bounds, 2.4)
    assert error_of(h, low, high, bounds, 2.4) <= full * (1 + 1e-3) + 1e-9


def test_larger_norm_clips_less() -> None:
    h = histogram(SAMPLES["relu_heavy"])
    ends = [mse_range(h.counts, h.bin_min, h.bin_max, 0, 15, norm)[1] for norm in (1.0, 2.4, 6.0)]
    assert ends[0] < ends[1] < ends[2] <= h.bin_max


def test_degenerate_histograms() -> None:
    for x in (torch.zeros(10), torch.full((10,), 3.0), torch.full((10,), -3.0)):
        h = histogram(x)
        low, high = mse_range(h.counts, h.bin_min, h.bin_max, 0, 15)
        scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), 0, 15)
        torch.testing.assert_close(fake_quantize(x, scale, zero_point, 0, 15), x, atol=0, rtol=2e-3)
    with pytest.raises(ValueError, match="`mse_norm` must be > 0"):
        mse_range(torch.ones(4), 0.0, 1.0, 0, 15, norm=0.0)


def test_search_is_fast() -> None:
    h = histogram(SAMPLES["normal"])
    mse_range(h.counts, h.bin_min, h.bin_max, 0, 255)
    seconds, sorting = [], []
    numbers = torch.randn(1_000_000)
    for _ in range(5):
        start = time.perf_counter()
        mse_range(h.counts, h.bin_min, h.bin_max, 0, 255)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        numbers.sort()
        sorting.append(time.perf_counter() - start)
    assert min(seconds) < min(sorting), "a million numbers sorted: about 0.1 s, slower on a slower machine"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_ratio_against_twin(bits: int) -> None:
    weight = randn(6, 5, 3, 3) ** torch.tensor([1, 1, 1, 3, 3, 3])[:, None, None, None]
    weight[1] *= 1e-7
    ratio = mse_weight_ratio(weight, bits)
    assert ratio.dtype == torch.float32 and ratio.shape == (6,)
    assert float(ratio.min()) > 0 and float(ratio.max()) <= 1
    bounds = quant_bounds(bits, True)
    for channel, got in zip(weight.flatten(1), ratio.tolist(), strict=True):
        values = (channel / channel.abs().max()).tolist()  # the ratio has no unit; the twin's eps guard has one
        low, high, ones = min(values), max(values), [1.0] * len(values)
        _, best = reference.best_weight_ratio(values, *bounds, 2.4)
        assert reference.quant_error(values, ones, low * got, high * got, *bounds, 2.4) <= best * (1 + 1e-4)
        assert best <= reference.quant_error(values, ones, low, high, *bounds, 2.4)


def test_weight_ratio_of_channels_without_error_is_one() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert mse_weight_ratio(weight, 4).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="`bits` must"):
        mse_weight_ratio(weight, 1)
    with pytest.raises(ValueError, match="`mse_norm` must"):
        mse_weight_ratio(weight, 4, norm=-1.0)


def test_histogram_of_doubles_is_counted_in_doubles() -> None:
    assert len(HistogramObserver(0.0, 1.0).counts) == 2048
    histogram = HistogramObserver(-1.0, 1.0, bins=2)
    histogram.update(torch.tensor([-1e-12, -0.5, 0.5], dtype=torch.float64) + 0.0)
    assert histogram.counts.tolist() == [2, 1]
    shifted = HistogramObserver(0.0, 2.0, bins=2)
    shifted.update(torch.tensor([1 - 1e-12, 1 - 1e-12, 1.5], dtype=torch.float64))
    assert shifted.counts.tolist() == [2, 1], "1 - 1e-12 is 1 in float32, in the second bin"


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_below_one_are_clipped_too(sign: int) -> None:
    counts = torch.zeros(900)
    counts[:100], counts[-1] = 1000.0, 1.0  # up to 0.1, and one value at 0.9
    edges = (0.0, 0.9) if sign > 0 else (-0.9, 0.0)
    low, high = mse_range(counts if sign > 0 else counts.flip(0), *edges, 0, 3)
    assert (low == 0 and 0.05 < high < 0.3) if sign > 0 else (high == 0 and -0.3 < low < -0.05)


@pytest.mark.parametrize(("limit", "norm"), [(1, 2.4), (7, 1.0)])
def test_weight_ratio_of_a_symmetric_grid_is_the_best_of_all(limit: int, norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator)
    weight[4:] = -weight[4:].abs()  # of one sign
    weight[:, 0] = -6.0
    found = mse_weight_ratio(weight, 4, norm, limit=limit)
    for channel, ratio in zip(weight.double().numpy(), found.tolist(), strict=True):
        errors = {}
        for candidate in (1 - 0.02 * np.arange(41)).round(2):
            step = candidate * np.abs(channel).max() / limit
            errors[candidate] = (np.abs(np.clip(np.rint(channel / step), -limit, limit) * step - channel) ** norm).sum()
        assert errors[min(errors, key=lambda one: abs(one - ratio))] == pytest.approx(min(errors.values()), rel=1e-4)
    assert float(found.min()) < 1
