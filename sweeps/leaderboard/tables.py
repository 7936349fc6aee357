"""Incremental trials.csv and leaderboard.csv: each record is parsed once, rewriting the files is cheap."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from synq.common.files import write_text_atomic
from synq.common.text_tables import Row, csv_line
from synq.runs.record import RunRecord

from ..constraints import Constraint
from .columns import LEADERBOARD_COLUMNS, TRIAL_COLUMNS
from .ranking import Ranking, Run, Standing, read_run, standings
from .settings import PREFIX, Values, line_of, setting_cells_of, varying


class Tables:
    """The tables of the records added so far; they do not depend on the order of adding.

    A new record only updates its row, the rows of its setting, their ranking and the Pareto fronts of rows measured in
    the same way. The records themselves are not kept.
    """

    def __init__(self, records: Iterable[RunRecord] = (), constraints: Sequence[Constraint] = ()) -> None:
        """Create tables of some records; equal ones count once.

        Args:
            records: The records.
            constraints: Bounds; rows that violate one are ranked last.
        """
        self.constraints = tuple(constraints)
        self._runs: dict[Hashable, Run] = {}
        self._settings: dict[Hashable, dict[Hashable, Run]] = {}
        self._rows: dict[Hashable, list[Standing]] = {}
        self._rankings: dict[Ranking, dict[Hashable, Standing]] = {}
        self._changed: dict[Hashable, None] = {}
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, record: RunRecord, name: str | None = None, *, source: str = "") -> Run:
        """Add a record and return the part of it that the tables keep.

        Args:
            record: The record; its configuration is checked here.
            name: Key for replacing or discarding the record: an earlier record of that name is removed. None adds the
                record unless there is an equal one (the same run read from two folders).
            source: Name of its file, for messages.

        Raises:
            ValueError: The configuration is damaged.
        """
        run = read_run(record, source, self.constraints)
        key = (tuple(run.row.values()), run.ranking, run.setting) if name is None else name
        self._remove(key)
        self._runs[key] = run
        setting = _setting(run)
        self._settings.setdefault(setting, {})[key] = run
        self._changed[setting] = None
        return run

    def discard(self, name: str) -> None:
        """Remove the record added under a name, if there is one."""
        self._remove(name)

    def varying(self) -> list[str]:
        """Return the dotted keys of the settings that vary between the runs; each is a column of both tables."""
        return varying(self.settings())

    def settings(self) -> list[Values]:
        """Return the settings of every run, in no particular order."""
        return [run.settings for run in self._runs.values()]

    def columns(self) -> tuple[str, ...]:
        """Return the columns of leaderboard.csv: the usual ones, and `params.KEY` for each setting that varies."""
        return (*LEADERBOARD_COLUMNS, *(f"{PREFIX}{key}" for key in self.varying()))

    def trial_rows(self) -> list[Row]:
        """Return one row per record, sorted by group and name."""
        keys = self.varying()
        return [run.row | setting_cells_of(run.settings, keys) for run in self._sorted_runs()]

    def leaderboard_rows(self) -> list[Row]:
        """Return one ranked row per setting with at least one completed run; see `ranking.standings`."""
        keys = self.varying()
        return [standing.row | setting_cells_of(standing.settings, keys) for standing in self.standings()]

    def standings(self) -> list[Standing]:
        """Return the rows of the leaderboard with the values that determine their ranks; read-only, not copies."""
        self._update()
        return [standing for ranking in self._sorted_rankings() for standing in self._rankings[ranking].values()]

    def write(self, folder: str | Path) -> None:
        """Write trials.csv and leaderboard.csv into `folder`, each atomically.

        Raises:
            OSError: The folder cannot be written, or the disk is full.
        """
        keys = self.varying()
        new = [f"{PREFIX}{key}" for key in keys]
        trials = [csv_line([*TRIAL_COLUMNS, *new])]
        trials += [f"{run.line}{line_of(run.settings, keys)}" for run in self._sorted_runs()]
        write_text_atomic(Path(folder) / "trials.csv", "\n".join(trials) + "\n")
        ranked = [csv_line([*LEADERBOARD_COLUMNS, *new])]
        ranked += [f"{standing.line()}{line_of(standing.settings, keys)}" for standing in self.standings()]
        write_text_atomic(Path(folder) / "leaderboard.csv", "\n".join(ranked) + "\n")

    def _remove(self, key: Hashable) -> None:
        run = self._runs.pop(key, None)
        if run is not None:
            setting = _setting(run)
            del self._settings[setting][key]
            self._changed[setting] = None

    def _sorted_runs(self) -> Iterable[Run]:
        self._runs = dict(sorted(self._runs.items(), key=lambda item: item[1].sort_key))  # nearly sorted: linear time
        return self._runs.values()

    def _sorted_rankings(self) -> list[Ranking]:
        return sorted(self._rankings, key=Ranking.order)

    def _update(self) -> None:
        """Update the rows of the changed settings, their rankings and Pareto fronts."""
        rankings: dict[Ranking, None] = {}
        for setting in self._changed:
            for old in self._rows.pop(setting, ()):
                del self._rankings[old.ranking][setting]
                rankings[old.ranking] = None
            runs = self._settings[setting]
            if not runs:
                del self._settings[setting]
                continue
            self._rows[setting] = standings(runs.values(), self.constraints)
            for new in self._rows[setting]:
                self._rankings.setdefault(new.ranking, {})[setting] = new
                rankings[new.ranking] = None
        self._changed = {}
        for ranking in rankings:
            rows = dict(sorted(self._rankings.pop(ranking).items(), key=lambda item: item[1].sort_key()))
            for rank, standing in enumerate(rows.values(), start=1):
                standing.row |= {"rank": rank, "best": int(rank == 1 and not standing.is_violating)}
            if rows:
                self._rankings[ranking] = rows
        for family in {ranking.family(): None for ranking in rankings}:
            for column, mark in (("size_bytes", "pareto_size"), ("bitops", "pareto_bitops")):
                mark_front(self._family(family), column, mark)

    def _family(self, family: Ranking) -> Iterator[Standing]:
        for ranking, rows in self._rankings.items():
            if ranking.family() == family:
                yield from rows.values()


def _setting(run: Run) -> tuple[Any, ...]:
    """Return the key of runs that may share a row."""
    return (run.ranking.group(), run.setting)


def mark_front(rows: Iterable[Standing], column: str, mark: str) -> None:
    """Set `mark` to 1 for rows on the Pareto front of mean objective and `column`, else 0; None if `column` is unknown.

    A row is on the front if no other is at least as good in both and better in one: two tied rows are both on it. Rows
    that violate a constraint are neither on it nor compared.

    Args:
        rows: Comparable rows.
        column: size_bytes or bitops; lower is better.
        mark: Column to set.
    """
    points = []
    for number, standing in enumerate(rows):
        price = standing.row[column]
        known = price is not None and math.isfinite(price)
        standing.row[mark] = 0 if known else None
        if known and not standing.is_violating:
            points.append((price, standing.cost, number, standing.row))
    best_cost, best_price = math.inf, math.inf
    for price, cost, _, row in sorted(points):
        # Earlier points are no more expensive, so only a better objective, or a tie in both, is on the front.
        if cost < best_cost or (cost, price) == (best_cost, best_price):
            row[mark] = 1
            best_cost, best_price = cost, price
