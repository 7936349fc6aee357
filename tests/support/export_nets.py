"""Networks whose pools, paddings, upsamplings and activations exporters and engines may compute in another way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Exact(nn.Module):
    """Every exact operation with the settings that exporters may lose; each branch ends in a layer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.activations = nn.ModuleList(
            [nn.LeakyReLU(0.3), nn.PReLU(8), nn.PReLU(), nn.ReLU6(), nn.Hardtanh(-0.4, 0.7), nn.ReLU()]
        )
        self.activations[1].weight.data.uniform_(-0.5, 0.5)  # type: ignore[union-attr, operator]
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(3, 3, 1, ceil_mode=True),
                nn.MaxPool2d(2, 3, 1, ceil_mode=True),
                nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True),
                nn.MaxPool2d((3, 2), (2, 3), (1, 0)),
                nn.Sequential(nn.ReflectionPad2d((1, 2, 0, 3)), nn.MaxPool2d(2, ceil_mode=True)),
                nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.UpsamplingNearest2d(scale_factor=2), nn.MaxPool2d(3, 2)),
            ]
        )
        modes = ("zeros", "reflect", "replicate", "circular", "zeros", "zeros")
        self.convs = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode) for mode in modes])
        self.convs[4] = nn.Conv2d(8, 4, (3, 5), padding="same")
        self.convs[5] = nn.Conv2d(8, 4, 3, (2, 1), "valid", (1, 2), groups=2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = []
        for activation, pool, conv in zip(self.activations, self.pools, self.convs, strict=True):
            y = F.pad(pool(activation(x)), (1, 0, -1, 2), value=0.3)
            y = conv(torch.roll(y.flip(3), (1, -2), (2, 3)))
            parts.append(F.adaptive_max_pool2d(F.relu(y).clamp(max=1.5), 1))
        return self.fc(torch.cat(parts, 1).flatten(1))


POOLS = {
    "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=8),
    "divisor, no padding": nn.AvgPool2d(2, divisor_override=3),
    "divisor, ceil_mode": nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=10),
    "padded": nn.AvgPool2d(3, 1, 1),
    "padded, ceil_mode": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "padded, ceil_mode, long stride": nn.AvgPool2d(3, 3, 1, ceil_mode=True),
    "padding not counted, ceil_mode": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "rectangular": nn.AvgPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True),
    "plain": nn.AvgPool2d(2),
}
"""Average pools that divide by different numbers."""


class Averages(nn.Module):
    """Average pools after an activation with negative values; their border counts, because it is flattened."""

    def __init__(self, pools: tuple[str, ...] = tuple(POOLS), activation: type[nn.Module] = nn.Hardswish) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1, stride=2), activation()
        self.pools = nn.ModuleList([POOLS[name] for name in pools])
        with torch.no_grad():
            sizes = [pool(torch.zeros(1, 4, 8, 8)).numel() for pool in self.pools]
        self.fc = nn.Linear(sum(sizes), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.fc(torch.cat([pool(x).flatten(1) for pool in self.pools], 1))


class Divided(nn.Module):
    """A pool with a divisor between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(3, 2, 1, divisor_override=8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 1).flatten(1))


class Unexportable(nn.Module):
    """Two operations that ONNX cannot express, and several that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=1.7, mode="bicubic")
        self.odd_pool, self.fc = nn.AdaptiveMaxPool2d((7, 5)), nn.Linear(140, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = self.up(x) + F.interpolate(x, scale_factor=1.7, mode="bilinear", antialias=True)
        return self.fc(self.odd_pool(torch.cat(x.chunk(2, 1), 1)).flatten(1))
