"""Points of a search space known before the search: a grid, listed points, the best settings of earlier sweeps.

A point has one dotted override for every dimension. Imports neither Ray nor torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synq.config.quant import RESEARCH
from synq.config.run import RunConfig
from synq.runs.record import RunRecord

from .leaderboard.columns import SETTINGS
from .leaderboard.records import leaderboard_rows, load_records
from .space import BITS, Dimension, existing, value_at, value_of

Point = dict[str, Any]


def grid_size(dimensions: Sequence[Dimension]) -> int:
    """Return the number of points of the grid.

    Raises:
        ValueError: A dimension is a range without steps.
    """
    named = {condition.name for dimension in dimensions for condition in dimension.when}
    tied = [dimension for dimension in dimensions if dimension.when or dimension.name in named]
    free = [dimension for dimension in dimensions if dimension not in tied]
    return sum(1 for _ in grid(tied)) * math.prod(len(dimension.listed()) for dimension in free)


def grid(dimensions: Sequence[Dimension]) -> Iterator[Point]:
    """Yield every combination of values lazily, the last dimension changing fastest.

    A dimension that does not exist in a combination is missing in it.
    """
    yield from _grid(dimensions, [dimension.listed() for dimension in dimensions], {})


def _grid(dimensions: Sequence[Dimension], values: Sequence[Sequence[Any]], start: Point) -> Iterator[Point]:
    if not dimensions:
        yield start
    elif not dimensions[0].exists(start):
        yield from _grid(dimensions[1:], values[1:], start)
    else:
        for value in values[0]:
            yield from _grid(dimensions[1:], values[1:], {**start, dimensions[0].name: value})


def point_params(dimensions: Sequence[Dimension], point: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the search's parameters for a point; None if it is outside the space.

    Values of dimensions that do not exist in it are not looked at.
    """
    params: dict[str, Any] = {}
    values: Point = {}
    for dimension in dimensions:
        if not dimension.exists(values):
            continue
        values[dimension.name] = point[dimension.name]
        found = dimension.point(point[dimension.name])
        if found is None:
            return None
        params |= found
    return params


def completed(points: Sequence[Point], base: RunConfig) -> list[Point]:
    """Return points with the same settings in each: a missing one is that of the base."""
    names = dict.fromkeys(name for point in points for name in point)
    rest = {name: value_of(base, name) for name in names}
    return [{**rest, **point} for point in points]


def listed_dimensions(points: Sequence[Point]) -> tuple[Dimension, ...]:
    """Return the smallest space that contains `points`, all of the same settings: ranges for numbers, else choices."""
    names = points[0] if points else ()
    return tuple(_listed_dimension(name, [point[name] for point in points]) for name in names)


def _listed_dimension(name: str, values: list[Any]) -> Dimension:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    present = [value for value in values if value is not None]
    if name == BITS or not numbers or len(numbers) < len(present):
        return Dimension(
            name=name, type="choice", values=tuple(dict.fromkeys("none" if v is None else v for v in values))
        )
    whole = all(isinstance(value, int) for value in numbers)
    kind: Any = "int" if whole else "float"
    optional = len(present) < len(values)
    return Dimension(name=name, type=kind, low=min(numbers), high=max(numbers), optional=optional)


def warm_points(
    records: Sequence[RunRecord], dimensions: Sequence[Dimension], base: Mapping[str, Any], top_k: int
) -> list[Point]:
    """Return the best settings of earlier sweeps, as points of this search, best first.

    Settings of the same teacher come first, then those for the same engine, then those at the same bit-widths, each in
    the order of their leaderboard. Those outside the space, or of another objective, are skipped. A cutoff in another
    unit is converted by the input size of its model.

    Args:
        records: Records of the earlier sweeps.
        dimensions: The search space.
        base: The group's base run, as plain values.
        top_k: Maximum number of points.
    """
    objective = base["evaluation"]["objective"]  # settings chosen by labels must not enter a search without labels
    records = [record for record in records if record.objective == objective]
    by_digest = {record.config_digest: record for record in records}
    rows = []
    for row in leaderboard_rows(records):
        config = by_digest[row["config_digest"]].config
        other_teacher = _last_parts(config["teacher"]) != _last_parts(base["teacher"])
        other_target = config["quant"].get("target", RESEARCH) != base["quant"]["target"]  # an earlier one has no key
        other_bits = value_at(config, BITS) != value_at(base, BITS)
        rows.append((other_teacher, other_target, other_bits, row["rank"], row["config_digest"]))
    points: list[Point] = []
    for *_, digest in sorted(rows):
        record = by_digest[digest]
        point = {dimension.name: _converted(record, dimension.name, base) for dimension in dimensions}
        if point_params(dimensions, point) is not None and (known := existing(dimensions, point)) not in points:
            points.append(known)
    return points[:top_k]


def read_earlier(paths: Sequence[str]) -> list[RunRecord]:
    """Read the records of earlier sweeps.

    Args:
        paths: Folders of sweeps, or leaderboard.csv files in them.

    Raises:
        FileNotFoundError: A path is absent or has no records.
        ValueError: A record is damaged.
    """
    folders = [Path(path).parent if path.endswith(".csv") else Path(path) for path in paths]
    try:
        return load_records(folders)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`warm_start` must name folders of earlier sweeps: {error}") from None


def _converted(record: RunRecord, name: str, base: Mapping[str, Any]) -> Any:
    """Return the value of a record for a dimension, converted from the record's unit to that of the base."""
    value = value_at(record.config, name)
    column = SETTINGS.get(name.removeprefix("finetune."))
    size = record.teacher.get("input_size")
    if column is None or not column.unit_key or value is None or not size:
        return value
    unit, new_unit = record.config["finetune"][column.unit_key], base["finetune"][column.unit_key]
    if unit == new_unit:
        return value
    nyquist = min(size[-2:]) / 2
    return float(f"{value * nyquist if new_unit == 'bins' else value / nyquist:.6g}")


def _last_parts(teacher: Mapping[str, Any]) -> list[str]:
    """Return the base names of a teacher's files, because folders differ between machines."""
    return [str(teacher.get(key)).rpartition("/")[2] for key in ("spec", "weights")]
