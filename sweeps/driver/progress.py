"""Progress of a sweep: a live table on a terminal, one line per event in a log. Imports neither Ray nor torch."""

import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from synq.runs.record import FAILURES, RunRecord, summary_line

from ..constraints import Constraint, record_violations
from ..leaderboard.columns import SWEEP_COLUMNS
from ..leaderboard.ranking import Standing
from ..leaderboard.records import cell
from ..leaderboard.settings import constants_text, shown_columns

USUAL = ("completed", "pruned", "failed")
"""Statuses with a column in the live table; the others get one where they occur."""


@dataclass
class GroupState:
    """State of one group: ended trials, best trial."""

    counts: Counter[str] = field(default_factory=Counter)
    """Ended trials by status."""
    best: float = 0.0
    """Best objective so far."""
    best_trial: str = ""
    """Name of the trial with the best objective; "" if none has completed."""
    top1: float | None = None
    """Top-1 of the best trial in percent; None without labels."""


class Progress:
    """Show the progress of a sweep on standard output."""

    def __init__(
        self,
        total: int,
        *,
        live: bool | None = None,
        quiet: bool = False,
        on_trial: Callable[[RunRecord], None] | None = None,
        constraints: Sequence[Constraint] = (),
    ) -> None:
        """Create the display.

        Args:
            total: Number of trials of the whole sweep.
            live: Whether to show a live table; None does so on a terminal.
            quiet: Whether to print nothing.
            on_trial: Called with the record of each ended trial.
            constraints: Bounds that the best trial satisfies.
        """
        self.total, self.quiet, self.on_trial = total, quiet, on_trial
        self.constraints = constraints
        self.started = time.monotonic()
        self.done_before = 0
        self.num_ended = 0
        self.statuses: dict[str, str] = {}
        """Status of each ended trial; one that another driver runs again ends more than once, and counts once."""
        self.groups: dict[str, GroupState] = {}
        self.seconds: deque[float] = deque(maxlen=50)
        """Durations of the last completed trials."""
        self.slots = 1
        """Number of concurrent trials."""
        self.usage = ""
        """Used resources of the cluster, as text."""
        self.peak_bytes = 0
        self.work: list[tuple[float, float]] = []
        """Start and end of each trial on its worker, in seconds since 1970 by the worker's clock."""
        self.running: dict[str, str] = {}
        self.console = Console()
        watched = not quiet and (sys.stdout.isatty() if live is None else live)
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
        """Print a line; on a terminal, above the live table."""
        if self.quiet:
            return
        if self.live is not None:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def start_clock(self) -> None:
        """Start measuring the elapsed time."""
        self.started = time.monotonic()

    def known(self, records: dict[str, RunRecord]) -> None:
        """Count the records of an earlier start."""
        for trial, record in records.items():
            self._count(trial, record)

    def epoch(self, trial: str, epoch: int, epochs: int, value: float | None) -> None:
        """Show the epoch of a running trial."""
        self.running[trial] = f"epoch {epoch}/{epochs}" + (f", objective {value:.4g}" if value is not None else "")

    def ended(self, trial: str, record: RunRecord) -> None:
        """Count an ended trial and print its result."""
        self.running.pop(trial, None)
        group = self._count(trial, record)
        if record.status == "completed" and record.total_seconds:
            self.seconds.append(record.total_seconds)
        left = self._seconds_left()
        tail = f" | best {group.best:.4g} ({group.best_trial})" if group.best_trial else ""
        tail += f" | {self.usage}" if "GPU" in self.usage else ""
        tail += f" | about {left:.0f} s left" if left else ""
        value = f" | objective {record.objective_value:.4g}" if record.objective_value is not None else ""
        outcome = (
            summary_line(record).partition(" | ")[2]
            if record.status == "completed"
            else f"{record.status}: {record.reason}"
        )
        if violated := record_violations(self.constraints, record):
            outcome += f" | violates {violated}"
        self.log(f"[{self.num_ended}/{self.total}] {trial}{value} | {outcome}{tail}")
        if self.on_trial is not None:
            self.on_trial(record)

    def elsewhere(self, trial: str, record: RunRecord) -> None:
        """Count a trial that another driver ran and print its end."""
        self._count(trial, record)
        outcome = summary_line(record).partition(" | ")[2]
        self.log(f"[{self.num_ended}/{self.total}] {trial} | by another driver, on {record.host} | {outcome}")

    def worked(self, began: float | None, ended: float | None, gpu_bytes: int) -> None:
        """Record the start and end of a trial on its worker, and its peak GPU memory."""
        if began is not None and ended is not None:
            self.work.append((began, ended))
        self.peak_bytes = max(self.peak_bytes, gpu_bytes)

    def account(self) -> str:
        """Return the utilization from the first trial's start to the last one's end, in one line; "" for one trial."""
        if len(self.work) < 2:
            return ""
        span = max(ended for _, ended in self.work) - min(began for began, _ in self.work)
        busy = sum(ended - began for began, ended in self.work)
        slots = min(self.slots, len(self.work))
        gap = max(0.0, slots * span - busy) / len(self.work)
        memory = f", at most {self.peak_bytes / 2**30:.2f} GiB of GPU memory each" if self.peak_bytes else ""
        return (
            f"{len(self.work)} trials in {span:.1f} s, {slots} at a time: {100 * busy / (slots * span):.0f} % of the "
            f"time in their own work, {gap:.2f} s a trial around it{memory}"
        )

    def _count(self, trial: str, record: RunRecord) -> "GroupState":
        """Count an ended trial in its group."""
        name = f"{record.model} W{record.weight_bits}A{record.act_bits}"
        group = self.groups.setdefault(name, GroupState())
        if trial in self.statuses:
            group.counts[self.statuses[trial]] -= 1
        self.statuses[trial] = record.status
        self.num_ended = len(self.statuses)
        group.counts[record.status] += 1
        value = record.objective_value
        if record.status == "completed" and value is not None and not record_violations(self.constraints, record):
            better = value < group.best if record.objective == "synthetic" else value > group.best
            if better or not group.best_trial:
                group.best, group.best_trial, group.top1 = value, trial, record.top1
        return group

    def _seconds_left(self) -> float:
        """Return the seconds left, by the median duration of the last trials; 0 before the first has ended."""
        durations, left = list(self.seconds), max(0, self.total - self.num_ended)
        return statistics.median(durations) * left / min(self.slots, max(1, left)) if durations else 0.0

    def _table(self) -> Table:
        groups, running = dict(self.groups), dict(self.running)  # read in one thread, written in another
        elapsed, left = time.monotonic() - self.started, self._seconds_left()
        title = f"{self.num_ended}/{self.total} trials, {elapsed:.0f} s" + (
            f", about {left:.0f} s left" if left else ""
        )
        title += f", {self.usage}" if self.usage else ""
        title += f", GPU memory peak {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes else ""
        table = Table(title=title, title_justify="left")
        seen = {status for group in groups.values() for status in group.counts}
        ends = (*USUAL, *(status for status in FAILURES if status in seen and status not in USUAL))
        for heading in ("group", *ends, "best objective", "of", "top1"):
            table.add_column(heading)
        for name, group in groups.items():
            best = f"{group.best:.4g}" if group.best_trial else ""
            counts = [str(group.counts[status]) for status in ends]
            table.add_row(name, *counts, best, group.best_trial, "" if group.top1 is None else f"{group.top1:.2f}")
        for trial, state in running.items():
            table.add_row(trial, state)
        return table


def print_leaderboard(standings: Sequence[Standing], searched: Iterable[str] = (), *, live: bool | None = None) -> None:
    """Print a leaderboard: a formatted table on a terminal, aligned plain text in a log.

    Of the settings it has those that vary; the others are in a line above it.

    Args:
        standings: Its rows.
        searched: Dotted keys of the searched settings.
        live: Whether to format the table; None does so on a terminal.
    """
    watched = sys.stdout.isatty() if live is None else live
    settings = [standing.settings for standing in standings]
    columns = shown_columns(SWEEP_COLUMNS, settings, violated=any(one.is_violating for one in standings))
    texts = [[_short(standing.cell(column.key)) for column in columns] for standing in standings]
    heads = [column.heading for column in columns]
    if constants := constants_text(settings, searched):
        print(constants, flush=True)
    if watched:
        table = Table(*heads)
        for standing, cells in zip(standings, texts, strict=True):
            table.add_row(*cells, style="bold" if standing.row["best"] == 1 else None)
        Console().print(table)
        return
    sizes = [max(len(line[i]) for line in [heads, *texts]) for i in range(len(heads))]
    for line in [heads, *texts]:
        print("  ".join(text.rjust(size) for text, size in zip(line, sizes, strict=True)).rstrip(), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell(value)
