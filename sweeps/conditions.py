"""Conditions under which a setting of a search space exists, the key `when`. Imports neither Ray nor Optuna."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synq.config.parsing import require

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class When:
    """A condition for a setting to exist: another searched setting has a given value."""

    name: str
    """The other setting, by its dotted name."""
    sign: Literal["in", "!=", "<=", ">=", "<", ">"] = "in"
    """How its value compares with `values`."""
    values: tuple[Any, ...] = ()
    """The values that it must have (in) or must not have (!=), or one number; "none" is None."""

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {', '.join(map(str, self.values))}"

    def holds(self, value: Any) -> bool:
        """Return whether a value of the other setting satisfies the condition."""
        value = "none" if value is None else value
        if self.sign in ("in", "!="):  # True and 1 are different values
            has_value = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)
            return has_value == (self.sign == "in")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and COMPARISONS[self.sign](value, self.values[0])


def read_when(value: Any, where: str) -> tuple[When, ...]:
    """Read the key `when` of a dimension: for each other setting a value, a list of values, or a comparison as text.

    Raises:
        ValueError: It is no table, or a comparison is not with a number.
    """
    require(where, "be a table of other searched settings", value, isinstance(value, Mapping))
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= {f"{name}.{key}": one for key, one in part.items()} if isinstance(part, Mapping) else {name: part}
    return tuple(_when(name, part, f"{where}.{name}") for name, part in flat.items())


def _when(name: str, value: Any, where: str) -> When:
    match = re.fullmatch(r"\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*", value) if isinstance(value, str) else None
    if match is None:
        values = tuple("none" if one is None else one for one in (value if isinstance(value, list) else [value]))
        require(where, "hold at least one value", value, len(values) > 0)
        return When(name=name, values=values)
    sign: Any = "in" if match[1] == "==" else match[1]
    try:
        number: Any = float(match[2])
    except ValueError:
        require(where, "compare with a number", value, sign in ("in", "!="))
        number = {"true": True, "false": False}.get(match[2].lower(), match[2])
    require(where, "compare with a finite number", value, not isinstance(number, float) or math.isfinite(number))
    return When(name=name, sign=sign, values=(number,))
