"""Tables as a pure function of records: ranks, seeds, what never mixes, and cells that are safe to open."""

import csv
import io
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.records import record
from support.source_tree import ROOT
from synq.commands.leaderboard import main
from synq.runs.record import RunRecord, write_record
from synq.sweeps.driver.progress import Progress
from synq.sweeps.leaderboard.columns import LEADERBOARD_COLUMNS, TRIAL_COLUMNS
from synq.sweeps.leaderboard.records import cell, leaderboard_rows, load_records, to_csv, trial_rows, write_tables

COLUMNS = (
    "rank, model, weight_bits, act_bits, protocol, act_points, objective, objective_value, top1_mean, "
    "top1_std, num_seeds, num_failed, "
    "teacher_top1, rtn_top1, drop, num_eval, size_bytes, bitops, lowpass_cutoff, cam_weight, ce_weight, "
    "difficulty_threshold, lr, "
    "set_digest, config_digest, commit, versions, device, seconds, num_data_seeds, first_bits, "
    "last_bits, teacher_digest, "
    "best, pareto_size, pareto_bitops, fidelity_measure, onnx_bytes, packed_bytes, latency_ms, "
    "float_latency_ms, layer_bits, latency_ratio, violates"
)


def test_figures_of_exported_students_stand_in_both_tables() -> None:
    figures = {"onnx_bytes": 300, "packed_bytes": 100, "latency_ms": 2.0, "float_latency_ms": 4.0, "latency_ratio": 0.5}
    runs = [
        record(deployment=figures),
        record(seed=1),
        record(seed=2, deployment={**figures, "latency_ms": 3.0, "latency_ratio": 0.75, "packed_bytes": None}),
    ]
    (row,) = leaderboard_rows(runs)
    assert (row["onnx_bytes"], row["packed_bytes"], row["latency_ms"], row["float_latency_ms"]) == (300, 100, 2.5, 4.0)
    assert row["latency_ratio"] == 0.625
    assert {line["seed"]: line["latency_ms"] for line in trial_rows(runs)} == {0: 2.0, 1: None, 2: 3.0}


def test_columns_are_the_agreed_ones() -> None:
    assert ", ".join(LEADERBOARD_COLUMNS) == COLUMNS


def test_lower_kl_is_better_and_higher_selection_is_better() -> None:
    kl = [record(value, overrides={"finetune.lr": lr}) for value, lr in ((0.3, 1e-3), (0.1, 2e-3), (0.2, 3e-3))]
    assert [(row["rank"], row["lr"]) for row in leaderboard_rows(kl)] == [(1, 2e-3), (2, 3e-3), (3, 1e-3)]
    settings = {"evaluation.objective": "selection", "evaluation.dataset": "digits"}
    top = [record(value, overrides={**settings, "finetune.lr": lr}) for value, lr in ((70.0, 1e-3), (90.0, 2e-3))]
    assert [row["lr"] for row in leaderboard_rows(top)] == [2e-3, 1e-3]


def test_a_row_is_a_setting_over_its_seeds() -> None:
    runs = [
        record(0.10, seed=0, top1=90.0, drop=2.0, total_seconds=10.0, set_digest="s0"),
        record(0.20, seed=1, top1=92.0, drop=0.0, total_seconds=20.0, set_digest="s1"),
        record(0.30, seed=2, top1=94.0, drop=-2.0, total_seconds=30.0, set_digest="s2"),
        record(None, seed=3, status="failed", reason="x"),
    ]
    (row,) = leaderboard_rows(runs)
    assert row["objective_value"] == pytest.approx(0.2) and row["top1_mean"] == 92.0
    assert row["top1_std"] == pytest.approx(2.0)  # sample std of 90, 92, 94; the population's would be 1.633
    assert (row["num_seeds"], row["num_failed"], row["drop"], row["seconds"]) == (3, 1, 0.0, 20.0)
    assert (row["set_digest"], row["config_digest"]) == ("s0", runs[0].config_digest)


def test_one_seed_has_no_spread_and_no_labels_leave_cells_empty() -> None:
    (row,) = leaderboard_rows([record(top1=None, drop=None, teacher_top1=None, rtn_top1=None, num_eval=None)])
    line = dict(
        zip(LEADERBOARD_COLUMNS, next(csv.reader([to_csv([row], LEADERBOARD_COLUMNS).splitlines()[1]])), strict=True)
    )
    assert {line[key] for key in ("top1_mean", "top1_std", "drop", "teacher_top1", "rtn_top1", "num_eval")} == {""}


def test_more_seeds_come_before_one_lucky_run() -> None:
    lucky = record(0.01, overrides={"finetune.lr": 1e-3})
    solid = [record(0.1, seed=seed, overrides={"finetune.lr": 2e-3}) for seed in (0, 1)]
    assert [(row["rank"], row["lr"]) for row in leaderboard_rows([lucky, *solid])] == [(1, 2e-3), (2, 1e-3)]


@pytest.mark.parametrize(
    "other",
    [
        record(0.5, overrides={"quant.weight_bits": 3}),
        record(0.5, overrides={"quant.act_bits": 8}),
        record(0.5, overrides={"quant.first_bits": 8}),
        record(0.5, overrides={"quant.act_points": "inputs"}),
        record(50.0, overrides={"evaluation.objective": "selection", "evaluation.dataset": "digits"}),
        record(0.5, model="other"),
        record(0.5, heldout_digest="other"),
        record(0.5, teacher={"digest": "bb", "input_size": [3, 32, 32]}),
        record(0.5, seed=1, eval_digest="other images of the same file name"),
    ],
    ids=["weight_bits", "act_bits", "protocol", "act_points", "objective", "model", "heldout", "weights", "labels"],
)
def test_what_must_not_be_compared_has_ranks_of_its_own(other: RunRecord) -> None:
    rows = leaderboard_rows([record(0.1), other])
    assert [row["rank"] for row in rows] == [1, 1]


@pytest.mark.parametrize("objective", ["synthetic", "selection"])
def test_other_labeled_images_are_never_one_row(objective: str) -> None:
    settings = {"evaluation.objective": objective, "evaluation.dataset": "npz:here/test.npz"}
    rows = leaderboard_rows(
        [record(0.5, seed=seed, overrides=settings, eval_digest=f"e{seed}", top1=80.0 - 60.0 * seed) for seed in (0, 1)]
    )
    assert [(row["rank"], row["num_seeds"], row["top1_mean"]) for row in rows] == [(1, 1, 80.0), (1, 1, 20.0)]


def test_widths_of_first_and_last_layer_split_protocol_b() -> None:
    edges = [{"quant.first_bits": 8, "quant.last_bits": 8}, {"quant.first_bits": 6}, {"quant.last_bits": 8}]
    rows = leaderboard_rows([record(0.1 * i + 0.1, overrides=edge) for i, edge in enumerate(edges)])
    assert {(row["rank"], row["protocol"]) for row in rows} == {(1, "B")} and len(rows) == 3
    assert {(row["first_bits"], row["last_bits"]) for row in rows} == {(8, 8), (6, None), (None, 8)}


def test_a_row_says_how_many_data_seeds_and_which_weights_are_behind_it() -> None:
    teacher = {"digest": "0123456789abcdef" * 4, "input_size": [3, 32, 32]}
    runs = [record(0.1, seed=seed, data_seed=seed % 2, teacher=teacher) for seed in range(4)]
    (row,) = leaderboard_rows(runs)
    assert (row["num_seeds"], row["num_data_seeds"], row["teacher_digest"]) == (4, 2, "0123456789abcdef")
    (fixed,) = leaderboard_rows([record(0.1, seed=seed, data_seed=0) for seed in range(3)])
    assert (fixed["num_seeds"], fixed["num_data_seeds"]) == (3, 1)


def test_pruned_and_failed_runs_are_listed_with_reason_but_never_ranked() -> None:
    pruned = record(0.001, status="pruned", reason="stopped after epoch 2", overrides={"finetune.lr": 1e-3})
    failed = record(0.002, status="failed", reason="loss became nan", overrides={"finetune.lr": 2e-3})
    unmeasured = record(None, overrides={"finetune.lr": 3e-3})
    records = [record(0.1), pruned, failed, unmeasured]
    assert [row["objective_value"] for row in leaderboard_rows(records)] == [0.1]
    (row,) = leaderboard_rows([record(0.1), record(0.9, seed=5, status="pruned", reason="x")])
    assert (row["num_seeds"], row["num_failed"]) == (1, 0), "a pruned run is neither a result nor a failure"
    listed = {row["status"]: row["reason"] for row in trial_rows(records)}
    assert (
        listed["pruned"] == "stopped after epoch 2"
        and listed["failed"] == "loss became nan"
        and len(trial_rows(records)) == 4
    )


def test_the_same_run_from_two_sweeps_counts_once() -> None:
    (row,) = leaderboard_rows([record(0.1, host="a"), record(0.1, host="b"), record(0.3, seed=1)])
    assert row["num_seeds"] == 2 and row["objective_value"] == pytest.approx(0.2)


def test_the_cutoff_stands_in_dft_bins_whatever_its_unit() -> None:
    nyquist = record(overrides={"finetune.lowpass_cutoff": 0.5, "finetune.lowpass_unit": "nyquist"})
    assert (
        leaderboard_rows([nyquist])[0]["lowpass_cutoff"] == 8.0
    )  # half of 16 bins, the Nyquist frequency of 32 pixels
    bins = record(overrides={"finetune.lowpass_cutoff": 12.0, "finetune.lowpass_unit": "bins"})
    assert leaderboard_rows([bins])[0]["lowpass_cutoff"] == 12.0
    assert leaderboard_rows([record(overrides={"finetune.lowpass_cutoff": None})])[0]["lowpass_cutoff"] == "None"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (1e-05, "1e-05"),
        (-1.5, "-1.5"),
        (3.0, "3"),
        (0.1 + 0.2, "0.3"),
        ("=cmd()", "'=cmd()"),
        ("+1", "'+1"),
        ("-x", "'-x"),
        ("@sum", "'@sum"),
        ("\t=1", "'=1"),
        ("a\nb", "a b"),
        (True, "True"),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


def test_tables_are_the_same_bytes_in_any_order_and_rebuilt_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(0.1 * i + 0.05, seed=i % 2, overrides={"finetune.lr": 1e-3 * (1 + i // 2)}) for i in range(8)]
    records.append(record(None, status="failed", reason='=1+1, "quoted"', overrides={"finetune.lr": 0.5}))
    records = [replace(item, name=f"t{i}") for i, item in enumerate(records)]
    write_tables(records, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    assert set(first) == {"trials.csv", "leaderboard.csv"} and len(list(tmp_path.iterdir())) == 2
    for item in records:
        write_record(tmp_path / "records" / f"{item.name}.json", item)
    random.Random(0).shuffle(records)
    write_tables(records, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").glob("*.csv")} == first
    for name in first:
        (tmp_path / name).unlink()
    assert main([str(tmp_path)]) == 0 and "9 records" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == first
    rows = list(csv.DictReader(io.StringIO(first["trials.csv"].decode())))
    assert list(rows[0]) == [*TRIAL_COLUMNS, "params.finetune.lr"] and rows[-1]["reason"].startswith("'=1+1")
    assert len(load_records([tmp_path, tmp_path / "records" / "t0.json"])) == 10


def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text("{")
    for words in ([str(tmp_path / "absent")], [str(tmp_path)], [str(tmp_path), str(tmp_path)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("synq: error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))


def test_a_record_whose_configuration_does_not_read_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = record()
    for number, config in enumerate(({**good.config, "finetune": "x"}, {**good.config, "seed": "0"})):
        write_record(tmp_path / "records" / f"bad{number}.json", replace(good, status="pruned", config=config))
        assert main([str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("synq: error: ") and error.count("\n") == 1 and f"bad{number}.json" in error
        (tmp_path / "records" / f"bad{number}.json").unlink()
    assert not list(tmp_path.glob("*.csv"))


def test_the_live_table_is_drawn_while_trials_end() -> None:
    class Growing(dict[str, Any]):
        """Gets an entry from another thread whenever it is looked through."""

        def values(self) -> Any:
            for i, value in enumerate(super().values()):
                self[f"new{len(self)}-{i}"] = value
                yield value

        def items(self) -> Any:
            for i, item in enumerate(super().items()):
                self[f"new{len(self)}-{i}"] = item[1]
                yield item

    progress = Progress(9, live=False)
    progress.known({"a": record(), "b": record(seed=1)})
    progress.groups, progress.running = Growing(progress.groups), Growing(c="starting")
    assert progress._table().row_count == 2, "one group and one running trial"


@pytest.mark.parametrize("digest", ["0012345600000000", "12e4500000000000", "1234567890123456", "00000000000000e1"])
def test_l_11_digests_are_read_back_as_the_columns_page_shows(digest: str) -> None:
    pandas = pytest.importorskip("pandas")
    text = (ROOT / "docs" / "reference" / "columns.md").read_text("utf-8")
    dtype = dict.fromkeys(re.findall(r'"(\w+)": str', text[text.index("digests = {") :].split("}")[0]), str)
    columns = {*LEADERBOARD_COLUMNS, *TRIAL_COLUMNS}
    assert set(dtype) == {column for column in columns if re.search("digest|commit", column)}
    cells = dict.fromkeys(dtype, digest)
    run = record(config_digest=digest, set_digest=digest, heldout_digest=digest, commit=digest)
    runs = [replace(run, teacher={**run.teacher, "digest": digest})]
    for text in (to_csv(leaderboard_rows(runs), LEADERBOARD_COLUMNS), to_csv(trial_rows(runs), TRIAL_COLUMNS)):
        table = pandas.read_csv(io.StringIO(text), dtype=dtype)
        found = {column: table[column][0] for column in cells if column in table}
        assert len(found) >= 3 and set(found.values()) == {digest}
    assert len(table.groupby("lowpass_cutoff", dropna=False)) == 1
