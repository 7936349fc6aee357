"""Whole networks as integer programs: every code that the student rounds is the code of the program."""

import pytest
import torch
from torch import Tensor, nn

from support import mobile_nets
from support.placed_students import placed
from support.program_math import disagreements
from support.program_nets import NETS
from support.student_tools import trained
from synq.engines.lowering import lower
from synq.engines.program import Dequantize, Program
from synq.quant.layers import ActQuantizer

FLOAT_ERROR = 2e-3
"""Largest error of a code, in steps, by the student's sums in float32."""
SAME_GRID = {"vgg": {"_1"}}
"""Quantizers that read values on their own grid: the pool of 4 x 4 positions to 4 x 4."""


SMALL = ("small squeeze", "small shufflenet")


def images(size: tuple[int, int, int], count: int = 4) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def check(name: str, target: str, **bits: int) -> Program:
    torch.manual_seed(0)
    if name in NETS:
        make, size = NETS[name]
        module = make()
    else:
        module, size = nn.Sequential(*mobile_nets.NETS[name.removeprefix("small ")]()), mobile_nets.SIZE
    net = placed(trained(module), size, images(size), target, **bits)
    program = lower(net, target, size)
    found = disagreements(net, program, images(size))
    assert found.pop(program.logits) < 1e-4
    assert max(found.values()) < FLOAT_ERROR, max(found, key=lambda key: found[key])
    quantizers = {key.rpartition(".")[2] for key, part in net.named_modules() if isinstance(part, ActQuantizer)}
    assert quantizers - found.keys() == SAME_GRID.get(name, set()), "a tensor of the student is not in the program"
    return program


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3", "shufflenet")]
"""Of torchvision, and small ones of the same operations are quick."""


@pytest.mark.parametrize(
    "name", [*(name for name in NETS if name not in ("mobilenet_v3", "shufflenet")), *LARGE, *SMALL]
)
def test_a_program_rounds_what_the_student_rounds(name: str) -> None:
    program = check(name, "onnxruntime")
    assert not isinstance(program.steps[-1], Dequantize) or name == "branches"


@pytest.mark.parametrize("name", ["small resnet", "small squeeze", "small densenet", *LARGE[:1]])
def test_low_bits_and_logits_on_a_grid(name: str) -> None:
    program = check(name, "litert", weight_bits=4, act_bits=4)
    assert isinstance(program.steps[-1], Dequantize)
    assert {step.weight_bits for step in program.layers()} == {4, 8}


@pytest.mark.parametrize(
    "name", ["small resnet", "small mobilenet", pytest.param("mobilenet_v2", marks=pytest.mark.slow)]
)
def test_sums_that_openvino_fuses(name: str) -> None:
    check(name, "openvino", weight_bits=4, act_bits=4)
