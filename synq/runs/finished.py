"""What a finished run has left, opened again: record, settings, teacher, student, synthetic sets."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from synq.config.run import RunConfig, config_from_dict, make_absolute, with_overrides
from synq.pipeline import build_student, set_names, set_store
from synq.quant.student import Student
from synq.runs.record import RunRecord, read_record
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.weight_files import read_weights


def open_run(
    folder: str | Path, places: Mapping[str, Any] | None = None, teacher: Teacher | None = None
) -> tuple[Path, RunRecord, RunConfig, Teacher, Student]:
    """Return folder, record, settings, teacher and student of a finished run.

    Args:
        folder: The run's folder, the record in it, or a sweep's record of it (records/TRIAL.json).
        places: Settings of PLACES that differ from the record's; they are in the returned settings, not in the record.
        teacher: The run's teacher, where it is there already; None loads it.

    Raises:
        FileNotFoundError: It is no run, or not a finished one.
        ValueError: A file is damaged, or the teacher is another one than then.
    """
    path = Path(folder).resolve()
    if _is_trial(path):
        _check_completed(read_record(path), path)
    path = _run_folder(path)
    if not (path / "record.json").is_file():
        started = (path / "checkpoint.pt").exists() or (path / "config.json").exists()
        hint = "it is not finished, start its command again" if started else _one_of(path)
        raise FileNotFoundError(f"`RUN` must hold record.json, but {path} does not: {hint}")
    record = read_record(path / "record.json")
    _check_completed(record, path)
    config = config_from_dict(RunConfig, record.config, source=str(path / "record.json"))
    config = make_absolute(with_overrides(config, places or {}))
    teacher = teacher or load_teacher(config.teacher)
    if teacher.digest != record.teacher.get("digest"):
        raise ValueError(
            f"`RUN` must be of the teacher {config.teacher.spec} as it is now, but {path} is of other weights, or of a version of SynQ or "
            "PyTorch that traced them otherwise"
        )
    student = build_student(teacher, config.quant)
    weights = path / "student.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"`RUN` must hold student.safetensors, but {path} does not: run it again in another folder"
        )
    try:
        student.net.load_state_dict(read_weights(weights))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`RUN` must hold a student of its teacher, but {weights} is none: {reason}") from error
    return path, record, config, teacher, student


def synthetic_sets(config: RunConfig, teacher: Teacher, record: RunRecord) -> tuple[SyntheticSet, SyntheticSet]:
    """Return the held-out and the training set of a run, from its store; they are never made anew.

    Raises:
        FileNotFoundError: The store has them no longer.
        ValueError: They are others than those of the record.
    """
    store = set_store(config)
    sets = []
    names = reversed(set_names(config, teacher))
    for name, digest in zip(names, (record.heldout_digest, record.set_digest), strict=True):
        found = store.load(name)
        if found is None:
            hint = (
                "`--runtime.store_dir` says where it is now, `synq synthesize` with the run's settings makes it again"
            )
            raise FileNotFoundError(
                f"`RUN` must find its synthetic images, but {store.path(name)} is not there: {hint}"
            )
        if found.digest != digest:
            raise ValueError(f"`RUN` must find its synthetic images, but those in {found.path} are others")
        sets.append(found)
    return sets[0], sets[1]


def _check_completed(record: RunRecord, path: Path) -> None:
    if record.status != "completed":
        raise ValueError(f"`RUN` must be a completed run, but {path} is {record.status}: {record.reason}")


def _one_of(path: Path) -> str:
    """Say what to give in the place of a folder that is no run."""
    for file in sorted((path / "records").glob("*.json")):
        with suppress(ValueError):  # a damaged one does not hide the others
            if read_record(file).status == "completed" and _run_folder(file).is_dir():
                return f"it is a sweep, give one of its trials, such as {file}"
    return "give the folder of one run, runs/NAME-DIGEST"


def _is_trial(path: Path) -> bool:
    """Whether it is a sweep's record of a trial."""
    return path.suffix == ".json" and path.parent.name == "records" and path.is_file()


def _run_folder(path: Path) -> Path:
    if path.name == "record.json":
        return path.parent
    if _is_trial(path):
        record = read_record(path)
        return path.parent.parent / "runs" / f"{record.config['name']}-{record.config_digest}"
    return path
