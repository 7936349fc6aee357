"""Rank correlation of fidelity measures with top-1, with bootstrap intervals, as CSV and Markdown."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from synq.common.files import write_text_atomic

from ..leaderboard.columns import FIDELITY_TABLE, keys
from ..stats import rank_correlation

Values = dict[tuple[str, str], float]
"""(view, measure) -> mean over images, lower is better."""
NUM_BOOTSTRAP = 2000
REFERENCE = ("plain", "kl")
"""The measure that others are compared with."""
MEANS = ("spearman", "kendall", "spearman_top_half", "picked_top1", "best_top1", "regret")
"""Columns that the rows over all groups average."""


def table(groups: Mapping[str, Sequence[tuple[float, Values]]]) -> list[dict[str, Any]]:
    """Return one row per group, view and measure, and, with several groups, rows of the mean over groups; best first.

    The columns are those of `columns.FIDELITY_TABLE`. Spearman's rank correlation is +1 where the measure ranks as
    top-1 does. In `beats_reference` a tie counts half; 0.975 corresponds to a one-sided test at 2.5 %. For the mean
    over groups each group is resampled independently.
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
    """Return the means over groups; each group's bootstrap samples are permuted, equally for all measures."""
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


def markdown(rows: Iterable[Mapping[str, Any]], best: int) -> str:
    """Return the first `best` rows of each group, and the reference, as a Markdown table."""
    head = "| group | rank | measure | view | n | Spearman | 95 % | beats KL | Kendall | upper half | regret |"
    parts = [head, "|" + "---|" * 11]
    rank: dict[str, int] = defaultdict(int)
    for row in rows:
        rank[row["group"]] += 1
        if rank[row["group"]] > best and (row["view"], row["measure"]) != REFERENCE:
            continue
        numbers = [row["spearman"], row.get("beats_reference"), row["kendall"], row["spearman_top_half"], row["regret"]]
        spearman, beats, *others = ("" if number is None else f"{number:.2f}" for number in numbers)
        cells = [row["group"], rank[row["group"]], row["measure"], row["view"], row["num_trials"], spearman]
        cells += [f"{row['low']:.2f} .. {row['high']:.2f}", beats, *others]
        parts.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(parts) + "\n"


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], best: int) -> None:
    """Write fidelity_study.csv (all rows) and fidelity_study.md (the best), atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, keys(FIDELITY_TABLE), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(folder / "fidelity_study.csv", text.getvalue())
    write_text_atomic(folder / "fidelity_study.md", markdown(rows, best))
