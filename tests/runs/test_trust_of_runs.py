"""No command and no call runs code because a record or a packed file names it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import synq
from support.sealed import edit
from synq.commands.evaluate import main as evaluate
from synq.commands.export import main as export
from synq.commands.report import main as report
from synq.commands.show import main as show
from synq.config.run import RunConfig, TeacherConfig, config_digest, config_from_dict
from synq.export.load import load_student
from synq.pipeline import run
from synq.runs.finished import open_run
from synq.runs.record import run_folder

CODE = 'open("ran", "w").close()\ndef make(): raise ValueError("made")\n'


@pytest.fixture
def strange(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose record names code that lies next to it, as a stranger would write it: with right digests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.py").write_text(CODE)
    copy = shutil.copytree(finished, tmp_path / finished.name)

    def change(content: dict[str, Any]) -> None:
        content["config"]["teacher"]["spec"] = content["teacher"]["spec"] = "notes.py:make"
        content["teacher"]["code"] = "0" * 64
        content["config_digest"] = config_digest(config_from_dict(RunConfig, content["config"]))

    edit(copy / "record.json", change)
    return copy


def test_r9_a_report_has_the_reason_and_runs_nothing(strange: Path, tmp_path: Path) -> None:
    assert report([str(strange)]) == 0 and show([str(strange)]) == 0
    assert "names code, " in (strange / "report.html").read_text() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [export, evaluate], ids=["export", "evaluate"])
def test_r9_export_and_evaluate_run_nothing(
    command: Callable[[list[str]], int], strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([str(strange)]) == 2 and not (tmp_path / "ran").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "names code, " in line and "--trust" in line and str(strange) in line
    assert command([str(strange), "--trust"]) == 2 and (tmp_path / "ran").exists()
    assert "raised ValueError: made" in capsys.readouterr().err


def test_r9_python_runs_nothing(strange: Path, tmp_path: Path) -> None:
    for call in (synq.open_run, synq.load_student, open_run):
        with pytest.raises(ValueError, match="names code, "):
            call(strange)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="raised ValueError: made"):
        synq.open_run(strange, trust=True)
    (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match="raised ValueError: made"):
        open_run(strange, {"teacher.spec": "notes.py:make"})
    assert (tmp_path / "ran").exists()


def test_r9_a_packed_file_runs_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from synq.export import packed

    assert export([str(finished), "--formats", "packed", "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "model.safetensors"
    load_student(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    about = json.loads(metadata["about"])
    about["config"]["teacher"]["spec"] = "notes.py:make"
    metadata |= {"about": json.dumps(about)}
    del metadata["digest"]
    tensors = load_file(path)
    path.write_bytes(packed.to_safetensors(tensors, metadata | {"digest": packed._digest(tensors, metadata)}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.py").write_text(CODE)
    with pytest.raises(ValueError, match="names code, "):
        load_student(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="raised ValueError: made"):
        load_student(path, "notes.py:make")


def test_an_own_run_needs_no_word_until_its_code_changes(
    config: RunConfig, make_config: Callable[..., TeacherConfig], model_file: Path
) -> None:
    config = replace(
        config, teacher=make_config(), evaluation=replace(config.evaluation, dataset="none", objective="synthetic")
    )
    run(config)
    folder = run_folder(config)
    open_run(folder)
    with model_file.open("a") as file:
        file.write("\n# a remark\n")
    with pytest.raises(ValueError, match="names code, "):
        open_run(folder)
    open_run(folder, {"teacher.spec": config.teacher.spec})
