"""The reason to stop a sweep before all trials have ended, and its interruption. Imports neither Ray nor torch."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


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
            text = str(error)
            rule = "" if text.startswith("`") else "`output_dir` must be writable, but got "
            self.storage = self.storage or f"{rule}{text}"

    def __bool__(self) -> bool:
        return bool(self.failed or self.storage)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM (sent by `ray job stop`) in the ``with`` block, in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
