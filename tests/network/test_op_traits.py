"""The table of operation traits: well-formed rows, the traits of each operation, and one row that every rule obeys."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig
from synq.network import op_traits
from synq.network.blocks import block_ends
from synq.network.cam_site import locate_cam
from synq.network.op_traits import OPERATIONS, UNKNOWN, OpKind, OpTraits, is_average_pool, is_passive, traits_of
from synq.network.ops import classify
from synq.network.tracing import trace_classifier
from synq.quant.cost import layer_calls
from synq.quant.equalization import find_pairs
from synq.quant.student import quantize_model

SIZE = (3, 8, 8)
FLAGS = tuple(field.name for field in dataclasses.fields(OpTraits) if field.type in (bool, "bool"))
MOVES = "pad pixel_shuffle channel_shuffle permute roll narrow expand copy unflatten"
POOL = "positively_homogeneous averages resamples"
EXPECTED = {
    "layer": "conv2d linear",
    "norm": "batch_norm",
    "nonlinear": "leaky_relu prelu relu relu6 hardtanh elu selu celu gelu silu mish hardswish hardsigmoid sigmoid tanh "
    "softplus softmax clamp abs power exp",
    "product": "mul",
    "quotient": "div",
    "structural": "add sub neg sum max_pool avg_pool mean upsample upsampling cat stack assigned split pad_layer pad "
    "pixel_shuffle channel_shuffle permute roll narrow expand copy unflatten sequential",
    "passive": "flatten unflatten_layer reshape squeeze identity dropout",
    "number": "number",
}
"""Operations of each kind."""
EXPECTED_FLAGS = {
    "relu": "positively_homogeneous",
    "leaky_relu": "positively_homogeneous",
    "prelu": "positively_homogeneous",
    "add": "returns_tuple",
    "max_pool": "keeps_values positively_homogeneous resamples",
    "avg_pool": POOL,
    "mean": f"{POOL} reduces_dims",
    "upsample": "resamples",
    "cat": "joins",
    "stack": "joins",
    "assigned": "joins",
    "split": "keeps_values returns_tuple",
    "pad_layer": "keeps_values positively_homogeneous",
    **dict.fromkeys(MOVES.split(), "keeps_values"),
    **dict.fromkeys(EXPECTED["passive"].split(), "keeps_values"),
}
"""Traits that are true, by operation; all others have none."""


def test_every_row_is_well_formed() -> None:
    assert len({row.name for row in OPERATIONS}) == len(OPERATIONS)
    for row in OPERATIONS:
        assert list(row.spellings()), f"{row.name} has no spelling"
        assert row.kind is not OpKind.UNKNOWN, row.name
        assert all(isinstance(module, type) and issubclass(module, nn.Module) for module in row.modules), row.name
        assert all(callable(function) for function in row.functions), row.name
        assert all(name.isidentifier() for name in (*row.methods, *row.names)), row.name
        assert all(hasattr(Tensor, name) for name in row.methods), row.name
    assert list(UNKNOWN.spellings()) == []


def test_no_spelling_is_in_two_rows() -> None:
    counts = Counter(spelling for row in OPERATIONS for spelling in row.spellings())
    assert not {spelling for spelling, count in counts.items() if count > 1}
    # A name covers methods and functions of every library: no other row may have one of its name.
    owners = {name: row for row in OPERATIONS for name in row.names}
    for row in OPERATIONS:
        for name in (*row.methods, *(function.__name__ for function in row.functions)):
            assert owners.get(name, row) is row, f"{name} of {row.name} is also a name of {owners[name].name}"


def test_traits_of_a_row_fit_each_other() -> None:
    for row in OPERATIONS:
        assert row.keeps_values or row.kind is not OpKind.PASSIVE, f"{row.name}: what only reshapes keeps its values"
        assert not (row.keeps_values and row.averages), f"{row.name}: a mean is a new value"
        assert not (row.keeps_values and row.joins), f"{row.name}: parts may lie on different grids"
        assert row.functions or not row.averages, f"{row.name}: PyTorch's functions are matched by identity"


def test_the_traits_of_every_operation() -> None:
    kinds = {name: kind for kind, names in EXPECTED.items() for name in names.split()}
    assert {row.name: row.kind.value for row in OPERATIONS} == kinds
    flags = {row.name: {flag for flag in FLAGS if getattr(row, flag)} for row in OPERATIONS}
    assert flags == {name: set(EXPECTED_FLAGS.get(name, "").split()) for name in kinds}


def node_of(operation: nn.Module | Callable[[Tensor], Any]) -> tuple[fx.GraphModule, fx.Node]:
    """Return a traced network of one operation, and its node."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operation = operation

        def forward(self, x: Tensor) -> Any:
            return self.operation(x)

    traced = fx.symbolic_trace(Net())
    return traced, next(node for node in reversed(traced.graph.nodes) if node.op.startswith("call_"))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (nn.ReLU6(), "relu6"),
        (nn.UpsamplingNearest2d(scale_factor=2), "upsampling"),
        (nn.SyncBatchNorm(3), "batch_norm"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.mean((2, 3)), "mean"),
        (lambda x: x / 2, "div"),
        (lambda x: x[:, 0], "split"),
        (lambda x: x.shape, "number"),
        (lambda x: F.max_pool2d(x, 2), "max_pool"),
        (lambda x: x.view(2, -1), "reshape"),
        (F.dropout, "dropout"),
        (lambda x: torch.matmul(x, x), "unknown"),
        (nn.Dropout3d(), "unknown"),
    ],
)
def test_the_row_of_a_node_in_any_spelling(operation: nn.Module | Callable[[Tensor], Any], name: str) -> None:
    assert traits_of(*node_of(operation)).name == name


def test_inputs_parameters_and_the_output_have_no_traits() -> None:
    net = nn.Module()
    net.relu = nn.Parameter(torch.ones(1))
    graph = fx.Graph()
    nodes = [graph.placeholder("relu"), graph.get_attr("relu")]
    nodes.append(graph.output(nodes[0]))
    traced = fx.GraphModule(net, graph)
    assert [traits_of(traced, node) for node in nodes] == [UNKNOWN] * 3


def test_a_function_of_the_same_name_is_no_average_pool_of_ours() -> None:
    def mean(x: Tensor) -> Tensor:
        return x

    def flatten(x: Tensor) -> Tensor:
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    pooled, flat = graph.call_function(mean, (x,)), graph.call_function(flatten, (x,))
    own, own_flat = graph.call_function(torch.mean, (x,)), graph.call_function(torch.flatten, (x,))
    net = fx.GraphModule(nn.Module(), graph)
    assert traits_of(net, pooled) is traits_of(net, own)
    assert not is_average_pool(net, pooled) and is_average_pool(net, own)
    assert not is_passive(net, flat) and is_passive(net, own_flat)


class Strip(nn.Module):
    """The second convolution reads a max pool of rows of pixels, the classifier an average pool of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.max_pool, self.conv2 = nn.FractionalMaxPool2d(2, output_size=4), nn.Conv2d(4, 6, 1)
        self.avg_pool, self.fc = nn.AvgPool1d(16), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool(F.relu(self.bn(self.conv(x))))
        x = F.relu(self.conv2(x))
        return self.fc(self.avg_pool(x.flatten(2)).flatten(1))


def test_one_new_row_is_known_to_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    traced = trace_classifier(Strip(), SIZE)
    with pytest.raises(ValueError, match="node 'max_pool' is FractionalMaxPool2d"):
        classify(traced)
    maximum = OpTraits(
        "random_max_pool",
        OpKind.STRUCTURAL,
        modules=(nn.FractionalMaxPool2d,),
        keeps_values=True,
        positively_homogeneous=True,
        resamples=True,
    )
    monkeypatch.setattr(op_traits, "OPERATIONS", (*OPERATIONS, maximum))
    with pytest.raises(ValueError, match="node 'avg_pool' is AvgPool1d"):
        classify(traced)
    assert locate_cam(traced).kind == "autograd" and locate_cam(traced).node == "relu_1"
    average = OpTraits(
        "avg_pool1d",
        OpKind.STRUCTURAL,
        modules=(nn.AvgPool1d,),
        positively_homogeneous=True,
        averages=True,
        resamples=True,
    )
    monkeypatch.setattr(op_traits, "OPERATIONS", (*OPERATIONS, maximum, average))

    layers, nonlinear = classify(traced)
    assert [node.name for node in layers] == ["conv", "conv2", "fc"]
    assert [node.name for node in nonlinear] == ["relu", "relu_1"]
    assert [node.name for node in block_ends(traced)] == ["relu", "relu_1", "fc"]
    assert (locate_cam(traced).kind, locate_cam(traced).node) == ("closed_form", "relu_1")
    assert [(pair.producer, pair.consumer) for pair in find_pairs(traced)] == [("bn", "conv2")]
    # The cost of a layer counts the bits of what it reads: a maximum lies on the grid of its input, a mean does not.
    # This pool draws its windows at random, so that no two forward passes agree.
    monkeypatch.setattr("synq.quant.student._check_same", lambda *networks: None)
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=3))
    assert [(call.layer, call.inputs) for call in layer_calls(student.net)] == [
        ("conv", ()),
        ("conv2", ("relu",)),
        ("fc", ()),
    ]
