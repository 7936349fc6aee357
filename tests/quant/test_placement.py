"""Quantization points of a student for an engine: every tensor that depends on the image is on a grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.engine_nets import NETS, SIZE, DenseNet, Squeezed, float_reads, points_of, student_for, traced
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear, quantizers_bypassed
from synq.quant.placement import FLOAT_LOGITS, LOGITS_HEADROOM
from synq.quant.student import observe_ranges

TARGETS = ("onnxruntime", "openvino", "litert", "executorch", "tensorrt", "qnn")


@pytest.mark.parametrize("name", [name for name, (_, points) in NETS.items() if points])
def test_the_points_of_a_network_are_those_of_the_rule(name: str) -> None:
    make, points = NETS[name]
    found = points_of(student_for(make(), "litert").net)
    assert list(found) == [*points.split()]
    assert list(points_of(student_for(make(), "onnxruntime").net)) == [*points.split()][:-1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETS)
def test_nothing_reads_a_float(name: str, target: str) -> None:
    """What an engine computes in one step reads codes; only within a step, and as logits, there are floats."""
    assert float_reads(student_for(NETS[name][0](), target).net, target) == []


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("resnet18", "openvino"), ("mobilenet_v2", "executorch")),
        *(("mobilenet_v3_small", "openvino"), ("shufflenet_v2_x0_5", "executorch")),
        pytest.param("resnet18", "executorch", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "openvino", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", "executorch", marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x0_5", "openvino", marks=pytest.mark.slow),
        pytest.param("densenet121", "openvino", marks=pytest.mark.slow),  # "dense" of NETS is the quick one
        pytest.param("densenet121", "executorch", marks=pytest.mark.slow),
    ],
)
def test_families_run_and_have_all_their_ranges(name: str, target: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    size = (3, 32, 32)
    student = student_for(models.get_model(name, num_classes=10), target, size=size)
    quantizers = [module for module in student.net.modules() if isinstance(module, ActQuantizer)]
    assert all(quantizer.has_range for quantizer in quantizers)
    layers = sum(isinstance(module, QuantConv2d | QuantLinear) for module in student.net.modules())
    assert len(quantizers) >= layers
    with torch.no_grad():
        assert bool(student.net(torch.randn(2, *size)).isfinite().all())
    floats = [row.name for row in student.rows if row.bits == 32]
    assert len(floats) == (1 if target in FLOAT_LOGITS else 0)


@pytest.mark.parametrize(
    ("activation", "folded"),
    [
        (F.relu, True),
        (F.relu6, True),
        (nn.ReLU6(), True),
        (nn.Hardtanh(0, 4), True),
        (lambda x: x.clamp(0, 3), True),
        (lambda x: torch.clamp(x, min=0.0), True),
        (lambda x: x.clamp_(min=0), True),
        (lambda x: F.relu(F.dropout(x, 0.5, training=False)), True),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), False),
        (nn.Hardtanh(), False),
        (lambda x: x.clamp(max=6), False),
        (lambda x: x.clamp(0.5, 3), False),
        (F.hardswish, False),
        (torch.sigmoid, False),
        (nn.PReLU(), False),
    ],
)
def test_what_is_folded_into_a_layer_limits_its_codes_from_zero(activation: Any, folded: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.activation = activation if isinstance(activation, nn.Module) else None

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(activation(self.conv(x)).mean((2, 3)))

    found = points_of(student_for(Net(), "litert").net)
    assert ("conv" in found) is not folded
    if folded:
        assert int(list(found.values())[1].zero_point) == 0


def test_a_batch_norm_and_its_activation_are_one_point_whatever_returns_its_input_between_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
            self.drop, self.act = nn.Identity(), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act(self.drop(self.norm(self.conv(x)))).mean((2, 3)))

    assert list(points_of(student_for(Net(), "litert").net)) == ["x", "act", "mean", "fc"]


class Sums(nn.Module):
    """A sum whose inputs are given by name."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.pool, self.fc, self.drop = nn.MaxPool2d(3, 1, 1), nn.Linear(8, 5), nn.Dropout()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        tensors: dict[str, Callable[[], Tensor]] = {
            "stem": lambda: x,
            "a": lambda: self.a(x),
            "b": lambda: self.b(x),
            "relu": lambda: self.a(x).relu(),
            "pooled": lambda: self.pool(self.a(x)),
            "dropped": lambda: self.drop(self.a(x)),
            "far": lambda: self.b(self.a(x)),
        }
        return self.fc((tensors[self.left]() + tensors[self.right]()).mean((2, 3)))


@pytest.mark.parametrize(
    ("left", "right", "clamped"),
    [
        ("a", "b", ["a"]),  # of two convolutions the first input
        ("b", "a", ["b"]),
        ("pooled", "b", ["b"]),  # what is moved in between is not fused
        ("far", "stem", ["b"]),
        ("stem", "far", ["b"]),
        ("a", "stem", []),  # the other input is the convolution's input
        ("stem", "a", []),
        ("stem", "dropped", []),
        ("dropped", "b", ["a"]),
        ("relu", "b", ["relu_1"]),
    ],
)
def test_openvino_fuses_one_convolution_into_a_sum(left: str, right: str, clamped: list[str]) -> None:
    found = points_of(student_for(Sums(left, right), "openvino").net)
    assert [name for name, quantizer in found.items() if not quantizer.rounded] == clamped
    assert all(quantizer.rounded for quantizer in points_of(student_for(Sums(left, right), "onnxruntime").net).values())


def test_a_convolution_with_two_readers_is_rounded() -> None:
    class Read(Sums):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.stem(x).relu())
            return self.fc((y + self.b(y)).mean((2, 3)))

    found = points_of(student_for(Read("a", "b"), "openvino").net)
    # The other input of the sum is the input of b.
    assert all(quantizer.rounded for quantizer in found.values())


def test_bits_follow_the_place_in_the_network() -> None:
    options = {"weight_bits": 4, "act_bits": 3, "first_bits": 7, "last_bits": 6}
    student = student_for(Squeezed(), "litert", layer_act_bits={"hardsigmoid": 5}, **options)
    bits = {name: quantizer.bits for name, quantizer in points_of(student.net).items()}
    assert bits["x"] == 7 and bits["hardsigmoid"] == 5 and bits["mean_1"] == bits["fc"] == 6
    # What only a product or a pool reads costs no less at 3 bits than at 8.
    assert {name: bits[name] for name in bits.keys() - {"x", "hardsigmoid", "mean_1", "fc"}} == {
        "bn": 8,
        "hardswish": 8,
        "mean": 3,
        "relu": 3,
        "expand": 8,
        "mul": 8,
    }
    assert student.at_ends == {"x", "mean_1", "fc"}
    weights = {row.name: row.bits for row in student.rows if row.role == "weight"}
    assert weights == {"conv": 7, "reduce": 4, "expand": 4, "fc": 6}
    usual = {
        (row.role, row.name): row.bits for row in student_for(Squeezed(), "onnxruntime", weight_bits=4, act_bits=3).rows
    }
    assert [usual["weight", name] for name in ("conv", "reduce", "expand", "fc")] == [8, 4, 4, 8]
    assert [usual["activation", name] for name in ("x", "conv", "mean_1", "relu", "fc")] == [8, 8, 8, 3, 32]


def test_rows_of_a_step_and_of_what_moves_values_have_the_bits_of_the_tensor() -> None:
    student = student_for(DenseNet(), "onnxruntime", weight_bits=4, act_bits=4)
    rows = {row.name: row for row in student.rows if row.role == "activation"}
    assert [(rows[name].bits, rows[name].note) for name in ("conv1", "relu", "flatten", "fc")] == [
        (4, "on the grid of relu"),
        (4, ""),
        (8, "on the grid of mean"),
        (32, "float: not a quantization point"),
    ]
    clamped = next(row for row in student_for(Sums("a", "b"), "openvino").rows if row.note == "clamped, not rounded")
    assert clamped.name == "a" and clamped.bits == 8


def test_bit_operations_follow_the_grid_of_the_input() -> None:
    student = student_for(DenseNet(), "litert", weight_bits=3, act_bits=5)
    weights = {row.name: row for row in student.rows if row.role == "weight"}
    assert weights["conv1"].bitops == weights["conv1"].macs * 8 * 8
    assert weights["conv2"].bitops == weights["conv2"].macs * 3 * 5
    assert student.bitops == sum(row.bitops for row in weights.values())


def test_a_name_that_is_no_point_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"`quant.layer_act_bits` must name quantized tensors, but got 'conv1'"):
        student_for(DenseNet(), "openvino", layer_act_bits={"conv1": 8})


def test_the_graph_is_unchanged_and_taps_are_the_quantized_nodes() -> None:
    graph = traced(DenseNet(), SIZE)
    before = [node.name for node in graph.graph.nodes]
    student = student_for(DenseNet(), "executorch")
    assert [node.name for node in graph.graph.nodes] == before
    assert [*student.taps] == [*points_of(student.net)]
    for node in student.net.graph.nodes:
        if node.name in student.taps:
            assert [user.name for user in node.users] == [student.taps[node.name]]


@pytest.mark.parametrize("act_range", ["minmax", "mse"])
def test_the_range_of_logits_on_a_grid_has_headroom(act_range: Any) -> None:
    """Real images reach beyond the logits of synthetic ones, and logits at the largest code are a tie."""
    student = student_for(Squeezed(), "litert")
    images = torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(3))
    observe_ranges(student.net, images, act_range=act_range)
    found = points_of(student.net)
    logits = found["fc"]
    with torch.no_grad(), quantizers_bypassed(student.net):
        values = student.net(images)
    low, high = (float(logits.scale) * (code - int(logits.zero_point)) for code in (0, logits.quant_max))
    assert high == pytest.approx(LOGITS_HEADROOM * max(0.0, float(values.max())), rel=0.05)
    assert low == pytest.approx(LOGITS_HEADROOM * min(0.0, float(values.min())), rel=0.05)
    assert [name for name, quantizer in found.items() if quantizer.headroom != 1] == ["fc"]
