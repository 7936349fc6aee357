"""The search space of a sweep: searched settings and their ranges. Imports neither Ray nor Optuna."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from synq.config.nearest import key_hint
from synq.config.parsing import between, dotted_keys, one_of, require
from synq.config.run import RunConfig, parse_bits

from .conditions import When

IDENTITY = (
    *("quant.weight_bits", "quant.act_bits", "quant.first_bits", "quant.last_bits"),
    *("quant.last_bits_for_input", "quant.layer_weight_bits", "quant.layer_act_bits", "quant.act_points"),
    *("quant.target", "quant.portable", "quant.float_attention"),
)
"""Settings that determine the ranking of a run; they cannot be searched."""

DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "finetune.lowpass_cutoff": {"type": "float", "low": 0.4, "high": 1.6, "log": True, "optional": True},
    "finetune.cam_weight": {"type": "choice", "values": [0.0, 2.0, 20.0, 200.0]},
    "finetune.ce_weight": {"type": "choice", "values": [0.0, 0.01, 0.1, 0.5]},
    "finetune.difficulty_threshold": {"type": "float", "low": 0.3, "high": 0.9, "step": 0.1},
    "finetune.lr": {"type": "float", "low": 5e-4, "high": 2e-2, "log": True},
}
"""Search space of a spec without [space]. The cutoff is a fraction of the Nyquist frequency, for any image size."""

MAX_LISTED = 10_000
"""Largest number of values of a range that a grid may have."""
BITS = "bits"
"""Name of the dimension of bit-widths (W4A4, ...) in a search with two objectives."""
METHOD = "synthesis.method"
"""The one setting of the synthesis that may be searched: the held-out images are the same for all methods."""


class Suggester(Protocol):
    """The part of an Optuna trial that `sample` needs."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One searched setting: a range or a list of values."""

    name: str
    """Dotted name, for example finetune.lr."""
    type: Literal["float", "int", "choice"]
    """Kind of values."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Whether the range is searched by its logarithm."""
    step: float | None = None
    """Spacing of the values; None is a continuous range."""
    values: tuple[Any, ...] = ()
    """The choices; "none" is None."""
    optional: bool = False
    """Whether None (the idea disabled) is tried in addition to the range."""
    when: tuple[When, ...] = ()
    """Conditions under which the setting is searched at all; elsewhere it has the value of [base]. A table: for each of
    one or more other searched settings a value, a list of values, or a comparison such as "> 0" or "!= none"."""

    def __post_init__(self) -> None:
        where = f"space.{self.name}"
        one_of(f"{where}.type", self.type, ("float", "int", "choice"))
        if self.type == "choice":
            require(f"{where}.values", "hold at least one value", list(self.values), len(self.values) > 0)
            bounded = (
                self.low is not None or self.high is not None or self.step is not None or self.log or self.optional
            )
            rule = "be float or int where low, high, step, log or optional is given"
            require(f"{where}.type", rule, self.type, not bounded)
            return
        require(f"{where}.values", "be left out unless type is choice", list(self.values), not self.values)
        if self.low is None or self.high is None:
            raise ValueError(f"`{where}` must give low and high, but got low={self.low}, high={self.high}")
        between(f"{where}.low", self.low, -1e300)
        between(f"{where}.high", self.high, self.low)
        require(f"{where}.low", "be > 0 for a logarithmic range", self.low, not self.log or self.low > 0)
        require(f"{where}.step", "be left out for a logarithmic range", self.step, not self.log or self.step is None)
        if self.step is not None:
            between(f"{where}.step", self.step, 0, open_low=True)
        if self.type == "int":
            for key in ("low", "high", "step"):
                value = getattr(self, key)
                require(f"{where}.{key}", "be a whole number for type int", value, value is None or value % 1 == 0)

    def exists(self, values: Mapping[str, Any]) -> bool:
        """Return whether the setting is searched, given the values of the dimensions before it that exist."""
        return all(one.name in values and one.holds(values[one.name]) for one in self.when)

    def suggest(self, trial: Suggester) -> Any:
        """Return a value chosen by the search; None only if `optional`."""
        if self.type == "choice":
            picked = trial.suggest_categorical(self.name, list(self.values))
            return None if picked == "none" else picked
        if self.optional and not trial.suggest_categorical(f"{self.name}.on", [True, False]):
            return None
        assert self.low is not None and self.high is not None
        if self.type == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return float(f"{value:.6g}")  # short to read, and exactly the value of the run

    def point(self, value: Any) -> dict[str, Any] | None:
        """Return the search's parameters for `value`; None if it is not in the dimension."""
        if self.type == "choice":
            value = "none" if value is None else value
            return {self.name: value} if value in self.values else None
        if value is None:
            return {f"{self.name}.on": False} if self.optional else None
        assert self.low is not None and self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if self.step is not None and abs((value - self.low) / self.step - round((value - self.low) / self.step)) > 1e-6:
            return None
        return {self.name: value, **({f"{self.name}.on": True} if self.optional else {})}

    def edges(self) -> tuple[Any, ...]:
        """Return the values at which the range checks of the configuration must pass: the bounds, or all choices."""
        if self.type == "choice":
            return tuple(None if value == "none" else value for value in self.values)
        bounds = (self.low, self.high) if self.type == "float" else (int(self.low or 0), int(self.high or 0))
        return (*bounds, None) if self.optional else bounds

    def listed(self) -> tuple[Any, ...]:
        """Return every value, in order, for a grid.

        Raises:
            ValueError: The dimension is a range without steps.
        """
        if self.type == "choice":
            return self.edges()
        if self.step is None and self.type == "float":
            raise ValueError(f"`space.{self.name}` must give `step`, or be a choice of `values`, for sampler grid")
        assert self.low is not None and self.high is not None
        require(f"space.{self.name}.log", "be false for sampler grid", self.log, not self.log)
        step = self.step or 1
        between(f"space.{self.name}.step", step, (self.high - self.low) / MAX_LISTED)
        count = int((self.high - self.low) / step + 1e-9) + 1
        numbers = [float(f"{self.low + step * number:.6g}") for number in range(count)]
        values = numbers if self.type == "float" else [int(number) for number in numbers]
        return (*values, None) if self.optional else tuple(values)


def sample(dimensions: Sequence[Dimension], trial: Suggester) -> dict[str, Any]:
    """Return one point of the search space as dotted overrides. Not a closure, because searchers are pickled."""
    overrides: dict[str, Any] = {}
    for dimension in dimensions:
        if dimension.exists(overrides):
            overrides[dimension.name] = dimension.suggest(trial)
    return {"overrides": overrides}


def existing(dimensions: Iterable[Dimension], point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a point for those dimensions that exist in it.

    Args:
        dimensions: The search space, each dimension after those that its conditions name.
        point: A value for each dimension.
    """
    found: dict[str, Any] = {}
    for dimension in dimensions:
        if dimension.exists(found):
            found[dimension.name] = point[dimension.name]
    return found


def in_order(dimensions: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """Return dimensions in their order, but each after those that its conditions name.

    Raises:
        ValueError: A condition names a setting that is not searched, holds for none of its values, or for itself.
    """
    names = {dimension.name for dimension in dimensions}
    found: dict[str, Dimension] = {}
    left = list(dimensions)
    while left:
        ready = next((one for one in left if all(condition.name in found for condition in one.when)), None)
        first = ready or left[0]
        for condition in first.when:
            where = f"space.{first.name}.when"
            if condition.name not in names:
                hint = key_hint(condition.name, sorted(names))
                raise ValueError(f"`{where}` must name other searched settings, but got {condition.name!r}{hint}")
            if ready is not None and not _values_with([condition], found[condition.name]):
                raise ValueError(f"`{where}` must hold for a value of {condition.name}, but got {condition}")
            if condition.name not in found:
                raise ValueError(f"`{where}` must not depend on the setting itself, but got {condition}")
        found[first.name] = first
        left.remove(first)
    return tuple(found.values())


def _values_with(conditions: Sequence[When], other: Dimension) -> list[Any]:
    """Return some values of a dimension that satisfy conditions on it; [] if there is none.

    Conditions divide a range at the numbers that they name: tried are its bounds, these numbers, what is next to them
    on the grid of a range with steps, and else one number between each two neighbors.
    """
    tried = list(other.edges())
    if other.low is not None and other.high is not None:
        named = [value for condition in conditions for value in condition.values]
        numbers = [value for value in named if isinstance(value, int | float) and not isinstance(value, bool)]
        step = other.step or (1 if other.type == "int" else None)
        if step is None:
            marks = sorted({other.low, other.high, *numbers})
            tried += [*numbers, *((one + two) / 2 for one, two in itertools.pairwise(marks))]
        else:
            below = [math.floor((number - other.low) / step) for number in numbers]
            counts = sorted({count + shift for count in below for shift in (-1, 0, 1, 2)})
            grid = [float(f"{other.low + step * count:.6g}") for count in counts]
            tried += [int(value) for value in grid] if other.type == "int" else grid
    return [
        value
        for value in tried
        if other.point(value) is not None and all(condition.holds(value) for condition in conditions)
    ]


def points_where_it_exists(dimensions: Sequence[Dimension], dimension: Dimension) -> Iterator[dict[str, Any]]:
    """Yield values of other dimensions with which a dimension exists: one point without any if it always does.

    Its conditions, and those under which the settings that they name exist, must hold at once. Each is on one setting,
    so that values of all these settings that satisfy the conditions on them are such a point, whichever they are.

    Raises:
        ValueError: Conditions exclude each other.
    """
    by_name = {one.name: one for one in dimensions}
    conditions: dict[str, list[When]] = {}
    waiting, seen = [dimension], {dimension.name}
    while waiting:
        for condition in waiting.pop().when:
            conditions.setdefault(condition.name, []).append(condition)
            if condition.name not in seen:
                seen.add(condition.name)
                waiting.append(by_name[condition.name])
    others = [one for one in dimensions if one.name in conditions]
    choices = []
    for other in others:
        choices.append(_values_with(conditions[other.name], other))
        if not choices[-1]:
            texts = "; ".join(dict.fromkeys(map(str, conditions[other.name])))
            raise ValueError(f"`space.{dimension.name}.when` must hold together, but got {texts}")
    for values in itertools.product(*choices):
        yield {other.name: value for other, value in zip(others, values, strict=True)}


def dimension_from(values: Mapping[str, Any]) -> Dimension:
    """Read a dimension from the plain values that `dimension_values` returns."""
    conditions = tuple(When(**{**one, "values": tuple(one["values"])}) for one in values.get("when", ()))
    return Dimension(**{**values, "values": tuple(values["values"]), "when": conditions})


def dimension_values(dimension: Dimension) -> dict[str, Any]:
    """Return a dimension as plain values, without `when` where it always exists."""
    values = asdict(dimension)
    return values if dimension.when else {key: value for key, value in values.items() if key != "when"}


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a run for a dimension; a tuple is returned as a list, as in a file."""
    if name == BITS:
        return config.quant.label
    part, _, key = name.partition(".")
    value = getattr(getattr(config, part), key)
    return list(value) if isinstance(value, tuple) else value


def value_at(config: Mapping[str, Any], name: str) -> Any:
    """Return the value of a run, given as plain values, for a dimension; see `value_of`."""
    if name == BITS:
        return f"W{config['quant']['weight_bits']}A{config['quant']['act_bits']}"
    part, _, key = name.partition(".")
    return config[part][key]


def base_values(dimensions: Sequence[Dimension], config: RunConfig) -> dict[str, Any]:
    """Return the point of a run in the space of `dimensions`."""
    return {dimension.name: value_of(config, dimension.name) for dimension in dimensions}


def with_bits(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides with a bit-width label replaced by `quant.weight_bits` and `quant.act_bits`."""
    if BITS not in overrides:
        return dict(overrides)
    weight_bits, act_bits = parse_bits(overrides[BITS])
    rest = {name: value for name, value in overrides.items() if name != BITS}
    return {**rest, "quant.weight_bits": weight_bits, "quant.act_bits": act_bits}


def setting_names() -> list[str]:
    """Return the dotted keys of the settings that may be searched."""
    names = [key for key in dotted_keys(RunConfig) if key.startswith(("finetune.", "quant.")) or key == METHOD]
    return [key for key in names if key not in (*IDENTITY, "finetune.own_term")]  # a term, whose weight is searched
