import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import reference
from synq.quant.fake_quant import (
    SCALE_EPS,
    _gradient_band,
    choose_centered_qparams,
    choose_qparams,
    choose_symmetric_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_rectified,
    quant_bounds,
    quantize,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16]


def ranges(bits: int, signed: bool, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales of many magnitudes with the zero points of real ranges."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.empty(channels).uniform_(-5, 3, generator=g)
    low, high = -torch.rand(channels, generator=g) * size, torch.rand(channels, generator=g) * size
    return choose_qparams(low, high, *quant_bounds(bits, signed))


def inputs(scale: Tensor, levels: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values inside and outside the range, then every tie between two codes, in the eyes of either rule."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(len(scale), 500, generator=g, dtype=torch.float64) * levels
    ties = (torch.arange(-2 * levels, 2 * levels, dtype=torch.float64) + 0.5).expand(len(scale), -1)
    steps = torch.cat([spread, ties], dim=1)
    exact = steps * scale.double()[:, None]
    rounded = (steps.float() * scale[:, None]).double()
    inverse = (steps.float() / (1 / scale)[:, None]).double()
    return torch.cat([exact, rounded, inverse], dim=1).to(dtype)


@pytest.mark.parametrize(
    ("bits", "signed", "bounds"), [(4, True, (-8, 7)), (4, False, (0, 15)), (8, True, (-128, 127))]
)
def test_bounds(bits: int, signed: bool, bounds: tuple[int, int]) -> None:
    assert quant_bounds(bits, signed) == bounds


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_bounds_reject(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"`bits` must lie in 2..8, but got {bits}"):
        quant_bounds(bits, True)


def test_qparams_worked_number() -> None:
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), 0, 15)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32 and scale.shape == ()
    assert float(scale) == pytest.approx(0.2) and int(zero_point) == 5


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.integers(2, 8), st.booleans())
def test_qparams_against_twin_and_zero_is_exact(a: float, b: float, bits: int, signed: bool) -> None:
    bounds = quant_bounds(bits, signed)
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = choose_qparams(low, high, *bounds)
    want_scale, want_zero = reference.qparams(float(low), float(high), *bounds, SCALE_EPS)
    assert float(scale) == pytest.approx(want_scale, rel=1e-6)
    # The two roundings may part where the unrounded zero point is a tie to float32 precision.
    assert abs(int(zero_point) - want_zero) <= (abs(abs((min(float(low), 0) / want_scale) % 1) - 0.5) < 1e-3)
    assert bounds[0] <= int(zero_point) <= bounds[1]
    assert float(fake_quantize(torch.zeros(1), scale, zero_point, *bounds)) == 0.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_those_of_the_fused_op(bits: int, signed: bool, dtype: torch.dtype) -> None:
    bounds = quant_bounds(bits, signed)
    scale, zero_point = ranges(bits, signed, 12, bits)
    x = inputs(scale, 2**bits, dtype, bits)
    fused = fake_quantize(x, scale, zero_point, *bounds, axis=0)
    codes = quantize(x, scale, zero_point, *bounds, axis=0)
    assert codes.dtype == torch.int32 and fused.dtype == dtype
    assert bounds[0] <= int(codes.min()) and int(codes.max()) <= bounds[1]
    torch.testing.assert_close(dequantize(codes, scale, zero_point, axis=0, dtype=dtype), fused, atol=0, rtol=0)
    oracle = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *bounds)
    torch.testing.assert_close(fused, oracle, atol=0, rtol=0)
    for row, s, z in zip(x, scale, zero_point, strict=True):
        fused = fake_quantize(row, s, z, *bounds)
        codes = quantize(row, s, z, *bounds)
        torch.testing.assert_close(dequantize(codes, s, z, dtype=dtype), fused, atol=0, rtol=0)
        oracle = torch.fake_quantize_per_tensor_affine(row, float(s), int(z), *bounds)
        torch.testing.assert_close(fused, oracle, atol=0, rtol=0)


def test_division_would_not_do() -> None:
    # The tie inputs above distinguish the two rules: dividing by the scale gives other codes for some of them.
    scale, zero_point = ranges(4, True, 12, 4)
    x = inputs(scale, 16, torch.float32, 4)
    divided = (torch.round(x / scale[:, None]).int() + zero_point[:, None]).clamp(-8, 7)
    assert not torch.equal(divided, quantize(x, scale, zero_point, -8, 7, axis=0))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_and_any_rank(axis: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    scale, zero_point = ranges(4, True, x.shape[axis], 1)
    fused = fake_quantize(x, scale, zero_point, -8, 7, axis)
    codes = quantize(x, scale, zero_point, -8, 7, axis)
    torch.testing.assert_close(dequantize(codes, scale, zero_point, axis), fused, atol=0, rtol=0)


def test_values_against_twin() -> None:
    scale, zero_point = ranges(3, True, 4, 2)
    x = torch.randn(4, 60, generator=torch.Generator().manual_seed(3)) * 4 * scale[:, None]
    fused = fake_quantize(x, scale, zero_point, -4, 3, axis=0)
    for row, got, s, z in zip(x.tolist(), fused.tolist(), scale.tolist(), zero_point.tolist(), strict=True):
        want = [reference.value(reference.code(v, s, z, -4, 3), s, z) for v in row]
        assert got == pytest.approx(want, rel=1e-6)


def test_constant_zero_channel() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.5, 1.0]])
    scale, zero_point = choose_qparams(weight.amin(1), weight.amax(1), -8, 7)
    assert float(scale[0]) == pytest.approx(SCALE_EPS)
    out = fake_quantize(weight, scale, zero_point, -8, 7, axis=0)
    assert torch.equal(out[0], torch.zeros(3))
    codes = quantize(weight, scale, zero_point, -8, 7, axis=0)
    assert torch.equal(dequantize(codes, scale, zero_point, axis=0), out)


@pytest.mark.parametrize(("low", "high"), [(3.0, 5.0), (-5.0, -3.0)])
def test_range_of_one_sign_is_widened_to_zero(low: float, high: float) -> None:
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), 0, 15)
    x = torch.tensor([0.0, low, high])
    assert fake_quantize(x, scale, zero_point, 0, 15).tolist() == pytest.approx([0.0, low, high], rel=1e-6)


def test_gradient_passes_inside_and_stops_outside() -> None:
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), 0, 15)
    x = torch.tensor([-1.2, -1.0, 0.0, 0.33, 2.0, 2.2], requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, 0, 15).sum(), x)
    assert gradient.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_is_kept_under_autocast(axis: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    low, high = (x.amin(), x.amax()) if axis is None else (x.amin(1), x.amax(1))
    scale, zero_point = choose_qparams(low, high, -8, 7)
    plain = fake_quantize(x, scale, zero_point, -8, 7, axis)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fake_quantize(x, scale, zero_point, -8, 7, axis)
    assert cast.dtype == dtype
    assert torch.equal(cast, plain)
    (gradient,) = torch.autograd.grad(cast.sum(), x)
    assert gradient.dtype == dtype and bool(torch.isfinite(gradient).all())


def test_qparams_carry_no_gradient_and_let_nan_through() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    scale, zero_point = choose_qparams(weight.amin(1), weight.amax(1), -8, 7)
    assert not scale.requires_grad and not zero_point.requires_grad
    scale, zero_point = choose_qparams(torch.tensor([float("nan"), -1.0]), torch.tensor([float("nan"), 1.0]), -8, 7)
    out = fake_quantize(torch.ones(2, 2), scale, zero_point, -8, 7, axis=0)
    assert bool(out[0].isnan().all()) and bool(out[1].isfinite().all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_gradient_is_that_of_the_fused_op_at_every_tie_and_edge(bits: int, signed: bool) -> None:
    bounds = quant_bounds(bits, signed)
    scale, zero_point = ranges(bits, signed, 12, bits)
    x = inputs(scale, 2**bits, torch.float32, bits)
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(bits))

    def gradient(out: torch.Tensor, leaf: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(out, leaf, pull)[0]

    leaf = x.clone().requires_grad_()
    got = gradient(fake_quantize(leaf, scale, zero_point, *bounds, axis=0), leaf, pull)
    oracle = torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, 0, *bounds)
    assert torch.equal(got, gradient(oracle, leaf, pull)) and not torch.equal(got, pull)
    for row, s, z, p in zip(x, scale, zero_point, pull, strict=True):
        # Neighbors of every edge of the grid, where one wrong digit of the gradient band would show.
        edges = (torch.arange(bounds[0] - 1, bounds[1] + 1) - z + 0.5) * s
        near = [edges.nextafter(torch.full_like(edges, end)) for end in (-torch.inf, torch.inf)]
        leaf = torch.cat([row, edges, *near]).requires_grad_()
        pull_here = torch.cat([p, torch.ones(3 * len(edges))])
        got = gradient(fake_quantize(leaf, s, z, *bounds), leaf, pull_here)
        oracle = torch.fake_quantize_per_tensor_affine(leaf, s, z, *bounds)
        assert torch.equal(got, gradient(oracle, leaf, pull_here))


@given(st.floats(2.0**-26, 2.0**99, width=32), st.integers(2, 8), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_gradient_band_is_exact_for_any_step(step: float, bits: int, offset: int) -> None:
    low, high = 0 - offset % 2**bits, 2**bits - 1 - offset % 2**bits
    inverse = float(np.float32(1) / np.float32(step))
    below, above = (np.float32(edge) for edge in _gradient_band(inverse, low, high))
    factor = np.float32(inverse)
    assert np.rint(below * factor) < low <= np.rint(np.nextafter(below, np.float32(np.inf)) * factor)
    assert np.rint(np.nextafter(above, -np.float32(np.inf)) * factor) <= high < np.rint(above * factor)


@pytest.mark.parametrize("axis", [None, 0])
def test_compiled_form_is_the_eager_one(axis: int | None) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    low, high = (x.amin(), x.amax()) if axis is None else (x.amin(1), x.amax(1))
    scale, zero_point = choose_qparams(low / 2, high / 2, -8, 7)

    def run(compiled: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        function = torch.compile(fake_quantize, backend="aot_eager", fullgraph=True) if compiled else fake_quantize
        out = function(leaf, scale, zero_point, -8, 7, axis)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


def test_symmetric_qparams_worked_numbers() -> None:
    scale, zero_point = choose_symmetric_qparams(torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([2.0, 1.0, 0.0]), 127)
    assert scale.tolist() == pytest.approx([2 / 127, 3 / 127, 1e-8], rel=1e-6)
    assert zero_point.dtype == torch.int32 and zero_point.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "scale", "zero_point"),
    [(0, 255, 2 / 127, 128), (0, 15, 2 / 7, 8), (2, 9, 2 / 3, 6)],
)
def test_centered_qparams_worked_numbers(quant_min: int, quant_max: int, scale: float, zero_point: int) -> None:
    found = choose_centered_qparams(torch.tensor([-1.0]), torch.tensor([2.0]), quant_min, quant_max)
    assert found[0].item() == pytest.approx(scale, rel=1e-6)
    assert found[1].dtype == torch.int32 and found[1].item() == zero_point
    assert quant_max - found[1].item() == (quant_max - quant_min) // 2, "as many codes above zero as below, or one less"


def test_the_rectified_form_is_that_of_a_relu_before() -> None:
    scale = torch.tensor(0.25)
    x = torch.tensor([-1.0, -0.1, 0.0, 0.1, 0.13, 0.5, 0.88, 3.7, 3.9, 9.0])
    values, gradients = [], []
    for form in (
        lambda x: fake_quantize_rectified(x, scale, 15),
        lambda x: fake_quantize(x.relu(), scale, torch.tensor(0, dtype=torch.int32), 0, 15),
    ):
        leaf = x.clone().requires_grad_(True)
        out = form(leaf)
        out.sum().backward()
        values.append(out.detach())
        gradients.append(leaf.grad)
    assert torch.equal(*values) and torch.equal(*gradients)
    assert gradients[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]
