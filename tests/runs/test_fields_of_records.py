"""R8: fields that no reader expects are one line with file and field, in every command that reads records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.records import record
from support.sealed import edit
from synq.commands.leaderboard import main as leaderboard
from synq.commands.report import main as report
from synq.commands.show import main as show
from synq.runs.record import read_record, write_record

CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"deployment": {"onnx_bytes": "x"}}, "deployment.onnx_bytes = 'x'"),
    ({"deployment": {"onnx_bytes": 10**400}}, "deployment.onnx_bytes = 1000"),
    ({"deployment": {"files": [1]}}, "deployment.files[0] = 1"),
    ({"teacher": {"input_size": "x"}}, "teacher.input_size = 'x'"),
    ({"teacher": {"mean": [None]}}, "teacher.mean = [None]"),
    ({"loss_history": [1]}, "loss_history[0] = 1"),
    ({"loss_history": [{"kd": "x"}]}, "loss_history[0].kd = 'x'"),
    ({"started": "yesterday"}, "started = 'yesterday'"),
    ({"layers": [{"name": "conv"}]}, "layers[0].role = None"),
    ({"seconds": {"teacher": []}}, "seconds.teacher = []"),
    ({"objective_value": 10**400}, "objective_value = 1000"),
    ({"fidelity": {"kl": True}}, "fidelity.kl = True"),
    ({"warnings": [1]}, "warnings[0] = 1"),
    ({"versions": {"torch": 2}}, "versions.torch = 2"),
]


@pytest.mark.parametrize(("change", "field"), CHANGES, ids=[field for _, field in CHANGES])
def test_r8_a_wrong_field_is_named_with_its_file(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, record())
    edit(path, lambda content: content.update(change))
    with pytest.raises(ValueError, match=r"record.json` must hold a run record, but got ") as caught:
        read_record(path)
    assert field in str(caught.value) and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_r8_not_a_number_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, record())
    content = json.loads(path.read_text())
    del content["file_digest"]
    content["objective_value"] = float("nan")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"record.json` must hold a run record, but got objective_value = nan"):
        read_record(path)


@pytest.mark.parametrize(
    "command", [lambda path: leaderboard([path, "--print"]), lambda path: show([path]), lambda path: report([path])]
)
@pytest.mark.parametrize("change", [CHANGES[0][0], CHANGES[3][0], CHANGES[5][0], CHANGES[7][0]], ids=str)
def test_r8_every_command_has_one_line(
    command: Callable[[str], int], change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    write_record(path, record())
    edit(path, lambda content: content.update(change))
    assert command(str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("synq: error: ") and str(path) in line
