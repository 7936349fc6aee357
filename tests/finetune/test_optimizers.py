"""The clipping of single gradients. (Learned steps: test_lsq.py.)"""

import pytest
import torch
from torch import nn

from synq.finetune.optimizers import MIN_NORM, clip_relative


def _parameter(values: torch.Tensor, gradient: torch.Tensor | None) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter


def test_a_gradient_keeps_its_direction_and_at_most_a_share_of_its_tensors_norm() -> None:
    weight, steep = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    clipped = _parameter(weight, 10 * weight.norm() / steep.norm() * steep)
    flat = _parameter(weight.clone(), 0.01 * weight.norm() / steep.norm() * steep)
    before = flat.grad.clone()  # type: ignore[union-attr]
    clip_relative([clipped, flat], 0.05)
    assert clipped.grad is not None and flat.grad is not None
    assert float(clipped.grad.norm()) == pytest.approx(0.05 * float(weight.norm()), rel=1e-5)
    assert float(torch.cosine_similarity(clipped.grad.flatten(), steep.flatten(), 0)) == pytest.approx(1, abs=1e-6)
    assert torch.equal(flat.grad, before)


@pytest.mark.parametrize("share", [None, 0.05])
def test_vectors_and_what_has_no_gradient_are_left_alone(share: float | None) -> None:
    vector, without = _parameter(torch.zeros(5), torch.ones(5)), _parameter(torch.ones(2, 2), None)
    weight = _parameter(torch.ones(2, 2), torch.ones(2, 2))
    clip_relative([vector, without, weight], share)
    assert vector.grad is not None and torch.equal(vector.grad, torch.ones(5)) and without.grad is None
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(2, 2) * (share or 1))


def test_a_zero_gradient_stays_finite_and_a_zero_weight_can_learn() -> None:
    still, dead = _parameter(torch.ones(2, 2), torch.zeros(2, 2)), _parameter(torch.zeros(2, 2), torch.ones(2, 2))
    clip_relative([still, dead], 0.05)
    assert still.grad is not None and torch.equal(still.grad, torch.zeros(2, 2))
    assert dead.grad is not None and 0 < float(dead.grad.norm()) == pytest.approx(0.05 * MIN_NORM)
