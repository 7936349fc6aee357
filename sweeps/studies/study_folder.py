"""The folder of a study's tables, one per teacher and setting, and the finished runs that belong to its table."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

from synq.common.digests import read_sealed
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.run import RunConfig, config_digest
from synq.runs.record import RunRecord, read_record, run_folder

Cell = TypeVar("Cell", bound=Hashable)


def same_result(first: RunConfig, second: RunConfig) -> bool:
    """Return whether two runs differ in their seeds only."""
    return config_digest(first, with_seeds=False) == config_digest(second, with_seeds=False)


def same_teacher(first: RunConfig, second: RunConfig) -> bool:
    """Return whether two runs have the same teacher; files count by their name."""
    return same_result(RunConfig(teacher=first.teacher), RunConfig(teacher=second.teacher))


def tables_folder(name: str, written: RunConfig, base: RunConfig, model: str) -> Path:
    """Return the folder of a study's tables: `<output_dir>/<name>` for the settings of its file.

    Other settings or another teacher, given on the command line, get a separate folder, `<name>-<model>-<digest>`,
    so that no table of other networks is overwritten.

    Args:
        name: Name of the study.
        written: The run of its file.
        base: The run with the command line's overrides.
        model: Name of the teacher of the records.
    """
    root = Path(base.runtime.output_dir)
    if same_result(written, base):
        return root / name
    return root / f"{name}-{model}-{config_digest(base, with_seeds=False)[:8]}"


def _same_labels(one: RunRecord, other: RunRecord, config: RunConfig) -> bool:
    """Return whether two records were measured on the same labeled images, whichever version computed their digests.

    Args:
        one, other: The records.
        config: A run whose labeled images they may be; they are read only if the digests differ.
    """
    from synq.pipeline import check

    digests = (one.eval_digest, other.eval_digest)
    if digests[0] == digests[1] or not all(digests):
        return digests[0] == digests[1]
    _, measure = check(config)
    return all(measure.has_labels_of(digest) for digest in digests)


def with_finished(
    runs: Mapping[Cell, RunConfig], done: Mapping[Cell, RunRecord], order: Mapping[Cell, RunConfig]
) -> dict[Cell, RunRecord]:
    """Return the records of a study with those of its other completed runs, so that a table never loses a run.

    Runs of other teacher weights or other labeled images are left out.

    Args:
        runs: The runs that were asked for.
        done: Their records.
        order: All runs of the study, in the order of its table.
    """
    first = next(iter(done.values()))
    records = {cell: done[cell] for cell in runs}
    for cell, config in order.items():
        file = run_folder(config) / "record.json"
        if cell in records or not file.is_file():
            continue
        record = read_record(file)
        same = record.teacher.get("digest") == first.teacher.get("digest")
        if record.status == "completed" and same and _same_labels(record, first, config):
            records[cell] = record
    ranks = {cell: number for number, cell in enumerate(order)}
    return dict(sorted(records.items(), key=lambda item: ranks.get(item[0], len(ranks))))


def stored_logits(path: Path) -> bytes | None:
    """Return the content of a file of logits of an earlier call; None without one, or, with a notice, a damaged one.

    Args:
        path: A file of `write_sealed`; one without a digest is of an earlier version and is computed again.
    """
    if not path.exists():
        return None
    try:
        content, is_sealed = read_sealed(path)
    except DamagedFileError as error:
        print_notice(f"warning: {error}; it is computed again")
        return None
    return content if is_sealed else None
