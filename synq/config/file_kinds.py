"""Four kinds of settings files and the commands that take them: a file given to the wrong one is told where it belongs."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMANDS = {"run": "synq train", "recipe": "synq recipe", "sweep": "synq sweep", "ablation": "synq ablate"}
PARTS = frozenset(("teacher", "synthesis", "quant", "reconstruction", "finetune", "evaluation", "runtime"))
"""Tables of a run, at the top of its own file and of a recipe's."""
OF_SWEEPS = frozenset(
    ("models", "space", "points", "num_trials", "max_concurrent", "sampler", "scheduler", "objective", "grace_epochs")
)
"""Keys that only a sweep's file has at its top; name, bits and seeds it shares with others."""


def kind_of(content: Mapping[str, Any]) -> str:
    """Return the kind of file that the top keys speak for, one of COMMANDS, or "" where they leave it open."""
    keys = content.keys()
    if keys & OF_SWEEPS:
        return "sweep"
    if "rows" in keys or {"seeds", "base"} <= keys:
        return "ablation"
    if not keys & PARTS or "base" in keys:
        return ""
    own = keys & {"bits", "seeds"}
    return "recipe" if len(own) == 2 else "" if own else "run"


@contextmanager
def read_as(kind: str, content: Mapping[str, Any], path: str | Path) -> Iterator[None]:
    """Say of a file that is refused within the block which command it was made for, if that is another one.

    Raises:
        ValueError: The refusal, with that command.
    """
    try:
        yield
    except ValueError as error:
        other = kind_of(content)
        if other in ("", kind):
            raise
        article = "an" if other == "ablation" else "a"
        raise ValueError(
            f"{error}; it looks like the file of {article} {other}: {COMMANDS[other]} {shlex.quote(str(path))}"
        ) from None
