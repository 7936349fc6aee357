"""Read-only view of a sweep, or a folder of runs, for its page: records, plans, tables.

Imports neither Ray, Optuna nor torch, and takes no lock.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synq.common.faults import reading
from synq.runs.record import RunRecord, read_record

from ..constraints import Constraint, read_constraints
from ..leaderboard.ranking import Ranking, Standing
from ..leaderboard.records import record_files
from ..leaderboard.settings import searched_in
from ..leaderboard.tables import Tables
from ..space import Dimension, dimension_from
from ..state.plans import Plan, read_plan, read_sweep_file


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """Sweep, or folder of runs, as plain values.

    Attributes:
        name: Name of the sweep.
        root: Its folder.
        about: Content of sweep.json; empty for a folder of runs.
        dimensions: The search space.
        plans: Proposed trials by name.
        records: Records of finished trials by name.
        tables: Tables of the records.
        paths: File of each record by name.
        rankings: Ranking of each record by name.
        unread: Errors of records and plans that could not be read; they do not prevent the page.
    """

    name: str
    root: Path
    about: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    plans: dict[str, Plan]
    records: dict[str, RunRecord]
    tables: Tables
    paths: dict[str, Path]
    rankings: dict[str, Ranking]
    unread: list[str] = field(default_factory=list)

    @property
    def is_sweep(self) -> bool:
        """Whether this is a sweep, not a folder of single runs."""
        return bool(self.about)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Constraints of the last start."""
        return self.tables.constraints

    @property
    def running(self) -> list[str]:
        """Trials without a record: running, waiting or interrupted."""
        return [trial for trial in self.plans if trial not in self.records]

    @functools.cached_property
    def settings(self) -> list[str]:
        """Return the dotted keys of the settings that the sweep searches, then of those that vary as well."""
        return list(dict.fromkeys([*searched_in(self.about), *self.tables.varying()]))

    def standings(self) -> list[Standing]:
        """Return the rows of the leaderboard."""
        return self.tables.standings()

    def search_trials(self, group: str) -> list[tuple[Plan, RunRecord]]:
        """Return the finished trials of a group's search in order of proposal, without the re-runs on other seeds."""
        found = [plan for plan in self.plans.values() if plan.group == group and plan.stage == "search"]
        ended = [(plan, self.records[plan.trial]) for plan in found if plan.trial in self.records]
        return sorted(ended, key=lambda pair: pair[0].index)

    @property
    def groups(self) -> list[str]:
        """Keys of the groups, in the order of the spec."""
        return list(self.about.get("groups", {}))


def is_run(path: Path) -> bool:
    """Return whether a path is one run, or its record, rather than a folder of several."""
    has_run_files = any((path / name).is_file() for name in ("record.json", "config.json"))
    return path.is_file() or (has_run_files and not (path / "records").is_dir())


def record_of(path: Path) -> RunRecord:
    """Read the record of a run.

    Raises:
        FileNotFoundError: The run is not finished.
        ValueError: The record is damaged.
    """
    if path.is_dir() and not (path / "record.json").exists():
        raise FileNotFoundError(
            f"`PATH` must be a finished run, but {path} is not: start its command again to resume it"
        )
    return read_record(path / "record.json" if path.is_dir() else path)


def read_sweep(path: str | Path) -> SweepView:
    """Read a sweep, or a folder of runs, finished or not.

    Raises:
        FileNotFoundError: There is no record and no plan.
        ValueError: sweep.json is damaged.
    """
    root = Path(path)
    about = _about(root / "sweep.json")
    unread: list[str] = []
    with reading(root / "sweep.json", "a sweep"):
        constraints = read_constraints(about.get("constraints", {}))
    records, paths, rankings, tables = {}, {}, {}, Tables(constraints=constraints)
    parts: dict[str, Any] = {}
    for file in _record_files(root, may_be_empty=bool(about)):
        name = file.stem if file.parent.name == "records" else file.parent.name
        if name in records:  # a folder with several sweeps
            name = str(file.relative_to(root).with_suffix(""))
        try:
            with reading(file, "a run record"):
                record = _with_shared_parts(read_record(file), parts)
                # A run in two folders counts once.
                run = tables.add(record, name if about else None, source=str(file))
            records[name], paths[name], rankings[name] = record, file, run.ranking
        except (ValueError, FileNotFoundError) as error:
            unread.append(" ".join(str(error).split()))
    plans = {}
    for file in sorted((root / "plans").glob("*.json")) if about else []:
        try:
            with reading(file, "the plan of a trial"):
                plan = read_plan(file)
            plans[plan.trial] = plan
        except (ValueError, FileNotFoundError) as error:
            unread.append(" ".join(str(error).split()))
    with reading(root / "sweep.json", "a sweep"):
        space = tuple(map(dimension_from, _dimensions(about)))
    name = about.get("search", {}).get("name") or root.resolve().name
    return SweepView(
        name=name,
        root=root,
        about=about,
        dimensions=space,
        plans=plans,
        records=records,
        tables=tables,
        paths=paths,
        rankings=rankings,
        unread=unread,
    )


def _with_shared_parts(record: RunRecord, parts: dict[str, Any]) -> RunRecord:
    """Return a record whose parts are the objects of `parts` that equal them: most trials differ in few settings."""
    shared: dict[str, Any] = {}
    for name in ("config", "versions", "teacher"):
        values = getattr(record, name)
        shared[name] = {key: parts.setdefault(f"{key} {value!r}", value) for key, value in values.items()}
    return replace(record, **shared)


def _about(path: Path) -> dict[str, Any]:
    """Return the content of sweep.json, or {} if there is no such file.

    Raises:
        ValueError: The file is damaged, or is not a file of a sweep.
    """
    about = read_sweep_file(path)
    if about and not (isinstance(about.get("search"), dict) and isinstance(about.get("groups"), dict)):
        raise ValueError(f"`{path}` must hold a sweep's search and groups, but it does not")
    return about


def _record_files(root: Path, *, may_be_empty: bool) -> Sequence[Path]:
    try:
        return record_files([root])
    except FileNotFoundError:
        if not may_be_empty:
            raise
        return []


def _dimensions(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the search space of sweep.json; a list of points has only names, which are left out."""
    return [one for one in about.get("space", []) if isinstance(one, dict)]
