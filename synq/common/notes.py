"""Notes to the user: one line on standard error about a choice that was made for him. Standard library only."""

import os
import sys
from contextlib import suppress

_PRINTED: set[str] = set()


def print_once(text: str) -> None:
    """Print a note on standard error, once per process and on the main process of a distributed run only.

    Args:
        text: The note; line breaks become spaces.
    """
    line = " ".join(text.split())
    if line in _PRINTED or int(os.environ.get("RANK", "0")) != 0:
        return
    _PRINTED.add(line)
    # A full disk or a closed pipe must not stop the run.
    with suppress(OSError, ValueError):
        print(f"synq: note: {line}", file=sys.stderr, flush=True)


def forget_notes() -> None:
    """Clear what was printed, so that it is printed again."""
    _PRINTED.clear()
