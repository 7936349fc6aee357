"""Tables as pandas DataFrames, with a column `params.KEY` for every setting that was searched or varies.

trials.csv and leaderboard.csv have the settings that vary. Imports neither Ray nor torch; pandas only when called.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synq.common.digests import read_sealed_json
from synq.common.text_tables import Row
from synq.runs.record import RunRecord

from ..constraints import Constraint, constraints_of
from ..space import value_at
from .columns import LEADERBOARD_COLUMNS, TRIAL_COLUMNS
from .records import load_records
from .settings import PREFIX, searched_in
from .tables import Tables

if TYPE_CHECKING:
    from pandas import DataFrame


def searched_settings(paths: Iterable[str | Path]) -> list[str]:
    """Return the dotted names of the settings that sweeps search, in the order of their spaces.

    Args:
        paths: Folders of sweeps; what is none has no search space.

    Raises:
        ValueError: A sweep.json is damaged.
    """
    files = [Path(path) / "sweep.json" for path in paths]
    return list(
        dict.fromkeys(name for file in files if file.is_file() for name in searched_in(read_sealed_json(file)[0]))
    )


def varying_settings(records: Sequence[RunRecord]) -> list[str]:
    """Return the dotted names of the settings that differ between runs, without those that have a column anyway."""
    return Tables(records).varying()


def value_of(record: RunRecord, key: str) -> Any:
    """Return a setting of a run, by its dotted name; None if the record has none."""
    try:
        return value_at(record.config, key)
    except KeyError:
        return None


def trial_frame(
    records: Sequence[RunRecord], settings: Sequence[str], constraints: Sequence[Constraint] = ()
) -> "DataFrame":
    """Return one row per run: the columns of trials.csv, and one for each of `settings`."""
    by_name: dict[tuple[Any, ...], RunRecord] = {_key(record.name, record): record for record in records}
    rows = Tables(records, constraints).trial_rows()
    return _frame(rows, TRIAL_COLUMNS, settings, lambda row: by_name.get((row["trial"], row["config_digest"])))


def leaderboard_frame(
    records: Sequence[RunRecord], settings: Sequence[str], constraints: Sequence[Constraint] = ()
) -> "DataFrame":
    """Return one row per setting with a completed run: the columns of leaderboard.csv, and one for each of `settings`.

    Rows are sorted as in leaderboard.csv: within each ranking, the best first.
    """
    by_digest = {record.config_digest: record for record in records}
    rows = Tables(records, constraints).leaderboard_rows()
    return _frame(rows, LEADERBOARD_COLUMNS, settings, lambda row: by_digest.get(row["config_digest"]))


def leaderboard(*paths: str | Path) -> "DataFrame":
    """Return the leaderboard of sweeps and runs as a DataFrame.

    Its columns are those of leaderboard.csv and `params.KEY` for every setting that one of the sweeps searches or that
    differs between the runs.

    Args:
        paths: Folders of sweeps or runs, parents of such folders, or records.

    Raises:
        FileNotFoundError: A path does not exist or has no record.
        ValueError: A file is damaged.
    """
    if not paths:
        raise ValueError("`paths` must name sweeps or runs, but got none")
    records = load_records(paths)
    return leaderboard_frame(records, all_settings(paths, records), constraints_of(paths))


def all_settings(paths: Iterable[str | Path], records: Sequence[RunRecord]) -> list[str]:
    """Return the searched settings of sweeps, then those that vary as well.

    Args:
        paths: As for `searched_settings`.
        records: Their records.
    """
    return list(dict.fromkeys([*searched_settings(paths), *varying_settings(records)]))


def _key(name: str, record: RunRecord) -> tuple[Any, ...]:
    return name, record.config_digest


def _frame(rows: Sequence[Row], columns: Sequence[str], settings: Sequence[str], record_of: Any) -> "DataFrame":
    import pandas as pd

    found: list[Mapping[str, Any]] = []
    for row in rows:
        record = record_of(row)
        values = {f"{PREFIX}{key}": None if record is None else value_of(record, key) for key in settings}
        found.append({**row, **values})
    return pd.DataFrame(found, columns=[*columns, *(f"{PREFIX}{key}" for key in settings)])
