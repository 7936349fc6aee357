"""Notices to the user on standard error, each at most once per process. Standard library only."""

import sys
from contextlib import suppress

_PRINTED: set[str] = set()


def print_notice(text: str) -> None:
    """Print "synq: TEXT" on standard error, unless this process has printed it before."""
    if was_printed(text):
        return
    _PRINTED.add(text)
    with suppress(OSError, ValueError):  # a closed pipe or a full disk must not stop a run
        print(f"synq: {text}", file=sys.stderr, flush=True)


def was_printed(text: str) -> bool:
    """Return whether this process has printed a notice."""
    return text in _PRINTED


def forget_notices() -> None:
    """Let every notice be printed again."""
    _PRINTED.clear()
