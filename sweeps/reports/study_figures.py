"""Figures of a search: history, importances, parallel coordinates, slices.

No other file of the reports uses Optuna, which computes the importances. The study is rebuilt from plans and records,
so that any sweep can have a page at any time, without Optuna's storage.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from synq.runs.record import RunRecord

from ..space import Dimension, value_of
from ..state.plans import Plan
from .drawing import COLORS, LEAST_TRIALS, WIDTH, draw, panels, too_few
from .page import Figure, Gap, slug

STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
OFF_MARGIN = 0.15
"""An optional range encodes "off" above its upper bound, by this fraction of the range."""
LEAST_HISTORY = 2
"""Fewest trials for a history."""
MOST_LABELS = 5
"""Most labels of choices on one axis of the parallel coordinates."""


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
    study = _study(dimensions, trials, minimize)
    done = study.get_trials(states=[TrialState.COMPLETE])
    searched = dict(zip(_names(dimensions), dimensions, strict=True))
    varied = {
        name: dimension
        for name, dimension in searched.items()
        if len({repr(trial.params.get(name)) for trial in done}) > 1
    }
    suffix = slug(group)
    count = f"n = {len(done)} completed trials"
    objective += ", lower is better" if minimize else ", higher is better"
    figures: list[Figure | Gap] = []
    if len(done) >= LEAST_HISTORY:
        figures.append(
            draw(
                f"history-{suffix}",
                "Optimization history",
                f"Objective of each completed trial in order of proposal, and best value so far; {count}.",
                lambda canvas: _history(canvas, done, objective, minimize),
            )
        )
    title = "Effect of the settings"
    if len(done) < LEAST_TRIALS:
        return [*figures, Gap(title=title, reason=too_few(len(done)))]
    if not varied:
        return [*figures, Gap(title=title, reason="the completed trials do not differ in a searched setting")]
    figures += [
        _importance(study, list(varied), f"importance-{suffix}", "Importance of the settings", count),
        draw(
            f"parallel-{suffix}",
            "Parallel coordinates",
            f"One line through the objective and the settings of each completed trial, strong color for a good "
            f"objective; {count}.{_off_note(dimensions)}",
            lambda canvas: _parallel(canvas, done, varied, objective, minimize),
            (WIDTH, 1.0 + 0.62 * (len(varied) + 1)),
        ),
        draw(
            f"slices-{suffix}",
            "Objective against each setting",
            f"Objective against one setting at a time, with the others as sampled; color: order of the trials; {count} "
            f"(paper, Fig. 7).{_off_note(dimensions)}",
            lambda canvas: _slices(canvas, done, varied, _objective, objective),
            _slices_size(len(varied)),
        ),
    ]
    if all("top1" in trial.user_attrs for trial in done):
        figures.append(
            draw(
                f"slices-top1-{suffix}",
                "Top-1 against each setting",
                "The same for top-1 on the labeled images, which the search does not use unless its objective is "
                f"`selection`; {count}.",
                lambda canvas: _slices(canvas, done, varied, _top1, "top-1 [%]"),
                _slices_size(len(varied)),
            )
        )
    return figures


def _objective(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _top1(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["top1"])


def _history(canvas: Canvas, done: Sequence[FrozenTrial], objective: str, minimize: bool) -> None:
    axes = canvas.subplots()
    numbers, values = [trial.number for trial in done], [_objective(trial) for trial in done]
    best = (np.minimum if minimize else np.maximum).accumulate(values)
    axes.plot(numbers, values, "o", markersize=4, label="trial")
    axes.step(numbers, best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.legend(loc="outside lower center", ncols=2)


def _importance(study: optuna.Study, names: list[str], file: str, title: str, count: str) -> Figure | Gap:
    if len({trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])}) == 1:
        return Gap(title=title, reason="all trials have the same objective")

    def plot(canvas: Canvas) -> None:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's experimental features
            found = optuna.importance.get_param_importances(study, params=names, evaluator=evaluator)
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
    return draw(file, title, caption, plot, (WIDTH, 0.9 + 0.3 * len(names)))


def _shades() -> ListedColormap:
    """Return blues without the lightest, which are almost invisible on white."""
    return ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.35, 1.0, 256)))


def _position(dimension: Dimension, value: Any) -> float:
    """Return the place of a value on a linear axis: its index among the choices, or its logarithm."""
    if dimension.type == "choice":
        return float([repr("none" if one is None else one) for one in dimension.values].index(repr(value)))
    return float(np.log10(value)) if dimension.log else float(value)


def _parallel(
    canvas: Canvas, done: Sequence[FrozenTrial], varied: dict[str, Dimension], objective: str, minimize: bool
) -> None:
    """Draw one horizontal axis for the objective and for each setting, below one another."""
    axes = canvas.subplots()
    values = np.array([_objective(trial) for trial in done])
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
    for i in np.argsort(shades):
        axes.plot([row[i] for row in rows], positions, color=_shades()(shades[i]), linewidth=1, alpha=0.8)
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
    done: Sequence[FrozenTrial],
    varied: dict[str, Dimension],
    target: Callable[[FrozenTrial], float],
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


def _study(dimensions: Sequence[Dimension], trials: Iterable[tuple[Plan, RunRecord]], minimize: bool) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if minimize else "maximize")
    ranges = dict(zip(_names(dimensions), map(_distribution, dimensions), strict=True))
    for plan, record in trials:
        values = [_value(dimension, value_of(plan.config, dimension.name)) for dimension in dimensions]
        params = dict(zip(ranges, values, strict=True))
        state = STATES[record.status]
        if state == TrialState.COMPLETE and record.objective_value is None:
            continue
        study.add_trial(_trial(params, ranges, state, plan, record))
    return study


def _trial(
    params: dict[str, Any], ranges: dict[str, BaseDistribution], state: TrialState, plan: Plan, record: RunRecord
) -> FrozenTrial:
    # A sweep extended by listed points may have values outside the ranges of its search space.
    kept = {
        name: value for name, value in params.items() if ranges[name]._contains(ranges[name].to_internal_repr(value))
    }
    attributes = {"trial": plan.trial} | ({} if record.top1 is None else {"top1": record.top1})
    return optuna.trial.create_trial(
        state=state,
        value=record.objective_value if state == TrialState.COMPLETE else None,
        params=kept,
        distributions={name: ranges[name] for name in kept},
        user_attrs=attributes,
        intermediate_values=dict(plan.history),
    )


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
    if value is None:
        return _off(dimension) if dimension.optional else "none"
    return value


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.type == "choice":
        return CategoricalDistribution(["none" if value is None else value for value in dimension.values])
    assert dimension.low is not None and dimension.high is not None
    high = _off(dimension) if dimension.optional else dimension.high
    if dimension.type == "int":
        return IntDistribution(int(dimension.low), int(high), log=dimension.log)
    return FloatDistribution(dimension.low, high, log=dimension.log)
