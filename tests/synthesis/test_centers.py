"""Calibration centers: how classes are batched, which layers are deep, and that unequal batches pool rightly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from synq.network.bn_stats import BatchNormInputs, ChannelStatistics
from synq.synthesis.centers import center_targets, deep_layers, pack_statistics, split_evenly, unpack_statistics


@given(st.integers(1, 3000), st.integers(1, 300))
def test_even_split(num_items: int, largest: int) -> None:
    parts = split_evenly(num_items, largest)
    sizes = [len(part) for part in parts]
    assert [index for part in parts for index in part] == list(range(num_items))
    assert max(sizes) <= largest and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-num_items // largest)


def test_257_images_are_not_256_and_1() -> None:
    assert sorted(len(part) for part in split_evenly(257, 256)) == [128, 129]


@pytest.mark.parametrize(
    ("depth", "expected"), [(0, ""), (0.01, "i"), (0.5, "efghi"), (1 / 3, "ghi"), (1, "abcdefghi")]
)
def test_deep_layers(depth: float, expected: str) -> None:
    assert "".join(deep_layers(list("abcdefghi"), depth)) == expected


def test_centers_of_unequal_batches_are_those_of_one_batch() -> None:  # trap 8
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    images = torch.randn(3, 2, 4, 4) + torch.tensor([0.0, 0.0, 5.0]).view(3, 1, 1, 1)
    with BatchNormInputs(net) as inputs, torch.no_grad():
        parts = []
        for batch in images.split([2, 1]):
            net(batch)
            parts.append(inputs.take())
        net(images)
        whole = inputs.take()
    pooled = center_targets(parts, 0.5)
    assert list(pooled) == ["2"]
    torch.testing.assert_close(pooled["2"].mean, whole["2"].mean)
    torch.testing.assert_close(pooled["2"].variance, whole["2"].variance)


def test_statistics_survive_a_file() -> None:
    names = ["layer10.bn.deep", "a", *(f"x{index}" for index in range(12))]
    statistics = {name: ChannelStatistics(torch.rand(3), torch.rand(3), 1e-5, 1_000_003) for name in names}
    packed = pack_statistics(statistics)
    back = unpack_statistics(dict(reversed(packed.items())))
    assert list(back) == names
    for name in names:
        assert torch.equal(back[name].mean, statistics[name].mean)
        assert torch.equal(back[name].variance, statistics[name].variance)
        assert back[name][2:] == (1e-5, 1_000_003)
