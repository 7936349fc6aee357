"""Each perturbation does what its docstring states, reproducibly, and leaves its input unchanged."""

import pytest
import torch
from torch import Tensor

from synq.evaluation import harder_views
from synq.sweeps.studies import perturbations
from synq.sweeps.studies.fidelity_study import VIEWS

pytestmark = pytest.mark.usefixtures("torch_rng_untouched")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_feature_distance_by_hand() -> None:
    wanted = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    got = perturbations.feature_distance(wanted, wanted + torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]]))
    assert got.tolist() == pytest.approx([1 / 25, 0])


def net(x: Tensor) -> Tensor:
    """A teacher of three classes with a curved boundary."""
    return torch.stack([x.mean((1, 2, 3)), x[:, 0].square().mean((1, 2)) - 1, x[:, 1, 2:5].sum((1, 2)) / 9], 1)


IMAGES = torch.tensor([1.0, 2.0, 0.5])[None, :, None, None] * draw(24, 3, 8, 12) + 0.5


LABELS = torch.arange(24) % 3


@pytest.mark.parametrize("name", VIEWS)
def test_view_is_new_the_same_again_and_leaves_its_input(name: str) -> None:
    before = IMAGES.clone()
    first, again = (VIEWS[name](IMAGES, LABELS, net, generator()) for _ in range(2))
    assert torch.equal(IMAGES, before) and torch.equal(first, again)
    assert first.shape == IMAGES.shape and first.dtype == IMAGES.dtype and torch.isfinite(first).all()
    assert (name == "plain") == torch.equal(first, IMAGES)
    assert not first.requires_grad


def test_partner_is_of_another_class_and_every_such_image_occurs() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2])
    seen: dict[int, set[int]] = {i: set() for i in range(5)}
    for seed in range(60):
        for i, j in enumerate(harder_views.partners(labels, generator(seed)).tolist()):
            seen[i].add(j)
    assert seen == {0: {3, 4}, 1: {3, 4}, 2: {3, 4}, 3: {0, 1, 2, 4}, 4: {0, 1, 2, 3}}
    assert harder_views.partners(torch.zeros(3, dtype=torch.int64), generator()).tolist() == [1, 2, 0]


def test_mixed_blends_image_by_image() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None].expand(3, 1, 2, 2)
    partner = torch.tensor([1, 2, 0])
    assert harder_views.mixed(x, partner, 0.25)[:, 0, 0, 0].tolist() == [1.75, 3.5, 1.75]
    assert harder_views.mixed(x, partner, torch.tensor([0.0, 0.5, 1.0]))[:, 0, 1, 1].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("area", [0.25, 0.5])
def test_cut_and_erased_pixels_are_one_rectangle_of_the_area(area: float) -> None:
    partner = harder_views.partners(LABELS, generator())
    cut = perturbations.cut_mixed(IMAGES, partner, area, generator(1))
    hole = perturbations.erased(IMAGES, area, generator(1))
    changed = (cut != IMAGES).all(1)
    assert torch.equal(cut[:, 0][changed], IMAGES[partner][:, 0][changed]), "the pixels are the partner's"
    assert torch.equal((hole != IMAGES).all(1), changed), "one stream, one place"
    mean = IMAGES.mean((0, 2, 3))
    assert torch.allclose(hole.permute(0, 2, 3, 1)[changed], mean, atol=1e-6)
    side = (round(8 * area**0.5), round(12 * area**0.5))
    for mask in changed:
        rows, columns = mask.any(1), mask.any(0)
        assert (int(rows.sum()), int(columns.sum()), int(mask.sum())) == (*side, side[0] * side[1])
    assert len({tuple(mask.flatten().tolist()) for mask in changed}) > 5, "each image has a place of its own"


def test_noise_is_measured_in_the_images_own_deviation() -> None:
    added = perturbations.noisy(IMAGES, 0.5, generator()) - IMAGES
    assert (added.std((0, 2, 3)) / IMAGES.std((0, 2, 3))).tolist() == pytest.approx([0.5] * 3, rel=0.1)
    soft = perturbations.shaded(IMAGES, 0.5, generator()) - IMAGES
    assert (soft.std((0, 2, 3)) / IMAGES.std((0, 2, 3))).tolist() == pytest.approx([0.5] * 3, rel=0.1)
    step = [(x[..., 1:] - x[..., :-1]).square().mean() for x in (soft, added)]
    assert step[0] < 0.5 * step[1], "1/f noise is smooth"
    drowned = perturbations.drowned(IMAGES, 0.0, generator())
    assert torch.allclose(drowned.mean((0, 2, 3)), IMAGES.mean((0, 2, 3)), atol=0.2)
    assert torch.allclose(drowned.std((0, 2, 3)), IMAGES.std((0, 2, 3)), rtol=0.1)


def test_faded_keeps_the_mean_and_halves_the_deviation() -> None:
    half = perturbations.faded(IMAGES, 0.5)
    assert torch.allclose(half.mean((0, 2, 3)), IMAGES.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(half.std((0, 2, 3)), IMAGES.std((0, 2, 3)) / 2)


def test_reweighted_spectrum_falls_by_frequency() -> None:
    power = (
        torch.fft.rfft2(perturbations.reweighted(IMAGES) - IMAGES.mean((0, 2, 3), keepdim=True)).abs().square().mean(0)
    )
    for channel in power:
        assert channel[0, 1] / channel[0, 4] == pytest.approx(16, rel=0.5), "amplitude 1/f is power 1/f^2"


def test_zoomed_is_a_part_of_the_image() -> None:
    ramp = torch.linspace(0, 1, 33)[None, None, None].expand(6, 1, 33, 33).contiguous()
    part = perturbations.zoomed(ramp, 0.5, generator())
    span = part[:, 0, 0, -1] - part[:, 0, 0, 0]
    assert span.tolist() == pytest.approx([0.5] * 6, abs=0.02)
    assert part.min() >= 0 and part.max() <= 1 and len(set(part[:, 0, 0, 0].tolist())) == 6
    assert torch.allclose(perturbations.zoomed(ramp, 1.0, generator()), ramp, atol=1e-5)


def test_adversarial_step_lowers_confidence_by_a_step_of_the_size_said() -> None:
    before = net(IMAGES).softmax(1).amax(1)
    moved = perturbations.adversarial(IMAGES, net, 0.05)
    after = net(moved).softmax(1).gather(1, net(IMAGES).argmax(1, keepdim=True))[:, 0]
    assert (after < before).all()
    steps = (moved - IMAGES).abs() / IMAGES.std((0, 2, 3), correction=0)[None, :, None, None]
    assert steps[steps > 1e-3].tolist() == pytest.approx([0.05] * int((steps > 1e-3).sum()), rel=1e-3)


def test_boundary_image_is_where_the_answer_changes() -> None:
    partner = harder_views.partners(net(IMAGES).argmax(1), generator())
    found = perturbations.on_boundary(IMAGES, partner, net, steps=12)
    assert torch.equal(net(found).argmax(1), net(IMAGES).argmax(1))
    gaps = [x.softmax(1).topk(2).values for x in (net(found), net(IMAGES))]
    assert (gaps[0][:, 0] - gaps[0][:, 1]).max() < 0.01 < (gaps[1][:, 0] - gaps[1][:, 1]).mean()
