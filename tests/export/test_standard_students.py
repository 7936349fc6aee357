"""Whole networks: student, program, file; what ONNX Runtime returns is what the simulation returns, in every bit."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from support import small_nets
from support.placed_students import placed
from support.standard_models import EXTENDED, differing
from synq.engines.lowering import lower
from synq.engines.simulation import Simulation
from synq.export.kernels import float_layers, kernel_counts
from synq.export.standard_onnx import standard_onnx


class Gated(nn.Module):
    """A block of squeeze and excitation with hardswish and hardsigmoid, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = y * nn.functional.hardsigmoid(gate) + x
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "weight_bits", "act_bits"),
    [
        (small_nets.Residual, 8, 8),
        (small_nets.Residual, 4, 4),
        (small_nets.Dense, 4, 8),
        (small_nets.depthwise, 3, 3),
        (small_nets.pooled, 2, 4),
        (Gated, 8, 8),
        (Gated, 4, 4),
    ],
)
def test_a_student_is_its_file(make: Callable[[], nn.Module], weight_bits: int, act_bits: int) -> None:
    torch.manual_seed(0)
    images, size = small_nets.images(8).float(), small_nets.SIZE
    net = placed(make(), size, images, weight_bits=weight_bits, act_bits=act_bits)
    program = lower(net, "onnxruntime", size)
    assert not differing(program, images)
    assert not differing(program, images[:1], intermediate=False, level=EXTENDED)
    assert float_layers(standard_onnx(program).SerializeToString()) == []
    if act_bits == 8:
        logits = net(images)
        assert float((Simulation(program)(images) - logits).abs().max()) < 0.2 * float(logits.std())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 21), ("mobilenet_v2", 53), ("squeezenet1_1", 26), ("mobilenet_v3_small", 54)]
)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 4)])
def test_networks_of_torchvision_are_their_files(name: str, layers: int, weight_bits: int, act_bits: int) -> None:
    import torchvision

    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None, num_classes=100)
    images = torch.randn(4, 3, 64, 64)
    program = lower(
        placed(net, (3, 64, 64), images, weight_bits=weight_bits, act_bits=act_bits), "onnxruntime", (3, 64, 64)
    )
    assert not differing(program, images, intermediate=False)
    assert not differing(program, images[:1], intermediate=False, level=EXTENDED)
    model = standard_onnx(program).SerializeToString()
    counts = kernel_counts(model)
    assert counts["QLinearConv"] + counts.get("QGemm", 0) == layers and float_layers(model) == []
