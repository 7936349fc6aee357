"""Small classifiers whose forward passes are written in different ways; for files of a user, too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = (3, 16, 16)
CLASSES = 5


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    """Stem, `mid`, `head`; subclasses replace a part."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels, self.stem, self.fc = channels, block(3, channels, 2), nn.Linear(channels, CLASSES)
        self.build(channels)

    def build(self, channels: int) -> None:
        """Add layers."""

    def mid(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.stem(x)))


class Doubled(Plain):
    """The shortcut adds channels of zeros, which `zeros` makes."""

    def build(self, channels: int) -> None:
        self.wide, self.fc = block(channels, 2 * channels), nn.Linear(2 * channels, CLASSES)

    def zeros(self, x: Tensor) -> Tensor:
        return torch.zeros(x.size(0), self.channels, x.size(2), x.size(3))

    def mid(self, x: Tensor) -> Tensor:
        return self.wide(x) + torch.cat([x, self.zeros(x)], 1)


class ByKeyword(Plain):
    """Every layer and function is called by keyword."""

    def build(self, channels: int) -> None:
        self.conv, self.bn, self.act = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.PReLU()
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(input=x)
        y = self.act(input=self.bn(input=self.conv(input=x)))
        x = torch.add(input=x, other=y)
        x = torch.cat(tensors=[x, y], dim=1)[:, : self.channels]
        x = F.relu(input=self.down(input=x), inplace=True)
        x = F.max_pool2d(input=x, kernel_size=2)
        x = torch.mul(input=x, other=torch.sigmoid(input=x))
        return self.fc(input=torch.flatten(input=self.pool(input=x), start_dim=1))
