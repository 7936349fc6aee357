"""Initial noise: it has the requested spectrum, channel correlation and contrast, and the fit recovers them."""

import json
from dataclasses import asdict
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from synq.network.bn_stats import BatchNormInputs, bn_targets, bns_loss
from synq.synthesis.start_noise import MAX_PROBES, WHITE, StartNoise, fit_start

CPU = torch.device("cpu")


def _white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Edges(nn.Module):
    """Two convolutions with batch norms, whose statistics are those of the images it was `shown`."""

    def __init__(self, shown: Tensor, in_place: bool = False) -> None:
        super().__init__()
        channels = shown.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1, self.conv2 = nn.Conv2d(channels, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.bn1, self.bn2 = (nn.BatchNorm2d(12, momentum=None) for _ in range(2))  # type: ignore[arg-type]
        self.in_place = False
        with torch.no_grad():
            self.train()(shown.clone())
        self.eval().requires_grad_(False)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            images = x.clone()
            x.zero_()
            x = images
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def _fit(
    net: nn.Module, size: tuple[int, int, int], seed: int = 1, form: Literal["std_sum", "var_mean"] = "std_sum"
) -> StartNoise:
    generator = torch.Generator().manual_seed(seed)
    return fit_start(net, size, bn_targets(net), form, generator=generator, device=CPU)


def test_the_defaults_are_white_noise_itself() -> None:
    white = _white(2, 3, 8, 6)
    assert WHITE.apply(white) is white
    almost = StartNoise(exponent=1e-9).apply(white)
    torch.testing.assert_close(almost, white, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (24, 36), (15, 33)])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_amplitude_falls_by_the_exponent(size: tuple[int, int], exponent: float) -> None:
    noise = StartNoise(exponent=exponent).apply(_white(256, 1, *size))
    power = torch.fft.fft2(noise).abs().square().mean((0, 1))
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1]))
    above = frequency > 1 / max(size)  # below it the amplitude is held
    x, y = frequency[above].log(), power[above].log() / 2
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-exponent, abs=0.03)
    lowest = power[frequency <= 1 / max(size) + 1e-6]
    assert lowest.max() / lowest.min() < 1.7, "the mean and the lowest frequency have one amplitude"


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_correlate_and_contrast_is_the_deviation(correlation: float, channels: int) -> None:
    noise = StartNoise(exponent=0.5, correlation=correlation, contrast=(0.6,)).apply(_white(512, channels, 16, 12))
    values = noise.transpose(0, 1).flatten(1)
    found = torch.corrcoef(values)
    torch.testing.assert_close(found, found.new_full(found.shape, correlation).fill_diagonal_(1), rtol=0, atol=0.03)
    torch.testing.assert_close(values.std(1), torch.full((channels,), 0.6), rtol=0.03, atol=0)


def _distance(net: nn.Module, noise: StartNoise, white: Tensor) -> float:
    with torch.no_grad(), BatchNormInputs(net) as inputs:
        net(noise.apply(white).clone())
        return bns_loss(inputs.take(), bn_targets(net), "std_sum").item()


@pytest.mark.parametrize(
    "truth",
    [
        StartNoise(exponent=1.5, correlation=0.9),
        pytest.param(StartNoise(exponent=0.5, correlation=0.5, contrast=(0.5, 0.5, 0.5)), marks=pytest.mark.slow),
        pytest.param(StartNoise(exponent=2.0, contrast=(0.7, 1.0, 1.3)), marks=pytest.mark.slow),
        StartNoise(exponent=1.0, correlation=0.8, contrast=(0.25, 0.25, 0.25), mean=(0.48, 0.45, 0.4)),
    ],
)
@pytest.mark.parametrize("form", ["std_sum", pytest.param("var_mean", marks=pytest.mark.slow)])
def test_the_fit_finds_noise_near_what_a_network_was_shown(
    truth: StartNoise, form: Literal["std_sum", "var_mean"]
) -> None:
    size = (3, 24, 20)
    net = Edges(truth.apply(_white(2048, *size)))
    found, unseen = _fit(net, size, form=form), _white(512, *size, seed=9)
    assert len(found.contrast) == len(found.mean) == 3
    near, white = _distance(net, found, unseen), _distance(net, WHITE, unseen)
    assert near < 0.15 * white
    shown, made = truth.apply(unseen), found.apply(unseen)
    torch.testing.assert_close(made.mean((0, 2, 3)), shown.mean((0, 2, 3)), rtol=0, atol=0.15)


def test_the_exponent_is_found_where_the_network_reveals_it() -> None:
    """Of one channel, many filters of different size leave nothing else to explain what they saw."""
    found = []
    for exponent in (0.5, 1.0, 1.5):
        noise = StartNoise(exponent=exponent, contrast=(0.7,))
        found.append(_fit(Edges(noise.apply(_white(2048, 1, 16, 16))), (1, 16, 16)))
    assert [noise.exponent for noise in found] == pytest.approx([0.5, 1.0, 1.5], abs=0.3)
    assert all(noise.correlation == 0.0 for noise in found), "there is nothing to correlate with"


def test_white_noise_stays_where_nothing_is_nearer() -> None:
    size = (3, 24, 20)
    net = Edges(_white(MAX_PROBES, *size, seed=1))  # the very probes of the fit
    assert _fit(net, size) == WHITE


def test_the_generator_decides_and_the_teacher_stays() -> None:
    size = (3, 12, 12)
    net = Edges(StartNoise(exponent=1.0, correlation=0.7).apply(_white(512, *size)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    first = _fit(net, size)
    torch.manual_seed(3)
    assert _fit(net, size) == first
    torch.set_rng_state(state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in net.modules())


def test_a_teacher_that_changes_its_input_gets_a_copy() -> None:
    size = (3, 12, 12)
    shown = StartNoise(exponent=1.0, correlation=0.7).apply(_white(512, *size))
    assert _fit(Edges(shown, in_place=True), size) == _fit(Edges(shown), size) != WHITE


def test_a_teacher_without_finite_logits_gets_white_noise_which_the_optimization_rejects() -> None:
    size = (3, 8, 8)
    net = Edges(_white(64, *size))
    net.conv1.weight.mul_(float("nan"))
    assert _fit(net, size) == WHITE


@pytest.mark.parametrize("variance", [10.0, 300.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_that_diverges_keeps_the_best_it_has_seen(variance: float, seed: int) -> None:
    """Statistics that no noise of these parameters has: the line search diverges and must keep the best parameters."""
    size = (3, 12, 12)
    net = Edges(_white(64, *size))
    for norm in (net.bn1, net.bn2):
        norm.running_var.copy_(variance * (0.5 + torch.rand(12, generator=torch.Generator().manual_seed(seed))))
    found = _fit(net, size, seed, "var_mean")
    assert found != WHITE
    assert _distance(net, found, _white(128, *size, seed=5)) < _distance(net, WHITE, _white(128, *size, seed=5))


def test_numbers_survive_json() -> None:
    noise = StartNoise(exponent=1.5, correlation=0.9, contrast=(0.5, 1.0, 2.0), mean=(0.1, 0.0, -0.1))
    assert StartNoise.from_values(json.loads(json.dumps(asdict(noise)))) == noise
