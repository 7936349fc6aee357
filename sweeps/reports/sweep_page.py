"""The page of a sweep: what is best, can it be trusted, which settings matter, what failed."""

from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.ranking import SETTINGS, TRIAL_COLUMNS, Standing
from sweeps.reports.page import Block, Gap, Page, Tab, Table, Words
from sweeps.reports.run_page import foot, run_tabs
from sweeps.reports.study_figures import study_figures
from sweeps.reports.sweep_figures import pareto, timeline, trust
from sweeps.reports.sweep_view import SweepView
from synq.results import RunRecord

BOARD_COLUMNS = (
    "rank", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective_value", "top1_mean", "top1_std", "num_seeds",
    "num_failed", "teacher_top1", "rtn_top1", "drop", "num_eval", "size_bytes", "bitops", *SETTINGS, "layer_bits", "first_bits",
    "last_bits", "objective", "fidelity_measure", "seconds",
)  # fmt: skip
BOARD_HEADINGS = {
    "weight_bits": "W", "act_bits": "A", "act_points": "points", "objective_value": "value", "top1_mean": "top-1", "top1_std": "std",
    "num_seeds": "n", "num_failed": "failed", "teacher_top1": "teacher", "rtn_top1": "before", "num_eval": "images",
    "lowpass_cutoff": "cutoff [bins]", "difficulty_threshold": "tau", "size_bytes": "bytes",
}  # fmt: skip
PERCENTS = ("top1", "top5", "top1_mean", "top1_std", "teacher_top1", "rtn_top1", "drop")
DECIMALS = {**dict.fromkeys(PERCENTS, 2), "size_bytes": 0, "bitops": 0, "seconds": 0}
LONG = ("versions", "commit", "host", "heldout_digest", "set_digest")
"""Columns of trials.csv that say the same for nearly all rows; the CSV has them."""
MOST_RUNS = 4
"""Groups whose best run is looked into."""


def sweep_page(
    sweep: SweepView, *, runs: int = MOST_RUNS, places: Mapping[str, Any] | None = None, num_images: int | None = None
) -> Page:
    """Return the page of a sweep.

    Args:
        sweep: What was read of it.
        runs: Of how many groups, the first ones of the leaderboard, the best run is looked into; that loads networks and images.
        places, num_images: As for ``run_page``.
    """
    standings = sweep.standings()
    completed = {name: record for name, record in sweep.records.items() if record.status == "completed"}
    trusted, notes = trust(by_group(sweep, completed))
    board = Table(
        name="leaderboard",
        title="Leaderboard",
        caption="A row for each setting, ranked within its model, widths and protocol; the first of each ranking is marked. The CSV has all columns.",
        columns=[column for column in BOARD_COLUMNS if _said(standings, column)],
        rows=[standing.row for standing in standings],
        headings=BOARD_HEADINGS,
        decimals=DECIMALS,
        bold=[standing.row["rank"] == 1 for standing in standings],
    )
    tabs = [
        Tab(title="Overview", blocks=[*_best(standings), trusted, *pareto(standings)]),
        Tab(
            title="Leaderboard",
            blocks=[board if standings else Gap(title="Leaderboard", reason="no trial was completed yet")],
        ),
        Tab(title="Search", blocks=_search(sweep)),
        Tab(title="Trials", blocks=_trials(sweep)),
        *_best_runs(sweep, standings, completed, runs, places, num_images),
    ]
    return Page(
        title=f"Sweep {sweep.name}",
        verdict=[*_verdict(sweep, standings), *notes],
        facts=_facts(sweep),
        tabs=tabs,
        foot=foot(list(sweep.records.values())) if sweep.records else "No record yet.",
    )


def label(standing: Standing) -> str:
    """Name a ranking in words, for example "resnet20 W4A4 A relu"."""
    row = standing.row
    edges = (
        "/".join(str(row[name] or "-") for name in ("first_bits", "last_bits"))
        if row["first_bits"] or row["last_bits"]
        else ""
    )
    words = (
        f"{row['model']} W{row['weight_bits']}A{row['act_bits']}",
        row["protocol"],
        row["act_points"],
        edges,
        row["layer_bits"] or "",
    )
    return " ".join(word for word in words if word)


def _verdict(sweep: SweepView, standings: Sequence[Standing]) -> list[str]:
    lines = []
    for standing in [one for one in standings if one.row["rank"] == 1]:
        row = standing.row
        if row["top1_mean"] is None:
            lines.append(
                f"{label(standing)}: best {row['objective']} objective {row['objective_value']:.4g} (no labelled images)."
            )
            continue
        spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}"
        seeds = f"{row['num_seeds']} seed{'' if row['num_seeds'] == 1 else 's'}"
        lines.append(
            f"{label(standing)}: top-1 {row['top1_mean']:.2f}{spread} ({seeds}, {row['num_eval']} images), a drop of {row['drop']:.2f} from the "
            f"teacher's {row['teacher_top1']:.2f}; {_before(row)}."
        )
    if not lines:
        lines.append("No trial was completed yet.")
    failed = sum(record.status == "failed" for record in sweep.records.values())
    if failed:
        lines.append(f"{failed} trials failed; the part Trials says why.")
    if sweep.running:
        lines.append(
            f"{len(sweep.running)} trials are not finished: the sweep runs, or was interrupted and goes on by the same command."
        )
    return lines + [f"Not read: {text}" for text in sweep.unread]


def _before(row: Mapping[str, Any]) -> str:
    return (
        "before fine-tuning it is not known" if row["rtn_top1"] is None else f"{row['rtn_top1']:.2f} before fine-tuning"
    )


def _facts(sweep: SweepView) -> list[tuple[str, str]]:
    counts = {
        status: sum(record.status == status for record in sweep.records.values())
        for status in ("completed", "pruned", "failed")
    }
    hours = sum(record.total_seconds or 0.0 for record in sweep.records.values()) / 3600
    machines = {record.host for record in sweep.records.values() if record.host}
    search = sweep.about.get("search", {})
    known = [
        *((status, str(count)) for status, count in counts.items()),
        ("groups", str(len(sweep.groups)) if sweep.is_sweep else ""),
        ("objective", str(search.get("objective", ""))),
        ("sampler", str(search.get("sampler", ""))),
        ("scheduler", str(search.get("scheduler", ""))),
        ("time of all trials", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"),
        ("machines", str(len(machines))),
    ]
    return [(name, value) for name, value in known if value]


def _said(standings: Sequence[Standing], column: str) -> bool:
    """Whether a column says anything."""
    return any(standing.row.get(column) not in (None, "") for standing in standings)


def _best(standings: Sequence[Standing]) -> list[Block]:
    best = [standing.row | {"setting": _setting(standing.row)} for standing in standings if standing.row["rank"] == 1]
    columns = (
        "model",
        "weight_bits",
        "act_bits",
        "protocol",
        "act_points",
        "top1_mean",
        "top1_std",
        "num_seeds",
        "drop",
        "objective_value",
        "setting",
    )
    caption = "The first row of each ranking: most seeds, then the best mean objective."
    return (
        [
            Table(
                name="best",
                title="Best settings",
                caption=caption,
                columns=columns,
                rows=best,
                headings=BOARD_HEADINGS,
                decimals=DECIMALS,
            )
        ]
        if best
        else []
    )


def _setting(row: Mapping[str, Any]) -> str:
    parts = []
    for name in SETTINGS:
        if row[name] is not None:
            parts.append(f"{name} {row[name]:.4g}" if isinstance(row[name], int | float) else f"{name} {row[name]}")
    return ", ".join(parts)


def by_group(sweep: SweepView, completed: Mapping[str, RunRecord]) -> dict[str, list[RunRecord]]:
    """Completed trials that one search compared: of its group; of a folder of runs those of one model, width and protocol."""
    if sweep.is_sweep:
        found = {group: [record for _, record in sweep.search_trials(group)] for group in sweep.groups}
        return {group: done for group, part in found.items() if (done := [r for r in part if r.status == "completed"])}
    groups: dict[str, list[RunRecord]] = {}
    for record in completed.values():
        name = f"{record.model} W{record.weight_bits}A{record.act_bits} {record.protocol} {record.act_points}"
        groups.setdefault(name, []).append(record)
    return groups


def _search(sweep: SweepView) -> list[Block]:
    if not sweep.is_sweep:
        return [Gap(title="The search", reason="this folder holds runs that no sweep has proposed")]
    if not sweep.dimensions:
        return [
            Gap(
                title="The search",
                reason="the trials were listed in the spec, not searched; the leaderboard compares them",
            )
        ]
    search = sweep.about["search"]
    blocks: list[Block] = []
    for group in sweep.groups:
        blocks += study_figures(
            group,
            sweep.dimensions,
            sweep.search_trials(group),
            minimise=search["objective"] == "synthetic",
            objective=f"{search['objective']} objective",
        )
    return blocks


def _trials(sweep: SweepView) -> list[Block]:
    failures = [
        {"trial": name, "reason": record.reason, "seconds": record.total_seconds, "host": record.host}
        for name, record in sweep.records.items()
        if record.status == "failed"
    ]
    rows = sweep.tables.trial_rows()
    columns = [
        column
        for column in TRIAL_COLUMNS
        if column not in LONG and any(row.get(column) not in (None, "") for row in rows)
    ]
    waiting = [{"trial": name, "epochs": len(sweep.plans[name].history)} for name in sweep.running]
    blocks: list[Block] = []
    if failures:
        blocks.append(
            Table(
                name="failures",
                title="Failures",
                caption="Trials that failed, and why.",
                columns=("trial", "reason", "seconds", "host"),
                rows=failures,
            )
        )
    else:
        blocks.append(Words(title="Failures", lines=["No trial failed."]))
    if waiting:
        caption = "Trials without a result, with the epochs that they have reported."
        blocks.append(
            Table(name="unfinished", title="Not finished", caption=caption, columns=("trial", "epochs"), rows=waiting)
        )
    blocks.append(timeline(sweep.records.values()))
    if rows:
        caption = "A row for each trial; trials.csv has all columns."
        blocks.append(
            Table(name="trials", title="All trials", caption=caption, columns=columns, rows=rows, decimals=DECIMALS)
        )
    return blocks


def _best_runs(
    sweep: SweepView,
    standings: Sequence[Standing],
    completed: Mapping[str, RunRecord],
    runs: int,
    places: Mapping[str, Any] | None,
    num_images: int | None,
) -> list[Tab]:
    """Look into the best run of the first rankings."""
    tabs = []
    for standing in [one for one in standings if one.row["rank"] == 1][:runs]:
        name = _run_of(standing, completed)
        if name is None:
            continue
        blocks: list[Block] = [
            Words(lines=[f"Trial {name} of {sweep.paths[name]}: the first seed of the best setting."])
        ]
        for tab in run_tabs(sweep.paths[name], completed[name], places, num_images, prefix=name):
            blocks += tab.blocks
        tabs.append(Tab(title=label(standing), blocks=blocks))
    return tabs


def _run_of(standing: Standing, completed: Mapping[str, RunRecord]) -> str | None:
    """Name of the first run behind a row."""
    found = [name for name, record in completed.items() if record.config_digest == standing.row["config_digest"]]
    return min(found) if found else None
