"""Progress of long work: a progress bar on a terminal, one line per minute in a log."""

import re
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

APPEARS_AFTER = 1.0
"""Seconds before a transient bar appears; shorter work shows no bar."""
LOGGED_EVERY = 60.0
"""Seconds between two lines of a log; shorter work logs no line."""
CURSOR_CODES = re.compile(r"\x1b\[[A-Z]|[\r\n]")
"""Control sequences that move the cursor of a terminal."""
LOG_FORMAT = "synq: {desc}: {n:.0f} of {total}, {elapsed}, about {remaining} left{postfix}"


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
    """Return the keyword arguments of `tqdm` for a bar on a terminal and for log lines elsewhere.

    Args:
        is_shown: Whether this process shows progress at all; False disables the bar.
        terminal: Further keyword arguments, used on a terminal only.

    Returns:
        Keyword arguments of `tqdm`. Without a terminal the bar prints one line every `LOGGED_EVERY` seconds.
    """
    if not is_shown or sys.stderr is None:
        return {"disable": True}
    if getattr(sys.stderr, "isatty", lambda: False)():  # a replaced stderr may lack the method
        return terminal
    often = {"mininterval": LOGGED_EVERY, "maxinterval": 2 * LOGGED_EVERY, "delay": LOGGED_EVERY}
    return {"file": _LineWriter(), "bar_format": LOG_FORMAT, "leave": False, **often}


def note(bar: tqdm, text: str) -> None:
    """Set the note after a progress bar: shown immediately on a terminal, with the next line in a log."""
    bar.set_postfix_str(text, refresh=not bar.disable and bar.mininterval < LOGGED_EVERY)


def passing_bar(total: int, title: str, unit: str, *, is_shown: bool) -> tqdm:
    """Return a progress bar that appears after `APPEARS_AFTER` seconds and is cleared when it closes.

    Args:
        total: Number of units of work.
        title: Description at the start of the bar.
        unit: Name of one unit.
        is_shown: Whether this process shows progress at all; see `visible`.
    """
    return tqdm(total=total, desc=title, unit=unit, **visible(is_shown, delay=APPEARS_AFTER, leave=False))
