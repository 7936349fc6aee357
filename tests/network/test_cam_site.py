"""The map behind every kind of head: it is found, and autograd gives what a named layer gives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.network.cam_site import locate_cam
from synq.network.gradcam import autograd_weights
from synq.network.tracing import trace_classifier, with_features

SIZE = (3, 16, 16)
C = 8


class Headed(nn.Module):
    """Two convolutions whose maps, 16 x 16 and 8 x 8, a head reads."""

    def __init__(self, head: Callable[["Headed", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head = head
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, 2, 1), nn.BatchNorm2d(C)
        self.fc, self.fc2, self.norm = nn.Linear(C, 5), nn.Linear(2 * C, 5), nn.BatchNorm1d(C)
        self.cls, self.attention = nn.Conv2d(C, 5, 1), nn.Conv2d(C, 1, 1)
        self.t, self.p = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.ones(1) * 3)
        self.w = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        early = F.relu(self.bn1(self.conv1(x)))
        return self.head(self, F.relu(self.bn2(self.conv2(early))), early)


def power(x: Tensor, p: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(p), 1).pow(1 / p).flatten(1)


HEADS: dict[str, tuple[Callable[[Headed, Tensor, Tensor], Tensor], str]] = {
    "plain": (lambda net, x, early: net.fc(x.mean((2, 3))), "closed_form"),
    "one axis after another": (lambda net, x, early: net.fc(x.mean(3, True).mean(2, True).flatten(1)), "closed_form"),
    "temperature": (lambda net, x, early: net.fc(x.mean((2, 3))) * net.t, "autograd"),
    "divided by a temperature": (lambda net, x, early: net.fc(x.mean((2, 3))) / net.t.exp(), "autograd"),
    "bias of its own": (lambda net, x, early: net.fc(x.mean((2, 3))) + net.t, "autograd"),
    "scaled features": (lambda net, x, early: net.fc(x.mean((2, 3)) * net.w), "autograd"),
    "normalized features": (lambda net, x, early: net.fc(F.normalize(x.mean((2, 3)))) * net.t, "autograd"),
    "batch norm before the classifier": (lambda net, x, early: net.fc(net.norm(x.mean((2, 3)))), "autograd"),
    "two pools": (
        lambda net, x, early: net.fc2(
            torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)
        ),
        "autograd",
    ),
    "sum of two pools": (
        lambda net, x, early: net.fc(0.5 * (x.mean((2, 3)) + x.amax((2, 3)))),
        "autograd",
    ),
    "mean and deviation": (lambda net, x, early: net.fc2(torch.cat([*x_stats(x)], 1)), "autograd"),
    "power pool": (lambda net, x, early: net.fc(power(x, net.p)), "autograd"),
    "power pool without clamp": (
        lambda net, x, early: net.fc(x.pow(3).mean((2, 3)).pow(1 / 3)),
        "autograd",
    ),
    "log-sum-exp pool": (lambda net, x, early: net.fc((x * net.t).exp().mean((2, 3)).log() / net.t), "autograd"),
    "attention pool": (
        lambda net, x, early: net.fc((x.flatten(2) * net.attention(x).flatten(2).softmax(2)).sum(2)),
        "autograd",
    ),
    "gated vector": (lambda net, x, early: net.fc(x.mean((2, 3)) * x.amax((2, 3)).sigmoid()), "autograd"),
    "sum of two classifiers": (lambda net, x, early: net.fc(x.mean((2, 3))) + net.fc(x.amax((2, 3))), "autograd"),
    "shifted by a constant": (lambda net, x, early: net.fc(x.mean((2, 3)) + torch.zeros_like(net.w)), "autograd"),
    "expanded and dropped out": (
        lambda net, x, early: net.fc(F.dropout(x, training=False).mean((2, 3)).view_as(x[:, :, 0, 0])),
        "closed_form",
    ),
}


def x_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3)), x.std((2, 3))


@pytest.mark.parametrize("name", HEADS)
def test_bugs_7_the_map_is_found_behind_every_head(name: str) -> None:
    head, kind = HEADS[name]
    torch.manual_seed(0)
    traced = trace_classifier(Headed(head).eval().requires_grad_(False), SIZE)
    located = locate_cam(traced)
    named = locate_cam(traced, located.node)
    assert located.kind == kind and (named.node, named.channels) == (located.node, C)
    expected = "dropout" if "dropped" in name else "relu_1"
    assert (located.node, located.channels, located.height, located.width) == (expected, C, 8, 8)
    if kind == "autograd":
        logits, features = with_features(traced, located.node)(torch.randn(3, *SIZE))
        alpha = autograd_weights(logits, features, torch.arange(3), retain_graph=False)
        assert alpha.shape == (3, C) and bool((alpha != 0).any())


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (lambda net, x, early: net.fc2(torch.cat([early.mean((2, 3)), x.mean((2, 3))], 1)), ["relu", "relu_1"]),
        (lambda net, x, early: net.fc(x.mean((2, 3))) + net.fc(early.amax((2, 3))), ["relu", "relu_1"]),
        (lambda net, x, early: net.fc(x.mean((2, 3)) * early.mean((2, 3)).sigmoid()), ["relu", "relu_1"]),
    ],
)
def test_bugs_7_of_several_maps_the_last_is_taken_and_all_are_named(
    head: Callable[[Headed, Tensor, Tensor], Tensor], names: list[str]
) -> None:
    traced = trace_classifier(Headed(head).eval(), SIZE)
    located = locate_cam(traced)
    assert (located.kind, located.node) == ("autograd", names[-1])
    assert f"reads several maps ({', '.join(names)})" in located.reason
    assert locate_cam(traced, names[0]).node == names[0]


class Flat(nn.Module):
    """No convolution: there is no map, and the reason says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(3 * 256, C), nn.BatchNorm1d(C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x.flatten(1)))))


def test_bugs_7_a_network_without_a_map_has_none() -> None:
    located = locate_cam(trace_classifier(Flat().eval(), SIZE))
    assert (located.kind, located.node) == ("none", "")
    assert located.reason == "no spatial feature precedes the classifier"


def test_bugs_7_channels_behind_a_permutation_are_not_taken_for_rows() -> None:
    class Last(Headed):
        """Channels last before the pool, as transformers have them."""

    net = Last(lambda net, x, early: net.fc(x.permute(0, 2, 3, 1).mean((1, 2))))
    located = locate_cam(trace_classifier(net.eval(), SIZE))
    assert (located.node, located.channels, located.kind) == ("relu_1", C, "autograd")
