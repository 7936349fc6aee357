"""Verification of sweeps and tables: plans, records, runs and images of a folder, and duplicates over all of them.

Each kind of path has its checks: those of a run and of an export are `synq.verification`. Neither Ray nor Optuna
is imported.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from synq.config.run import RunConfig, config_from_dict
from synq.runs.record import RunRecord, read_record
from synq.runs.record_checks import is_same
from synq.synthesis.dataset import load_set
from synq.verification.export_files import verify_export, verify_packed
from synq.verification.findings import Findings
from synq.verification.run_files import same_results, verify_record, verify_run

from .constraints import constraints_of
from .leaderboard.ranking import RANK_COLUMNS, Run, disagreement, read_run
from .leaderboard.tables import Tables
from .state.plans import read_plan, read_sweep_file

PERCENTS = ("teacher_top1", "rtn_top1", "top1", "top1_mean", "top5")
TABLES = ("trials.csv", "leaderboard.csv")
KEYS = ("config_digest", "seed", "data_seed", "model", "eval_digest", "teacher_digest")
"""Columns that two rows of one setting, seed and measurement have in common."""


def verify(paths: Sequence[str | Path], *, deep: bool = False) -> Findings:
    """Check runs, sweeps, exports, packed files and tables, each by itself and the records against each other.

    Args:
        paths: Folders or files.
        deep: Whether to measure again what can be measured.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A path is nothing that can be checked.
    """
    findings = Findings()
    runs: list[Run] = []
    for path in map(Path, paths):
        runs += _verify(path, findings, deep)
    _duplicates(runs, findings)
    return findings


def _verify(path: Path, findings: Findings, deep: bool) -> list[Run]:
    """Check one path; return its records as runs of a table."""
    if path.suffix == ".csv":
        return _table(path, findings)
    if path.suffix == ".safetensors":
        verify_packed(path, findings)
        return []
    if path.is_file() and path.name != "record.json":
        return _runs({path: verify_record(path, findings)})
    folder = path.parent if path.is_file() else path
    if (folder / "records").is_dir() or (folder / "sweep.json").is_file():
        return _sweep(folder, findings, deep)
    if any((folder / name).is_file() for name in ("record.json", "config.json", "checkpoint.pt", "prepared.pt")):
        return _run(folder, findings, deep)
    if (folder / "card.json").is_file():
        verify_export(folder, findings, deep=deep)
        return []
    inner = [part for part in sorted(folder.iterdir()) if part.is_dir() and _is_work(part)]
    if not inner:
        raise ValueError(
            f"`PATH` must be a run, a sweep, an export, a packed student, a table, or a folder of those, but got {path}"
        )
    return [run for part in inner for run in _verify(part, findings, deep)]


def _is_work(folder: Path) -> bool:
    names = ("record.json", "config.json", "checkpoint.pt", "sweep.json", "card.json")
    return (folder / "records").is_dir() or any((folder / name).is_file() for name in names)


def _run(
    folder: Path, findings: Findings, deep: bool, *, with_sets: bool = True, is_stopped: bool = False
) -> list[Run]:
    verify_run(folder, findings, deep=deep, with_sets=with_sets, is_stopped=is_stopped)
    path, record = folder / "record.json", None
    if path.is_file():
        try:
            record = read_record(path)
        except ValueError:  # found above
            record = None
    if (folder / "export" / "card.json").is_file():
        verify_export(folder / "export", findings, record=record, deep=deep)
    return _runs({path: record})


def _runs(records: Mapping[Path, RunRecord | None]) -> list[Run]:
    """Return the readable ones of records as runs of a table."""
    found = []
    for path, record in records.items():
        try:
            if record is not None:
                found.append(read_run(record))
                object.__setattr__(found[-1], "source", str(path))
        except ValueError:  # of its configuration, which is found elsewhere
            continue
    return found


def _sweep(root: Path, findings: Findings, deep: bool) -> list[Run]:
    """Check the files of a sweep, its runs among them."""
    about = findings.check(root / "sweep.json", lambda: read_sweep_file(root / "sweep.json")) or {}
    if not (root / "sweep.json").is_file():
        findings.add(root / "sweep.json", "is missing; the command of the sweep makes it again")
    plans = {path.stem: findings.check(path, partial(read_plan, path)) for path in _json(root / "plans")}
    records = {path: verify_record(path, findings) for path in _json(root / "records")}
    for path, record in records.items():
        if record is None:
            continue
        if record.name != path.stem:
            findings.add(path, f"is the record of {record.name}")
        plan = plans.get(path.stem)
        if path.stem not in plans:
            findings.add(path, "has no plan; the command of the sweep makes it again")
        elif plan is not None and plan.config_digest != record.config_digest:
            findings.add(path, f"is of another run than its plan, with config_digest {record.config_digest}")
        _verify_copy(root, path, record, findings)
    read = [record for record in records.values() if record is not None]
    stopped = {f"{record.config.get('name')}-{record.config_digest}" for record in read if record.status != "completed"}
    for folder in sorted((root / "runs").glob("*/")):
        _run(folder, findings, deep, with_sets=False, is_stopped=folder.name in stopped)
    for folder in sorted((root / "store").glob("*/")):
        if not folder.suffix and folder.name != "locks":
            findings.check(folder, partial(load_set, folder))
    _tables(root, {path.stem: record for path, record in records.items()}, findings, is_whole="finished" in about)
    return _runs(records)


def _json(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _verify_copy(root: Path, path: Path, record: RunRecord, findings: Findings) -> None:
    """Compare the record of a trial with that in the folder of its run."""
    config = config_from_dict(RunConfig, record.config)
    copy = root / "runs" / f"{config.name}-{record.config_digest}" / "record.json"
    if record.status != "completed" or not copy.is_file():
        return
    try:
        other = read_record(copy)
    except ValueError:  # found with its run
        return
    if differing := same_results(record, other):
        findings.add(path, f"differs from {copy}: {differing}")


def _tables(root: Path, records: Mapping[str, RunRecord | None], findings: Findings, *, is_whole: bool = True) -> None:
    """Compare the tables of a sweep with its records; those of a running one may lag by some trials."""
    tables = Tables(constraints=constraints_of([root]))
    for name, record in records.items():
        if record is not None:
            tables.add(record, name)
    for name, rows in zip(TABLES, (tables.trial_rows(), tables.leaderboard_rows()), strict=True):
        path = root / name
        if path.is_file():
            findings.num_checked += 1
            _compare(path, rows, findings, is_whole)


def _compare(path: Path, rows: Sequence[Mapping[str, object]], findings: Findings, is_whole: bool) -> None:
    found, left_out = _rows(path, findings), set[str]()
    if len(found) != len(rows):
        if is_whole:
            findings.add(path, f"has {len(found)} rows, but its records give {len(rows)}: {_AGAIN}")
            return
        left_out = {*RANK_COLUMNS, "num_seeds", "num_failed"}
    unknown = {*(found[0] if found else ())} - {*(rows[0] if rows else ())}
    if unknown:
        findings.add(path, f"has the column {min(unknown)}, which its records do not give: {_AGAIN}")
        return
    key = "trial" if path.name == TABLES[0] else "config_digest"
    by_key = {str(row[key]): row for row in rows}
    for number, row in enumerate(found, 2):
        wanted = rows[number - 2] if len(found) == len(rows) else by_key.get(row.get(key) or "", {})
        if not wanted:
            findings.add(path, f"line {number} is of no record: {_AGAIN}")
            return
        for name, text in row.items():
            value = wanted.get(name)
            if name in wanted and name not in left_out and not _is_cell(text, value):
                findings.add(
                    path, f"line {number} has {name} = {text or 'empty'}, but its records give {value}: {_AGAIN}"
                )
                return


_AGAIN = "`synq leaderboard` of the folder makes it again"


def _is_cell(text: str, value: object) -> bool:
    if value is None or isinstance(value, str):
        return text == (value or "")
    try:
        return is_same(float(text), float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return text == str(value)


def _rows(path: Path, findings: Findings) -> list[dict[str, str]]:
    def read() -> list[dict[str, str]]:
        rows: list[dict[str, str]] = []
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None in row or None in row.values():  # cells without a heading, or headings without a cell
                    raise csv.Error(f"line {len(rows) + 2} has another number of cells than the heading")
                rows.append(dict(row))
        return rows

    try:
        return read()
    except (csv.Error, UnicodeDecodeError) as error:
        findings.add(path, f"is no table: {error}")
        return []


def _table(path: Path, findings: Findings) -> list[Run]:
    """Check the rows of a table by themselves, and by the records next to it."""
    findings.num_checked += 1
    rows = _rows(path, findings)
    if rows and not {"model", "config_digest"} & set(rows[0]):
        raise ValueError(
            f"`PATH` must be trials.csv, leaderboard.csv or a selection of it, but {path} has other columns"
        )
    for number, row in enumerate(rows, 2):
        for text in _row_faults(row):
            findings.add(path, f"line {number}: {text}")
    seen: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for number, row in enumerate(rows, 2):
        line, first = seen.setdefault(tuple(row.get(name) or "" for name in KEYS), (number, row))
        if row.get("config_digest") and first.get("objective_value") != row.get("objective_value"):
            findings.add(path, f"lines {line} and {number} are of one setting and seed, but differ")
    folder = path.parent
    if path.name in TABLES and (folder / "records").is_dir():
        records = {file.stem: verify_record(file, findings) for file in _json(folder / "records")}
        _tables(folder, records, findings)
    return []


def _row_faults(row: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong in a row: ranges, drop = teacher - top-1, bits."""
    numbers: dict[str, float] = {}
    for name in (*PERCENTS, "drop", "objective_value", "size_bytes", "bitops", "weight_bits", "act_bits", "num_eval"):
        if not (text := row.get(name)):
            continue
        try:
            numbers[name] = float(text)
        except ValueError:
            yield f"{name} is no number: {text}"
    for name in PERCENTS:
        if name in numbers and not 0 <= numbers[name] <= 100:
            yield f"{name} is {numbers[name]:g}, but must be in [0, 100]"
    for name in ("weight_bits", "act_bits"):
        if name in numbers and not 2 <= numbers[name] <= 8:
            yield f"{name} is {numbers[name]:g}, but must be in [2, 8]"
    for name in ("size_bytes", "bitops", "objective_value"):
        if name in numbers and not numbers[name] >= -1e-4:
            yield f"{name} is {numbers[name]:g}, but must be >= 0"
    top1 = numbers.get("top1_mean", numbers.get("top1"))
    if top1 is not None and {"teacher_top1", "drop"} <= numbers.keys():
        expected = numbers["teacher_top1"] - top1
        if not is_same(expected, numbers["drop"]):
            yield f"drop is {numbers['drop']:g}, but teacher_top1 - top-1 is {expected:g}"


def _duplicates(runs: Iterable[Run], findings: Findings) -> None:
    """Add the records of one setting and seed that differ by more than rounding."""
    first: dict[object, Run] = {}
    for run in runs:
        if not run.is_result:
            continue
        kept = first.setdefault((run.ranking, run.setting, run.seeds), run)
        if differing := disagreement(kept, run):
            findings.add(run.source, f"is of one setting and seed with {kept.source}, but differs: {differing}")
