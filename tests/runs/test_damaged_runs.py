"""Files of a run that are cut off, of another kind or changed: one line that names the file, and exit code 2."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.sealed import edit
from synq.commands.export import main as export
from synq.common.digests import file_digest

Damage = Callable[[Path], object]


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def _setting(*path: str, value: Any) -> Damage:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return lambda run: edit(run / "record.json", change)


def _garbage(content: bytes) -> bytes:
    return random.Random(0).randbytes(len(content))


RECORD, STUDENT = "record.json", "student.safetensors"
WRITTEN = "student.safetensors` must be as it was written"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "record cut off": (_bytes(RECORD, lambda content: content[: len(content) // 2]), "must hold JSON"),
    "record empty": (_bytes(RECORD, lambda _: b""), "must hold JSON"),
    "record of noise": (_bytes(RECORD, _garbage), "must hold JSON"),
    "record of zeros": (_bytes(RECORD, lambda content: bytes(len(content))), "must hold JSON"),
    "record a list": (_bytes(RECORD, lambda content: b"[" + content + b"]"), "must hold a run record, but got a list"),
    "record of another version": (_setting("schema_version", value=99), "run it again"),
    "unknown target": (_setting("config", "quant", "target", value="tpu"), "`quant.target` must be one of"),
    "a target that is no name": (_setting("config", "quant", "target", value=7), "`quant.target` must be one of"),
    "another target": (_setting("config", "quant", "target", value="litert"), "`quant.act_points` must be left out"),
    "other bits": (_setting("config", "quant", "weight_bits", value=7), "the settings with which it was run"),
    "another seed": (_setting("config", "seed", value=77), "the settings with which it was run"),
    "student cut off": (
        _bytes(STUDENT, lambda content: content[: len(content) // 2]),
        WRITTEN,
    ),
    "student of few bytes": (
        _bytes(STUDENT, lambda content: content[:7]),
        WRITTEN,
    ),
    "student empty": (_bytes(STUDENT, lambda _: b""), WRITTEN),
    "student of noise": (_bytes(STUDENT, _garbage), WRITTEN),
    "student with a damaged header": (
        _bytes(STUDENT, lambda content: content[:40] + _garbage(content[40:60]) + content[60:]),
        WRITTEN,
    ),
    "student missing": (lambda run: (run / STUDENT).unlink(), "must hold student.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_of_a_run_are_rejected_in_one_line(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, complaint = DAMAGES[name]
    run = tmp_path / finished.name
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("export"))
    damage(run)
    assert export([str(run), "--formats", "packed"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and line.count("\n") == 1 and complaint in line and str(run) in line
    assert "teacher.weights" not in line, "the user gave no such setting"
    assert not (run / "export").exists()


def test_a_student_of_another_network_is_named_with_what_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file

    run = tmp_path / finished.name
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("export"))
    save_file({"other.weight": torch.zeros(3)}, run / STUDENT)
    edit(run / RECORD, lambda content: content.update(files={STUDENT: file_digest(run / STUDENT)}))
    assert export([str(run), "--formats", "packed"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "must hold a student of its teacher" in line and "Missing key(s)" in line
    assert len(line) < 1000
