"""What the tests of students share: a network with a shortcut, and a student of any traceable network."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.student import Student, quantize_model

SIZE = (3, 16, 16)
Points = Literal["relu", "inputs"]


class Residual(nn.Module):
    """Functional activations, a shared ReLU, a shortcut and a dense classifier."""

    def __init__(self, activation: object = F.relu) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.activation = activation
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))  # type: ignore[operator]
        y = self.relu(self.bn2(self.conv2(x)))
        y = self.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give the BatchNorms statistics as after training."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval().requires_grad_(False)


def make(act_points: Points = "relu", bits: int = 4, net: nn.Module | None = None, **options: int) -> Student:
    torch.manual_seed(0)
    traced = trace_classifier(trained(net if net is not None else Residual()), SIZE)
    node = next(
        n.name
        for n in reversed(list(traced.graph.nodes))
        if len(n.meta.get("shape") or ()) == 4 and n.meta["shape"][2] > 1
    )
    return quantize_model(
        traced, QuantConfig(weight_bits=bits, act_bits=bits, act_points=act_points, **options), cam_node=node
    )
