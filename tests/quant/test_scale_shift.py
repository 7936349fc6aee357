"""Scale shift of LayerNorms: the right places, the same function, one range for all channels, kept only if it helps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from support.token_nets import SIZE, Joined, Module, Separate, TokenNet, spread
from synq.config.run import QuantConfig, RunConfig, config_digest, with_overrides
from synq.network.logits import logits_of
from synq.network.tracing import trace_classifier
from synq.quant.layers import quantizers_bypassed
from synq.quant.student import observe_ranges, quantize_model
from synq.quant.transformer.scale_shift import (
    LARGEST,
    Shift,
    locate_norms,
    norm_ranges,
    scale_shift,
    shift_norm,
    shift_of,
)


def images(number: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observe(net: fx.GraphModule) -> None:
    observe_ranges(net, images(), act_range="minmax")


def traced(net: nn.Module) -> fx.GraphModule:
    return trace_classifier(spread(net).double(), SIZE)


def plant(net: fx.GraphModule, norm: str, readers: list[str], channel: int, factor: float) -> None:
    """Make one channel of a LayerNorm large and the weights that read it small; the function stays."""
    layer = net.get_submodule(norm)
    with torch.no_grad():
        layer.weight[channel] *= factor
        layer.bias[channel] *= factor
        for name in readers:
            net.get_submodule(name).weight[:, channel] /= factor


@pytest.mark.parametrize(
    ("attention", "readers"),
    [
        (Joined, ("blocks.0.attention.qkv",)),
        (Separate, tuple(f"blocks.0.attention.{part}" for part in "qkv")),
        (Module, ("blocks.0.attention.attention.in_proj",)),
    ],
)
def test_norms_that_only_linear_layers_read_are_found(attention: type[nn.Module], readers: tuple[str, ...]) -> None:
    found = locate_norms(traced(TokenNet(attention)))
    assert [(location.norm, {*location.consumers}) for location in found] == [
        ("blocks.0.norm1", {*readers}),
        ("blocks.0.norm2", {"blocks.0.mlp.0"}),
        ("norm", {"head"}),
    ]
    assert all(location.shifts for location in found)


class TwoReaders(nn.Module):
    """LayerNorms of which a sum reads one, and a convolution the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc, self.conv, self.head = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        x = self.second(x + self.fc(x)).permute(0, 3, 1, 2)
        return self.head(self.conv(x).mean((2, 3)))


def test_a_norm_that_something_else_reads_is_no_site() -> None:
    assert locate_norms(traced(TwoReaders())) == []


@pytest.mark.parametrize("attention", [Joined, Separate, Module])
def test_any_factors_and_offsets_leave_the_function_as_it_is(attention: type[nn.Module]) -> None:
    net = traced(TokenNet(attention))
    changed, generator = copy.deepcopy(net), torch.Generator().manual_seed(3)
    for location in locate_norms(net):
        before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
        factor = torch.rand(24, generator=generator, dtype=torch.float64) * 4 + 0.1
        shift_norm(changed, location, Shift(factor=factor, offset=torch.randn(24, generator=generator).double()))
        after = changed.state_dict()
        names = [f"{name}.{part}" for name in (location.norm, *location.consumers) for part in ("weight", "bias")]
        assert {name for name in after if not torch.equal(after[name], before[name])} == {*names}
        torch.testing.assert_close(changed(images(4)), net(images(4)), rtol=1e-10, atol=1e-10)


def test_all_channels_get_one_range() -> None:
    net = traced(TokenNet())
    locations = locate_norms(net)
    changed = copy.deepcopy(net)
    for location, (low, high) in zip(locations, norm_ranges(net, locations, images(), batch_size=5), strict=True):
        assert (high - low).max() > 1.3 * (high - low).min()
        shift_norm(changed, location, shift_of(low, high))
    for low, high in norm_ranges(changed, locations, images()):
        torch.testing.assert_close(low, low[:1].expand_as(low), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(high, high[:1].expand_as(high), rtol=1e-8, atol=1e-8)


def test_factors_and_offsets_by_hand() -> None:
    low, high = torch.tensor([0.0, -4.0]), torch.tensor([2.0, 0.0])
    shift = shift_of(low, high)
    torch.testing.assert_close(shift.factor, torch.tensor([0.5, 2.0]).double().sqrt())
    torch.testing.assert_close(shift.offset, torch.tensor([-1.0, 2.0]).double())
    half = shift_of(low, high, 0.5)
    torch.testing.assert_close(half.factor, torch.tensor([0.5, 2.0]).double().pow(0.25))
    positive = shift_of(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 8.0]), shifts=False)
    torch.testing.assert_close(positive.factor, torch.tensor([0.5, 2.0]).double())  # spans 2 and 8, from zero
    assert torch.equal(positive.offset, torch.zeros(2).double())
    extreme = shift_of(torch.tensor([0.0, 0.0, 5.0, 0.0]), torch.tensor([1.0, 1e9, 5.0, 1.0]))
    torch.testing.assert_close(extreme.factor, torch.tensor([1.0, LARGEST, 1.0, 1.0]).double())


@pytest.mark.parametrize("act_points", ["relu", "inputs"])
def test_a_planted_imbalance_is_repaired(act_points: str) -> None:
    net = traced(TokenNet())
    plant(net, "blocks.0.norm2", ["blocks.0.mlp.0"], 3, 60.0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    student = quantize_model(net, QuantConfig(weight_bits=8, act_bits=4, act_points=act_points))  # type: ignore[arg-type]
    reference, report = scale_shift(student.net, net, images(), observe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()), "the teacher stays"
    assert report["kept"] == "1.0" and report["kl"]["1.0"] < 0.5 * report["kl"]["none"]
    assert not report["left_out"] and report["norms"][1]["spread"] > 20
    with torch.no_grad(), quantizers_bypassed(student.net):
        torch.testing.assert_close(student.net(images(4)), net(images(4)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference(images(4)), net(images(4)), rtol=1e-9, atol=1e-9)
    wanted = logits_of(student.net, images())
    observe(student.net)
    assert torch.equal(logits_of(student.net, images()), wanted), "the ranges are those of the choice"


class Padded(nn.Module):
    """Positions of zeros behind a LayerNorm, as Swin pads its windows: a shift would not be the same there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.norm(self.stem(x).permute(0, 2, 3, 1)), (0, 0, 0, 1, 0, 1))
        return self.head(self.fc(x).relu().mean((1, 2)))


def test_a_norm_whose_change_is_not_exact_is_left_out() -> None:
    net = traced(Padded())
    assert [location.norm for location in locate_norms(net)] == ["norm"]
    student = quantize_model(net, QuantConfig(weight_bits=8, act_bits=4, act_points="inputs"))
    reference, report = scale_shift(student.net, net, images(), observe)
    assert report["left_out"] == ["norm"] and report["kept"] == "none" and reference is net
    with torch.no_grad(), quantizers_bypassed(student.net):
        assert torch.equal(student.net(images(4)), net(images(4)))


def test_without_a_bias_channels_are_scaled_only() -> None:
    class NoBias(TokenNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, 5, bias=False)

    net = traced(NoBias())
    location = locate_norms(net)[-1]
    assert location.consumers == ("head",) and not location.shifts
    changed = copy.deepcopy(net)
    low, high = norm_ranges(net, [location], images())[0]
    shift_norm(changed, location, shift_of(low, high, shifts=False))
    torch.testing.assert_close(changed(images(4)), net(images(4)), rtol=1e-10, atol=1e-10)
    assert not torch.equal(changed.get_submodule("head").weight, net.get_submodule("head").weight)


def test_the_setting_is_in_the_digest_only_where_it_is_on() -> None:
    plain = RunConfig()
    assert config_digest(plain) == "c6fd6bb4c38d875a"
    assert config_digest(with_overrides(plain, {"quant.scale_shift": True})) != config_digest(plain)
