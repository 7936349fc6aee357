"""`synq verify`: nothing on intact work, one line that names the file for whatever is wrong, nothing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.made_sweeps import made_sweep
from support.records import bits, record
from support.sealed import edit, flip, unsealed
from synq.commands.export import main as export
from synq.commands.leaderboard import main as leaderboard
from synq.commands.verify import main as verify
from synq.common.notices import forget_notices
from synq.config.run import RunConfig, config_from_dict
from synq.runs.record import read_record, write_config, write_record

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    """A finished run with an export."""
    assert export([str(finished), "--rounds", "0"]) == 0
    return finished


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy of it, with its images."""
    shutil.copytree(exported.parent / "store", tmp_path / "store")
    return shutil.copytree(exported, tmp_path / exported.name)


def printed(args: list[str]) -> int:
    return leaderboard([*args, "--print"])


def findings(capsys: Capture, *args: str, code: int = 1) -> list[str]:
    forget_notices()
    capsys.readouterr()
    assert verify([*args]) == code
    return capsys.readouterr().out.splitlines()


def test_an_intact_run_has_no_findings_and_is_not_changed(run: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert findings(capsys, str(run), code=0) == [] == findings(capsys, str(run / "export"), "--deep", code=0)
    assert findings(capsys, str(run), "--deep", code=0) == []
    assert findings(capsys, str(run / "export" / "model.safetensors"), code=0) == []
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def middle(name: str) -> Callable[[Path], object]:
    return lambda run: flip(run / name, (run / name).stat().st_size // 2)


def figure(name: str, value: Any) -> Callable[[Path], object]:
    return lambda run: edit(run / "record.json", lambda content: content.update({name: value}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "student": (middle("student.safetensors"), "student.safetensors"),
    "checkpoint": (middle("checkpoint.pt"), "checkpoint.pt"),
    "settings": (middle("config.json"), "config.json"),
    "record": (middle("record.json"), "record.json"),
    "r11 onnx": (middle("export/model.onnx"), "model.onnx` must be the file of its card"),
    "r11 packed": (middle("export/model.safetensors"), "model.safetensors"),
    "r11 program": (middle("export/model.pt2"), "model.pt2"),
    "r11 page": (middle("export/README.md"), "README.md"),
    "r11 card": (middle("export/card.json"), "card.json"),
    "r11 file removed": (lambda run: (run / "export" / "model.onnx").unlink(), "model.onnx"),
    "r11 file added": (lambda run: (run / "export" / "model.pte").write_bytes(b"x"), "is not on the card"),
    "r6 digest": (figure("config_digest", "0" * 16), "config_digest is 0000000000000000"),
    "r6 bits": (figure("weight_bits", 2), "weight_bits is 2, but its configuration has 4"),
    "r6 top-1": (figure("top1", 150.0), "top1 is 150, but must be in [0, 100]"),
    "r6 KL": (figure("objective_value", -5.0), "objective_value is -5"),
    "r6 objective": (figure("objective_value", 5.0), "but fidelity has"),
    "r6 drop": (figure("drop", 50.0), "drop is 50, but teacher_top1 - top1 is"),
    "r6 count": (figure("lost", 60), "but 100 (lost - gained) / num_eval is"),
    "r6 no number of images": (figure("rtn_top1", 33.3), "is no number of"),
    "other settings": (
        lambda run: edit(run / "config.json", lambda content: content.update(seed=9)),
        "has other settings than the record",
    ),
    "images": (
        lambda run: [flip(file, -9) for file in (run.parent / "store").glob("*/images.safetensors")],
        "differs from its digest",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_fault_is_a_line_that_names_the_file(name: str, run: Path, capsys: Capture) -> None:
    damage, text = DAMAGES[name]
    damage(run)
    lines = findings(capsys, str(run))
    assert any(text in line for line in lines) and all(str(run.parent) in line for line in lines)
    forget_notices()
    assert verify([str(run), "--json"]) == 1
    assert {one["finding"] for one in json.loads(capsys.readouterr().out)} and lines


def test_a_student_with_other_weights_is_found_by_measuring(run: Path, capsys: Capture) -> None:
    from synq.common.digests import file_digest

    student = run / "student.safetensors"
    for at in range(3, 3000, 4):
        flip(student, -at, 7)
    edit(run / "record.json", lambda content: content["files"].update({student.name: file_digest(student)}))
    assert findings(capsys, str(run), code=0) == []
    assert any("measured again" in line for line in findings(capsys, str(run), "--deep"))


def test_a_folder_of_another_run_is_named(run: Path, capsys: Capture) -> None:
    other = run.rename(run.with_name(f"run-{'0' * 16}"))
    assert any(f"`{other}`: has the record of another run" in line for line in findings(capsys, str(other)))


def test_work_of_an_earlier_version_is_clean_with_a_note(run: Path, capsys: Capture) -> None:
    for name in ("record.json", "config.json", "export/card.json"):
        unsealed(run / name, lambda content: (content.pop("files", None), content.pop("readme_sha256", None)))
    assert findings(capsys, str(run), code=0) == []


def test_a_sweep(tmp_path: Path, capsys: Capture) -> None:
    sweep = made_sweep(tmp_path / "sweep", trials=10)
    assert findings(capsys, str(sweep), code=0) == []
    first, second, *_ = sorted((sweep / "records").glob("*.json"))
    assert leaderboard([str(sweep)]) == 0
    edit(sweep / "sweep.json", lambda content: content.update(finished=10))
    assert findings(capsys, str(sweep), code=0) == []
    for name in ("trials.csv", "leaderboard.csv"):
        table = sweep / name
        text = table.read_text()
        table.write_text(text.replace(",91.0,", ",91.5,").replace(",91,", ",91.5,"))
        assert any(f"`{table}`: line 2" in line for line in findings(capsys, str(table)))
        assert any(str(table) in line for line in findings(capsys, str(sweep)))
        lines = text.splitlines(keepends=True)
        for number in (0, 1):  # a flipped comma joins two cells
            joined = [*lines[:number], lines[number].replace(",", "$", 1), *lines[number + 1 :]]
            table.write_text("".join(joined))
            assert any("another number of cells than the heading" in line for line in findings(capsys, str(sweep)))
            assert any(f"`{table}`: is no table" in line for line in findings(capsys, str(table)))
        table.write_text(text)
    shutil.copy(first, second)
    assert any(f"`{second}`: is the record of {first.stem}" in line for line in findings(capsys, str(sweep)))
    (sweep / "plans" / first.name).unlink()
    assert any(f"`{first}`: has no plan" in line for line in findings(capsys, str(sweep)))
    (sweep / "plans" / second.name).write_text("")
    assert any(f"`{sweep / 'plans' / second.name}` must hold JSON" in line for line in findings(capsys, str(sweep)))


def test_a_pruned_trial_of_a_sweep_is_no_unfinished_run(tmp_path: Path, capsys: Capture) -> None:
    sweep = made_sweep(tmp_path / "sweep", trials=5)
    folders = {}
    for path in sorted((sweep / "records").glob("*.json"))[2:4]:
        trial = read_record(path)
        folder = sweep / "runs" / f"{trial.config['name']}-{trial.config_digest}"
        write_config(folder / "config.json", config_from_dict(RunConfig, trial.config))
        folders[trial.status] = folder
    forget_notices()
    assert verify([str(sweep)]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "is not finished" in line]
    assert f"`{folders['completed']}`" in note and folders["pruned"].name not in note


@pytest.mark.parametrize("command", [verify, printed], ids=["verify", "leaderboard"])
def test_r6_records_that_contradict_each_other_are_both_named(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: Capture
) -> None:
    for name, value in (("a", 0.6), ("b", 5.0), ("c", 0.6)):
        write_record(tmp_path / name / "record.json", record(value))
    forget_notices()
    command([str(tmp_path)])
    captured = capsys.readouterr()
    (line,) = [line for line in (captured.out + captured.err).splitlines() if "one setting and seed" in line]
    same = [f"{tmp_path / name / 'record.json'}" in line for name in ("a", "c")]
    assert f"{tmp_path / 'b' / 'record.json'}" in line and sum(same) == 1
    assert "objective_value 0.6 and 5" in line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_bits": 2}, "weight_bits is 2, but its configuration has 4"),
        ({"objective_value": -5.0}, "objective_value is -5"),
        ({"top1": 150.0}, "top1 is 150"),
        ({"drop": 9.0}, "drop is 9, but teacher_top1 - top1 is 2"),
    ],
)
def test_r6_the_leaderboard_rejects_a_record_that_contradicts_itself(
    change: dict[str, Any], text: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "a" / "record.json"
    write_record(path, record(0.1, overrides=bits(4)))
    assert leaderboard([str(tmp_path), "--print"]) == 0
    edit(path, lambda content: content.update(change))
    assert leaderboard([str(tmp_path), "--print"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`{path}`" in line and text in line


def test_paths_that_are_nothing_of_this(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "x.csv", tmp_path / "empty"):
        assert verify([str(path)]) == 2
        assert str(path) in capsys.readouterr().err
