"""The logarithmic grid of the softmax of attention: its codes, its step, its gradients, and where it is."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import synq
from support.token_nets import SIZE, Joined, Module, Separate, TokenNet, spread
from synq.config.run import QuantConfig, RunConfig, config_digest, with_overrides
from synq.network.logits import logits_of
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form
from synq.quant.keep_best import mean_kl
from synq.quant.layers import ActQuantizer
from synq.quant.observers import HistogramObserver
from synq.quant.student import observe_ranges, quantize_model
from synq.quant.transformer.log_quantizer import OCTAVES, STEPS, LogQuantizer, keep_best_grid


def quantizer(bits: int = 4, high: float = 1.0, step: float = 1.0, *, learned: bool = False) -> LogQuantizer:
    made = LogQuantizer(bits, learned=learned)
    made.set_range(0.0, high)
    made.set_step(step)
    return made


def by_hand(value: float, high: float, step: float, quant_max: int) -> float:
    if value == 0:
        return 0.0
    code = max(round(-math.log2(value / high) / step), 0)
    return 0.0 if code >= quant_max else high * 2 ** (-step * code)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("step", [1.0, 0.5])
@pytest.mark.parametrize("high", [1.0, 0.3])
def test_values_by_hand(bits: int, step: float, high: float) -> None:
    x = torch.cat([torch.rand(500, generator=torch.Generator().manual_seed(0)).pow(6) * 1.2 * high, torch.zeros(2)])
    found = quantizer(bits, high, step)(x)
    assert len(found.unique()) <= 2**bits
    expected = torch.tensor([by_hand(float(v), high, step, 2**bits - 1) for v in x])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_the_step_is_that_with_the_smaller_error() -> None:
    for values, wanted in ((torch.logspace(-6, 0, 2000, base=2), 0.5), (torch.logspace(-13, -8, 2000, base=2), 1.0)):
        bits = 4  # half octaves reach down to 2^-7, whole ones to 2^-14
        histogram = HistogramObserver(0.0, 1.0, bins=2**16)
        histogram.update(values)
        made = quantizer(bits)
        made.fit_step(histogram, 2.0)
        assert float(made.step) == wanted
        errors = {step: float((values - quantizer(bits, 1.0, step)(values)).square().sum()) for step in (1.0, 0.5)}
        assert min(errors, key=errors.__getitem__) == wanted


def test_gradients_pass_up_to_the_top_and_the_scale_has_that_of_lsq() -> None:
    x = torch.tensor([0.0, 1e-9, 0.1, 0.3, 0.55, 0.9, 2.0], requires_grad=True)
    made = quantizer(4, 0.5, 1.0, learned=True)
    out = made.with_scale(x, made.scale)
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 1, 1, 0, 0]
    inside = torch.tensor([True] * 5 + [False] * 2)
    slopes = torch.where(inside, out.detach() - x.detach(), out.detach()) / 0.5
    assert made.scale.grad is not None
    torch.testing.assert_close(made.scale.grad, slopes.sum())
    with torch.no_grad():
        assert torch.equal(made.with_scale(x, made.scale), out.detach()), "the same value without gradients"


@pytest.mark.parametrize("attention", [Joined, Separate, Module])
@pytest.mark.parametrize("points", ["relu", "inputs"])
def test_exactly_the_softmax_of_attention_is_logarithmic(attention: type, points: str) -> None:
    traced = trace_classifier(spread(TokenNet(attention, depth=2)), SIZE)
    student = quantize_model(traced, QuantConfig(softmax="log", act_points=points))  # type: ignore[arg-type]
    found = {n: m for n, m in student.net.named_modules() if isinstance(m, LogQuantizer)}
    assert len(found) == 2 and all("softmax" in name for name in found)
    observe_ranges(student.net, images(), act_range="mse")
    assert all(0 < float(m.scale) <= 1 for m in found.values())
    others = [m for m in student.net.modules() if isinstance(m, ActQuantizer) and not isinstance(m, LogQuantizer)]
    assert len(others) > 4
    values = {float(v) for m in found.values() for v in m(torch.rand(100)).unique()}
    assert len(values) <= 32


def observe(net: fx.GraphModule) -> None:
    observe_ranges(net, images(), act_range="mse")


@pytest.mark.parametrize(("bits", "count"), [(3, 1), (4, 2), (6, 4), (8, 6)])
def test_small_steps_need_codes(bits: int, count: int) -> None:
    assert sum(step == 1.0 or step * (2**bits - 1) >= OCTAVES for step in STEPS) == count
    histogram = HistogramObserver(0.0, 1.0, bins=2**12)
    histogram.update(torch.linspace(0.6, 1.0, 500))
    made = quantizer(bits)
    made.fit_step(histogram, 2.0)
    assert float(made.step) == {3: 1.0, 4: 0.5, 6: 0.125, 8: 0.03125}[bits]


@pytest.mark.parametrize("bits", [3, 8])
def test_the_grid_with_the_smaller_divergence_is_kept_and_the_integer_form_has_it(bits: int) -> None:
    traced = trace_classifier(spread(TokenNet()), SIZE)
    quant = QuantConfig(softmax="log", weight_bits=8, act_bits=8, layer_act_bits={"softmax*": bits})
    student = quantize_model(traced, quant)
    report = keep_best_grid(student.net, traced, images(), observe)
    assert set(report["kl"]) == {"uniform", "log"} and report["kept"] == min(report["kl"], key=report["kl"].__getitem__)
    assert mean_kl(logits_of(traced, images()), student.net, images()) == report["kl"][report["kept"]]
    for step in (0.0, 1.0):
        for module in student.net.modules():
            if isinstance(module, LogQuantizer):
                module.set_step(step)
        observe(student.net)
        uniform = quantize_model(traced, replace(quant, softmax="uniform"))
        observe(uniform.net)
        same = torch.equal(logits_of(uniform.net, images()), logits_of(student.net, images()))
        assert same == (step == 0.0), "without a step the grid is that of any other activation"
        form = integer_form(student.net)
        torch.testing.assert_close(form(images()), student.net(images()), rtol=1e-4, atol=1e-4)


def images() -> Tensor:
    return torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(1))


def test_engines_have_no_logarithms_and_digests_of_uniform_students_stay() -> None:
    with pytest.raises(ValueError, match=r"quant.softmax.*must be uniform for target onnxruntime.*'log'"):
        QuantConfig(target="onnxruntime", softmax="log")
    plain = RunConfig()
    assert config_digest(plain) == "c6fd6bb4c38d875a"
    assert config_digest(with_overrides(plain, {"quant.softmax": "log"})) != config_digest(plain)
    assert QuantConfig(softmax="log").at_uniform_bits(8).softmax == "log"


@pytest.mark.slow
def test_a_run_with_learned_rounding_trains_and_its_files_are_verified(tmp_path: Path) -> None:
    settings = {
        "synthesis.num_images": 16, "synthesis.shard_size": 16, "synthesis.iterations": 3, "synthesis.start": "white",
        "finetune.epochs": 1, "finetune.batch_size": 8, "evaluation.heldout_images": 16,
        "quant.target": "research", "quant.softmax": "log", "quant.scale_shift": True, "quant.rounding": "adaround",
        "reconstruction.iterations": 10, "reconstruction.batch_size": 8,
    }  # fmt: skip
    run = synq.quantize(
        spread(TokenNet()), weight_bits=4, act_bits=4, input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3,
        config=settings, output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert {"softmax", "scale_shift", "reconstruction"} <= {*run.record.rounding}
    run.export(tmp_path / "out", formats=["packed", "onnx", "torch"])
    assert list((tmp_path / "out").rglob("model.safetensors"))
