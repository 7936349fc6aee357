"""A captured graph serves again for a network that differs in values only, and for no other."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from support.placed_students import placed
from synq.engines.aten import capture as module
from synq.engines.aten.capture import capture
from synq.engines.aten.capture_key import capture_key
from synq.engines.lowering import lower
from synq.engines.simulation import Simulation

SIZE = (3, 8, 8)
IMAGES = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A folded and an own batch norm, a pool, and tensors that the forward pass reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 5)
        self.pool, self.last = nn.MaxPool2d(2), nn.BatchNorm2d(4)
        self.register_buffer("offset", torch.rand(1, 4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.last(self.pool(torch.relu(self.norm(self.conv(x))))) + self.offset)
        return self.fc(x.flatten(1))


def student(seed: int) -> fx.GraphModule:
    torch.manual_seed(seed)
    net = Net()
    for norm in (net.norm, net.last):
        nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return placed(net, SIZE, IMAGES, weight_bits=4 + seed, act_bits=4)


@pytest.fixture(autouse=True)
def none_kept(monkeypatch: pytest.MonkeyPatch) -> dict[object, object]:
    """Graphs that earlier tests captured are no part of these."""
    forms: dict[object, object] = {}
    monkeypatch.setattr(module, "_FORMS", forms)
    return forms


def test_a_graph_of_before_has_the_values_of_the_student(none_kept: dict[object, object]) -> None:
    first, second = student(0), student(1)
    fresh = [Simulation(lower(net, "onnxruntime", SIZE))(IMAGES) for net in (second, first)]
    assert len(none_kept) == 1, "one graph for both"
    none_kept.clear()
    again = Simulation(lower(first, "onnxruntime", SIZE))(IMAGES)
    assert torch.equal(again, fresh[1]) and not torch.equal(fresh[0], fresh[1])


def test_the_memory_format_of_a_run_is_no_part_of_it_and_the_last_graphs_are_kept(
    none_kept: dict[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = student(0)
    wanted = lower(net, "onnxruntime", SIZE)
    found = lower(net.to(memory_format=torch.channels_last), "onnxruntime", SIZE)
    assert len(none_kept) == 1
    assert torch.equal(Simulation(found)(IMAGES), Simulation(wanted)(IMAGES))
    monkeypatch.setattr(module, "MOST_FORMS", 1)
    capture(net, (3, 9, 9))
    assert [key[0] for key in none_kept] == [(3, 9, 9)]  # type: ignore[index]


def _stride(net: fx.GraphModule) -> None:
    net.pool.stride = 1  # type: ignore[union-attr, assignment]


def _epsilon(net: fx.GraphModule) -> None:
    net.last.eps = 0.1  # type: ignore[union-attr, assignment]


def _function(net: fx.GraphModule) -> None:
    node = next(node for node in net.graph.nodes if node.target is torch.relu)
    node.target = torch.sigmoid
    net.recompile()


def _buffer(net: fx.GraphModule) -> None:
    net.offset = torch.zeros(1, 1, 1, 1)  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_stride, _epsilon, _function, _buffer])
def test_what_changes_the_graph_changes_the_key(change: Callable[[fx.GraphModule], None]) -> None:
    net = fx.symbolic_trace(Net()).eval()
    other = copy.deepcopy(net)
    assert capture_key(net, SIZE) == capture_key(other, SIZE) is not None
    change(other)
    assert capture_key(net, SIZE) != capture_key(other, SIZE)
    assert capture_key(net, SIZE) != capture_key(net, (3, 16, 16))


def test_what_cannot_be_compared_is_captured_each_time(none_kept: dict[object, object]) -> None:
    net = student(0)
    net.get_submodule("pool").extra = object()  # type: ignore[assignment]
    capture(net, SIZE)
    assert not none_kept
    hooked, training = (fx.symbolic_trace(Net()).eval() for _ in range(2))
    assert capture_key(hooked, SIZE) is not None
    hooked.get_submodule("pool").register_forward_hook(lambda module, inputs, output: output)
    assert capture_key(hooked, SIZE) is None and capture_key(training.train(), SIZE) is None
