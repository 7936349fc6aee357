"""The completed trials of a search as numbers, and the importance of its settings.

Imports neither Ray, Optuna nor Matplotlib.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from synq.runs.record import RunRecord

from ..constraints import Constraint, record_violations
from ..space import Dimension, existing, in_order, value_of
from ..state.plans import Plan
from .importance import main_effects, sampled_effects

OFF_MARGIN = 0.15
"""An optional range encodes "off" above its upper bound, by this fraction of the range."""
ABSENT = "(absent)"
"""Placeholder of a choice that does not exist in a trial; it equals none of its values."""
NUM_POINTS = 10_000
"""Random points of a space over which the importances of settings that exist only sometimes are averaged."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Completed trial of a search.

    Attributes:
        number: Place of the trial among the finished ones, in order of proposal, from 0.
        value: Its objective.
        params: Its settings by short name, without those outside the ranges of the search space.
        top1: Its top-1 in percent; None without labels.
        is_feasible: Whether it satisfies the constraints.
    """

    number: int
    value: float
    params: Mapping[str, Any]
    top1: float | None
    is_feasible: bool = True


def completed(
    dimensions: Sequence[Dimension], trials: Iterable[tuple[Plan, RunRecord]], constraints: Sequence[Constraint] = ()
) -> list[Trial]:
    """Return the completed trials that have an objective, numbered among all that ended."""
    names, found, number = short_names(dimensions), [], 0
    for plan, record in trials:
        done = record.status == "completed"
        if done and record.objective_value is None:
            continue
        if done and record.objective_value is not None:
            given = {dimension.name: value_of(plan.config, dimension.name) for dimension in dimensions}
            known = existing(dimensions, given)
            values = [_value(dimension, given[dimension.name]) for dimension in dimensions]
            # A sweep extended by listed points may have values outside the ranges of its search space.
            params = {
                name: value
                for name, dimension, value in zip(names, dimensions, values, strict=True)
                if dimension.name in known and _contains(dimension, value)
            }
            top1 = None if record.top1 is None else float(record.top1)
            value, is_feasible = float(record.objective_value), not record_violations(constraints, record)
            found.append(Trial(number=number, value=value, params=params, top1=top1, is_feasible=is_feasible))
        number += 1
    return found


def _contains(dimension: Dimension, value: Any) -> bool:
    if dimension.type == "choice":
        return any(repr(value) == repr(choice) for choice in _choices(dimension))
    low, high = _bounds(dimension)
    return low <= value <= high


def short_names(dimensions: Sequence[Dimension]) -> list[str]:
    """Return short names: the last part of each name if it is unique, else the whole name."""
    last = [dimension.name.rpartition(".")[2] for dimension in dimensions]
    return [
        short if last.count(short) == 1 else dimension.name for short, dimension in zip(last, dimensions, strict=True)
    ]


def _off(dimension: Dimension) -> float | int:
    """Return the number that encodes "off" in an optional range: slightly above its upper bound."""
    assert dimension.low is not None and dimension.high is not None
    if dimension.log:
        off = dimension.high * (dimension.high / dimension.low) ** OFF_MARGIN
    else:
        off = dimension.high + OFF_MARGIN * (dimension.high - dimension.low)
    return round(off) + 1 if dimension.type == "int" else float(f"{off:.3g}")


def off_note(dimensions: Sequence[Dimension]) -> str:
    """Return a sentence about the numbers that encode "off", with a space before it; "" without optional ranges."""
    notes = [f"{dimension.name} {_off(dimension):g} means off" for dimension in dimensions if dimension.optional]
    return f" {'; '.join(notes)}." if notes else ""


def _value(dimension: Dimension, value: Any) -> Any:
    return value if value is not None else _off(dimension) if dimension.optional else "none"


def _choices(dimension: Dimension) -> list[Any]:
    return ["none" if value is None else value for value in dimension.values]


def _bounds(dimension: Dimension) -> tuple[float, float]:
    """Return the lowest and the highest number of a range, "off" included."""
    assert dimension.low is not None and dimension.high is not None
    return dimension.low, _off(dimension) if dimension.optional else dimension.high


def importances(varied: Mapping[str, Dimension], trials: Sequence[Trial]) -> dict[str, float]:
    """Return the share of the objective's variance that each setting explains individually, normalized to sum 1.

    Where all settings exist in all trials, these are the main effects of fANOVA. Where one exists only under
    conditions, they are those of `sampled_effects` over random points of the space. Evaluators that take the settings
    common to all trials leave it out, and those that compare the best trials with all give it 0 if the best ones do not
    have it.

    Args:
        varied: The settings with different values, by short name.
        trials: Trials with a finite objective.

    Raises:
        ValueError: No setting explains any variance.
    """
    names = sorted(varied)
    always = [name for name in names if not varied[name].when]
    whole = [trial for trial in trials if all(name in trial.params for name in always)]
    values = np.array([trial.value for trial in whole])
    if all(name in trial.params for trial in whole for name in names):
        columns, bounds = zip(*(_columns(varied[name], _values(name, whole)) for name in names), strict=True)
        return dict(zip(names, main_effects(columns, bounds, values).tolist(), strict=True))
    points = _random_points(varied, NUM_POINTS)
    inputs, at_points = (
        np.concatenate([_columns(varied[name], _filled(varied[name], name, part))[0] for name in names], axis=1)
        for part in (whole, points)
    )
    settings = [_numbers(varied[name], name, points) for name in names]
    effects = sampled_effects(inputs, values, at_points, settings)
    if not effects.sum() > 0:
        raise ValueError("no setting explains any variance")
    return dict(zip(names, (effects / effects.sum()).tolist(), strict=True))


def _random_points(varied: Mapping[str, Dimension], number: int) -> list[Trial]:
    """Return random points of the space of the settings that vary; conditions on others count as satisfied."""
    draw = random.Random(0)
    known = {dimension.name for dimension in varied.values()}
    space = {
        name: replace(dimension, when=tuple(one for one in dimension.when if one.name in known))
        for name, dimension in varied.items()
    }
    names = {dimension.name: name for name, dimension in space.items()}
    ordered = in_order(list(space.values()))
    points = []
    for count in range(number):
        point: dict[str, Any] = {}
        for dimension in ordered:
            if dimension.exists(point):
                point[dimension.name] = _random_value(dimension, draw)
        params = {names[name]: _value(space[names[name]], value) for name, value in point.items()}
        points.append(Trial(number=count, value=0.0, params=params, top1=None))
    return points


def _random_value(dimension: Dimension, draw: random.Random) -> Any:
    if dimension.type == "choice":
        return draw.choice(dimension.edges())
    if dimension.optional and draw.random() < 0.5:
        return None
    assert dimension.low is not None and dimension.high is not None
    step = dimension.step or (1 if dimension.type == "int" else None)
    if step is None:
        return draw.uniform(dimension.low, dimension.high)
    return dimension.low + step * draw.randint(0, int((dimension.high - dimension.low) / step + 1e-9))


def _filled(dimension: Dimension, name: str, trials: Sequence[Trial]) -> list[Any]:
    """Return the values of a setting, a constant where it does not exist."""
    constant = dimension.low if dimension.type != "choice" else ABSENT
    return [trial.params.get(name, constant) for trial in trials]


def _numbers(dimension: Dimension, name: str, points: Sequence[Trial]) -> np.ndarray:
    """Return the values of a setting as numbers, a choice by its index; NaN where it does not exist."""
    indices = {repr(value): index for index, value in enumerate(_choices(dimension))}
    found = [trial.params.get(name, math.nan) for trial in points]
    is_choice = dimension.type == "choice"
    return np.array([indices.get(repr(value), math.nan) if is_choice else value for value in found], dtype=float)


def _values(name: str, trials: Sequence[Trial]) -> list[Any]:
    return [trial.params[name] for trial in trials]


def _columns(dimension: Dimension, values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a setting as columns of numbers, and the bounds of each column."""
    if dimension.type == "choice":
        choices = _choices(dimension)
        columns = np.array([[float(repr(value) == repr(choice)) for choice in choices] for value in values])
        return columns, np.tile([0.0, 1.0], (len(choices), 1))
    return np.array(values, dtype=float)[:, None], np.array([_bounds(dimension)], dtype=float)
