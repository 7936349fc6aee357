"""Figures of a search: history, importances, parallel coordinates, slices.

The trials are those of plans and records, so that any sweep can have a page at any time, without Optuna's storage.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from synq.runs.record import RunRecord

from ..space import Dimension, value_of
from ..state.plans import Plan
from .drawing import COLORS, LEAST_TRIALS, WIDTH, draw, panels, thinned, thinned_note, too_few
from .importance import main_effects
from .page import Figure, Gap, slug

OFF_MARGIN = 0.15
"""An optional range encodes "off" above its upper bound, by this fraction of the range."""
LEAST_HISTORY = 2
"""Fewest trials for a history."""
MOST_LABELS = 5
"""Most labels of choices on one axis of the parallel coordinates."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Completed trial of a search.

    Attributes:
        number: Place of the trial among the finished ones, in order of proposal, from 0.
        value: Its objective.
        params: Its settings by short name, without those outside the ranges of the search space.
        top1: Its top-1 in percent; None without labels.
    """

    number: int
    value: float
    params: Mapping[str, Any]
    top1: float | None


def study_figures(
    group: str,
    dimensions: Sequence[Dimension],
    trials: Iterable[tuple[Plan, RunRecord]],
    *,
    minimize: bool,
    objective: str,
) -> list[Figure | Gap]:
    """Return history, importances, parallel coordinates and slices of one group's search.

    Args:
        group: Key of the group.
        dimensions: The search space; empty if the trials were a list of points.
        trials: The finished trials of the group.
        minimize: Whether a lower objective is better.
        objective: Axis label of the objective.
    """
    done = _completed(dimensions, trials)
    searched = dict(zip(_names(dimensions), dimensions, strict=True))
    varied = {
        name: dimension
        for name, dimension in searched.items()
        if len({repr(trial.params.get(name)) for trial in done}) > 1
    }
    suffix = slug(group)
    count = f"n = {len(done)} completed trials"
    drawn = thinned(done, [trial.value for trial in done])
    some = f"{count}{thinned_note(len(drawn), len(done))}"
    objective += ", lower is better" if minimize else ", higher is better"
    figures: list[Figure | Gap] = []
    if len(done) >= LEAST_HISTORY:
        figures.append(
            draw(
                f"history-{suffix}",
                "Optimization history",
                f"Objective of each completed trial in order of proposal, and best value so far; {some}.",
                lambda canvas: _history(canvas, done, drawn, objective, minimize),
            )
        )
    title = "Effect of the settings"
    if len(done) < LEAST_TRIALS:
        return [*figures, Gap(title=title, reason=too_few(len(done)))]
    if not varied:
        return [*figures, Gap(title=title, reason="the completed trials do not differ in a searched setting")]
    figures += [
        _importance(done, varied, f"importance-{suffix}", "Importance of the settings", count),
        draw(
            f"parallel-{suffix}",
            "Parallel coordinates",
            f"One line through the objective and the settings of each completed trial, strong color for a good "
            f"objective; {some}.{_off_note(dimensions)}",
            lambda canvas: _parallel(canvas, drawn, varied, objective, minimize),
            (WIDTH, 1.0 + 0.62 * (len(varied) + 1)),
        ),
        draw(
            f"slices-{suffix}",
            "Objective against each setting",
            f"Objective against one setting at a time, with the others as sampled; color: order of the trials; {some} "
            f"(paper, Fig. 7).{_off_note(dimensions)}",
            lambda canvas: _slices(canvas, drawn, varied, _objective, objective),
            _slices_size(len(varied)),
        ),
    ]
    if all(trial.top1 is not None for trial in done):
        figures.append(
            draw(
                f"slices-top1-{suffix}",
                "Top-1 against each setting",
                "The same for top-1 on the labeled images, which the search does not use unless its objective is "
                f"`selection`; {some}.",
                lambda canvas: _slices(canvas, drawn, varied, _top1, "top-1 [%]"),
                _slices_size(len(varied)),
            )
        )
    return figures


def _objective(trial: Trial) -> float:
    return trial.value


def _top1(trial: Trial) -> float:
    assert trial.top1 is not None
    return trial.top1


def _history(canvas: Canvas, done: Sequence[Trial], drawn: Sequence[Trial], objective: str, minimize: bool) -> None:
    axes = canvas.subplots()
    numbers, values = [trial.number for trial in done], [trial.value for trial in done]
    best = (np.minimum if minimize else np.maximum).accumulate(values)
    axes.plot([trial.number for trial in drawn], [trial.value for trial in drawn], "o", markersize=4, label="trial")
    if len(drawn) < len(done):  # a step only where the best value changes
        kept = [*np.flatnonzero(np.diff(best, prepend=np.nan) != 0).tolist(), len(best) - 1]
        numbers, best = [numbers[i] for i in kept], best[kept]
    axes.step(numbers, best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.legend(loc="outside lower center", ncols=2)


def _importance(
    done: Sequence[Trial], varied: Mapping[str, Dimension], file: str, title: str, count: str
) -> Figure | Gap:
    if len({trial.value for trial in done}) == 1:
        return Gap(title=title, reason="all trials have the same objective")
    whole = [trial for trial in done if varied.keys() <= trial.params.keys() and np.isfinite(trial.value)]

    def plot(canvas: Canvas) -> None:
        names = sorted(varied)
        parts = [_columns(varied[name], [trial.params[name] for trial in whole]) for name in names]
        columns, bounds = zip(*parts, strict=True)
        shares = main_effects(columns, bounds, np.array([trial.value for trial in whole])).tolist()
        found = dict(sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1]))
        axes = canvas.subplots()
        bars = axes.barh(list(found), list(found.values()), height=0.6)
        axes.bar_label(bars, [f"{value:.2f}" for value in found.values()], padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="share of the objective's variance", xlim=(0, 1.12))
        axes.grid(axis="y", visible=False)

    caption = (
        "Share of the objective's variance that each setting explains individually (fANOVA, main effects only, "
        f"normalized to sum 1); {count}. Unreliable with fewer than about twenty trials."
    )
    return draw(file, title, caption, plot, (WIDTH, 0.9 + 0.3 * len(varied)))


def _columns(dimension: Dimension, values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a setting as columns of numbers, and the bounds of each column."""
    if dimension.type == "choice":
        choices = _choices(dimension)
        columns = np.array([[float(repr(value) == repr(choice)) for choice in choices] for value in values])
        return columns, np.tile([0.0, 1.0], (len(choices), 1))
    return np.array(values, dtype=float)[:, None], np.array([_bounds(dimension)], dtype=float)


def _shades() -> ListedColormap:
    """Return blues without the lightest, which are almost invisible on white."""
    return ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.35, 1.0, 256)))


def _position(dimension: Dimension, value: Any) -> float:
    """Return the place of a value on a linear axis: its index among the choices, or its logarithm."""
    if dimension.type == "choice":
        return float([repr("none" if one is None else one) for one in dimension.values].index(repr(value)))
    return float(np.log10(value)) if dimension.log else float(value)


def _parallel(
    canvas: Canvas, done: Sequence[Trial], varied: dict[str, Dimension], objective: str, minimize: bool
) -> None:
    """Draw one horizontal axis for the objective and for each setting, below one another."""
    axes = canvas.subplots()
    values = np.array([trial.value for trial in done])
    shades = values.argsort().argsort() / max(1, len(values) - 1)
    shades = 1 - shades if minimize else shades
    rows = [_shares(values)]
    marks = [[(0.0, f"{values.min():.3g}"), (1.0, f"{values.max():.3g}")]]
    for name, dimension in varied.items():
        found = [trial.params.get(name) for trial in done]
        known = [_position(dimension, value) for value in found if value is not None]
        low, span = min(known), max(max(known) - min(known), 1e-12)
        rows.append(
            np.array([np.nan if v is None else (_position(dimension, v) - low) / span for v in found], dtype=float)
        )
        labels = {(_position(dimension, v) - low) / span: _short(v) for v in found if v is not None}
        shown = sorted(labels.items())
        choices = dimension.type == "choice" and len(shown) <= MOST_LABELS
        marks.append(shown if choices else [shown[0], shown[-1]])
    positions = np.arange(len(rows))
    order = np.argsort(shades)
    points = np.stack([np.stack([row[order] for row in rows], 1), np.tile(positions, (len(order), 1))], 2)
    axes.add_collection(LineCollection(list(points), colors=_shades()(shades[order]), linewidths=1, alpha=0.8))
    for place, name, ends in zip(positions, [objective, *varied], marks, strict=True):
        axes.axhline(float(place), color="#4f5d73", linewidth=0.8)
        axes.annotate(name, (0.5, place), (0, 5), textcoords="offset points", ha="center", **LABEL)
        for share, text in ends:
            side = "left" if share == 0 else "right" if share == 1 else "center"
            axes.annotate(text, (share, place), (0, -5), textcoords="offset points", ha=side, va="top", **LABEL)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    axes.set_axis_off()


LABEL: Any = {"fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}}
"""Style of a label over lines."""


def _shares(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.min()) / max(float(np.ptp(values)), 1e-300))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _slices_size(number: int) -> tuple[float, float]:
    return WIDTH, 0.9 + 1.9 * -(-number // 2)


def _slices(
    canvas: Canvas,
    done: Sequence[Trial],
    varied: dict[str, Dimension],
    target: Callable[[Trial], float],
    label: str,
) -> None:
    norm = Normalize(done[0].number, done[-1].number)
    colors = ScalarMappable(norm, _shades())
    axes_list = panels(canvas, len(varied), sharey=True)
    for axes, (name, dimension) in zip(axes_list, varied.items(), strict=True):
        part = [trial for trial in done if name in trial.params]
        positions = [trial.params[name] for trial in part]
        if dimension.type == "choice":
            positions = [_position(dimension, value) for value in positions]
            texts = [_short("none" if value is None else value) for value in dimension.values]
            axes.set_xticks(range(len(texts)), texts)
        else:
            _scale(axes, dimension)
        axes.scatter(
            positions, [target(trial) for trial in part], s=14, c=[trial.number for trial in part], norm=norm,
            cmap=colors.cmap, edgecolors=COLORS[5], linewidths=0.3,
        )  # fmt: skip
        axes.set_xlabel(name)
    canvas.supylabel(label, fontsize=9)
    canvas.colorbar(
        colors, ax=axes_list, location="bottom", label="trial", aspect=40, ticks=MaxNLocator(6, integer=True)
    )


def _scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=dimension.type == "int"))


def _completed(dimensions: Sequence[Dimension], trials: Iterable[tuple[Plan, RunRecord]]) -> list[Trial]:
    """Return the completed trials that have an objective, numbered among all that ended."""
    names, found, number = _names(dimensions), [], 0
    for plan, record in trials:
        done = record.status == "completed"
        if done and record.objective_value is None:
            continue
        if done and record.objective_value is not None:
            values = [_value(dimension, value_of(plan.config, dimension.name)) for dimension in dimensions]
            # A sweep extended by listed points may have values outside the ranges of its search space.
            params = {
                name: value
                for name, dimension, value in zip(names, dimensions, values, strict=True)
                if _contains(dimension, value)
            }
            top1 = None if record.top1 is None else float(record.top1)
            found.append(Trial(number=number, value=float(record.objective_value), params=params, top1=top1))
        number += 1
    return found


def _contains(dimension: Dimension, value: Any) -> bool:
    if dimension.type == "choice":
        return any(repr(value) == repr(choice) for choice in _choices(dimension))
    low, high = _bounds(dimension)
    return low <= value <= high


def _names(dimensions: Sequence[Dimension]) -> list[str]:
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


def _off_note(dimensions: Sequence[Dimension]) -> str:
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
