"""Many runs, ranked: search spaces, the tuner and the leaderboard.

result = synq.sweeps.run({"models": ["bundled:digits_resnet8"], "space": {"finetune.lr": [1e-3, 1e-2]}})
result.leaderboard, result.trials, result.best(), result.report()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synq.api.sweeps import SweepFailedError as SweepFailedError
    from synq.api.sweeps import SweepResult as SweepResult
    from synq.api.sweeps import open as open
    from synq.api.sweeps import run as run

    from .leaderboard.frames import leaderboard as leaderboard

_SOURCES = {
    "SweepFailedError": ("synq.api.sweeps", "SweepFailedError"),
    "SweepResult": ("synq.api.sweeps", "SweepResult"),
    "leaderboard": ("synq.sweeps.leaderboard", ""),
    "open": ("synq.api.sweeps", "open"),
    "run": ("synq.api.sweeps", "run"),
}
"""Public name -> its module and its name there; "" is the module itself, which can be called."""

__all__ = [*_SOURCES]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'synq.sweeps' has no attribute {name!r}")
    import importlib

    source, attribute = _SOURCES[name]
    module = importlib.import_module(source)
    return getattr(module, attribute) if attribute else module
