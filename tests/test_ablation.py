"""The ablation: one difference per row, shared seeds, paired gains."""

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from launch.ablate import main
from sweeps.ablation import COLUMNS, REFERENCE, ROWS, plan, table
from synq.configs import RunConfig, config_to_dict, with_overrides
from synq.finetune import NonFiniteLossError
from synq.results import RunRecord, read_json

BASE = with_overrides(RunConfig(), {"finetune.lowpass_cutoff": 8.0})


def test_rows_differ_from_the_full_run_in_what_their_name_says_only() -> None:
    runs = plan(BASE, ["W4A4", "W3A3"], [0, 7])
    assert len(runs) == 2 * 2 * len(ROWS)
    full, no_cam = (config_to_dict(runs["W3A3", row, 7]) for row in ("SynQ, all on", "CAM off"))
    assert (full["seed"], full["data_seed"], full["quant"]["weight_bits"]) == (7, 7, 3)
    no_cam["finetune"]["cam_weight"] = full["finetune"]["cam_weight"]
    assert no_cam == full
    off = runs["W4A4", REFERENCE, 0].finetune
    assert (off.lowpass_cutoff, off.cam_weight, off.difficulty_threshold) == (None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lowpass_cutoff", None), ("cam_weight", 0.0), ("difficulty_threshold", 1.0), ("ce_weight", 0.0)],
)
def test_an_idea_that_is_off_already_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"finetune.{key}. must be on"):
        plan(with_overrides(BASE, {f"finetune.{key}": value}), ["W4A4"], [0])


def record(top1: float, seed: int) -> RunRecord:
    return RunRecord(top1=top1, teacher_top1=90.0, rtn_top1=50.0, drop=90.0 - top1, seed=seed, fidelity={"kl": 0.5})


def test_gains_are_paired_by_seed() -> None:
    records = {
        ("W4A4", "SynQ, all on", 0): record(81.0, 0),
        ("W4A4", "SynQ, all on", 1): record(72.0, 1),
        ("W4A4", REFERENCE, 0): record(80.0, 0),
        ("W4A4", REFERENCE, 1): record(70.0, 1),
    }
    full, off = table(records)
    assert full["gain_over_all_off"] == pytest.approx(1.5) and full["gain_stderr"] == pytest.approx(0.5)
    assert full["top1_mean"] == 76.5 and full["top1_std"] == pytest.approx(6.364, abs=1e-3)
    assert off["gain_over_all_off"] is None and set(full) == set(COLUMNS)


def test_the_door_runs_and_resumes(
    tmp_path: Path, tiny_settings: dict[str, Any], as_words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**tiny_settings, "runtime.output_dir": tmp_path, "finetune.lowpass_cutoff": 3.0}
    words = ["--bits", "W3A3", "--seeds", "0", "--rows", "SynQ, all on", "all off", "--jobs", "1", *as_words(settings)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "| W3A3 | SynQ, all on | 1 |" in out and (tmp_path / "ablation.csv").read_text().count("\n") == 3
    started = {path: read_json(path)["started"] for path in tmp_path.glob("*/record.json")}
    assert len(started) == 2
    assert main(words) == 0
    assert {path: read_json(path)["started"] for path in tmp_path.glob("*/record.json")} == started


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), "the same command goes on"),
        (NonFiniteLossError("the term kd became nan"), "kd became nan"),
    ],
)
def test_a_run_that_dies_is_one_line_and_code_1(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("launch.ablate.run_all", fail)
    assert main(["--finetune.lowpass_cutoff", "3"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and words in line and line.count("\n") == 1


def test_tables_that_cannot_be_written_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ablation.csv").mkdir()
    monkeypatch.setattr("launch.ablate.run_all", lambda runs, *_: {cell: record(80.0, cell[2]) for cell in runs})
    assert main(["--finetune.lowpass_cutoff", "3", "--runtime.output_dir", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and "ablation.csv" in line and line.count("\n") == 1


def test_user_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--finetune.cam_weight", "0", "--finetune.lowpass_cutoff", "3"]) == 2
    assert main(["--bits", "W1A1", "--finetune.lowpass_cutoff", "3"]) == 2
    assert main(["--rows", "nothing off", "--finetune.lowpass_cutoff", "3"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("synq: error: ") for line in lines)
