"""Findings of a verification: what is wrong with which file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from synq.common.error_text import one_line
from synq.common.faults import LONGEST, write_log

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    path: str
    """The file or folder."""
    text: str
    """What is wrong with it."""

    def line(self) -> str:
        """Return the finding as one line."""
        return self.text if self.path in self.text else f"`{self.path}`: {self.text}"


@dataclass(slots=True)
class Findings:
    """What a verification has found so far."""

    found: list[Finding] = field(default_factory=list)
    """The findings, in the order of the checks."""
    num_checked: int = 0
    """Number of files that were read."""
    skipped: list[str] = field(default_factory=list)
    """What could not be checked, and why."""

    def add(self, path: str | Path, text: str) -> None:
        """Add a finding; the same one counts once."""
        finding = Finding(str(path), " ".join(text.split()))
        if finding not in self.found:
            self.found.append(finding)

    def check(self, path: str | Path, read: Callable[[], T]) -> T | None:
        """Return what `read` returns; None if it rejects the file, which is a finding.

        Args:
            path: The file or folder.
            read: Reads and checks it; raises ValueError or OSError if it is wrong.
        """
        self.num_checked += 1
        try:
            return read()
        except (ValueError, OSError) as error:
            self.add(path, str(error))
        except Exception as error:  # a reader that meets what it does not expect
            self.add(path, f"cannot be read: {one_line(error)[:LONGEST]}; the traceback is in {write_log(error)}")
        return None
