import dataclasses
import json
import math
from pathlib import Path

import pytest

from support.sealed import edit
from synq.common.files import read_json
from synq.config.run import RunConfig, config_from_dict, config_to_dict
from synq.runs.record import RunRecord, read_record, summary_line, write_record


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
        _record(
            objective_value=math.nan,
            fidelity={"kl": math.inf},
            loss_history=[{"kd": -math.inf}],
            teacher={"input_size": (1, 2, 3)},
        ),
    )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["objective_value"] is None and content["fidelity"] == {"kl": None}
    assert content["loss_history"] == [{"kd": None}] and content["teacher"]["input_size"] == [1, 2, 3]
    assert read_record(path).objective_value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "of format 2, but got format 3, written by a later version of SynQ: update SynQ"),
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
    edit(path, lambda content: content.update(change))
    with pytest.raises(ValueError, match=r"record\.json` must hold a run record") as caught:
        read_record(path)
    assert message in str(caught.value)


def test_a_damaged_file_is_named_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"", b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"record\.json` must hold JSON, but it is damaged .*; do this"):
            read_json(path, "do this")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="got a list"):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_the_configuration_of_a_record_is_the_run_s(tmp_path: Path) -> None:
    write_record(tmp_path / "new.json", RunRecord(config=config_to_dict(RunConfig())))
    assert config_from_dict(RunConfig, read_record(tmp_path / "new.json").config) == RunConfig()
    write_record(tmp_path / "bare.json", RunRecord())
    assert read_record(tmp_path / "bare.json").config == {}


def test_the_summary_is_one_line() -> None:
    assert (
        summary_line(_record())
        == "resnet20 W4A4 A relu | teacher 91.48 | RTN 80.90 | final 90.40 | drop 1.08 (4000 images) | 132 s"
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
