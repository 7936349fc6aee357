"""Errors that no reader and no command expected: the traceback in a log file, and one line that names it.

Standard library only.
"""

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synq.common.error_text import one_line

UNEXPECTED = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, AssertionError)
"""What reading a file of wrong content raises where no check has found it."""
LONGEST = 300
"""Characters of an error's text in a message."""


def write_log(error: BaseException) -> str:
    """Write the traceback of an error to a new file of the folder of temporary files; return its path for a message.

    Args:
        error: The error.

    Returns:
        The path, or "nowhere" if it cannot be written.
    """
    from synq import __version__

    about = f"{time.strftime('%Y-%m-%d %H:%M:%S')} synq {__version__} python {platform.python_version()}\n"
    text = "".join(traceback.format_exception(error))
    with suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="synq-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{about}{' '.join(sys.argv)}\n{text}")
        return path
    return "nowhere"


def fault_text(error: BaseException) -> str:
    """Return one line about an error that is a fault of this program, after writing its log."""
    return (
        f"SynQ failed in a way that it should not: {one_line(error)[:LONGEST]}; please report it with the traceback in "
        f"{write_log(error)}"
    )


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn an unexpected error of reading a file in the ``with`` block into one line that names the file.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        ValueError: "`PATH` must hold WHAT, but ...": with the missing key or the error, and the log of the traceback.
    """
    try:
        yield
    except UNEXPECTED as error:
        is_key = isinstance(error, KeyError) and error.args
        found = f"it has no {error.args[0]!r}" if is_key else f"reading it raised {one_line(error)[:LONGEST]}"
        raise ValueError(f"`{path}` must hold {what}, but {found}; the traceback is in {write_log(error)}") from error
