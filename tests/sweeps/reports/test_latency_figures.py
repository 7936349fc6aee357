"""The figure and the table of accuracy against latency."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from support.records import folder_of, record
from synq.runs.record import RunRecord
from synq.sweeps.reports.latency_figures import COLUMNS, FLOAT, accuracy_over_latency
from synq.sweeps.reports.make import read_sweep
from synq.sweeps.reports.page import Block, Figure, Gap, Table
from synq.sweeps.reports.sweep_page import sweep_page


def exported(number: int, **fields: Any) -> RunRecord:
    deployment = {"latency_ms": 2.0 + number / 10, "float_latency_ms": 8.0, "latency_ratio": (2.0 + number / 10) / 8.0}
    settings = {"quant.weight_bits": 2 + number % 7, "quant.act_bits": 8, "quant.target": "onnxruntime"}
    overrides = {**settings, "finetune.epochs": 1 + number}
    return record(overrides=overrides, top1=80.0 + number, deployment=deployment, **fields)


def blocks(folder: Path, records: list[RunRecord]) -> list[Block]:
    return accuracy_over_latency(read_sweep(folder_of(folder, records)).standings())


def test_few_exported_runs_are_a_table_and_not_judged(tmp_path: Path) -> None:
    gap, table = blocks(tmp_path, [exported(n) for n in range(3)] + [record(0.5)])
    assert isinstance(gap, Gap) and "too few to judge: 3 completed trials" in gap.reason
    assert isinstance(table, Table) and set(table.columns) <= {*COLUMNS}
    floats = [row for row in table.rows if row["student"] == FLOAT]
    [point] = floats
    assert (point["latency_ms"], point["latency_ratio"], point["top1_mean"]) == (8.0, 1.0, 92.0)
    students = {row["student"]: row for row in table.rows if row["student"] != FLOAT}
    assert len(students) == 3 and students["W3A8"]["latency_ms"] == 2.1 and students["W3A8"]["top1_mean"] == 81.0
    assert [table.bold[i] for i, row in enumerate(table.rows) if row["student"] == FLOAT] == [True]


def test_enough_exported_runs_are_a_figure(tmp_path: Path) -> None:
    figure, table = blocks(tmp_path, [exported(n) for n in range(10)])
    assert isinstance(figure, Figure) and "10 exported settings" in figure.caption
    assert isinstance(table, Table) and len(table.rows) == 11


def test_without_a_latency_there_is_nothing_and_without_labels_only_the_table(tmp_path: Path) -> None:
    assert blocks(tmp_path / "a", [record(0.5)]) == []
    unlabeled = [exported(n, teacher_top1=None, drop=None) for n in range(2)]
    found = blocks(tmp_path / "b", [replace(item, top1=None) for item in unlabeled])
    assert isinstance(found[0], Gap) and "labeled" in found[0].reason and isinstance(found[1], Table)


def test_the_page_of_a_sweep_has_it(tmp_path: Path) -> None:
    page = sweep_page(read_sweep(folder_of(tmp_path, [exported(n) for n in range(2)])), runs=0)
    overview = next(tab for tab in page.tabs if tab.title == "Overview")
    assert any(getattr(block, "name", "") == "latency" for block in overview.blocks)
