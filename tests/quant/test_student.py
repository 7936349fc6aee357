"""The quantized student: every tensor that the rule covers is low-bit, and ranges move once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.student_tools import SIZE, Points, Residual, make, trained
from synq.config.run import QuantConfig, RunConfig, with_overrides
from synq.network.tracing import trace_classifier
from synq.quant.cost import float_bytes
from synq.quant.fake_quant import dequantize, fake_quantize, quantize
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear, effective_weight, quantizers_bypassed
from synq.quant.prepare import prepare_student
from synq.quant.student import build_student, observe_ranges, quantize_model
from synq.teacher.teacher import load_teacher


def test_relu_rule_leaves_the_image_and_sums_float_with_a_note() -> None:
    rows = {row.name: row for row in make("relu").rows if row.role == "activation"}
    assert rows["x"].bits == 32 and rows["add"].bits == 32 and "not a quantization point" in rows["add"].note
    assert rows["relu"].bits == 4 and rows["relu_1"].bits == 4 and rows["relu_2"].bits == 4


def test_inputs_rule_quantizes_the_input_of_every_layer_once() -> None:
    student = make("inputs")
    layers = [n for n in student.net.graph.nodes if str(n.target) in ("conv1", "conv2", "conv3", "fc")]
    assert len(layers) == 4
    for node in layers:
        assert isinstance(student.net.get_submodule(str(node.args[0].target)), ActQuantizer)
    assert {r.name for r in student.rows if r.role == "activation" and r.bits == 4} == {
        "x",
        "relu",
        "relu_1",
        "flatten",
    }


@pytest.mark.parametrize("act_points", ["relu", "inputs"])
def test_bypassed_student_is_the_teacher_bit_for_bit(act_points: Points) -> None:
    net = trained(Residual())
    student = quantize_model(trace_classifier(net, SIZE), QuantConfig(weight_bits=2, act_bits=2, act_points=act_points))
    x = torch.randn(4, *SIZE)
    with torch.no_grad(), quantizers_bypassed(student.net):
        assert torch.equal(student.net(x), net(x))
    observe_ranges(student.net, x, act_range="minmax")
    with torch.no_grad():
        assert not torch.equal(student.net(x), net(x)), "outside the block the quantizers work again"


def test_teacher_is_not_touched() -> None:
    net = trained(Residual())
    traced = trace_classifier(net, SIZE)
    before = copy.deepcopy(traced.state_dict())
    student = quantize_model(traced, QuantConfig(weight_bits=3, act_bits=3))
    observe_ranges(student.net, torch.randn(8, *SIZE), act_range="mse", weight_range="mse")
    with torch.no_grad():
        next(student.net.parameters()).add_(1)
    assert before.keys() == traced.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    assert isinstance(traced.get_submodule("conv1"), nn.Conv2d)
    assert not isinstance(traced.get_submodule("conv1"), QuantConv2d)


def test_eight_bit_student_is_near_the_teacher_and_two_bit_is_not() -> None:
    net = trained(Residual())
    x = torch.randn(64, *SIZE)
    noise = {}
    for bits in (8, 4, 2):
        student = quantize_model(trace_classifier(net, SIZE), QuantConfig(weight_bits=bits, act_bits=bits))
        observe_ranges(student.net, x, act_range="minmax")
        with torch.no_grad():
            noise[bits] = float((student.net(x) - net(x)).norm() / net(x).norm())
    assert noise[8] < 0.02 < noise[4] < noise[2]


def test_ranges_are_frozen_by_observation_and_survive_evaluation() -> None:
    """Trap: real images moving the ranges because observers stay on while evaluating."""
    student = make()
    observe_ranges(student.net, torch.randn(8, *SIZE), act_range="mse")
    before = copy.deepcopy(student.net.state_dict())
    with torch.no_grad():
        student.net(100 * torch.randn(8, *SIZE))
    assert all(torch.equal(value, before[key]) for key, value in student.net.state_dict().items())


def test_observation_sees_float_activations_and_every_batch() -> None:
    student = make()
    x = torch.randn(10, *SIZE)
    x[9] *= 50  # the largest value is in the last, incomplete batch
    observe_ranges(student.net, x, act_range="minmax", batch_size=4)
    quantizer = student.net.get_submodule("act_quantizers.relu")
    with torch.no_grad(), quantizers_bypassed(student.net):
        conv, bn = student.net.get_submodule("conv1"), student.net.get_submodule("bn1")
        wide = F.relu(bn(F.conv2d(x, effective_weight_of(conv), padding=1)))
    top = float(quantizer.scale * (15 - quantizer.zero_point))
    assert top == pytest.approx(float(wide.max()), rel=1e-4)


def effective_weight_of(layer: nn.Module) -> Tensor:
    quantizer = layer.weight_quantizer
    assert isinstance(layer, QuantConv2d)
    scale, zero_point = quantizer.qparams(layer.weight)
    return fake_quantize(layer.weight, scale, zero_point, quantizer.quant_min, quantizer.quant_max, axis=0)


def test_unset_ranges_are_rejected_and_loaded_with_a_state_dict() -> None:
    student = make()
    with pytest.raises(RuntimeError, match="observe_ranges"):
        student.net(torch.randn(1, *SIZE))
    x = torch.randn(4, *SIZE)
    observe_ranges(student.net, x, act_range="minmax")
    other = make()
    other.net.load_state_dict(student.net.state_dict())
    with torch.no_grad():
        assert torch.equal(other.net(x), student.net(x))


def test_first_and_last_width() -> None:
    student = make("inputs", bits=3, first_bits=8, last_bits=7)
    widths = {(row.role, row.name): row.bits for row in student.rows}
    assert [widths["weight", name] for name in ("conv1", "conv2", "conv3", "fc")] == [8, 3, 3, 7]
    assert [widths["activation", name] for name in ("x", "relu", "flatten")] == [8, 3, 7]


def test_first_and_last_width_where_activations_are_quantized_behind_non_linearities() -> None:
    """Protocol B: both ends at 8 bits, with what the last one pools; the image and the pooled features are float
    under this rule.
    """
    student = make("relu", bits=3, first_bits=8, last_bits=8)
    widths = {(row.role, row.name): row.bits for row in student.rows}
    assert [widths["weight", name] for name in ("conv1", "conv2", "conv3", "fc")] == [8, 3, 3, 8]
    assert [widths["activation", name] for name in ("x", "relu", "relu_1", "relu_2", "flatten")] == [32, 3, 3, 8, 32]
    observe_ranges(student.net, torch.randn(8, *SIZE), act_range="minmax")
    codes = {
        name: len(effective_weight(student.net.get_submodule(name))[0].unique()) for name in ("conv1", "conv2", "fc")
    }
    assert codes["conv1"] > 8 >= codes["conv2"], "eight levels a channel are three bits"
    assert student.bitops == 8 * 32 * 8 * 256 * 27 + 3 * 3 * (8 * 256 * 18 + 8 * 256 * 8) + 8 * 32 * 40


@pytest.mark.parametrize("options", [{"learned_steps": "all"}, {"rounding": "adaround"}])
def test_a_stored_weight_scale_is_that_of_the_observation(options: dict[str, str]) -> None:
    student = make(bits=3, **options)  # type: ignore[arg-type]
    layer = student.net.get_submodule("conv3")
    assert isinstance(layer, QuantConv2d)
    live, _ = layer.weight_quantizer.qparams(layer.weight)
    observe_ranges(student.net, torch.randn(4, *SIZE), act_range="minmax", weight_range="mse")
    stored, _ = layer.weight_quantizer.qparams(layer.weight)
    torch.testing.assert_close(stored, live * layer.weight_quantizer.clip_ratio)
    assert (stored < live).any()
    with torch.no_grad():
        layer.weight.mul_(3)
    assert torch.equal(layer.weight_quantizer.qparams(layer.weight)[0], stored)
    other = make(bits=3, **options)  # type: ignore[arg-type]
    other.net.load_state_dict(student.net.state_dict())
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        assert torch.equal(other.net(x), student.net(x))


def test_account_of_size_and_bitops_by_hand() -> None:
    student = make("relu", bits=4)
    weights = {row.name: row for row in student.rows if row.role == "weight"}
    assert {name: row.macs for name, row in weights.items()} == {
        "conv1": 8 * 256 * 27,
        "conv2": 8 * 256 * 18,
        "conv3": 8 * 256 * 8,
        "fc": 5 * 8,
    }
    # The image and the pooled features are float under this rule.
    assert student.bitops == 4 * (32 * 8 * 256 * 27 + 4 * 8 * 256 * 18 + 4 * 8 * 256 * 8 + 32 * 40)
    codes, channels = (8 * 27 + 8 * 18 + 64 + 40) // 2, 8 + 8 + 8 + 5
    packed = codes + channels * (1 + 4 + 4)  # each has a bias or a following batch norm
    assert student.size_bytes == packed
    assert float_bytes(nn.Linear(3, 2)) == 32


def test_weight_codes_reproduce_the_forward_weight() -> None:
    student = make(bits=3)
    for layer in student.net.modules():
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            q = layer.weight_quantizer
            scale, zero_point = q.qparams(layer.weight)
            codes = quantize(layer.weight, scale, zero_point, q.quant_min, q.quant_max, axis=0)
            assert len(codes[0].unique()) <= 8
            assert torch.equal(dequantize(codes, scale, zero_point, axis=0), effective_weight(layer))


def test_clipped_weight_ranges_follow_live_weights() -> None:
    student = make(bits=3)
    observe_ranges(student.net, torch.randn(4, *SIZE), act_range="minmax", weight_range="mse")
    layer = student.net.get_submodule("conv3")
    assert isinstance(layer, QuantConv2d)
    assert (layer.weight_quantizer.clip_ratio <= 1).all() and (layer.weight_quantizer.clip_ratio < 1).any()
    before = layer.weight_quantizer.qparams(layer.weight)[0]
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer.weight_quantizer.qparams(layer.weight)[0], 2 * before)


def test_every_parameter_of_a_student_gets_a_gradient() -> None:
    """A parameter that the logits do not read stops a distributed run, and costs nothing in the account."""

    class Dead(Residual):
        def forward(self, x: Tensor) -> Tensor:
            self.aux(x.flatten(1))  # type: ignore[operator]
            return super().forward(x)

    net = Dead()
    net.aux = nn.Linear(3 * 256, 4)
    student = make(net=net)
    assert "aux" not in {row.name for row in student.rows}
    observe_ranges(student.net, torch.randn(4, *SIZE), act_range="minmax")
    student.net.requires_grad_(True)(torch.randn(2, *SIZE)).sum().backward()
    assert all(parameter.grad is not None for parameter in student.net.parameters())


def test_no_hooks_remain_and_no_images_are_rejected() -> None:
    student = make()
    with pytest.raises(ValueError, match="calib_images"):
        observe_ranges(student.net, torch.empty(0, *SIZE), act_range="minmax")
    observe_ranges(student.net, torch.randn(2, *SIZE), act_range="mse")
    assert not [m for m in student.net.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_overflowing_activations_are_named() -> None:
    student = make()
    with pytest.raises(ValueError, match="finite"):
        observe_ranges(student.net, torch.full((2, *SIZE), float("inf")), act_range="minmax")


def test_the_image_is_rounded_within_the_range_of_pixels() -> None:
    """Optimized pixels exceed black and white, images do not: every quantizer observes an image that can exist."""
    images = 3 * torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(0))
    bounds = (torch.tensor([-1.0, -0.5, -2.0]).view(1, 3, 1, 1), torch.tensor([1.0, 1.5, 0.5]).view(1, 3, 1, 1))
    clamped, bounded = make("inputs", bits=4), make("inputs", bits=4)
    observe_ranges(clamped.net, images.clamp(*bounds), act_range="minmax")
    observe_ranges(bounded.net, images, act_range="minmax", image_range=bounds)
    for name, module in clamped.net.named_modules():
        if isinstance(module, ActQuantizer):
            other = bounded.net.get_submodule(name)
            assert torch.equal(module.scale, other.scale), name  # type: ignore[arg-type]
    quantizer = bounded.net.get_submodule("act_quantizers.x")
    assert float(quantizer.scale) == pytest.approx((1.5 + 2.0) / 15)  # type: ignore[arg-type]
    observe_ranges(bounded.net, images, act_range="mse", image_range=bounds)
    assert float(quantizer.scale) <= 3.5 / 15 + 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["nearest", "adaround"])
def test_f_5_images_that_calibrate_nothing_are_not_copied(rounding: str, config: RunConfig) -> None:
    config = with_overrides(
        config, {"quant.rounding": rounding, "reconstruction.iterations": 1, "reconstruction.images": 16}
    )
    teacher = load_teacher(config.teacher)
    student = build_student(teacher, config.quant)
    images = torch.zeros(1, *teacher.input_size).expand(10**9, -1, -1, -1)  # a copy would take terabytes
    prepare_student(student.net, teacher.graph, images, config, torch.device("cpu"), image_range=teacher.pixel_range())
    assert all(bool(value.isfinite().all()) for value in student.net.state_dict().values())
