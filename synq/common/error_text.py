"""Errors and lists of names as parts of a message of one line. Loads no torch."""

import re
from collections.abc import Sequence

NAMED = 3
"""Number of names that a message lists."""
_CONTROL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Colors of a terminal, which some libraries write into their errors."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without control codes of a terminal, or its type where it has none."""
    lines = _CONTROL_CODES.sub("", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return type and text of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def innermost(error: BaseException) -> BaseException:
    """Return the error that an error was raised from, or that one was raised from, to the first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def some_of(names: Sequence[object]) -> str:
    """Return the first `NAMED` names, separated by commas, with dots for the others."""
    return ", ".join(map(str, names[:NAMED])) + (", ..." if len(names) > NAMED else "")
