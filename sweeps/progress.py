"""What a sweep shows: a live table for a person, one plain line per event for a log. Knows neither Ray nor torch."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sweeps.leaderboard import Row, cell, leaderboard_rows
from synq.results import RunRecord, summary_line

SHOWN = ("rank", "model", "weight_bits", "act_bits", "act_points", "objective_value", "top1_mean", "top1_std", "num_seeds", "num_failed",
         "teacher_top1", "rtn_top1", "drop", "lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold", "lr", "seconds")  # fmt: skip
HEADINGS = {
    "weight_bits": "W", "act_bits": "A", "act_points": "points", "objective_value": "objective", "top1_mean": "top1", "top1_std": "std",
    "num_seeds": "n", "num_failed": "failed", "teacher_top1": "teacher", "rtn_top1": "RTN", "lowpass_cutoff": "cutoff",
    "cam_weight": "cam", "ce_weight": "ce", "difficulty_threshold": "tau", "seconds": "s",
}  # fmt: skip


class Progress:
    """Shows the course of a sweep on standard output."""

    def __init__(self, total: int, *, live: bool | None = None) -> None:
        """Start showing.

        Args:
            total: Trials that the sweep comes to, those already there included.
            live: Whether a person watches; None asks the terminal.
        """
        self.total = total
        self.started = time.monotonic()
        self.done_before = 0
        self.records: dict[str, RunRecord] = {}
        self.running: dict[str, str] = {}
        self.console = Console()
        watched = sys.stdout.isatty() if live is None else live
        self.live = Live(get_renderable=self._table, console=self.console, refresh_per_second=2) if watched else None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> "Progress":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self.live is not None:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def start_clock(self) -> None:
        """Begin to estimate the time left."""
        self.started = time.monotonic()

    def known(self, records: dict[str, RunRecord]) -> None:
        """Count records that were there before."""
        self.records.update(records)
        self.done_before = len(records)

    def epoch(self, trial: str, epoch: int, epochs: int, value: float | None) -> None:
        """Note where a running trial is."""
        self.running[trial] = f"epoch {epoch}/{epochs}" + (f", objective {value:.4g}" if value is not None else "")

    def ended(self, trial: str, record: RunRecord) -> None:
        """Note the end of a trial."""
        self.running.pop(trial, None)
        self.records[trial] = record
        left = self._seconds_left()
        tail = f" | about {left:.0f} s left" if left else ""
        value = f" | objective {record.objective_value:.4g}" if record.objective_value is not None else ""
        how = (
            summary_line(record).partition(" | ")[2]
            if record.status == "completed"
            else f"{record.status}: {record.reason}"
        )
        self.say(f"[{len(self.records)}/{self.total}] {trial}{value} | {how}{tail}")

    def _seconds_left(self) -> float:
        new = len(self.records) - self.done_before
        return (time.monotonic() - self.started) / new * max(0, self.total - len(self.records)) if new else 0.0

    def _table(self) -> Table:
        known, running = dict(self.records), dict(self.running)  # drawn in one thread, filled in another
        elapsed, left = time.monotonic() - self.started, self._seconds_left()
        title = f"{len(known)}/{self.total} trials, {elapsed:.0f} s" + (f", about {left:.0f} s left" if left else "")
        table = Table(title=title, title_justify="left")
        for heading in ("group", "completed", "pruned", "failed", "best objective", "top1"):
            table.add_column(heading)
        groups: dict[tuple[str, int, int], list[RunRecord]] = {}
        for record in known.values():
            groups.setdefault((record.model, record.weight_bits, record.act_bits), []).append(record)
        best = {
            (row["model"], row["weight_bits"], row["act_bits"]): row
            for row in reversed(leaderboard_rows(known.values()))
        }
        for (model, weight_bits, act_bits), records in groups.items():
            count = {
                status: str(sum(r.status == status for r in records)) for status in ("completed", "pruned", "failed")
            }
            row = best.get((model, weight_bits, act_bits), {})
            figures = (cell(row.get("objective_value"))[:8], cell(row.get("top1_mean"))[:5])
            table.add_row(f"{model} W{weight_bits}A{act_bits}", *count.values(), *figures)
        for trial, where in running.items():
            table.add_row(trial, where, "", "", "", "")
        return table


def print_leaderboard(rows: Sequence[Row], *, live: bool | None = None) -> None:
    """Print a leaderboard: a drawn table for a person, aligned plain text for a log."""
    watched = sys.stdout.isatty() if live is None else live
    texts = [[_short(row.get(column)) for column in SHOWN] for row in rows]
    headings = [HEADINGS.get(column, column) for column in SHOWN]
    if watched:
        table = Table(*headings)
        for row, cells in zip(rows, texts, strict=True):
            table.add_row(*cells, style="bold" if row.get("rank") == 1 else None)
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [headings, *texts]) for i in range(len(headings))]
    for line in [headings, *texts]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell(value)
