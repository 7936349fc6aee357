"""Learned rounding of networks of any shape: every layer belongs to one block, and the whole comes nearer."""

import itertools
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.adaround_tools import (
    CPU,
    QUICK,
    SIZE,
    Bottlenecks,
    layers_of,
    smooth,
    student_of,
    traced_of,
    within_reach,
)
from synq.network.blocks import block_ends, segment
from synq.quant.adaround import _Block, reconstruct, student_cuts
from synq.quant.transformer.block_metric import BlockMetric

Points = Literal["relu", "inputs"]


class Dense(nn.Module):
    """As DenseNet: each layer reads all before it, a transition, and a head that asks for the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(2))
        self.norm, self.transition = nn.BatchNorm2d(14), nn.Conv2d(14, 8, 1, bias=False)
        self.last, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        x = F.avg_pool2d(self.transition(F.relu(self.norm(x))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.last(x)), 1)
        return self.fc(x.view(x.size(0), -1))


class Tied(nn.Module):
    """One convolution in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(F.relu(self.stem(x)))))
        return self.fc(F.relu(self.bn2(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("act_points", [pytest.param("relu", marks=pytest.mark.slow), "inputs"])
@pytest.mark.parametrize(
    ("net", "ends"),
    [
        (Bottlenecks, ["stem_2", "add", "add_1", "fc"]),
        (Dense, ["conv0", "cat", "relu_2", "relu_3", "fc"]),
        (Tied, ["relu", "relu_1", "relu_2", "fc"]),
    ],
)
def test_any_graph(net: type[nn.Module], ends: list[str], act_points: Points) -> None:
    traced, images = traced_of(net), smooth(48, SIZE, 0)
    student = student_of(traced, images, (2, 4), act_points=act_points)
    cuts = student_cuts(student, block_ends(traced))
    with torch.no_grad():
        whole = images
        seen: set[str] = set()
        for start, end in itertools.pairwise(cuts):
            part = segment(student, start, end)
            whole = part(whole)
            seen |= set(layers_of(part))
        assert torch.equal(whole, student(images)) and seen == set(layers_of(student))
        before = float(BlockMetric()(student(images), traced(images)))
    report = reconstruct(student, traced, images, replace(QUICK, drop_prob=0.0), seed=0, device=CPU)
    assert [block.block for block in report.blocks] == ends
    assert sum(block.kept for block in report.blocks) >= len(ends) - (2 if net is Tied else 1)
    with torch.no_grad():
        assert float(BlockMetric()(student(images), traced(images))) < before
    learned: set[nn.Module] = set()
    for block, start, end in zip(report.blocks, cuts, cuts[1:], strict=False):
        for layer in set(layers_of(segment(student, start, end)).values()) - learned:
            assert not block.kept or within_reach(layer)
            learned.add(layer)


def test_a_layer_of_two_blocks_is_learned_in_the_first() -> None:
    traced, images = traced_of(Tied), smooth(48, SIZE, 0)
    student = student_of(traced, images, (2, 4))
    ends = student_cuts(student, block_ends(traced))
    first, second = (segment(student, ends[i], ends[i + 1]) for i in (1, 2))
    shared = student.get_submodule("conv")
    assert shared in set(first.modules()) and shared in set(second.modules())
    done = set(_Block(first, set()).roundings)
    assert done == {shared.weight} and not _Block(second, done).roundings
    report = reconstruct(student, traced, images, QUICK, seed=0, device=CPU)
    assert report.blocks[1].changed > 0 and report.blocks[2].changed == 0
