"""Average pools without counted padding and divisors compute the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.export_nets import POOLS
from synq.network.average_pools import ScaledAveragePool, scale_average_pools
from synq.network.tracing import trace_classifier

PLAIN = ("padding not counted, ceil_mode", "plain")


class OnePool(nn.Module):
    """A pool as a module, as a function, or as a function with keywords."""

    def __init__(self, pool: nn.AvgPool2d, spelling: str) -> None:
        super().__init__()
        self.conv, self.pool, self.spelling = nn.Conv2d(3, 4, 1), pool, spelling
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, p = self.conv(x), self.pool
        if self.spelling == "module":
            x = p(x)
        elif self.spelling == "positions":
            x = F.avg_pool2d(
                x, p.kernel_size, p.stride, p.padding, p.ceil_mode, p.count_include_pad, p.divisor_override
            )
        else:
            x = F.avg_pool2d(
                input=x,
                kernel_size=p.kernel_size,
                stride=p.stride,
                divisor_override=p.divisor_override,
                count_include_pad=p.count_include_pad,
                ceil_mode=p.ceil_mode,
                padding=p.padding,
            )
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("spelling", ["module", "positions", "keywords"])
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_l_1_a_pool_with_a_divisor_keeps_its_values(name: str, spelling: str, size: tuple[int, int]) -> None:
    traced = trace_classifier(OnePool(POOLS[name], spelling).requires_grad_(False), (3, *size))
    scaled = copy.deepcopy(traced)
    scale_average_pools(scaled)
    scaled.recompile()
    found = [module for module in scaled.modules() if isinstance(module, ScaledAveragePool)]
    assert bool(found) == (name not in PLAIN)
    assert all(not pool.call["count_include_pad"] and pool.call["divisor_override"] is None for pool in found)
    x = torch.randn(2, 3, *size)
    assert torch.allclose(scaled(x), traced(x), atol=1e-6)
    assert scaled.state_dict().keys() == traced.state_dict().keys(), "the factor is not a tensor of the network"


def test_a_pool_called_for_two_sizes_has_two_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.pool(self.conv(x))).mean((2, 3)))

    traced = trace_classifier(Twice().requires_grad_(False), (3, 9, 12))
    scaled = copy.deepcopy(traced)
    scale_average_pools(scaled)
    scaled.recompile()
    shapes = [tuple(m.factor.shape[2:]) for m in scaled.modules() if isinstance(m, ScaledAveragePool)]
    assert shapes == [(5, 6), (3, 3)]
    x = torch.randn(2, 3, 9, 12)
    assert torch.allclose(scaled(x), traced(x), atol=1e-6)
