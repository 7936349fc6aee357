"""The reason to stop a sweep before all of its trials have ended. Imports neither Ray nor torch."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class StopReason:
    """The reason to stop a sweep early; false while there is none. Ray Tune checks it after every result."""

    failed: str = ""
    """Message that too many trials failed, with their number and the reason of the last one; "" if they did not."""
    storage: str = ""
    """Error of the disk or the object store; "" if there was none."""

    def try_write(self, write: Callable[[], object]) -> None:
        """Call `write`; an OSError is stored as the reason, instead of a traceback out of Ray Tune's loop."""
        try:
            write()
        except OSError as error:
            self.storage = self.storage or f"`output_dir` must be writable, but got {error}"

    def __bool__(self) -> bool:
        return bool(self.failed or self.storage)
