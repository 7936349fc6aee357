"""What a sweep shows: a live table for a person, one plain line per event for a log. Knows neither Ray nor torch."""

import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from synq.runs.record import RunRecord, summary_line

from ..leaderboard.columns import RUN_COLUMNS, SWEEP_COLUMNS, In, headings
from ..leaderboard.records import Row, cell

ENDS = ("completed", "pruned", "failed")


@dataclass
class GroupState:
    """How one group stands."""

    counts: Counter[str] = field(default_factory=Counter)
    """Ended trials by status."""
    best: float = 0.0
    """Best objective so far, of the trial `whose`."""
    whose: str = ""
    top1: float | None = None
    """Its top-1."""


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
        self.num_ended = 0
        self.groups: dict[str, GroupState] = {}
        self.seconds: deque[float] = deque(maxlen=50)
        """What the last completed trials took."""
        self.slots = 1
        """Trials that run at one time."""
        self.usage = ""
        """What is busy, in words."""
        self.peak_bytes = 0
        self.work: list[tuple[float, float]] = []
        """Begin and end of each trial's own work, in seconds since 1970 by its machine's clock."""
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

    def log(self, text: str) -> None:
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
        for trial, record in records.items():
            self._count(trial, record)

    def epoch(self, trial: str, epoch: int, epochs: int, value: float | None) -> None:
        """Note where a running trial is."""
        self.running[trial] = f"epoch {epoch}/{epochs}" + (f", objective {value:.4g}" if value is not None else "")

    def ended(self, trial: str, record: RunRecord) -> None:
        """Note the end of a trial."""
        self.running.pop(trial, None)
        group = self._count(trial, record)
        if record.status == "completed" and record.total_seconds:
            self.seconds.append(record.total_seconds)
        left = self._seconds_left()
        tail = f" | best {group.best:.4g} ({group.whose})" if group.whose else ""
        tail += f" | {self.usage}" if "GPU" in self.usage else ""
        tail += f" | about {left:.0f} s left" if left else ""
        value = f" | objective {record.objective_value:.4g}" if record.objective_value is not None else ""
        how = (
            summary_line(record).partition(" | ")[2]
            if record.status == "completed"
            else f"{record.status}: {record.reason}"
        )
        self.log(f"[{self.num_ended}/{self.total}] {trial}{value} | {how}{tail}")

    def worked(self, began: float | None, ended: float | None, gpu_bytes: int) -> None:
        """Note when a trial's own work began and ended, and the most GPU memory it took."""
        if began is not None and ended is not None:
            self.work.append((began, ended))
        self.peak_bytes = max(self.peak_bytes, gpu_bytes)

    def account(self) -> str:
        """Return how well the time between the first trial's start and the last one's end was used, in one line; "" for one trial."""
        if len(self.work) < 2:
            return ""
        span = max(ended for _, ended in self.work) - min(began for began, _ in self.work)
        busy = sum(ended - began for began, ended in self.work)
        slots = min(self.slots, len(self.work))
        gap = max(0.0, slots * span - busy) / len(self.work)
        memory = f", at most {self.peak_bytes / 2**30:.2f} GiB of GPU memory each" if self.peak_bytes else ""
        return (
            f"{len(self.work)} trials in {span:.1f} s, {slots} at a time: {100 * busy / (slots * span):.0f} % of the time in their own "
            f"work, {gap:.2f} s a trial around it{memory}"
        )

    def _count(self, trial: str, record: RunRecord) -> "GroupState":
        """Count an ended trial in its group."""
        self.num_ended += 1
        name = f"{record.model} W{record.weight_bits}A{record.act_bits}"
        group = self.groups.setdefault(name, GroupState())
        group.counts[record.status] += 1
        value = record.objective_value
        if record.status == "completed" and value is not None:
            better = value < group.best if record.objective == "synthetic" else value > group.best
            if better or not group.whose:
                group.best, group.whose, group.top1 = value, trial, record.top1
        return group

    def _seconds_left(self) -> float:
        """Seconds to the end, by the median of what the last trials took; 0 before the first of them has ended."""
        took, left = list(self.seconds), max(0, self.total - self.num_ended)
        return statistics.median(took) * left / min(self.slots, max(1, left)) if took else 0.0

    def _table(self) -> Table:
        groups, running = dict(self.groups), dict(self.running)  # drawn in one thread, filled in another
        elapsed, left = time.monotonic() - self.started, self._seconds_left()
        title = f"{self.num_ended}/{self.total} trials, {elapsed:.0f} s" + (
            f", about {left:.0f} s left" if left else ""
        )
        title += f", {self.usage}" if self.usage else ""
        title += f", GPU memory peak {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes else ""
        table = Table(title=title, title_justify="left")
        for heading in ("group", *ENDS, "best objective", "of", "top1"):
            table.add_column(heading)
        for name, group in groups.items():
            best = f"{group.best:.4g}" if group.whose else ""
            counts = [str(group.counts[status]) for status in ENDS]
            table.add_row(name, *counts, best, group.whose, "" if group.top1 is None else f"{group.top1:.2f}")
        for trial, where in running.items():
            table.add_row(trial, where)
        return table


def print_leaderboard(rows: Sequence[Row], *, live: bool | None = None) -> None:
    """Print a leaderboard: a drawn table for a person, aligned plain text for a log."""
    watched = sys.stdout.isatty() if live is None else live
    texts = [[_short(row.get(column)) for column in SWEEP_COLUMNS] for row in rows]
    heads = [*headings(column for column in RUN_COLUMNS if In.SWEEP in column.tables).values()]
    if watched:
        table = Table(*heads)
        for row, cells in zip(rows, texts, strict=True):
            table.add_row(*cells, style="bold" if row.get("rank") == 1 else None)
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [heads, *texts]) for i in range(len(heads))]
    for line in [heads, *texts]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell(value)
