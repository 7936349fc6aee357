"""The integer form computes what the student computes, and holds nothing but codes and scales."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import SIZE, Dense, Residual, depthwise, plain
from torch import Tensor, nn

from synq.integer_form import ChannelAffine, IntegerActivation, IntegerConv2d, IntegerLinear, codes_of, integer_form
from synq.quant_layers import ActQuantizer, QuantConv2d, QuantLinear, effective_weight
from synq.students import Student, observe_ranges, quantize_model
from synq.tracing import trace_classifier

NETS: tuple[Callable[[], nn.Module], ...] = (Residual, Dense, plain, depthwise)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def student(
    net: nn.Module, bits: int = 4, act_points: Literal["relu", "inputs"] = "relu", observed: bool = True
) -> Student:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative ones flip a channel
            module.weight.data[0] = 0.0  # and this one is dead
            nn.init.uniform_(module.bias, -0.5, 0.5)
    traced = trace_classifier(net.eval().requires_grad_(False), SIZE)
    made = quantize_model(traced, weight_bits=bits, act_bits=bits, act_points=act_points)
    if observed:
        observe_ranges(made.net, images(), act_range="minmax")
    return made


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("act_points", ["relu", "inputs"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_logit_is_the_students(
    make: Callable[[], nn.Module], act_points: Literal["relu", "inputs"], bits: int
) -> None:
    made = student(make(), bits, act_points)
    form = integer_form(made.net)
    assert torch.equal(form(images()), made.net(images()))
    assert not any(isinstance(m, QuantConv2d | QuantLinear | ActQuantizer | nn.BatchNorm2d) for m in form.modules())
    assert all(b.dtype in (torch.int8, torch.int32) for n, b in form.named_buffers() if n.endswith((".codes", "point")))
    layers = [m for m in form.modules() if isinstance(m, IntegerConv2d | IntegerLinear)]
    assert layers and all(int(m.integer_weight.codes.max()) < 2 ** (bits - 1) for m in layers)


@pytest.mark.parametrize("make", NETS)
def test_biases_apart_change_logits_by_rounding_alone(make: Callable[[], nn.Module]) -> None:
    made = student(make(), 4)
    form = integer_form(made.net, bias_place="apart")
    # Without rounding of activations no tie can flip a code: what is left is the rounding of float32.
    for net in (form, made.net):
        for name, module in list(net.named_modules()):
            if isinstance(module, IntegerActivation | ActQuantizer):
                net.set_submodule(name, nn.Identity())
    wanted = made.net(images())
    assert torch.allclose(form(images()), wanted, atol=1e-5 * float(wanted.abs().max()))


@settings(max_examples=40)
@given(
    channels=st.integers(1, 40),
    dimensions=st.integers(0, 2),
    affine=st.booleans(),
    eps=st.floats(1e-6, 0.1),
    seed=st.integers(0, 10**6),
)
def test_a_batch_norm_is_its_gain_and_its_shift(
    channels: int, dimensions: int, affine: bool, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    make = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dimensions]
    norm = make(channels, eps=eps, affine=affine).eval().requires_grad_(False)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(channels).exp())
    norm.running_mean.neg_()  # type: ignore[union-attr]
    if affine:
        norm.weight.sub_(1.0)
        norm.weight[0] = 0.0
    x = 3 * torch.randn(5, channels, *[7] * dimensions)
    apart = ChannelAffine(norm)
    assert torch.equal(apart(x), norm(x))
    shape = (-1, *[1] * dimensions)
    assert torch.allclose(apart.gain.reshape(shape) * x + apart.shift.reshape(shape), norm(x), rtol=1e-4, atol=1e-4)
    assert set(apart.state_dict()) == {"gain", "shift"}


def test_codes_are_those_of_the_fine_tuning() -> None:
    made = student(Residual(), 3)
    layer = made.net.get_submodule("conv2")
    assert isinstance(layer, QuantConv2d)
    codes = codes_of(layer)
    values = codes.scale.reshape(-1, 1, 1, 1) * (codes.codes - codes.zero_point.reshape(-1, 1, 1, 1))
    assert torch.equal(values, effective_weight(layer)) and codes.bounds == (-4, 3)


class Shared(nn.Module):
    """A convolution and its batch norm called twice, and a convolution whose result two operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.conv(torch.relu(self.first(self.conv(x))))))
        y = self.other(x)
        return self.fc((self.second(y) + y).mean((2, 3)))


def test_parts_that_are_called_twice_stay_shared() -> None:
    made = student(Shared())
    form = integer_form(made.net)
    assert sum(isinstance(m, ChannelAffine) for m in form.modules()) == 2
    assert torch.equal(form(images()), made.net(images()))


def test_a_batch_norm_without_statistics_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1))
    net.extend([nn.Flatten(), nn.Linear(4, 5)])
    traced = trace_classifier(net.eval().requires_grad_(False), SIZE)
    made = quantize_model(traced, weight_bits=4, act_bits=4)
    observe_ranges(made.net, images(), act_range="minmax")
    form = integer_form(made.net)
    assert isinstance(form.get_submodule("1"), nn.BatchNorm2d) and torch.equal(form(images()), made.net(images()))


def test_ranges_must_be_known() -> None:
    made = student(Residual(), observed=False)
    with pytest.raises(RuntimeError, match="observed before the student becomes integers"):
        integer_form(made.net)
    integer_form(made.net, empty=True)
