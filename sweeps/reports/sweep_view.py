"""A sweep, or a folder of runs, read for its page: records, plans, tables. Knows neither Ray, Optuna nor torch, and locks nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synq.runs.record import RunRecord, read_record

from ..leaderboard.ranking import Standing
from ..leaderboard.records import record_files
from ..leaderboard.tables import Tables
from ..space import Dimension
from ..state.plans import Plan, read_plan, read_sweep_file


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """What a page needs of a sweep.

    Attributes:
        name: Its name.
        root: Its folder.
        about: What sweep.json says; empty for a folder of runs.
        dimensions: The search space.
        plans: Proposed trials by name.
        records: Ended trials by name.
        tables: Their tables.
        paths: File of each record.
        unread: Records that could not be read, each with the reason: one that is damaged does not hide the others.
    """

    name: str
    root: Path
    about: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    plans: dict[str, Plan]
    records: dict[str, RunRecord]
    tables: Tables
    paths: dict[str, Path]
    unread: list[str] = field(default_factory=list)

    @property
    def is_sweep(self) -> bool:
        """Whether it has a search: not so for a folder of single runs."""
        return bool(self.about)

    @property
    def running(self) -> list[str]:
        """Trials without a record: they run, wait, or were interrupted."""
        return [trial for trial in self.plans if trial not in self.records]

    def standings(self) -> list[Standing]:
        """Return the rows of the leaderboard."""
        return self.tables.standings()

    def search_trials(self, group: str) -> list[tuple[Plan, RunRecord]]:
        """Return the ended trials of a group's search, in the order in which they were proposed; not the re-runs on other seeds."""
        found = [plan for plan in self.plans.values() if plan.group == group and plan.stage == "search"]
        ended = [(plan, self.records[plan.trial]) for plan in found if plan.trial in self.records]
        return sorted(ended, key=lambda pair: pair[0].index)

    @property
    def groups(self) -> list[str]:
        """Keys of the groups, in the order of the spec."""
        return list(self.about.get("groups", {}))


def is_run(path: Path) -> bool:
    """Whether a path is one run, or a record of one, rather than a folder of several."""
    own = any((path / name).is_file() for name in ("record.json", "config.json"))
    return path.is_file() or (own and not (path / "records").is_dir())


def record_of(path: Path) -> RunRecord:
    """Read the record of a run.

    Raises:
        FileNotFoundError: The run is not finished.
        ValueError: The record is damaged.
    """
    if path.is_dir() and not (path / "record.json").exists():
        raise FileNotFoundError(
            f"`PATH` must be a finished run, but {path} is not: its command, started again, goes on"
        )
    return read_record(path / "record.json" if path.is_dir() else path)


def read_sweep(path: str | Path) -> SweepView:
    """Read a sweep, or a folder of runs; while it runs, too.

    Raises:
        FileNotFoundError: There is no record and no plan.
        ValueError: sweep.json is damaged.
    """
    root = Path(path)
    about = _about(root / "sweep.json")
    unread: list[str] = []
    records, paths, tables = {}, {}, Tables()
    for file in _record_files(root, begun=bool(about)):
        name = file.stem if file.parent.name == "records" else file.parent.name
        if name in records:  # a folder that holds several sweeps
            name = str(file.relative_to(root).with_suffix(""))
        try:
            record = read_record(file)
            tables.add(record, name if about else None, source=str(file))  # a run in two folders is one run
            records[name], paths[name] = record, file
        except (ValueError, FileNotFoundError) as error:
            unread.append(" ".join(str(error).split()))
    plans = {}
    for file in sorted((root / "plans").glob("*.json")) if about else []:
        try:
            plan = read_plan(file)
            plans[plan.trial] = plan
        except (ValueError, FileNotFoundError) as error:
            unread.append(" ".join(str(error).split()))
    space = tuple(Dimension(**{**one, "values": tuple(one["values"])}) for one in _dimensions(about))
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
        unread=unread,
    )


def _about(path: Path) -> dict[str, Any]:
    """What sweep.json says, {} where there is none.

    Raises:
        ValueError: It is damaged, or of something else.
    """
    about = read_sweep_file(path)
    if about and not (isinstance(about.get("search"), dict) and isinstance(about.get("groups"), dict)):
        raise ValueError(f"`{path}` must hold a sweep's search and groups, but it does not")
    return about


def _record_files(root: Path, *, begun: bool) -> Sequence[Path]:
    try:
        return record_files([root])
    except FileNotFoundError:
        if not begun:
            raise
        return []


def _dimensions(about: dict[str, Any]) -> list[dict[str, Any]]:
    """The space as sweep.json has it; a list of points has names alone."""
    return [one for one in about.get("space", []) if isinstance(one, dict)]
