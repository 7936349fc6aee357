"""Optuna's own drawings of a search: what its parameters did. The only file of the reports that knows Optuna.

The study is rebuilt from plans and records, so that a page can be made of any sweep at any time, without its storage.
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
BEYOND = 0.15
"""A range's value for "off" lies this share of it beyond its upper end."""
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
        group: Its key.
        dimensions: The search space; empty where the trials were a list of points.
        trials: Its ended trials.
        minimize: Whether a lower objective is better.
        objective: Name of the objective, for the axes.
    """
    study = _study(dimensions, trials, minimize)
    done = study.get_trials(states=[TrialState.COMPLETE])
    varied = [name for name in _names(dimensions) if len({repr(trial.params.get(name)) for trial in done}) > 1]
    head, place = f"{group}: ", slug(group)
    count = f"n = {len(done)} completed trials"
    if len(done) < LEAST_TRIALS or not varied:
        reason = (
            f"it takes {LEAST_TRIALS} completed trials that differ in a searched setting; this search has {len(done)}"
        )
        return [Gap(title=f"{head}what the settings did", reason=reason)]
    same = len({trial.value for trial in done}) == 1
    plots = optuna.visualization.matplotlib
    figures: list[Figure | Gap] = [
        _figure(
            functools.partial(plots.plot_optimization_history, study, target_name=objective),
            f"history-{place}",
            f"{head}the search's course",
            f"Objective of each completed trial in the order of proposal, and the best so far; {count}.",
        ),
        _figure(
            functools.partial(plots.plot_parallel_coordinate, study, params=varied, target_name=objective),
            f"parallel-{place}",
            f"{head}settings together",
            f"A line for each completed trial through its settings, dark where the objective is good; {count}.{_offs(dimensions)}",
            size=(1.5 * len(varied) + 2.2, 4.0),
            grid=False,
        ),
        _figure(
            functools.partial(plots.plot_slice, study, params=varied, target_name=objective),
            f"slices-{place}",
            f"{head}sensitivity to each setting",
            f"Objective against one setting at a time, the others as they came; shade: order of the trials; {count} (paper, Fig. 7).{_offs(dimensions)}",
            size=(2.3 * len(varied) + 0.8, 3.2),
        ),
    ]
    if all("top1" in trial.user_attrs for trial in done):
        figures.append(
            _figure(
                functools.partial(plots.plot_slice, study, params=varied, target=_top1, target_name="top-1 [%]"),
                f"slices-top1-{place}",
                f"{head}top-1 against each setting",
                f"The same with top-1 on the labeled images, which the search did not see unless its objective is `selection`; {count}.",
                size=(2.3 * len(varied) + 0.8, 3.2),
            )
        )
    if same:
        figures.insert(1, Gap(title=f"{head}importance of the settings", reason="all trials have the same objective"))
        return figures
    importance = _figure(
        functools.partial(
            plots.plot_param_importances,
            study,
            params=varied,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        ),
        f"importance-{place}",
        f"{head}importance of the settings",
        "What each setting explains of the objective's variance by itself, as a share of what all of them do (fANOVA; the bars add up to 1, what settings do "
        f"together is left out); {count}. With fewer than some twenty trials it says little.",
        size=(6.4, 1.2 + 0.35 * len(varied)),
    )
    figures.insert(1, importance)
    return figures


def _figure(
    plot: Plot, name: str, title: str, caption: str, size: tuple[float, float] = (6.4, 3.4), grid: bool = True
) -> Figure | Gap:
    """Draw with one of Optuna's functions, which use Matplotlib's global state: what they open is closed again."""
    from matplotlib import pyplot

    backend, before = pyplot.get_backend(), set(pyplot.get_fignums())
    pyplot.switch_backend("agg")  # a machine with a display would open a window
    try:
        with style(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Optuna about itself, and of Matplotlib about Optuna's calls
            axes = plot()
            canvas = axes.figure if hasattr(axes, "figure") else axes.flatten()[0].figure
            canvas.set_size_inches(*size)
            canvas.suptitle("")
            for one in canvas.axes:
                for side in ("left", "center"):
                    one.set_title("", loc=side)
                one.grid(grid)
                for drawn in one.collections:
                    if drawn.get_cmap().name.startswith("Blues"):  # whose first colors are hardly seen on white
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
    # A sweep extended by points of its own may hold values beyond the ranges it began with.
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
    """Short names: the last part where no other dimension has it."""
    last = [dimension.name.rpartition(".")[2] for dimension in dimensions]
    return [
        short if last.count(short) == 1 else dimension.name for short, dimension in zip(last, dimensions, strict=True)
    ]


def _off(dimension: Dimension) -> float | int:
    """The number that stands for "off" of an optional range: a little beyond its upper end."""
    assert dimension.low is not None and dimension.high is not None
    if dimension.log:
        off = dimension.high * (dimension.high / dimension.low) ** BEYOND
    else:
        off = dimension.high + BEYOND * (dimension.high - dimension.low)
    return round(off) + 1 if dimension.type == "int" else float(f"{off:.3g}")


def _offs(dimensions: Sequence[Dimension]) -> str:
    words = [f"{dimension.name} {_off(dimension):g} stands for off" for dimension in dimensions if dimension.optional]
    return f" {'; '.join(words)}." if words else ""


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
