"""Figures of a sweep from its records: objective against top-1, accuracy against cost, timeline of the trials."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from synq.common.text_tables import Row
from synq.runs.record import FAILURES, RunRecord

from ..leaderboard.ranking import Standing
from ..stats import rank_correlation
from .drawing import COLORS, LEAST_TRIALS, WIDTH, cap_percent, draw, panels, thinned, thinned_note, too_few
from .page import Figure, Gap

NUM_BOOTSTRAP = 2000
BOOTSTRAP_BLOCK = 200_000
"""Most values of the bootstrap samples that are ranked at once, a bound of the memory."""
MOST_SERIES = 12
"""Most series in a legend."""
MOST_LABELED_SERIES = 4
"""Most series for which the settings on the Pareto front are labeled; more labels would overlap."""
MOST_LANES = 40
"""Most lanes of a timeline."""
UNITS = {"size_bytes": ("size of the parameters [KiB]", 1024.0), "bitops": ("BitOps per image [G]", 1e9)}
STATUS_COLORS: dict[str, str] = {
    "completed": COLORS[0],
    "pruned": "#b9c3cf",
    **dict(zip(FAILURES, COLORS[1:], strict=False)),
}
MARKERS = "osD^vPX*"


def rank_agreement(trials: Sequence[tuple[float, float]], *, minimize: bool) -> tuple[float, float, float] | None:
    """Return Spearman's rank correlation of (objective, top-1) pairs and its 95 % bootstrap interval.

    Args:
        trials: Pairs of objective and top-1.
        minimize: Whether a lower objective is better; +1 then means that the lowest objective has the highest top-1.

    Returns:
        (rho, low, high), or None for fewer than LEAST_TRIALS pairs or if objective or top-1 is constant.
    """
    if len(trials) < LEAST_TRIALS:
        return None
    scores, top1 = np.array(trials, dtype=float).T
    scores = -scores if minimize else scores
    if scores.min() == scores.max() or top1.min() == top1.max():
        return None
    random = np.random.default_rng(0)
    rows = max(1, BOOTSTRAP_BLOCK // len(top1))
    samples = []
    for begin in range(0, NUM_BOOTSTRAP, rows):
        drawn = random.integers(0, len(top1), (min(rows, NUM_BOOTSTRAP - begin), len(top1)))
        samples.append(rank_correlation(scores[drawn], top1[drawn]))
    low, high = np.quantile(np.concatenate(samples), [0.025, 0.975])
    return float(rank_correlation(scores[None], top1[None])[0]), float(low), float(high)


def trust(groups: Mapping[str, Sequence[RunRecord]], *, searched: bool) -> tuple[Figure | Gap, list[str]]:
    """Return a figure of objective against top-1 of each group's completed trials, and the conclusions in sentences.

    Args:
        groups: Comparable trials, those of one ranking, by name of the ranking.
        searched: Whether they are the trials of a search, all of one seed; else runs of any seed.
    """
    title = "Can the objective be trusted?"
    labeled = {
        name: [
            (float(r.objective_value), float(r.top1))
            for r in records
            if r.objective_value is not None and r.top1 is not None
        ]
        for name, records in groups.items()
    }
    if not any(labeled.values()):
        return Gap(title=title, reason="no completed trial was evaluated on labeled images"), []
    most = max(map(len, labeled.values()))
    if most < LEAST_TRIALS:
        return Gap(title=title, reason=too_few(most)), []
    few = [name for name, pairs in labeled.items() if len(pairs) < LEAST_TRIALS]
    labeled = {name: pairs for name, pairs in labeled.items() if name not in few}
    kinds = {name: next(iter(groups[name])).objective for name in labeled}
    titles, notes = {}, []
    for name, pairs in labeled.items():
        found = rank_agreement(pairs, minimize=kinds[name] == "synthetic")
        spread = max(top1 for _, top1 in pairs) - min(top1 for _, top1 in pairs)
        if found is None:
            titles[name] = f"{_wrapped(name)}\nn = {len(pairs)}"
            continue
        titles[name] = f"{_wrapped(name)}\nrho = {found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]\nn = {len(pairs)}"
        notes.append(
            f"{name}: the rank correlation of objective and top-1 over {len(pairs)} trials is Spearman's rho = "
            f"{found[0]:+.2f} (95 % interval {found[1]:+.2f} to {found[2]:+.2f}; +1: the better objective always has "
            f"the higher top-1); top-1 varies by {spread:.2f} percentage points: {_conclusion(found)}."
        )

    parts = {name: thinned(pairs, *zip(*pairs, strict=True)) for name, pairs in labeled.items()}

    def plot(canvas: Canvas) -> None:
        for axes, (name, pairs) in zip(panels(canvas, len(labeled)), parts.items(), strict=True):
            axes.scatter([value for value, _ in pairs], [top1 for _, top1 in pairs], s=16, alpha=0.7)
            axes.set_title(titles[name], fontsize=8)
            better = "lower" if kinds[name] == "synthetic" else "higher"
            axes.set(xlabel=f"{kinds[name]} objective\n({better} is better)", ylabel="top-1 [%]")
            axes.locator_params(axis="x", nbins=4)

    caption: str = (
        f"One dot for each completed {'trial of the search (one seed)' if searched else 'run of any seed'}; rho is "
        "Spearman's rank correlation of a good objective with a high top-1, with its 95 % bootstrap interval. At +1 "
        "the objective ranks settings exactly as top-1 on the reported images does; where a lower objective is better, "
        "the dots then fall from left to right. A low rho with almost constant top-1 only means that the settings are "
        "equally good."
    ) + (f" Groups left out, since they have fewer than {LEAST_TRIALS} such trials: {len(few)}." if few else "")
    number, shown = (sum(map(len, some.values())) for some in (labeled, parts))
    caption += f" There are {number} trials{thinned_note(shown, number)}." if shown < number else ""
    return draw("trust", title, caption, plot, (WIDTH, 0.3 + 2.9 * -(-len(labeled) // 2))), notes


def _wrapped(text: str) -> str:
    """Return a text in lines that fit half of a figure."""
    return textwrap.fill(text, 30)


def _conclusion(found: tuple[float, float, float]) -> str:
    if found[1] > 0.5:
        return "it can be trusted here"
    if found[1] > 0:
        return "it helps, but does not decide between close settings"
    return "it was not shown to rank settings"


def pareto(standings: Sequence[Standing]) -> list[Figure | Gap]:
    """Return a figure of accuracy (without labels, the objective) against size and BitOps, with the Pareto front."""
    title = "Accuracy against cost"
    rows = [standing.row for standing in standings if any(standing.row[column] is not None for column in UNITS)]
    if not rows:
        return [Gap(title=title, reason="no record has the size" if standings else "no trial is completed")]
    by_top1 = all(row["top1_mean"] is not None for row in rows)
    value, label = ("top1_mean", "top-1 [%]") if by_top1 else ("objective_value", "objective")
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[f"{row['model']} {row['protocol']} {row['act_points']}"].append(row)
    parts = {name: thinned(part, [row[value] for row in part]) for name, part in series.items()}
    number = sum(map(len, parts.values()))

    def plot(canvas: Canvas) -> None:
        named_axis = False
        for axes, (column, (axis_label, unit)) in zip(panels(canvas, 2, sharey=True), UNITS.items(), strict=True):
            for i, (name, part) in enumerate(series.items()):
                known, shown = ([row for row in some if row[column] is not None] for some in (part, parts[name]))
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                costs, values = [row[column] / unit for row in shown], [row[value] for row in shown]
                named = column == "size_bytes" and i < MOST_SERIES
                series_label = f"{name} (n = {len(known)})" if named else None
                faces = ["none" if row["violates"] else color for row in shown]
                axes.scatter(
                    costs, values, s=14, alpha=0.45, facecolors=faces, edgecolors=color, marker=marker,
                    label=series_label,
                )  # fmt: skip
                best = front(known, column, value, higher=by_top1 or part[0]["objective"] == "selection")
                axes.plot([row[column] / unit for row in best], [row[value] for row in best], color=color, linewidth=1)
                for row in best if len(series) <= MOST_LABELED_SERIES else ():
                    position = (row[column] / unit, row[value])
                    bits = f"W{row['weight_bits']}A{row['act_bits']}"
                    axes.annotate(bits, position, (4, 4), textcoords="offset points", fontsize=7, color=color)
            axes.set(xlabel=axis_label, ylabel="" if named_axis else label)
            if by_top1:
                cap_percent(axes, "y")
            axes.locator_params(axis="x", nbins=3)
            named_axis = True
        canvas.legend(loc="outside lower center", fontsize=8)

    caption = (
        f"One mark for each setting of the leaderboard, {len(rows)} in all{thinned_note(number, len(rows))} "
        f"({'mean over seeds' if by_top1 else 'no labels: the objective instead of accuracy'}); lines: Pareto front of "
        "the best settings with the same model, protocol and quantization points."
        + (" Hollow marks violate a constraint." if any(row["violates"] for row in rows) else "")
        + (f" The legend has the first {MOST_SERIES} of {len(series)} series." if len(series) > MOST_SERIES else "")
    )
    return [draw("pareto", title, caption, plot, (WIDTH, 3.1 + 0.14 * min(len(series), MOST_SERIES)))]


def front(rows: Iterable[Row], cost: str, value: str, *, higher: bool) -> list[Row]:
    """Return the Pareto front of the best rows of the rankings, cheapest first.

    Args:
        rows: Rows of a leaderboard that are comparable except for their bits.
        cost: Column to minimize.
        value: Column to optimize.
        higher: Whether `value` is maximized.
    """
    sign = -1 if higher else 1
    best: list[Row] = []
    for row in sorted((row for row in rows if row["best"] == 1), key=lambda row: (row[cost], sign * row[value])):
        if not best or sign * row[value] < sign * best[-1][value]:
            best.append(row)
    return best


def timeline(records: Iterable[RunRecord]) -> Figure | Gap:
    """Return a figure of when and on which machine each trial ran."""
    title = "Timeline of the trials"
    spans: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    devices: dict[str, str] = {}
    """Device of each machine, if a finished trial recorded it."""
    missing = 0
    for record in records:
        if not record.started or not record.total_seconds:
            missing += 1
            continue
        begun = datetime.fromisoformat(record.started).timestamp()
        host = record.host or "unknown"
        devices[host] = devices.get(host) or record.device
        spans[host].append((begun, begun + record.total_seconds, record.status))
    if not spans:
        return Gap(title=title, reason="no record has a start time")
    first = min(begun for part in spans.values() for begun, _, _ in part)
    lanes = [(host, lane) for host, part in sorted(spans.items()) for lane in _lanes(part)]

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (_, lane) in enumerate(lanes[:MOST_LANES]):
            bars: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for begun, ended, status in lane:
                bars[status].append(((begun - first) / 60, (ended - begun) / 60))
            for status, part in bars.items():  # all bars of a color are one object: a sweep may have thousands
                color = STATUS_COLORS[status]
                axes.broken_barh(part, (i - 0.35, 0.7), facecolors=color, edgecolors="white", linewidth=0.4)
        starts = [i for i in range(len(lanes[:MOST_LANES])) if i == 0 or lanes[i][0] != lanes[i - 1][0]]
        axes.set_yticks(starts, [f"{lanes[i][0]}\n{devices[lanes[i][0]]}".rstrip() for i in starts])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes since the first trial began")
        shown = {status for _, lane in lanes for *_, status in lane}
        for status in [name for name in STATUS_COLORS if name in shown]:
            axes.barh([0], [0], color=STATUS_COLORS[status], label=status)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        canvas.legend(loc="outside lower center", ncols=3)

    number = sum(map(len, spans.values()))
    caption = f"One bar for each of {number} trials; a machine has as many lanes as trials ran there concurrently."
    caption += f" {missing} trials without a start time are not shown." if missing else ""
    caption += f" The first {MOST_LANES} of {len(lanes)} lanes." if len(lanes) > MOST_LANES else ""
    caption += " A resumed trial starts at its last start, with its total time."
    return draw(
        "timeline", title, caption, plot, (WIDTH, 1.3 + max(0.22 * min(len(lanes), MOST_LANES), 0.34 * len(spans)))
    )


def _lanes(spans: Iterable[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Assign time spans to as few lanes as possible such that no two spans of a lane overlap."""
    lanes: list[list[tuple[float, float, str]]] = []
    for span in sorted(spans):
        free: Any = next((lane for lane in lanes if lane[-1][1] <= span[0] + 1e-6), None)
        if free is None:
            free = []
            lanes.append(free)
        free.append(span)
    return lanes
