"""The methods of synthesis: each lowers its loss, depends on its seed only, labels its images, keeps the teacher."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from synq.config.run import SynthesisConfig
from synq.config.synthesis import SYNTHESIS_METHODS
from synq.losses import inception_loss
from synq.network.bn_stats import BatchNormInputs, bn_targets, bns_loss
from synq.synthesis.image_sources import LatentSource, make_source
from synq.synthesis.inversion import Inversion, _draw_views, invert, mirror_roll
from synq.synthesis.swing import draw_swings

SIZE = (3, 12, 9)
LABELS = torch.arange(15) % 5
OPTIMIZING = tuple(method for method in SYNTHESIS_METHODS if method != "gaussian")
QUICK = {"iterations": 6, "latent_dim": 16, "lr": 0.5}


def _run(net: nn.Module, size: tuple[int, int, int] = SIZE, labels: Tensor = LABELS, seed: int = 0, **settings: object):
    config = SynthesisConfig(**{**QUICK, **settings})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return invert(net, labels, size, bn_targets(net), config=config, generator=generator)


def _measured(net: nn.Module, made: Inversion) -> tuple[Tensor, float]:
    """Logits and distance of statistics of finished images, by themselves."""
    with torch.no_grad(), BatchNormInputs(net) as inputs:
        logits = net(made.images)
        return logits, bns_loss(inputs.take(), bn_targets(net), "std_sum").item()


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
@pytest.mark.parametrize("swing_conv", [False, True])
def test_terms_are_those_of_the_images(tiny_classifier: nn.Module, method: str, swing_conv: bool) -> None:
    """Of the finished images, without views and without swing."""
    made = _run(tiny_classifier, method=method, swing_conv=swing_conv, inception_weight=0.3, bns_weight=0.7)
    assert made.images.shape == (15, *SIZE) and made.images.dtype == torch.float32 and made.images.is_contiguous()
    assert made.history.shape == (0 if method == "gaussian" else 6,)
    logits, bns = _measured(tiny_classifier, made)
    assert made.terms["bns"] == pytest.approx(bns, rel=1e-4)
    inception = inception_loss(logits, made.labels, 0.0).mean().item()
    assert made.terms["inception"] == pytest.approx(inception, rel=1e-4)
    class_loss = 0.3 * inception if method in ("inversion", "gdfq", "genie") else 0.0
    assert made.terms["total"] == pytest.approx(0.7 * bns + class_loss, rel=1e-4)
    assert made.num_agree == (logits.argmax(1) == made.labels).sum()


@pytest.mark.parametrize("method", OPTIMIZING)
@pytest.mark.parametrize("schedule", ["cosine", pytest.param("plateau", marks=pytest.mark.slow)])
def test_the_loss_falls(tiny_classifier: nn.Module, method: str, schedule: str) -> None:
    made = _run(tiny_classifier, method=method, schedule=schedule, iterations=60, inception_weight=0.5)
    assert made.history[-5:].mean() < 0.5 * made.history[0]
    start = _run(tiny_classifier, method=method, iterations=0, inception_weight=0.5)
    assert made.terms["bns"] < 0.5 * start.terms["bns"]


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
def test_seed_decides_and_global_state_does_not(tiny_classifier: nn.Module, method: str) -> None:
    first = _run(tiny_classifier, method=method, swing_conv=True)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = _run(tiny_classifier, method=method, swing_conv=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.images, first.images) and again.terms == first.terms
    assert torch.equal(again.labels, first.labels) and torch.equal(again.history, first.history)
    assert not torch.equal(_run(tiny_classifier, method=method, swing_conv=True, seed=1).images, first.images)


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
def test_the_teacher_stays_as_it_was(tiny_classifier: nn.Module, method: str) -> None:
    tiny_classifier.requires_grad_(True)
    before = {name: value.clone() for name, value in tiny_classifier.state_dict().items()}
    _run(tiny_classifier, method=method, swing_conv=True)
    assert all(torch.equal(value, before[name]) for name, value in tiny_classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_classifier.parameters())
    assert not any(part._forward_pre_hooks or "forward" in vars(part) for part in tiny_classifier.modules())


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
def test_labels_are_assigned_or_the_teachers_predictions(tiny_classifier: nn.Module, method: str) -> None:
    made = _run(tiny_classifier, method=method)
    assert made.labels.dtype == torch.int64
    if method in ("zeroq", "gaussian"):
        assert torch.equal(made.labels, _measured(tiny_classifier, made)[0].argmax(1)) and made.num_agree == 15
        assert not torch.equal(made.labels, LABELS), "the case needs predictions that differ from the assigned labels"
    else:
        assert torch.equal(made.labels, LABELS)


@pytest.mark.parametrize("method", OPTIMIZING)
def test_class_loss_counts_where_labels_are_assigned(tiny_classifier: nn.Module, method: str) -> None:
    plain = _run(tiny_classifier, method=method).images
    for change in ({"inception_weight": 5.0}, {"hard_sample_gamma": 2.0, "inception_weight": 0.5}):
        base = plain if len(change) == 1 else _run(tiny_classifier, method=method, inception_weight=0.5).images
        changed = _run(tiny_classifier, method=method, **change).images
        assert torch.equal(changed, base) == (method == "zeroq")


@pytest.mark.parametrize("method", ["gdfq", "genie"])
def test_classes_are_learned(tiny_classifier: nn.Module, method: str) -> None:
    settings = {"method": method, "inception_weight": 1.0, "bns_weight": 0.001, "augment": "none"}
    start = _run(tiny_classifier, iterations=0, **settings)
    made = _run(tiny_classifier, iterations=120, generator_lr=0.05, **settings)
    assert made.terms["inception"] < 0.5 * start.terms["inception"]
    assert start.num_agree <= 5 and made.num_agree >= 8


@pytest.mark.parametrize("method", ["gdfq", "genie"])
@pytest.mark.parametrize("size", [(3, 8, 8), (3, 9, 30), (3, 17, 11), (3, 33, 32)])
def test_generators_serve_any_size(tiny_classifier: nn.Module, method: str, size: tuple[int, int, int]) -> None:
    made = _run(tiny_classifier, size, LABELS[:4], method=method, iterations=2)
    assert made.images.shape == (4, *size) and made.images.isfinite().all()


@pytest.mark.parametrize("method", ["gdfq", "genie"])
def test_gray_images_and_a_single_one(gray_classifier: nn.Module, method: str) -> None:
    assert _run(gray_classifier, (1, 8, 8), method=method).images.shape == (15, 1, 8, 8)
    assert _run(gray_classifier, (1, 8, 8), LABELS[:1], method=method).images.isfinite().all()


@pytest.mark.parametrize("method", ["gdfq", "genie"])
def test_images_of_one_class_differ(tiny_classifier: nn.Module, method: str) -> None:
    made = _run(tiny_classifier, method=method, iterations=30)
    for label in range(5):
        same = made.images[made.labels == label]
        assert len(same) == 3 and same.std(0).mean() > 0.1


def test_gaussian_is_the_noise(tiny_classifier: nn.Module) -> None:
    made = _run(tiny_classifier, method="gaussian")
    assert torch.equal(made.images, torch.randn((15, *SIZE), generator=torch.Generator().manual_seed(0)))


def test_gdfq_makes_fresh_images_each_time_and_genie_the_same() -> None:
    pairs = {}
    for method in ("gdfq", "genie"):
        config = SynthesisConfig(method=method, latent_dim=8)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        source = make_source(LABELS, SIZE, config=config, generator=generator, device=torch.device("cpu"))
        pairs[method] = [source.images().detach() for _ in range(2)]
    assert not torch.equal(*pairs["gdfq"]) and torch.equal(*pairs["genie"])


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_genie_follows_a_plain_loop_with_one_schedule_for_both_rates(tiny_classifier: nn.Module, schedule: str) -> None:
    settings = {"method": "genie", "swing_conv": False, "augment": "none", "iterations": 10, "latent_dim": 8}
    settings |= {"lr": 2.0, "generator_lr": 0.3, "schedule": schedule, "plateau_patience": 1, "plateau_factor": 0.5}
    made = _run(tiny_classifier, **settings)
    config = SynthesisConfig(**settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    source = LatentSource(15, SIZE, config=config, generator=generator, device=torch.device("cpu"))
    (_, _, latents), (_, _, weights) = source.groups
    groups = [{"params": latents, "lr": 2.0}, {"params": weights, "lr": 0.3}]
    optimizer = torch.optim.Adam(groups, fused=False, foreach=False)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, eps=0.0)
    history, rates = [], set()
    for _ in range(10):
        with BatchNormInputs(tiny_classifier) as inputs:
            loss = 0.05 * nn.functional.cross_entropy(tiny_classifier(source.images()), LABELS)
            loss = loss + bns_loss(inputs.take(), bn_targets(tiny_classifier), "std_sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step() if schedule == "cosine" else plateau.step(loss.detach())
        history.append(loss.item())
        rates.add(optimizer.param_groups[1]["lr"])
    assert len(rates) > 1, "the case needs a rate that falls"
    torch.testing.assert_close(made.history, torch.tensor(history), rtol=1e-2, atol=1e-3)


def test_each_step_swings_anew_as_a_plain_loop_with_padding_and_cropping(tiny_classifier: nn.Module) -> None:
    settings = {"method": "zeroq", "augment": "none", "lr": 0.05}
    made = _run(tiny_classifier, swing_conv=True, **settings)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((15, *SIZE), generator=generator).requires_grad_()
    shifts = [step[0] for step in draw_swings(tiny_classifier, 6, generator)]
    assert len(set(shifts)) > 3, "the case needs shifts that differ"
    optimizer = torch.optim.Adam([pixels], lr=0.05)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    history = []
    for down, right in shifts:

        def moved(layer: nn.Module, args: tuple[Tensor], down: int = down, right: int = right) -> tuple[Tensor]:
            padded = nn.functional.pad(args[0], (1, 1, 1, 1), mode="reflect")
            return (padded[:, :, 1 + down : 13 + down, 1 + right : 10 + right],)

        hook = cast(nn.Sequential, tiny_classifier)[3].register_forward_pre_hook(moved)
        with BatchNormInputs(tiny_classifier) as inputs:
            tiny_classifier(pixels)
            loss = bns_loss(inputs.take(), bn_targets(tiny_classifier), "std_sum")
        hook.remove()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        history.append(loss.item())
    torch.testing.assert_close(made.history, torch.tensor(history), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.images, pixels.detach(), rtol=1e-3, atol=1e-3)
    still = _run(tiny_classifier, swing_conv=False, **settings)
    assert (still.history - made.history).abs().max() > 0.01, "the case needs a swing that shows"


@pytest.mark.parametrize("seed", [0, 1])
def test_inversion_is_bit_for_bit_the_plain_loop_on_pixels(tiny_classifier: nn.Module, seed: int) -> None:
    """The order of random draws and operations: sets of an earlier version keep their keys, and so their images."""
    made = _run(tiny_classifier, seed=seed, iterations=12, augment="flip_shift")
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn((15, *SIZE), generator=generator).contiguous(memory_format=torch.channels_last)
    pixels.requires_grad_()
    pixels.grad = torch.empty_like(pixels)
    views = _draw_views(SynthesisConfig(augment="flip_shift"), False, 12, *SIZE[1:], generator)
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([pixels], lr=rate, fused=True)
    history = []
    with BatchNormInputs(tiny_classifier) as inputs:
        for step, view in enumerate(views):
            seen = mirror_roll(pixels, *view)
            logits = tiny_classifier(seen.clone() if seen is pixels else seen)
            loss = 0.05 * inception_loss(logits, LABELS, 0.0).mean()
            loss = loss + 1.0 * bns_loss(inputs.take(), bn_targets(tiny_classifier), "std_sum")
            pixels.grad.copy_(torch.autograd.grad(loss, pixels)[0])
            optimizer.step()
            rate.fill_(0.5 * 0.5 * (1 + math.cos(math.pi * (step + 1) / 12)))
            history.append(loss.item())
    assert made.history.tolist() == history
    assert torch.equal(made.images, pixels.detach())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("inversion", r"^`synthesis\.lr` must keep .* total = nan with lr 0\.5; lower it, or"),
        ("zeroq", r"^`synthesis\.lr` must keep .* total = nan with lr 0\.5; lower it, or"),
        ("gdfq", r"^`synthesis\.generator_lr` must keep .* total = nan with generator_lr 0\.01; lower it, or"),
        (
            "genie",
            r"^`synthesis\.lr` and `synthesis\.generator_lr` must .* with lr 0\.5, generator_lr 0\.01; lower them",
        ),
        ("gaussian", r"^`teacher` must give finite values on noise, but got total = nan$"),
    ],
)
def test_divergence_names_the_rates_of_the_method(tiny_classifier: nn.Module, method: str, message: str) -> None:
    cast(nn.Sequential, tiny_classifier)[0].weight.mul_(float("nan"))
    with pytest.raises(ValueError, match=message):
        _run(tiny_classifier, method=method, iterations=2)
