"""Files of other quantization tools, as points next to the exported students of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synq.common.files import read_json

OWN = "SynQ"
"""Start of the names of this project's own files, which the records of the sweep have."""
FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class ToolPoint:
    """A file of another tool.

    Attributes:
        model: Name of the network.
        target: Engine that ran the file.
        name: Name of the tool.
        top1: Top-1 accuracy in percent.
        latency_ratio: Latency relative to that of the float network in the same engine, > 0.
    """

    model: str
    target: str
    name: str
    top1: float
    latency_ratio: float

    def fits(self, model: object, points: object) -> bool:
        """Return whether a setting of this model and these quantization points (`act_points`) ran in the engine."""
        return self.model == model and self.target == str(points).partition(" ")[0]


def read_tools(paths: Sequence[str | Path]) -> list[ToolPoint]:
    """Return the timed files of other tools from results of `launch/compare_tools.py`.

    Args:
        paths: JSON files: lists of objects with the keys model, target, file, top1 (percent) and times_float (speed
            relative to float). Objects without times_float, float networks and students of this project are left out.

    Raises:
        ValueError: A file is no such list, or has no such point.
        OSError: A file cannot be read.
    """
    found = []
    for path in paths:
        content = read_json(path, "make it again with launch/compare_tools.py")
        rows = content if isinstance(content, list) else [content]
        points = [_point(path, row) for row in rows if not isinstance(row, dict) or _is_point(row)]
        if not points:
            raise ValueError(
                f"`tools` must name results with at least one timed file of another tool, but {path} has none"
            )
        found += points
    return found


def _is_point(row: dict[str, Any]) -> bool:
    name = str(row.get("file", ""))
    return "times_float" in row and name != FLOAT and not name.startswith(OWN)


def _point(path: str | Path, row: Any) -> ToolPoint:
    match row:
        case {"model": str(model), "target": str(target), "file": str(name), "top1": top1, "times_float": times} if (
            _is_number(top1) and _is_number(times) and 0 <= top1 <= 100 and times > 0
        ):
            return ToolPoint(model=model, target=target, name=name, top1=float(top1), latency_ratio=1 / float(times))
    raise ValueError(
        "`tools` must name results of launch/compare_tools.py: a list of objects with model, target and file, a top1 "
        f"in [0, 100] and a times_float above 0, but {path} has {str(row)[:120]}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
