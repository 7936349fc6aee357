"""Traits of operations: what is recorded for every kind of node, and that all rules read it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig
from synq.network.blocks import block_ends
from synq.network.cam_site import locate_cam
from synq.network.op_recorder import record_traits
from synq.network.op_traits import (
    UNKNOWN,
    OpKind,
    OpTraits,
    is_activation,
    is_average_pool,
    is_passive,
    traits_of,
    value_inputs,
)
from synq.network.ops import classify
from synq.network.tracing import trace_classifier
from synq.quant.cost import layer_calls
from synq.quant.equalization import find_pairs
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer
from synq.quant.student import quantize_model

SIZE = (3, 8, 8)
Operation = nn.Module | Callable[[Tensor], Any]


class Net(nn.Module):
    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.weight = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.operation(x)


def nodes_of(operation: Operation) -> list[fx.Node]:
    """Return the nodes of a traced and recorded network of one operation on an (N, 4, 6, 6) map."""
    traced = fx.symbolic_trace(Net(operation).eval())
    record_traits(traced, torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    return [node for node in traced.graph.nodes if node.op.startswith("call_")]


def flags(traits: OpTraits) -> str:
    names = ("keeps_values", "chooses", "elementwise", "positively_homogeneous", "averages", "resamples")
    return " ".join(name for name in names if getattr(traits, name))


POOL = "positively_homogeneous averages resamples"
MOVED = "keeps_values positively_homogeneous"


@pytest.mark.parametrize(
    ("operation", "kind", "expected"),
    [
        (nn.Conv2d(4, 4, 1), OpKind.LAYER, ""),
        (lambda x: nn.functional.linear(x, torch.ones(3, 6)), OpKind.UNKNOWN, ""),
        (nn.Linear(6, 6), OpKind.LAYER, ""),
        (nn.BatchNorm2d(4), OpKind.NORM, ""),
        (nn.SyncBatchNorm(4), OpKind.NORM, ""),
        (nn.BatchNorm2d(4, track_running_stats=False), OpKind.NORM, ""),
        (nn.InstanceNorm2d(4), OpKind.NONLINEAR, ""),
        (nn.GroupNorm(2, 4), OpKind.NONLINEAR, ""),
        (nn.ReLU(), OpKind.NONLINEAR, "elementwise positively_homogeneous"),
        (nn.RReLU(), OpKind.NONLINEAR, "elementwise positively_homogeneous"),
        (nn.PReLU(4), OpKind.NONLINEAR, "elementwise positively_homogeneous"),
        (lambda x: x.clamp(min=0), OpKind.NONLINEAR, "elementwise positively_homogeneous"),
        (lambda x: x.clamp(0, 6), OpKind.NONLINEAR, "elementwise"),
        (nn.ReLU6(), OpKind.NONLINEAR, "elementwise"),
        (nn.Mish(), OpKind.NONLINEAR, "elementwise"),
        (nn.Softsign(), OpKind.NONLINEAR, "elementwise"),
        (nn.Softmax(1), OpKind.NONLINEAR, ""),
        (lambda x: x * x.sigmoid(), OpKind.NONLINEAR, ""),
        (lambda x: x * 2, OpKind.STRUCTURAL, "elementwise positively_homogeneous"),
        (lambda x: x / 2, OpKind.STRUCTURAL, "elementwise positively_homogeneous"),
        (lambda x: x // 2, OpKind.NONLINEAR, "elementwise"),
        (lambda x: 1 / x, OpKind.NONLINEAR, "elementwise"),
        (lambda x: x + 1, OpKind.STRUCTURAL, "elementwise"),
        (lambda x: -x, OpKind.STRUCTURAL, "elementwise positively_homogeneous"),
        (lambda x: x.mean((2, 3)), OpKind.STRUCTURAL, POOL),
        (lambda x: x.mean(1), OpKind.STRUCTURAL, ""),
        (lambda x: x.sum((2, 3)), OpKind.STRUCTURAL, "positively_homogeneous resamples"),
        (nn.AvgPool2d(2), OpKind.STRUCTURAL, POOL),
        (nn.AvgPool2d(2, divisor_override=3), OpKind.STRUCTURAL, "positively_homogeneous resamples"),
        (nn.AdaptiveAvgPool2d(2), OpKind.STRUCTURAL, POOL),
        (nn.MaxPool2d(2), OpKind.STRUCTURAL, f"{MOVED} resamples"),
        (lambda x: x.amax((2, 3)), OpKind.STRUCTURAL, f"{MOVED} resamples"),
        (lambda x: x.amax(1), OpKind.STRUCTURAL, "keeps_values"),
        (nn.UpsamplingNearest2d(scale_factor=2), OpKind.STRUCTURAL, f"{MOVED} resamples"),
        (lambda x: F.interpolate(x, scale_factor=2.0), OpKind.STRUCTURAL, f"{MOVED} resamples"),
        (nn.UpsamplingBilinear2d(scale_factor=2), OpKind.STRUCTURAL, "positively_homogeneous resamples"),
        (nn.ZeroPad2d(1), OpKind.STRUCTURAL, MOVED),
        (lambda x: F.pad(x, (1, 1)), OpKind.STRUCTURAL, MOVED),
        (lambda x: F.pad(x, (1, 1), value=0.5), OpKind.STRUCTURAL, ""),
        (nn.ConstantPad2d(1, 0.5), OpKind.STRUCTURAL, ""),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), OpKind.STRUCTURAL, "keeps_values"),
        (nn.PixelUnshuffle(2), OpKind.STRUCTURAL, "keeps_values"),
        (lambda x: F.pixel_unshuffle(x, 2), OpKind.STRUCTURAL, "keeps_values"),
        (lambda x: torch.cat([x, torch.zeros_like(x)], 1), OpKind.STRUCTURAL, "keeps_values"),
        (lambda x: torch.cat([x, torch.ones_like(x)], 1), OpKind.STRUCTURAL, ""),
        (lambda x: torch.maximum(x, x.flip(1)), OpKind.STRUCTURAL, "keeps_values chooses"),
        (lambda x: torch.where(x > 0.5, x, x.flip(1)), OpKind.STRUCTURAL, "keeps_values chooses"),
        (lambda x: torch.where(x > 0.5, x, 1.0), OpKind.NONLINEAR, "elementwise"),
        (lambda x: x.masked_fill(x > 0.5, 1.0), OpKind.NONLINEAR, "elementwise"),
        (lambda x: x > 0.5, OpKind.SELECTOR, ""),
        (lambda x: x.argmax(1), OpKind.SELECTOR, ""),
        (lambda x: x.topk(2, 1)[1], OpKind.SELECTOR, ""),
        (lambda x: x.topk(2, 1)[0], OpKind.STRUCTURAL, "keeps_values"),
        (lambda x: (x > 0.5).float(), OpKind.NONLINEAR, ""),
        (lambda x: x.half(), OpKind.STRUCTURAL, ""),
        (lambda x: x.double(), OpKind.PASSIVE, "keeps_values elementwise positively_homogeneous"),
        (lambda x: x.view(torch.int32), OpKind.UNKNOWN, ""),
        (lambda x: x.flatten(1), OpKind.PASSIVE, "keeps_values"),
        (lambda x: x.shape, OpKind.NUMBER, ""),
        (lambda x: torch._assert(x.sum() > 0, "positive"), OpKind.NUMBER, ""),
        (lambda x: x.amax().item(), OpKind.UNKNOWN, ""),
        (lambda x: torch.zeros_like(x), OpKind.CONSTANT, ""),
        (lambda x: x.new_full((2, 4), 3.0), OpKind.CONSTANT, ""),
        (lambda x: torch.linalg.svdvals(x), OpKind.UNKNOWN, ""),
    ],
)
def test_kind_and_traits(operation: Operation, kind: OpKind, expected: str) -> None:
    traits = traits_of(nodes_of(operation)[-1])
    assert (traits.kind, flags(traits)) == (kind, expected)
    assert bool(traits.reason) == (kind is OpKind.UNKNOWN)


@pytest.mark.parametrize("make", [nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout])
def test_dropouts_are_the_identity_in_evaluation(make: type[nn.Module]) -> None:
    assert is_passive(nodes_of(make(0.5))[-1]) and is_passive(
        nodes_of(nn.Sequential(nn.Flatten(2), nn.Dropout1d()))[-1]
    )


def test_what_a_node_reads_are_the_tensors_whose_values_reach_its_output() -> None:
    x, other, condition = (
        lambda x: x.flip(1).expand_as(x.repeat(1, 1, 1, 1)),
        lambda x: torch.cat([x.new_zeros(x.shape), x.flip(1)], 1),
        lambda x: torch.where(x > 0.5, x, x.flip(1)),
    )
    assert [node.name for node in value_inputs(nodes_of(x)[-1])] == ["flip"]
    assert [node.name for node in value_inputs(nodes_of(other)[-1])] == ["flip"]
    assert [node.name for node in value_inputs(nodes_of(condition)[-1])] == ["x", "flip"]


def test_parts_written_into_a_tensor_are_seen_in_the_whole() -> None:
    def assembled(x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="circular")  # copies parts into views of an empty tensor

    traits = traits_of(nodes_of(assembled)[-1])
    assert traits.kind is OpKind.STRUCTURAL and traits.keeps_values and "copy" in traits.operators


def test_parts_of_a_tuple_have_traits_of_their_own() -> None:
    pair = nodes_of(lambda x: torch.var_mean(x, (2, 3))[0] + torch.var_mean(x, (2, 3))[1])
    by_name = {node.name: traits_of(node) for node in pair}
    assert by_name["var_mean"].kind is OpKind.STRUCTURAL and not by_name["var_mean"].keeps_values
    assert by_name["getitem"].kind is OpKind.NONLINEAR
    assert by_name["getitem_1"].kind is OpKind.STRUCTURAL and by_name["getitem_1"].averages


def test_inputs_parameters_the_output_and_new_nodes_have_no_traits() -> None:
    traced = fx.symbolic_trace(Net(lambda x: x.relu()))
    assert all(traits_of(node) is UNKNOWN for node in traced.graph.nodes)
    with pytest.raises(ValueError, match="was not recorded by trace_classifier"):
        classify(traced)
    student = quantize_model(trace_classifier(Strip(), SIZE), QuantConfig(weight_bits=4, act_bits=4))
    quantizers = [n for n in student.net.graph.nodes if str(n.target).startswith(ACT_QUANTIZERS)]
    assert quantizers and all(traits_of(node) is UNKNOWN and is_activation(node) for node in quantizers)
    assert all(isinstance(student.net.get_submodule(str(node.target)), ActQuantizer) for node in quantizers)


def test_a_function_of_the_same_name_is_another_operation() -> None:
    def mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.exp()

    def flatten(x: Tensor) -> Tensor:
        return x.flip(1)

    graph = fx.Graph()
    x = graph.placeholder("x")
    pooled, flat = graph.call_function(mean, (x, (2, 3))), graph.call_function(flatten, (x,))
    own, own_flat = graph.call_function(torch.mean, (x, (2, 3))), graph.call_function(torch.flatten, (x,))
    graph.output((pooled, flat, own, own_flat))
    record_traits(fx.GraphModule(nn.Module(), graph), torch.rand(2, 3, 4, 4))
    assert not is_average_pool(pooled) and is_average_pool(own)
    assert not is_passive(flat) and is_passive(own_flat)


class Strip(nn.Module):
    """The second convolution reads a pool of rows of pixels, the classifier an average pool of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.max_pool, self.conv2 = nn.MaxPool1d(2), nn.Conv2d(4, 6, 1)
        self.avg_pool, self.fc = nn.AvgPool1d(32), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.max_pool(x.flatten(2)).unflatten(2, (8, 4))
        x = F.relu(self.conv2(x))
        return self.fc(self.avg_pool(x.flatten(2)).flatten(1))


def test_operations_that_no_table_names_are_known_to_every_rule() -> None:
    """One-dimensional pools are known by the operators that they come down to."""
    traced = trace_classifier(Strip(), SIZE)
    layers, nonlinear = classify(traced)
    assert [node.name for node in layers] == ["conv", "conv2", "fc"]
    assert [node.name for node in nonlinear] == ["relu", "relu_1"]
    assert [node.name for node in block_ends(traced)] == ["relu", "relu_1", "fc"]
    assert (locate_cam(traced).kind, locate_cam(traced).node) == ("closed_form", "relu_1")
    assert [(pair.producer, pair.consumer) for pair in find_pairs(traced)] == [("bn", "conv2"), ("conv2", "fc")]
    # The cost of a layer counts the bits of what it reads: a maximum lies on the grid of its input, a mean does not.
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=3))
    assert [(call.layer, call.inputs) for call in layer_calls(student.net)] == [
        ("conv", ()),
        ("conv2", ("relu",)),
        ("fc", ()),
    ]
