"""`synq inspect` reports what a run would do with a classifier."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import synq
from synq.cli import run
from synq.config.run import QuantConfig, TeacherConfig
from synq.diagnostics.inspection import CAM_NOTE, SYNTHESIS_NOTE, _guides, inspect, summary
from synq.quant.student import build_student
from synq.teacher.teacher import Teacher, load_teacher


def inspected(teacher: Teacher, **quant: object) -> dict:  # type: ignore[type-arg]
    config = QuantConfig(**quant)  # type: ignore[arg-type]
    return inspect(teacher, build_student(teacher, config), config)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig())


def test_sums_are_those_of_the_student_and_its_layers(teacher: Teacher) -> None:
    found, config = inspected(teacher, weight_bits=3, act_bits=5), QuantConfig(weight_bits=3, act_bits=5)
    student = build_student(teacher, config)
    assert found["student"]["bytes"] == student.size_bytes and found["student"]["bits"] == "W3A5"
    assert found["student"]["bitops"] == student.bitops == sum(row["bitops"] for row in found["layers"])
    assert found["student"]["macs"] == sum(row["macs"] for row in found["layers"])
    assert found["student"]["float_bitops"] == 32 * 32 * found["student"]["macs"]
    total = sum(parameter.numel() for parameter in teacher.module.parameters())
    assert found["teacher"]["parameters"] == sum(row["parameters"] for row in found["layers"]) == total
    json.dumps(found, allow_nan=False)


def test_every_operation_has_a_row_with_its_bits(teacher: Teacher) -> None:
    rows = {row["node"]: row for row in inspected(teacher, first_bits=8)["layers"]}
    nodes = [node.name for node in teacher.graph.graph.nodes if node.op not in ("output", "get_attr")]
    assert list(rows) == nodes
    assert (rows["conv1"]["weight_bits"], rows["conv1"]["macs"], rows["conv1"]["bitops"]) == (8, 18432, 18432 * 8 * 32)
    second = rows["stage1_0_conv1"]
    assert (second["weight_bits"], second["bitops"], second["output"]) == (4, second["macs"] * 16, "8 x 16 x 16")
    assert [rows[name]["output_bits"] for name in ("x", "conv1", "bn1", "relu")] == [32, 32, 32, 4]
    assert rows["x"]["kind"] == "image" and rows["linear"]["kind"] == "Linear"
    assert [row["node"] for row in rows.values() if CAM_NOTE in row["note"]] == ["relu_6"]
    guides = [name for name, module in teacher.module.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(SYNTHESIS_NOTE in row["note"] for row in rows.values()) == len(guides)


def test_attention_that_is_left_out_is_said_to_be() -> None:
    found = {"batch_norms": [], "attention": 3, "attention_left_out": 0}
    assert _guides(found) == "labels and 3 attentions, without BatchNorm statistics"
    said = _guides({**found, "attention_left_out": 1})
    assert "3 attentions (1 more left out, in which no axis keeps the images of a batch apart)" in said


def test_a_layer_called_twice_counts_its_parameters_once_and_its_macs_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.py"
    source = """
import torch
from torch import nn
class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)
    def forward(self, x):
        x = torch.relu(self.norm(self.conv(torch.relu(self.norm(self.conv(x))))))
        return self.fc(x.mean((2, 3)))
"""
    path.write_text(source)
    spec = TeacherConfig(spec=f"{path}:Twice", weights="random", input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    found = inspected(load_teacher(spec))
    convs = [row for row in found["layers"] if row["kind"] == "Conv2d"]
    assert [row["parameters"] for row in convs] == [84, 0]
    assert [row["macs"] for row in convs] == [2 * 81 * 64, 0]
    assert convs[0]["bitops"] == 81 * 64 * 4 * (32 + 4), "the image is float, the second input has 4 bits"


def test_the_summary_has_a_line_for_each_part(teacher: Teacher) -> None:
    text = summary(inspected(teacher))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert list(lines) == ["teacher", "images", "synthesis", "map", "student", "float", "ONNX"]
    assert "every operation can be exported" in lines["ONNX"] or "not checked" in lines["ONNX"]
    assert "19,074 parameters" in lines["teacher"] and "7 batch norms of 120 channels" in lines["synthesis"]
    assert "relu_6 (32 x 4 x 4): in closed form" in lines["map"] and "W4A4, protocol A" in lines["student"]
    assert "756 k MACs" in lines["student"] and "7 Conv2d" in lines["float"]


@pytest.mark.slow
def test_the_command_and_the_function_have_the_same_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "run.toml"
    for text, options, given in (
        ("", [], {}),
        ("[quant]\nact_points = 'inputs'\n", [], {"quant": {"act_points": "inputs"}}),
        (
            "[quant]\nweight_bits = 3\n",
            ["--quant.target", "research"],
            {"quant.weight_bits": 3, "quant.target": "research"},
        ),
    ):
        settings.write_text(text)
        assert run(["inspect", "--config", str(settings), *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == synq.inspect("bundled:digits_resnet8", config=given).values
    assert found["student"]["act_points"] == "relu"


def test_the_command_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--quant.weight_bits", "2"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == [
        "node",
        "kind",
        "output",
        "parameters",
        "MACs",
        "W",
        "out",
        "BitOps",
        "note",
    ]
    assert "W2A4" in table and "target onnxruntime" in table
    assert run(["inspect", "bundled:digits_resnet8", "--json", "--quant.act_points", "inputs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["act_points"] == "inputs" and found["layers"][0]["output_bits"] == 4
    assert run(["inspect", "--help"]) == 0 and "--teacher.weights random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "`teacher.spec` must read SOURCE:NAME"),
        (["--quant.weight_bits", "9"], "must be a whole number in"),
        (["synq.diagnostics.example_networks:audio", "--teacher.weights", "random"], "`teacher.input_size`"),
    ],
)
def test_input_that_a_run_rejects_is_rejected(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], pytest.param(["inspect"], marks=pytest.mark.slow)])
def test_a_pipe_closed_early_is_no_error(args: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "synq.cli", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, "")
