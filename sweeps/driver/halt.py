"""Why a sweep must end before its trials do. Knows neither Ray nor torch."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Halt:
    """Why a sweep must end before its trials do; asked by Ray Tune after every result."""

    failed: str = ""
    """Too many trials failed: how many, and the last one's reason."""
    storage: str = ""
    """The disk or the store refused."""

    def guard(self, write: Callable[[], object]) -> None:
        """Write; an error of the disk or the store ends the sweep in order, rather than Ray Tune's loop with its traceback."""
        try:
            write()
        except OSError as error:
            self.storage = self.storage or f"`output_dir` must be writable, but got {error}"

    def __bool__(self) -> bool:
        return bool(self.failed or self.storage)
