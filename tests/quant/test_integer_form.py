"""The integer form computes what the student computes, and holds nothing but codes and scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.integer_students import images, student
from support.small_nets import SIZE, Dense, Residual, depthwise, plain
from synq.config.run import QuantConfig
from synq.export.packed import load_packed, read_packed, save_packed
from synq.network.average_pools import ScaledAveragePool
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import codes_of, integer_form
from synq.quant.integer_layers import ChannelAffine, IntegerConv2d, IntegerLinear
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear, effective_weight
from synq.quant.student import observe_ranges, quantize_model

NETS: tuple[Callable[[], nn.Module], ...] = (Residual, Dense, plain, depthwise)


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for what a code that fell upon an edge, and rounded the other way, has moved."""
    return float(((found - wanted).abs() < 1e-4 * wanted.std()).float().mean()) > 0.9


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("act_points", ["relu", "inputs"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_logits_are_the_students_but_for_rounding(
    make: Callable[[], nn.Module], act_points: Literal["relu", "inputs"], bits: int
) -> None:
    made = student(make(), bits, act_points)
    form = integer_form(made.net)
    assert near(form(images()), made.net(images()))
    assert torch.equal(integer_form(made.net, operations="onnx")(images()), form(images()))
    assert near(integer_form(made.net, operations="torch")(images()), made.net(images()))
    assert not any(isinstance(m, QuantConv2d | QuantLinear | ActQuantizer | nn.BatchNorm2d) for m in form.modules())
    assert sum(isinstance(m, ChannelAffine) for m in form.modules()) == (2 if make is Dense else 0), (
        "norms before layers"
    )
    assert all(b.dtype in (torch.int8, torch.int32) for n, b in form.named_buffers() if n.endswith((".codes", "point")))
    layers = [m for m in form.modules() if isinstance(m, IntegerConv2d | IntegerLinear)]
    assert layers and all(int(m.integer_weight.codes.max()) < 2 ** (bits - 1) for m in layers)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("bits", [3, 8])
def test_layers_add_whole_numbers_so_that_no_order_of_adding_matters(make: Callable[[], nn.Module], bits: int) -> None:
    form = integer_form(student(make(), bits, "inputs").net)
    seen: list[tuple[Tensor, Tensor]] = []
    for module in form.modules():
        if isinstance(module, IntegerConv2d | IntegerLinear):
            module.register_forward_pre_hook(lambda layer, args: seen.append((args[0], layer.integer_weight())))  # type: ignore[func-returns-value]
    whole = form(images())
    assert seen and all(torch.equal(part, part.round()) for pair in seen for part in pair)
    assert all(float(x.abs().max()) < 2**bits for x, _ in seen)
    assert torch.equal(whole, torch.cat([form(image[None]) for image in images()])), (
        "one by one as together, to the last bit"
    )


def test_codes_are_those_of_a_division() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 20
    codes = torch.ops.synq.quantize_per_tensor(x, 0.0973, 7, 200)
    wanted = np.clip(np.round(x.numpy() / np.float32(0.0973)) + 7, 0, 200)
    assert codes.dtype == torch.uint8 and np.array_equal(codes.numpy(), wanted.astype(np.uint8))


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


@pytest.mark.parametrize("act_points", ["relu", "inputs"])
def test_parts_that_are_called_twice_stay_shared(act_points: Literal["relu", "inputs"]) -> None:
    made = student(Shared(), 4, act_points)
    form = integer_form(made.net)
    assert sum(isinstance(m, ChannelAffine) for m in form.modules()) == 2
    assert near(form(images()), made.net(images()))


class HalfShared(nn.Module):
    """A convolution that is called before two batch norms, and a batch norm that is called after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.one, self.other, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.shared(torch.relu(self.first(self.shared(x))))))
        x = torch.relu(self.norm(self.other(torch.relu(self.norm(self.one(x))))))
        return self.fc(x.mean((2, 3)))


def test_a_part_that_is_called_twice_is_not_folded_into_one_that_is_called_once() -> None:
    made = student(HalfShared(), 8)
    form = integer_form(made.net)
    assert sum(isinstance(m, ChannelAffine) for m in form.modules()) == 3
    assert near(form(images()), made.net(images()))


def test_padded_average_pools_have_the_form_that_exporters_keep() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1))
    made = student(net.extend([nn.Flatten(), nn.Linear(4, 5)]))
    form = integer_form(made.net)
    assert sum(isinstance(m, ScaledAveragePool) for m in form.modules()) == 1
    assert near(form(images()), made.net(images()))


class Peeking(nn.Module):
    """Reads the parameters of a batch norm and of a layer, and calls both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))) * self.norm.weight.view(1, -1, 1, 1) + self.conv.bias.view(1, -1, 1, 1)
        return self.fc((x * self.gain).mean((2, 3)))


def test_tensors_that_are_read_directly_stay(tmp_path: Path) -> None:
    made = student(Peeking())
    form = integer_form(made.net)
    assert near(form(images()), made.net(images()))
    size = save_packed(tmp_path / "x.safetensors", form)
    again = load_packed(tmp_path / "x.safetensors", made.net)
    assert size and torch.equal(again(images()), form(images()))


@pytest.mark.parametrize("make", [*NETS, Peeking, Shared])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_account_of_the_size_is_that_of_the_files_tensors(
    make: Callable[[], nn.Module], bits: int, tmp_path: Path
) -> None:
    made = student(make(), bits, "inputs")
    save_packed(tmp_path / "x.safetensors", integer_form(made.net))
    tensors, _ = read_packed(tmp_path / "x.safetensors")
    read = {str(node.target) for node in made.net.graph.nodes if node.op == "get_attr"}
    stored = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in read)
    assert made.size_bytes == stored


def test_a_batch_norm_without_statistics_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1))
    net.extend([nn.Flatten(), nn.Linear(4, 5)])
    traced = trace_classifier(net.eval().requires_grad_(False), SIZE)
    made = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4))
    observe_ranges(made.net, images(), act_range="minmax")
    form = integer_form(made.net)
    assert isinstance(form.get_submodule("1"), nn.BatchNorm2d) and near(form(images()), made.net(images()))


def test_ranges_must_be_known() -> None:
    made = student(Residual(), observed=False)
    with pytest.raises(RuntimeError, match="observed before conversion to the integer form"):
        integer_form(made.net)
    integer_form(made.net, empty=True)
