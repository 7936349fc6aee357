"""The two ResNet-20 of the result tables: architectures whose tensors have the names of the published weight files.

`launch/result_files.py` puts this file next to the weights as teachers.py. Inputs: (N, 3, 32, 32), RGB, normalized.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class _Padded(nn.Module):
    """Every second pixel, with `extra` channels of zeros before and after (option A of He et al.)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.half = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.half, self.half))


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a convolution or has no parameter."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, is_plain: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.is_plain = is_plain
        shortcut: list[nn.Module] = []
        if inputs != outputs and is_plain:
            shortcut = [_Padded((outputs - inputs) // 2)]
        elif inputs != outputs:
            shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = shortcut[0] if is_plain and shortcut else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)
        return F.relu(y) if self.is_plain else y


class _ResNet20(nn.Module):
    """Three stages of three blocks; where the blocks are not `is_plain`, each stage ends with the ReLU."""

    def __init__(self, stem: int, num_classes: int, pool: int, *, is_plain: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, 16, 1, is_plain=is_plain)
        self.layer2 = self._stage(16, 32, 2, is_plain=is_plain)
        self.layer3 = self._stage(32, 64, 2, is_plain=is_plain)
        self.is_plain, self.pool = is_plain, pool
        self.linear = nn.Linear(64 * (8 // pool) ** 2, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, *, is_plain: bool) -> nn.Sequential:
        first = _Block(inputs, outputs, stride, is_plain=is_plain)
        return nn.Sequential(first, *(_Block(outputs, outputs, 1, is_plain=is_plain) for _ in range(2)))

    def forward(self, x):  # annotations would enter the teacher's digest, and the tables were made without
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x) if self.is_plain else F.relu(stage(x))
        return self.linear(F.avg_pool2d(x, self.pool).flatten(1))


def cifar10_resnet20() -> nn.Module:
    """Return the untrained ResNet-20 of He et al., with shortcuts without parameters and 10 classes."""
    return _ResNet20(16, 10, 8, is_plain=True)


def cifar100_resnet20() -> nn.Module:
    """Return the untrained variant of 100 classes: a stem of 64 channels, shortcuts of convolutions, a 2 x 2 head."""
    return _ResNet20(64, 100, 4, is_plain=False)
