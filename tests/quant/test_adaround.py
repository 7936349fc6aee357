"""Learned rounding: errors fall block by block, codes hold, and nothing else moves."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from support.adaround_tools import (
    CPU,
    QUICK,
    SIZE,
    Bottlenecks,
    layers_of,
    same,
    smooth,
    student_of,
    traced_of,
    within_reach,
)
from synq.common.seeding import make_generator
from synq.config.run import QuantConfig, ReconstructionConfig, TeacherConfig
from synq.network.blocks import block_ends, segment
from synq.quant.adaround import (
    ReconstructionReport,
    _beta,
    _Block,
    _SoftBlockRunner,
    drop_back,
    reconstruct,
    student_cuts,
)
from synq.quant.fake_quant import quantize
from synq.quant.layers import ActQuantizer, effective_weight
from synq.quant.soft_rounding import REACH, SoftRounding
from synq.quant.student import observe_ranges, quantize_model
from synq.quant.transformer.block_metric import BlockMetric
from synq.teacher.teacher import load_teacher


@pytest.fixture(
    scope="module", params=[pytest.param((3, 3), id="W3A3"), pytest.param((2, 4), id="W2A4", marks=pytest.mark.slow)]
)
def learned(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The bundled teacher, its student to nearest and with learned rounding, and the report."""
    teacher = load_teacher(TeacherConfig()).graph
    images = smooth(64, (1, 16, 16), 0)
    nearest = student_of(teacher, images, request.param)
    student, untouched = copy.deepcopy(nearest), copy.deepcopy(teacher)
    report = reconstruct(student, teacher, images, QUICK, seed=0, device=CPU)
    return {
        "teacher": teacher,
        "untouched": untouched,
        "images": images,
        "nearest": nearest,
        "student": student,
        "report": report,
    }


def test_every_block_is_learned_and_its_error_falls(learned: dict[str, Any]) -> None:
    report: ReconstructionReport = learned["report"]
    assert [block.block for block in report.blocks] == [node.name for node in block_ends(learned["teacher"])]
    assert all(block.kept and block.error_after < block.error_before for block in report.blocks)
    assert sum(block.error_after < 0.9 * block.error_before for block in report.blocks) >= 3
    assert all(0 < block.changed < 0.5 for block in report.blocks)
    assert json.loads(json.dumps(report.rows()))[0]["error_before"] == report.blocks[0].error_before


def test_the_student_comes_nearer_to_the_teacher_on_other_images(learned: dict[str, Any]) -> None:
    held = smooth(128, (1, 16, 16), 1)
    with torch.no_grad():
        wanted = learned["teacher"](held).log_softmax(1)
        kl = {
            name: float(F.kl_div(learned[name](held).log_softmax(1), wanted, log_target=True, reduction="batchmean"))
            for name in ("nearest", "student")
        }
    assert kl["student"] < 0.75 * kl["nearest"]


def test_the_last_error_of_the_report_is_that_of_the_whole_student(learned: dict[str, Any]) -> None:
    with torch.no_grad():
        images = learned["images"]
        error = float(BlockMetric()(learned["student"](images), learned["teacher"](images)))
    assert learned["report"].blocks[-1].error_after == pytest.approx(error, rel=1e-4)


def test_codes_are_the_floor_or_the_next_and_stored_weights_reproduce_them(learned: dict[str, Any]) -> None:
    moved, total = 0, 0
    for name, layer in layers_of(learned["student"]).items():
        before, quantizer = layers_of(learned["nearest"])[name], layer.weight_quantizer
        scale, zero_point = quantizer.qparams(layer.weight)
        first_scale, first_zero = before.weight_quantizer.qparams(before.weight)
        assert torch.equal(scale, first_scale) and torch.equal(zero_point, first_zero), "the grid does not move"
        bounds = (quantizer.quant_min, quantizer.quant_max)
        codes = quantize(layer.weight, scale, zero_point, *bounds, axis=0)
        shape = (-1, *[1] * (layer.weight.ndim - 1))
        floor = (before.weight / scale.reshape(shape)).floor() + zero_point.reshape(shape)
        low, high = floor.clamp(*bounds), (floor + 1).clamp(*bounds)
        assert bool(((codes == low) | (codes == high)).all())
        middle, step = codes - zero_point.reshape(shape), scale.reshape(shape)
        assert torch.equal(effective_weight(layer), middle * step)
        place, was = layer.weight / step - middle, before.weight / step - middle
        assert torch.allclose(place, was.clamp(-REACH, REACH), atol=1e-5), "as near to where it was as its cell allows"
        assert REACH < 0.5 and bool((was.abs() > 0.5).any()) and bool((was.abs() < REACH).any())
        other = quantize(before.weight, scale, zero_point, *bounds, axis=0)
        moved, total = moved + int((codes != other).sum()), total + codes.numel()
        if layer.bias is not None:
            assert torch.equal(layer.bias, before.bias)
    shares = [block.changed for block in learned["report"].blocks]
    assert min(shares) <= moved / total <= max(shares)


def test_nothing_but_weights_and_steps_moves(learned: dict[str, Any]) -> None:
    assert same(learned["teacher"], learned["untouched"])
    now, then = learned["student"].state_dict(), learned["nearest"].state_dict()
    moved = {name for name in now if not torch.equal(now[name], then[name])}
    assert {name for name in moved if name.startswith("act_quantizers")} == {
        name for name in now if name.startswith("act_quantizers") and name.endswith("scale")
    }
    assert {name for name in moved if not name.startswith("act_quantizers")} <= {
        f"{n}.weight" for n in layers_of(learned["student"])
    }
    assert all(float(m.scale) > 0 for m in learned["student"].modules() if isinstance(m, ActQuantizer))
    assert not [m for m in learned["student"].modules() if m._forward_hooks or (m.training and not list(m.children()))]
    assert all(p.grad is None for p in learned["student"].parameters())


def test_soft_rounding_starts_at_the_weight_and_ends_at_its_codes() -> None:
    student = student_of(traced_of(Bottlenecks), smooth(8, SIZE, 0))
    layer = next(iter(layers_of(student).values()))
    soft = SoftRounding(layer)
    # Min-max ranges hold every weight, but for the end that the whole-numbered zero point shifts by at most half a
    # step.
    inside = soft.weight().detach() - layer.weight
    step = soft.scale.expand_as(inside)
    assert float((inside.abs() / step).max()) <= 0.5 + 1e-4 and float((inside.abs() / step).median()) < 1e-5
    assert torch.equal(soft.codes() * soft.scale, effective_weight(layer)), "no tie: the start rounds to nearest"
    with torch.no_grad():
        soft.logits.fill_(9.0)
        assert torch.equal(soft.soft_rounding(), torch.ones_like(step))
        assert torch.equal(soft.codes(), (soft.floor + 1).clamp(soft.low, soft.high))
        soft.logits.fill_(-9.0)
        assert torch.equal(soft.weight(), soft.codes() * soft.scale)
        assert torch.equal(soft.codes(), soft.floor.clamp(soft.low, soft.high))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_are_dropped_back_one_by_one(layout: torch.memory_format, torch_rng_untouched: None) -> None:
    whole = torch.zeros(8, 5, 6, 6).contiguous(memory_format=layout)
    quantized = torch.ones(8, 5, 6, 6).contiguous(memory_format=layout)

    def dropped(probability: float) -> Tensor:
        return drop_back(whole, quantized, probability, make_generator("test"))

    assert torch.equal(dropped(0.0), quantized) and torch.equal(dropped(1.0), whole)
    half = dropped(0.3)
    assert half.is_contiguous(memory_format=layout) and set(half.unique().tolist()) == {0.0, 1.0}
    assert float(half.mean()) == pytest.approx(0.7, abs=0.04)
    plain = drop_back(whole.contiguous(), quantized.contiguous(), 0.3, make_generator("test"))
    assert torch.equal(half, plain), "one draw for every layout"


@pytest.mark.parametrize("learn_steps", [True, False])
def test_a_learning_block_without_drops_is_the_block_and_with_all_is_float(learn_steps: bool) -> None:
    traced, images = traced_of(Bottlenecks), smooth(16, SIZE, 0)
    student = student_of(traced, images, (8, 3))
    ends = block_ends(traced)
    cuts = student_cuts(student, ends)
    block = _Block(segment(student, cuts[0], cuts[1]), set())
    quantized = _SoftBlockRunner(block, lambda whole, rounded: rounded, learn_steps).run(images)
    floating = _SoftBlockRunner(block, lambda whole, rounded: whole, learn_steps).run(images)
    wanted = segment(traced, next(iter(traced.graph.nodes)), ends[0])(images)
    # 8-bit weights, not yet rounded: what is left between them is the end of a range, or a quantizer at another code.
    torch.testing.assert_close(floating.detach(), wanted, atol=0.02, rtol=0)
    assert len(quantized.detach().unique()) <= 8 < len(floating.detach().unique())
    assert float((quantized - block.part(images)).detach().abs().mean()) < 0.05


def reconstructed(seed: int = 0, **options: Any) -> tuple[fx.GraphModule, ReconstructionReport]:
    traced, images = traced_of(Bottlenecks), smooth(32, SIZE, 0)
    student = student_of(traced, images, (2, 3))
    settings = {
        "iterations": 6,
        "batch_size": 8,
        "images": 24,
        "rounding_lr": 0.05,
        "step_lr": 1e-3,
        "rounding_weight": 0.3,
        **options,
    }
    report = reconstruct(student, traced, images, ReconstructionConfig(**settings), seed=seed, device=CPU)
    return student, report


@pytest.mark.slow
def test_seed_and_settings_decide_the_result(torch_rng_untouched: None) -> None:
    base, report = reconstructed()
    again, report_again = reconstructed()
    assert same(base, again) and report == report_again
    changes: dict[str, Any] = {
        "seed": 1, "drop_prob": 0.0, "images": 16, "batch_size": 4, "iterations": 5, "rounding_lr": 0.1, "warmup": 1.0,
        "rounding_weight": 0.0, "beta_start": 5.0, "beta_end": 1.0, "step_lr": 2e-3,
    }  # fmt: skip
    assert [key for key, value in changes.items() if same(base, reconstructed(**{key: value})[0])] == []


def steps_of(net: fx.GraphModule) -> list[float]:
    return [float(m.scale) for m in net.modules() if isinstance(m, ActQuantizer)]


def test_steps_stay_where_none_is_learned_or_none_is_used() -> None:
    traced, images = traced_of(Bottlenecks), smooth(32, SIZE, 0)
    first = steps_of(student_of(traced, images, (2, 3)))
    assert steps_of(reconstructed(step_lr=0.0)[0]) == first
    assert steps_of(reconstructed(drop_prob=1.0)[0]) == first, "with every activation float no step has a gradient"
    assert steps_of(reconstructed()[0]) != first


def test_a_block_that_got_worse_is_put_back() -> None:
    traced, images = traced_of(Bottlenecks), smooth(32, SIZE, 0)
    before = student_of(traced, images, (4, 4), act_points="inputs")
    student = copy.deepcopy(before)
    wild = ReconstructionConfig(iterations=1, batch_size=8, rounding_lr=50.0, step_lr=5.0, images=32)
    report = reconstruct(student, traced, images, wild, seed=0, device=CPU)
    assert not any(block.kept for block in report.blocks)
    assert all(block.error_after > block.error_before and block.changed == 0 for block in report.blocks)
    assert same(student, before)


def test_exponent_of_the_rounding_term() -> None:
    config = ReconstructionConfig(iterations=10, warmup=0.2, beta_start=20.0, beta_end=2.0)
    assert [_beta(step, config) for step in (0, 1)] == [None, None]
    assert [_beta(step, config) for step in (2, 6, 10)] == [20.0, 11.0, 2.0]
    always = ReconstructionConfig(iterations=10, warmup=0.0)
    assert _beta(0, always) == 20.0
    assert _beta(9, ReconstructionConfig(iterations=10, warmup=1.0)) is None


def test_learned_weight_steps_and_double_precision() -> None:
    traced, images = traced_of(Bottlenecks).double(), smooth(32, SIZE, 0).double()
    student = quantize_model(
        traced, QuantConfig(weight_bits=3, act_bits=3, rounding="adaround", learned_steps="all")
    ).net.double()
    observe_ranges(student, images, act_range="mse")
    grids = {name: layer.weight_quantizer.scale.detach().clone() for name, layer in layers_of(student).items()}
    report = reconstruct(student, traced, images, QUICK, seed=0, device=CPU)
    assert any(block.kept for block in report.blocks)
    for (name, layer), block in zip(layers_of(student).items(), [0, 1, 1, 1, 2, 2, 2, 3], strict=True):
        assert torch.equal(layer.weight_quantizer.scale, grids[name]) and layer.weight_quantizer.scale.requires_grad
        if report.blocks[block].kept:
            assert effective_weight(layer).dtype == torch.float64 and within_reach(layer)


def test_invalid_reconstructions_are_rejected() -> None:
    traced, images = traced_of(Bottlenecks), smooth(8, SIZE, 0)
    with pytest.raises(ValueError, match=r"`reconstruction\.images` must be >= 1"):
        reconstruct(student_of(traced, images), traced, images[:0], QUICK, seed=0, device=CPU)
    live = student_of(traced, images, rounding="nearest")
    with pytest.raises(ValueError, match=r"`quant\.rounding` must be adaround .* stem\.0 has no stored scale"):
        reconstruct(live, traced, images, QUICK, seed=0, device=CPU)
    nodes = {node.name: node for node in traced.graph.nodes}
    with pytest.raises(ValueError, match="must be the only input of the segment that ends at add, but got blocks_0_0"):
        segment(traced, nodes["blocks_0_0"], nodes["add"])
