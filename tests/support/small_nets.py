"""Small float64 networks of every shape that equalization and correction meet, with batch norms as after training."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.student import Student, observe_ranges, quantize_model

SIZE = (3, 16, 16)


class Residual(nn.Module):
    """A shortcut around a grouped and a plain convolution, and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Batch norms that read a concatenation, as in DenseNet: they are what is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 4, 3, padding=1),
        )
        self.bn2, self.conv3, self.fc = nn.BatchNorm2d(10), nn.Conv2d(10, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = torch.cat([x, self.conv2(F.relu(self.bn1(x)))], 1)
        return self.fc(self.conv3(F.relu(self.bn2(x))).mean((2, 3)))


def plain() -> nn.Module:
    """VGG without batch norm: pools, a flattening of 4 x 4 cells, LeakyReLU, PReLU, dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1, bias=False)),
        *(nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 10), nn.PReLU(10, 0.2), nn.Dropout()),
        nn.Linear(10, 5),
    )


def depthwise() -> nn.Module:
    """An inverted bottleneck with a linear end, and ReLU6 behind it."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 6, 1, bias=False), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def pooled() -> nn.Module:
    """A pool between batch norm and convolution, and the classifier behind a global pool."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(10, 5),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, str]]]] = {
    "residual": (Residual, [("bn2", "conv3", "relu_1")]),
    "dense": (Dense, [("bn1", "conv2", "relu"), ("bn2", "conv3", "relu_1"), ("conv3", "fc", "mean")]),
    "plain": (plain, [("0", "3", "_1"), ("3", "7", "_4"), ("7", "10", "_8")]),
    "depthwise": (depthwise, [("1", "3", "_2"), ("4", "6", "_5"), ("7", "8", "_7")]),
    "pooled": (pooled, [("1", "5", "_2"), ("6", "10", "_7")]),
}
"""By name, a maker and the pairs (producer, consumer, node whose range counts where non-linearities are rounded)."""


def trained(net: nn.Module, seed: int = 0) -> fx.GraphModule:
    """Give every parameter and statistic of a network values of its own, and trace it in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
            else:
                tensor.copy_(noise - 0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.add_(1.0)
    return trace_classifier(net.eval().requires_grad_(False).double(), SIZE)


def images(count: int, seed: int = 1) -> Tensor:
    """Return (count, 3, 16, 16) Gaussian noise in float64, smooth enough for its classes to differ."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.interpolate(noise, scale_factor=4.0, mode="bilinear")


def rounded(traced: fx.GraphModule, bits: int = 4, observed: Tensor | None = None) -> Student:
    """Return a student of ``bits`` bits, with its ranges observed on images where they are given."""
    student = quantize_model(traced, QuantConfig(weight_bits=bits, act_bits=bits))
    if observed is not None:
        observe_ranges(student.net, observed, act_range="minmax")
    return student
