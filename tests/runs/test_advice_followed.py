"""What a message advises is done, and reaches the end that it promises."""

import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.sealed import edit
from synq.commands.export import main as export
from synq.commands.leaderboard import main as leaderboard
from synq.common.digests import read_sealed, write_sealed
from synq.config.run import RunConfig, load_run, with_overrides
from synq.pipeline import run
from synq.runs.record import RunRecord, read_record, run_folder, write_config

FIGURES = ("top1", "rtn_top1", "teacher_top1", "fidelity", "objective_value", "codes_changed", "files", "set_digest")


def figures(record: RunRecord) -> list[Any]:
    return [getattr(record, name) for name in FIGURES]


def state(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a file of states and write it with its digest."""
    content, _ = read_sealed(path)
    values = torch.load(io.BytesIO(content), weights_only=True)
    change(values)
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_sealed(path, buffer.getvalue())
    return path


def killed(folder: Path) -> Path:
    """Make a finished run one that was killed before its record, and return its checkpoint."""
    (folder / "record.json").unlink()
    return folder / "checkpoint.pt"


def of_another_format(folder: Path) -> Path:
    return state(killed(folder), lambda values: values.update(format=0))


def of_another_teacher(folder: Path) -> Path:
    return state(killed(folder), lambda values: values.update(identity="another"))


def set_of_another_format(folder: Path) -> Path:
    killed(folder).unlink()
    (folder / "prepared.pt").unlink(missing_ok=True)
    path = sorted(folder.parent.glob("store/*/manifest.json"))[0]
    return edit(path, lambda content: content.update(format_version=0)).parent


def record_of_another_format(folder: Path) -> Path:
    return edit(folder / "record.json", lambda content: content.update(schema_version=0))


def remove(named: Path) -> None:
    if named.is_dir():
        shutil.rmtree(named)
    else:
        named.unlink()


@dataclass(frozen=True)
class Case:
    """A file that a run cannot take, the advice, and what follows it."""

    damage: Callable[[Path], Path]
    advice: str
    follow: Callable[[Path], object]


CASES = {
    "a checkpoint of another format": Case(of_another_format, "remove it and run it again", remove),
    "a checkpoint of another teacher": Case(of_another_teacher, "Choose another output_dir, or remove it", remove),
    "a set of another format": Case(set_of_another_format, "remove it and run the same command again", remove),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_advised_about_a_file_of_a_run_makes_the_run_whole(name: str, config: RunConfig) -> None:
    case = CASES[name]
    whole, folder = run(config), run_folder(config)
    named = case.damage(folder)
    with pytest.raises(ValueError, match=re.escape(case.advice)) as caught:
        run(config)
    assert str(named) in str(caught.value)
    case.follow(named)
    assert figures(run(config)) == figures(whole) == figures(read_record(folder / "record.json"))


@pytest.mark.slow
def test_another_output_folder_is_as_good_as_removing_the_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    whole = run(config)
    of_another_teacher(run_folder(config))
    other = with_overrides(config, {"runtime.output_dir": str(tmp_path / "other")})
    assert figures(run(other)) == figures(whole)


@pytest.mark.slow
def test_a_record_that_was_moved_out_is_measured_again(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = run(config), run_folder(config)
    edit(folder / "record.json", lambda content: content.update(drop=50.0))
    assert leaderboard([str(folder), "--print"]) == 2
    assert "move it out; a run without its record is measured again" in capsys.readouterr().err
    os.replace(folder / "record.json", tmp_path / "moved.json")
    assert figures(run(config)) == figures(whole)
    assert leaderboard([str(folder), "--print"]) == 0


@pytest.mark.slow
def test_a_record_of_another_format_is_removed_and_its_run_has_it_again(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = run(config), run_folder(config)
    record_of_another_format(folder)
    assert leaderboard([str(folder), "--print"]) == 2
    line = capsys.readouterr().err
    assert str(folder / "record.json") in line and "remove it and run it again" in line
    (folder / "record.json").unlink()
    assert figures(run(config)) == figures(whole)
    assert leaderboard([str(folder), "--print"]) == 0


@pytest.mark.slow
def test_a_run_without_its_student_is_run_again_in_another_folder(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, quant=replace(config.quant, act_points="inputs"))
    whole, folder = run(config), run_folder(config)
    (folder / "student.safetensors").unlink()
    assert export([str(folder), "--formats", "packed"]) == 2
    assert "run it again in another folder" in capsys.readouterr().err
    other = with_overrides(config, {"runtime.output_dir": str(tmp_path / "other")})
    assert figures(run(other)) == figures(whole)
    assert export([str(run_folder(other)), "--formats", "packed"]) == 0


def test_settings_that_were_changed_on_purpose_are_read_without_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_config(path, RunConfig())
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5', 1))
    with pytest.raises(ValueError, match="take its last key, file_digest, out if the change is meant"):
        load_run(path)
    text, _, _ = path.read_text().rpartition(',\n  "file_digest"')
    path.write_text(text + "\n}\n")
    assert load_run(path) == replace(RunConfig(), seed=5)
