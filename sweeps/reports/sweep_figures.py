"""Drawings of a sweep from its records: can the objective be trusted, what accuracy costs, which trial ran where and when."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from synq.common.text_tables import Row
from synq.runs.record import RunRecord

from ..leaderboard.ranking import Standing
from ..stats import rank_correlation
from .drawing import COLORS, draw, panels
from .page import Figure, Gap

LEAST_TRIALS = 8
"""Trials from which a rank correlation is worth a number."""
NUM_BOOTSTRAP = 2000
MOST_KINDS = 12
"""Kinds of students that a legend names."""
MOST_NAMED = 4
"""Kinds of students up to which the ends of a front bear their widths: with more of them names lie upon names."""
MOST_LANES = 40
"""Lanes of a timeline that are drawn."""
UNITS = {"size_bytes": ("size of the parameters [KiB]", 1024.0), "bitops": ("BitOps of an image [G]", 1e9)}
STATUS_COLORS = {"completed": COLORS[0], "pruned": "#b9c3cf", "failed": COLORS[1]}
MARKERS = "osD^vPX*"


def rank_agreement(trials: Sequence[tuple[float, float]], *, minimize: bool) -> tuple[float, float, float] | None:
    """Return Spearman's correlation of (objective, top-1) pairs and its 95 % bootstrap interval; +1: the objective ranks as top-1 does.

    None for fewer than LEAST_TRIALS, or where one of the two is the same for all.
    """
    if len(trials) < LEAST_TRIALS:
        return None
    scores, top1 = np.array(trials, dtype=float).T
    scores = -scores if minimize else scores
    if np.ptp(scores) == 0 or np.ptp(top1) == 0:
        return None
    drawn = np.random.default_rng(0).integers(0, len(top1), (NUM_BOOTSTRAP, len(top1)))
    low, high = np.quantile(rank_correlation(scores[drawn], top1[drawn]), [0.025, 0.975])
    return float(rank_correlation(scores[None], top1[None])[0]), float(low), float(high)


def trust(groups: Mapping[str, Sequence[RunRecord]], *, searched: bool) -> tuple[Figure | Gap, list[str]]:
    """Objective against top-1 of each group's completed trials, and what it says in sentences.

    Args:
        groups: Trials that may be compared: of one ranking.
        searched: Whether they are those of a search, all of one seed; else runs of any seed.
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
    few = [name for name, pairs in labeled.items() if len(pairs) < 2]
    if not any(labeled.values()):
        return Gap(title=title, reason="no completed trial was measured on labeled images"), []
    labeled = {name: pairs for name, pairs in labeled.items() if len(pairs) > 1}
    if not labeled:
        return Gap(title=title, reason="no group has two completed trials with labels"), []
    kinds = {name: next(iter(groups[name])).objective for name in labeled}
    words, notes = {}, []
    for name, pairs in labeled.items():
        found = rank_agreement(pairs, minimize=kinds[name] == "synthetic")
        spread = max(top1 for _, top1 in pairs) - min(top1 for _, top1 in pairs)
        if found is None:
            words[name] = f"{name}\nn = {len(pairs)}"
            continue
        words[name] = f"{name}\nrho = {found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}], n = {len(pairs)}"
        notes.append(
            f"{name}: the objective ranks {len(pairs)} trials with Spearman's rho = {found[0]:.2f} "
            f"(95 % {found[1]:.2f} to {found[2]:.2f}) to top-1, which varies by {spread:.2f} points: {_trust_word(found)}."
        )

    def plot(canvas: Canvas) -> None:
        for axes, (name, pairs) in zip(panels(canvas, len(labeled), columns=3), labeled.items(), strict=True):
            axes.scatter([value for value, _ in pairs], [top1 for _, top1 in pairs], s=16, alpha=0.7)
            axes.set_title(words[name], fontsize=8)
            axes.set(xlabel=f"{kinds[name]} objective", ylabel="top-1 [%]")
            axes.locator_params(axis="x", nbins=4)

    columns, rows = min(3, len(labeled)), -(-len(labeled) // 3)
    caption: str = (
        f"A dot for each completed {'trial of the search (one seed)' if searched else 'run, whatever its seed'}; rho is Spearman's rank "
        f"correlation with its 95 % bootstrap interval, from {LEAST_TRIALS} of them on; +1 says that the objective ({_OBJECTIVES}) ranks "
        "settings as the labeled images that are reported on do. A low rho where top-1 hardly varies says only that the settings are equally good."
    ) + (f" Groups with fewer than two such trials are left out: {len(few)}." if few else "")
    return draw("trust", title, caption, plot, (max(4.6, 3.4 * columns), 0.3 + 2.9 * rows)), notes


_OBJECTIVES = "synthetic: without labels, lower is better; selection: top-1 on other images, higher is better"


def _trust_word(found: tuple[float, float, float]) -> str:
    if found[1] > 0.5:
        return "it can be trusted here"
    if found[1] > 0:
        return "it helps, but does not decide between close settings"
    return "it was not shown to rank them"


def pareto(standings: Sequence[Standing]) -> list[Figure | Gap]:
    """Accuracy (or the objective, without labels) against size and BitOps, the best settings joined."""
    title = "What accuracy costs"
    rows = [standing.row for standing in standings if any(standing.row[column] is not None for column in UNITS)]
    if not rows:
        return [Gap(title=title, reason="no trial was completed" if not standings else "no record says the size")]
    by_top1 = all(row["top1_mean"] is not None for row in rows)
    value, label = ("top1_mean", "top-1 [%]") if by_top1 else ("objective_value", "objective")
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[f"{row['model']} {row['protocol']} {row['act_points']}"].append(row)

    def plot(canvas: Canvas) -> None:
        for axes, (column, (words, unit)) in zip(panels(canvas, 2), UNITS.items(), strict=True):
            for i, (name, part) in enumerate(series.items()):
                known = [row for row in part if row[column] is not None]
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                prices, values = [row[column] / unit for row in known], [row[value] for row in known]
                named = column == "size_bytes" and i < MOST_KINDS
                words_of = f"{name} (n = {len(known)})" if named else None
                axes.scatter(prices, values, s=14, alpha=0.45, color=color, marker=marker, label=words_of)
                best = front(known, column, value, higher=by_top1 or part[0]["objective"] == "selection")
                axes.plot([row[column] / unit for row in best], [row[value] for row in best], color=color, linewidth=1)
                for row in best if len(series) <= MOST_NAMED else ():
                    place = (row[column] / unit, row[value])
                    bits = f"W{row['weight_bits']}A{row['act_bits']}"
                    axes.annotate(bits, place, (4, 4), textcoords="offset points", fontsize=7, color=color)
            axes.set(xlabel=words, ylabel=label)
        canvas.legend(loc="outside lower center", ncols=2, fontsize=7)

    caption = (
        f"A mark for each of {len(rows)} settings of the leaderboard ({'mean over its seeds' if by_top1 else 'no labels: the objective in place of accuracy'}); "
        "a line joins the settings of rank 1 that no other of rank 1 of the same kind beats in both."
        + (f" The first {MOST_KINDS} of {len(series)} kinds are named." if len(series) > MOST_KINDS else "")
    )
    return [draw("pareto", title, caption, plot, (8.4, 3.6 + 0.09 * min(len(series), MOST_KINDS)))]


def front(rows: Iterable[Row], price: str, value: str, *, higher: bool) -> list[Row]:
    """Return the rows of rank 1 that no other of them beats in both columns, cheapest first.

    Args:
        rows: Rows of a leaderboard that may be compared but for their widths.
        price: Column of which less is better.
        value: Column of what it buys.
        higher: Whether more of that is better.
    """
    sign = -1 if higher else 1
    best: list[Row] = []
    for row in sorted((row for row in rows if row["rank"] == 1), key=lambda row: (row[price], sign * row[value])):
        if not best or sign * row[value] < sign * best[-1][value]:
            best.append(row)
    return best


def timeline(records: Iterable[RunRecord]) -> Figure | Gap:
    """Which trial ran when on which machine."""
    title = "Trials in time"
    spans: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    devices: dict[str, str] = {}
    """Of each machine, as far as a finished trial says it."""
    missing = 0
    for record in records:
        if not record.started or not record.total_seconds:
            missing += 1
            continue
        begun = datetime.fromisoformat(record.started).timestamp()
        place = record.host or "unknown"
        devices[place] = devices.get(place) or record.device
        spans[place].append((begun, begun + record.total_seconds, record.status))
    if not spans:
        return Gap(title=title, reason="no record says when its trial ran")
    first = min(begun for part in spans.values() for begun, _, _ in part)
    lanes = [(place, lane) for place, part in sorted(spans.items()) for lane in _lanes(part)]

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (_, lane) in enumerate(lanes[:MOST_LANES]):
            for begun, ended, status in lane:
                axes.barh(
                    i,
                    (ended - begun) / 60,
                    left=(begun - first) / 60,
                    height=0.7,
                    color=STATUS_COLORS[status],
                    edgecolor="white",
                    linewidth=0.4,
                )
        starts = [i for i in range(len(lanes[:MOST_LANES])) if i == 0 or lanes[i][0] != lanes[i - 1][0]]
        axes.set_yticks(starts, [f"{lanes[i][0]} {devices[lanes[i][0]]}".rstrip() for i in starts])
        axes.invert_yaxis()
        axes.set_xlabel("minutes since the first trial began")
        shown = {status for _, lane in lanes for *_, status in lane}
        for status in [word for word in STATUS_COLORS if word in shown]:
            axes.barh([0], [0], color=STATUS_COLORS[status], label=status)
        axes.grid(axis="y", visible=False)
        canvas.legend(loc="outside right upper")

    number = sum(map(len, spans.values()))
    caption = f"A bar for each of {number} trials, in as many lanes of a machine as ran there at one time."
    caption += (
        f" {missing} trials were stopped before they wrote when they began, and are not shown." if missing else ""
    )
    caption += f" The first {MOST_LANES} of {len(lanes)} lanes." if len(lanes) > MOST_LANES else ""
    caption += " A trial that was resumed is drawn from its last start, with all its time."
    return draw("timeline", title, caption, plot, (8.4, 1.1 + 0.22 * min(len(lanes), MOST_LANES)))


def _lanes(spans: Iterable[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Divide spans into as few rows as hold no two at one time."""
    lanes: list[list[tuple[float, float, str]]] = []
    for span in sorted(spans):
        free: Any = next((lane for lane in lanes if lane[-1][1] <= span[0] + 1e-6), None)
        if free is None:
            free = []
            lanes.append(free)
        free.append(span)
    return lanes
