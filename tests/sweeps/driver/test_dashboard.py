"""The Optuna storage of a sweep for optuna-dashboard: a copy, never of another sweep."""

import time
from pathlib import Path

import pytest

from support.databases import quick_sqlite
from support.sweep_tools import tiny


def test_studies_are_kept_and_one_of_no_sweep_is_not_overwritten(tmp_path: Path) -> None:
    import optuna

    from synq.sweeps.driver.dashboard import StudyCopy

    address = f"sqlite:///{tmp_path}/studies.db"
    spec = tiny(tmp_path / "a", study_storage=address)
    with quick_sqlite():
        copy = StudyCopy(spec)
        attributes = {"trial": "digits_resnet8-W8A8-t000"}
        running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=attributes)
        copy.send("digits_resnet8-W8A8", "digits_resnet8-W8A8-t000", running)
        again = StudyCopy(spec)
        ended = optuna.trial.create_trial(value=1.0, intermediate_values={1: 2.0}, user_attrs=attributes)
        for _ in range(2):
            again.complete("digits_resnet8-W8A8", [ended])
        copy.send("digits_resnet8-W8A8", "digits_resnet8-W8A8-t000", ended)  # both knew it as running
        study = optuna.load_study(study_name="tiny-digits_resnet8-W8A8", storage=address)
        (trial,) = study.trials
        assert (trial.state.name, trial.value, trial.intermediate_values) == ("COMPLETE", 1.0, {1: 2.0})
        optuna.create_study(study_name="mine-digits_resnet8-W3A3", storage=address)
        with pytest.raises(ValueError, match=r"`study_storage` must have no other study of .* but got mine-"):
            StudyCopy(tiny(tmp_path / "b", study_storage=address, name="mine"))
        with pytest.raises(ValueError, match="`study_storage` must be a database that can be opened"):
            StudyCopy(tiny(tmp_path / "c", study_storage="nosuch://x"))


def test_the_journal_lock_of_a_killed_driver_costs_no_time(tmp_path: Path) -> None:
    """Optuna 5.0.0 waits 30 seconds for the lock of a process that was killed while it wrote the journal."""
    from synq.sweeps.driver.dashboard import journal

    spec = tiny(tmp_path, study_storage="journal")
    spec.output_dir.mkdir(parents=True, exist_ok=True)
    lock = spec.output_dir / "optuna.journal.lock"
    lock.symlink_to("optuna.journal")
    journal(spec)
    assert not lock.is_symlink()
    lock.symlink_to("optuna.journal")
    started = time.monotonic()
    journal(spec)
    assert time.monotonic() - started < 10
