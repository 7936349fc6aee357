"""Attention that is to look like blobs, and low frequencies first."""

import dataclasses

import pytest
import torch
from torch import nn

from support.token_nets import SIZE, TokenNet, spread
from synq.config.run import SynthesisConfig
from synq.network.tracing import trace_classifier
from synq.synthesis.attention_prior import AttentionPrior, random_maps
from synq.synthesis.inversion import Inversion, invert
from synq.synthesis.lowpass import STAGES, StagedLowpass
from synq.synthesis.structure import StructureTerms, structure_weights


def made(prior_weight: float | None, *, token: bool = True, depth: int = 2) -> Inversion:
    net = spread(TokenNet(depth=depth, token=token))
    config = SynthesisConfig(
        num_images=4,
        iterations=30,
        prior_weight=prior_weight,
        head_weight=0.0,
        entropy_weight=0.0,
        variation_weight=0.0,
    )
    graph, generator = trace_classifier(net, SIZE), torch.Generator().manual_seed(0)
    weights = structure_weights(config, has_statistics=False)
    structure = StructureTerms(graph, weights, generator) if weights.any else None
    return invert(net, torch.arange(4), SIZE, {}, config=config, generator=generator, structure=structure)


@pytest.mark.parametrize("token", [True, False])
def test_attention_comes_closer_to_the_maps(token: bool) -> None:
    net = spread(TokenNet(depth=2, token=token))
    prior = AttentionPrior(trace_classifier(net, SIZE), torch.Generator().manual_seed(0))
    assert len(prior.names) == 1, "the deeper half of two"
    strong = made(1.0, token=token)
    assert float(strong.history[-1]) < 0.8 * float(strong.history[0])
    assert strong.terms["prior"] > 0 and "prior" not in made(None, token=token).terms


def test_a_map_is_its_own_optimum() -> None:
    net = spread(TokenNet())
    prior = AttentionPrior(trace_classifier(net, SIZE), torch.Generator().manual_seed(0))
    maps = random_maps(3, 2, 4, 4, torch.Generator().manual_seed(0))
    whole = torch.zeros(3, 2, 17, 17)
    whole[..., 0, 1:] = maps / 20  # the class token keeps the rest for itself
    assert float(prior([whole])) == pytest.approx(0, abs=1e-10)
    assert float(prior([torch.full((3, 2, 17, 17), 1 / 17)])) > 0.1


@pytest.mark.parametrize("heads", [1, 2])
def test_each_image_has_its_own_maps(heads: int) -> None:
    """Also where a single head has an axis of its own."""
    graph = trace_classifier(spread(TokenNet(depth=1)), SIZE)
    together = AttentionPrior(graph, torch.Generator().manual_seed(0))
    chosen = together._chosen[0]
    together._chosen = [dataclasses.replace(chosen, nodes=dataclasses.replace(chosen.nodes, heads=heads))]
    values = torch.rand(3, heads, 17, 17, generator=torch.Generator().manual_seed(1))
    total = float(together([values]))
    maps = together._maps[0]
    share = values[:, :, 0, 1:] / values[:, :, 0, 1:].mean(-1, keepdim=True)
    assert total == pytest.approx(float((share - maps.reshape(3, heads, 16)).square().mean()), rel=1e-5)


def test_random_maps_have_one_to_five_blobs_and_mean_one() -> None:
    maps = random_maps(50, 4, 14, 14, torch.Generator().manual_seed(0))
    assert maps.shape == (50, 4, 196) and (maps >= 0).all()
    assert torch.allclose(maps.mean(-1), torch.ones(50, 4), atol=1e-5)
    assert 0.05 < float((maps > 1).float().mean()) < 0.6 and len(maps.flatten(0, 1).unique(dim=0)) == 200
    assert torch.equal(maps, random_maps(50, 4, 14, 14, torch.Generator().manual_seed(0)))


def test_low_frequencies_come_first_and_stay() -> None:
    noise = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    lowpass = StagedLowpass(40, 40, torch.device("cpu"))
    shares = []
    for stage in range(len(STAGES)):
        once = lowpass(noise, stage / len(STAGES))
        assert torch.allclose(once, lowpass(once, stage / len(STAGES)), atol=1e-5), "passed again unchanged"
        assert torch.allclose(once.mean((-2, -1)), noise.mean((-2, -1)), atol=1e-5)
        shares.append(float(once.var() / noise.var()))
    small = StagedLowpass(3, 7, torch.device("cpu"))(torch.randn(1, 1, 3, 7), 1.0)
    assert float(small.std(-1).min()) > 0 and float(small.std(-2).min()) > 0, "not constant, however few pixels"
    assert shares == sorted(shares) and shares[0] == pytest.approx(torch.pi * 0.2**2 / 4, rel=0.3)
    assert torch.equal(lowpass(noise, 1.0), lowpass(noise, 0.8))


def test_images_of_low_first_have_no_high_frequencies() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5)).eval()
    kinds = {}
    for low_first in (False, True):
        config = SynthesisConfig(num_images=4, iterations=10, low_first=low_first)
        generator = torch.Generator().manual_seed(0)
        kinds[low_first] = invert(net, torch.arange(4), SIZE, {}, config=config, generator=generator).images
    power = {kind: torch.fft.fft2(images).abs().square().mean((0, 1)) for kind, images in kinds.items()}
    assert float(power[True][8, 8]) < 1e-6 * float(power[False][8, 8])


def test_low_first_is_for_pixels() -> None:
    with pytest.raises(ValueError, match=r"synthesis.low_first.*must be false unless.*inversion, zeroq"):
        SynthesisConfig(method="genie", low_first=True)
