"""Loading of a finished run: record, settings, teacher, student, synthetic sets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from synq.common.error_text import one_line
from synq.config.run import RunConfig, config_digest, config_from_dict, make_absolute, with_overrides
from synq.quant.student import Student, build_student
from synq.runs.finished_folder import finished_folder
from synq.runs.record import RunRecord, read_record
from synq.runs.reuse import STUDENT_FILE, check_student
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.run_sets import set_names, set_store
from synq.synthesis.store import SetStore
from synq.teacher.preprocessing import stored_rule
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.trust import check_trusted

MAX_REASON = 300
"""Characters of a reason that PyTorch gives, which may list every tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run, loaded from its folder."""

    folder: Path
    """The run's folder."""
    record: RunRecord
    """Its record."""
    config: RunConfig
    """Its settings, with the current paths."""
    teacher: Teacher
    """Its teacher."""
    student: Student
    """Its fine-tuned student, on the CPU."""

    def synthetic_sets(self) -> tuple[SyntheticSet, SyntheticSet]:
        """Load the training and the held-out set from the run's store; they are never synthesized again.

        Raises:
            FileNotFoundError: A set is not in the store.
            ValueError: The digest of a set differs from the record.
        """
        store = set_store(self.config)
        digests = (self.record.set_digest, self.record.heldout_digest)
        train_set, heldout = (
            _load_set(store, name, digest)
            for name, digest in zip(set_names(self.config, self.teacher), digests, strict=True)
        )
        return train_set, heldout


def open_run(
    folder: str | Path, path_overrides: Mapping[str, Any] | None = None, teacher: Teacher | None = None
) -> Run:
    """Load a finished run: its record, teacher and student.

    Args:
        folder: The run's folder, the record in it, or a sweep's record of the trial (records/TRIAL.json).
        path_overrides: New values, by dotted key, of settings in PATH_SETTINGS whose files were moved since the run;
            the returned settings have them, the record is unchanged.
        teacher: The run's teacher if already loaded, `with_rule_of` its record; None loads it.

    Raises:
        FileNotFoundError: The folder has no finished run.
        ValueError: A file is damaged, the teacher's weights are not those of the run, or its code may not run.
    """
    path = finished_folder(folder)
    record = read_record(path / "record.json")
    config = config_from_dict(RunConfig, record.config, source=str(path / "record.json"))
    if config_digest(config) != record.config_digest:
        raise ValueError(
            f"`RUN` must have the settings with which it was run, but those in {path / 'record.json'} have another "
            "digest than its own: they were changed, or are those of another version of SynQ; copy the record again, "
            "or run these settings anew"
        )
    config = make_absolute(with_overrides(config, path_overrides or {}))
    if teacher is None:
        check_code(record, config, path / "record.json", named=(path_overrides or {}).get("teacher.spec"))
        teacher = with_rule_of(record, load_teacher(config.teacher))
    if teacher.digest != record.teacher.get("digest"):
        raise ValueError(
            f"`RUN` must be of the current weights of teacher {config.teacher.spec}, but {path} is of other weights, "
            "or of a version of SynQ or PyTorch that traces the teacher in another way"
        )
    student = build_student(teacher, config.quant)
    weights = path / STUDENT_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"`RUN` must hold student.safetensors, but {path} does not: run it again in another folder"
        )
    check_student(path, record)
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`RUN` must hold a readable student.safetensors, but {weights} is damaged ({one_line(error)}): run it "
            "again in another folder"
        ) from error
    try:
        student.net.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error)[:MAX_REASON]
        raise ValueError(f"`RUN` must hold a student of its teacher, but {weights} is none: {reason}") from error
    return Run(folder=path, record=record, config=config, teacher=teacher, student=student)


def check_code(record: RunRecord, config: RunConfig, source: str | Path, *, named: str | None = None) -> None:
    """Check that the code that makes the teacher of a run may run, see `synq.teacher.trust`.

    Args:
        record: The run's record.
        config: Its settings, with the current paths.
        source: Its file, for the message.
        named: The spec that the user gave; None without one.

    Raises:
        ValueError: It may not.
    """
    if named is None:
        check_trusted(config.teacher.spec, record.teacher.get("code"), source)


def with_rule_of(record: RunRecord, teacher: Teacher) -> Teacher:
    """Return the teacher of a run with the rule by which the run resized image files for it.

    An object may have stated the rule (`preprocessing` in Python), which the teacher's spec does not name.

    Args:
        record: The run's record; one of an earlier version names no rule, and the teacher keeps its own.
        teacher: The teacher as it was loaded.

    Raises:
        ValueError: The rule on record is damaged.
    """
    if "preprocessing" not in record.teacher:
        return teacher
    return replace(teacher, preprocessing=stored_rule(record.teacher["preprocessing"]))


def _load_set(store: SetStore, name: str, digest: str) -> SyntheticSet:
    """Load a set of a run and compare it with the digest in the record."""
    found = store.load(name)
    if found is None:
        hint = "give its new folder by `--runtime.store_dir`, or run `synq synthesize` with the same settings"
        raise FileNotFoundError(f"`RUN` must find its synthetic images, but {store.path(name)} does not exist: {hint}")
    if found.digest != digest:
        raise ValueError(f"`RUN` must find its synthetic images, but the set in {found.path} has another digest")
    return found
