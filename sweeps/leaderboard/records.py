"""Records in, tables out: `trials.csv` (every run) and `leaderboard.csv` (settings, ranked). Knows neither Ray nor torch.

What a row says and what may be ranked against what: ranking.py. One record at a time: tables.py. Rows chosen, paths compared:
views.py. Rows as text: table_text.py. Here: the files, and the command.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from synq.commands.arguments import Parser, check_paths, exit_code
from synq.common.text_tables import Row, cell, to_csv, to_markdown, to_text
from synq.runs.record import RunRecord, read_record, write_text_atomic

from .ranking import LEADERBOARD_COLUMNS, TRIAL_COLUMNS, read_setting
from .tables import Tables
from .views import (
    COMPARE_COLUMNS,
    SHOWN_COLUMNS,
    check_chosen,
    check_column,
    choose,
    compare,
    differences,
    parse_condition,
    protocol_of,
    shown,
    single_ranking,
)

__all__ = [
    "LEADERBOARD_COLUMNS",
    "TRIAL_COLUMNS",
    "Row",
    "Tables",
    "cell",
    "leaderboard_rows",
    "load_record",
    "load_records",
    "main",
    "read_tables",
    "record_files",
    "to_csv",
    "trial_rows",
    "write_tables",
]
USER_ERROR = 2
PRINTED_COLUMNS = (
    "rank", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1_mean", "top1_std",
    "num_seeds", "num_failed", "drop", "lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold", "lr", "pareto_size",
)  # fmt: skip
HEADINGS = {
    "weight_bits": "W", "act_bits": "A", "act_points": "points", "objective_value": "value", "top1_mean": "top1", "top1_std": "std",
    "num_seeds": "n", "num_failed": "failed", "lowpass_cutoff": "cutoff", "cam_weight": "cam", "ce_weight": "ce",
    "difficulty_threshold": "tau", "pareto_size": "pareto",
}  # fmt: skip
EXAMPLES = """\
examples:
  %(prog)s runs/demo                                     make the tables of a sweep again
  %(prog)s runs/monday runs/tuesday --output-dir both    one pair of tables from two sweeps; the same run counts once
  %(prog)s runs/demo --where weight_bits=4 --where "top1_mean>=90"
  %(prog)s runs/demo --where model=cifar10_resnet20 --where weight_bits=4 --where act_bits=4 --single-ranking
  %(prog)s runs/demo --print --format markdown --columns rank,model,weight_bits,act_bits,top1_mean,top1_std
  %(prog)s runs/before runs/after --compare --output-dir comparison

The ranks start again for each model, bit-widths, protocol, act_points, objective and what it was measured with. A chosen row
keeps the rank that it has among all rows.
"""


def record_files(paths: Iterable[str | Path]) -> list[Path]:
    """Find the record files of sweeps and runs.

    Args:
        paths: Record files, or folders: a sweep's (records/*.json), a run's (record.json), or one that holds such folders.

    Raises:
        FileNotFoundError: A path is absent or holds no record.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files = [path]
        elif (path / "records").is_dir():
            files = sorted((path / "records").glob("*.json"))
        elif (path / "record.json").is_file():
            files = [path / "record.json"]
        else:
            files = sorted({*path.glob("*/records/*.json"), *path.glob("*/record.json")})
        sweep = path.resolve().parent
        if not files and (sweep / "sweep.json").is_file():
            raise FileNotFoundError(f"`path` must be the whole sweep, {sweep}, but got {str(path)!r}")
        if not files:
            raise FileNotFoundError(f"`path` must hold run records, but got {str(path)!r}")
        found += files
    return found


def load_records(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Read the records of sweeps and runs.

    Args:
        paths: As for `record_files`.

    Raises:
        FileNotFoundError: A path is absent or holds no record.
        ValueError: A record is damaged.
    """
    return [load_record(file) for file in record_files(paths)]


def load_record(path: Path) -> RunRecord:
    """Read a record whose configuration reads as well.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: The file is damaged.
    """
    record = read_record(path)
    read_setting(record.config, source=str(path))
    return record


def read_tables(paths: Iterable[str | Path]) -> Tables:
    """Read the records of sweeps and runs into tables; as `Tables(load_records(paths))`, but each record is checked once.

    Raises:
        FileNotFoundError: A path is absent or holds no record.
        ValueError: A record is damaged.
    """
    tables = Tables()
    for file in record_files(paths):
        tables.add(read_record(file), source=str(file))
    return tables


def trial_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per record, sorted by group and name."""
    return Tables(records).trial_rows()


def leaderboard_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per setting with at least one completed run, ranked within its ranking.

    What the columns mean is said at `standings` of ranking.py.
    """
    return Tables(records).leaderboard_rows()


def write_tables(records: Iterable[RunRecord], folder: str | Path) -> None:
    """Write trials.csv and leaderboard.csv into `folder`, each by rename.

    Raises:
        OSError: The folder or the disk refuses.
    """
    Tables(records).write(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the tables of sweeps from their records; several sweeps become one pair of tables."""
    arguments = _parser().parse_args(argv)

    def work() -> None:
        check_paths(arguments.paths)
        _compare(arguments) if arguments.compare else _rebuild(arguments)

    return exit_code(work)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="synq leaderboard",
        description=main.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of a sweep or a run, or a record file")
    parser.add_argument(
        "--output-dir", metavar="DIR", help="folder for the tables; needed for more than one PATH (default: PATH)"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="only rows with COLUMN=VALUE (also != < <= > >=); all of several must hold; printed unless --output-dir is given",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--single-ranking",
        action="store_true",
        help="rank all chosen rows together; refused where they must not be compared",
    )
    kind.add_argument(
        "--compare", action="store_true", help="the best row of each PATH side by side, with differences to the first"
    )
    parser.add_argument(
        "--format",
        choices=("csv", "markdown"),
        help="what is printed (default: aligned columns); markdown also writes leaderboard.md beside the CSV",
    )
    parser.add_argument("--markdown", action="store_const", const="markdown", dest="format", help="--format markdown")
    parser.add_argument("--columns", metavar="A,B,...", help="columns that are printed and that leaderboard.md has")
    parser.add_argument(
        "--print", action="store_true", help="print the rows; files are then only written to --output-dir"
    )
    return parser


def _rebuild(arguments: argparse.Namespace) -> None:
    """One leaderboard of all paths: written as a whole, or chosen rows of it."""
    paths, conditions = arguments.paths, [parse_condition(text) for text in arguments.where]
    columns = _columns(arguments.columns)
    chosen = bool(conditions or arguments.single_ranking)
    writes = arguments.output_dir is not None or not (chosen or arguments.print)
    if writes and arguments.output_dir is None and (len(paths) > 1 or not Path(paths[0]).is_dir()):
        raise ValueError(f"`output_dir` must be given unless PATH is one folder, but got {' '.join(paths)}")
    folder = Path(arguments.output_dir or paths[0])
    if writes and chosen and any((folder / name).exists() for name in ("records", "record.json")):
        raise ValueError(f"`output_dir` must be another folder than a sweep's where rows are chosen, but got {folder}")
    tables = read_tables(paths)
    known = tables.standings()
    standings = choose(known, conditions)
    check_chosen(standings, known, conditions)
    rows = single_ranking(standings) if arguments.single_ranking else [standing.row for standing in standings]
    names = ["leaderboard.csv"] if chosen else ["trials.csv", "leaderboard.csv"]
    if writes and chosen:
        write_text_atomic(folder / "leaderboard.csv", to_csv(rows, LEADERBOARD_COLUMNS))
    elif writes:
        tables.write(folder)
    if writes and arguments.format == "markdown":
        names.append("leaderboard.md")
        write_text_atomic(folder / "leaderboard.md", to_markdown(rows, columns or LEADERBOARD_COLUMNS))
    printed = arguments.print or not writes
    if writes:
        count = f"{len(rows)} rows of {len(tables)} records" if chosen else f"{len(tables)} records"
        note = f"{count} -> {', '.join(str(folder / name) for name in names)}"
        print(note, file=sys.stderr if printed else sys.stdout)  # standard output is the table's
    if printed and arguments.format is None:
        named = rows if columns else [{**row, "protocol": protocol_of(row)} for row in rows]
        _show(to_text(named, columns or PRINTED_COLUMNS, HEADINGS))
    elif printed:
        as_text = to_csv if arguments.format == "csv" else to_markdown
        _show(as_text(rows, columns or LEADERBOARD_COLUMNS))


def _compare(arguments: argparse.Namespace) -> None:
    """The best rows of each path, printed; also written where a folder is named."""
    paths, conditions = arguments.paths, [parse_condition(text) for text in arguments.where]
    if len({os.path.realpath(path) for path in paths}) < max(2, len(paths)):
        raise ValueError(f"`compare` must be given two or more different PATHs, but got {' '.join(paths)}")
    if arguments.columns:
        raise ValueError(f"`columns` must be left out beside `compare`, but got {arguments.columns}")
    labels = [os.path.basename(os.path.normpath(path)) for path in paths]
    if len(set(labels)) < len(labels):
        labels = paths
    known = {label: read_tables([path]).standings() for label, path in zip(labels, paths, strict=True)}
    chosen = {label: choose(rows, conditions) for label, rows in known.items()}
    check_chosen([*chain(*chosen.values())], [*chain(*known.values())], conditions)
    lines = compare(chosen)
    readable = shown(lines)
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        write_text_atomic(folder / "compare.csv", to_csv(lines, COMPARE_COLUMNS))
        write_text_atomic(folder / "compare.md", to_markdown(readable, SHOWN_COLUMNS))
        print(f"{len(lines)} rows -> {folder / 'compare.csv'}, {folder / 'compare.md'}", file=sys.stderr)
    rankings = {standing.ranking for rows in chosen.values() for standing in rows}
    if len(rankings) == len(lines) > 1:
        print(f"synq: no two PATHs have rows that may be compared: {differences(rankings)}", file=sys.stderr)
    if arguments.format == "csv":
        _show(to_csv(lines, COMPARE_COLUMNS))
    else:
        _show(to_text(readable, SHOWN_COLUMNS) if arguments.format is None else to_markdown(readable, SHOWN_COLUMNS))


def _columns(text: str | None) -> list[str]:
    """The columns that are asked for; none: the usual ones."""
    return [check_column("columns", name.strip().replace("-", "_")) for name in (text or "").split(",") if name.strip()]


def _show(text: str) -> None:
    """Print a table, also where the terminal lacks a letter of it or a reader such as `head` leaves early."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
