"""Constraints of a sweep, `[constraints]`: bounds on metrics of its records. Imports neither Ray nor torch.

They change no record, so they belong to the tables and to the search, not to the identity of a sweep: a sweep that is
resumed with other bounds ranks all its trials by those, and its search is rebuilt with them.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synq.common.digests import read_sealed_json
from synq.common.notices import print_notice
from synq.common.text_tables import plain
from synq.config.nearest import unknown_key
from synq.config.parsing import require
from synq.runs.record import RunRecord

SEARCHED = ("size_bytes", "bitops", "drop")
"""Metrics of every completed trial, by which the search avoids settings; drop is known with labels only."""
EXPORTED = ("onnx_bytes", "packed_bytes", "latency_ms", "latency_ratio")
"""Metrics that a record has once `synq export` has written the files of its run; by them rows are only ranked."""
CONSTRAINED = (*SEARCHED, *EXPORTED)
"""Metrics that may be bounded, columns of trials.csv and leaderboard.csv."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """The bounds of one metric."""

    name: str
    """The metric, one of `CONSTRAINED`."""
    max: float | None = None
    """Largest value that satisfies it; None without."""
    min: float | None = None
    """Smallest value that satisfies it; None without."""

    def __str__(self) -> str:
        bounds = [(sign, bound) for sign, bound in (("<=", self.max), (">=", self.min)) if bound is not None]
        return f"{self.name} {' and '.join(f'{sign} {_text(bound)}' for sign, bound in bounds)}"

    def violation(self, value: float | None) -> str:
        """Return how a value violates the bounds, "size_bytes 5120 > 4096"; "" if it does not or is unknown."""
        if value is None or not math.isfinite(value):
            return ""
        if self.max is not None and value > self.max:
            return f"{self.name} {_text(value, self.max)} > {_text(self.max)}"
        if self.min is not None and value < self.min:
            return f"{self.name} {_text(value, self.min)} < {_text(self.min)}"
        return ""

    def excess(self, value: float | None) -> float:
        """Return by how much a value violates the bounds, relative to the bound, as Optuna expects it.

        It is above 0 exactly if the value violates them, so that constraints of different units can be summed. An
        unknown value counts as one at the bound: 0.
        """
        if value is None or not math.isfinite(value):
            return 0.0
        parts = [value - self.max] if self.max is not None else []
        parts += [self.min - value] if self.min is not None else []
        bounds = [abs(bound) for bound in (self.max, self.min) if bound]
        return max(parts) / (max(bounds) if bounds else 1.0)

    @property
    def values(self) -> dict[str, float]:
        """The bounds by key, as in a spec."""
        return {key: bound for key, bound in (("max", self.max), ("min", self.min)) if bound is not None}


def read_constraints(table: Any) -> tuple[Constraint, ...]:
    """Read the table [constraints]: a number is the largest value, a table has `max`, `min` or both.

    Raises:
        ValueError: A metric or a key is unknown, or a bound is no finite number.
    """
    require("constraints", "be a table of metrics", table, isinstance(table, Mapping))
    return tuple(_constraint(name, value) for name, value in table.items())


def _constraint(name: str, value: Any) -> Constraint:
    if name not in CONSTRAINED:
        raise unknown_key(f"constraints.{name}", name, CONSTRAINED)
    bounds = dict(value) if isinstance(value, Mapping) else {"max": value}
    where = f"constraints.{name}"
    require(where, "be a number (the largest value), or have max, min or both", value, bool(bounds))
    for key, bound in bounds.items():
        if key not in ("max", "min"):
            raise unknown_key(f"{where}.{key}", key, ("max", "min"))
        key_name = f"{where}.{key}" if isinstance(value, Mapping) else where
        require(key_name, "be a finite number", bound, _is_finite(bound))
    found = Constraint(name=name, **{key: float(bound) for key, bound in bounds.items()})
    if found.max is not None and found.min is not None:
        require(f"{where}.min", "be at most max", found.min, found.min <= found.max)
    return found


def _is_finite(bound: Any) -> bool:
    if not isinstance(bound, int | float) or isinstance(bound, bool):
        return False
    return abs(bound) <= sys.float_info.max  # also of a whole number that no float can hold


def constraint_values(constraints: Iterable[Constraint]) -> dict[str, dict[str, float]]:
    """Return constraints as plain values, which `read_constraints` reads."""
    return {one.name: one.values for one in constraints}


def constraints_text(constraints: Iterable[Constraint]) -> str:
    """Return constraints as text: "size_bytes <= 4096, drop <= 2"; "" without any."""
    return ", ".join(map(str, constraints))


def violations(constraints: Iterable[Constraint], row: Mapping[str, Any]) -> str | None:
    """Return the violated bounds of a row of a table: "size_bytes 5120 > 4096; drop 3 > 2"; None if there are none."""
    return "; ".join(filter(None, (one.violation(row[one.name]) for one in constraints))) or None


def record_violations(constraints: Iterable[Constraint], record: RunRecord) -> str | None:
    """Return the violated bounds of a record, as `violations`."""
    return violations(constraints, {name: metric(record, name) for name in CONSTRAINED})


def metric(record: RunRecord, name: str) -> Any:
    """Return the value of a record for a metric of `CONSTRAINED`; None if it is not known."""
    return record.deployment.get(name) if name in EXPORTED else getattr(record, name)


def constraints_of(paths: Iterable[str | Path]) -> tuple[Constraint, ...]:
    """Return the constraints of sweeps, as of their last start; none, with a notice, if they differ between sweeps.

    Args:
        paths: Folders of sweeps, or of several sweeps; what is no sweep is passed over. A damaged sweep.json is named
            by a notice and gives none.
    """
    found: dict[tuple[Constraint, ...], None] = {}
    for path in map(Path, paths):
        for file in [path / "sweep.json"] if (path / "sweep.json").is_file() else sorted(path.glob("*/sweep.json")):
            try:
                content = read_sealed_json(file)[0]
                found[read_constraints(content.get("constraints", {}))] = None
            except (ValueError, AttributeError) as error:
                print_notice(f"warning: {error}; its rows are ranked without constraints")
    if len(found) > 1:
        print_notice("the sweeps have different constraints, so none is applied; `--where size_bytes<=N` chooses rows")
        return ()
    return next(iter(found), ())


def _text(value: float, bound: float | None = None) -> str:
    """Return a number in few digits, or in all if it would look like the bound that it violates."""
    text = plain(value if float(value).is_integer() else float(f"{value:.5g}"))
    return text if bound is None or text != _text(bound) else repr(float(value))
