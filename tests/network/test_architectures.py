"""Model families: each can be traced and quantized under both rules, and computes the same without its rounding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from synq.config.run import QuantConfig
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model

SIDES = (64, 64)


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.get_model(name, num_classes=10)


def _timm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=10)


def _pytorchcv(name: str) -> nn.Module:
    return pytest.importorskip("pytorchcv.model_provider").get_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("build", "name", "cam"),
    [
        (_torchvision, "shufflenet_v2_x0_5", "closed_form"),
        pytest.param(_torchvision, "efficientnet_b0", "closed_form", marks=pytest.mark.slow),
        (_torchvision, "mobilenet_v3_small", "autograd"),
        pytest.param(_timm, "mobilenetv3_small_050", "autograd", marks=pytest.mark.slow),
        (_timm, "lcnet_050", "autograd"),
        pytest.param(_timm, "ghostnet_100", "autograd", marks=pytest.mark.slow),
        pytest.param(_timm, "cspresnet50", "closed_form", marks=pytest.mark.slow),
        (_pytorchcv, "resnet20_cifar10", "closed_form"),
        pytest.param(_pytorchcv, "shufflenetv2_wd2", "closed_form", marks=pytest.mark.slow),
    ],
)
def test_family(build: Callable[[str], Any], name: str, cam: str) -> None:
    torch.manual_seed(0)
    module = build(name).eval().requires_grad_(False)
    size = (3, *getattr(module, "in_size", SIDES))
    traced = trace_classifier(copy.deepcopy(module), size)
    noise = torch.randn(2, *size)
    with torch.no_grad():
        assert torch.allclose(traced(noise), module(noise), atol=1e-5)
    location = locate_cam(traced)
    assert location.kind == cam
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())
    for act_points in ("relu", "inputs"):
        student = quantize_model(
            traced, QuantConfig(weight_bits=4, act_bits=4, act_points=act_points), cam_node=location.node
        )
        weights = [row for row in student.rows if row.role == "weight"]
        assert len(weights) == layers and {row.bits for row in weights} == {4}
        assert student.bitops > 0 and student.cam_node
