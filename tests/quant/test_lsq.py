"""Learned steps: the same numbers as static ones, the gradients of the paper, and steps that stay positive."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.lsq_tools import Steps, images, student_of
from synq.quant.fake_quant import SCALE_EPS, choose_qparams, dequantize, fake_quantize, quant_bounds, quantize
from synq.quant.layers import QuantConv2d, QuantLinear, WeightQuantizer, effective_weight, step_parameters
from synq.quant.lsq import fake_quantize_learned, gradient_factor


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> Tensor:
    """The slow twin: autograd of s (x / s + rounding error) inside, s times the end code outside, the error taken
    for a constant.
    """
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    s, z = scale.reshape(shape), zero_point.reshape(shape)
    ratio = x / s
    codes = ratio.detach().round()
    ends = torch.clamp(codes, low - z, high - z)
    return s * torch.where(codes == ends, ratio + (codes - ratio).detach(), ends)


def case(
    axis: int | None, signed: bool, dtype: torch.dtype = torch.float64, bits: int = 3
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], Tensor]:
    """Values on both sides of the range, a step (per channel), a zero point, bounds, and the gradient that comes
    back.
    """
    g = torch.Generator().manual_seed(bits + 10 * signed)
    bounds = quant_bounds(bits, signed)
    x = torch.randn(4, 6, 5, 3, generator=g, dtype=torch.float64)
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = choose_qparams(
        -torch.rand(channels, generator=g), 1 + torch.rand(channels, generator=g), *bounds
    )
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    pull = torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x.to(dtype), scale.to(torch.promote_types(dtype, torch.float32)), zero_point, bounds, pull.to(dtype)


def gradients(function: Any, x: Tensor, scale: Tensor, pull: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaf, step = x.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
    out = function(leaf, step, *rest)
    return out.detach(), *torch.autograd.grad(out, (leaf, step), pull)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_against_autograd_of_the_plain_formula(axis: int | None, signed: bool, bits: int) -> None:
    x, scale, zero_point, bounds, pull = case(axis, signed, bits=bits)
    got = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds, axis, 0.25)
    wanted = gradients(straight_through, x, scale, pull, zero_point, *bounds, axis)
    assert (wanted[1] == 0).any() and (wanted[1] != 0).any(), "values inside and outside the range"
    torch.testing.assert_close(got, (*wanted[:2], 0.25 * wanted[2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_agrees_with_float64_and_keeps_the_layout(
    axis: int | None, signed: bool, layout: torch.memory_format
) -> None:
    x, scale, zero_point, bounds, pull = case(axis, signed, torch.float32)
    x = x.contiguous(memory_format=layout)
    got = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds, axis, 0.5)
    wanted = gradients(straight_through, x.double(), scale.double(), pull.double(), zero_point, *bounds, axis)
    assert all(part.is_contiguous(memory_format=layout) and part.dtype == torch.float32 for part in got[:2])
    assert torch.equal(got[0], fake_quantize(x, scale, zero_point, *bounds, axis)), "the values of a static step"
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=0, atol=0)
    torch.testing.assert_close(got[2].double(), 0.5 * wanted[2], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("axis", [None, 1])
def test_scale_gradient_by_finite_differences(axis: int | None) -> None:
    """The rounding error held fixed, x^ is smooth in s wherever a code is not at an end of the range."""
    x, scale, zero_point, bounds, pull = case(axis, signed=True)
    codes = quantize(x, scale.float(), zero_point, *bounds, axis)
    far = (x.abs() / scale.max() > bounds[1] - bounds[0] + 1) | ((codes > bounds[0]) & (codes < bounds[1]))
    x, pull = x.where(far, 0.0), pull.where(far, 0.0)
    shape = (1, -1, 1, 1) if axis == 1 else (1,)
    error = (x / scale.reshape(shape)).round() - x / scale.reshape(shape)

    def smooth(step: Tensor) -> Tensor:
        s, z = step.reshape(shape), zero_point.reshape(shape)
        inner = torch.maximum(torch.minimum(x / s + error, bounds[1] - z.double()), bounds[0] - z.double())
        parts = pull * s * inner
        return parts.sum((0, 2, 3)) if axis == 1 else parts.sum()

    eps = 1e-6
    wanted = (smooth(scale + eps) - smooth(scale - eps)) / (2 * eps)
    got = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds, axis)[2]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_worked_numbers() -> None:
    zero = torch.tensor(0, dtype=torch.int32)
    for x, value, slope in ((0.8, 1.0, 0.4), (9.0, 7.5, 15.0), (-1.0, 0.0, 0.0)):
        scale = torch.tensor(0.5, requires_grad=True)
        out = fake_quantize_learned(torch.tensor([x]), scale, zero, 0, 15)
        assert float(out.detach()) == value
        assert float(torch.autograd.grad(out, scale)[0]) == pytest.approx(slope)
    assert gradient_factor(100, 4) == pytest.approx(0.05)


@pytest.mark.parametrize("axis", [None, 1])
def test_bfloat16_is_computed_in_float32(axis: int | None) -> None:
    x, scale, zero_point, bounds, pull = case(axis, True, torch.bfloat16)
    got = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds, axis)
    wanted = gradients(straight_through, x.double(), scale.double(), pull.double(), zero_point, *bounds, axis)
    assert got[0].dtype == got[1].dtype == torch.bfloat16 and got[2].dtype == torch.float32
    assert torch.equal(got[0], wanted[0].float().bfloat16())
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["x", "scale"])
def test_nan_comes_through(dtype: torch.dtype, where: str) -> None:
    x, scale, zero_point, bounds, pull = case(None, False, dtype)
    if where == "x":
        x[0, 0, 0, 0] = torch.nan
    else:
        scale = scale * torch.nan
    out, _, slope = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds)
    assert bool(out[0, 0, 0, 0].isnan()) and bool(slope.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_zero_or_below_is_used_as_the_smallest_and_can_return(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    for step in (0.0, -2.0):
        out, _, slope = gradients(
            fake_quantize_learned, x, torch.tensor(step, dtype=dtype), x, torch.tensor(0, dtype=torch.int32), 0, 15
        )
        torch.testing.assert_close(out, torch.full_like(x, 15 * SCALE_EPS))
        assert float(slope) == pytest.approx(45.0)


@pytest.mark.parametrize("axis", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_form_is_the_eager_one(axis: int | None) -> None:
    x, scale, zero_point, bounds, pull = case(axis, True, torch.float32)
    compiled = torch.compile(fake_quantize_learned, backend="aot_eager", fullgraph=True)
    got = gradients(compiled, x, scale, pull, zero_point, *bounds, axis, 0.5)
    wanted = gradients(fake_quantize_learned, x, scale, pull, zero_point, *bounds, axis, 0.5)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined_with_a_relu(layout: torch.memory_format) -> None:
    x, scale, _, _, pull = case(None, False, torch.float32)
    zero, x = torch.tensor(0, dtype=torch.int32), x.contiguous(memory_format=layout)
    joined = gradients(fake_quantize_learned, x, scale, pull, zero, 0, 7, None, 0.5, True)
    apart = gradients(lambda v, *rest: fake_quantize_learned(F.relu(v), *rest), x, scale, pull, zero, 0, 7, None, 0.5)
    torch.testing.assert_close(joined, apart, rtol=1e-6, atol=1e-6)
    assert torch.equal(joined[0], apart[0]) and joined[1].is_contiguous(memory_format=layout)
    double = gradients(fake_quantize_learned, x.double(), scale, pull.double(), zero, 0, 7, None, 0.5, True)
    torch.testing.assert_close(double[2], joined[2], rtol=1e-5, atol=1e-5)


def test_a_student_with_learned_steps_starts_as_the_static_one(tiny_classifier: nn.Module) -> None:
    static = student_of(tiny_classifier, "none")
    with torch.no_grad():
        wanted = static.net(images())
        for steps in ("activations", "all"):
            made = student_of(tiny_classifier, steps)  # type: ignore[arg-type]
            assert torch.equal(made.net(images()), wanted)
            assert (made.size_bytes, made.bitops, made.rows) == (static.size_bytes, static.bitops, static.rows)
    assert len(step_parameters(static.net)) == 0
    assert len(step_parameters(student_of(tiny_classifier, "activations").net)) == 2
    assert len(step_parameters(student_of(tiny_classifier, "all").net)) == 5
    assert student_of(tiny_classifier, "activations").net.state_dict().keys() == static.net.state_dict().keys()


def test_stored_and_learned_weight_scales_do_not_follow_the_weights(tiny_classifier: nn.Module) -> None:
    for options in ({"steps": "all"}, {"steps": "none", "rounding": "adaround"}):
        made = student_of(tiny_classifier, **options)  # type: ignore[arg-type]
        for layer in made.net.modules():
            if isinstance(layer, (QuantConv2d, QuantLinear)):
                quantizer = layer.weight_quantizer
                live = WeightQuantizer(len(layer.weight), 3)
                live.clip_ratio.copy_(quantizer.clip_ratio)
                before = quantizer.qparams(layer.weight)
                assert all(torch.equal(a, b) for a, b in zip(before, live.qparams(layer.weight), strict=True))
                with torch.no_grad():
                    layer.weight.mul_(2)
                after = quantizer.qparams(layer.weight)
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                assert after[0].dtype == torch.float32 and not after[0].requires_grad
                codes = quantize(layer.weight, *after, quantizer.quant_min, quantizer.quant_max, axis=0)
                assert torch.equal(dequantize(codes, *after, axis=0), effective_weight(layer))
                assert not effective_weight(layer).requires_grad


@pytest.mark.parametrize("steps", ["activations", "all"])
def test_every_step_gets_a_gradient_and_a_saved_student_loads_bit_equal(
    tiny_classifier: nn.Module, steps: Steps
) -> None:
    made = student_of(tiny_classifier, steps)
    made.net.requires_grad_(True)(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in step_parameters(made.net))
    with torch.no_grad():
        for step in step_parameters(made.net):
            step.mul_(1.3)
    state = copy.deepcopy(made.net.state_dict())
    other = student_of(tiny_classifier, steps, observed=False)
    with torch.no_grad():
        if steps == "activations":
            with pytest.raises(RuntimeError, match="observe_ranges"):
                other.net(images())
        other.net.load_state_dict(state)
        assert torch.equal(other.net(images()), made.net(images()))
