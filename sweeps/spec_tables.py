"""Parsing of tables of a spec file: the search space and the points to try first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synq.config.nearest import key_hint, unknown_key
from synq.config.parsing import config_from_dict, require

from .points import Point
from .space import BITS, DEFAULT_SPACE, IDENTITY, Dimension, setting_names


def read_table(value: Any, name: str) -> dict[str, Any]:
    """Return a copy of a mapping and its nested tables; raise ValueError if `value` is not a mapping."""
    require(name, "be a table of keys", value, isinstance(value, Mapping))
    return {key: dict(part) if isinstance(part, Mapping) else part for key, part in value.items()}


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
                f"`points` must name settings of finetune or quant, but got {name!r}{key_hint(name, sorted(names))}"
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
    if name.startswith("synthesis."):
        raise ValueError(f"`space` must not hold `{name}`: the synthetic sets are made once, before the trials")
    names = setting_names()
    if name not in names:
        raise ValueError(
            f"`space.{name}` must name a setting of finetune or quant, but got an unknown one{key_hint(name, names)}"
        )
    values = read_table(table, f"space.{name}")
    known = tuple(_Range.__dataclass_fields__)
    for key in values:
        if key not in (*known, "values"):
            raise unknown_key(f"space.{name}.{key}", key, (*known, "values"))
    choices = values.pop("values", [])
    require(f"space.{name}.values", "be a list", choices, isinstance(choices, list))
    require(f"space.{name}.type", "be given (float, int or choice)", values.get("type"), "type" in values)
    try:
        parsed = config_from_dict(_Range, values)
    except ValueError as error:
        raise ValueError(f"[space.{name}] {error}") from None
    return Dimension(name=name, values=tuple(choices), **{key: getattr(parsed, key) for key in known})


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
