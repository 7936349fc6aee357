"""The ablation: every combination of the ideas, one difference per row, shared seeds, paired gains."""

import csv
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from synq.commands.ablate import main
from synq.common.files import read_json
from synq.config.run import RunConfig, config_to_dict, with_overrides
from synq.finetune.loop import NonFiniteLossError
from synq.runs.record import RunRecord
from synq.sweeps.leaderboard.columns import ABLATION_TABLE, keys
from synq.sweeps.studies.ablation import DISTILLATION, IDEAS, ROWS, load_ablation, markdown, plan, table

BASE = with_overrides(RunConfig(), {"finetune.lowpass_cutoff": 8.0, "finetune.difficulty_threshold": 0.6})
PAPER = ("none", "filter", "CAM", "soft labels", "filter + CAM", "filter + soft labels", "CAM + soft labels", "all")


def test_rows_are_those_of_the_paper_and_distillation() -> None:
    assert tuple(ROWS) == (*PAPER, "distillation only")
    assert len({ROWS[row] for row in PAPER}) == 2 ** len(IDEAS), "every combination, each once"
    for row in PAPER[1:-1]:
        assert row == " + ".join(ROWS[row])


def test_each_row_has_the_ideas_that_its_name_says_and_nothing_else_differs() -> None:
    runs = plan(BASE, ["W4A4", "W3A3"], [0, 7])
    assert len(runs) == 2 * 2 * len(ROWS)
    base = config_to_dict(BASE)
    for row in ROWS:
        config = config_to_dict(runs["W3A3", row, 7])
        assert (config["seed"], config["data_seed"], config["quant"]["weight_bits"]) == (7, 7, 3)
        settings = config["finetune"]
        assert settings["lowpass_cutoff"] == (8.0 if "filter" in row or row == "all" else None)
        assert settings["cam_weight"] == (base["finetune"]["cam_weight"] if "CAM" in row or row == "all" else 0.0)
        assert settings["ce_weight"] == (0.0 if row == DISTILLATION else base["finetune"]["ce_weight"])
        if row != DISTILLATION:
            assert settings["difficulty_threshold"] == (0.6 if "soft labels" in row or row == "all" else 1.0)
        for key in ("lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold"):
            settings[key] = base["finetune"][key]
        assert {**config, "seed": 0, "data_seed": 0, "quant": base["quant"]} == base


@pytest.mark.parametrize(
    ("key", "value"),
    [("lowpass_cutoff", None), ("cam_weight", 0.0), ("difficulty_threshold", 1.0), ("ce_weight", 0.0), ("epochs", 0)],
)
def test_an_idea_that_is_off_already_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"finetune.{key}. must be on"):
        plan(with_overrides(BASE, {f"finetune.{key}": value}), ["W4A4"], [0])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ((["W4A4", "W4A4"], [0]), "`bits` must have no entry twice"),
        (([], [0]), "`bits` must have at least one entry"),
        ((["W4A4"], [1, 1]), "`seeds` must have no entry twice"),
        ((["W4A4"], []), "`seeds` must have at least one entry"),
        ((["W4A4"], [0], []), "`rows` must have at least one entry"),
        ((["W4A4"], [0], ["fliter"]), "but got 'fliter'; did you mean `filter`"),
    ],
)
def test_lists_that_mean_nothing_are_refused(lists: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(BASE, *lists)
    assert message in str(caught.value)


def record(top1: float, seed: int) -> RunRecord:
    return RunRecord(top1=top1, teacher_top1=90.0, rtn_top1=50.0, drop=90.0 - top1, seed=seed, fidelity={"kl": 0.5})


def test_gains_are_paired_by_seed() -> None:
    figures = {"none": (80.0, 70.0, 60.0), "filter + CAM": (81.0, 72.0, 63.0), DISTILLATION: (79.5, 69.5, 59.4)}
    records = {
        ("W4A4", row, seed): record(top1, seed) for row, tops in figures.items() for seed, top1 in enumerate(tops)
    }
    lines = {line["row"]: line for line in table(records)}
    both, none, alone = lines["filter + CAM"], lines["none"], lines[DISTILLATION]
    assert both["gain_over_none"] == pytest.approx(2.0) and both["gain_stderr"] == pytest.approx(3**-0.5)
    assert both["gain_t"] == pytest.approx(2 * 3**0.5) and both["gain_p"] == pytest.approx(0.0742, abs=1e-4)
    assert (both["significant"], alone["significant"], none["significant"]) == ("no", "yes", "")
    assert alone["gain_over_none"] == pytest.approx(-1.6 / 3)
    assert both["top1_mean"] == 72.0 and both["top1_std"] == pytest.approx(9.0)
    assert none["gain_over_none"] is None and none["gain_p"] is None and set(none) == set(keys(ABLATION_TABLE))
    assert [both[key] for key in ("filter", "cam", "soft_labels")] == ["x", "x", ""]
    shown = [line.split(" | ") for line in markdown(list(lines.values())).splitlines()[:5]]
    assert shown[0][1:6] == ["row", "filter", "CAM", "soft labels", "seeds"]
    filter_cam = dict(zip(shown[0], shown[3], strict=True))
    assert filter_cam["row"] == "filter + CAM" and (filter_cam["filter"], filter_cam["soft labels"]) == ("x", "")
    assert filter_cam["gain over none"] == "+2.00 ± 0.58" and filter_cam["top-1"] == "72.00 ± 9.00"
    assert (filter_cam["t"], filter_cam["p"], filter_cam["significant"]) == ("3.46", "0.074", "no")


def test_without_the_reference_there_is_no_gain() -> None:
    (line,) = table({("W4A4", "all", seed): record(80.0, seed) for seed in (0, 1)})
    assert line["gain_over_none"] is None and line["significant"] == "" and line["top1_mean"] == 80.0


ONE_THREAD = ("--runtime.device", "cpu", "--runtime.num_threads", "1")
SPEC = """
name = "mine"
bits = ["W3A3"]
seeds = [5]
rows = ["none", "soft labels"]
[base.synthesis]
num_images = 32
shard_size = 16
iterations = 2
start = "white"
[base.quant]
calib_images = 32
[base.finetune]
epochs = 1
batch_size = 16
lowpass_cutoff = 0.5
[base.evaluation]
heldout_images = 16
num_images = 64
"""


def test_the_door_runs_a_spec_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    words = [str(tmp_path / "spec.toml"), "--runtime.output_dir", str(tmp_path), *ONE_THREAD]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "| W3A3 | soft labels |  |  | x | 1 |" in out
    with (tmp_path / "mine" / "ablation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["none", "soft labels"] and tuple(lines[0]) == keys(ABLATION_TABLE)
    records = {path: read_json(path) for path in tmp_path.glob("mine-*/record.json")}
    by_threshold = {r["config"]["finetune"]["difficulty_threshold"]: r for r in records.values()}
    assert set(by_threshold) == {1.0, 0.5} and {r["seed"] for r in records.values()} == {5}
    for line, threshold in zip(lines, (1.0, 0.5), strict=True):
        assert float(line["top1_mean"]) == pytest.approx(by_threshold[threshold]["top1"])
    # The words of the command replace what the file says; what is finished is only read.
    assert main([*words[1:], "--spec", words[0], "--rows", "none", "soft labels", "--seeds", "5"]) == 0
    assert {path: read_json(path) for path in tmp_path.glob("mine-*/record.json")} == records


def test_the_form_with_settings_in_words_writes_into_a_folder_of_its_settings(
    tmp_path: Path, tiny_settings: dict[str, Any], as_args: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**tiny_settings, "runtime.output_dir": tmp_path, "finetune.lowpass_cutoff": 3.0}
    assert main(["--bits", "W3A3", "--seeds", "0", "--rows", "none", *as_args(settings), *ONE_THREAD]) == 0
    assert "| W3A3 | none |  |  |  | 1 |" in capsys.readouterr().out
    (table,) = tmp_path.glob("run-*/ablation.csv")
    assert table.read_text().count("\n") == 2
    assert not (tmp_path / "ablation.csv").exists(), "a second ablation would overwrite it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds = [5]", "seed = [5]"), "`seeds` must be given"),
        (
            ('rows = ["none"', 'row = ["none"'),
            "`row` must be a known key, but got an unknown one; did you mean `rows`?",
        ),
        (
            ("epochs = 1", "epoch = 1"),
            "`base.finetune.epoch` must be a known key, but got an unknown one; did you mean",
        ),
        (
            ("calib_images = 32", "weight_bits = 3"),
            "`base.quant.weight_bits` must be left out (it is set by the file's `bits`",
        ),
        (("[base.synthesis]", "[base]\nname = 'x'\n[base.synthesis]"), "`base.name` must be left out"),
        (("lowpass_cutoff = 0.5", 'lowpass_cutoff = "none"'), "`finetune.lowpass_cutoff` must be on"),
        (('bits = ["W3A3"]', 'bits = ["W3"]'), "`bits` must read W<2..8>A<2..8>"),
        (('"soft labels"]', '"soft label"]'), "but got 'soft label'; did you mean `soft labels`"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SPEC
    (tmp_path / "spec.toml").write_text(SPEC.replace(*change))
    with pytest.raises(ValueError) as caught:
        load_ablation(tmp_path / "spec.toml")
    assert message in str(caught.value) and "spec.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), "the same command resumes"),
        (NonFiniteLossError("the term kd became nan"), "kd became nan"),
    ],
)
def test_a_run_that_dies_is_one_line_and_code_1(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("synq.sweeps.studies.pool.run_all", fail)
    assert main(["--finetune.lowpass_cutoff", "3"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and words in line and line.count("\n") == 1


def test_tables_that_cannot_be_written_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "synq.sweeps.studies.pool.run_all", lambda runs, *_: {cell: record(80.0, cell[2]) for cell in runs}
    )
    args = ["--finetune.lowpass_cutoff", "3", "--runtime.output_dir", str(tmp_path)]
    assert main(args) == 0
    written = Path(capsys.readouterr().out.splitlines()[-1])
    written.unlink()
    written.mkdir()
    assert main(args) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and "ablation.csv" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--finetune.cam_weight", "0"], "finetune.cam_weight"),
        (["--bits", "W1A1"], "W1A1"),
        (["--rows", "nothing off"], "nothing off"),
        (["--seed", "3"], "`seed` must be left out (`seeds` sets it)"),
        (["--quant.weight_bits", "3"], "`quant.weight_bits` must be left out (`bits` sets it)"),
        (["absent.toml"], "absent.toml"),
        (["--config", "absent.toml"], "absent.toml"),
    ],
)
def test_user_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and message in line and line.count("\n") == 1
