"""Accuracy against measured latency: the exported students of a leaderboard next to the float networks."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas

from synq.common.text_tables import Row, plural

from ..leaderboard.ranking import Standing
from .drawing import COLORS, LEAST_TRIALS, WIDTH, draw, too_few
from .page import Block, Gap, Table
from .tool_points import FLOAT, ToolPoint

TITLE = "Accuracy against latency"
COLUMNS = ("model", "student", "target", "latency_ms", "latency_ratio", "top1_mean", "objective_value")
HEADINGS = {
    "latency_ms": "latency [ms]",
    "latency_ratio": "latency / float",
    "top1_mean": "top-1",
    "objective_value": "objective",
}


def accuracy_over_latency(standings: Sequence[Standing], tools: Sequence[ToolPoint] = ()) -> list[Block]:
    """Return a figure of top-1 against the latency relative to float, and a table of the same points.

    Each setting with a stable latency (``synq export``) is a point, and so is each float network. Below `LEAST_TRIALS`
    settings there is no figure, and without any latency nothing.

    Args:
        standings: The settings.
        tools: Files of other quantization tools; those of a model and engine that a setting has are points too. No
            record has them, so they come from a file that the user names.

    Raises:
        ValueError: There are tools, but none of a model and engine of an exported setting.
    """
    rows = [standing.row for standing in standings if standing.row["latency_ratio"] is not None]
    others = [tool for tool in tools if any(tool.fits(row["model"], row["act_points"]) for row in rows)]
    if tools and not others:
        have = sorted({f"{row['model']} for {row['act_points']}" for row in rows})
        raise ValueError(
            f"`tools` must have a file of a model and engine of the exported runs ({', '.join(have) or 'none'}), but "
            f"has {', '.join(sorted({f'{tool.model} for {tool.target}' for tool in tools}))}"
        )
    if not rows:
        return []
    points = [*_floats(rows), *(_tool_point(tool) for tool in others), *(_point(row) for row in rows)]
    caption = (
        f"{len(rows)} exported settings, and the float network of each model: latency of one image in the engine of "
        "the target on the machine of its export, where float was timed in turns with it."
    )
    table = Table(
        name="latency",
        title="Latency of exported runs",
        caption=caption,
        columns=[column for column in COLUMNS if any(point.get(column) is not None for point in points)],
        rows=points,
        headings=HEADINGS,
        bold=[point["student"] == FLOAT for point in points],
    )
    labeled = [row for row in rows if row["top1_mean"] is not None]
    if not labeled:
        return [Gap(title=TITLE, reason="no exported run was evaluated on labeled images"), table]
    if len(labeled) < LEAST_TRIALS:
        return [Gap(title=TITLE, reason=too_few(len(labeled))), table]
    series: dict[str, list[Row]] = defaultdict(list)
    for row in labeled:
        series[f"{row['model']} {row['act_points']}"].append(row)

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (name, part) in enumerate(series.items()):
            color = COLORS[i % len(COLORS)]
            axes.scatter(
                [row["latency_ratio"] for row in part],
                [row["top1_mean"] for row in part],
                s=16,
                alpha=0.6,
                color=color,
                label=f"{name} (n = {len(part)})",
            )
            axes.scatter([1.0], [part[0]["teacher_top1"]], marker="*", s=80, color=color)
            for tool in (tool for tool in others if tool.fits(part[0]["model"], part[0]["act_points"])):
                axes.scatter([tool.latency_ratio], [tool.top1], marker="x", s=40, color=color)
                axes.annotate(
                    tool.name, (tool.latency_ratio, tool.top1), fontsize=7, textcoords="offset points", xytext=(4, 4)
                )
        axes.set(xlabel="latency relative to float", ylabel="top-1 [%]")
        canvas.legend(loc="outside lower center", fontsize=8)

    text = f"One dot for each of {len(labeled)} exported settings; stars: the float networks, at 1."
    if others:
        text += f" Crosses: {plural(len(others), 'file')} of other tools, timed where their results were made."
    return [draw("latency", TITLE, text, plot, (WIDTH, 3.0 + 0.14 * len(series))), table]


def _point(row: Row) -> Row:
    bits = f"W{row['weight_bits']}A{row['act_bits']}"
    return {
        "model": row["model"],
        "student": f"{bits} ({row['layer_bits']})" if row["layer_bits"] else bits,
        "target": row["act_points"],
        **{key: row[key] for key in ("latency_ms", "latency_ratio", "top1_mean", "objective_value")},
    }


def _tool_point(tool: ToolPoint) -> Row:
    return {
        "model": tool.model,
        "student": tool.name,
        "target": tool.target,
        "latency_ratio": tool.latency_ratio,
        "top1_mean": tool.top1,
    }


def _floats(rows: Sequence[Row]) -> list[Row]:
    """Return one point for the float network of each model and target."""
    found: dict[tuple[object, object], Row] = {}
    for row in rows:
        point = {
            "model": row["model"],
            "student": FLOAT,
            "target": row["act_points"],
            "latency_ms": row["float_latency_ms"],
            "latency_ratio": 1.0,
            "top1_mean": row["teacher_top1"],
        }
        found.setdefault((row["model"], row["act_points"]), point)
    return list(found.values())
