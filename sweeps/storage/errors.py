"""Errors of object stores: which are transient, and their conversion to a one-line OSError."""

import errno
import re

TRANSIENT = re.compile(
    r"time.?out|timed out|slow.?down|unavailable|throttl|too many requests|try again|internal.?(failure|error)|network"
    r"|connect|changed while|\b(429|500|502|503|504)\b",
    re.IGNORECASE,
)
"""Messages of transient errors."""
DENIED = re.compile(r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|[Cc]redential|[Aa]uthenticat|[Ff]orbidden|\b40[13]\b")
"""Messages of rejected credentials; a retry cannot help."""


def is_transient(error: Exception) -> bool:
    """Return whether an error of a store may vanish on a retry: timeouts, throttling, lost connections."""
    if isinstance(error, OSError) and error.errno:
        lost = (errno.ESTALE, errno.EHOSTUNREACH, errno.ENETUNREACH)
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in lost
    text = f"{type(error).__name__} {error}"
    return TRANSIENT.search(text) is not None and not DENIED.search(text)


def as_os_error(error: Exception, *ends: str) -> OSError:
    """Return an error of any back end as an OSError with a one-line message.

    Args:
        error: The error; its errno is kept, EIO where it has none.
        ends: The address, or the source and the target of a transfer.
    """
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OSError(number, one_line(text) or type(error).__name__, ends[0], None, *ends[1:])


def one_line(text: object) -> str:
    """Return a text on one line, at most 400 characters."""
    return " ".join(str(text).split())[:400]
