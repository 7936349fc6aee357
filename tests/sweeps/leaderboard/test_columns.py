"""The one table of columns: binding names and order, headings, and what a searched setting contributes."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest

from support.records import record
from synq.config.run import FinetuneConfig, RunConfig
from synq.runs.record import DEPLOYED
from synq.sweeps.leaderboard.columns import (
    ABLATION_TABLE,
    BEST_TABLE,
    COMPARE_SHOWN,
    COMPARE_TABLE,
    FIDELITY_TABLE,
    RECIPE_TABLE,
    RUN_COLUMNS,
    SETTINGS,
    SWEEP_COLUMNS,
    TERMINAL_COLUMNS,
    TRIAL_COLUMNS,
    Column,
    In,
    headings,
    keys,
    page_texts,
    setting_cells,
)
from synq.sweeps.leaderboard.records import trial_rows
from synq.sweeps.leaderboard.settings import constants_text, read_settings

TABLES = {
    "runs": RUN_COLUMNS,
    "best": BEST_TABLE,
    "compare": COMPARE_TABLE,
    "recipe": RECIPE_TABLE,
    "ablation": ABLATION_TABLE,
    "fidelity study": FIDELITY_TABLE,
}


def test_the_columns_of_trials_csv_are_the_agreed_ones() -> None:
    assert ", ".join(TRIAL_COLUMNS) == (
        "trial, status, reason, model, weight_bits, act_bits, protocol, act_points, objective, "
        "objective_value, top1, top5, teacher_top1, "
        "rtn_top1, drop, num_eval, seed, data_seed, size_bytes, bitops, lowpass_cutoff, cam_weight, "
        "ce_weight, difficulty_threshold, lr, "
        "kept_share, set_digest, heldout_digest, config_digest, commit, versions, device, host, started, "
        "seconds, onnx_bytes, packed_bytes, "
        "latency_ms, float_latency_ms, latency_ratio, log, violates"
    )


@pytest.mark.parametrize("columns", TABLES.values(), ids=TABLES)
def test_every_column_occurs_once_and_is_explained(columns: Sequence[Column]) -> None:
    assert len(set(keys(columns))) == len(columns)
    for column in columns:
        assert len(column.meaning) > 5 and "\n" not in column.meaning, column.key
        assert column.page_heading.startswith(column.title or column.heading) and column.unit in column.page_heading


@pytest.mark.parametrize("table", In)
def test_no_two_columns_of_one_table_have_one_heading(table: In) -> None:
    shown = [column for column in RUN_COLUMNS if table in column.tables]
    assert shown and len({column.page_heading for column in shown}) == len(shown)
    if table in (In.TERMINAL, In.SWEEP):
        assert len({column.heading for column in shown}) == len(shown)


def test_what_is_printed_keeps_the_order_of_the_csv_file() -> None:
    order = keys(RUN_COLUMNS)
    for printed in (TERMINAL_COLUMNS, SWEEP_COLUMNS):
        assert list(printed) == sorted(printed, key=order.index)
    assert set(COMPARE_SHOWN) <= set(keys(COMPARE_TABLE)) and set(DEPLOYED) <= set(order)


def test_headings_name_the_unit_in_a_report_and_are_short_in_a_terminal() -> None:
    short, page = headings(RUN_COLUMNS), page_texts(RUN_COLUMNS)
    assert (short["top1_mean"], page["headings"]["top1_mean"]) == ("top-1", "top-1 [%]")
    assert (short["lowpass_cutoff"], page["headings"]["lowpass_cutoff"]) == ("cutoff", "low-pass cutoff [DFT bins]")
    assert (short["config_digest"], page["decimals"]["top1_mean"]) == ("config_digest", 2)
    assert "objective_value" not in page["decimals"] and page["meanings"].keys() == short.keys()


def test_a_searched_setting_is_a_field_of_the_finetuning_and_a_column_of_both_files() -> None:
    assert set(SETTINGS) < {field.name for field in fields(FinetuneConfig)}
    assert all((In.TRIALS | In.BOARD) in column.tables for column in SETTINGS.values())
    config = FinetuneConfig(lr=0.25, cam_weight=3.0)
    cells = setting_cells(config, (3, 32, 32))
    assert tuple(cells) == tuple(SETTINGS) and (cells["lr"], cells["cam_weight"]) == (0.25, 3.0)
    (row,) = trial_rows([record(overrides={"finetune.lr": 0.25, "finetune.cam_weight": 3.0})])
    assert (row["lr"], row["cam_weight"]) == (0.25, 3.0)


@pytest.mark.parametrize(
    ("changes", "size", "cell", "text"),
    [
        ({"lowpass_cutoff": 0.5, "lowpass_unit": "nyquist"}, (3, 32, 48), 8.0, "finetune.lowpass_cutoff 0.5 nyquist"),
        ({"lowpass_cutoff": 0.5, "lowpass_unit": "nyquist"}, None, None, "finetune.lowpass_cutoff 0.5 nyquist"),
        ({"lowpass_cutoff": 12.0, "lowpass_unit": "bins"}, None, 12.0, "finetune.lowpass_cutoff 12 bins"),
        ({"lowpass_cutoff": None}, (3, 32, 32), "None", "finetune.lowpass_cutoff None"),
    ],
)
def test_the_cutoff_is_in_bins_in_a_table_and_as_configured_in_text(
    changes: dict[str, Any], size: Any, cell: object, text: str
) -> None:
    config = FinetuneConfig(**changes)
    assert setting_cells(config, size)["lowpass_cutoff"] == cell
    assert f"{text.removeprefix('finetune.lowpass_')}, " in constants_text([read_settings(RunConfig(finetune=config))])
