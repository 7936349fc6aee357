"""Operations that ONNX cannot express are named, with their layers, before any work."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from support.export_nets import Averages, Exact, Unexportable
from support.integer_students import student
from support.small_nets import SIZE, Residual
from synq.cli import run
from synq.export.onnx_graph import check_operations
from synq.export.operation_check import KNOWN, _faults, _is_checked, _Probe, reason, unexportable_operations
from synq.network.op_traits import OpKind, operation_name, traits_of
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form


@cache
def lines() -> list[str]:
    return unexportable_operations(integer_form(student(Unexportable(), 4, "inputs").net))


@pytest.mark.slow
def test_bugs_10_each_operation_is_named_with_its_layer_and_settings() -> None:
    assert len(lines()) == 2
    lost, missing = lines()
    assert lost.startswith("interpolate(scale_factor=1.7, mode=bilinear, antialias=True) of node interpolate becomes")
    assert missing.startswith("AdaptiveMaxPool2d(output_size=(7, 5)) of node odd_pool has no ONNX export (No ONNX func")
    assert not any("\x1b" in line or "\n" in line for line in lines())


class Selects(nn.Module):
    """Operations that read masks and indices, which are computed from the image or from its size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = torch.where(x > 0, x, 0.1 * x).masked_fill(x < -1, 0)
        x = x.gather(1, x.mean((2, 3), keepdim=True).argsort(1).expand_as(x))
        x = torch.take_along_dim(x, x.sum((2, 3), keepdim=True).topk(8, 1)[1], 1)
        x = x.index_select(1, torch.arange(x.size(1)).flip(0))
        return self.fc(x.relu().mean((2, 3)))


def test_bugs_10_masks_and_indices_are_no_random_numbers() -> None:
    net = trace_classifier(Selects(), (3, 8, 8))
    probe = _Probe(net)
    for node in (checked := [node for node in net.graph.nodes if _is_checked(net, node)]):
        probe.add(node)
    names = {"where", "masked_fill", "gather", "take_along_dim", "index_select"}
    assert names <= {operation_name(node) for node in checked}
    results = probe.model()(*probe.samples())
    assert [tuple(result.shape) for result in results] == [node.meta["shape"] for node in checked]


def test_bugs_10_the_reason_has_no_control_codes() -> None:
    try:
        try:
            raise KeyError
        except KeyError as inner:
            raise RuntimeError("failed\nThis is \x1b[96mstep 3/3\x1b[0m") from inner
    except RuntimeError as error:
        assert reason(error) == "KeyError"
        error.__cause__ = ValueError("\x1b[1;31m\n no operation\x1b[0m found \nin the registry")
        assert reason(error) == "no operation found"


ODD = """
import torch.nn as nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.odd = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveMaxPool2d((7, 5))
        self.fc = nn.Linear(140, 5)
    def forward(self, x):
        return self.fc(self.odd(self.bn(self.conv(x)).relu()).flatten(1))
"""


@pytest.mark.parametrize("command", ["inspect", "smoke-run"])
def test_bugs_10_the_commands_name_it_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    args = [f"{tmp_path}/odd.py:Odd", "--teacher.weights", "random", "--teacher.input_size", "3,16,16"]
    args += ["--teacher.mean", ".5,.5,.5", "--teacher.std", ".25,.25,.25", "--quant.act_points", "inputs"]
    code = run([command, *args])
    out, err = capsys.readouterr()
    named = "AdaptiveMaxPool2d(output_size=(7, 5)) of node odd has no ONNX export"
    if command == "inspect":
        assert code == 0 and f"ONNX       cannot be exported: {named}" in out
    else:
        assert code == 2 and "synthesis" not in out and named in err and err.count("\n") == 1
    assert "\x1b" not in out + err


def test_common_networks_need_no_check() -> None:
    """A check takes seconds; these must not even import the exporter."""
    for make in (Residual, Averages):
        form = integer_form(student(make(), 4, "relu").net)
        assert unexportable_operations(form) == []
    check_operations(form)


class Known(nn.Module):
    """Operations of the table KNOWN, with settings that an exporter could lose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)
        self.layers = nn.ModuleList(
            [
                *(nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(4, 0.2), nn.PReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7)),
                *(nn.ELU(0.7), nn.SELU(), nn.CELU(0.6), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()),
                *(nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Identity(), nn.Dropout()),
                *(nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), nn.MaxPool2d((3, 2), (2, 3), (1, 0))),
                *(nn.MaxPool2d(2, 3, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)),
                *(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Flatten(2)),
                nn.Unflatten(1, (2, 2)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = [layer(x) for layer in self.layers]
        parts += [x.abs(), x.exp(), x * x, x / 0.3, 1 - x, -x, torch.add(x, x * x, alpha=2), x.sum((2, 3))]
        parts += [torch.sub(x, x * x, alpha=2), x.mean((1, 3), keepdim=True), torch.cat([x, x], 2), x[:, [2, 0]]]
        parts += [torch.stack([x, x], 1), x.permute(0, 2, 3, 1), x.transpose(2, 3), x.narrow(1, 1, 2), x[..., -3:-1]]
        parts += [x.unsqueeze(2), x.chunk(3, 2)[2], x.split([1, 3], 1)[1], x.unbind(2)[3], x[:, :, ::2, 1::3]]
        parts += [
            x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 2),
            x.reshape(2, -1),
            x.clone(),
            x.flatten(1, 2),
            x[:, 1],
        ]
        return self.fc(x.mean((2, 3))) + sum(F.softplus(part).flatten(1).mean(1, keepdim=True) for part in parts)


@pytest.mark.slow
def test_operations_that_need_no_check_are_exported_correctly() -> None:
    net = trace_classifier(Known().eval().requires_grad_(False), SIZE)
    nodes = [
        node
        for node in net.graph.nodes
        if {*traits_of(node).operators} <= KNOWN and node.meta["shape"] and "fc" not in node.name
        if traits_of(node).kind < OpKind.LAYER or traits_of(node).kind is OpKind.NONLINEAR
        if any(source.meta.get("shape") for source in node.all_input_nodes)
    ]
    unused = {
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "squeeze",
        "detach",
        "alias",
        "_to_copy",
        "t",
        "native_channel_shuffle",
    }
    unused |= {"_unsafe_view", "channel_shuffle"}  # one of each pair, as the release of PyTorch has it
    assert {name for node in nodes for name in traits_of(node).operators} >= KNOWN - unused
    assert _faults(net, nodes) == []


@pytest.mark.slow
def test_operations_of_the_exact_network_are_exported_correctly() -> None:
    assert unexportable_operations(integer_form(student(Exact(), 4, "inputs").net)) == []
