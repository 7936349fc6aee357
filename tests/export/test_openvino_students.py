"""Students for OpenVINO: the engine computes what the simulation says."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("openvino")

from support.engine_nets import traced
from support.placed_students import placed
from support.student_tools import Residual
from synq.config.quant import QuantConfig
from synq.engines.deployed import program_of
from synq.engines.lowering import lower
from synq.engines.simulation import Simulation
from synq.export.targets.formats import format_of
from synq.quant.student import observe_ranges, quantize_model

SIZE = (3, 16, 16)


class Pooled(nn.Module):
    """A pool between two convolutions, of values of both signs or of a ReLU."""

    def __init__(self, pool: nn.Module, rectified: bool) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, 2, 1), pool
        self.act = nn.ReLU() if rectified else nn.Identity()
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(self.act(self.stem(x))))
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((1, 3), 1, (0, 1)),
        nn.AvgPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.ZeroPad2d((1, 2, 0, 3)),
    ],
    ids=["counted", "not counted", "one side", "unpadded", "maximum", "zeros"],
)
def test_borders_are_zeros_and_not_codes_of_zero(pool: nn.Module, rectified: bool) -> None:
    torch.manual_seed(0)
    net, images, form = Pooled(pool, rectified), torch.randn(16, *SIZE), format_of("openvino")
    program = lower(placed(net, SIZE, images, "openvino", portable=True), "openvino", SIZE)
    expected, found = Simulation(program)(images), form.open(form.write(program), 1)(images)
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [8, 4])
def test_sums_are_exact_with_power_of_two_scales(bits: int) -> None:
    torch.manual_seed(0)
    net = traced(Residual(), SIZE)
    images, form = torch.randn(64, *SIZE), format_of("openvino")
    quant = QuantConfig(
        target="openvino", weight_bits=bits, act_bits=bits, portable=True, power_of_two_scales=True
    )  # portable: right on every processor
    student = quantize_model(net, quant).net
    observe_ranges(student, images, act_range="mse")
    program = program_of(student, quant, SIZE)
    assert torch.equal(form.open(form.write(program), 1)(images), Simulation(program)(images))
