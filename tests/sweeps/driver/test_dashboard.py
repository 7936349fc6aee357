"""The Optuna storage of a sweep for optuna-dashboard: rebuilt at each start, never of another sweep."""

import time
from pathlib import Path

import pytest

from support.sweep_tools import tiny


def test_studies_of_another_sweep_are_not_overwritten(tmp_path: Path) -> None:
    import optuna

    from synq.sweeps.driver.dashboard import study_storage

    address = f"sqlite:///{tmp_path}/studies.db"
    mine, other = tiny(tmp_path / "a", study_storage=address), tiny(tmp_path / "b", study_storage=address)
    for _ in range(2):  # drawn anew at every start
        storage = study_storage(mine)
        assert storage is not None
        study = optuna.load_study(study_name="tiny-digits_resnet8-W8A8", storage=storage)
        assert not study.trials
        study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match="`study_storage` must have no other study of the same name"):
        study_storage(other)
    with pytest.raises(ValueError, match="`study_storage` must be a database that can be opened"):
        study_storage(tiny(tmp_path / "c", study_storage="nosuch://x"))


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
