"""What CPU tests cannot see: device placement, kernels that differ, host synchronization."""

from pathlib import Path
from typing import Any

import pytest
import torch

import synq
from synq.config.run import RunConfig, with_overrides
from synq.pipeline import run
from synq.quant.fake_quant import choose_qparams, dequantize, fake_quantize, quant_bounds, quantize
from synq.teacher.process_state import process_settings_kept

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("act_points", ["relu", "inputs"])
def test_a_run_on_the_gpu_ends_near_the_one_on_the_cpu(
    tiny_settings: dict[str, Any], tmp_path: Path, precision: str, act_points: str
) -> None:
    config = with_overrides(
        RunConfig(),
        {**tiny_settings, "runtime.precision": precision, "quant.act_points": act_points, "finetune.lr": 1e-9},
    )
    losses = {}
    for device in ("cpu", "cuda"):
        folder = {"runtime.device": device, "runtime.output_dir": str(tmp_path / device)}
        # One set for both: images of one device are not those of another, bit for bit.
        record = run(with_overrides(config, {**folder, "runtime.store_dir": str(tmp_path / "store")}))
        losses[device] = record.loss_history[0]["loss"]
        assert record.status == "completed"
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.5 if precision == "bf16" else 0.1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_quantization_and_codes_agree_on_the_gpu(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 3, 3, 3, generator=generator).cuda()
    bounds = quant_bounds(bits, signed=True)
    low, high = weight.flatten(1).aminmax(dim=1)
    scale, zero_point = choose_qparams(low, high, *bounds)
    fused = fake_quantize(weight, scale, zero_point, *bounds, axis=0)
    assert torch.equal(
        dequantize(quantize(weight, scale, zero_point, *bounds, axis=0), scale, zero_point, axis=0), fused
    )


def test_gradients_per_channel_are_those_of_the_fused_op_on_the_gpu() -> None:
    weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    low, high = (part / 2 for part in weight.detach().flatten(1).aminmax(dim=1))
    scale, zero_point = choose_qparams(low, high, -8, 7)
    pull = torch.randn_like(weight)
    outs = (
        fake_quantize(weight, scale, zero_point, -8, 7, axis=0),
        torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -8, 7),
    )
    assert torch.equal(*outs)
    got, wanted = (torch.autograd.grad(out, weight, pull)[0] for out in outs)
    assert torch.equal(got, wanted) and not torch.equal(got, pull)


def test_a_loss_term_with_constants_on_the_cpu_is_rejected_before_the_run(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    scale = torch.ones(1)

    @synq.loss_term("on_cpu", version="1")
    def term(inputs: synq.LossInputs) -> torch.Tensor:
        return ((inputs.student_logits - inputs.teacher_logits) * scale).square().mean(1)

    given = {"finetune.own_term": "on_cpu", "finetune.own_weight": 1.0, "runtime.device": "cuda"}
    config = with_overrides(RunConfig(), {**tiny_settings, **given, "runtime.output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match=r"`finetune\.own_term` must return .* raised RuntimeError"):
        run(config)
    assert not list(tmp_path.glob("out/run-*/checkpoint.pt"))


@pytest.mark.parametrize("seed", [3, 4])
def test_a_call_of_the_api_leaves_the_generators_of_the_gpu(seed: int) -> None:
    torch.manual_seed(seed)
    torch.cuda.init()
    state = torch.cuda.get_rng_state_all()
    with process_settings_kept():
        torch.manual_seed(0)
        torch.rand(5, device="cuda")
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), state))
