"""The figure and the table of accuracy against latency."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.records import folder_of, record
from synq.runs.record import RunRecord
from synq.sweeps.reports.latency_figures import COLUMNS, FLOAT, accuracy_over_latency
from synq.sweeps.reports.make import make_report, read_sweep
from synq.sweeps.reports.page import Block, Figure, Gap, Table
from synq.sweeps.reports.sweep_page import sweep_page
from synq.sweeps.reports.tool_points import ToolPoint, read_tools


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


POINT = {"model": "m", "target": "onnxruntime", "file": "quantize_static", "top1": 91.5, "times_float": 2.0}


def tools_file(folder: Path, *rows: object) -> Path:
    path = folder / "tools.json"
    path.write_text(json.dumps(list(rows)))
    return path


def test_files_of_other_tools_are_read_and_the_rest_left_out(tmp_path: Path) -> None:
    rest = [POINT | {"file": "float"}, POINT | {"file": "SynQ W8A8"}, {"file": "MCT", "top1": 90.0}]
    [point] = read_tools([tools_file(tmp_path, POINT, *rest)])
    assert point == ToolPoint(model="m", target="onnxruntime", name="quantize_static", top1=91.5, latency_ratio=0.5)
    assert point.fits("m", "onnxruntime portable") and not point.fits("m", "openvino") and not point.fits("n", "m")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([POINT | {"top1": 191.5}], "a top1 in \\[0, 100\\] and a times_float above 0, but .*191.5"),
        ([POINT | {"times_float": 0}], "times_float above 0"),
        ([POINT | {"times_float": True}], "times_float above 0"),
        ([{key: value for key, value in POINT.items() if key != "model"}], "objects with model, target and file"),
        ([7], "a list of objects"),
        ([], "at least one timed file of another tool, but .*tools.json has none"),
    ],
)
def test_another_file_is_rejected_in_one_line(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_tools([tools_file(tmp_path, *rows)])
    assert str(error.value).startswith("`tools` must name ") and "\n" not in str(error.value)


def test_tools_are_points_of_the_figure_and_rows_of_its_table(tmp_path: Path) -> None:
    records = [exported(n) for n in range(10)]
    standings = read_sweep(folder_of(tmp_path, records)).standings()
    point = read_tools([tools_file(tmp_path, POINT | {"model": records[0].model})])
    other = replace(point[0], target="openvino", name="NNCF")
    figure, table = accuracy_over_latency(standings, [*point, other])
    assert isinstance(figure, Figure) and "1 file of other tools" in figure.caption
    assert b"quantize_static" in figure.svg and b"NNCF" not in figure.svg
    assert isinstance(table, Table) and len(table.rows) == 12
    [row] = [row for row in table.rows if row["student"] == "quantize_static"]
    assert (row["latency_ratio"], row["top1_mean"], row["target"]) == (0.5, 91.5, "onnxruntime")
    with pytest.raises(ValueError, match=r"of the exported runs \(.* for onnxruntime\), but has .* for openvino$"):
        accuracy_over_latency(standings, [other])


def test_tools_come_with_one_sweep(tmp_path: Path) -> None:
    folder = Path(folder_of(tmp_path / "a", [exported(n) for n in range(2)]))
    path = tools_file(tmp_path, POINT)
    with pytest.raises(ValueError, match="`tools` must come with the folder of one sweep"):
        make_report([next(folder.glob("records/*.json"))], tools=[path])
    with pytest.raises(FileNotFoundError, match=r"`tools` must exist, but got nowhere\.json"):
        make_report([folder], tools=["nowhere.json"])
