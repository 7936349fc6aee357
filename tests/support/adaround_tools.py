"""What the tests of learned rounding share: quick settings, smooth images, a small network and its students."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig, ReconstructionConfig
from synq.network.tracing import trace_classifier
from synq.quant.layers import QuantConv2d, QuantLinear, effective_weight
from synq.quant.soft_rounding import REACH
from synq.quant.student import observe_ranges, quantize_model

CPU = torch.device("cpu")
QUICK = ReconstructionConfig(iterations=40, batch_size=16, images=64, rounding_lr=0.05, step_lr=1e-3)


def smooth(count: int, size: tuple[int, int, int], seed: int) -> Tensor:
    """Images of broad spots, a little like pictures."""
    noise = torch.randn(count, size[0], size[1] // 2, size[2] // 2, generator=torch.Generator().manual_seed(seed))
    return 1.5 * F.interpolate(noise, size=size[1:], mode="bilinear")


def student_of(
    traced: fx.GraphModule, images: Tensor, bits: tuple[int, int] = (3, 3), **options: Any
) -> fx.GraphModule:
    made = quantize_model(
        traced, QuantConfig(weight_bits=bits[0], act_bits=bits[1], **{"rounding": "adaround", **options})
    )
    observe_ranges(made.net, images, act_range="mse")
    return made.net


def layers_of(net: fx.GraphModule) -> dict[str, QuantConv2d | QuantLinear]:
    return {name: m for name, m in net.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def within_reach(layer: QuantConv2d | QuantLinear) -> bool:
    """Tell whether every weight of a layer lies near the middle of the cell of its code."""
    scale, _ = layer.weight_quantizer.qparams(layer.weight)
    steps = (layer.weight - effective_weight(layer)) / scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return float(steps.abs().max()) <= REACH + 1e-4


class Bottlenecks(nn.Module):
    """As MobileNetV2: expansion, depthwise, linear projection, a sum, ReLU6 and a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
                nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
                nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )  # fmt: skip
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


SIZE = (3, 8, 8)


def traced_of(kind: type[nn.Module]) -> fx.GraphModule:
    """The same network every time, with statistics as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = kind()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, 0, 0.4)
        return trace_classifier(net.eval().requires_grad_(False), SIZE)
