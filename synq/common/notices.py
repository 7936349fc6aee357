"""Notices to the user on standard error, each at most once per process. Standard library only."""

import sys
from contextlib import suppress

_SAID: set[str] = set()


def say(text: str) -> None:
    """Print "synq: TEXT" on standard error, unless this process has printed it before."""
    if was_said(text):
        return
    _SAID.add(text)
    with suppress(OSError, ValueError):  # a closed pipe or a full disk must not stop a run
        print(f"synq: {text}", file=sys.stderr, flush=True)


def was_said(text: str) -> bool:
    """Return whether this process has printed a notice."""
    return text in _SAID


def forget_notices() -> None:
    """Let every notice be printed again."""
    _SAID.clear()
