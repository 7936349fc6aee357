"""Notices to the user on standard error, each at most once per process. Standard library only."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

_PRINTED: set[str] = set()
_MUTED: ContextVar[bool] = ContextVar("synq_muted", default=False)


@contextmanager
def muted(is_muted: bool = True) -> Iterator[None]:
    """Print no notice inside the ``with`` block, in this thread; later ones are printed again.

    Args:
        is_muted: False changes nothing.
    """
    token = _MUTED.set(_MUTED.get() or is_muted)
    try:
        yield
    finally:
        _MUTED.reset(token)


def print_notice(text: str) -> None:
    """Print "synq: TEXT" on standard error, unless this process has printed it before.

    Of the processes of a distributed run, only the main one prints. Nothing is printed inside `muted`.

    Args:
        text: The notice; line breaks become spaces.
    """
    line = " ".join(text.split())
    if _MUTED.get() or line in _PRINTED or int(os.environ.get("RANK", "0")) != 0:
        return
    _PRINTED.add(line)
    with suppress(OSError, ValueError):  # a closed pipe or a full disk must not stop a run
        print(f"synq: {line}", file=sys.stderr, flush=True)


def was_printed(text: str) -> bool:
    """Return whether this process has printed a notice."""
    return " ".join(text.split()) in _PRINTED


def forget_notices() -> None:
    """Let every notice be printed again."""
    _PRINTED.clear()
