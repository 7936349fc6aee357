"""What `step_forms` lists as a float island is what ONNX Runtime leaves between DequantizeLinear and QuantizeLinear."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from support import mobile_nets
from support.engine_nets import student_for
from support.mobile_nets import lowered
from support.program_nets import NETS
from synq.config.quant import QuantConfig
from synq.diagnostics.kernel_table import for_target, kernel_summary, kernel_table
from synq.engines.deployed import check_deployable
from synq.engines.forms import LIMITS, step_forms
from synq.engines.lowering import lower
from synq.engines.program import Program
from synq.export.kernels import _optimized_nodes, kernel_counts
from synq.export.standard_onnx import standard_onnx
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model

SIZE = (3, 32, 32)
KERNELS = {
    "integer convolution": "QLinearConv",
    "integer depthwise convolution": "QLinearConv",
    "integer matrix product": "QGemm",
    "integer sum": "QLinearAdd",
    "integer product": "QLinearMul",
    "integer concatenation": "QLinearConcat",
}
"""ONNX Runtime's operation by the name of a form."""


def islands_of_engine(program: Program) -> set[str]:
    """Values that ONNX Runtime computes in floats: those that QuantizeLinear makes, but for the image."""
    nodes = _optimized_nodes(standard_onnx(program).SerializeToString())
    made = {node.name.removesuffix(".quantize") for node in nodes if node.op_type == "QuantizeLinear"}
    return made - {program.steps[0].output}


def check(program: Program) -> None:
    rows = step_forms(program)
    assert {row.output for row in rows if row.form.runs == "float"} == islands_of_engine(program)
    counts = kernel_counts(standard_onnx(program).SerializeToString())
    expected = Counter(KERNELS[row.form.name] for row in rows if row.form.name in KERNELS)
    assert {kind: counts.get(kind, 0) for kind in KERNELS.values()} == {
        kind: expected[kind] for kind in KERNELS.values()
    }


@pytest.mark.parametrize("name", list(mobile_nets.NETS))
@pytest.mark.parametrize("act_bits", [8, 4])
def test_float_islands_and_kernels_are_those_of_the_optimized_graph(name: str, act_bits: int) -> None:
    check(lowered(name, "onnxruntime", act_bits=act_bits)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "densenet", "excited", "one_channel", "branches"])
def test_float_islands_of_whole_networks(name: str) -> None:
    make, size = NETS[name]
    torch.manual_seed(0)
    student = student_for(make(), "onnxruntime", size=size)
    check(lower(student.net, "onnxruntime", size))


class Middle(nn.Module):
    """A function that has no ReLU's form, alone on its grid."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.conv, self.function, self.fc = nn.Conv2d(3, 8, 3), function, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (nn.Sigmoid(), "QLinearSigmoid"),
        (nn.LeakyReLU(0.1), "QLinearLeakyRelu"),
        (nn.ELU(), "Gather"),
        (nn.Mish(), "Gather"),
        (nn.Tanh(), "Tanh"),
        (nn.GELU(), "Gelu"),
        (nn.Hardswish(), "HardSigmoid"),
    ],
)
def test_the_form_of_a_function_is_the_kernel_that_runs(function: nn.Module, kind: str) -> None:
    program = lower(student_for(Middle(function), "onnxruntime").net, "onnxruntime", (3, 16, 16))
    check(program)
    assert kernel_counts(standard_onnx(program).SerializeToString()).get(kind) == 1
    [row] = [row for row in step_forms(program) if row.layer == "function"]
    assert row.operation not in LIMITS and (row.form.runs == "float") == (kind in ("Tanh", "Gelu", "HardSigmoid"))
    assert ("Gather" in row.form.reason) == (kind == "Gather")


class Unknown(nn.Module):
    """A sort of the channels, which has no form, between two convolutions; and a cumulative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.conv1(x).relu(), 2)
        x = self.conv2(x).relu()
        return self.fc(torch.cumsum(x, 3).mean((2, 3)))


def test_every_rejected_operation_is_listed_and_the_others_keep_their_forms() -> None:
    quant = QuantConfig(target="onnxruntime")
    student = quantize_model(trace_classifier(Unknown().eval(), SIZE), quant)
    with pytest.raises(ValueError, match=r"there is none for cumsum in layer 'cumsum'"):
        check_deployable(student.net, quant, SIZE)
    found = kernel_table(student, quant, SIZE)
    assert found["counts"] == {"integer": 5, "float": 0, "rejected": 2, "edge": 1} and not found["incomplete"]
    rejected = [row for row in found["steps"] if row["runs"] == "rejected"]
    assert [row["operation"] for row in rejected] == ["cumsum", "cumsum"]
    assert all("no integer form of cumsum: " in row["reason"] for row in rejected)
    assert [row["layer"] for row in found["steps"] if row["kernel"] == "integer convolution"] == ["conv1", "conv2"]


def test_a_kernel_that_only_one_engine_lacks_is_rejected_there() -> None:
    tables = {}
    for target in ("executorch", "litert", "onnxruntime"):
        quant = QuantConfig(target=target)  # type: ignore[arg-type]
        student = quantize_model(trace_classifier(Middle(nn.Mish()).eval(), SIZE), quant)
        [tables[target]] = [row for row in kernel_table(student, quant, SIZE)["steps"] if row["layer"] == "function"]
    assert (
        tables["executorch"]["runs"] == "rejected"
        and "has no kernel for the function mish" in (tables["executorch"]["reason"])
    )
    assert tables["litert"]["runs"] == tables["onnxruntime"]["runs"] == "integer"
    assert "LiteRT 2.3" in tables["litert"]["reason"] and "ONNX Runtime 1.32" in tables["onnxruntime"]["reason"]


@pytest.mark.parametrize(
    ("rules", "name", "text", "operation"),
    [
        ("tensorrt", "TensorRT", "codes must be INT8, but they are UINT8", "Quantize"),
        ("qnn", "QNN HTP", "the output must be read by QuantizeLinear only", "Dense"),
    ],
)
def test_published_rules_are_listed_by_step_and_not_called_measured(
    rules: str, name: str, text: str, operation: str
) -> None:
    quant, engine = for_target(QuantConfig(weight_bits=8, act_bits=8), rules)
    assert engine == rules and quant.target == "onnxruntime"
    student = quantize_model(trace_classifier(nn.Sequential(*mobile_nets.NETS["resnet"]()).eval(), SIZE), quant)
    found = kernel_table(student, quant, SIZE, rules)
    assert not found["measured"] and {row["kernel"] for row in found["steps"]} == {"not run"}
    reasons = [row["reason"] for row in found["steps"] if row["runs"] == "breaks a rule"]
    assert len(reasons) == found["counts"]["breaks a rule"]
    broken = {row["operation"]: row["reason"] for row in found["steps"] if row["runs"] == "breaks a rule"}
    assert text in broken[operation]
    line = kernel_summary(found)
    assert line.startswith(f"by the published rules of {name}, not run: ")
    assert ("shapes must be static" in line) == (rules == "qnn")


def test_an_unknown_target_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"`target` must be one of research, .*, qnn, but got coreml"):
        for_target(QuantConfig(), "coreml")
    assert for_target(QuantConfig(), None) == (QuantConfig(), "")
    assert kernel_table(None, QuantConfig(), SIZE) == {}  # type: ignore[arg-type]
