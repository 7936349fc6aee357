"""Small networks of the kinds that run on phones, as students of a target and their programs."""

from functools import cache

import torch
from torch import Tensor, fx, nn

from support.placed_students import placed_graph
from synq.engines.lowering import lower
from synq.engines.program import Program
from synq.network.tracing import trace_classifier

SIZE = (3, 32, 32)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(inputs, outputs, 3, stride), nn.ReLU(), _conv(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Inverted(nn.Module):
    """Block of MobileNetV2: expansion, depthwise convolution, projection without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 4 * inputs
        depthwise = _conv(hidden, hidden, 3, stride, hidden)
        self.block = nn.Sequential(
            _conv(inputs, hidden, 1), nn.ReLU6(), depthwise, nn.ReLU6(), _conv(hidden, outputs, 1)
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


class Squeeze(nn.Module):
    """Squeeze and excitation after a depthwise convolution, as in MobileNetV3 or EfficientNet."""

    def __init__(self, channels: int, gate: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.depthwise = _conv(channels, channels, 3, 1, channels)
        self.activation, self.gate = activation, gate
        self.pool, self.relu = nn.AdaptiveAvgPool2d(1), nn.ReLU()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(x))
        return y * self.gate(self.expand(self.relu(self.reduce(self.pool(y)))))


class Growing(nn.Module):
    """Layer of a DenseNet: new channels next to the old ones."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


class Shuffled(nn.Module):
    """Unit of ShuffleNetV2: half of the channels pass, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), nn.ReLU(), _conv(half, half, 3, 1, half), _conv(half, half, 1)
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        both = torch.cat([kept, self.relu(self.branch(changed))], 1)
        count, channels, height, width = both.shape
        grouped = both.view(count, 2, channels // 2, height, width).transpose(1, 2)
        return grouped.reshape(count, channels, height, width)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def _stem(channels: int = 8) -> list[nn.Module]:
    return [_conv(3, channels, 3, 2), nn.ReLU()]


NETS = {
    "resnet": lambda: [
        *_stem(),
        nn.MaxPool2d(3, 2, 1),
        Residual(8, 8),
        Residual(8, 16, 2),
        Residual(16, 16),
        *_head(16),
    ],
    "mobilenet": lambda: [*_stem(), Inverted(8, 8), Inverted(8, 16, 2), Inverted(16, 16), *_head(16)],
    "squeeze": lambda: [
        *(*_stem(), Squeeze(8, nn.Hardsigmoid(), nn.Hardswish()), _conv(8, 16, 3, 2), nn.Hardswish()),
        *(Squeeze(16, nn.Sigmoid(), nn.SiLU()), *_head(16)),
    ],
    "densenet": lambda: [
        *(*_stem(), Growing(8, 4), Growing(12, 4), nn.Conv2d(16, 8, 1), nn.AvgPool2d(2), Growing(8, 8)),
        *(nn.BatchNorm2d(16), nn.ReLU(), *_head(16)),
    ],
    "shufflenet": lambda: [*_stem(16), Shuffled(16), Shuffled(16), *_head(16)],
    "flattened": lambda: [*_stem(), _conv(8, 8, 3, 2), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(512, 10)],
}
"""Layers of each network, by name; "flattened" reads a whole map with its last layer."""


def lowered(
    name: str, target: str, *, weight_bits: int = 8, act_bits: int = 8, count: int = 4
) -> tuple[Program, Tensor]:
    """The program of a network with random weights, and images: those that its ranges were observed on.

    Args:
        name: Key of NETS.
        target: Engine.
        weight_bits, act_bits: Bit-widths.
        count: Of images.
    """
    graph, images = _traced(name, count)
    student = placed_graph(graph, images, target, weight_bits=weight_bits, act_bits=act_bits)
    return lower(student, target, SIZE), images


@cache
def _traced(name: str, count: int) -> tuple[fx.GraphModule, Tensor]:
    """A network with random weights, traced once for all engines and widths, and its images."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        net = nn.Sequential(*NETS[name]())
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        images = torch.randn(count, *SIZE)
    return trace_classifier(net.eval().requires_grad_(False), SIZE), images
