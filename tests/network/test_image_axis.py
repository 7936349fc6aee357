"""Attention whose heads, windows and images are on different axes: every term reads it as it reads the usual form."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

from support.token_nets import SIZE, spread
from synq.diagnostics.attention_maps import attention_of, shown_attention, token_similarities
from synq.finetune.responses import TappedNetwork
from synq.network.attention.locations import attention_of_images, locate_attention, softmaxes
from synq.network.tracing import trace_classifier, with_features
from synq.synthesis.attention_prior import AttentionPrior
from synq.synthesis.structure import StructureTerms, StructureWeights

WIDTH = 24


def _heads(net: nn.Module, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(2, (heads, -1)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))  # type: ignore[operator]


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / (WIDTH / 2) ** 0.5).softmax(-1) @ v


class Ordered(nn.Module):
    """Attention of two heads, whose tensors are (N, 2, T, D) for "images, heads"; "x" is on one axis."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.qkv, self.proj = order, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = _heads(self, x, 2)
        if self.order != "images, heads":
            if "heads" in self.order.split(" ")[0]:
                parts = tuple(part.transpose(0, 1) for part in parts)
            if "x" in self.order:
                parts = tuple(part.reshape(2 * n, t, c // 2) for part in parts)
        mixed = _product(*parts)
        if self.order == "heads, images":
            mixed = mixed.transpose(0, 1)
        elif self.order == "heads x images":
            mixed = mixed.reshape(2, n, t, c // 2).transpose(0, 1)
        elif self.order == "images x heads":
            mixed = mixed.reshape(n, 2, t, c // 2)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, c))


class Across(Ordered):
    """Attention between the images of a batch, as by a wrong `batch_first`."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (part.reshape(n, t, 2, -1).permute(1, 2, 0, 3) for part in self.qkv(x).chunk(3, -1))
        return self.proj(_product(q, k, v).permute(2, 0, 1, 3).reshape(n, t, c))


class Net(nn.Module):
    """A class token, 16 positions and one block for each attention."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks, self.norm = nn.ModuleList(attentions), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return self.head(x[:, 0])


@functools.cache
def graph(*orders: str) -> fx.GraphModule:
    return trace_classifier(spread(Net(*(Ordered(order) for order in orders))), SIZE)


def images(count: int) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(5))


USUAL = "images, heads"
ORDERS = ("heads, images", "heads x images", "images x heads")
EACH = pytest.mark.parametrize(
    "orders", [*((order, order) for order in ORDERS), (USUAL, "heads x images"), ("heads, images", USUAL)], ids=str
)


@EACH
def test_heads_and_class_token_are_found_in_every_order(orders: tuple[str, ...]) -> None:
    found = locate_attention(graph(*orders))
    assert [(a.heads, a.tokens, a.windows, a.extra) for a in found] == [(2, 17, 1, 1)] * 2
    assert [one.depth for one in attention_of_images(graph(*orders))] == [0.5, 1]


@EACH
def test_every_term_is_that_of_the_usual_order(orders: tuple[str, ...]) -> None:
    """Two heads, so that a tensor of two images is as large in one order as in another; then three images."""
    weights = StructureWeights(heads=1.0, entropy=1.0, variation=0.0, prior=1.0)
    for count in (2, 3):
        wanted, found = (
            StructureTerms(net, weights, torch.Generator().manual_seed(0))(images(count))[1]
            for net in (graph(USUAL, USUAL), graph(*orders))
        )
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@EACH
def test_maps_and_similarities_are_those_of_the_usual_order(orders: tuple[str, ...]) -> None:
    usual, other = graph(USUAL, USUAL), graph(*orders)
    maps = []
    for net in (usual, other):
        shown = shown_attention(net)
        assert shown is not None
        maps.append(attention_of({"": (net, shown.nodes.probabilities)}, shown, images(3))[""])
    torch.testing.assert_close(*map(torch.from_numpy, maps), rtol=1e-4, atol=1e-6)
    similar = [torch.from_numpy(token_similarities(net, images(3))) for net in (usual, other)]
    torch.testing.assert_close(*similar, rtol=0, atol=0.002)


@EACH
def test_fine_tuning_compares_the_heads_of_each_image(orders: tuple[str, ...]) -> None:
    """Also where more images were run than are compared."""
    heads = []
    for net in (graph(USUAL, USUAL), graph(*orders)):
        found = tuple(locate_attention(net))
        tapped = with_features(net, found[0].scores, [one.gathered for one in found])
        site = SimpleNamespace(differentiates=lambda method: False)
        network = TappedNetwork(net=tapped, cam_site=site, with_cam=False, attentions=found)  # type: ignore[arg-type]
        with torch.no_grad():
            heads.append(network.response(tapped(images(4)), torch.zeros(3, dtype=torch.int64)).heads)
    assert [tuple(part.shape) for part in heads[0]] == [(3, 2, 16, WIDTH // 2)] * 2
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-4, atol=1e-5)


def test_windows_may_come_before_images() -> None:
    class Windows(nn.Module):
        """Four windows of 4 x 4 positions and two heads: `order` places windows, images and heads."""

        def __init__(self, order: str) -> None:
            super().__init__()
            self.order, self.stem, self.qkv = order, nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 3 * WIDTH)
            self.proj, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            tokens = self.stem(x).reshape(n, WIDTH, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, 4, 16, WIDTH)
            if self.order == "windows x images":
                tokens = tokens.transpose(0, 1)
            mixed = _product(*_heads(self, tokens.reshape(n * 4, 16, WIDTH), 2))
            mixed = self.proj(mixed.transpose(1, 2).reshape(n * 4, 16, WIDTH))
            mixed = mixed.reshape(4, n, 16, WIDTH).transpose(0, 1) if "windows x" in self.order else mixed
            return self.head(mixed.reshape(n, 64, WIDTH).mean(1))

    nets = [trace_classifier(spread(Windows(order)), SIZE) for order in ("images x windows", "windows x images")]
    values = []
    for net in nets:
        (found,) = locate_attention(net)
        assert (found.heads, found.windows, found.extra) == (2, 4, 0) and not attention_of_images(net)
        tapped = with_features(net, found.scores, [found.gathered])
        values.append(found.by_image(tapped(images(3))[2]))
    assert values[0].shape == (3, 4, 2, 16, WIDTH // 2)
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)


def test_attention_between_images_is_left_out_and_said_so() -> None:
    net = trace_classifier(spread(Net(Across(""))), SIZE)
    assert locate_attention(net) == [] and len(softmaxes(net)) == 1
    assert AttentionPrior(net, torch.Generator()).names == []
    with pytest.raises(ValueError, match="no axis of this network's attention keeps images apart"):
        shown_attention(net)


def test_a_dead_head_and_constant_scores_hide_no_images() -> None:
    for order in (USUAL, *ORDERS):
        net = Net(Ordered(order))
        spread(net)
        with torch.no_grad():
            net.blocks[0].qkv.weight.unflatten(0, (3, 2, -1))[:, 0] = 0  # type: ignore[union-attr, operator]
        (found,) = locate_attention(trace_classifier(net, SIZE))
        assert (found.heads, found.windows) == (2, 1)
    nn.init.zeros_(net.blocks[0].qkv.weight)  # type: ignore[arg-type, union-attr]
    assert len(locate_attention(trace_classifier(net, SIZE))) == 1
