"""Why a sweep must end before its trials do. Knows neither Ray nor torch."""

from dataclasses import dataclass


@dataclass
class Halt:
    """Why a sweep must end before its trials do; asked by Ray Tune after every result."""

    failed: str = ""
    """Too many trials failed: how many, and the last one's reason."""
    storage: str = ""
    """The disk or the store refused."""

    def __bool__(self) -> bool:
        return bool(self.failed or self.storage)
