"""Pages of sweeps: they agree with the records, and HTML in names is escaped."""

import re
from html import unescape
from pathlib import Path

import pytest

from support.made_sweeps import damage, made_sweep
from synq.commands.report import main as report
from synq.runs.record import RunRecord, read_record, write_record
from synq.sweeps.reports.comparison_page import comparison_page
from synq.sweeps.reports.page import Figure, Gap, Page, Tab, Table, Text, render, write_page
from synq.sweeps.reports.published import references
from synq.sweeps.reports.study_figures import study_figures
from synq.sweeps.reports.sweep_figures import front, pareto, rank_agreement, timeline, trust
from synq.sweeps.reports.sweep_page import by_ranking, sweep_page
from synq.sweeps.reports.sweep_view import SweepView, read_sweep

HOSTILE = '<img src=x onerror=alert(1)> $x^2$ & "q" </script>'


@pytest.fixture(scope="module")
def sweep(folder: Path) -> SweepView:
    return read_sweep(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> SweepView:
    """Read a sweep of one group, whose figures take half the time."""
    return read_sweep(made_sweep(tmp_path_factory.mktemp("single"), bits=("W3A3",)))


@pytest.fixture(scope="module")
def page(single: SweepView) -> Page:
    return sweep_page(single, runs=0)


def _blocks(page: Page, kind: type) -> list:
    return [block for tab in page.tabs for block in tab.blocks if isinstance(block, kind)]


def _table(page: Page, name: str) -> Table:
    return next(block for block in _blocks(page, Table) if block.name == name)


def test_the_page_of_a_sweep_has_every_tab_and_figure(page: Page) -> None:
    assert [tab.title for tab in page.tabs] == ["Overview", "Leaderboard", "Search", "Trials"]
    names = {figure.name for figure in page.figures()}
    groups = ("group-w3a3",)
    kinds = ("history", "importance", "parallel", "slices", "slices-top1")
    assert names == {"headline", "trust", "pareto", "timeline"} | {
        f"{kind}-{group}" for kind in kinds for group in groups
    }
    for figure in page.figures():
        assert re.search(r"\b(n = \d+|\d+)\b", figure.caption), figure.name  # how many it shows
        assert figure.svg.lstrip().startswith(b"<?xml") and figure.png.startswith(b"\x89PNG")
    assert not _blocks(page, Gap)


def test_values_on_a_page_are_those_of_the_records(page: Page, single: SweepView) -> None:
    board = _table(page, "leaderboard")
    completed = [record for record in single.records.values() if record.status == "completed"]
    assert len(board.rows) == len(completed) == 21  # of 30: 3 failed, 6 were stopped
    best = min((r for r in completed if r.weight_bits == 3), key=lambda r: r.objective_value or 0)
    (first,) = [row for row, bold in zip(board.rows, board.bold, strict=True) if bold and row["weight_bits"] == 3]
    assert (first["objective_value"], first["top1_mean"]) == (best.objective_value, best.top1)
    assert f"top-1 {best.top1:.2f}" in " ".join(page.verdict)
    failures = _table(page, "failures")
    assert len(failures.rows) == 3 and all("for the sake of the test" in row["reason"] for row in failures.rows)


def test_rank_correlation_finds_the_known_dependence(sweep: SweepView) -> None:
    """In the generated records top-1 depends on the objective."""
    groups = by_ranking(sweep)
    assert [len(part) for part in groups.values()] == [21, 21]
    figure, notes = trust(groups, searched=True)
    assert isinstance(figure, Figure) and len(notes) == 2 and all("can be trusted" in note for note in notes)
    upside_down = [(-float(r.objective_value or 0), float(r.top1 or 0)) for r in groups["net W4A4 A relu"]]
    found = rank_agreement(upside_down, minimize=True)
    assert found is not None and found[0] < -0.8 and found[1] <= found[0] <= found[2]
    assert rank_agreement(upside_down[:4], minimize=True) is None
    assert rank_agreement([(1.0, 90.0)] * 9, minimize=True) is None


def test_the_timeline_counts_trials_without_a_start_time(sweep: SweepView) -> None:
    figure = timeline(sweep.records.values())
    assert isinstance(figure, Figure)
    assert "54 trials" in figure.caption and "6 trials without a start time" in figure.caption
    assert isinstance(timeline([RunRecord()]), Gap)


def test_html_and_formulas_in_names_are_shown_as_text(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path, trials=3, bits=("W4A4",), model=HOSTILE)
    for path in sorted((folder / "records").glob("*.json"))[:1]:
        record = read_record(path)
        values = {name: getattr(record, name) for name in RunRecord.__dataclass_fields__}
        write_record(path, RunRecord(**{**values, "status": "failed", "reason": f"=1+1 {HOSTILE}", "host": HOSTILE}))
    page = sweep_page(read_sweep(folder), runs=0)
    text = render(page)
    assert "<img src=x" not in text and text.count("</script>") == 1
    assert HOSTILE in unescape(text)
    # Matplotlib does not parse the formula either, which would be invalid.
    assert {figure.name for figure in page.figures()} == {"headline", "pareto", "timeline", "history-group-w4a4"}


@pytest.mark.slow
def test_the_same_sweep_gives_the_same_drawings(single: SweepView, page: Page) -> None:
    before = {figure.name: figure.svg for figure in page.figures()}
    (pair,) = pareto(single.standings())
    again = study_figures(
        "group-W3A3",
        single.dimensions,
        single.search_trials("group-W3A3"),
        minimize=True,
        objective="synthetic objective",
    )
    for figure in (pair, *again):
        assert isinstance(figure, Figure) and figure.svg == before[figure.name], figure


def test_missing_figures_have_a_reason(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "few", trials=2, bits=("W4A4",))
    reasons = {gap.title: gap.reason for gap in _blocks(sweep_page(read_sweep(folder), runs=0), Gap)}
    few = "too few to judge: 2 completed trials, and 9 are needed"
    assert reasons["Effect of the settings"] == reasons["Can the objective be trusted?"] == few
    for path in (folder / "records").glob("*.json"):
        record = read_record(path)
        values = {name: getattr(record, name) for name in RunRecord.__dataclass_fields__}
        blank = dict.fromkeys(("top1", "teacher_top1", "rtn_top1", "drop", "num_eval", "lost", "gained"))
        write_record(path, RunRecord(**{**values, **blank, "started": ""}))
    page = sweep_page(read_sweep(folder), runs=1)
    reasons = {gap.title: gap.reason for gap in _blocks(page, Gap)}
    assert "no completed trial was evaluated on labeled images" in reasons["Can the objective be trusted?"]
    assert "no record has a start time" in reasons["Timeline of the trials"]
    assert "record.json" in reasons["Images, predictions, activation maps and layers"]  # the made sweep has no runs
    assert "no labeled images" in " ".join(page.verdict)


def test_an_unfinished_sweep_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_sweep(tmp_path, trials=4)
    records = sorted((folder / "records").glob("*.json"))
    for path in records[:4]:
        path.unlink()
    damage(records[4])
    page = sweep_page(read_sweep(folder), runs=0)
    assert "5 trials are not finished" in " ".join(page.verdict)  # a record that cannot be read counts as missing
    assert f"Not read: `{records[4]}`" in " ".join(page.verdict)
    assert len(_table(page, "unfinished").rows) == 5 and _table(page, "unfinished").rows[0]["epochs"] == 3
    for path in records[5:]:
        path.unlink()
    records[4].unlink()
    assert report([str(folder), "--runs", "0"]) == 0
    assert "No trial is completed yet" in (folder / "report.html").read_text()
    assert not list(folder.glob("*.lock"))  # a page never takes the sweep


def test_the_page_and_its_drawings_are_files_of_their_own(page: Page, tmp_path: Path) -> None:
    written = write_page(page, tmp_path / "p" / "page.html")
    text = written[0].read_text()
    assert not re.search(r"""(src|href)=["']?(?!data:)[a-z/.]""", text)  # nothing to be fetched
    assert "http://" not in text and "https://" not in text
    names = {path.name for path in (tmp_path / "p" / "page_figures").iterdir()}
    assert {"trust.svg", "trust.png", "pareto.svg", "parallel-group-w3a3.png"} <= names
    assert names == {path.name for path in written[1:]}


@pytest.mark.slow
def test_two_sweeps_side_by_side(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = made_sweep(tmp_path / "other", trials=8, name="other", bits=("W3A3",))
    page = comparison_page([read_sweep(folder), read_sweep(other)])
    assert [tab.title for tab in page.tabs] == ["Side by side", "Protocol A", "made", "other"]
    rows = _table(page, "compare").rows
    assert [(row["weight_bits"], row["path"]) for row in rows] == [(4, "made"), (3, "made"), (3, "other")]
    assert rows[2]["objective_diff"].startswith("+")  # eight trials find less than thirty
    assert len({figure.name for figure in page.figures()}) == len(list(page.figures()))
    monkeypatch.chdir(tmp_path)
    assert report([str(folder), str(other)]) == 0 and (tmp_path / "comparison.html").exists()


def test_published_results_match_the_network(tmp_path: Path) -> None:
    (best, *others) = references("cifar10_resnet20", "W4A4", "A", 10)
    assert (best.method, best.top1, round(best.drop, 2)) == ("SynQ", 92.76, 1.13) and len(others) == 6
    assert references("CIFAR100-ResNet-20", "W3A3", "A", 100)[0].top1 == 57.28
    assert [one.method for one in references("resnet18", "W2A2", "B", 1000)] == ["Genie + SynQ", "Genie"]
    others = [("resnet18", "W2A2", 1000), ("svhn_resnet18", "W4A4", 10), ("wide_resnet50_2", "W4A4", 1000)]
    others += [("seresnet18", "W4A4", 1000), ("cifar10_resnet200", "W4A4", 10), ("mobilenetv2_050", "W4A4", 1000)]
    assert not any(references(name, bits, "A", classes) for name, bits, classes in others)
    folder = made_sweep(tmp_path, trials=2, model="cifar10_resnet20")
    page = comparison_page([read_sweep(folder)])
    assert {row["method"] for row in _table(page, "published-a").rows} >= {"SynQ", "GDFQ"}


def test_a_folder_of_runs_has_a_page_without_a_search(folder: Path, tmp_path: Path) -> None:
    for path in sorted((folder / "records").glob("*W3A3*.json"))[:3]:
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / "record.json").write_bytes(path.read_bytes())
    view = read_sweep(tmp_path)
    assert not view.is_sweep and len(view.records) == 3
    page = sweep_page(view, runs=0)
    assert "are not trials of a search" in next(gap.reason for gap in _blocks(page, Gap) if gap.title == "Search")


def test_the_pareto_front_has_only_best_rows_and_no_ties(sweep: SweepView) -> None:
    rows = [
        {"best": 1, "cost": 1, "top": 90.0},
        {"best": 1, "cost": 1, "top": 90.0},
        {"best": 1, "cost": 2, "top": 89.0},
    ]
    rows += [{"best": 0, "cost": 1, "top": 99.0}, {"best": 1, "cost": 3, "top": 91.0}]
    assert [row["top"] for row in front(rows, "cost", "top", higher=True)] == [90.0, 91.0]
    assert [row["top"] for row in front(rows, "cost", "top", higher=False)] == [90.0, 89.0]


def test_a_figure_that_cannot_be_drawn_is_a_gap(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path, trials=12, bits=("W4A4",))
    for i, path in enumerate(sorted((folder / "records").glob("*.json"))):
        record = read_record(path)
        values = {name: getattr(record, name) for name in RunRecord.__dataclass_fields__}
        write_record(path, RunRecord(**{**values, "objective_value": (i % 2) * 1e308}))
    page = sweep_page(read_sweep(folder), runs=0)
    assert "could not be drawn" in next(
        gap.reason for gap in _blocks(page, Gap) if gap.title == "Can the objective be trusted?"
    )


def test_names_of_tabs_and_tables_are_unique(tmp_path: Path) -> None:
    table = Table(name="t", title="T", caption="C", columns=("a",), rows=[{"a": 1}])
    page = Page(
        title="P",
        verdict=[],
        facts=[],
        foot="f",
        tabs=[Tab(title=title, blocks=[table]) for title in ("模型", "数据", "a b", "a-b")],
    )
    assert [tab.name for tab in page.tabs] == ["tab-part", "tab-part-2", "tab-a-b", "tab-a-b-2"]
    assert [block.name for block in _blocks(page, Table)] == ["t", "t-2", "t-3", "t-4"]


def test_a_folder_of_two_sweeps_keeps_the_trials_of_both(tmp_path: Path) -> None:
    for name in ("monday", "tuesday"):
        made_sweep(tmp_path / name, trials=4, bits=("W4A4",), model=f"net_{name}")
    view = read_sweep(tmp_path)
    assert len(view.records) == 8 and {record.model for record in view.records.values()} == {
        "net_monday",
        "net_tuesday",
    }
    assert len(view.tables.trial_rows()) == 8


def test_cells_have_rounded_text_and_exact_sort_keys(tmp_path: Path) -> None:
    rows = [
        {"a": 0.123456789, "b": None},
        {"a": float("nan"), "b": "x"},
        {"a": 12, "b": True},
        {"a": 12345.6, "b": "-1"},
    ]
    table = Table(name="t", title="T", caption="C", columns=("a", "b"), rows=rows, decimals={"a": 2})
    cells = [cells for *_, cells in table.cells()]
    assert cells[0] == [("0.12", "0.123456789"), ("", "")] and cells[1] == [("", ""), ("x", "")]
    assert cells[2] == [("12.00", "12"), ("True", "")] and cells[3][0] == ("12345.60", "12345.6")
    page = Page(title="P", verdict=[], facts=[], foot="f", tabs=[Tab(title="T", blocks=[table, Text(lines=["w"])])])
    (written,) = write_page(page, tmp_path / "page.html")
    assert 'data-number="0.123456789">0.12<' in written.read_text()


def test_settings_of_the_best_rows_are_readable(page: Page) -> None:
    table = _table(page, "best")
    assert {"lowpass_cutoff", "cam_weight", "lr"} < set(table.columns) and "setting" not in table.columns
    assert table.columns[-1] == "trial" and "lowpass_unit" not in table.columns, "the cutoff has one unit"
    for row in table.rows:
        assert all(isinstance(row[name], float) for name in ("cam_weight", "lr"))
        assert row["lowpass_cutoff"] == "None" or row["lowpass_cutoff"] > 0
        assert row["trial"].startswith(f"group-W{row['weight_bits']}A")
