from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import reference
from synq.synthesis import lowpass
from synq.synthesis.lowpass import (
    LARGE_SET_BYTES,
    check_lowpass_space,
    cutoff_in_bins,
    gaussian_gain,
    gaussian_lowpass,
    lowpass_set,
)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("size", "cutoff", "corner", "axis"),
    [(32, 20, 0.53, 0.73), (32, 80, 0.96, 0.98), (224, 40, 0.00, 0.02), (224, 80, 0.14, 0.38), (224, 100, 0.29, 0.53)],
)
def test_published_gains(size: int, cutoff: float, corner: float, axis: float) -> None:
    gain = gaussian_gain(size, size, cutoff)
    half = size // 2
    assert gain.shape == (size, half + 1)
    assert float(gain[half, half]) == pytest.approx(corner, abs=0.005)
    assert float(gain[half, 0]) == pytest.approx(axis, abs=0.005)
    assert float(gain[0, half]) == pytest.approx(axis, abs=0.005)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (6, 9), (9, 6), (1, 5), (5, 1)])
def test_gain_against_a_reference(height: int, width: int) -> None:
    gain = gaussian_gain(height, width, 2.5, dtype=torch.float64)
    want = [[reference.gain(u, v, height, width, 2.5) for v in range(width // 2 + 1)] for u in range(height)]
    torch.testing.assert_close(gain, torch.tensor(want, dtype=torch.float64), atol=1e-15, rtol=1e-13)
    assert float(gain[0, 0]) == 1.0


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 5), (4, 7), (7, 4)])
def test_filter_against_written_out_dft(height: int, width: int) -> None:
    x = randn(2, 3, height, width)
    out = gaussian_lowpass(x, 1.5)
    for image, got in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        want = torch.tensor(reference.lowpass(image.tolist(), 1.5), dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 20)])
def test_filter_against_full_fft(height: int, width: int) -> None:
    x = randn(3, 2, height, width)
    gain = torch.tensor([[reference.gain(u, v, height, width, 6.0) for v in range(width)] for u in range(height)])
    want = torch.fft.ifft2(torch.fft.fft2(x) * gain.double()).real
    torch.testing.assert_close(gaussian_lowpass(x, 6.0), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(gaussian_lowpass(x.float(), 6.0), want.float(), atol=2e-6, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 50))
def test_mean_stays_and_energy_does_not_grow(height: int, width: int, cutoff: float) -> None:
    x = randn(2, 2, height, width) + 3
    out = gaussian_lowpass(x, cutoff)
    torch.testing.assert_close(out.mean(dim=(2, 3)), x.mean(dim=(2, 3)), atol=1e-13, rtol=1e-13)
    assert float(out.square().sum()) <= float(x.square().sum()) * (1 + 1e-12)


def test_constant_image_stays_and_wide_filter_is_the_identity() -> None:
    flat = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(gaussian_lowpass(flat, 0.5), flat, atol=1e-7, rtol=0)
    x = randn(1, 1, 16, 16)
    torch.testing.assert_close(gaussian_lowpass(x, 1e9), x, atol=1e-14, rtol=0)


def test_batches_and_dtypes() -> None:
    x = randn(7, 3, 8, 10, dtype=torch.float32)
    before = x.clone()
    out = gaussian_lowpass(x, 3.0, batch=3)
    assert torch.equal(out, gaussian_lowpass(x, 3.0)) and torch.equal(x, before)
    assert out.dtype == torch.float32
    half = gaussian_lowpass(x.bfloat16(), 3.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, atol=0.02, rtol=0.02)
    last = gaussian_lowpass(x.contiguous(memory_format=torch.channels_last), 3.0)
    torch.testing.assert_close(last, out)
    assert gaussian_lowpass(x[:0], 3.0).shape == (0, 3, 8, 10)


def test_units_of_the_cutoff() -> None:
    assert cutoff_in_bins(40, "bins", 32, 32) == 40.0
    assert cutoff_in_bins(0.5, "nyquist", 32, 32) == 8.0
    assert cutoff_in_bins(0.5, "nyquist", 224, 300) == 56.0


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan")])
def test_rejects_a_cutoff_that_is_not_positive(cutoff: float) -> None:
    with pytest.raises(ValueError, match="`lowpass_cutoff` must be > 0"):
        cutoff_in_bins(cutoff, "bins", 8, 8)
    with pytest.raises(ValueError, match="`cutoff_bins` must be > 0"):
        gaussian_lowpass(randn(1, 1, 8, 8), cutoff)


def test_rejects_an_unknown_unit() -> None:
    with pytest.raises(ValueError, match="one of 'bins', 'nyquist', but got 'pixels'"):
        cutoff_in_bins(1.0, "pixels", 8, 8)


def test_the_gain_has_the_global_dtype_by_default() -> None:
    assert gaussian_gain(8, 8, 2.0).dtype == torch.float32


def test_the_result_is_written_where_the_caller_wants_it() -> None:
    x = randn(5, 3, 8, 8)
    place = torch.zeros_like(x)
    assert gaussian_lowpass(x, 2.0, batch=2, out=place) is place
    assert torch.equal(place, gaussian_lowpass(x, 2.0))


def test_a_large_set_is_filtered_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGE_SET_BYTES // (4 * 3 * 32 * 32) == 21_845
    images = randn(70, 1, 4, 4, dtype=torch.float32)
    wanted, files = gaussian_lowpass(images, 1.5), []
    in_file = lowpass.scratch_tensor

    def noted(*args: Any) -> Tensor:
        files.append(args)
        return in_file(*args)

    monkeypatch.setattr(lowpass, "scratch_tensor", noted)
    for limit, folder, number in ((images.nbytes + 1, tmp_path, 0), (images.nbytes, tmp_path, 1), (1, None, 0)):
        files.clear()
        monkeypatch.setattr(lowpass, "LARGE_SET_BYTES", limit)
        assert torch.equal(lowpass_set(images, 1.5, folder), wanted)
        assert len(files) == number


def test_the_space_of_a_large_set_is_that_of_its_float32_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(lowpass, "check_space", lambda *args: asked.append(args))
    size = 10 * 3 * 8 * 8 * 4
    for limit in (size + 1, size, size - 1):
        monkeypatch.setattr(lowpass, "LARGE_SET_BYTES", limit)
        check_lowpass_space(tmp_path, 10, (3, 8, 8), 2)
    assert asked == [(tmp_path, size, 2)] * 2
