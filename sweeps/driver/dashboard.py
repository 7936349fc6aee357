"""Optuna storage of a sweep's studies, for optuna-dashboard: a copy of the ledger, rebuilt at every start."""

import re

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from ..spec import SweepSpec
from .searcher import study_name

OWNER = "synq_sweep"
"""Attribute of a study: the folder or address of its sweep."""


def study_storage(spec: SweepSpec) -> BaseStorage | None:
    """Open the storage of a spec with an empty study for each group; studies of an earlier start are deleted.

    Raises:
        ValueError: The database cannot be opened, or has a study of the same name that belongs to another sweep.
    """
    address, owner = spec.search.study_storage, spec.search.output_dir
    if address == "none":
        return None
    if address == "journal":
        path = spec.output_dir / "optuna.journal"
        path.unlink(missing_ok=True)
        # The ledger admits one driver, so a lock that is left belongs to a killed one; Optuna 5.0.0 waits 30 s for it.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        storage: BaseStorage = JournalStorage(JournalFileBackend(str(path)))
    else:
        try:
            storage = RDBStorage(address)
        except Exception as error:  # SQLAlchemy and its drivers raise many types
            line = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"`study_storage` must be a database that can be opened, but got {_without_password(address)}: {line}"
            ) from error
    names = {study_name(spec, group) for group in spec.groups}
    for study in optuna.get_all_study_summaries(storage):
        if study.study_name not in names:
            continue
        if study.user_attrs.get(OWNER) != owner:
            raise ValueError(
                f"`study_storage` must have no other study of the same name, but got {study.study_name} in "
                f"{_without_password(address)}; choose another `name`"
            )
        optuna.delete_study(study_name=study.study_name, storage=storage)
    first = StudyDirection.MINIMIZE if spec.search.minimize else StudyDirection.MAXIMIZE
    modes = [first, *([StudyDirection.MINIMIZE] if spec.search.two_objectives else [])]
    for name in sorted(names):
        optuna.create_study(study_name=name, storage=storage, directions=modes).set_user_attr(OWNER, owner)
    return storage


def _without_password(address: str) -> str:
    """Return the address of a database without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:...@", address)
