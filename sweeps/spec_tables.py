"""Parsing of tables of a spec file: the search space and the points to try first; what a user adds in them."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from synq.config.finetune import OWN_WEIGHT, check_own_weight
from synq.config.identity import resolved
from synq.config.nearest import key_hint, unknown_key
from synq.config.parsing import config_from_dict, require, shown
from synq.config.plugins import LOSS_TERM, SYNTHESIS_METHOD, check_elsewhere, settings_in
from synq.config.run import RunConfig, with_overrides

from .conditions import When, read_when
from .points import Point
from .space import (
    BITS,
    DEFAULT_SPACE,
    IDENTITY,
    METHOD,
    Dimension,
    points_where_it_exists,
    setting_names,
    with_bits,
)
from .spec import SweepSpec

MAX_TRIED = 64
"""Maximum number of values of other settings with which the edge of a setting is checked."""


def read_table(value: Any, name: str) -> dict[str, Any]:
    """Return a copy of a mapping and its nested tables; raise ValueError if `value` is not a mapping."""
    require(name, "be a table of keys", value, isinstance(value, Mapping))
    return {key: dict(part) if isinstance(part, Mapping) else part for key, part in value.items()}


def expanded(value: Any, name: str = "") -> Any:
    """Return a value with environment variables ($NAME, ${NAME}) in its texts replaced.

    Args:
        value: A text, list or table of a spec.
        name: Its key, for messages.

    Raises:
        ValueError: A variable is not set.
    """
    if isinstance(value, Mapping):
        return {key: expanded(part, f"{name}.{key}" if name else key) for key, part in value.items()}
    if isinstance(value, list):
        return [expanded(part, name) for part in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    full = os.path.expandvars(value)
    missing = re.search(r"\$\{?(\w+)\}?", full)
    if missing:
        raise ValueError(f"`{name}` must name set environment variables, but got {shown(value)} (set {missing[1]})")
    return full


def read_points(entries: Any, *, two_objectives: bool = False) -> tuple[Point, ...]:
    """Read the [[points]] of a spec.

    Args:
        entries: A list of tables; {"finetune.lr": 0.01} and {"finetune": {"lr": 0.01}} are the same. "none" means None.
        two_objectives: Whether an entry may have the key `bits`.

    Raises:
        ValueError: An entry is not a table, or one of its keys is not a setting.
    """
    require("points", "be a list of tables", entries, isinstance(entries, list))
    names = {*setting_names(), *([BITS] if two_objectives else [])}
    return tuple(_read_point(entry, names) for entry in entries)


def _read_point(entry: Any, names: set[str]) -> Point:
    point: Point = {}
    for key, value in read_table(entry, "points").items():
        point |= (
            {f"{key}.{inner}": part for inner, part in value.items()} if isinstance(value, Mapping) else {key: value}
        )
    for name in point:
        if name not in names:
            raise ValueError(
                f"`points` must name settings of finetune or quant, or `{METHOD}`, but got {name!r}"
                f"{key_hint(name, sorted(names))}"
            )
    return {name: None if value == "none" else value for name, value in point.items()}


def read_space(value: Any) -> tuple[Dimension, ...]:
    """Read a table of dimensions by dotted name of the setting; [space.finetune.lr] is [space."finetune.lr"].

    Raises:
        ValueError: A name, a key or a value is invalid.
    """
    flat: dict[str, Any] = {}
    for name, table in read_table(value, "space").items():
        nested = "." not in name and isinstance(table, Mapping) and "type" not in table
        flat |= {f"{name}.{key}": part for key, part in table.items()} if nested else {name: table}
    return tuple(_dimension(name, table) for name, table in flat.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """The keys of a [space.*] table with their types."""

    type: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    optional: bool = False


def _dimension(name: str, table: Any) -> Dimension:
    if name in IDENTITY:
        raise ValueError(
            f"`space` must not hold `{name}`: bit-widths and engines are groups (`bits`, `targets`), "
            "act_points and portable belong in [base]"
        )
    if name.startswith("synthesis.") and name != METHOD:
        raise ValueError(
            f"`space` must not hold `{name}`: the synthetic sets are made once, before the trials; of the synthesis "
            f"only `{METHOD}` can be searched"
        )
    names = setting_names()
    if name not in names:
        raise ValueError(
            f"`space.{name}` must name a setting of finetune or quant, or `{METHOD}`, but got an unknown one"
            f"{key_hint(name, names)}"
        )
    values = read_table(table, f"space.{name}")
    known = tuple(_Range.__dataclass_fields__)
    for key in values:
        if key not in (*known, "values", "when"):
            raise unknown_key(f"space.{name}.{key}", key, (*known, "values", "when"))
    when = read_when(values.pop("when", {}), f"space.{name}.when")
    choices = values.pop("values", [])
    require(f"space.{name}.values", "be a list", choices, isinstance(choices, list))
    require(f"space.{name}.type", "be given (float, int or choice)", values.get("type"), "type" in values)
    try:
        parsed = config_from_dict(_Range, values)
    except ValueError as error:
        raise ValueError(f"[space.{name}] {error}") from None
    return Dimension(name=name, values=tuple(choices), when=when, **{key: getattr(parsed, key) for key in known})


def default_space(base: Mapping[str, Any]) -> tuple[tuple[Dimension, ...], dict[str, Any]]:
    """Return the default space, and [base] with the unit of the cutoff in that space.

    Raises:
        ValueError: [base] sets another unit.
    """
    finetune = read_table(base.get("finetune", {}), "base.finetune")
    unit = finetune.setdefault("lowpass_unit", "nyquist")
    rule = "be nyquist with the default search space (or give another [space])"
    require("base.finetune.lowpass_unit", rule, unit, unit == "nyquist")
    return read_space(DEFAULT_SPACE), {**base, "finetune": finetune}


def resolved_points(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return points whose synthesis methods are `resolved`."""
    return tuple(
        {**point, METHOD: resolved(SYNTHESIS_METHOD, point[METHOD])} if isinstance(point.get(METHOD), str) else point
        for point in points
    )


def resolved_space(dimensions: Iterable[Dimension]) -> tuple[Dimension, ...]:
    """Return dimensions whose synthesis methods are `resolved`, also in conditions."""
    return tuple(
        replace(
            one,
            values=_resolved_methods(one.values) if one.name == METHOD else one.values,
            when=tuple(map(_resolved_condition, one.when)),
        )
        for one in dimensions
    )


def _resolved_condition(condition: When) -> When:
    return replace(condition, values=_resolved_methods(condition.values)) if condition.name == METHOD else condition


def _resolved_methods(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(resolved(SYNTHESIS_METHOD, value) if isinstance(value, str) else value for value in values)


def check_edges(dimensions: Sequence[Dimension], dimension: Dimension, base: RunConfig) -> None:
    """Check that the edges of a dimension are valid settings where it exists, each with some values of the others.

    Args:
        dimensions: The search space.
        dimension: One of it.
        base: The run that it changes.

    Raises:
        ValueError: An edge is not.
    """
    points = list(itertools.islice(points_where_it_exists(dimensions, dimension), MAX_TRIED**2))
    points = points[:: max(1, len(points) // MAX_TRIED)]  # not the first alone, which differ in the last settings only
    for value in dimension.edges():
        first: ValueError | None = None
        for others in points:
            try:
                with_overrides(base, with_bits({**others, dimension.name: value}))
                break
            except ValueError as error:
                first = first or error
        else:
            rule = f"`space.{dimension.name}` must lie within the valid range of the setting"
            raise ValueError(f"{rule}: {first}") from None


def check_added(spec: SweepSpec) -> None:
    """Check what a user added to the runs of a sweep: trials can load it, and a loss term has a weight.

    Raises:
        ValueError: A check fails.
    """
    searched = {name for point in spec.points for name in point} | {one.name for one in spec.dimensions}
    methods = [value for one in spec.dimensions if one.name == METHOD for value in one.values]
    for group in spec.groups:
        for kind, value in (*settings_in(group.base), *((SYNTHESIS_METHOD, method) for method in methods)):
            check_elsewhere(kind, value)
        if OWN_WEIGHT in searched and group.base.finetune.own_term is not None:
            check_elsewhere(LOSS_TERM, group.base.finetune.own_term)
        check_own_weight(group.base.finetune, is_given=OWN_WEIGHT in searched)
