"""Records in, tables out: `trials.csv` (every run) and `leaderboard.csv` (settings, ranked). Pure functions; no Ray, no torch.

Ranks start again for everything that must not be compared: model and its weights (`teacher_digest`, first 16 digits), bit-widths (those
of the first and last layer too; empty: as the rest), protocol, act_points, objective, the images the objective was measured on and the
labelled images. Within such a group a row is one setting; its runs differ in their seeds only. Settings measured on more seeds come
first, because one lucky seed is no evidence; then the better mean objective. `num_data_seeds` counts the synthetic sets' seeds behind a
row: 1 with num_seeds > 1 says that data_seed was fixed, so that top1_std leaves out what the set contributes.
"""

import argparse
import csv
import io
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from synq.configs import RunConfig, config_digest, config_from_dict
from synq.results import RunRecord, read_record, write_text_atomic

LEADERBOARD_COLUMNS = (
    "rank", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1_mean", "top1_std",
    "num_seeds", "num_failed", "teacher_top1", "rtn_top1", "drop", "num_eval", "size_bytes", "bitops", "lowpass_cutoff", "cam_weight",
    "ce_weight", "difficulty_threshold", "lr", "set_digest", "config_digest", "commit", "versions", "device", "seconds",
    "num_data_seeds", "first_bits", "last_bits", "teacher_digest",
)  # fmt: skip
"""Columns of leaderboard.csv. New ones are appended; none is ever renamed."""
TRIAL_COLUMNS = (
    "trial", "status", "reason", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1",
    "top5", "teacher_top1", "rtn_top1", "drop", "num_eval", "seed", "data_seed", "size_bytes", "bitops", "lowpass_cutoff", "cam_weight",
    "ce_weight", "difficulty_threshold", "lr", "kept_share", "set_digest", "heldout_digest", "config_digest", "commit", "versions",
    "device", "host", "started", "seconds",
)  # fmt: skip
"""Columns of trials.csv. New ones are appended; none is ever renamed."""
SETTINGS = ("lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold", "lr")
Row = dict[str, Any]


def load_records(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Read the records of sweeps and runs.

    Args:
        paths: Record files, or folders: a sweep's (records/*.json), a run's (record.json), or one that holds such folders.

    Raises:
        FileNotFoundError: A path is absent or holds no record.
        ValueError: A record is damaged.
    """
    records = []
    for path in map(Path, paths):
        if path.is_file():
            files = [path]
        elif (path / "records").is_dir():
            files = sorted((path / "records").glob("*.json"))
        elif (path / "record.json").is_file():
            files = [path / "record.json"]
        else:
            files = sorted({*path.glob("*/records/*.json"), *path.glob("*/record.json")})
        if not files:
            raise FileNotFoundError(f"`path` must hold run records, but got {str(path)!r}")
        records += [load_record(file) for file in files]
    return records


def load_record(path: Path) -> RunRecord:
    """Read a record whose configuration reads as well.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: The file is damaged.
    """
    record = read_record(path)
    config_from_dict(RunConfig, record.config, source=str(path))
    return record


def trial_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per record, sorted by group and name."""
    rows = []
    for record in sorted(
        records, key=lambda record: (_place(record), record.name, record.config_digest, record.started)
    ):
        row = {column: getattr(record, column, None) for column in TRIAL_COLUMNS}
        row |= _settings(record)
        row |= {"trial": record.name, "seconds": record.total_seconds, "versions": _versions(record.versions)}
        rows.append(row)
    return rows


def leaderboard_rows(records: Iterable[RunRecord]) -> list[Row]:
    """Return one row per setting with at least one completed run, ranked within its group.

    objective_value, top1_mean, teacher_top1, rtn_top1 and drop are means over the setting's completed seeds (`num_seeds`), top1_std is
    the sample standard deviation (denominator num_seeds - 1; empty for one seed), seconds is the mean of one run. set_digest and
    config_digest are those of the completed run with the lowest seeds. num_failed counts failed runs of the setting. A pruned run is
    no result: it neither ranks nor counts.
    """
    groups: dict[tuple[Any, ...], dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.status != "pruned":
            config = config_from_dict(RunConfig, record.config, source=f"record {record.name}")
            groups[_place(record)][config_digest(config, with_seeds=False)].append(record)
    rows = []
    for place in sorted(groups):
        for ranking in _rankings(groups[place]).values():
            for rank, row in enumerate(sorted(ranking, key=_merit), start=1):
                rows.append({**row, "rank": rank})
    return rows


def _rankings(settings: dict[str, list[RunRecord]]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one place by what they were measured with: rows of different keys are never ranked against each other."""
    rankings: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for digest in sorted(settings):
        parts: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
        failed: set[tuple[int, int]] = set()
        for record in settings[digest]:
            if record.status == "completed" and _finite(record.objective_value):
                parts[_measure(record)].append(record)
            else:
                failed.add((record.seed, record.data_seed))
        for measure in sorted(parts):
            rankings[measure].append(_row(parts[measure], failed))
    return {measure: rankings[measure] for measure in sorted(rankings)}


def _row(runs: Sequence[RunRecord], failed: set[tuple[int, int]]) -> Row:
    by_seed: dict[tuple[int, int], RunRecord] = {}
    for record in sorted(
        runs, key=lambda record: (record.seed, record.data_seed, record.started, record.host, record.name)
    ):
        by_seed.setdefault((record.seed, record.data_seed), record)  # the same run twice (merged sweeps) counts once
    kept = list(by_seed.values())
    first = kept[0]
    top1 = [record.top1 for record in kept if record.top1 is not None]
    row: Row = {column: getattr(first, column, None) for column in LEADERBOARD_COLUMNS}
    row |= _settings(first)
    row |= _edge_bits(first)
    row |= {
        "objective_value": _mean(record.objective_value for record in kept),
        "top1_mean": _mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "num_seeds": len(kept),
        "num_failed": len(failed - set(by_seed)),
        "teacher_top1": _mean(record.teacher_top1 for record in kept),
        "rtn_top1": _mean(record.rtn_top1 for record in kept),
        "drop": _mean(record.drop for record in kept),
        "commit": _joined(record.commit for record in kept),
        "versions": _joined(_versions(record.versions) for record in kept),
        "device": _joined(record.device for record in kept),
        "seconds": _mean(record.total_seconds for record in kept),
        "num_data_seeds": len({record.data_seed for record in kept}),
        "teacher_digest": str(first.teacher.get("digest", ""))[:16],
    }
    return row


def _place(record: RunRecord) -> tuple[Any, ...]:
    """Sort key of a record's group; wide widths first."""
    edges = (-(bits or 0) for bits in _edge_bits(record).values())
    widths = (-record.weight_bits, -record.act_bits)
    return (record.model, *widths, record.protocol, *edges, record.act_points, record.objective)


def _edge_bits(record: RunRecord) -> dict[str, int | None]:
    """Widths of the first and last layer; None: as the rest."""
    quant = record.config.get("quant", {})
    return {key: quant.get(key) for key in ("first_bits", "last_bits")}


def _measure(record: RunRecord) -> tuple[str, ...]:
    """What the figures were measured with: the teacher's weights, and the very images, labelled ones included."""
    evaluation = record.config.get("evaluation", {})
    labelled = [str(evaluation.get(key)) for key in ("dataset", "num_images", "selection_fraction")]
    labelled[0] = Path(labelled[0]).name
    images = [record.heldout_digest] if record.objective == "synthetic" else labelled
    return (str(record.teacher.get("digest", "")), record.eval_digest, *images)


def _merit(row: Row) -> tuple[Any, ...]:
    sign = -1 if row["objective"] == "selection" else 1
    return (-row["num_seeds"], sign * row["objective_value"], row["config_digest"])


def _settings(record: RunRecord) -> Row:
    """The searched settings; the cutoff always in DFT bins, None (no filter) as a word, because an empty cell reads as unknown."""
    finetune = record.config.get("finetune", {})
    values = {name: finetune.get(name) for name in SETTINGS}
    if finetune and values["lowpass_cutoff"] is None:
        values["lowpass_cutoff"] = "None"
    elif finetune.get("lowpass_unit") == "nyquist":
        size = record.teacher.get("input_size")  # unknown where a run failed before its teacher was loaded
        values["lowpass_cutoff"] = values["lowpass_cutoff"] * min(size[-2:]) / 2 if size else None
    return values


def _versions(versions: dict[str, str]) -> str:
    return " ".join(f"{name}={version}" for name, version in sorted(versions.items()))


def _joined(values: Iterable[str]) -> str:
    return "; ".join(sorted(set(values)))


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def cell(value: Any) -> str:
    """Return a CSV cell: numbers with up to 8 significant digits, None and NaN empty, texts safe to open in a spreadsheet.

    A text that starts with = + - @ (or a tab or a line end before it) would be run as a formula there; it gets a leading apostrophe.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = " ".join(str(value).split())
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


def to_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Return rows as CSV text with a header; the same rows give the same bytes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row.get(column)) for column in columns] for row in rows)
    return buffer.getvalue()


def write_tables(records: Sequence[RunRecord], folder: str | Path) -> None:
    """Write trials.csv and leaderboard.csv into `folder`, each by rename.

    Raises:
        OSError: The folder or the disk refuses.
    """
    write_text_atomic(Path(folder) / "trials.csv", to_csv(trial_rows(records), TRIAL_COLUMNS))
    write_text_atomic(Path(folder) / "leaderboard.csv", to_csv(leaderboard_rows(records), LEADERBOARD_COLUMNS))


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the tables of sweeps from their records; several sweeps become one pair of tables."""
    parser = argparse.ArgumentParser(prog="leaderboard", description=main.__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of a sweep or a run, or a record file")
    parser.add_argument("--output-dir", help="folder for the tables; needed for more than one PATH (default: PATH)")
    arguments = parser.parse_args(argv)
    try:
        missing = [path for path in arguments.paths if not Path(path).exists()]
        if missing:
            raise FileNotFoundError(f"`PATH` must exist, but got {missing[0]}")
        if arguments.output_dir is None and (len(arguments.paths) > 1 or not Path(arguments.paths[0]).is_dir()):
            raise ValueError(
                f"`output_dir` must be given unless PATH is one folder, but got {' '.join(arguments.paths)}"
            )
        records = load_records(arguments.paths)
        folder = Path(arguments.output_dir or arguments.paths[0])
        write_tables(records, folder)
    except (ValueError, OSError) as error:
        print(f"synq: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(records)} records -> {folder / 'trials.csv'}, {folder / 'leaderboard.csv'}")
    return 0
