"""Learned scales in fine-tuning: they move, resume bit-equal and stay positive."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from support.lsq_tools import SIZE, Steps, images, student_of
from synq.config.run import FinetuneConfig
from synq.finetune.loop import finetune
from synq.finetune.optimizers import make_optimizer
from synq.finetune.responses import TappedNetwork
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier, with_features
from synq.quant.fusion import fuse_rectified
from synq.quant.layers import ActQuantizer, QuantConv2d, step_parameters
from synq.quant.lsq import SMALLEST_STEP
from synq.quant.student import Student, observe_ranges


def train(
    net: nn.Module, steps: Steps, fused: bool = True, run: dict[str, Any] | None = None, **options: Any
) -> tuple[Student, nn.Module]:
    """The student after a short fine-tuning, and what it was before."""
    traced = trace_classifier(net, SIZE)
    site, made = locate_cam(traced), student_of(net, steps)
    before = copy.deepcopy(made.net)
    net_with = with_features(made.net, made.cam_node)
    if fused:
        assert fuse_rectified(net_with) == 2
    student = TappedNetwork(net=net_with, cam_site=site)
    teacher = TappedNetwork(net=with_features(traced, site.node), cam_site=site)
    config = dataclasses.replace(FinetuneConfig(epochs=4, batch_size=8, lr=1e-2, cam_weight=1.0), **options)
    finetune(
        student,
        teacher,
        images(),
        torch.arange(24) % 5,
        config,
        accelerator=Accelerator(cpu=True),
        seed=1,
        **(run or {}),
    )
    return made, before


@pytest.mark.parametrize("steps", ["activations", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_move_in_a_fine_tuning_and_zero_points_stay(
    tiny_classifier: nn.Module, steps: Steps, optimizer: Literal["sgd", "adam"]
) -> None:
    made, before = train(tiny_classifier, steps, optimizer=optimizer)
    pairs = list(zip(step_parameters(made.net), step_parameters(before), strict=True))
    assert all(bool((now != then).any()) and bool((now > 0).all()) for now, then in pairs)
    state = made.net.state_dict()
    zero_points = [name for name in state if name.endswith("zero_point")]
    assert zero_points and all(torch.equal(state[name], before.state_dict()[name]) for name in zero_points)


def test_a_killed_fine_tuning_of_steps_resumes_bit_equal(tiny_classifier: nn.Module, tmp_path: Path) -> None:
    whole = train(tiny_classifier, "all")[0].net.state_dict()

    class KilledError(Exception):
        pass

    def kill(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train(tiny_classifier, "all", run={"checkpoint": tmp_path / "c.pt", "on_epoch": kill})
    resumed = train(tiny_classifier, "all", run={"checkpoint": tmp_path / "c.pt"})[0].net.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_factor_of_zero_leaves_the_steps_and_the_weights_still_learn(tiny_classifier: nn.Module) -> None:
    made, before = train(tiny_classifier, "all", step_lr_factor=0.0)
    assert all(torch.equal(a, b) for a, b in zip(step_parameters(made.net), step_parameters(before), strict=True))
    weights = [m for m in made.net.modules() if isinstance(m, QuantConv2d)]
    then = [m for m in before.modules() if isinstance(m, QuantConv2d)]
    assert not torch.equal(weights[0].weight, then[0].weight)


def test_joined_relus_change_nothing_in_training(tiny_classifier: nn.Module) -> None:
    joined, apart = (train(tiny_classifier, "all", fused=fused, epochs=1)[0].net for fused in (True, False))
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_huge_update_leaves_every_step_positive(tiny_classifier: nn.Module) -> None:
    net = student_of(tiny_classifier, "all").net
    first = [step.detach().clone() for step in step_parameters(net)]
    optimizer = make_optimizer(net, FinetuneConfig(lr=1e3, momentum=0.0))
    for step in step_parameters(net):
        step.grad = torch.ones_like(step)
    optimizer.step()
    for step, start in zip(step_parameters(net), first, strict=True):
        torch.testing.assert_close(step.detach(), start * SMALLEST_STEP)


def test_groups_of_the_optimizer(tiny_classifier: nn.Module) -> None:
    net = student_of(tiny_classifier, "all").net
    net.requires_grad_(True)
    step = step_parameters(net)[0]
    step.requires_grad_(False)
    groups = make_optimizer(net, FinetuneConfig(lr=0.5, step_lr_factor=0.1, weight_decay=0.3)).param_groups
    assert [(g["lr"], g["lr_factor"], g["weight_decay"]) for g in groups] == [(0.5, 1.0, 0.3), (0.05, 0.1, 0.0)]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in step_parameters(net)[1:]]
    both = {id(p) for group in groups for p in group["params"]}
    assert both == {id(p) for p in net.parameters()} - {id(step)}
    assert len(make_optimizer(student_of(tiny_classifier, "none").net, FinetuneConfig()).param_groups) == 1


def test_double_precision_and_layout_keep_the_steps(tiny_classifier: nn.Module) -> None:
    made = student_of(tiny_classifier, "all", observed=False)
    made.net.to(torch.float64).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    observe_ranges(made.net, images().double(), act_range="mse")
    made.net.requires_grad_(True)(images().double()).sum().backward()
    for quantizer in (m for m in made.net.modules() if isinstance(m, ActQuantizer)):
        assert quantizer.scale.dtype == torch.float64 == quantizer.scale.grad.dtype  # type: ignore[union-attr]
