"""Students of small networks with trained-looking batch norms, and images to observe and compare them on."""

from typing import Literal

import torch
from torch import Tensor, nn

from support.small_nets import SIZE
from synq.config.run import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.student import Student, observe_ranges, quantize_model


def images(count: int = 8) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def student(
    net: nn.Module, bits: int = 4, act_points: Literal["relu", "inputs"] = "relu", observed: bool = True
) -> Student:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative ones flip a channel
            module.weight.data[0] = 0.0  # and this one is dead
            nn.init.uniform_(module.bias, -0.5, 0.5)
    traced = trace_classifier(net.eval().requires_grad_(False), SIZE)
    made = quantize_model(traced, QuantConfig(weight_bits=bits, act_bits=bits, act_points=act_points))
    if observed:
        observe_ranges(made.net, images(), act_range="minmax")
    return made
