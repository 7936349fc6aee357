"""How well each of many measures ranks settings: rank correlation with top-1, with bootstrap intervals, as rows, CSV and Markdown."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from synq.runs.record import write_text_atomic

Values = dict[tuple[str, str], float]
"""(view, measure) -> mean over images, lower is better."""
NUM_BOOTSTRAP = 2000
COLUMNS = ("group", "view", "measure", "num_trials", "spearman", "low", "high", "kendall", "spearman_top_half", "picked_top1",
    "best_top1", "regret", "beats_reference")  # fmt: skip
REFERENCE = ("plain", "kl")
"""The measure that others must beat."""
MEANS = ("spearman", "kendall", "spearman_top_half", "picked_top1", "best_top1", "regret")
"""Columns that the rows over all groups average."""


def table(groups: Mapping[str, Sequence[tuple[float, Values]]]) -> list[dict[str, Any]]:
    """Return one row per group, view and measure, and, with several groups, rows of the mean over groups; best first.

    A row: Spearman's rank correlation of -measure with top-1 (+1: ranks as top-1 does) and its 95 % bootstrap interval over
    trials; Kendall's tau; Spearman among the better half by top-1; top-1 of the trial that the measure picks, and how far it is
    below the best one (`regret`, points); the share of the bootstrap samples in which it ranks better than plain KL (a tie is half;
    0.975 is where a one-sided test at 2.5 % would be). In the mean over groups each group is resampled by itself.
    """
    rows = []
    draws: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for group, trials in groups.items():
        top1 = np.array([value for value, _ in trials])
        draw = np.random.default_rng(0).integers(0, len(top1), (NUM_BOOTSTRAP, len(top1)))
        draws[group] = {}
        for name in trials[0][1]:
            scores = -np.array([values[name] for _, values in trials])
            draws[group][name] = rank_correlation(scores[draw], top1[draw])
            rows.append({"group": group, "view": name[0], "measure": name[1], **_row(scores, top1)})
        _add_intervals(rows[-len(draws[group]) :], draws[group])
    if len(groups) > 1:
        rows += _joint(rows, draws)
    order = ["all", *groups]
    return sorted(rows, key=lambda row: (order.index(row["group"]), -row["spearman"], row["view"], row["measure"]))


def _row(scores: np.ndarray, top1: np.ndarray) -> dict[str, Any]:
    half = np.argsort(-top1, kind="stable")[: math.ceil(len(top1) / 2)]
    picked = float(top1[scores == scores.max()].mean())
    kendall = float(stats.kendalltau(scores, top1).statistic) if np.ptp(scores) and np.ptp(top1) else 0.0
    return {
        "num_trials": len(top1),
        "spearman": float(rank_correlation(scores[None], top1[None])[0]),
        "kendall": kendall,
        "spearman_top_half": float(rank_correlation(scores[None, half], top1[None, half])[0]),
        "picked_top1": picked,
        "best_top1": float(top1.max()),
        "regret": float(top1.max()) - picked,
    }


def _add_intervals(rows: Sequence[dict[str, Any]], draws: Mapping[tuple[str, str], np.ndarray]) -> None:
    reference = draws.get(REFERENCE)
    for row in rows:
        found = draws[row["view"], row["measure"]]
        row["low"], row["high"] = map(float, np.quantile(found, [0.025, 0.975]))
        if reference is not None:
            row["beats_reference"] = float(((found > reference) + (found == reference) / 2).mean())


def _joint(
    rows: Sequence[Mapping[str, Any]], draws: Mapping[str, Mapping[tuple[str, str], np.ndarray]]
) -> list[dict[str, Any]]:
    """Means over groups. Each group's samples are put in an order of their own, the same for all measures."""
    orders = [np.random.default_rng(1 + i).permutation(NUM_BOOTSTRAP) for i in range(len(draws))]
    joint, joint_draws = [], {}
    for name in next(iter(draws.values())):
        members = [row for row in rows if (row["view"], row["measure"]) == name]
        means = {key: float(np.mean([row[key] for row in members])) for key in MEANS}
        count = sum(row["num_trials"] for row in members)
        joint.append({"group": "all", "view": name[0], "measure": name[1], "num_trials": count, **means})
        joint_draws[name] = np.mean(
            [part[name][order] for part, order in zip(draws.values(), orders, strict=True)], axis=0
        )
    _add_intervals(joint, joint_draws)
    return joint


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row of a and b, (R, n) -> (R,); ties share their mean rank; 0 where a row is constant."""
    x, y = (stats.rankdata(part, axis=1) for part in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), scale, out=np.zeros(len(x)), where=scale > 0)


def markdown(rows: Iterable[Mapping[str, Any]], best: int) -> str:
    """Return the `best` first rows of each group, and plain KL, as a Markdown table."""
    head = "| group | place | measure | view | n | Spearman | 95 % | beats KL | Kendall | upper half | regret |"
    parts = [head, "|" + "---|" * 11]
    place: dict[str, int] = defaultdict(int)
    for row in rows:
        place[row["group"]] += 1
        if place[row["group"]] > best and (row["view"], row["measure"]) != REFERENCE:
            continue
        numbers = [row["spearman"], row.get("beats_reference"), row["kendall"], row["spearman_top_half"], row["regret"]]
        own, beats, *others = ("" if number is None else f"{number:.2f}" for number in numbers)
        cells = [row["group"], place[row["group"]], row["measure"], row["view"], row["num_trials"], own]
        cells += [f"{row['low']:.2f} .. {row['high']:.2f}", beats, *others]
        parts.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(parts) + "\n"


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], best: int) -> None:
    """Write fidelity_study.csv (all rows) and fidelity_study.md (the best), by rename."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(folder / "fidelity_study.csv", text.getvalue())
    write_text_atomic(folder / "fidelity_study.md", markdown(rows, best))
