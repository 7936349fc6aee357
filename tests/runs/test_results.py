import dataclasses
import errno
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

import synq
from synq.config.run import RunConfig, config_from_dict, config_to_dict
from synq.runs import record as record_module
from synq.runs.record import (
    RunRecord,
    environment,
    read_json,
    read_record,
    summary_line,
    write_bytes_atomic,
    write_json_atomic,
    write_record,
    write_text_atomic,
)


def _record(**changes: object) -> RunRecord:
    values = {
        "model": "resnet20",
        "weight_bits": 4,
        "act_bits": 4,
        "protocol": "A",
        "act_points": "relu",
        "objective": "synthetic",
        "objective_value": 0.0123,
        "teacher_top1": 91.48,
        "rtn_top1": 80.9,
        "top1": 90.4,
        "top5": 99.5,
        "drop": 1.08,
        "num_eval": 4000,
        "loss_history": [{"epoch": 1, "kd": 0.5}],
        "seconds": {"finetune": 100.0},
        "total_seconds": 132.4,
    }
    return RunRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    for record in (RunRecord(), _record(), _record(status="failed", reason="kd is nan", top1=None)):
        write_record(tmp_path / "deep" / "record.json", record)
        assert read_record(tmp_path / "deep" / "record.json") == record


def test_numbers_that_are_none_are_null_in_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(
        path,
        _record(objective_value=math.nan, fidelity={"kl": math.inf}, loss_history=[{"kd": -math.inf, "n": (1, 2)}]),
    )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["objective_value"] is None and content["fidelity"] == {"kl": None}
    assert content["loss_history"] == [{"kd": None, "n": [1, 2]}]
    assert read_record(path).objective_value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "version 1, but got version 2"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"top1": "high"}, "but got top1 = 'high'"),
        ({"seed": True}, "but got seed = True"),
        ({"status": "done"}, "but got status = 'done'"),
        ({"config": None}, "but got config = None"),
    ],
)
def test_what_is_not_a_record_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "record.json"
    write_record(path, _record())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"record\.json` must hold a run record") as caught:
        read_record(path)
    assert message in str(caught.value)


def test_a_damaged_file_is_named_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"", b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"record\.json` must hold JSON, but it is damaged .*remove it"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="got a list"):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_a_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old")
    write_text_atomic(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü" and os.listdir(tmp_path) == ["x.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_record_from_before_a_setting_says_what_was_done_then(tmp_path: Path) -> None:
    """Images began as white noise before there was a choice: an old run must not count as a repetition of a new one."""
    config = config_to_dict(RunConfig())
    del config["synthesis"]["start"]
    write_record(tmp_path / "old.json", RunRecord(config=config))
    read = config_from_dict(RunConfig, read_record(tmp_path / "old.json").config)
    assert read.synthesis.start == "white" != RunConfig().synthesis.start
    write_record(tmp_path / "new.json", RunRecord(config=config_to_dict(RunConfig())))
    assert config_from_dict(RunConfig, read_record(tmp_path / "new.json").config) == RunConfig()
    write_record(tmp_path / "bare.json", RunRecord())
    write_record(tmp_path / "bare.json", RunRecord())
    assert read_record(tmp_path / "bare.json").config == {}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"old": True})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_module.os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json_atomic(path, {"old": False})
    assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert read_json(path) == {"old": True} and os.listdir(tmp_path) == ["x.json"]


def test_an_interrupt_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bytes_atomic(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x\.json"):
        write_json_atomic(tmp_path / "file" / "x.json", {})


def test_the_summary_is_one_line() -> None:
    assert (
        summary_line(_record()) == "resnet20 W4A4 A relu | teacher 91.48 | RTN 80.90 | final 90.40 | drop 1.08 | 132 s"
    )
    blind = _record(teacher_top1=None, rtn_top1=None, top1=None, drop=None)
    assert summary_line(blind) == "resnet20 W4A4 A relu | no labels | synthetic objective 0.0123 | 132 s"
    failed = _record(status="failed", reason="kd is nan", top1=None, objective_value=None, total_seconds=None)
    assert summary_line(failed) == "resnet20 W4A4 A relu | failed: kd is nan"


def test_every_field_of_a_record_is_explained(root: Path) -> None:
    lines = (root / "synq" / "runs" / "record.py").read_text().splitlines()
    for item in dataclasses.fields(RunRecord):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"    {item.name}: "))
        assert lines[at + 1].startswith('    """'), item.name


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_known_marked_dirty_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "synq" / "__init__.py"
    write_text_atomic(file, "1")
    monkeypatch.setattr(synq, "__file__", str(file))
    assert environment()["commit"] == "unknown"
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "x")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert len(environment()["commit"]) >= 12 and commit.startswith(environment()["commit"])
    file.write_text("2")
    assert environment()["commit"] == f"{commit[:12]}-dirty"
    monkeypatch.setenv("SYNQ_COMMIT", "abc")
    assert environment()["commit"] == "abc"


def test_the_environment_names_versions_and_host() -> None:
    facts = environment()
    assert set(facts) == {"commit", "versions", "host"}
    assert {"python", "torch", "accelerate"} <= set(facts["versions"]) and facts["host"]
