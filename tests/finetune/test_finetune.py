"""Fine-tuning: the loss of the very images, no side effects, faults that name themselves."""

import copy
import dataclasses
import gc
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from support.finetune_tools import CONFIG, images, labels, networks, taps, train
from synq.finetune.loop import NonFiniteLossError, finetune
from synq.finetune.responses import teacher_response
from synq.finetune.training_loss import harder_images, training_loss
from synq.losses import difficulty, feature_loss
from synq.quant.layers import QuantConv2d, QuantLinear
from synq.synthesis.lowpass import gaussian_lowpass


def test_loss_falls_and_weights_move(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    config = dataclasses.replace(CONFIG, epochs=15)
    student, history = train(tiny_classifier, accelerator, config)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert [h["epoch"] for h in history] == list(range(1, 16))
    moved = [
        (a - b).abs().max()
        for a, b in zip(student.net.parameters(), networks(tiny_classifier)[0].net.parameters(), strict=True)
    ]
    assert min(moved) > 0


def test_teacher_statistics_and_ranges_stay(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    student, teacher = networks(tiny_classifier)
    before = {name: copy.deepcopy(n.net.state_dict()) for name, n in (("student", student), ("teacher", teacher))}
    finetune(student, teacher, images(), labels(), CONFIG, accelerator=accelerator, seed=1)
    after = teacher.net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before["teacher"].items())
    for key, value in student.net.state_dict().items():
        if "running" in key or "act_quantizers" in key or "clip_ratio" in key:
            assert torch.equal(value, before["student"][key]), key
    assert not student.net.training and not [m for m in student.net.modules() if m.training]


def test_frozen_batchnorm_scale_and_shift(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    student, _ = train(tiny_classifier, accelerator, dataclasses.replace(CONFIG, train_bn=False))
    before = networks(tiny_classifier)[0].net.state_dict()
    bns = [name for name, m in student.net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert bns and all(torch.equal(student.net.state_dict()[f"{b}.weight"], before[f"{b}.weight"]) for b in bns)


def test_the_relative_clip_bounds_what_weights_move(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    def moved(share: float | None) -> float:
        config = dataclasses.replace(CONFIG, grad_clip_relative=share, weight_decay=0.0)
        student, _ = train(tiny_classifier, accelerator, config)
        start = networks(tiny_classifier)[0].net.parameters()
        pairs = zip(student.net.parameters(), start, strict=True)
        return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs if a.dim() > 1)

    assert moved(1e-6) < 1e-3 * moved(None)


def test_cached_teacher_equals_live_teacher(tiny_classifier: nn.Module) -> None:
    _, teacher = networks(tiny_classifier, torch.float64)
    x, y = images().double(), labels()
    whole = teacher_response(teacher, x, y)
    part = teacher_response(teacher, x[3:7], y[3:7])
    torch.testing.assert_close(whole[0][3:7], part[0])
    assert whole[1] is not None and part[1] is not None
    torch.testing.assert_close(whole[1][3:7], part[1])
    assert not whole[0].requires_grad and not whole[1].requires_grad


def test_masks_labels_and_maps_are_of_the_filtered_view(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Trap 10: the difficulty of the unfiltered images gives another mask, and must not be what is used."""
    student, teacher = networks(tiny_classifier)
    x, y = images(), labels()
    filtered = gaussian_lowpass(x, 0.8)
    with torch.no_grad():
        deltas = {"raw": difficulty(teacher.net(x)[0], y), "filtered": difficulty(teacher.net(filtered)[0], y)}
    tau = float(deltas["filtered"].median())
    kept = {name: float((delta <= tau).float().mean()) for name, delta in deltas.items()}
    assert kept["raw"] != kept["filtered"], "the two views must differ for this test to say anything"
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=20, difficulty_threshold=tau)
    history = finetune(student, teacher, filtered, y, config, accelerator=accelerator, seed=0)
    assert history[0]["kept"] == pytest.approx(kept["filtered"])


def test_student_map_uses_the_quantized_classifier_and_no_gradient_reaches_it_through_the_map(
    tiny_classifier: nn.Module,
) -> None:
    student, teacher = networks(tiny_classifier)
    x, y = images(), labels()
    config = dataclasses.replace(CONFIG, kd_weight=0.0, ce_weight=0.0)
    for parameter in student.net.parameters():
        parameter.requires_grad_(True)
    loss, terms = training_loss(student.net, student, teacher_response(teacher, x, y), x, y, config)
    loss.backward()
    linear = next(m for m in student.net.modules() if isinstance(m, QuantLinear))
    conv = next(m for m in student.net.modules() if isinstance(m, QuantConv2d))
    assert linear.weight.grad is not None and not linear.weight.grad.any(), "alpha is detached"
    assert conv.weight.grad is not None and conv.weight.grad.abs().max() > 0
    assert float(loss.detach()) == pytest.approx(5.0 * float(terms["cam"]))


def test_hooks_do_not_accumulate(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Trap 5: hooks registered each step and never removed."""
    student, _ = train(tiny_classifier, accelerator)
    hooks = [m for m in student.net.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooks and all(not p._backward_hooks for p in student.net.parameters())


@pytest.mark.parametrize(("term", "options"), [("kd", {}), ("cam", {"kd_weight": 0.0}), ("gradient norm", {})])
def test_non_finite_terms_stop_with_their_name(
    tiny_classifier: nn.Module, accelerator: Accelerator, term: str, options: dict[str, float]
) -> None:
    student, teacher = networks(tiny_classifier)
    linear = next(m for m in teacher.net.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        if term == "kd":
            linear.bias.fill_(float("nan"))
        elif term == "cam":
            linear.weight.mul_(1e30)
        else:
            bias = next(m for m in student.net.modules() if isinstance(m, QuantLinear)).bias
            bias.requires_grad_(True).register_hook(lambda g: g * math.inf)
    config = dataclasses.replace(CONFIG, log_every=1, **options)
    with pytest.raises(NonFiniteLossError, match=rf"^{term} is (nan|inf) before the first update: .*quant.act_bits"):
        finetune(student, teacher, images(), labels(), config, accelerator=accelerator, seed=0)


def test_a_loss_that_training_makes_non_finite_names_the_learning_rate(
    tiny_classifier: nn.Module, accelerator: Accelerator
) -> None:
    student, teacher = networks(tiny_classifier)
    config = dataclasses.replace(CONFIG, log_every=1, lr=1e30, grad_clip=None)
    with pytest.raises(NonFiniteLossError, match=r" became (nan|inf) in epoch \d, step <= \d+\. Lower finetune.lr"):
        finetune(student, teacher, images(), labels(), config, accelerator=accelerator, seed=0)


def test_bf16_with_a_cam_by_autograd(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 7), nn.Hardswish(), nn.Linear(7, 5),
    )  # fmt: skip
    student, teacher = networks(net.eval().requires_grad_(False))
    assert student.cam_site.kind == "autograd"
    history = finetune(student, teacher, images(), labels(), CONFIG, accelerator=accelerator, seed=0, bf16=True)
    assert history[0]["cam"] > 0


def test_under_bf16_maps_and_logits_of_the_teacher_are_float32(tiny_classifier: nn.Module) -> None:
    """Rounded to bfloat16 on one side only, equal networks would have unequal maps."""
    _, teacher = networks(tiny_classifier)
    with torch.autocast("cpu", torch.bfloat16):
        logits, maps, *_ = teacher_response(teacher, images(), labels())
        own = teacher.response(teacher.net(images()), labels()).cam
    assert logits.dtype == torch.float32 and maps is not None and maps.dtype == torch.float32
    assert torch.equal(maps, own.detach())


def test_the_map_alone_still_gives_every_parameter_a_gradient(tiny_classifier: nn.Module) -> None:
    """DDP waits for all of them."""
    student, teacher = networks(tiny_classifier)
    for parameter in student.net.parameters():
        parameter.requires_grad_(True)
    config = dataclasses.replace(CONFIG, kd_weight=0.0, ce_weight=0.0)
    x, y = images(), labels()
    training_loss(student.net, student, teacher_response(teacher, x, y), x, y, config)[0].backward()
    assert all(p.grad is not None for p in student.net.parameters())


def test_cam_can_be_off(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    _, history = train(tiny_classifier, accelerator, dataclasses.replace(CONFIG, cam_weight=0.0))
    assert history[0]["cam"] == 0.0


@pytest.mark.slow  # some 20 seconds of a C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_trains_what_an_eager_one_does(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Rounding apart, in the first epoch; later a weight that crosses a rounding boundary sends the runs apart."""
    eager, before = train(copy.deepcopy(tiny_classifier), accelerator)
    compiled, after = train(copy.deepcopy(tiny_classifier), accelerator, compiled=True)
    assert not torch.equal(next(eager.net.parameters()), next(networks(tiny_classifier)[0].net.parameters()))
    for term in ("loss", "kd", "ce", "cam", "gradient norm"):
        assert after[0][term] == pytest.approx(before[0][term], rel=1e-3)
    for name, value in eager.net.named_parameters():
        torch.testing.assert_close(compiled.net.get_parameter(name), value, atol=1e-2, rtol=1e-2)


def test_memory_does_not_grow_with_epochs(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Trap 5 in bytes: tensors that live on after one epoch are those that live on after ten."""

    def alive(epochs: int) -> int:
        counts: list[int] = []
        gc.collect()
        gc.freeze()  # what is there before takes no part in it, and no time

        def count(epoch: dict[str, float]) -> None:
            gc.collect()
            counts.append(sum(issubclass(type(part), Tensor) for part in gc.get_objects()))

        train(copy.deepcopy(tiny_classifier), accelerator, dataclasses.replace(CONFIG, epochs=epochs), on_epoch=count)
        return counts[-1]

    alive(1)
    few = alive(1)
    assert few > 0 and alive(10) <= few + 2


def test_feature_alignment_brings_the_blocks_nearer(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Alone, so that no other term can have done it."""
    student, teacher = taps(tiny_classifier, weight_bits=2)
    config = dataclasses.replace(CONFIG, epochs=15, kd_weight=0.0, ce_weight=0.0, cam_weight=0.0, feature_weight=1.0)
    history = finetune(student, teacher, images(), labels(), config, accelerator=accelerator, seed=1)
    with torch.no_grad():
        goal = teacher_response(teacher, images(), labels())
        found = student.response(student.net(images()), labels())
    assert history[-1]["features"] < 0.8 * history[0]["features"]
    assert history[-1]["loss"] == pytest.approx(history[-1]["features"])
    assert float(feature_loss(found.blocks, goal.blocks).mean()) < 0.8 * history[0]["features"]


def test_the_average_is_what_is_measured_and_kept(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    """Against an average counted by hand over the weights of a run without one: averaging must not change the
    training.
    """
    config = dataclasses.replace(CONFIG, epochs=5, batch_size=20, ema_decay=0.6)  # one step an epoch
    trail: list[Tensor] = []
    student, teacher = networks(copy.deepcopy(tiny_classifier))
    weight = next(student.net.parameters())
    start = weight.detach().clone()
    plain = dataclasses.replace(config, ema_decay=None)
    finetune(
        student, teacher, images(), labels(), plain, accelerator=accelerator, seed=1,
        on_epoch=lambda epoch: trail.append(weight.detach().clone()),
    )  # fmt: skip
    average, wanted = start, []
    for step, value in enumerate(trail):
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * value
        wanted.append(average)
    seen: list[Tensor] = []
    student, teacher = networks(copy.deepcopy(tiny_classifier))
    weight = next(student.net.parameters())
    finetune(
        student, teacher, images(), labels(), config, accelerator=accelerator, seed=1,
        on_epoch=lambda epoch: seen.append(weight.detach().clone()),
    )  # fmt: skip
    for found, expected in zip(seen, wanted, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight.detach(), wanted[-1])


def test_harder_images_are_harder_and_leave_no_gradient(tiny_classifier: nn.Module) -> None:
    student, teacher = networks(tiny_classifier)
    x, y = images(), labels()
    for parameter in student.net.parameters():
        parameter.requires_grad_(True)
    harder, logits = harder_images(student, teacher, x, y, 0.05)
    assert float((harder - x).abs().max()) == pytest.approx(0.05, rel=1e-4)
    with torch.no_grad():
        assert difficulty(student.net(harder)[0], y).mean() > difficulty(student.net(x)[0], y).mean()
        torch.testing.assert_close(logits, teacher.net(harder)[0])
    assert all(parameter.grad is None for parameter in student.net.parameters())
