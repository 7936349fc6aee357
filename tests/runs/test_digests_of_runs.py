"""A run reads nothing back unchecked: what is damaged is named, made again where it can be, and never built on."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.sealed import edit, flip, unsealed
from synq.commands.evaluate import main as evaluate
from synq.commands.export import main as export
from synq.commands.report import main as report
from synq.common.digests import file_digest
from synq.common.files import DamagedFileError
from synq.config.run import RunConfig, load_run
from synq.pipeline import run
from synq.runs.finished import open_run
from synq.runs.record import RunRecord, read_record, run_folder

FIGURES = ("top1", "rtn_top1", "teacher_top1", "fidelity", "objective_value", "codes_changed", "files", "set_digest")


def figures(record: RunRecord) -> list[Any]:
    return [getattr(record, name) for name in FIGURES]


def middle(path: Path) -> Path:
    return flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["checkpoint.pt", "record.json", "student.safetensors", "config.json"])
def test_r1_a_damaged_state_is_named_and_made_again(
    name: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = run(config), run_folder(config)
    if name == "checkpoint.pt":  # as in a run that was killed before its record
        (folder / "record.json").unlink()
    middle(folder / name)
    capsys.readouterr()
    again = run(config)
    assert figures(again) == figures(whole) == figures(read_record(folder / "record.json"))
    lines = [line for line in capsys.readouterr().err.splitlines() if str(folder / name) in line]
    assert len(lines) == 1 and "again" in lines[0]
    assert load_run(folder / "config.json") == load_run(folder / "config.json")
    assert file_digest(folder / "student.safetensors") == whole.files["student.safetensors"]
    open_run(folder)


def test_r1_a_damaged_calibration_is_named_and_made_again(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, quant=replace(config.quant, equalization=True))
    whole, folder = run(config), run_folder(config)
    for name in ("record.json", "checkpoint.pt"):
        (folder / name).unlink()
    middle(folder / "prepared.pt")
    assert figures(run(config)) == figures(whole)
    assert f"`{folder / 'prepared.pt'}`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [export, report, evaluate], ids=["export", "report", "evaluate"])
def test_r2_no_command_takes_a_damaged_student(
    command: Callable[[list[str]], int], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / finished.name, ignore=shutil.ignore_patterns("export"))
    (copy / "export").mkdir()
    (copy / "export" / "card.json").write_text('{"card_version": 1}')
    flip(copy / "student.safetensors", -1000, 7)
    assert command([str(copy)]) != 0
    err = capsys.readouterr().err
    assert f"`{copy / 'student.safetensors'}` must be as it was written" in err and "Traceback" not in err
    assert (copy / "export" / "card.json").read_text() == '{"card_version": 1}', "an earlier export stays"


def test_r2_a_student_of_another_run_is_rejected(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / finished.name)
    edit(copy / "record.json", lambda content: content["files"].update({"student.safetensors": "0" * 64}))
    with pytest.raises(DamagedFileError, match="of another run"):
        open_run(copy)


def test_a_run_of_an_earlier_version_is_read_with_a_notice(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / finished.name)
    unsealed(copy / "record.json", lambda content: content.pop("files"))
    assert open_run(copy).record.files == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert str(copy) in line and "without a digest" in line
