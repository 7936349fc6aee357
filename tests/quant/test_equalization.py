"""Cross-layer equalization: the right pairs, the same function, more similar ranges, kept only if it helps."""

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from support.small_nets import NETS, SIZE, images, rounded, trained
from synq.config.run import QuantConfig
from synq.network.logits import logits_of
from synq.network.op_traits import node_module
from synq.network.tracing import trace_classifier
from synq.quant.equalization import (
    LARGEST,
    channel_ranges,
    channel_scales,
    equalize,
    find_pairs,
    scale_pair,
    weight_ranges,
)
from synq.quant.keep_best import mean_kl
from synq.quant.layers import ActQuantizer, quantizers_bypassed
from synq.quant.student import observe_ranges, quantize_model


def points(net: fx.GraphModule) -> set[str]:
    return {n.all_input_nodes[0].name for n in net.graph.nodes if isinstance(node_module(net, n), ActQuantizer)}


def observe(net: fx.GraphModule) -> None:
    observe_ranges(net, images(64), act_range="minmax")


def plant(traced: fx.GraphModule, producer: str, consumer: str, channel: int, factor: float) -> None:
    """Make one channel large and its reader small; the function stays."""
    layer, reader = traced.get_submodule(producer), traced.get_submodule(consumer)
    with torch.no_grad():
        layer.weight[channel] *= factor
        layer.bias[channel] *= factor
        reader.weight[:, channel] /= factor


@pytest.mark.parametrize("name", NETS)
def test_pairs_are_exactly_those_that_can_be_scaled(name: str) -> None:
    make, expected = NETS[name]
    traced = trained(make())
    found = find_pairs(traced, points(rounded(traced).net))
    assert [(pair.producer, pair.consumer, pair.node) for pair in found] == expected
    unrounded = {"dense": {"mean"}, "depthwise": {"_7"}}.get(name, set())
    assert {pair.node for pair in found if not pair.quantized} == unrounded


@pytest.mark.parametrize("name", NETS)
def test_any_scales_leave_the_function_as_it_is(name: str) -> None:
    traced = trained(NETS[name][0]())
    x, generator = images(8), torch.Generator().manual_seed(3)
    scaled = copy.deepcopy(traced)
    for pair in find_pairs(traced):
        before = scaled(x)
        factors = torch.rand(pair.channels, generator=generator, dtype=torch.float64) * 4 + 0.1
        scale_pair(scaled, pair, factors)
        after = scaled(x)
        assert not torch.equal(after, before), "nothing was scaled"
        torch.testing.assert_close(after, traced(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("act_points", ["relu", "inputs"])
@pytest.mark.parametrize("name", NETS)
def test_an_equalised_student_is_the_teacher_up_to_rounding(name: str, act_points: Literal["relu", "inputs"]) -> None:
    traced = trained(NETS[name][0]())
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    student = quantize_model(traced, QuantConfig(weight_bits=3, act_bits=3, act_points=act_points))
    reference, report = equalize(student.net, traced, images(64), observe)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items()), "the teacher was touched"
    assert report["kl"][report["kept"]] == min(report["kl"].values()) and set(report["kl"]) == {"none", "0.5", "1.0"}
    x = images(8, seed=5)
    with torch.no_grad(), quantizers_bypassed(student.net):
        torch.testing.assert_close(student.net(x), traced(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(reference(x), traced(x), rtol=1e-10, atol=1e-10)
    assert (reference is traced) == (report["kept"] == "none")
    wanted = logits_of(traced, images(64))
    assert mean_kl(wanted, student.net, images(64)) == report["kl"][report["kept"]], (
        "the ranges are those of the choice"
    )


def values(net: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Outputs of all nodes by name."""
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Keep(net).run(x)
    return found


def test_the_reference_has_the_students_channels() -> None:
    """What compares tensors inside the two networks must not see the scales as an error."""
    traced = trained(NETS["pooled"][0]())
    plant(traced, "1", "5", 2, 100.0)
    student = rounded(traced)
    reference, report = equalize(student.net, traced, images(64), observe)
    assert report["kept"] != "none"
    with torch.no_grad(), quantizers_bypassed(student.net):
        got, wanted, teacher = (values(net, images(8, seed=5)) for net in (student.net, reference, traced))
    for name in ("_2", "_5", "_9"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got["_2"], teacher["_2"], rtol=1e-2)


@pytest.mark.parametrize("name", ["residual", "plain", "depthwise", "pooled"])
def test_a_planted_imbalance_is_repaired(name: str) -> None:
    traced = trained(NETS[name][0]())
    producer, consumer, _ = {"residual": ("bn2", "conv3", ""), "depthwise": ("4", "6", "")}.get(name, NETS[name][1][0])
    even = mean_kl(logits_of(traced, images(64)), rounded(traced, observed=images(64)).net, images(64))
    plant(traced, producer, consumer, 1, 100.0)
    student = rounded(traced)
    _, report = equalize(student.net, traced, images(64), observe)
    assert report["kept"] == "1.0"
    assert report["kl"]["1.0"] < 0.2 * report["kl"]["none"] and report["kl"]["1.0"] < 1.5 * even
    (row,) = (row for row in report["pairs"] if row["consumer"] == consumer)
    for before, after in (row["activation"], row["weight"]):
        assert before > 20 and after < 0.2 * before


def test_reported_ranges_are_those_of_the_equalised_network() -> None:
    traced = trained(NETS["plain"][0]())
    plant(traced, "0", "3", 1, 100.0)
    student = rounded(traced)
    reference, report = equalize(student.net, traced, images(64), observe)
    pairs = find_pairs(traced, points(student.net))
    for when, net in enumerate((traced, reference)):
        for pair, row, largest in zip(pairs, report["pairs"], channel_ranges(net, pairs, images(64)), strict=True):
            weight = weight_ranges(net.get_submodule(pair.consumer), pair.channels)
            assert row["activation"][when] == pytest.approx(float(largest.max() / largest.min()), rel=1e-9)
            assert row["weight"][when] == pytest.approx(float(weight.max() / weight.min()), rel=1e-9)


def test_ranges_of_activations_by_hand_over_all_batches_and_cells() -> None:
    traced = trained(NETS["plain"][0]())
    x = images(10)
    x[9] *= 30  # the largest value is in the last, incomplete batch
    pairs = find_pairs(traced)  # no point: the range at the consumer counts
    found = channel_ranges(traced, pairs, x, batch_size=4)
    out = values(traced, x)
    assert torch.equal(found[0], out["_2"].abs().amax((0, 2, 3)))
    assert torch.equal(found[1], out["_5"].abs().amax((0, 2, 3))) and pairs[1].node == "_6"
    assert torch.allclose(found[2], out["_8"].abs().amax(0), rtol=1e-12)  # a product of other batches


def test_ranges_of_weights_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0], [100.0, 50.0], [0.0, 0.0]])
    layer = nn.Linear(2, 3)
    layer.weight.data = weight
    assert torch.equal(weight_ranges(layer, 2), torch.tensor([1.0, 1.0]))
    layer.weight.data = weight[:1]
    assert torch.equal(weight_ranges(layer, 2), torch.tensor([0.25, 1.0]))
    cells = nn.Linear(6, 1)  # two channels of three cells
    cells.weight.data = torch.tensor([[1.0, -8.0, 2.0, 0.0, 4.0, 3.0]])
    assert torch.equal(weight_ranges(cells, 2), torch.tensor([1.0, 0.5]))
    grouped = nn.Conv2d(4, 2, 1, groups=2)
    grouped.weight.data = torch.tensor([[1.0, 2.0], [9.0, 3.0]])[:, :, None, None]
    assert torch.equal(weight_ranges(grouped, 4), torch.tensor([0.5, 1.0, 1.0, 1 / 3]))


def test_scales_by_hand() -> None:
    torch.testing.assert_close(
        channel_scales(torch.tensor([8.0, 2.0]), torch.ones(2)), torch.tensor([2.0, 1.0]).double()
    )
    a = torch.tensor([3.0, 0.1, 7.0, 1.0, 20.0])
    w = torch.tensor([0.2, 1.0, 0.5, 0.9, 0.1])
    scales = channel_scales(a, w)
    ratio = (a / scales) / (w * scales)
    torch.testing.assert_close(ratio, ratio[:1].expand(5))  # one is a multiple of the other
    torch.testing.assert_close(channel_scales(a, w, 0.5), scales.sqrt())
    assert torch.equal(channel_scales(a, w, 0.0), torch.ones(5, dtype=torch.float64))
    even = a / channel_scales(a, None)
    torch.testing.assert_close(even, even[:1].expand(5))
    even = w * channel_scales(None, w)
    torch.testing.assert_close(even, even[:1].expand(5))


def test_dead_channels_keep_their_scale_and_nearly_dead_ones_are_bounded() -> None:
    a = torch.tensor([0.0, 4.0, 1e-20, 1.0, 2.0])
    w = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    scales = channel_scales(a, w)
    assert scales[0] == 1 and scales[1] == 1 and scales[2] == pytest.approx(1 / LARGEST)
    assert torch.equal(channel_scales(torch.zeros(3), torch.ones(3)), torch.ones(3, dtype=torch.float64))

    traced = trained(NETS["pooled"][0]())
    with torch.no_grad():
        traced.get_submodule("1").weight[0], traced.get_submodule("1").bias[0] = 0.0, -1.0  # always 0 after the ReLU
        traced.get_submodule("5").weight[:, 1] = 0.0
    student = rounded(traced)
    _, report = equalize(student.net, traced, images(64), observe)
    assert all(1 <= value < float("inf") for row in report["pairs"] for value in (*row["activation"], *row["weight"]))
    x = images(8, seed=5)
    with torch.no_grad(), quantizers_bypassed(student.net):
        torch.testing.assert_close(student.net(x), traced(x), rtol=1e-10, atol=1e-10)


def test_depthwise_weights_have_a_range_for_each_channel_so_that_the_activation_may_become_even() -> None:
    traced = trained(NETS["depthwise"][0]())
    with torch.no_grad():
        for parameter in (traced.get_submodule("1").weight, traced.get_submodule("1").bias):
            parameter[3] *= 40
        traced.get_submodule("3").weight[6:8] /= 40  # two output channels read channel 3
    student = rounded(traced)
    _, report = equalize(student.net, traced, images(64), observe)
    assert report["kept"] == "1.0"
    before, after = report["pairs"][0]["activation"]
    assert before > 20 and after == pytest.approx(1.0)


class Middle(nn.Module):
    """Convolution, batch norm, what `middle` makes of it, a convolution, a GELU and a classifier."""

    def __init__(self, middle: Callable[["Middle", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.fc, self.middle = nn.Linear(8, 5), middle
        self.scale, self.slope = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.conv2(self.middle(self, self.bn(self.conv1(x))))).mean((2, 3)))


@pytest.mark.parametrize(
    ("middle", "passes"),
    [
        (lambda net, x: x, True),
        (lambda net, x: x.relu(), True),
        (lambda net, x: F.leaky_relu(x, 0.1), True),
        (lambda net, x: F.prelu(x, net.slope), True),
        (lambda net, x: F.max_pool2d(F.dropout(x, training=False).relu(), 2).contiguous(), True),
        (lambda net, x: F.relu6(x), False),
        (lambda net, x: F.gelu(x), False),
        (lambda net, x: x.clamp(0, 6), False),
        (lambda net, x: x.relu() + 1, False),
        (lambda net, x: x.relu() + x, False),
        (lambda net, x: x * x.mean((2, 3), keepdim=True), False),
        (lambda net, x: x * net.scale.view(1, -1, 1, 1), True),
        (lambda net, x: x.view(-1, 2, 4, 16, 16).transpose(1, 2).reshape(-1, 8, 16, 16), False),
        (lambda net, x: x.view(-1, 8, 32, 8), True),
        (lambda net, x: x.view(-1, 4, 32, 16).view(-1, 8, 16, 16), False),
        (lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1), False),
        (lambda net, x: x.relu().flip(1), False),
        (lambda net, x: F.interpolate(x, scale_factor=2.0), True),
        (lambda net, x: F.pad(x.relu(), (1, 1, 1, 1)), True),
        (lambda net, x: F.pad(x.relu(), (1, 1, 1, 1), value=1.0), False),
        (lambda net, x: F.pad(x.relu()[:, :6], (0, 0, 0, 0, 1, 1)), False),
        (lambda net, x: x.relu().amax(3, True).expand(-1, -1, -1, 16), True),
        (lambda net, x: x.relu().sum((2, 3), keepdim=True) / 256, True),
        (lambda net, x: x.relu().sum(1, keepdim=True).expand(-1, 8, -1, -1), False),
        (lambda net, x: torch.maximum(x, -x), False),
    ],
)
def test_operations_between_two_layers_decide(middle: Callable[[Middle, Tensor], Tensor], passes: bool) -> None:
    traced = trained(Middle(middle))
    assert [(pair.producer, pair.consumer) for pair in find_pairs(traced)] == [("bn", "conv2")] * passes


def test_layers_with_other_readers_are_left_alone() -> None:
    def pairs(net: nn.Module) -> list[tuple[str, str]]:
        return [(pair.producer, pair.consumer) for pair in find_pairs(trained(net))]

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten())
    net.append(nn.Linear(2048, 5))
    assert pairs(net) == [("0", "2"), ("2", "4"), ("4", "6")]
    net[4].weight = net[2].weight  # tied
    assert pairs(net) == []
    net[4] = net[2]  # one layer, called twice
    assert pairs(net) == []
    net[4] = nn.Conv2d(8, 8, 1)
    net[4].bias = net[0].bias
    assert pairs(net) == []

    read = Middle(lambda net, x: F.prelu(x, net.slope))
    assert pairs(read) == [("bn", "conv2")]
    read.slope = read.bn.weight  # scaling it would change the slope
    assert pairs(read) == []
    frozen = Middle(lambda net, x: x.relu())
    frozen.bn = nn.BatchNorm2d(8, affine=False)
    assert pairs(frozen) == []

    class Means(nn.Module):
        """A mean over channels in front of a linear layer, and a batch norm whose shift the forward pass reads as
        well.
        """

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Linear(16, 5)
            self.conv2, self.bn2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(self.bn(self.conv(x)).relu())
            return self.fc(self.bn2(x).mean((1, 2))) + self.bn.bias[:5]

    assert pairs(Means()) == []


def test_a_network_without_pairs_is_left_alone() -> None:
    traced = trained(Middle(lambda net, x: F.silu(x)))
    student, other = rounded(traced), rounded(traced, observed=images(64))
    reference, report = equalize(student.net, traced, images(64), observe)
    assert reference is traced and report["kept"] == "none" and report["pairs"] == [] and set(report["kl"]) == {"none"}
    assert all(torch.equal(v, other.net.state_dict()[k]) for k, v in student.net.state_dict().items())


def test_equalisation_is_kept_only_where_kl_falls() -> None:
    """In networks that are even already it helps one and harms another."""
    chosen = set()
    for seed in range(4):
        traced = trained(NETS["pooled"][0](), seed)
        student = rounded(traced, 8)
        _, report = equalize(student.net, traced, images(64), observe)
        wanted = logits_of(traced, images(64))
        alone = mean_kl(wanted, rounded(traced, 8, images(64)).net, images(64))
        assert report["kl"]["none"] == alone >= mean_kl(wanted, student.net, images(64))
        chosen.add(report["kept"])
    assert "none" in chosen and len(chosen) > 1


def test_equalisation_is_deterministic() -> None:
    states = []
    for _ in range(2):
        traced = trained(NETS["depthwise"][0]())
        student = rounded(traced)
        equalize(student.net, traced, images(64), observe)
        states.append(student.net.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_float32_and_channels_last() -> None:
    traced = trace_classifier(trained(NETS["pooled"][0]()).float().to(memory_format=torch.channels_last), SIZE)
    student = rounded(traced)
    x = images(64).float()
    equalize(student.net, traced, x, lambda net: observe_ranges(net, x, act_range="mse"))
    with torch.no_grad(), quantizers_bypassed(student.net):
        torch.testing.assert_close(student.net(x), traced(x), rtol=1e-4, atol=1e-5)
    assert student.net.get_submodule("5").weight.is_contiguous(memory_format=torch.channels_last)
