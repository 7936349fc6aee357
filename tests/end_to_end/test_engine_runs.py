"""Whole runs of students for an engine on the bundled teacher, and the commands that read them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synq.cli import run as run_command
from synq.config.run import RunConfig, TeacherConfig, with_overrides
from synq.diagnostics.smoke_run import smoke_run
from synq.export.targets.formats import TargetFormat
from synq.pipeline import run
from synq.runs.record import summary_line


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("onnxruntime", {"quant.portable": True, "finetune.feature_weight": 1.0}),
        pytest.param("openvino", {"quant.learned_steps": "all", "quant.weight_range": "mse"}, marks=pytest.mark.slow),
        pytest.param(
            "litert",
            {"quant.rounding": "adaround", "quant.equalization": True, "quant.bn_correction": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("executorch", {"quant.act_bits": 4, "quant.last_bits": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_run_for_an_engine_is_recorded_under_its_name(
    config: RunConfig, target: str, settings: dict[str, Any]
) -> None:
    widths = {"quant.weight_bits": 8, "quant.act_bits": 8}
    config = with_overrides(
        config,
        {**widths, "quant.target": target, "reconstruction.iterations": 4, "evaluation.num_images": 128, **settings},
    )
    record = run(config)
    assert record.status == "completed" and record.act_points == config.quant.points
    assert record.rtn_top1 is not None and record.teacher_top1 is not None
    assert record.rtn_top1 > record.teacher_top1 - 5
    assert f" {config.quant.points} |" in summary_line(record)
    rows = {(row["role"], row["name"]): row for row in record.layers}
    assert rows["activation", "x"]["bits"] == 8
    assert rows["activation", "linear"]["bits"] == {"litert": 8, "executorch": 4}.get(target, 32)
    assert {row["note"] for row in record.layers} >= ({"clamped, not rounded"} if target == "openvino" else set())
    assert run(config) == record, "it is finished"


def test_inspect_prints_the_grid_of_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", "--quant.target", "openvino", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bits = {row["node"]: row["output_bits"] for row in found["layers"]}
    assert bits["x"] == bits["pool"] == bits["flatten"] == 8 and bits["linear"] == 32
    read_by_sums = {"stage1_0_bn2", "stage2_0_bn2", "stage3_0_bn2"}
    before = {"x", "pool", "flatten", "linear", "add_2", "relu_6"}  # the pool reads the last sum
    steps = {node for node in bits if node.startswith(("bn", "relu", "add", "stage")) and not node.endswith("conv2")}
    assert {bits[node] for node in read_by_sums} == {8}
    assert {bits[node] for node in steps - read_by_sums - before} == {4}, "a layer reads them"
    clamped = [row["node"] for row in found["layers"] if "clamped, not rounded" in (row["note"] or "")]
    assert clamped == ["stage1_0_bn2", "stage2_0_bn2", "stage3_0_bn2"]
    assert found["student"]["act_points"] == "openvino" and found["onnx"]["exportable"] is True
    assert run_command(["inspect", "--quant.target", "litert"]) == 0
    text = capsys.readouterr().out
    assert "W4A4, protocol B (8/8), target litert: " in text and "float      nothing" in text


def test_a_smoke_run_for_an_engine_verifies_its_file(config: RunConfig, tmp_path: Path) -> None:
    row = smoke_run(with_overrides(config, {"quant.target": "onnxruntime", "quant.act_bits": 8}), tmp_path)
    assert row["status"] == "works" and row["exact"] and row["sqnr_db"] > 20, row["reason"]
    assert row["export"] == "onnxruntime" and list(tmp_path.rglob("model.onnx"))


def test_a_smoke_run_without_the_engine_writes_no_file_and_reports_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TargetFormat, "missing", lambda _: ["openvino"])
    row = smoke_run(with_overrides(config, {"quant.target": "openvino"}), tmp_path)
    assert row["status"] == "works" and row["exact"] and row["sqnr_db"] > 20
    assert row["export"].startswith("not tried: ") and "openvino is needed" in row["export"]


NO_FORM = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
    def forward(self, x):
        x = self.bn(self.stem(x))
        return self.fc((x * torch.softmax(x, 1)).mean((2, 3)))
"""


def test_a_network_without_a_form_in_an_engine_is_rejected_before_images_are_made(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attention.py"
    path.write_text(NO_FORM)
    facts = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    teacher = TeacherConfig(spec=f"{path}:Attention", weights="random", **facts)  # type: ignore[arg-type]
    own = replace(config, teacher=teacher)
    engine = with_overrides(own, {"quant.target": "onnxruntime", "evaluation.dataset": "none"})
    with pytest.raises(ValueError, match=r"must have an integer form of every operation.*_softmax"):
        run(engine)
    folder = Path(config.runtime.output_dir)
    assert not list(folder.glob("**/*.safetensors")) and not list(folder.glob("**/*.json")), "before any work"
    row = smoke_run(engine, tmp_path / "smoke")
    assert row["status"] == "rejected" and "_softmax" in row["reason"]
    command = ["inspect", teacher.spec, "--teacher.weights", "random", "--teacher.input_size", "3", "8", "8"]
    command += ["--teacher.mean", ".5", ".5", ".5", "--teacher.std", ".25", ".25", ".25", "--quant.target"]
    assert run_command([*command, "onnxruntime"]) == 0
    assert "_softmax" in capsys.readouterr().out
    assert run_command([*command, "research"]) == 0
    assert "_softmax" not in capsys.readouterr().out
