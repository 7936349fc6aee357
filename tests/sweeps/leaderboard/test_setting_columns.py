"""A setting that varies is a column of every table, whichever it is; one that does not is named above the table."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.records import bits, folder_of, record, table
from synq.commands.leaderboard import main
from synq.commands.show import main as show
from synq.config.run import RunConfig
from synq.runs.record import RunRecord
from synq.sweeps.driver.progress import print_leaderboard
from synq.sweeps.leaderboard.columns import COMPARE_COLUMNS, LEADERBOARD_COLUMNS, RUN_COLUMNS, SETTINGS, TRIAL_COLUMNS
from synq.sweeps.leaderboard.frames import leaderboard
from synq.sweeps.leaderboard.records import Tables, write_tables
from synq.sweeps.leaderboard.settings import (
    COLUMN_KEYS,
    constants_text,
    read_settings,
    setting_cell,
    setting_column,
    shown_columns,
    varying,
)
from synq.sweeps.reports.make import make_report
from synq.sweeps.reports.sweep_page import sweep_page
from synq.sweeps.reports.sweep_view import read_sweep

WEIGHT = "params.finetune.own_weight"
HEADING = "own weight"
SAME = "the same in all rows: cutoff 1 nyquist, CAM 20, CE 0.1, tau 0.5, lr 0.01"


def runs(**more: Any) -> list[RunRecord]:
    """Three settings of a user's own loss term; the larger weight is the better one."""
    term = {"finetune.own_term": "terms.py:own@1", **more}
    return [
        record(0.1 - 0.01 * number, overrides={**term, "finetune.own_weight": weight})
        for number, weight in enumerate((0.0, 0.1, 1.0))
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    path = folder_of(tmp_path / "mine", runs())
    write_tables(read_sweep(path).records.values(), path)
    return path


def test_both_files_end_with_the_settings_that_vary(sweep: str) -> None:
    for name, usual in (("trials.csv", TRIAL_COLUMNS), ("leaderboard.csv", LEADERBOARD_COLUMNS)):
        rows = table((Path(sweep) / name).read_text())
        assert tuple(rows[0]) == (*usual, WEIGHT), "one more column, the last; the usual ones stay"
        assert sorted(row[WEIGHT] for row in rows) == ["0", "0.1", "1"]
    frame = leaderboard(sweep)
    assert [float(row[WEIGHT]) for row in rows] == [1.0, 0.1, 0.0] == list(frame[WEIGHT])
    assert tuple(frame.columns) == tuple(rows[0]), "a DataFrame has the columns of the file"


def test_files_that_grow_get_the_column_when_it_first_varies(tmp_path: Path) -> None:
    tables = Tables()
    for number, item in enumerate(runs()):
        tables.add(item, f"t{number}")
        tables.write(tmp_path)
        head = (tmp_path / "trials.csv").read_text().splitlines()[0]
        assert (WEIGHT in head.split(",")) is (number > 0)
    tables.discard("t1")
    tables.discard("t2")
    assert list(tables.trial_rows()[0]) == list(TRIAL_COLUMNS)


def test_the_command_prints_what_varies_and_names_the_constants(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([sweep, "--print"]) == 0
    same, head, *lines = capsys.readouterr().out.splitlines()
    assert same == SAME and head.replace(HEADING, "x").split()[-2:] == ["x", "Pareto"]
    assert not {"cutoff", "CAM", "CE", "tau", "lr"} & set(head.split())
    assert [line.split()[-1] for line in lines] == ["1", "0.1", "0"]
    assert main([sweep, "--print", "--format", "csv"]) == 0
    assert capsys.readouterr().out == (Path(sweep) / "leaderboard.csv").read_text()


def test_a_sweep_at_its_end_prints_what_varies(capsys: pytest.CaptureFixture[str]) -> None:
    standings = Tables(runs()).standings()
    for live in (False, True):
        print_leaderboard(standings, ["finetune.own_weight", "quant.mse_norm"], live=live)
        same, *lines = capsys.readouterr().out.splitlines()
        assert same == f"{SAME}, MSE norm 2.4", "a searched setting with one value is named, too"
        assert live or (HEADING in lines[0] and "cutoff" not in lines[0])


def test_the_rows_of_show_and_of_the_page_are_told_apart_by_what_was_searched(
    sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show([sweep]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert HEADING in text and "CAM weight" not in text.split("rows of the leaderboard")[0], (
        "no value that was not searched"
    )
    assert f"the first 3 of 3 rows of the leaderboard; {SAME}" in text and HEADING in text
    page = sweep_page(read_sweep(sweep))
    tables = {block.name: block for tab in page.tabs for block in tab.blocks if hasattr(block, "columns")}
    assert [row[WEIGHT] for row in tables["best"].rows] == [1.0] and tables["best"].columns[-2:] == [WEIGHT, "trial"]
    assert tables["best"].headings[WEIGHT] == HEADING
    for name in ("leaderboard", "trials"):
        assert tables[name].headings[WEIGHT] == HEADING and not set(SETTINGS) & set(tables[name].columns)
        assert tables[name].meanings[WEIGHT] == "Weight of own_term, which must be given with it; 0 disables it."
        assert sorted(row[WEIGHT] for row in tables[name].rows) == [0.0, 0.1, 1.0]
    assert "The same in all rows: cutoff 1 nyquist" in tables["leaderboard"].caption
    html = make_report([sweep])[0].read_text()
    assert WEIGHT in html and HEADING in html


def test_a_comparison_has_what_differs_between_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder_of(tmp_path / name, runs()[:number]) for name, number in (("a", 1), ("b", 3))]
    assert main([*paths, "--compare", "--format", "csv"]) == 0
    lines = table(capsys.readouterr().out)
    assert tuple(lines[0]) == (*COMPARE_COLUMNS, WEIGHT) and [line[WEIGHT] for line in lines] == ["0", "1"]
    assert main([*paths, "--compare"]) == 0 and HEADING in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("finetune.own_weight>0.05", ["1", "0.1"]),
        ("params.finetune.own-weight=0.1", ["0.1"]),
        ("finetune.own_term=terms.py:own@1", ["1", "0.1", "0"]),
        ("finetune.train_bn=true", ["1", "0.1", "0"]),
        ("finetune.ema_decay=None", ["1", "0.1", "0"]),
        ("evaluation.heldout_images>=256", ["1", "0.1", "0"]),
        ("runtime.device!=cuda", ["1", "0.1", "0"]),
    ],
)
def test_any_setting_is_a_condition(
    sweep: str, capsys: pytest.CaptureFixture[str], where: str, left: list[str]
) -> None:
    assert main([sweep, "--where", where, "--format", "csv"]) == 0
    assert [row[WEIGHT] for row in table(capsys.readouterr().out)] == left


def test_any_setting_is_a_column_and_an_order(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--columns", "rank,finetune.momentum,params.finetune.own_weight", "--format", "csv"]
    assert main([sweep, *chosen, "--sort", "finetune.own_weight"]) == 0
    head, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert head == ["rank", "params.finetune.momentum", WEIGHT]
    assert rows == [["3", "0.9", "0"], ["2", "0.9", "0.1"], ["1", "0.9", "1"]]
    assert main([sweep, *chosen, "--sort", "-rank"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["3", "2", "1"]
    assert main([sweep, "--columns", "rank,finetune.momentum", "--print"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["rank", "momentum"]


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--where", "finetune.own_wait=1", "did you mean `finetune.own_weight`?"),
        ("--where", "momentum=0.9", "did you mean `finetune.momentum`?"),
        ("--where", "finetune.momentum=much", "must compare params.finetune.momentum with a number"),
        ("--where", "finetune.optimizer>sgd", "must compare the texts of params.finetune.optimizer by = or !="),
        ("--sort", "zzz", "`sort` must name columns of leaderboard.csv or settings, but got 'zzz'"),
        ("--columns", "seed", "`columns` must name columns of leaderboard.csv or settings, but got 'seed'"),
    ],
)
def test_what_is_no_setting_is_rejected_in_one_line(
    sweep: str, capsys: pytest.CaptureFixture[str], option: str, value: str, part: str
) -> None:
    assert main([sweep, "--print", option, value]) == 2
    out, err = capsys.readouterr()
    assert part in err and err.count("\n") == 1 and out == ""


def test_empty_cells_come_last_in_either_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {0.1: 5, 0.2: None, 0.3: 7}
    items = [
        record(value, overrides={"finetune.lr": value}, size_bytes=size) for value, size in sizes.items()
    ]  # fmt: skip
    path = folder_of(tmp_path / "a", items)
    for order, sizes_in_order in (("size_bytes", ["5", "7", ""]), ("-size_bytes", ["7", "5", ""])):
        assert main([path, "--sort", order, "--columns", "size_bytes,rank", "--format", "csv"]) == 0
        assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == sizes_in_order


def test_a_setting_that_a_record_lacks_is_unknown_and_does_not_vary() -> None:
    item = record(0.1)
    early = replace(item, name="early", status="failed", objective_value=None, config={**item.config, "finetune": {}})
    tables = Tables([item, early])
    assert tables.varying() == []
    other = record(0.2, overrides={"finetune.momentum": 0.5})
    rows = {row["trial"]: row for row in Tables([item, early, other]).trial_rows()}
    assert rows["early"]["params.finetune.momentum"] == "" and rows[item.name]["params.finetune.momentum"] == 0.9


def test_bits_and_points_have_their_columns_and_get_no_second_one() -> None:
    items = [record(0.1, overrides=bits(width)) for width in (3, 4)]
    items.append(record(0.2, overrides=bits(4, quant__act_points="inputs", quant__first_bits=8)))
    assert Tables(items).varying() == []


def test_a_cutoff_of_one_fraction_is_no_column_and_one_of_two_units_is() -> None:
    config = RunConfig()
    settings = [read_settings(config), read_settings(config)]
    assert "lowpass_cutoff" not in [column.key for column in shown_columns(LEADERBOARD_COLUMNS, settings)]
    bins = record(0.1, overrides={"finetune.lowpass_unit": "bins"})
    standings = Tables([record(0.2), bins]).standings()
    mixed = [standing.settings for standing in standings]
    keys = [column.key for column in shown_columns(LEADERBOARD_COLUMNS, mixed)]
    assert {"lowpass_cutoff", "params.finetune.lowpass_unit"} <= set(keys) and "cutoff" not in constants_text(mixed)
    assert varying([]) == [] and constants_text([]) == ""


def test_cells_of_settings_are_numbers_or_texts() -> None:
    cells = [setting_cell(value) for value in (None, True, 0.5, "sgd", (3, 32), {"conv1": 8})]
    assert cells == ["None", "True", 0.5, "sgd", "3 32", "conv1=8"]


def test_every_setting_has_a_heading_of_its_own_in_words() -> None:
    usual = {column.heading for column in RUN_COLUMNS if column.key not in SETTINGS}
    headings = [setting_column(key).heading for key in COLUMN_KEYS]
    assert len(set(headings)) == len(headings) and not usual & set(headings)
    assert not [heading for heading in headings if "_" in heading or "." in heading]
    assert len(setting_column("finetune.momentum").meaning) > 10
