"""Blocks of a graph: where it can be cut, and which of the cuts are the outputs of blocks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from synq.network.blocks import block_ends, cut_nodes
from synq.network.tracing import trace_classifier
from synq.teacher.cifar_resnet import CifarResNet


class Branched(nn.Module):
    """Stem, one residual block, one block of two branches joined by cat, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.inner(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


def names(nodes: list[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


def test_branches_hold_no_cut() -> None:
    traced = trace_classifier(Branched(), (3, 8, 8))
    assert names(cut_nodes(traced)) == [
        *("x", "stem", "relu", "add", "cat", "relu_2", "adaptive_avg_pool2d", "flatten", "head")
    ]
    assert names(block_ends(traced)) == ["relu", "add", "relu_2", "head"]


def part(traced: fx.GraphModule, nodes: list[fx.Node], last: fx.Node, cut: fx.Node | None = None) -> fx.GraphModule:
    """Return the network of ``nodes`` up to ``last`` with the input ``cut``; fails if a node reads another tensor."""
    graph = fx.Graph()
    values = {} if cut is None else {cut: graph.placeholder("cut")}
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        if node is last:
            break
    graph.output(values[last])
    return fx.GraphModule(traced, graph)


def test_every_cut_is_the_only_input_of_the_rest() -> None:
    """The rest of the graph computes the logits from the tensor at a cut alone."""
    traced = trace_classifier(Branched(), (3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    for cut in cut_nodes(traced):
        rest = nodes[nodes.index(cut) + 1 :]
        middle = part(traced, nodes, cut)(images)
        logits = part(traced, rest, nodes[-1], cut)(middle) if rest else middle
        torch.testing.assert_close(logits, traced(images))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (torchvision.models.resnet18, 10),  # stem, 8 residual blocks, logits
        (torchvision.models.mobilenet_v2, None),
        (torchvision.models.densenet121, None),
    ],
)
def test_blocks_of_known_networks(model: type[nn.Module], count: int | None) -> None:
    traced = trace_classifier(model(weights=None), (3, 64, 64))
    ends = block_ends(traced)
    place = {node: number for number, node in enumerate(traced.graph.nodes)}
    layers = [
        n
        for n in traced.graph.nodes
        if n.op == "call_module" and isinstance(traced.get_submodule(n.target), nn.Conv2d | nn.Linear)
    ]
    edges = [-1, *(place[end] for end in ends)]
    held = [sum(low < place[layer] <= high for layer in layers) for low, high in itertools.pairwise(edges)]
    assert min(held) >= 1 and sum(held) == len(layers), "every layer lies in exactly one block"
    assert count is None or len(ends) == count


def test_blocks_of_a_cifar_resnet_end_in_their_relus() -> None:
    traced = trace_classifier(CifarResNet(depth=8, num_classes=10, in_channels=3, width=16), (3, 32, 32))
    ends = block_ends(traced)
    assert len(ends) == 5 and all("relu" in name for name in names(ends)[:-1])
