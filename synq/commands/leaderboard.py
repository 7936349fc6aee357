"""`synq leaderboard`: tables of sweeps from their records, merged, filtered or compared."""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import OneOf, argument, option

EXAMPLES = """\
  %(prog)s runs/demo                                     make the tables of a sweep again
  %(prog)s runs/monday runs/tuesday --output-dir both    one pair of tables from two sweeps; the same run counts once
  %(prog)s runs/demo --where weight_bits=4 --where "top1_mean>=90"
  %(prog)s runs/demo --where finetune.momentum=0.9 --sort finetune.lr    any setting, by its key
  %(prog)s runs/demo --where model=cifar10_resnet20 --where weight_bits=4 --where act_bits=4 --single-ranking
  %(prog)s runs/demo --print --format markdown --columns rank,model,weight_bits,act_bits,top1_mean,top1_std
  %(prog)s runs/before runs/after --compare --output-dir comparison"""

EXIT_CODES = "0 done, 1 a damaged record was left out, 2 input rejected, 130 interrupted"


@click.command("leaderboard", cls=Command, examples=EXAMPLES, exit_codes=EXIT_CODES)
@argument("paths", nargs=-1, required=True, metavar="PATH", help="folder of a sweep or a run, or a record file")
@option("--output-dir", metavar="DIR", help="folder for the tables; needed for more than one PATH (default: PATH)")
@option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="only rows with COLUMN=VALUE (also != < <= > >=), of a column of leaderboard.csv or any setting such as "
    "finetune.lr; several conditions are combined by AND; the rows are printed unless --output-dir is given",
)
@option(
    "--sort",
    metavar="COLUMN",
    help="order of the printed rows and of leaderboard.md, by a column or setting; -COLUMN begins with the largest "
    "(default: by rank)",
)
@option("--single-ranking", is_flag=True, help="rank all selected rows together; an error if they are not comparable")
@option(
    "--compare", "compares", is_flag=True, help="compare the best rows of each PATH, with differences to the first PATH"
)
@option(
    "--format",
    "kind",
    type=OneOf("csv", "markdown"),
    metavar="FORMAT",
    help="printed format: csv or markdown (default: aligned columns); markdown also writes leaderboard.md next to "
    "the CSV file",
)
@option("--markdown", is_flag=True, help="--format markdown")
@option("--columns", metavar="A,B,...", help="columns or settings in the printed table and in leaderboard.md")
@option("--print", "prints", is_flag=True, help="print the rows; files are written only if --output-dir is given")
def command(
    paths: tuple[str, ...],
    output_dir: str | None,
    where: tuple[str, ...],
    single_ranking: bool,
    compares: bool,
    kind: str | None,
    markdown: bool,
    columns: str | None,
    prints: bool,
    sort: str | None,
) -> int:
    """Rebuild the tables of sweeps from their records; several sweeps become one pair of tables.

    Every setting that varies is a column: params.KEY in the files, under a short heading in a terminal.

    Each combination of model, bit-widths, protocol, act_points, objective and evaluation images is a separate ranking.
    A selected row keeps its rank among all rows.
    """
    if single_ranking and compares:
        raise ValueError("`compare` must be left out with `single-ranking`, but got both")
    check_paths(paths)
    kind = kind or ("markdown" if markdown else None)
    if compares and sort:
        raise ValueError(f"`sort` must be left out with `compare`, but got {sort}")
    if compares:
        return 1 if _compare(paths, where, output_dir, kind, columns) else 0
    left_out = _rebuild(paths, where, output_dir, kind, columns, sort, prints=prints, ranks_together=single_ranking)
    return 1 if left_out else 0


def _rebuild(
    paths: Sequence[str],
    where: Sequence[str],
    output_dir: str | None,
    kind: str | None,
    column_names: str | None,
    sort: str | None,
    *,
    prints: bool,
    ranks_together: bool,
) -> int:
    """Write one leaderboard of all paths, or print selected rows of it; return the number of records left out."""
    from synq.common.files import write_text_atomic
    from synq.common.text_tables import to_csv, to_markdown, to_text
    from synq.sweeps.leaderboard.columns import TERMINAL_COLUMNS, headings, keys
    from synq.sweeps.leaderboard.frames import searched_settings
    from synq.sweeps.leaderboard.records import read_tables
    from synq.sweeps.leaderboard.settings import column_of, constants_text, shown_columns
    from synq.sweeps.leaderboard.views import (
        check_chosen,
        check_column,
        choose,
        ordered,
        parse_condition,
        protocol_of,
        single_ranking,
    )

    conditions = [parse_condition(text) for text in where]
    columns = _columns(column_names)
    order = check_column("sort", sort.removeprefix("-").replace("-", "_")) if sort else None
    chosen = bool(conditions or ranks_together)
    writes = output_dir is not None or not (chosen or prints or order)
    if writes and output_dir is None and (len(paths) > 1 or not Path(paths[0]).is_dir()):
        raise ValueError(f"`output_dir` must be given unless PATH is one folder, but got {' '.join(paths)}")
    folder = Path(output_dir or paths[0])
    if writes and chosen and any((folder / name).exists() for name in ("records", "record.json")):
        raise ValueError(f"`output_dir` must be another folder than a sweep's where rows are chosen, but got {folder}")
    tables, left_out = read_tables(paths)
    known = tables.standings()
    standings = choose(known, conditions)
    check_chosen(standings, known, conditions)
    rows = single_ranking(standings) if ranks_together else [standing.row for standing in standings]
    every = tables.columns()
    wanted = [*every, *columns]
    rows = [
        {column: standing.cell(column) for column in wanted} | row
        for standing, row in zip(standings, rows, strict=True)
    ]
    names = ["leaderboard.csv"] if chosen else ["trials.csv", "leaderboard.csv"]
    if writes and chosen:
        write_text_atomic(folder / "leaderboard.csv", to_csv(rows, every))
    elif writes:
        tables.write(folder)
    if order:
        of_row = dict(zip(map(id, standings), rows, strict=True))
        standings = ordered(standings, order, descending=str(sort).startswith("-"))
        rows = [of_row[id(standing)] for standing in standings]
    if writes and kind == "markdown":
        names.append("leaderboard.md")
        write_text_atomic(folder / "leaderboard.md", to_markdown(rows, columns or every))
    printed = prints or not writes
    if writes:
        count = f"{len(rows)} rows of {len(tables)} records" if chosen else f"{len(tables)} records"
        note = f"{count} -> {', '.join(str(folder / name) for name in names)}"
        print(note, file=sys.stderr if printed else sys.stdout)  # standard output has only the table
    if printed and kind is None:
        settings = [standing.settings for standing in standings]
        usual = shown_columns(TERMINAL_COLUMNS, settings, violated=any(one.is_violating for one in standings))
        named = rows if columns else [{**row, "protocol": protocol_of(row)} for row in rows]
        if not columns and (constants := constants_text(settings, searched_settings(paths))):
            _show(f"{constants}\n")
        _show(to_text(named, columns or keys(usual), headings(map(column_of, columns) if columns else usual)))
    elif printed:
        as_text = to_csv if kind == "csv" else to_markdown
        _show(as_text(rows, columns or every))
    return left_out


def _compare(
    paths: Sequence[str], where: Sequence[str], output_dir: str | None, kind: str | None, column_names: str | None
) -> int:
    """Print the best rows of each path, also write them if a folder is given; return the number of records left out."""
    from synq.common.files import write_text_atomic
    from synq.common.text_tables import to_csv, to_markdown, to_text
    from synq.sweeps.leaderboard.columns import COMPARE_COLUMNS, COMPARE_SHOWN, COMPARE_TABLE, headings
    from synq.sweeps.leaderboard.records import read_tables
    from synq.sweeps.leaderboard.settings import PREFIX, column_of
    from synq.sweeps.leaderboard.views import check_chosen, choose, compare, differences, parse_condition, shown

    conditions = [parse_condition(text) for text in where]
    if len({os.path.realpath(path) for path in paths}) < max(2, len(paths)):
        raise ValueError(f"`compare` must be given two or more different PATHs, but got {' '.join(paths)}")
    if column_names:
        raise ValueError(f"`columns` must be left out with `compare`, but got {column_names}")
    labels = [os.path.basename(os.path.normpath(path)) for path in paths]
    if len(set(labels)) < len(labels):
        labels = list(paths)
    read = {label: read_tables([path]) for label, path in zip(labels, paths, strict=True)}
    known = {label: tables.standings() for label, (tables, _) in read.items()}
    chosen = {label: choose(rows, conditions) for label, rows in known.items()}
    check_chosen([*chain(*chosen.values())], [*chain(*known.values())], conditions)
    lines = compare(chosen)
    readable = shown(lines)
    own = [name for name in lines[0] if name.startswith(PREFIX)] if lines else []
    every, short = [*COMPARE_COLUMNS, *own], [*COMPARE_SHOWN, *own]
    heads = headings([*COMPARE_TABLE, *map(column_of, own)])
    if output_dir is not None:
        folder = Path(output_dir)
        write_text_atomic(folder / "compare.csv", to_csv(lines, every))
        write_text_atomic(folder / "compare.md", to_markdown(readable, short, heads))
        print(f"{len(lines)} rows -> {folder / 'compare.csv'}, {folder / 'compare.md'}", file=sys.stderr)
    rankings = {standing.ranking for rows in chosen.values() for standing in rows}
    if len(rankings) == len(lines) > 1:
        print(f"synq: no two PATHs have rows that may be compared: {differences(rankings)}", file=sys.stderr)
    if kind == "csv":
        _show(to_csv(lines, every))
    else:
        as_text = to_text if kind is None else to_markdown
        _show(as_text(readable, short, heads))
    return sum(left_out for _, left_out in read.values())


def _columns(text: str | None) -> list[str]:
    """Return the requested columns, or an empty list for the default ones."""
    from synq.sweeps.leaderboard.views import check_column

    return [check_column("columns", name.strip().replace("-", "_")) for name in (text or "").split(",") if name.strip()]


def _show(text: str) -> None:
    """Print a table; characters that the terminal lacks are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


main = command.run
