"""Read run records and write `trials.csv` (every run) and `leaderboard.csv` (ranked settings). Imports no Ray, torch.

Columns: `columns.py`. Rows and their ranks: `ranking.py`. Incremental updates: `tables.py`. Filters and comparisons:
`views.py`.
"""

from collections.abc import Iterable
from pathlib import Path

from synq.common.faults import reading
from synq.common.notices import print_notice
from synq.common.text_tables import Row, cell, to_csv
from synq.runs.record import RunRecord, read_record

from ..constraints import constraints_of
from .ranking import read_setting
from .tables import Tables

__all__ = [
    "Row",
    "Tables",
    "cell",
    "leaderboard_rows",
    "load_record",
    "load_records",
    "read_tables",
    "record_files",
    "to_csv",
    "trial_rows",
    "write_tables",
]


def record_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the record files of sweeps and runs.

    Args:
        paths: Record files, or folders: of a sweep (records/*.json), of a run (record.json), or a parent of such
            folders.

    Raises:
        FileNotFoundError: A path does not exist or has no record.
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
        FileNotFoundError: A path does not exist or has no record.
        ValueError: A record is damaged.
    """
    return [load_record(file) for file in record_files(paths)]


def load_record(path: Path) -> RunRecord:
    """Read a record and check its configuration.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is damaged.
    """
    record = read_record(path)
    read_setting(record.config, source=str(path))
    return record


def read_tables(paths: Iterable[str | Path]) -> tuple[Tables, int]:
    """Read the records of sweeps and runs into tables, each record parsed once.

    A record that is damaged, or contradicts itself, is left out and named by a notice, unless none remains. Rows are
    ranked by the constraints of the sweeps, `constraints_of`.

    Args:
        paths: As for `record_files`.

    Returns:
        The tables, and the number of records that were left out.

    Raises:
        FileNotFoundError: A path does not exist or has no record.
        ValueError: No record can be read, or a path that is a record cannot.
    """
    given = list(map(Path, paths))
    tables, wrong = Tables(constraints=constraints_of(given)), []
    for file in record_files(given):
        try:
            with reading(file, "a run record"):
                tables.add(read_record(file), source=str(file))
        except ValueError as error:
            if file in given:
                raise
            wrong.append(error)
    if wrong and not len(tables):
        raise wrong[0]
    for left_out in wrong:
        print_notice(f"warning: left out: {left_out}")
    return tables, len(wrong)


def trial_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per record, sorted by group and name."""
    return Tables(records).trial_rows()


def leaderboard_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per setting with at least one completed run, with its rank; see `columns.py` for the columns."""
    return Tables(records).leaderboard_rows()


def write_tables(records: Iterable[RunRecord], folder: str | Path) -> None:
    """Write trials.csv and leaderboard.csv into `folder`, each atomically.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    Tables(records).write(folder)
