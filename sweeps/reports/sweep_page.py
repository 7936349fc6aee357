"""Page of a sweep: best settings, reliability of the objective, effect of the settings, failures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from synq.common.text_tables import Row, plural
from synq.runs.record import RunRecord

from ..leaderboard.columns import PAGE_COLUMNS, TRIAL_COLUMNS, keys, page_texts
from ..leaderboard.ranking import Ranking, Standing
from ..leaderboard.settings import best_columns, constants_text, shown_columns
from .headline import overall, sweep_chart
from .latency_figures import accuracy_over_latency
from .page import Block, Gap, Page, Tab, Table, Text
from .run_page import run_tabs, settings_blocks
from .study_figures import study_figures
from .summary import (
    best_rows,
    failed_runs,
    foot,
    label,
    leaders,
    run_of,
    sweep_facts,
    sweep_verdict,
)
from .sweep_figures import pareto, timeline, trust
from .sweep_view import SweepView
from .tool_points import ToolPoint

OMITTED = ("versions", "commit", "host", "heldout_digest", "set_digest")
"""Columns of trials.csv with the same value in almost all rows, left out of the page."""
SEEN_FIRST = ("rank", "violates", "model", "weight_bits", "act_bits", "top1_mean", "drop")
"""Columns of the leaderboard that a screen shows without being scrolled sideways."""
MOST_RUNS = 4
"""Number of groups whose best run is analyzed."""


def sweep_page(
    sweep: SweepView,
    *,
    runs: int = MOST_RUNS,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    tools: Sequence[ToolPoint] = (),
) -> Page:
    """Return the page of a sweep.

    Args:
        sweep: The sweep, from ``read_sweep``.
        runs: Number of groups, from the top of the leaderboard, whose best run is analyzed, which loads networks and
            images.
        path_overrides, num_images: As for ``run_page``.
        tools: As for ``accuracy_over_latency``.
    """
    standings = sweep.standings()
    trusted, notes = trust(by_ranking(sweep), searched=sweep.is_sweep)
    caption = (
        "One row for each setting, ranked within its model, bit-widths and protocol; the first of each ranking is "
        "highlighted. leaderboard.csv has all columns."
    )
    board = leaderboard_table("leaderboard", "Leaderboard", caption, sweep, standings)
    tabs = [
        Tab(
            title="Overview",
            blocks=[
                *best_table(sweep, standings),
                trusted,
                *pareto(standings),
                *accuracy_over_latency(standings, tools),
            ],
        ),
        Tab(
            title="Leaderboard",
            blocks=[board if standings else Gap(title="Leaderboard", reason="no trial is completed yet")],
        ),
        Tab(title="Search", blocks=_search(sweep)),
        Tab(title="Trials", blocks=_trials(sweep)),
        *_best_runs(sweep, standings, runs, path_overrides, num_images),
    ]
    return Page(
        title=f"Sweep {sweep.name}" if sweep.is_sweep else f"{len(sweep.records)} runs in {sweep.root}",
        verdict=[*overall(standings), *sweep_verdict(sweep, standings), *notes],
        facts=sweep_facts(sweep),
        tabs=tabs,
        foot=foot(list(sweep.records.values())) if sweep.records else "No record yet.",
        chart=sweep_chart(standings),
    )


def leaderboard_table(name: str, title: str, caption: str, sweep: SweepView, standings: Sequence[Standing]) -> Table:
    """Return a leaderboard with a column for each setting that varies; the others are named in its caption."""
    settings = [standing.settings for standing in standings]
    columns = sorted(
        shown_columns(PAGE_COLUMNS, settings, violated=True), key=lambda column: column.key not in SEEN_FIRST
    )
    rows = [{column.key: standing.cell(column.key) for column in columns} for standing in standings]
    same = constants_text(settings, sweep.settings)
    return Table(
        name=name,
        title=title,
        caption=f"{caption} {same[0].upper()}{same[1:]}." if same else caption,
        columns=_filled(rows, keys(columns)),
        rows=rows,
        **page_texts(columns),
        bold=[standing.row["best"] == 1 for standing in standings],
    )


def _filled(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    """Return the columns that are not empty in all rows."""
    return [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]


def best_table(sweep: SweepView, standings: Sequence[Standing]) -> list[Block]:
    """Return a table of the best setting of each ranking, or no block if there is none."""
    caption = "The best row of each ranking: most seeds, then the best mean objective."
    rows, columns = best_rows(sweep, standings), best_columns(sweep.settings)
    table = Table(
        name="best",
        title="Best settings",
        caption=caption,
        columns=_filled(rows, keys(columns)),
        rows=rows,
        **page_texts(columns),
    )
    records = [sweep.paths[row["trial"]] for row in rows if row["trial"] in sweep.paths]
    commands = [f"synq export {path if path.name != 'record.json' else path.parent}" for path in records]
    return [table, Text(title="Export the best runs", lines=commands, listed=True)] if rows else []


def by_ranking(sweep: SweepView) -> dict[str, list[RunRecord]]:
    """Return the completed trials of each ranking, which are comparable, by name of the ranking.

    Of a sweep only the trials of the search, which have the same seed.
    """
    found: dict[Ranking, list[RunRecord]] = {}
    for name, record in sweep.records.items():
        searched = not sweep.is_sweep or (name in sweep.plans and sweep.plans[name].stage == "search")
        if record.status == "completed" and searched:
            found.setdefault(sweep.rankings[name], []).append(record)
    groups: dict[str, list[RunRecord]] = {}
    for ranking in sorted(found, key=Ranking.order):
        base = f"{ranking.model} W{ranking.weight_bits}A{ranking.act_bits} {ranking.protocol} {ranking.act_points}"
        name = base if base not in groups else f"{base} ({len(groups)})"  # other images or another objective
        groups[name] = found[ranking]
    return groups


def _search(sweep: SweepView) -> list[Block]:
    if not sweep.is_sweep:
        return [Gap(title="Search", reason="the runs of this folder are not trials of a search")]
    if not sweep.dimensions:
        return [
            Gap(
                title="Search",
                reason="the trials are listed in the spec, not searched; the leaderboard compares them",
            )
        ]
    search = sweep.about["search"]
    blocks: list[Block] = []
    for group in sweep.groups:
        blocks.append(Text(title=f"Group {group}", lines=[f"{plural(len(sweep.search_trials(group)), 'trial')}."]))
        blocks += study_figures(
            group,
            sweep.dimensions,
            sweep.search_trials(group),
            minimize=search["objective"] == "synthetic",
            objective=f"{search['objective']} objective",
            constraints=sweep.constraints,
        )
    return blocks


def _trials(sweep: SweepView) -> list[Block]:
    failures = [
        {
            "status": record.status,
            "trial": name,
            "reason": record.reason,
            "seconds": record.total_seconds,
            "host": record.host,
            "log": record.log,
        }
        for name, record in failed_runs(sweep)
    ]
    rows = sweep.tables.trial_rows()
    usual = [key for key in TRIAL_COLUMNS if key not in OMITTED]
    shown = shown_columns(usual, sweep.tables.settings(), violated=True)
    waiting = [{"trial": name, "epochs": len(sweep.plans[name].history)} for name in sweep.running]
    blocks: list[Block] = []
    if failures:
        blocks.append(
            Table(
                name="failures",
                title="Failures",
                caption="Trials without a result, with their reasons; the log is in the folder of the sweep.",
                columns=("status", "trial", "reason", "seconds", "host", "log"),
                rows=failures,
            )
        )
    else:
        blocks.append(Text(title="Failures", lines=["No trial failed."]))
    if waiting:
        caption = "Trials without a result, with the number of epochs that they have reported."
        blocks.append(
            Table(name="unfinished", title="Not finished", caption=caption, columns=("trial", "epochs"), rows=waiting)
        )
    blocks.append(timeline(sweep.records.values()))
    if rows:
        caption = "One row for each trial; trials.csv has all columns."
        blocks.append(
            Table(
                name="trials",
                title="All trials",
                caption=caption,
                columns=_filled(rows, keys(shown)),
                rows=rows,
                **page_texts(shown),
            )
        )
    return blocks


def _best_runs(
    sweep: SweepView,
    standings: Sequence[Standing],
    runs: int,
    path_overrides: Mapping[str, Any] | None,
    num_images: int | None,
) -> list[Tab]:
    """Return a tab for the best run of each of the first rankings."""
    tabs = []
    for standing in leaders(standings)[:runs]:
        name = run_of(sweep, standing)
        if name is None:
            continue
        blocks: list[Block] = [Text(lines=[f"Trial {name} ({sweep.paths[name]}): first seed of the best setting."])]
        for tab in run_tabs(sweep.paths[name], sweep.records[name], path_overrides, num_images, prefix=name):
            blocks += tab.blocks
        blocks += [block.with_prefix(name) for block in settings_blocks(sweep.records[name])]
        tabs.append(Tab(title=label(standing), blocks=blocks))
    return tabs
