"""Summary of runs and sweeps for a terminal, as printed by `synq show`."""

import io
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from synq.common.text_tables import plain, to_text

from ..leaderboard.columns import TERMINAL_COLUMNS, headings, keys
from ..leaderboard.ranking import Standing
from ..leaderboard.settings import best_columns, constants_text, shown_columns
from ..leaderboard.views import protocol_of
from .summary import (
    best_rows,
    failed_runs,
    run_facts,
    run_label,
    run_verdict,
    sweep_facts,
    sweep_verdict,
)
from .sweep_view import is_run, read_sweep, record_of

MOST_ROWS = 10
"""Most rows of the leaderboard that are printed."""
MOST_FAILURES = 5
"""Most failures that are printed; the page and trials.csv have all."""


def show(paths: Sequence[str | Path]) -> None:
    """Print the results of runs and sweeps, finished or not: the best settings, metrics, failures.

    Args:
        paths: Folders of sweeps or runs, or record files.

    Raises:
        OSError, ValueError: A path is neither a run nor a sweep, or a file is damaged.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal lacks are printed as question marks
    # A pipe has no width; a truncated table would be useless.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    for path in map(Path, paths):
        (_show_run if is_run(path) else _show_sweep)(path, console)


def _show_run(path: Path, console: Console) -> None:
    if path.is_dir() and not (path / "record.json").exists():
        saved = path / "checkpoint.pt"
        when = f", last saved {datetime.fromtimestamp(saved.stat().st_mtime):%Y-%m-%d %H:%M}" if saved.exists() else ""
        console.print(plain(f"run {path.name}: not finished{when}; start its command again to resume it"))
        return
    record = record_of(path)
    console.rule(Text(plain(f"run {record.name}: {run_label(record)}")), align="left")
    for line in run_verdict(record):
        console.print(plain(line))
    _table(console, ("", ""), run_facts(record))
    if record.loss_history:
        terms = [name for name in record.loss_history[-1] if name not in ("epoch", "seconds")]
        epochs = [record.loss_history[0], record.loss_history[-1]]
        rows = [(name, *(_number(line.get(name)) for line in epochs)) for name in terms]
        _table(console, ("term", "first epoch", f"epoch {len(record.loss_history)}"), rows)
    console.print(f"more: synq report {path}")


def _show_sweep(path: Path, console: Console) -> None:
    sweep = read_sweep(path)
    standings = sweep.standings()
    console.rule(Text(plain(f"sweep {sweep.name}")), align="left")
    for line in sweep_verdict(sweep, standings):
        console.print(plain(line))
    _table(console, ("", ""), sweep_facts(sweep))
    columns = best_columns(sweep.settings)
    rows = [
        tuple(_number(row[column.key], column.decimals) for column in columns) for row in best_rows(sweep, standings)
    ]
    if rows:
        _table(console, [column.heading for column in columns], rows)
    if len(standings) > len(rows):
        _leaderboard(console, standings, sweep.settings)
    failures = [(record.status, name, record.reason, record.host, record.log) for name, record in failed_runs(sweep)]
    if failures:
        _table(console, ("status", "trial", "reason", "host", "log"), failures[:MOST_FAILURES])
    if len(failures) > MOST_FAILURES:
        console.print(f"and {len(failures) - MOST_FAILURES} more, in trials.csv")
    console.print(f"all settings: synq leaderboard {path} --print; figures: synq report {path}")


def _leaderboard(console: Console, standings: Sequence[Standing], searched: Sequence[str]) -> None:
    """Print the first rows of the leaderboard, with a column for each setting that varies between all its rows."""
    settings = [standing.settings for standing in standings]
    first = standings[:MOST_ROWS]
    columns = shown_columns(TERMINAL_COLUMNS, settings, violated=any(one.is_violating for one in first))
    rows = [
        {key: standing.cell(key) for key in keys(columns)} | {"protocol": protocol_of(standing.row)}
        for standing in first
    ]
    same = constants_text(settings, searched)
    count = f"the first {len(first)} of {len(standings)} rows of the leaderboard"
    console.print(plain(f"{count}; {same}" if same else count), soft_wrap=True)
    console.print(to_text(rows, keys(columns), headings(columns)).rstrip(), soft_wrap=True)


def _table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*headings, show_header=any(headings))
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # no markup and no control characters from names
    console.print(table)


def _number(value: Any, decimals: int | None = None) -> str:
    if isinstance(value, int | float) and decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
