"""How long work is shown: a progress bar on a terminal, a line a minute in a log."""

import re
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

APPEARS_AFTER = 1.0
"""Seconds; what takes less shows nothing."""
LOGGED_EVERY = 60.0
"""Seconds between two lines of a log; what takes less leaves none."""
STEERING = re.compile(r"\x1b\[[A-Z]|[\r\n]")
"""What moves the cursor of a terminal."""
LINE = "synq: {desc}: {n:.0f} of {total}, {elapsed}, about {remaining} left{postfix}"


class _Log:
    """Standard error for a bar that is no bar: each of its states is a line."""

    def write(self, text: str) -> None:
        if line := STEERING.sub("", text).strip():
            # A log that is full, or that nobody reads any more, must not end the work.
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing: every line is flushed."""


def visible(is_shown: bool, **terminal: Any) -> dict[str, Any]:
    """Return the settings of a tqdm that make it a bar on a terminal, a line a minute elsewhere, and nothing unless `is_shown`.

    Args:
        is_shown: Whether this process shows progress at all.
        terminal: Further settings of the bar.
    """
    if not is_shown or sys.stderr is None:
        return {"disable": True}
    if getattr(sys.stderr, "isatty", lambda: False)():  # what replaces it need not be a file
        return terminal
    often = {"mininterval": LOGGED_EVERY, "maxinterval": 2 * LOGGED_EVERY, "delay": LOGGED_EVERY}
    return {"file": _Log(), "bar_format": LINE, "leave": False, **often}


def remark(bar: tqdm, text: str) -> None:
    """Put a remark behind a bar: at once on a terminal, with the next line in a log."""
    bar.set_postfix_str(text, refresh=not bar.disable and bar.mininterval < LOGGED_EVERY)


def passing_bar(total: int, title: str, unit: str, *, is_shown: bool) -> tqdm:
    """Return a bar of `total` units on standard error that comes late and goes at its end.

    Args:
        total: Units of the whole work.
        title: What is being done.
        unit: What is counted.
        is_shown: Whether it may be seen, see `visible`.
    """
    return tqdm(total=total, desc=title, unit=unit, **visible(is_shown, delay=APPEARS_AFTER, leave=False))
