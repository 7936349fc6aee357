from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import reference
from synq.losses import cam_loss
from synq.network.gradcam import autograd_weights, cam_map, cam_weights, closed_form_weights


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(channels: int, pool: int, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    linear = nn.Linear(channels * pool * pool, classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(pool), nn.Flatten(), linear).double()


@pytest.mark.parametrize(
    ("pool", "height", "width"), [(1, 8, 8), (1, 5, 7), (2, 8, 8), (2, 4, 6), (3, 6, 9), (2, 5, 7)]
)
def test_closed_form_is_grad_cam(pool: int, height: int, width: int) -> None:
    # (2, 5, 7): the cells overlap and differ in size; each is still a mean, so the closed form still holds.
    net = head(6, pool)
    features = randn(4, 6, height, width).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2])
    want = autograd_weights(net(features), features, labels, retain_graph=False)
    got = closed_form_weights(net[2].weight, labels, 6, pool * pool, height * width)
    torch.testing.assert_close(got, want, atol=1e-15, rtol=1e-12)
    assert not got.requires_grad and not want.requires_grad


def test_autograd_weights_against_finite_differences() -> None:
    # A head with a non-linearity after the pool, where the closed form does not hold.
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.Hardswish(), nn.Linear(8, 4)
    ).double()
    features = randn(2, 3, 2, 2).requires_grad_()
    labels = torch.tensor([1, 3])
    got = autograd_weights(net(features), features, labels, retain_graph=False)
    step = 1e-6
    with torch.no_grad():
        for n in range(2):
            for k in range(3):
                moved = features.detach().clone()
                moved[n, k] += step  # all positions at once: the sum of their derivatives
                slope = (net(moved) - net(features))[n, labels[n]] / step
                assert float(got[n, k]) == pytest.approx(float(slope) / 4, rel=1e-4)


def test_map_against_twin_under_autocast_too() -> None:
    features, alpha = randn(3, 4, 5, 6), randn(3, 4, seed=1)
    got = cam_map(features, alpha)
    for image, weights, one in zip(features.tolist(), alpha.tolist(), got, strict=True):
        torch.testing.assert_close(one, torch.tensor(reference.cam(image, weights), dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        cast = cam_map(features.float(), alpha.float())
        mixed = cam_map(features.bfloat16(), alpha.float())
    assert cast.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(cast, got.float(), atol=1e-5, rtol=1e-5)


def test_autograd_weights_leave_no_trace() -> None:
    net = head(6, 1)
    stem = nn.Conv2d(3, 6, 3).double()
    seen: list[Tensor] = []
    handles = [p.register_hook(lambda g: seen.append(g)) for p in (*net.parameters(), *stem.parameters())]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    features = stem(randn(2, 3, 8, 8))
    logits = net(features)
    autograd_weights(logits, features, torch.tensor([0, 1]), retain_graph=True)
    # No parameter's gradient is made, so a DDP reducer, which hooks there, sees one backward pass a step.
    assert not seen
    assert all(p.grad is None for p in (*net.parameters(), *stem.parameters()))
    assert not features._backward_hooks and all(not m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    logits.sum().backward()  # the graph was retained
    assert len(seen) == len(handles)


@pytest.mark.parametrize("level", [0.0, 1e-30, 1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_maps_give_finite_loss_and_gradient(level: float, dtype: torch.dtype) -> None:
    # Trap 4: dividing a map by its own range is 0 / 0 here.
    features = torch.full((2, 3, 4, 4), level, dtype=dtype, requires_grad=True)
    alpha = torch.ones(2, 3, dtype=dtype)
    teacher = cam_map(torch.full((2, 3, 4, 4), level, dtype=dtype), alpha)
    loss = cam_loss(teacher, cam_map(features, alpha)).sum()
    (gradient,) = torch.autograd.grad(loss, features)
    assert float(loss.detach()) == 0.0
    assert bool(torch.isfinite(gradient).all())


def test_maps_are_raw() -> None:
    # A teacher twice as bright is another map. Normalized maps would call the two equal.
    features, alpha = randn(2, 3, 4, 4).abs(), torch.ones(2, 3, dtype=torch.float64)
    got = cam_loss(cam_map(2 * features, alpha), cam_map(features, alpha))
    torch.testing.assert_close(got, cam_map(features, alpha).square().sum(dim=(1, 2)))


def test_closed_form_rejects_a_layer_of_another_size() -> None:
    # MobileNetV2-like slip: the classifier's own width in place of the features'.
    with pytest.raises(ValueError, match=r"num_channels \* pool_cells = 6 \* 4, but got 6"):
        closed_form_weights(torch.zeros(5, 6), torch.tensor([0]), 6, 4, 64)


def test_gradient_flows_to_the_features_and_not_to_the_classifier() -> None:
    weight = randn(5, 6).requires_grad_()
    features = randn(2, 6, 4, 4).requires_grad_()
    maps = cam_map(F.relu(features), closed_form_weights(weight, torch.tensor([0, 1]), 6, 1, 16))
    maps.sum().backward()
    assert features.grad is not None and float(features.grad.abs().sum()) > 0
    assert weight.grad is None


def test_the_three_methods_by_hand() -> None:
    features = torch.ones(1, 2, 2, 2)
    gradient = torch.tensor([0.5, -1.0])[None, :, None, None].expand(1, 2, 2, 2)
    assert cam_weights(features, gradient, "gradcam").tolist() == [[0.5, -1.0]]
    assert cam_weights(features, gradient, "cam").tolist() == [[2.0, -4.0]]
    # 4 positions of 0.25 / (0.5 + 0.125 * 4) * 0.5; the negative gradient counts nothing
    assert cam_weights(features, gradient, "gradcam++").tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "cam"])
def test_one_number_per_channel_is_a_constant_gradient(method: Literal["gradcam", "gradcam++", "cam"]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(3, 5, 4, 6, generator=generator)
    gradient = torch.randn(3, 5, 1, 1, generator=generator)
    whole = cam_weights(features, gradient.expand(3, 5, 4, 6), method)
    torch.testing.assert_close(cam_weights(features, gradient, method), whole)


def test_gradcam_plus_plus_is_the_share_that_higher_derivatives_of_exp_give() -> None:
    """alpha_ij = d2/dA2 / (2 d2/dA2 + sum A d3/dA3) of exp(logit), the derivatives taken by autograd."""
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(1, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 2, generator=generator, dtype=torch.float64)

    def score(a: Tensor) -> Tensor:
        return (a * weight).sum().exp()

    total = 0.0
    for position in range(4):
        derivatives = []
        value = score(features)
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, features, create_graph=True)
            value = slope.flatten()[position]
            derivatives.append(value)
        first, second, third = derivatives
        share = second / (2 * second + features.sum() * third)
        total = total + share * (first / score(features)).relu()
    found = cam_weights(features, weight[None, None], "gradcam++")
    torch.testing.assert_close(found[0, 0], total.detach())


def test_gradcam_plus_plus_stays_bounded_where_features_are_signed() -> None:
    """At g sum A = -2 the formula has a pole, which SiLU's negative values could meet."""
    features = torch.full((1, 1, 7, 7), -0.25)
    for slope in (0.16, 0.163, 0.1633, 0.17):
        weight = cam_weights(features, torch.full((1, 1, 1, 1), slope), "gradcam++")
        assert float(weight) == pytest.approx(49 * slope / 2)


def test_gradcam_plus_plus_of_a_zero_gradient_is_zero() -> None:
    features = torch.ones(1, 2, 2, 2)
    gradient = torch.tensor([0.0, 0.5])[None, :, None, None]
    assert cam_weights(features, gradient, "gradcam++").tolist() == [[0.0, 0.5]]


def test_a_cam_has_no_relu() -> None:
    features, alpha = torch.ones(1, 1, 2, 2), torch.tensor([[-2.0]])
    assert cam_map(features, alpha).unique().tolist() == [0.0]
    assert cam_map(features, alpha, rectified=False).unique().tolist() == [-2.0]
