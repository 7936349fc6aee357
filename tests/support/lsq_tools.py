"""Small students with learned scales, and images for them."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from synq.config.run import QuantConfig
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier
from synq.quant.student import Student, observe_ranges, quantize_model

SIZE = (3, 8, 8)
Steps = Literal["none", "activations", "all"]


def images(count: int = 24) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(3))


def student_of(net: nn.Module, steps: Steps, bits: int = 3, observed: bool = True, **options: Any) -> Student:
    traced = trace_classifier(net, SIZE)
    made = quantize_model(
        traced,
        QuantConfig(weight_bits=bits, act_bits=bits, learned_steps=steps, **options),
        cam_node=locate_cam(traced).node,
    )
    if observed:
        observe_ranges(made.net, images(), act_range="mse", weight_range="mse")
    return made
