"""Optuna storage of a sweep's studies, for optuna-dashboard: a copy of the ledger."""

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..spec import Group, SweepSpec
from ..storage.databases import attempt, database_error, database_text, engine_address

OWNER = "synq_sweep"
"""Attribute of a study: the name of its sweep."""
FINISHED: Any = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)
"""Error of a change to a trial that has ended, which Optuna 4.0 had no type for."""
NAME = "trial"
"""Attribute of a trial: its name in the sweep."""


def study_name(spec: SweepSpec, group: Group) -> str:
    """Return the name of a group's Optuna study."""
    return f"{spec.search.name}-{group.key}"


def journal(spec: SweepSpec) -> BaseStorage | None:
    """Return a new journal of a sweep of one driver, with an empty study for each group; None if it has none."""
    if spec.search.study_storage != "journal":
        return None
    path = spec.output_dir / "optuna.journal"
    path.unlink(missing_ok=True)
    # The ledger admits one driver, so a lock that is left belongs to a killed one; Optuna 5.0.0 waits 30 s for it.
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    for group in spec.groups:
        _study(storage, spec, group)
    return storage


class StudyCopy:
    """A copy of the studies of a sweep in the database that its drivers share.

    A trial is RUNNING there from its claim to its end. A driver that takes over a trial goes on
    with its row, and `complete` ends those whose end a driver did not write, so that none is RUNNING for ever.
    """

    def __init__(self, spec: SweepSpec) -> None:
        """Open the studies, and make those that are absent.

        Args:
            spec: The sweep; one driver at a time may do this.

        Raises:
            ValueError: The database cannot be opened, or has a study of the same name that is not of a sweep.
        """
        address = spec.search.study_storage
        try:
            self._storage: BaseStorage = RDBStorage(engine_address(address), engine_kwargs={"pool_pre_ping": True})
        except Exception as error:  # SQLAlchemy and its drivers raise many types
            raise ValueError(
                f"`study_storage` must be a database that can be opened, but got {database_text(address)}: "
                f"{database_error(error, address)}"
            ) from None
        self._address = address
        names = {study.study_name: study for study in optuna.get_all_study_summaries(self._storage)}
        for group in spec.groups:
            name = study_name(spec, group)
            if name in names and OWNER not in names[name].user_attrs:
                raise ValueError(
                    f"`study_storage` must have no other study of the same name, but got {name} in "
                    f"{database_text(address)}; choose another `name`"
                )
            if name not in names:
                _study(self._storage, spec, group)
        self._studies = {
            group.key: self._storage.get_study_id_from_name(study_name(spec, group)) for group in spec.groups
        }
        self._known: dict[str, dict[str, FrozenTrial]] = {}
        self.read()

    def read(self) -> None:
        """Read which trials the studies have, which other drivers change."""
        for key, study in self._studies.items():
            trials = attempt(partial(self._storage.get_all_trials, study, deepcopy=False), self._address)
            self._known[key] = {trial.user_attrs[NAME]: trial for trial in trials if NAME in trial.user_attrs}

    def send(self, key: str, trial: str, frozen: FrozenTrial) -> None:
        """Write the present state of a trial, unless the study has its end; one that is run again gets a new row.

        Args:
            key: Key of its group.
            trial: Name of the trial.
            frozen: Its state.

        Raises:
            OSError: The database cannot be reached.
        """
        with suppress(FINISHED):  # another driver wrote its end just now
            attempt(lambda: self._send(self._known[key], self._studies[key], trial, frozen), self._address)

    def complete(self, key: str, trials: Iterable[FrozenTrial]) -> None:
        """Write the ended trials of a group that the study lacks, or has as running; call `read` before.

        Raises:
            OSError: The database cannot be reached.
        """
        for frozen in trials:
            if frozen.state.is_finished() and NAME in frozen.user_attrs:
                self.send(key, frozen.user_attrs[NAME], frozen)

    def _send(self, known: dict[str, FrozenTrial], study: int, trial: str, frozen: FrozenTrial) -> None:
        row = known.get(trial)
        if row is None or (row.state.is_finished() and frozen.state == TrialState.RUNNING):
            number = self._storage.create_new_trial(study, template_trial=frozen)
            known[trial] = self._storage.get_trial(number)
            return
        if row.state.is_finished():
            return
        for epoch, value in frozen.intermediate_values.items():
            if epoch not in row.intermediate_values:
                self._storage.set_trial_intermediate_value(row._trial_id, epoch, value)
                row.intermediate_values[epoch] = value
        if frozen.state.is_finished():
            for name, attribute in frozen.system_attrs.items():
                self._storage.set_trial_system_attr(row._trial_id, name, attribute)
            self._storage.set_trial_state_values(row._trial_id, frozen.state, frozen.values)
            known[trial] = self._storage.get_trial(row._trial_id)


def _study(storage: BaseStorage, spec: SweepSpec, group: Group) -> None:
    first = StudyDirection.MINIMIZE if spec.search.minimize else StudyDirection.MAXIMIZE
    modes = [first, *([StudyDirection.MINIMIZE] if spec.search.two_objectives else [])]
    study = optuna.create_study(study_name=study_name(spec, group), storage=storage, directions=modes)
    study.set_user_attr(OWNER, spec.search.name)
