"""Tables from records: columns, ranking, the CSV files, and views of them.

The package can be called, `synq.sweeps.leaderboard(path)`: see `frames.leaderboard`.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


class _Callable(ModuleType):
    """A package with a function of the same name."""

    def __call__(self, *paths: str | Path) -> "DataFrame":
        """Return the leaderboard of sweeps and runs as a DataFrame; see `frames.leaderboard`."""
        from .frames import leaderboard

        return leaderboard(*paths)


sys.modules[__name__].__class__ = _Callable
