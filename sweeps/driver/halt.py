"""Why a sweep ends before its trials do. Knows neither Ray nor torch."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class StopReason:
    """Why a sweep ends before its trials do; false while there is no reason. Ray Tune checks it after every result."""

    failed: str = ""
    """Too many trials failed: how many, and the last one's reason."""
    storage: str = ""
    """The disk or the object store failed."""

    def try_write(self, write: Callable[[], object]) -> None:
        """Call `write`; an error of the disk or the store becomes the reason, rather than a traceback out of Ray Tune's loop."""
        try:
            write()
        except OSError as error:
            self.storage = self.storage or f"`output_dir` must be writable, but got {error}"

    def __bool__(self) -> bool:
        return bool(self.failed or self.storage)
