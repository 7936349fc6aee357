"""Rows as Markdown, CSV and aligned text: no cell breaks the table."""

from support.records import markdown_cells, record, table
from synq.common.text_tables import to_csv, to_markdown, to_text
from synq.sweeps.leaderboard.columns import LEADERBOARD_COLUMNS
from synq.sweeps.leaderboard.records import leaderboard_rows

NASTY = '=1|2 <b>`x`</b>\r\n"q", \\| [a](b) \x1b[2J'


def test_a_cell_cannot_break_a_table_of_markdown_csv_or_text() -> None:
    rows = leaderboard_rows([record(0.1, model=NASTY, device="\u2028`", top1=None)])
    shown = '=1|2 <b>`x`</b> "q", \\| [a](b) ?[2J'
    head, rule, line = to_markdown(rows, LEADERBOARD_COLUMNS).split("\n")[:-1]
    cells = dict(zip(markdown_cells(head), markdown_cells(line), strict=True))
    assert set(rule) <= set("| -") and tuple(cells) == LEADERBOARD_COLUMNS
    assert cells["model"].replace("&lt;", "<").replace("&gt;", ">") == shown and "<" not in line
    assert (cells["device"], cells["top1_mean"], cells["rank"]) == ("`", "", "1")
    (row,) = table(to_csv(rows, LEADERBOARD_COLUMNS))
    assert row["model"] == f"'{shown}" and row["device"] == "`"
    text = to_text(rows, ("rank", "model"))
    assert text.splitlines()[1].split(maxsplit=1) == ["1", shown] and text.isprintable() is False
    assert text.replace("\n", "").isprintable() and text.count("\n") == 2


def test_aligned_columns() -> None:
    rows = [{"a": 1, "b": 0.123456}, {"a": 1000000.0, "b": "name"}, {"a": None, "b": -2.5}]
    assert to_text(rows, ("a", "b"), {"b": "value"}) == (
        "      a   value\n"
        "      1  0.1235\n"
        "1000000    name\n"
        "           -2.5\n"
    )  # fmt: skip
