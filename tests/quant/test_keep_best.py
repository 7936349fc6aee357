"""Of several changes the one nearest to the teacher stays, from a start that none of the others has touched."""

from collections.abc import Callable

import torch
from torch import nn

from synq.quant.keep_best import keep_best, mean_kl


def test_keep_best_keeps_the_network_of_least_cost() -> None:
    net = nn.Linear(1, 1, bias=False).requires_grad_(False)
    net.weight.fill_(3.0)

    def set_to(value: float) -> Callable[[], object]:
        return lambda: net.weight.add_(value)

    changes = {"none": set_to(0), "near": set_to(-2), "far": set_to(9), "tie": set_to(-2)}
    kept, costs = keep_best(net, changes, lambda: abs(float(net.weight)))
    assert kept == "near" and costs == {"none": 3, "near": 1, "far": 12, "tie": 1} and float(net.weight) == 1
    kept, _ = keep_best(net, {"none": set_to(0), "worse": set_to(1)}, lambda: abs(float(net.weight)))
    assert kept == "none" and float(net.weight) == 1
    told = keep_best(net, {"none": set_to(0), "worse": set_to(1)}, lambda: 0.0, lambda own: {"none": 1.0, "worse": 0.5})
    assert told == ("worse", {"none": 1.0, "worse": 0.5}) and float(net.weight) == 2, "another process decided"


def test_a_student_that_overflows_is_never_near() -> None:
    net = nn.Linear(2, 3)
    x = torch.full((2, 2), 1e30)
    assert mean_kl(torch.zeros(2, 3), net, torch.full((2, 2), float("inf"))) == float("inf")
    assert mean_kl(net(x), net, x) == 0
