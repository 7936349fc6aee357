"""Residual networks for small images, the architecture of the bundled teachers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Parameter-free shortcut: subsampling by 2, with zero channels padded on both sides (option A of the paper)."""

    def __init__(self, num_extra: int) -> None:
        super().__init__()
        self.before = num_extra // 2
        self.after = num_extra - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + num_extra, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Residual block relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)) with two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = PadShortcut(channels - in_channels) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet: stem, three stages at full, half and quarter resolution, global average pooling, linear layer."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = _stage(width, width, num_blocks, stride=1)
        self.stage2 = _stage(width, 2 * width, num_blocks, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, num_blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))


def cifar_resnet(depth: int, num_classes: int, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Build an untrained residual network for small images.

    Args:
        depth: Number of layers with weights, 6 n + 2 with n >= 1 (8, 14, 20, 32, ...); n blocks in each of three
            stages.
        num_classes: Number of logits, >= 2.
        in_channels: Channels of the image, >= 1.
        width: Channels of the first stage, >= 1; the later stages have twice and four times as many.

    Returns:
        The network, with convolutions in Kaiming normal initialization (fan out) and BatchNorm as the identity.

    Raises:
        ValueError: If an argument is outside its range.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2 (option A shortcuts).
    """
    if depth < 8 or (depth - 2) % 6 != 0:
        raise ValueError(f"`depth` must be 6 n + 2 with n >= 1, but got {depth}")
    for name, value, low in (("num_classes", num_classes, 2), ("in_channels", in_channels, 1), ("width", width, 1)):
        if value < low:
            raise ValueError(f"`{name}` must be at least {low}, but got {value}")
    model = CifarResNet(depth, num_classes, in_channels, width)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
