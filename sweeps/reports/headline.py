"""Chart at the head of a page: the accuracy of teacher and student, and of the student before fine-tuning."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from synq.common.text_tables import plural
from synq.runs.record import RunRecord

from ..leaderboard.ranking import Standing
from .drawing import COLORS, WIDTH, cap_percent, draw, thinned
from .page import Figure
from .summary import label, leaders

MOST_RANKINGS = 12
"""Most rankings in the chart of a sweep."""
SOFT = "#4f5d73"
TEACHER: Any = {"marker": "|", "color": SOFT, "s": 160, "linewidths": 2, "label": "teacher"}
BEFORE: Any = {
    "marker": "o", "facecolors": "none", "edgecolors": COLORS[1], "s": 40, "label": "before fine-tuning",
}  # fmt: skip
STUDENT: Any = {"marker": "o", "color": COLORS[0], "s": 50, "label": "student"}
OTHERS: Any = {"marker": "o", "color": "#9aa7b5", "s": 10, "label": "other settings"}


def run_chart(record: RunRecord) -> Figure | None:
    """Return a chart of a run's accuracy, or without labels of its agreement with the teacher; None without either."""
    if record.top1 is not None:
        values = {"teacher": record.teacher_top1, "before fine-tuning": record.rtn_top1, "student": record.top1}
        axis, caption = "top-1 [%]", f"Top-1 on {record.num_eval} labeled images."
        if record.drop_stderr is not None:
            caption += " Bar: standard error of the difference from the teacher."
    else:
        values = {
            "before fine-tuning": record.rtn_fidelity.get("agreement"),
            "student": record.fidelity.get("agreement"),
        }
        axis, caption = "agreement with the teacher [%]", "Predicted classes on held-out synthetic images."
    known = {name: value for name, value in values.items() if value is not None}
    if "student" not in known:
        return None

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, (name, value) in enumerate(known.items()):
            axes.scatter([value], [place], **{one["label"]: one for one in (TEACHER, BEFORE, STUDENT)}[name])
            axes.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points", ha="center")
            if name == "student" and record.top1 is not None and record.drop_stderr is not None:
                axes.errorbar(value, place, xerr=record.drop_stderr, color=COLORS[0], capsize=2)
        axes.set_yticks(range(len(known)), list(known))
        axes.margins(x=0.1)
        axes.set(xlabel=axis, ylim=(len(known) - 0.5, -0.9))

    return _drawn("Student and teacher", caption, plot, 0.8 + 0.36 * len(known))


def sweep_chart(standings: Sequence[Standing]) -> Figure | None:
    """Return a chart of the best setting of each ranking; without labels of its objective; None without a result."""
    best = leaders(standings)[:MOST_RANKINGS]
    if not best:
        return None
    labeled = all(standing.row["top1_mean"] is not None for standing in best)
    key = "top1_mean" if labeled else "objective_value"
    rest = [[s.row[key] for s in standings if s.ranking == one.ranking and s is not one] for one in best]

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, (standing, others) in enumerate(zip(best, rest, strict=True)):
            row = standing.row
            axes.axhline(place, color="#e5e9ee", linewidth=1, zorder=0)
            found = [value for value in others if value is not None]
            found = thinned(found, found)
            axes.scatter(found, [place] * len(found), **OTHERS)
            if labeled:
                axes.scatter([row["teacher_top1"]], [place], **TEACHER)
                if row["rtn_top1"] is not None:
                    axes.scatter([row["rtn_top1"]], [place], **BEFORE)
            axes.scatter([row[key]], [place], **{**STUDENT, "label": "best setting"}, zorder=3)
            number = f"{row[key]:.2f}, drop {row['drop']:.2f}" if labeled else f"{row[key]:.4g}"
            text = f"{label(standing)}: {number}"
            axes.annotate(text, (0, place), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="top-1 [%]" if labeled else "objective", ylim=(len(best) - 0.6, -0.9))
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, columnspacing=1)
        _widen(axes)
        if labeled:
            cap_percent(axes, "x")

    caption = f"Best setting of {plural(len(best), 'ranking')}, {plural(len(standings), 'setting')} in total."
    if not labeled:
        caption += " No labeled images: the objective instead of accuracy."
    return _drawn("Best settings", caption, plot, 1.0 + 0.45 * len(best))


def overall(standings: Sequence[Standing]) -> list[str]:
    """Return the result of a sweep of several rankings in one sentence; none for one ranking."""
    best = leaders(standings)
    drops = sorted(
        ((one.row["drop"], label(one)) for one in best if one.row["drop"] is not None), key=lambda pair: pair[0]
    )
    if len(best) < 2 or len(drops) < len(best):
        return []
    (low, first), (high, last) = drops[0], drops[-1]
    return [
        f"The best settings of {len(best)} rankings lose between {low:.2f} ({first}) and {high:.2f} ({last}) "
        "percentage points of top-1."
    ]


def _widen(axes: Axes) -> None:
    """Leave room for the numbers at the right."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.14 * (high - low))


def _drawn(title: str, caption: str, plot: Any, height: float) -> Figure | None:
    figure = draw("headline", title, caption, plot, (WIDTH, height))
    return figure if isinstance(figure, Figure) else None
