"""Page that compares several sweeps: the best setting of each in every ranking, with published results."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from ..leaderboard.columns import COMPARE_SHOWN, COMPARE_TABLE, keys, page_texts
from ..leaderboard.ranking import Ranking, Standing
from ..leaderboard.settings import PREFIX, setting_column
from ..leaderboard.views import compare, shown
from .drawing import COLORS, WIDTH, draw
from .page import Block, Figure, Gap, Page, Tab, Table, slug
from .published import Reference, references
from .summary import foot, label
from .sweep_figures import pareto, trust
from .sweep_page import by_ranking, leaderboard_table
from .sweep_view import SweepView

PROTOCOLS = {
    "A": "Protocol A: every layer low-bit, static ranges",
    "B": "Protocol B: some layers with more bits, learned step sizes or learned rounding",
}
REFERENCE = "SynQ"
"""Method whose published result is drawn; the table has all methods."""


def comparison_page(sweeps: Sequence[SweepView]) -> Page:
    """Return the page that compares two or more sweeps or folders of runs."""
    names = _names(sweeps)
    tables = {name: sweep.standings() for name, sweep in zip(names, sweeps, strict=True)}
    best = _best(tables)
    tabs = [
        Tab(title=f"Protocol {protocol}", blocks=_protocol(protocol, best, _classes(sweeps)))
        for protocol in sorted({ranking.protocol for ranking in best})
    ]
    lines = shown(compare(tables))
    if lines:
        own = [setting_column(key.removeprefix(PREFIX)) for key in lines[0] if key.startswith(PREFIX)]
        caption = (
            f"The best row of each in every ranking; differences are to {names[0]}, ± their standard error over seeds."
        )
        comparison = Table(
            name="compare",
            title="Side by side",
            caption=caption,
            columns=[*COMPARE_SHOWN, *keys(own)],
            rows=lines,
            **page_texts([*COMPARE_TABLE, *own]),
        )
        tabs.insert(0, Tab(title="Side by side", blocks=[comparison]))
    tabs += [Tab(title=name, blocks=_one(name, sweep)) for name, sweep in zip(names, sweeps, strict=True)]
    records = [record for sweep in sweeps for record in sweep.records.values()]
    return Page(
        title=" against ".join(names),
        verdict=_verdict(tables, best),
        facts=[(name, f"{len(sweep.records)} records") for name, sweep in zip(names, sweeps, strict=True)],
        tabs=tabs,
        foot=foot(records) if records else "No record yet.",
    )


def _names(sweeps: Sequence[SweepView]) -> list[str]:
    """Return the names of the sweeps; a name that is not unique is replaced by the folder."""
    names = [sweep.name for sweep in sweeps]
    return [name if names.count(name) == 1 else str(sweep.root) for name, sweep in zip(names, sweeps, strict=True)]


def _best(tables: Mapping[str, Sequence[Standing]]) -> dict[Ranking, dict[str, Standing]]:
    """Return the best row of each sweep in each ranking."""
    best: dict[Ranking, dict[str, Standing]] = {}
    for name, rows in tables.items():
        for standing in rows:
            if standing.is_violating:
                continue
            best.setdefault(standing.ranking, {}).setdefault(name, standing)
    return dict(sorted(best.items(), key=lambda item: item[0].order()))


def _verdict(tables: Mapping[str, Sequence[Standing]], best: Mapping[Ranking, Mapping[str, Standing]]) -> list[str]:
    shared = sum(len(rows) > 1 for rows in best.values())
    lines = [
        f"{len(tables)} sweeps with {len(best)} rankings in total; {shared} of them are in more than one sweep and can "
        "be compared."
    ]
    if not shared:
        lines.append(
            "No ranking is in two sweeps: rows are comparable only with the same teacher, bit-widths, protocol, "
            "act_points and evaluation images."
        )
    return lines


def _classes(sweeps: Sequence[SweepView]) -> dict[str, int]:
    """Return the number of classes of each model whose records have it."""
    records = [record for sweep in sweeps for record in sweep.records.values()]
    return {record.model: int(record.teacher["num_classes"]) for record in records if record.teacher.get("num_classes")}


def _protocol(protocol: str, best: Mapping[Ranking, Mapping[str, Standing]], classes: Mapping[str, int]) -> list[Block]:
    part = {ranking: rows for ranking, rows in best.items() if ranking.protocol == protocol}
    title = PROTOCOLS.get(protocol, f"Protocol {protocol}")
    found = {
        ranking: references(
            ranking.model, f"W{ranking.weight_bits}A{ranking.act_bits}", protocol, classes.get(ranking.model, 0)
        )
        for ranking in part
        if ranking.act_points == "relu"  # the quantization points of the papers
    }
    return [_drops(title, protocol, part, found), _published(protocol, found)]


def _drops(
    title: str,
    protocol: str,
    part: Mapping[Ranking, Mapping[str, Standing]],
    found: Mapping[Ranking, Sequence[Reference]],
) -> Figure | Gap:
    measured = {
        ranking: {name: one.row for name, one in rows.items() if one.row["drop"] is not None}
        for ranking, rows in part.items()
    }
    measured = {ranking: rows for ranking, rows in measured.items() if rows}
    if not measured:
        return Gap(title=title, reason="no run was evaluated on labeled images")
    names = list(dict.fromkeys(name for rows in measured.values() for name in rows))

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for position, (ranking, rows) in enumerate(measured.items()):
            for name, row in rows.items():
                i = names.index(name)
                shift = (i - (len(names) - 1) / 2) * 0.6 / len(names)
                axes.errorbar(
                    row["drop"],
                    position + shift,
                    xerr=row["top1_std"],
                    fmt="o",
                    color=COLORS[i % len(COLORS)],
                    capsize=2,
                )
            for one in found.get(ranking, ()):
                if REFERENCE in one.method:
                    axes.vlines(one.drop, position - 0.4, position + 0.4, color="#4f5d73", linestyle="--")
                    axes.annotate(
                        one.method,
                        (one.drop, position - 0.4),
                        (2, 0),
                        textcoords="offset points",
                        fontsize=7,
                        color="#4f5d73",
                        va="top",
                    )
        for i, name in enumerate(names):
            axes.plot([], [], "o", color=COLORS[i % len(COLORS)], label=name)
        axes.set_yticks(
            range(len(measured)), [textwrap.fill(label(next(iter(part[ranking].values()))), 18) for ranking in measured]
        )
        axes.set(xlabel="top-1 drop from the teacher [points], lower is better", ylim=(len(measured) - 0.4, -0.6))
        canvas.legend(loc="outside lower center", ncols=2)

    caption = (
        f"Dots: best setting of each sweep, n = {sum(map(len, measured.values()))}; bars: standard deviation over "
        f"seeds. Dashed: the drop published for {REFERENCE} on a network of that name with the weights of the paper "
        "(only for act_points relu); compare the drop, not the top-1."
    )
    return draw(f"drops-{slug(protocol)}", title, caption, plot, (WIDTH, 1.6 + 0.6 * len(measured)))


def _published(protocol: str, found: Mapping[Ranking, Sequence[Reference]]) -> Table | Gap:
    title = f"Published results, protocol {protocol}"
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for ranking, parts in found.items():
        bits = f"W{ranking.weight_bits}A{ranking.act_bits}"
        for one in parts:
            rows[one.network, bits, one.method] = {
                "network": one.network,
                "bits": bits,
                "method": one.method,
                "top-1": one.top1,
                "teacher": one.teacher_top1,
                "drop": one.drop,
            }
    if not rows:
        return Gap(title=title, reason="there are none for networks of these names at these bit-widths")
    columns = ("network", "bits", "method", "top-1", "teacher", "drop")
    caption = "As reported in the papers, with their weights and images; not measured by SynQ."
    return Table(
        name=f"published-{slug(protocol)}",
        title=title,
        caption=caption,
        columns=columns,
        rows=list(rows.values()),
        decimals=dict.fromkeys(columns[3:], 2),
    )


def _one(name: str, sweep: SweepView) -> list[Block]:
    standings = sweep.standings()
    prefix = slug(name)
    caption = f"{len(standings)} settings of {sweep.root}."
    board = leaderboard_table(f"leaderboard-{prefix}", f"Leaderboard of {name}", caption, sweep, standings)
    return [
        board,
        *(
            block.with_prefix(prefix)
            for block in (trust(by_ranking(sweep), searched=sweep.is_sweep)[0], *pareto(standings))
        ),
    ]
