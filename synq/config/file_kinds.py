"""Recognition of the four kinds of settings files, so that an error can name the command that takes a file."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMANDS = {"run": "synq train", "recipe": "synq recipe", "sweep": "synq sweep", "ablation": "synq ablate"}
PARTS = frozenset(("teacher", "synthesis", "quant", "reconstruction", "finetune", "evaluation", "runtime"))
"""Tables at the top level of a run's file and of a recipe."""
OF_SWEEPS = frozenset(
    ("models", "space", "points", "num_trials", "max_concurrent", "sampler", "scheduler", "objective", "grace_epochs")
)
"""Top-level keys that only the file of a sweep has; name, bits and seeds occur in others, too."""


def kind_of(content: Mapping[str, Any]) -> str:
    """Return the kind of file, a key of COMMANDS, that the top-level keys indicate, or "" if they are ambiguous."""
    keys = content.keys()
    if keys & OF_SWEEPS:
        return "sweep"
    if "rows" in keys or {"seeds", "base"} <= keys:
        return "ablation"
    if not keys & PARTS or "base" in keys:
        return ""
    present = keys & {"bits", "seeds"}
    return "recipe" if len(present) == 2 else "" if present else "run"


@contextmanager
def read_as(kind: str, content: Mapping[str, Any], path: str | Path) -> Iterator[None]:
    """Add the right command to a ValueError raised within the block, if the file looks like one of another kind.

    Args:
        kind: The expected kind, a key of COMMANDS.
        content: Content of the file.
        path: The file, for the message.

    Raises:
        ValueError: The one raised within the block, with the command that takes such a file.
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
