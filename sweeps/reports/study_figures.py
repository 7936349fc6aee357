"""Optuna's figures of a search: history, importances, parallel coordinates, slices.

No other file of the reports uses Optuna.

The study is rebuilt from plans and records, so that any sweep can have a page at any time, without Optuna's storage.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.colors import ListedColormap
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from synq.runs.record import RunRecord

from ..space import Dimension, value_of
from ..state.plans import Plan
from .drawing import failed, finish, style
from .page import Figure, Gap, slug

STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
OFF_MARGIN = 0.15
"""An optional range encodes "off" above its upper bound, by this fraction of the range."""
LEAST_TRIALS = 3
Plot = Callable[..., Any]


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
    varied = [name for name in _names(dimensions) if len({repr(trial.params.get(name)) for trial in done}) > 1]
    heading, suffix = f"{group}: ", slug(group)
    count = f"n = {len(done)} completed trials"
    if len(done) < LEAST_TRIALS or not varied:
        reason = (
            f"it takes {LEAST_TRIALS} completed trials that differ in a searched setting; this search has {len(done)}"
        )
        return [Gap(title=f"{heading}effect of the settings", reason=reason)]
    same = len({trial.value for trial in done}) == 1
    plots = optuna.visualization.matplotlib
    figures: list[Figure | Gap] = [
        _figure(
            functools.partial(plots.plot_optimization_history, study, target_name=objective),
            f"history-{suffix}",
            f"{heading}optimization history",
            f"Objective of each completed trial in order of proposal, and best value so far; {count}.",
        ),
        _figure(
            functools.partial(plots.plot_parallel_coordinate, study, params=varied, target_name=objective),
            f"parallel-{suffix}",
            f"{heading}parallel coordinates",
            f"One line through the settings of each completed trial, dark for a good objective; {count}."
            f"{_off_note(dimensions)}",
            size=(1.5 * len(varied) + 2.2, 4.0),
            grid=False,
        ),
        _figure(
            functools.partial(plots.plot_slice, study, params=varied, target_name=objective),
            f"slices-{suffix}",
            f"{heading}objective against each setting",
            f"Objective against one setting at a time, with the others as sampled; shade: order of the trials; {count} "
            f"(paper, Fig. 7).{_off_note(dimensions)}",
            size=(2.3 * len(varied) + 0.8, 3.2),
        ),
    ]
    if all("top1" in trial.user_attrs for trial in done):
        figures.append(
            _figure(
                functools.partial(plots.plot_slice, study, params=varied, target=_top1, target_name="top-1 [%]"),
                f"slices-top1-{suffix}",
                f"{heading}top-1 against each setting",
                "The same for top-1 on the labeled images, which the search does not use unless its objective is "
                f"`selection`; {count}.",
                size=(2.3 * len(varied) + 0.8, 3.2),
            )
        )
    if same:
        figures.insert(
            1, Gap(title=f"{heading}importance of the settings", reason="all trials have the same objective")
        )
        return figures
    importance = _figure(
        functools.partial(
            plots.plot_param_importances,
            study,
            params=varied,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        ),
        f"importance-{suffix}",
        f"{heading}importance of the settings",
        "Share of the objective's variance that each setting explains individually (fANOVA, main effects only, "
        f"normalized to sum 1); {count}. Unreliable with fewer than about twenty trials.",
        size=(6.4, 1.2 + 0.35 * len(varied)),
    )
    figures.insert(1, importance)
    return figures


def _figure(
    plot: Plot, name: str, title: str, caption: str, size: tuple[float, float] = (6.4, 3.4), grid: bool = True
) -> Figure | Gap:
    """Draw with a function of Optuna; figures that it opens in pyplot are closed."""
    from matplotlib import pyplot

    backend, before = pyplot.get_backend(), set(pyplot.get_fignums())
    pyplot.switch_backend("agg")  # a machine with a display would open a window
    try:
        with style(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's experimental features, and Matplotlib's deprecations in them
            axes = plot()
            canvas = axes.figure if hasattr(axes, "figure") else axes.flatten()[0].figure
            canvas.set_size_inches(*size)
            canvas.suptitle("")
            for one in canvas.axes:
                for side in ("left", "center"):
                    one.set_title("", loc=side)
                one.grid(grid)
                for drawn in one.collections:
                    if drawn.get_cmap().name.startswith("Blues"):  # whose first colors are almost invisible on white
                        shades = np.linspace(0.35, 1.0, 256)
                        back = shades[::-1] if drawn.get_cmap().name.endswith("_r") else shades
                        drawn.set_cmap(ListedColormap(matplotlib.colormaps["Blues"](back)))
            return finish(canvas, name, title, caption, tight=True)
    except Exception as error:  # as in `draw`
        return failed(title, error)
    finally:
        for number in set(pyplot.get_fignums()) - before:
            pyplot.close(number)
        if backend.lower() != "agg":
            pyplot.switch_backend(backend)


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


def _top1(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["top1"])


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
