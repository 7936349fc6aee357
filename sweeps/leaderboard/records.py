"""Records in, tables out: `trials.csv` (every run) and `leaderboard.csv` (settings, ranked). Knows neither Ray nor torch.

What a row says and what may be ranked against what: ranking.py. One record at a time: tables.py. Rows chosen, paths compared:
views.py. Rows as text: table_text.py. Here: the files.
"""

from collections.abc import Iterable
from pathlib import Path

from synq.common.text_tables import Row, cell, to_csv
from synq.runs.record import RunRecord, read_record

from .ranking import LEADERBOARD_COLUMNS, TRIAL_COLUMNS, read_setting
from .tables import Tables

__all__ = [
    "LEADERBOARD_COLUMNS",
    "TRIAL_COLUMNS",
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
PRINTED_COLUMNS = (
    "rank", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1_mean", "top1_std",
    "num_seeds", "num_failed", "drop", "lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold", "lr", "pareto_size",
)  # fmt: skip
HEADINGS = {
    "weight_bits": "W", "act_bits": "A", "act_points": "points", "objective_value": "value", "top1_mean": "top1", "top1_std": "std",
    "num_seeds": "n", "num_failed": "failed", "lowpass_cutoff": "cutoff", "cam_weight": "cam", "ce_weight": "ce",
    "difficulty_threshold": "tau", "pareto_size": "pareto",
}  # fmt: skip


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
