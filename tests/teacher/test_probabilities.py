"""Classifiers that return probabilities are rejected by the values they return, whatever their last operation is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import TeacherConfig
from synq.network.tracing import trace_classifier
from synq.teacher.probabilities import check_no_probabilities, probabilities
from synq.teacher.teacher import load_teacher

SIZE = (3, 8, 8)
End = Callable[[Tensor], Tensor]


class Ending(nn.Module):
    """A small classifier of six classes that ends in an operation."""

    def __init__(self, end: End | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6)
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3))))


def load(end: End) -> Tensor:
    """Load a classifier as a teacher, and return the logits of its graph for two images."""
    ENDS["now"] = end
    teacher = load_teacher(
        TeacherConfig(spec=f"{__name__}:made", weights="random", input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    with torch.no_grad():
        return teacher.graph(images())


ENDS: dict[str, End] = {}


def made() -> nn.Module:
    return Ending(ENDS["now"])


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("end", "found", "last"),
    [
        (nn.Softmax(1), "each row sums to 1", "end"),
        (lambda y: torch.softmax(y, 1).flatten(1), "each row sums to 1", "softmax"),
        (lambda y: F.softmax(y[:, :, None, None], 1)[:, :, 0, 0], "each row sums to 1", "softmax"),
        (lambda y: y.softmax(1) * 1.0, "each row sums to 1", "softmax"),
        (lambda y: (y / 2.5).softmax(1), "each row sums to 1", "softmax"),
        (lambda y: 100 * y.softmax(1), "each row sums to 100", "softmax"),
        (lambda y: F.normalize(y.exp(), p=1, dim=1), "each row sums to 1", "normalize"),
        (lambda y: (y == y.amax(1, True)).float(), "each row sums to 1", "float_1"),
        (torch.sigmoid, r"all values are in \[0, 1\]", "sigmoid"),
        (lambda y: y.clamp(0, 1), r"all values are in \[0, 1\]", "clamp"),
        (lambda y: 1 - y.softmax(1)[:, :4], r"all values are in \[0, 1\]", "softmax"),
        (lambda y: y.softmax(1).log(), "the exponentials of each row sum to 1", "log"),
        (lambda y: y - y.logsumexp(1, keepdim=True), "the exponentials of each row sum to 1", "logsumexp"),
        (lambda y: F.log_softmax(y, 1) * 1.0, "the exponentials of each row sum to 1", "log_softmax"),
    ],
)
def test_bugs_6_probabilities_are_rejected_by_their_values(end: End, found: str, last: str) -> None:
    with pytest.raises(ValueError, match=rf"must return logits, but returned .*{found}\), computed by '{last}'"):
        load(end)


@pytest.mark.parametrize(
    "end",
    [
        lambda y: F.log_softmax(y, 1),
        lambda y: torch.log_softmax(y, dim=-1),
        nn.LogSoftmax(1),
        lambda y: y[:, :, None, None].log_softmax(1).flatten(1),
        lambda y: F.log_softmax(y[:, :, None, None], 1)[:, :, 0, 0],
    ],
)
def test_bugs_6_a_log_softmax_at_the_end_is_dropped(end: End) -> None:
    assert torch.equal(load(end), Ending().eval()(images()).detach()), "the logits that it was computed from"


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y,
        F.relu,
        lambda y: -y.abs(),
        lambda y: y * 1e-3,
        lambda y: y * 0,
        lambda y: y * 0 + 0.5,
        lambda y: F.log_softmax(y, 1) * 3,
        lambda y: y - y.mean(1, keepdim=True),
        lambda y: (y * 1e-3).square(),
        lambda y: F.normalize(y, dim=1),
    ],
)
def test_bugs_6_logits_are_not_taken_for_probabilities(end: End) -> None:
    # Small, not negative, constant and normalized ones included: none proves a probability.
    load(end)


def test_bugs_6_two_classes_of_an_untrained_network_are_no_probabilities() -> None:
    # Two nearly constant logits lie in [0, 1] by chance: for other outputs of the layer they leave it.
    net = Ending()
    net.fc = nn.Linear(8, 2)
    with torch.no_grad():
        net.fc.weight.mul_(0.01)
        net.fc.bias.copy_(torch.tensor([0.3, 0.6]))  # behind ReLU6 no contrast of the image would help
    net.end = nn.ReLU6()
    traced = trace_classifier(net.requires_grad_(False), SIZE)
    noise = torch.randn(3, *SIZE)
    assert probabilities(traced(noise)).startswith("probabilities")
    check_no_probabilities(traced, noise)


def test_bugs_6_an_overflow_proves_nothing() -> None:
    traced = trace_classifier(Ending(lambda y: F.normalize(y.exp(), p=1, dim=1)).requires_grad_(False), SIZE)
    with pytest.raises(ValueError, match="each row sums to 1"):
        check_no_probabilities(traced, torch.randn(3, *SIZE))


def test_a_layer_named_softmax_is_no_softmax() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.softmax = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    check_no_probabilities(trace_classifier(Named().eval(), SIZE), torch.randn(3, *SIZE))


class Gated(nn.Module):
    """A classifier whose last map is its logits, with a gate: the last layer of its code does not make the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.gate = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))) * 0.1
        return (x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]).mean((2, 3))


def test_small_outputs_with_a_gate_are_logits() -> None:
    graph = trace_classifier(Gated().eval(), SIZE)
    with torch.no_grad():
        assert probabilities(graph(images()))  # by their values
    check_no_probabilities(graph, images())


@pytest.mark.parametrize("end", [lambda x: x.heaviside(x.new_zeros(1)) * x, lambda x: x // 0.1])
def test_operations_without_a_derivative_are_named(end: End) -> None:
    with pytest.raises(ValueError, match=r"must have a gradient.*(heaviside|floor_divide).*torch\.floor"):
        load(end)
