"""The integer form computes what the student computes, and holds nothing but codes and scales."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from small_nets import SIZE, Dense, Residual, depthwise, plain
from torch import Tensor, nn

from synq.integer_form import Codes, IntegerActivation, IntegerConv2d, IntegerLinear, codes_of, integer_form
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
def test_without_folding_every_logit_is_the_students(
    make: Callable[[], nn.Module], act_points: Literal["relu", "inputs"], bits: int
) -> None:
    made = student(make(), bits, act_points)
    form = integer_form(made.net, fold=False)
    assert torch.equal(form(images()), made.net(images()))
    assert not any(isinstance(m, QuantConv2d | QuantLinear | ActQuantizer) for m in form.modules())
    assert all(b.dtype in (torch.int8, torch.int32) for n, b in form.named_buffers() if n.endswith((".codes", "point")))
    layers = [m for m in form.modules() if isinstance(m, IntegerConv2d | IntegerLinear)]
    assert layers and all(int(m.integer_weight.codes.max()) < 2 ** (bits - 1) for m in layers)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("place", ["layer", "apart"])
def test_folding_changes_logits_by_rounding_alone(
    make: Callable[[], nn.Module], place: Literal["layer", "apart"]
) -> None:
    made = student(make(), 4)
    form = integer_form(made.net, bias_place=place)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in form.modules()) == (2 if make is Dense else 0), (
        "Dense: norms before layers"
    )
    # Without rounding of activations no tie can flip a code: what is left is the rounding of float32.
    for net in (form, made.net):
        for name, module in list(net.named_modules()):
            if isinstance(module, IntegerActivation | ActQuantizer):
                net.set_submodule(name, nn.Identity())
    wanted = made.net(images())
    assert torch.allclose(form(images()), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_negative_factor_mirrors_and_a_zero_one_is_dead() -> None:
    codes = torch.tensor([[-8, 7, 3], [-8, 7, 3], [-8, 7, 3]], dtype=torch.int8)
    whole = Codes(codes=codes, scale=torch.tensor([0.5, 0.5, 0.5]), zero_point=torch.tensor([-2, -2, -2]), bits=4)
    half = whole.scaled(torch.tensor([2.0, -2.0, 0.0]))
    assert half.codes.tolist() == [[-8, 7, 3], [7, -8, -4], [-2, -2, -2]]
    assert half.zero_point.tolist() == [-2, 1, -2] and half.scale.tolist() == [1.0, 1.0, 1.0]
    values = half.scale[:, None] * (half.codes - half.zero_point[:, None])
    assert values.tolist() == [[-6.0, 9.0, 5.0], [6.0, -9.0, -5.0], [0.0, 0.0, 0.0]]


def test_codes_are_those_of_the_fine_tuning() -> None:
    made = student(Residual(), 3)
    layer = made.net.get_submodule("conv2")
    assert isinstance(layer, QuantConv2d)
    codes = codes_of(layer)
    values = codes.scale.reshape(-1, 1, 1, 1) * (codes.codes - codes.zero_point.reshape(-1, 1, 1, 1))
    assert torch.equal(values, effective_weight(layer)) and codes.bounds == (-4, 3)


class Shared(nn.Module):
    """A convolution called twice, and one whose result two operations read: neither batch norm may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other, self.third, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.conv(torch.relu(self.first(self.conv(x))))))
        y = self.other(x)
        return self.fc((self.third(y) + y).mean((2, 3)))


def test_a_norm_that_cannot_be_folded_is_kept() -> None:
    made = student(Shared())
    form = integer_form(made.net)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in form.modules()) == 3
    assert torch.equal(form(images()), made.net(images()))


def test_ranges_must_be_known() -> None:
    made = student(Residual(), observed=False)
    with pytest.raises(RuntimeError, match="observed before the student becomes integers"):
        integer_form(made.net)
    integer_form(made.net, empty=True)
