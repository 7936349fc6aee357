"""The log of a trial: what it printed, its warnings, starts and ends, in logs/TRIAL.log of the sweep's folder.

A restarted trial appends to its log. The file is bounded: once it is longer than `MAX_BYTES`, its middle is left out.
Imports neither Ray nor torch.
"""

import faulthandler
import io
import logging
import os
import platform
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO
from warnings import catch_warnings

FOLDER = "logs"
MAX_BYTES = 2**20
"""Maximum size of a log in bytes."""
_START = re.compile(rb"^=== \S+ host (\S+), process \d+: starts$", re.MULTILINE)


def log_name(trial: str, rank: int = 0) -> str:
    """Return the name of a trial's log in the sweep's folder.

    Args:
        trial: Name of the trial.
        rank: Rank of the process among the trial's workers; each writes a log.
    """
    return f"{FOLDER}/{trial}.log" if rank == 0 else f"{FOLDER}/{trial}.rank{rank}.log"


class TrialLog:
    """A bounded text file that is only appended to. An error of the disk is ignored: a log must not stop a run."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        """Open a log, which need not exist.

        Args:
            path: The file.
            max_bytes: Maximum size in bytes.
        """
        self.path, self.max_bytes = path, max_bytes
        self._file: io.FileIO | None = None
        self._size = 0
        self._lock = threading.Lock()
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)  # not its parents: a folder that has gone stays gone
            self._open()

    def __enter__(self) -> "TrialLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()

    def fileno(self) -> int | None:
        """Return the descriptor of the file; None if it is not open."""
        return None if self._file is None else self._file.fileno()

    def write(self, text: str) -> None:
        """Append text; control characters other than tabs and line breaks become question marks."""
        plain = "".join(one if one.isprintable() or one in "\n\t" else "?" for one in text)
        with self._lock, suppress(OSError, ValueError):
            if self._file is None:
                return
            content = plain.encode("utf-8", "replace")
            self._file.write(content[-self.max_bytes :])
            self._size += len(content)
            if self._size > self.max_bytes:
                self._shorten()

    def event(self, text: str) -> None:
        """Append a line with the time, this machine and this process: "=== TIME host H, process P: TEXT"."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.write(f"=== {now} host {platform.node() or 'unknown'}, process {os.getpid()}: {' '.join(text.split())}\n")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _shorten(self) -> None:
        """Keep the first eighth and the last half of the file, so that it is not shortened again at once."""
        content = self.path.read_bytes()
        head = content[: self.max_bytes // 8].rpartition(b"\n")[0]
        tail = content[len(content) - self.max_bytes // 2 :].partition(b"\n")[2]
        gap = f"\n=== {len(content) - len(head) - len(tail)} bytes left out\n".encode()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_bytes(head + gap + tail)
        os.replace(temporary, self.path)
        if self._file is not None:
            self._file.close()
        self._open()


class _Tee(io.TextIOBase):
    """A text stream that also goes, line by line, into a log; of a line that is drawn again, its last form."""

    def __init__(self, stream: TextIO, log: TrialLog) -> None:
        self._stream, self._log, self._line = stream, log, ""

    @property
    def buffer(self) -> Any:
        """The bytes of the original stream; what is written to them is not logged."""
        return self._stream.buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the original stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write to both."""
        *lines, rest = (self._line + text).split("\n")
        self._line = rest.rpartition("\r")[2] if len(rest) > MAX_BYTES // 8 else rest
        if lines:
            self._log.write("".join(f"{_drawn(line)}\n" for line in lines))
        with suppress(OSError, ValueError):  # a closed pipe
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the original stream."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the original stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the original stream."""
        return self._stream.fileno()

    def finish(self) -> None:
        """Write the last line, which has no line break, to the log."""
        if self._line:
            self._log.write(f"{_drawn(self._line)}\n")
        self._line = ""


def _drawn(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


@contextmanager
def logged(path: Path) -> Iterator[TrialLog]:
    """Append what this process prints in the ``with`` block to a log, and the traceback of an error that leaves it.

    Standard output and standard error are printed as before, too. Warnings are printed anew: by default Python prints
    each once per process, and a process runs many trials. A crash of native code leaves its traceback.

    Args:
        path: The log.
    """
    log = TrialLog(path)
    out, err = sys.stdout, sys.stderr
    tees = {id(stream): _Tee(stream, log) for stream in (out, err) if stream is not None}
    handlers = _handlers_of(out, err)
    had_faults = faulthandler.is_enabled()
    log.event("starts")
    try:
        with catch_warnings():
            for handler, stream in handlers:
                handler.setStream(tees[id(stream)])
            sys.stdout, sys.stderr = tees.get(id(out), out), tees.get(id(err), err)
            if (number := log.fileno()) is not None:
                faulthandler.enable(number)
            try:
                yield log
            except Exception:
                for tee in tees.values():
                    tee.finish()
                log.write(traceback.format_exc())
                raise
    finally:
        faulthandler.disable()
        if had_faults and sys.__stderr__ is not None:
            with suppress(OSError, ValueError, RuntimeError):
                faulthandler.enable(sys.__stderr__)
        for tee in tees.values():
            tee.finish()
        if sys.stdout in tees.values():  # else the next trial, in another thread, has replaced it already
            sys.stdout = out
        if sys.stderr in tees.values():
            sys.stderr = err
        for handler, stream in handlers:
            handler.setStream(stream)
        log.close()


def last_host(path: Path) -> str:
    """Return the machine on which a trial last started, from its log; "" if unknown."""
    try:
        starts = _START.findall(path.read_bytes())
    except OSError:
        return ""
    return starts[-1].decode("utf-8", "replace") if starts else ""


def _handlers_of(*streams: Any) -> list[tuple["logging.StreamHandler[Any]", Any]]:
    """Return the handlers of Python's loggers that print on a stream, with the stream."""
    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    handlers = {id(one): one for logger in loggers for one in getattr(logger, "handlers", ())}
    return [
        (one, one.stream)
        for one in handlers.values()
        if isinstance(one, logging.StreamHandler) and any(one.stream is stream for stream in streams)
    ]
