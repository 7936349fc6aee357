"""The optimization of one shard: against a plain reference, without side effects, finite at its edges."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synq.config.run import SynthesisConfig
from synq.network.bn_stats import BatchNormInputs, bn_targets, bns_loss
from synq.synthesis.inversion import CosineLr, PlateauLr, _draw_views, invert, mirror_roll

SIZE = (2, 8, 6)


class Net(nn.Module):
    """Convolution, BN, ReLU twice, with activations as functions; logits times `sharpness`."""

    def __init__(self, channels: int = 2, sharpness: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 3)
        self.sharpness = sharpness
        self.train()
        with torch.no_grad():  # Running statistics of something that is not the noise inversion starts from.
            for _ in range(30):
                self.forward(0.5 * torch.randn(16, channels, 8, 8) + 0.5)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.sharpness * self.linear(x.mean((2, 3)))


def _run(net: nn.Module, size: tuple[int, int, int] = SIZE, seed: int = 0, **settings: object):
    config = SynthesisConfig(**{"iterations": 20, **settings})
    labels = torch.arange(6) % 3
    generator = torch.Generator().manual_seed(seed)
    return invert(net, labels, size, bn_targets(net), config=config, generator=generator)


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_follows_a_plain_adam_with_a_plain_schedule(schedule: str) -> None:
    """Fused Adam on channels_last pixels with a device learning rate, against unfused Adam and its schedulers."""
    net = Net()
    # With this large learning rate the loss oscillates; otherwise there is no plateau, and the test could not fail.
    made = _run(
        net,
        augment="flip_shift",
        schedule=schedule,
        iterations=12,
        lr=1.0,
        plateau_patience=1,
        bns_weight=0.7,
        inception_weight=0.3,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((6, *SIZE), generator=generator)
    views = _draw_views(SynthesisConfig(augment="flip_shift"), False, 12, *SIZE[1:], generator)
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=1.0, fused=False, foreach=False)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12) if schedule == "cosine" else None
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.1, eps=0.0)
    history, rates = [], []
    for flip, (down, right) in views:
        view = images.flip(-1) if flip else images
        view = torch.roll(view, (down, right), (2, 3))
        with BatchNormInputs(net) as inputs:
            loss = 0.3 * F.cross_entropy(net(view), torch.arange(6) % 3)
            loss = loss + 0.7 * bns_loss(inputs.take(), bn_targets(net), "std_sum")
        optimizer.zero_grad()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if cosine is not None:
            cosine.step()
        else:
            plateau.step(loss.detach())
        history.append(loss.item())
    assert rates[0] == 1.0 and len(set(rates)) >= 2, "the case needs a rate that falls before the last step"
    torch.testing.assert_close(made.history, torch.tensor(history), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.images, images.detach(), rtol=1e-2, atol=1e-2)
    assert made.images.is_contiguous()


def test_cosine_is_cosine_annealing() -> None:
    rate = CosineLr(0.5, 10, torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    slow = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(10):
        assert rate.lr.item() == pytest.approx(optimizer.param_groups[0]["lr"])
        rate.step(torch.tensor(1.0))
        optimizer.step()
        slow.step()
    assert rate.lr.item() == pytest.approx(0.0, abs=1e-9)


def test_plateau_is_reduce_lr_on_plateau() -> None:
    losses = torch.cat([torch.linspace(5, 1, 9), torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.99])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5, factor=0.1, eps=0.0)
    plateau = PlateauLr(0.5, 5, 0.1, torch.device("cpu"))
    seen = set()
    for loss in losses:
        plateau.step(loss)
        scheduler.step(loss)
        seen.add(round(plateau.lr.item(), 12))
        assert plateau.lr.item() == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(seen) > 4


def test_losses_fall_and_the_terms_are_those_of_the_images() -> None:
    net = Net(sharpness=10.0)
    made = _run(net, iterations=60, lr=0.1, inception_weight=1.0)
    assert made.history[-5:].mean() < 0.3 * made.history[0]
    assert made.num_agree == 6
    labels = torch.arange(6) % 3
    with BatchNormInputs(net) as inputs:
        logits = net(made.images)
        bns = bns_loss(inputs.take(), bn_targets(net), "std_sum").item()
    assert made.terms["bns"] == pytest.approx(bns, rel=1e-4)
    assert made.terms["inception"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert made.terms["total"] == pytest.approx(made.terms["bns"] + made.terms["inception"], rel=1e-5)


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 5, 12), (3, 7, 9)])
@pytest.mark.parametrize("augment", ["none", "flip_shift"])
def test_any_channels_and_shape(size: tuple[int, int, int], augment: str) -> None:
    made = _run(Net(size[0]), size, augment=augment)
    assert made.images.shape == (6, *size) and made.images.dtype == torch.float32
    assert made.history[-1] < made.history[0]


def test_seed_decides_and_global_state_does_not() -> None:
    net = Net()
    first = _run(net).images
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(_run(net).images, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(_run(net, seed=1).images, first)


def test_zero_iterations_give_the_noise() -> None:
    made = _run(Net(), iterations=0)
    assert torch.equal(made.images, torch.randn((6, *SIZE), generator=torch.Generator().manual_seed(0)))


def test_leaves_nothing_in_the_teacher() -> None:  # trap 5
    net = Net().requires_grad_(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    _run(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_hard_samples_stay_finite_at_certainty(gamma: float) -> None:  # trap 3
    net = Net(sharpness=1e6)
    noise = torch.randn((6, *SIZE), generator=torch.Generator().manual_seed(0))
    labels = net(noise).argmax(1)
    assert (net(noise).softmax(1).gather(1, labels[:, None]) == 1).all(), "the case needs p == 1 exactly"
    config = SynthesisConfig(iterations=5, hard_sample_gamma=gamma, augment="none")
    generator = torch.Generator().manual_seed(0)
    made = invert(net, labels, SIZE, bn_targets(net), config=config, generator=generator)
    assert made.images.isfinite().all() and made.history.isfinite().all()


@pytest.mark.parametrize("augment", ["none", "flip_shift"])
def test_a_teacher_that_normalizes_in_place_gets_a_copy(augment: str) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.1).div_(0.5))

    class OutOfPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub(0.1).div(0.5))

    class Plain(Net):
        pass

    targets = bn_targets(Plain())
    made = []
    for net in (InPlace(), OutOfPlace()):
        net.load_state_dict(Plain().state_dict())
        config = SynthesisConfig(iterations=20, augment=augment)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        made.append(invert(net, torch.arange(6) % 3, SIZE, targets, config=config, generator=generator))
    assert torch.equal(made[0].images, made[1].images) and made[0].terms == made[1].terms


def test_divergence_is_named() -> None:
    net = Net()
    net.linear.weight.mul_(float("inf"))
    with pytest.raises(ValueError, match=r"`synthesis.lr` must keep the optimization finite, but got total = nan"):
        _run(net, iterations=2)


def test_second_target_moves_the_deep_layer() -> None:
    net = Net()
    targets = bn_targets(net)
    with BatchNormInputs(net) as inputs:
        net(1 - 2 * torch.rand((6, *SIZE), generator=torch.Generator().manual_seed(7)))
        goal = {"bn2": inputs.take()["bn2"]}
    config = SynthesisConfig(iterations=60, lr=0.1, center_weight=50.0)
    labels = torch.arange(6) % 3
    near = []
    for centers in (None, goal):
        generator = torch.Generator().manual_seed(0)
        made = invert(net, labels, SIZE, targets, config=config, generator=generator, center_targets=centers)
        near.append(bns_loss(made.statistics, goal, "std_sum").item())
        assert (made.terms["centers"] == 0) == (centers is None)
    assert near[1] < 0.5 * near[0]
    assert made.terms["centers"] == pytest.approx(near[1], rel=1e-4)


def test_reports_every_step() -> None:
    net, seen = Net(), []
    config = SynthesisConfig(iterations=4)
    made = invert(
        net,
        torch.tensor([0, 1]),
        SIZE,
        bn_targets(net),
        config=config,
        generator=torch.Generator().manual_seed(0),
        on_iteration=lambda done, loss: seen.append((done, loss.item())),
    )
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert [loss for _, loss in seen] == made.history.tolist()


def test_views_keep_every_pixel() -> None:
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    assert torch.equal(mirror_roll(x, False, (0, 0)), x)
    assert torch.equal(mirror_roll(x, True, (0, 0)), x.flip(-1))
    assert torch.equal(mirror_roll(x, False, (1, -2))[0, :, 1, 0], x[0, :, 0, 2])
    assert sorted(mirror_roll(x, True, (1, 2)).flatten().tolist()) == sorted(x.flatten().tolist())
    views = _draw_views(SynthesisConfig(augment="flip_shift"), False, 400, 32, 16, torch.Generator().manual_seed(0))
    assert {flip for flip, _ in views} == {False, True}
    assert {down for _, (down, _) in views} == set(range(-4, 5)) and {right for _, (_, right) in views} == set(
        range(-2, 3)
    )
    assert _draw_views(SynthesisConfig(), False, 2, 32, 32, torch.Generator()) == [(False, (0, 0))] * 2
    shifted = _draw_views(SynthesisConfig(), True, 400, 32, 16, torch.Generator().manual_seed(0))
    assert not any(flip for flip, _ in shifted) and len({shift for _, shift in shifted}) > 30
