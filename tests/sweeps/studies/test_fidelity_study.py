"""The study of fidelity measures: its table by hand, and the command on a small sweep."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.sealed import edit
from synq.commands.fidelity_study import main
from synq.common.exit_codes import USER_ERROR
from synq.config.run import RunConfig, with_overrides
from synq.pipeline import run
from synq.runs.record import RunRecord, write_record
from synq.sweeps.leaderboard.columns import FIDELITY_TABLE, keys
from synq.sweeps.studies.fidelity_study import MEASURES, UNIONS, VIEWS
from synq.sweeps.studies.rank_table import markdown, table

pytestmark = pytest.mark.usefixtures("torch_rng_untouched")


def _trials(top1: list[float], **scores: list[float]) -> list[tuple[float, dict[tuple[str, str], float]]]:
    return [(value, {("plain", name): x[i] for name, x in scores.items()}) for i, value in enumerate(top1)]


def test_table_by_hand() -> None:
    top1 = [90.0, 80.0, 70.0, 60.0, 50.0]
    first = _trials(top1, kl=[2, 1, 3, 4, 5], perfect=[1, 2, 3, 4, 5], flat=[7] * 5)
    rows = {row["measure"]: row for row in table({"g": first})}
    assert set(rows["kl"]) == set(keys(FIDELITY_TABLE)) and list(rows) == ["perfect", "kl", "flat"], "best first"
    assert rows["kl"]["spearman"] == pytest.approx(0.9) and rows["kl"]["kendall"] == pytest.approx(0.8)
    assert rows["kl"]["spearman_top_half"] == pytest.approx(0.5), "of 90, 80, 70"
    assert (rows["kl"]["picked_top1"], rows["kl"]["best_top1"], rows["kl"]["regret"]) == (80.0, 90.0, 10.0)
    assert rows["perfect"]["low"] == pytest.approx(1) and rows["kl"]["low"] < 0.9 < rows["kl"]["high"] + 0.11
    assert rows["kl"]["beats_reference"] == 0.5 and rows["perfect"]["beats_reference"] > 0.7
    assert rows["flat"]["beats_reference"] < 0.1
    assert (rows["flat"]["picked_top1"], rows["flat"]["spearman"]) == (70.0, 0.0), "a tie picks at random"


def test_joint_rows_are_the_mean_over_groups_and_sort_first() -> None:
    good = _trials([9.0, 8.0, 7.0], kl=[1, 2, 3], disagreement=[2, 1, 3])
    bad = _trials([9.0, 8.0, 7.0], kl=[3, 2, 1], disagreement=[2, 1, 3])
    rows = table({"g": good, "h": bad})
    assert [(row["group"], row["measure"]) for row in rows[:2]] == [("all", "disagreement"), ("all", "kl")]
    assert (rows[1]["spearman"], rows[1]["num_trials"]) == (pytest.approx(0.0), 6)
    assert rows[0]["spearman"] == pytest.approx(0.5) and rows[1]["regret"] == pytest.approx(1.0)
    text = markdown(rows, 1)
    assert text.count("| all |") == 2 and "| all | 2 | kl | plain | 6 | 0.00 |" in text, "plain KL is always shown"


@pytest.mark.slow
def test_the_door_studies_a_sweep(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Students are rebuilt as they were, and what was answered once is only read the second time."""
    base = {**tiny_settings, "runtime.output_dir": str(tmp_path / "runs"), "runtime.store_dir": str(tmp_path / "store")}
    for bits in (2, 3):
        for i, lr in enumerate((1e-3, 1e-2, 1e-1)):
            widths = {"quant.weight_bits": bits, "quant.act_bits": bits, "finetune.lr": lr}
            name = f"t{bits}{i}"
            record = run(with_overrides(RunConfig(), {**base, **widths}))
            write_record(tmp_path / "records" / f"{name}.json", replace(record, name=name))
    words = [str(tmp_path), "--best", "2", "--output-dir", str(tmp_path / "study")]
    assert main(words) == 0
    first = (tmp_path / "study" / "fidelity_study.csv").read_text()
    assert first.count("\n") == 1 + 3 * (len(VIEWS) + len(UNIONS)) * (len(MEASURES) + 1)
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "logits").iterdir()}
    assert len(cached) == 6
    assert main(words) == 0
    assert (tmp_path / "study" / "fidelity_study.csv").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in cached} == cached
    assert main([*words, "--bits", "W3A3"]) == 0
    assert "W2A2" not in (tmp_path / "study" / "fidelity_study.csv").read_text()
    capsys.readouterr()

    damaged = next((tmp_path / "records").glob("t20.json"))
    edit(damaged, lambda content: content["fidelity"].update(kl=1 + content["fidelity"]["kl"]))
    assert main(words) == USER_ERROR
    assert "must hold the students of its records, but t20 has KL" in capsys.readouterr().err


def test_user_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == USER_ERROR
    (tmp_path / "records").mkdir()
    write_record(tmp_path / "records" / "a.json", RunRecord(name="a", status="failed"))
    assert main([str(tmp_path)]) == USER_ERROR
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "must hold completed trials with labels" in lines[1]
