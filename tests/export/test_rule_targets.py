"""Students for engines that do not run here: their files keep the published rules, and the simulation is the file's."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from support.engine_nets import NETS, SIZE, points_of, student_for
from synq.engines.lowering import lower
from synq.engines.program import Program, Sum
from synq.engines.simulation import Simulation
from synq.export.conformance import violations
from synq.export.standard_onnx import standard_onnx
from synq.export.targets.export import _check_rules
from synq.export.targets.formats import FORMATS
from synq.quant.layers import ActQuantizer
from synq.quant.student import Student, observe_ranges

TARGETS = ("tensorrt", "qnn")
IMAGES = torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(7))


def _lowered(net: nn.Module, target: str, **options: object) -> tuple[Student, Program]:
    student = student_for(net, target, **options)
    return student, lower(student.net, target, SIZE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in NETS if name != "unfolded"])
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_a_file_keeps_the_rules_and_computes_what_the_simulation_does(name: str, target: str, weight_bits: int) -> None:
    _, program = _lowered(NETS[name][0](), target, weight_bits=weight_bits)
    content = FORMATS[target].write(program)
    model = onnx.load_from_string(content)
    assert violations(model, target) == []
    expected, found = Simulation(program)(IMAGES), FORMATS[target].open(content, 1)(IMAGES)
    assert torch.equal(expected.argmax(1), found.argmax(1))
    assert float((expected - found).abs().max()) < 1e-5 * float(expected.std())
    types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert types >= ({"INT8"} if target == "tensorrt" else {"UINT8", "INT32"})
    assert ("INT4" in types) is (target == "qnn" and weight_bits == 4)
    assert not types & ({"UINT8", "INT32"} if target == "tensorrt" else set())


@pytest.mark.parametrize("target", TARGETS)
def test_the_steps_that_other_engines_compute_on_codes(target: str) -> None:
    """A SiLU, a linear layer on positions, channels padded with zeros, a clamp that limits the codes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rows, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 8), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.silu(self.conv(x))
            x = nn.functional.pad(x, (0, 0, 0, 0, 2, 2))[:, 2:10]
            x = self.rows(x.flatten(2).transpose(1, 2)).clamp(-0.1, 0.2)
            x = nn.functional.pad(x.transpose(1, 2).reshape(-1, 8, 8, 8), (0, 0, 0, 0, 2, 2))
            return self.head(x.mean((2, 3)))

    _, program = _lowered(Net(), target)
    content = FORMATS[target].write(program)
    assert violations(onnx.load_from_string(content), target) == []  # type: ignore[arg-type]
    expected, found = Simulation(program)(IMAGES), FORMATS[target].open(content, 1)(IMAGES)
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.std())


def test_tensorrt_has_symmetric_activations_and_float_branches() -> None:
    student, program = _lowered(NETS["residual"][0](), "tensorrt")
    assert {grid.zero_point for grid in program.grids.values()} == {128}
    fused = [step for step in program.steps if isinstance(step, Sum)]
    assert fused and all(step.inputs[step.unrounded] not in program.grids for step in fused)  # type: ignore[index]
    names = points_of(student.net)
    assert "bn3" not in names or len(names) < len(points_of(student_for(NETS["residual"][0](), "qnn").net))
    image = next(module for module in student.net.modules() if isinstance(module, ActQuantizer))
    image.set_range(-1.0, 2.0)
    assert (float(image.scale), int(image.zero_point)) == (pytest.approx(2 / 127), 128)


def test_the_best_symmetric_range_is_no_worse_than_minmax() -> None:
    student = student_for(NETS["residual"][0](), "tensorrt")
    before = {name: float(quantizer.scale) for name, quantizer in points_of(student.net).items()}
    observe_ranges(student.net, IMAGES, act_range="minmax")
    widest = {name: float(quantizer.scale) for name, quantizer in points_of(student.net).items()}
    observe_ranges(student.net, IMAGES, act_range="mse")
    after = {name: float(quantizer.scale) for name, quantizer in points_of(student.net).items()}
    assert before.keys() == after.keys()
    assert all(after[name] <= widest[name] for name in after) and after != widest


def test_qnn_has_a_batch_of_one_and_logits_on_a_grid() -> None:
    student, program = _lowered(NETS["squeezed"][0](), "qnn")
    model = standard_onnx(program)
    ends = [end.type.tensor_type.shape.dim[0].dim_value for end in (model.graph.input[0], model.graph.output[0])]
    assert ends == [1, 1] and "fc" in points_of(student.net)


@pytest.mark.parametrize("target", TARGETS)
def test_a_function_without_a_documented_kernel_is_rejected(target: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(ValueError, match=rf"`quant.target` {target} must have .* the function mish: use one of"):
        _lowered(net, target)


def test_a_file_that_breaks_a_rule_is_not_written() -> None:
    _, program = _lowered(NETS["residual"][0](), "qnn")
    content = FORMATS["qnn"].write(program)
    with pytest.raises(ValueError, match=r"model.onnx must keep the published rules of TensorRT, but breaks \d+ of"):
        _check_rules(content, "tensorrt", FORMATS["tensorrt"])
