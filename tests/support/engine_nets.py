"""Small networks with what an engine computes in steps, and students of them for an engine."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from support.student_tools import Residual, trained
from synq.config.run import QuantConfig
from synq.network.op_traits import OpKind, is_activation, node_module, traits_of, value_inputs
from synq.network.tracing import trace_classifier
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer
from synq.quant.placement import FLOAT_BRANCHES, FLOAT_LOGITS, is_sum, step_chains
from synq.quant.student import Student, observe_ranges, quantize_model

SIZE = (3, 16, 16)


class DenseNet(nn.Module):
    """A concatenation, a batch norm that follows no layer, an average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(10)
        self.pool, self.conv3, self.fc = nn.AvgPool2d(2), nn.Conv2d(10, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(torch.cat([x, self.conv2(x)], 1)))
        return self.fc(self.conv3(self.pool(x)).mean((2, 3)).flatten(1))


class Squeezed(nn.Module):
    """A squeeze-and-excitation block with a hardsigmoid, and a hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.reduce, self.expand, self.fc = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.conv(x)))
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.fc((x * gate).mean((2, 3)))


class Shuffled(nn.Module):
    """Halves of the channels, of which one is transformed; the channels are shuffled afterwards. A depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.point, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.bn(self.conv(x))), 2)
        left, right = x.chunk(2, 1)
        right = self.point(self.bn2(self.depth(right))).relu()
        x = torch.cat([left, right], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Moved(nn.Module):
    """ResNet's shortcut without a convolution: a slice and a padding; and a nearest resize."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.bn(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.fc(F.interpolate(x.relu(), scale_factor=2).mean((2, 3)))


class Unfolded(nn.Module):
    """A layer and a batch norm with a second reader each, and a head that is a convolution and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return self.head(z.relu() * y - z).mean((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (Residual, "x relu relu_1 bn3 relu_2 adaptive_avg_pool2d fc"),
    "dense": (DenseNet, "x relu conv2 cat relu_1 pool conv3 mean fc"),
    "squeezed": (Squeezed, "x bn hardswish mean relu expand hardsigmoid mul mean_1 fc"),
    "shuffled": (Shuffled, "x relu6 bn2 relu cat adaptive_avg_pool2d fc"),
    "moved": (Moved, "x relu bn relu_1 mean fc"),
    "unfolded": (Unfolded, ""),
}
"""By name, a maker and the quantized nodes where the logits are quantized too; "" if they always are."""


_KEPT: dict[tuple[type, tuple[int, int, int]], tuple[fx.GraphModule, Tensor]] = {}
"""Traces of `NETS`, which many tests read, and the random state after each."""


def traced(net: nn.Module, size: tuple[int, int, int] = SIZE) -> fx.GraphModule:
    """Trace a network; two of one kind have the same parameters."""
    key = (type(net), size)
    if key in _KEPT:
        graph, state = _KEPT[key]
        torch.set_rng_state(state)
        return copy.deepcopy(graph)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    graph = trace_classifier(trained(net), size)
    if any(make is type(net) for make, _ in NETS.values()):
        _KEPT[key] = copy.deepcopy(graph), torch.get_rng_state()
    return graph


def student_for(net: nn.Module, target: str, *, size: tuple[int, int, int] = SIZE, **options: Any) -> Student:
    """Return a student for an engine with observed ranges, 8 bits unless `options` has others."""
    graph = traced(net, size)
    quant = QuantConfig(target=target, **{"weight_bits": 8, "act_bits": 8, **options})  # type: ignore[arg-type]
    student = quantize_model(graph, quant)
    observe_ranges(student.net, torch.randn(8, *size), act_range="minmax")
    return student


def points_of(net: fx.GraphModule) -> dict[str, ActQuantizer]:
    """Return the activation quantizers of a network by the node before, in order."""
    found = {}
    for node in net.graph.nodes:
        module = node_module(net, node)
        if isinstance(module, ActQuantizer):
            found[str(node.target).removeprefix(ACT_QUANTIZERS)] = module
    return found


def float_reads(net: fx.GraphModule, target: str) -> list[str]:
    """Return what reads a float in a student for an engine, against the rule: "reader of tensor".

    Steps read codes. Within a step, and as the logits of a linear layer for an engine that returns floats, there are
    floats.
    """
    coded: set[fx.Node] = set()
    logits = {next(node for node in net.graph.nodes if node.op == "output")} if target in FLOAT_LOGITS else set()
    for node in reversed(net.graph.nodes):
        if node in logits:
            logits.update(source for source in value_inputs(node) if traits_of(source).keeps_values)
    inside = {node for chain in step_chains(net).values() for node in chain}
    found = []
    for node in net.graph.nodes:
        sources = value_inputs(node)
        moves = traits_of(node).keeps_values and len(sources) == 1 and sources[0] in coded
        if moves or isinstance(node_module(net, node), ActQuantizer):
            coded.add(node)
        elif node.op != "placeholder" and is_activation(node):
            folded = traits_of(node).kind is OpKind.NORM or traits_of(node).limits is not None
            for source in sources:
                is_float = is_activation(source) and source not in coded  # a mask, made of codes, is neither
                fused = target in FLOAT_BRANCHES and is_sum(node)
                if is_float and not fused and not (folded and source in inside) and node not in logits:
                    found.append(f"{node.name} of {source.name}")
    return found
