"""Small classifiers of every kind that a program must express, written in different ways."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn


class OptionA(nn.Module):
    """ResNet for CIFAR whose shortcuts leave out pixels and add channels of zeros."""

    def __init__(self, form: str = "pad") -> None:
        super().__init__()
        self.form = form
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)])
        self.b = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1, bias=False) for c in (8, 16, 32)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(c) for c in (8, 16, 32)])
        self.fc = nn.Linear(32, 10)

    def shortcut(self, x: Tensor) -> Tensor:
        x, channels = x[:, :, ::2, ::2], x.shape[1]
        if self.form == "pad":
            return F.pad(x, (0, 0, 0, 0, channels // 2, channels // 2))
        return torch.cat([x, torch.zeros_like(x)], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        for number, (first, second, norm) in enumerate(zip(self.a, self.b, self.norms, strict=True)):
            y = norm(second(torch.relu(first(x))))
            x = F.relu(y + (self.shortcut(x) if number else x))
        return self.fc(x.mean((-2, -1)))


class Excited(nn.Module):
    """Squeeze and excitation, with a linear or a convolutional gate, and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        x = x * gate[:, :, None, None]
        gate = F.adaptive_avg_pool2d(x, 1)
        x = F.hardsigmoid(self.expand(F.relu(self.squeeze(gate)))).mul(x)
        return self.fc(x.mean(3).mean(2))


class Branches(nn.Module):
    """Inception: branches side by side, with average pools that count their padding or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.one, self.three = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, (1, 3), padding=(0, 1))
        self.pooled, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(20, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.stem(x)), 3, 2, ceil_mode=True)
        pools = [F.avg_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)]
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x)), self.pooled(pools[0]), pools[1]], 1)
        x = F.avg_pool2d(x, 2, divisor_override=3)
        return self.last(x).amax((2, 3))


class Functional(nn.Module):
    """Every move once, in functions and methods, and arithmetic with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.norm, self.scale = nn.BatchNorm2d(8), nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))
        self.tokens, self.fc = nn.Linear(8, 8), nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(F.pixel_unshuffle(x, 2)))
        a, b = x.chunk(2, dim=1)
        x = torch.stack([a, b], 2).flatten(1, 2)  # shuffled channels
        x = self.norm(x) * self.scale
        y = self.conv2(F.pad(x, (1, 0, 1, 0))[..., 1:, 1:])
        x = (y - x).clamp(min=0)
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)
        x = 0.5 * x + 1.0
        x = F.adaptive_avg_pool2d(x, 4)[:, torch.tensor([7, 6, 5, 4, 0, 1, 2, 3])]
        x = x.reshape(x.size(0), 8, 16).transpose(1, 2)
        x = self.tokens(x)
        return self.fc(F.gelu(x).reshape(x.shape[0], -1))


class OneChannel(nn.Module):
    """A small network for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.LeakyReLU(0.1), nn.MaxPool2d(2, 2)),
        )
        self.fc = nn.Sequential(nn.Linear(400, 20), nn.BatchNorm1d(20), nn.ELU(), nn.Dropout(), nn.Linear(20, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).view(-1, 400))


def _vgg() -> nn.Module:
    features = tv.vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True)
    classifier = nn.Sequential(*(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 16)))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(4), classifier, nn.ReLU6(), nn.Linear(16, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet": (lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), (3, 32, 32)),
    "mobilenet_v2": (
        lambda: tv.MobileNetV2(10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
        (3, 32, 32),
    ),
    "mobilenet_v3": (lambda: tv.mobilenet_v3_small(num_classes=10, width_mult=0.25), (3, 32, 32)),
    "densenet": (lambda: tv.DenseNet(4, (2, 2), 8, num_classes=10), (3, 32, 32)),
    "shufflenet": (lambda: tv.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 48], num_classes=10), (3, 64, 64)),
    "vgg": (_vgg, (3, 32, 32)),
    "option_a": (OptionA, (3, 32, 32)),
    "option_a_of_zeros": (lambda: OptionA("cat"), (3, 32, 32)),
    "excited": (Excited, (3, 32, 32)),
    "branches": (Branches, (3, 31, 33)),
    "functional": (Functional, (3, 32, 32)),
    "one_channel": (OneChannel, (1, 28, 28)),
}
"""By name, a maker and the size (C, H, W) of an image."""
