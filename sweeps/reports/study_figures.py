"""Figures of a search: history, importances, parallel coordinates, slices.

The trials are those of plans and records, so that any sweep can have a page at any time, without Optuna's storage.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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

from ..constraints import Constraint, constraints_text
from ..space import Dimension
from ..state.plans import Plan
from .drawing import COLORS, LEAST_TRIALS, WIDTH, draw, panels, thinned, thinned_note, too_few
from .page import Figure, Gap, slug
from .study_trials import Trial, completed, importances, off_note, short_names

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
    constraints: Sequence[Constraint] = (),
) -> list[Figure | Gap]:
    """Return history, importances, parallel coordinates and slices of one group's search.

    Args:
        group: Key of the group.
        dimensions: The search space; empty if the trials were a list of points.
        trials: The finished trials of the group.
        minimize: Whether a lower objective is better.
        objective: Axis label of the objective.
        constraints: Bounds that the best trial satisfies.
    """
    done = completed(dimensions, trials, constraints)
    searched = dict(zip(short_names(dimensions), dimensions, strict=True))
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
                f"Objective of each completed trial in order of proposal, and best value so far; {some}."
                + (f" Best: of trials that satisfy {constraints_text(constraints)}." if constraints else ""),
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
            f"objective; {some}.{off_note(dimensions)}",
            lambda canvas: _parallel(canvas, drawn, varied, objective, minimize),
            (WIDTH, 1.0 + 0.62 * (len(varied) + 1)),
        ),
        draw(
            f"slices-{suffix}",
            "Objective against each setting",
            f"Objective against one setting at a time, with the others as sampled; color: order of the trials; {some} "
            f"(paper, Fig. 7).{off_note(dimensions)}",
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
    numbers = [trial.number for trial in done]
    never = np.inf if minimize else -np.inf
    counted = [trial.value if trial.is_feasible else never for trial in done]
    best = (np.minimum if minimize else np.maximum).accumulate(counted)
    best[np.isinf(best)] = np.nan
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

    def plot(canvas: Canvas) -> None:
        shares = importances(varied, [trial for trial in done if np.isfinite(trial.value)])
        found = dict(sorted(shares.items(), key=lambda pair: -pair[1]))
        axes = canvas.subplots()
        bars = axes.barh(list(found), list(found.values()), height=0.6)
        axes.bar_label(bars, [f"{value:.2f}" for value in found.values()], padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="share of the objective's variance", xlim=(0, 1.12))
        axes.grid(axis="y", visible=False)

    conditional = [name for name, dimension in varied.items() if dimension.when]
    caption = (
        "Share of the objective's variance that each setting explains individually (fANOVA, main effects only, "
        f"normalized to sum 1); {count}. Unreliable with fewer than about twenty trials."
    )
    if conditional:
        who = ", ".join(conditional)
        caption += f" Measured where they exist, times the share of the search space in which they do: {who}."
    return draw(file, title, caption, plot, (WIDTH, 0.9 + 0.3 * len(varied)))


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
