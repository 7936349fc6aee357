"""Progress of long work: a progress bar on a terminal, one line per minute in a log."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

APPEARS_AFTER = 1.0
"""Seconds before a transient bar appears; shorter work shows no bar."""
LOGGED_EVERY = 60.0
"""Seconds between two lines of a log; shorter work logs no line."""
CURSOR_CODES = re.compile(r"\x1b\[[A-Z]|[\r\n]")
"""Control sequences that move the cursor of a terminal."""
LOG_FORMAT = "synq: {desc}: {n:.0f} of {total}, {elapsed}{left}{postfix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """State of a run, for the callbacks of a program."""

    stage: str
    """teacher, synthesis, quantize, measure or finetune."""
    done: int = 0
    """Number of finished epochs; 0 in other stages."""
    total: int = 0
    """Number of epochs; 0 in other stages."""
    terms: dict[str, float] = field(default_factory=dict)
    """Mean loss terms of the last epoch, and its seconds."""


class Bar(tqdm):
    """A progress bar that never exceeds its total, and has `{left}` in its format: ", about 01:20 left", or "".

    Fractions of units add up to slightly more than the total, for which tqdm prints a negative time ("-00:00").
    """

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return the values of the format."""
        values: dict[str, Any] = super().format_dict
        total = values["total"]
        if total is not None:
            values["n"] = min(values["n"], total)
        rate = values["rate"] or (values["n"] - values["initial"]) / (values["elapsed"] or 1.0)
        seconds = (total - values["n"]) / rate if total is not None and rate > 0 else 0.0
        return {**values, "left": f", about {self.format_interval(seconds)} left" if seconds >= 1 else ""}


class _LineWriter:
    """Stream that writes each state of a progress bar to standard error as a separate line."""

    def write(self, text: str) -> None:
        if line := CURSOR_CODES.sub("", text).strip():
            # A full disk or a closed pipe must not stop the run.
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: `write` flushes each line."""


def visible(is_shown: bool, **terminal: Any) -> dict[str, Any]:
    """Return the keyword arguments of `Bar` for a bar on a terminal and for log lines elsewhere.

    Args:
        is_shown: Whether this process shows progress at all; False disables the bar.
        terminal: Further keyword arguments, used on a terminal only.

    Returns:
        Keyword arguments of `Bar`. Without a terminal the bar prints one line every `LOGGED_EVERY` seconds.
    """
    if not is_shown or sys.stderr is None:
        return {"disable": True}
    if getattr(sys.stderr, "isatty", lambda: False)():  # a replaced stderr may lack the method
        return terminal
    often = {"mininterval": LOGGED_EVERY, "maxinterval": 2 * LOGGED_EVERY, "delay": LOGGED_EVERY}
    return {"file": _LineWriter(), "bar_format": LOG_FORMAT, "leave": False, **often}


def note(bar: Bar, text: str) -> None:
    """Set the note after a progress bar: shown immediately on a terminal, with the next line in a log."""
    bar.set_postfix_str(text, refresh=not bar.disable and bar.mininterval < LOGGED_EVERY)


def passing_bar(total: int, title: str, unit: str, *, is_shown: bool) -> Bar:
    """Return a progress bar that appears after `APPEARS_AFTER` seconds and is cleared when it closes.

    Args:
        total: Number of units of work.
        title: Description at the start of the bar.
        unit: Name of one unit.
        is_shown: Whether this process shows progress at all; see `visible`.
    """
    return Bar(total=total, desc=title, unit=unit, **visible(is_shown, delay=APPEARS_AFTER, leave=False))
