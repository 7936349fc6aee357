#!/usr/bin/env python3
"""The essentials of runs and sweeps in a terminal: `synq/commands/show.py PATH...`."""

import io
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, check_paths, exit_code
from synq.common.text_tables import plain

if TYPE_CHECKING:
    from rich.console import Console

MOST_FAILURES = 5
"""Failures that are shown; the page and trials.csv have all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what came of a run or a sweep, finished or not: the best settings, figures, failures."""
    parser = Parser(prog="synq show", description=main.__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of a sweep or a run, or a record file")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _show(arguments.paths))


def _show(paths: Sequence[str]) -> None:
    check_paths(paths)
    from rich.console import Console

    from synq.sweeps.reports.sweep_view import is_run

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal without such letters gets question marks, not half of the text
    # A pipe has no width of its own: a table that is cut off would be of no use to who reads it there.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    for path in map(Path, paths):
        (_show_run if is_run(path) else _show_sweep)(path, console)


def _show_run(path: Path, console: "Console") -> None:
    from rich.text import Text

    from synq.sweeps.reports.summary import run_facts, run_label, run_verdict
    from synq.sweeps.reports.sweep_view import record_of

    if path.is_dir() and not (path / "record.json").exists():
        saved = path / "checkpoint.pt"
        when = f", last saved {datetime.fromtimestamp(saved.stat().st_mtime):%Y-%m-%d %H:%M}" if saved.exists() else ""
        console.print(plain(f"run {path.name}: not finished{when}; its command, started again, goes on"))
        return
    record = record_of(path)
    console.rule(Text(plain(f"run {record.name}: {run_label(record)}")), align="left")
    for line in run_verdict(record):
        console.print(plain(line))
    _table(console, ("", ""), run_facts(record))
    if record.loss_history:
        terms = [name for name in record.loss_history[-1] if name not in ("epoch", "seconds")]
        ends = [record.loss_history[0], record.loss_history[-1]]
        rows = [(name, *(_number(line.get(name)) for line in ends)) for name in terms]
        _table(console, ("term", "first epoch", f"epoch {len(record.loss_history)}"), rows)
    console.print(f"more: synq report {path}")


def _show_sweep(path: Path, console: "Console") -> None:
    from rich.text import Text

    from synq.sweeps.reports.summary import (
        BEST_COLUMNS,
        BOARD_HEADINGS,
        DECIMALS,
        best_rows,
        sweep_facts,
        sweep_verdict,
    )
    from synq.sweeps.reports.sweep_view import read_sweep

    sweep = read_sweep(path)
    standings = sweep.standings()
    console.rule(Text(plain(f"sweep {sweep.name}")), align="left")
    for line in sweep_verdict(sweep, standings):
        console.print(plain(line))
    _table(console, ("", ""), sweep_facts(sweep))
    rows = [
        tuple(_number(row[column], DECIMALS.get(column)) for column in BEST_COLUMNS)
        for row in best_rows(sweep, standings)
    ]
    if rows:
        _table(console, [BOARD_HEADINGS.get(column, column) for column in BEST_COLUMNS], rows)
    failures = [(name, record.reason) for name, record in sweep.records.items() if record.status == "failed"]
    if failures:
        _table(console, ("failed trial", "reason"), failures[:MOST_FAILURES])
    if len(failures) > MOST_FAILURES:
        console.print(f"and {len(failures) - MOST_FAILURES} more, in trials.csv")
    console.print(f"all settings: synq leaderboard {path} --print; pictures: synq report {path}")


def _table(console: "Console", heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, show_header=any(heads))
    for row in rows:
        table.add_row(
            *(Text(plain(cell)) for cell in row)
        )  # a name that reads as markup, or steers a terminal, is a name
    console.print(table)


def _number(value: Any, decimals: int | None = None) -> str:
    if isinstance(value, int | float) and decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


if __name__ == "__main__":
    sys.exit(main())
