"""What is newer in a database that drivers share stays: `--retry` against old folders, and databases that reject."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.shared_drivers import DRIVERS, KEYS, NAMES, Driver, joining
from support.sweep_tools import tiny
from synq.sweeps.state import shared_ledger
from synq.sweeps.state.ledger import Ledger
from synq.sweeps.state.plans import read_plan
from synq.sweeps.storage.trial_database import MAX_REJECTIONS, TrialDatabase

FIRST = NAMES[0]
Join = Callable[..., Driver]


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Start a driver in a folder of its own."""
    with joining(tmp_path, is_common=False) as make:
        yield make


def started(driver: Driver) -> tuple[str, str]:
    found = driver.start()
    assert found is not None, driver.stop.storage
    return found


def leave(driver: Driver) -> None:
    driver.ledger.close()
    DRIVERS.remove(driver)


def fail(driver: Driver, trial: tuple[str, str], reason: str = "why") -> None:
    driver.end(trial, status="failed", objective_value=None, reason=reason)


def an_old_folder(join: Join) -> Driver:
    """A driver whose first trial failed leaves, and another one, with a folder of its own, runs failed trials again."""
    one = join("old")
    fail(one, started(one))
    leave(one)
    return join("new", retry=["failed"])


def attempt_of(driver: Driver, trial: str = FIRST) -> int:
    return read_plan(driver.ledger.root / "plans" / f"{trial}.json").attempt


@pytest.mark.parametrize("then", ["waits", "runs", "dies"])
def test_an_old_folder_does_not_end_a_trial_that_is_run_again(join: Join, then: str) -> None:
    new = an_old_folder(join)
    assert FIRST not in new.ledger.records and attempt_of(new) == 2
    if then != "waits":
        assert started(new)[1] == FIRST
    if then == "dies":
        new.die()
    old = join("old")
    assert FIRST not in old.ledger.records and not old.ledger.record_path(FIRST).exists() and attempt_of(old) == 2
    if then == "runs":
        assert old.ledger.elsewhere(FIRST)
    else:
        again = started(old)
        assert again[1] == FIRST
        old.end(again)
        assert join("third").ledger.records[FIRST].status == "completed"


def test_an_old_folder_gets_the_end_of_the_second_attempt(join: Join) -> None:
    new = an_old_folder(join)
    fail(new, started(new), "again")
    assert join("old").ledger.records[FIRST].reason == new.ledger.records[FIRST].reason == "again"


def test_an_end_that_never_reached_the_database_is_that_of_its_attempt(join: Join) -> None:
    one = join("one")
    first = started(one)
    one.write(first[1], status="failed", objective_value=None, reason="unsent")
    one.die()
    two = join("two")
    fail(two, started(two))
    leave(two)
    three = join("three", retry=["failed"])
    assert attempt_of(three) == 2
    again = join("one")
    assert FIRST not in again.ledger.records and not again.ledger.record_path(FIRST).exists()


def test_a_folder_restores_what_a_database_of_yesterday_has_lost(join: Join, tmp_path: Path) -> None:
    one = join("old")
    fail(one, started(one))
    leave(one)
    shutil.copy(tmp_path / "studies.db", tmp_path / "yesterday.db")
    new = join("new", retry=["failed"])
    new.end(started(new))
    leave(new)
    shutil.copy(tmp_path / "yesterday.db", tmp_path / "studies.db")
    assert join("new").ledger.records[FIRST].status == "completed"
    assert join("old").ledger.records[FIRST].status == "completed"


def test_two_drivers_that_retry_begin_one_attempt(join: Join) -> None:
    new = an_old_folder(join)
    other = join("other", retry=["failed"])
    assert attempt_of(new) == attempt_of(other) == 2
    assert started(new)[1] == FIRST and started(other)[1] == NAMES[1]


def test_a_driver_alone_counts_attempts_and_a_first_attempt_is_written_as_before(tmp_path: Path) -> None:
    keys = {**KEYS, "study_storage": "journal"}
    with joining(tmp_path, is_common=False) as join:
        one = join("one")
        fail(one, started(one))
        assert "attempt" not in (one.ledger.root / "plans" / f"{FIRST}.json").read_text()
        leave(one)
        ledger = Ledger(tiny(tmp_path / "one", **keys, retry=["failed"]))
        ledger.open()
        ledger.close()
        assert FIRST not in ledger.records and attempt_of(one) == 2
        again = join("one")
        assert FIRST not in again.ledger.records, "the folder has the later attempt, the database an end of the first"


def test_a_taken_trial_goes_on_from_what_the_database_has(join: Join) -> None:
    one, two = join("one"), join("two")
    first = started(one)
    leave(one)
    assert [plan.trial for plan in two.ledger.freed()] == []
    two.searcher.sync()
    (known,) = two.searcher.interrupted
    three = join("three")
    again = started(three)
    assert again[1] == known.trial == first[1]
    three.ledger.note(first[1], {1: 0.25})
    leave(three)
    taken = two.ledger.take_over(known)
    assert taken is not None and taken.history == [(1, 0.25)]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(shared_ledger.time, "sleep", waited.append)
    return waited


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_a_database_that_rejects_trials_for_no_reason_ends_the_driver(
    join: Join, tmp_path: Path, no_pauses: list[float]
) -> None:
    one = join("one")
    one.end(started(one))
    # Of a time before what this driver has read, as after a restore: it never sees that row.
    execute(
        tmp_path / "studies.db",
        f"INSERT INTO synq_trials SELECT sweep, '{NAMES[1]}', \"group\", 'other', owner, plan, record, 0 "
        f"FROM synq_trials WHERE trial = '{FIRST}'",
    )
    assert one.start() is None
    assert f"must accept trials, but sqlite:///{tmp_path}/studies.db rejected {NAMES[1]} 6 times" in one.stop.storage
    assert len(no_pauses) == MAX_REJECTIONS and one.searcher.suggest("next") == "FINISHED"


def test_a_trial_that_the_database_has_lost_keeps_its_record(join: Join, tmp_path: Path) -> None:
    one = join("one")
    first = started(one)
    execute(tmp_path / "studies.db", "DELETE FROM synq_trials")
    with pytest.raises(OSError, match=f"`study_storage` must keep the trials of the sweep, but .* has lost {FIRST}"):
        one.end(first)
    leave(one)
    again = join("one")
    assert again.ledger.records[FIRST].status == "completed"
    found = again.ledger.database.find(FIRST)
    assert found is not None and found.record


def test_a_waiting_trial_that_the_database_has_lost_ends_the_driver(
    join: Join, tmp_path: Path, no_pauses: list[float]
) -> None:
    one, two = join("one"), join("two")
    started(one)
    two.searcher.sync()
    leave(one)
    two.searcher.sync()
    execute(tmp_path / "studies.db", "DELETE FROM synq_trials")
    for _ in range(MAX_REJECTIONS):
        two.searcher.interrupted[:] = list(two.ledger.freed())
        assert two.ledger.take_over(two.searcher.interrupted[0]) is None
    with pytest.raises(OSError, match=f"rejected {FIRST} 6 times, and nothing in it explains why"):
        two.ledger.take_over(two.searcher.interrupted[0])


def test_a_lock_that_the_database_keeps_ends_the_driver(join: Join, tmp_path: Path) -> None:
    one = join("one")
    path = tmp_path / "studies.db"
    execute(
        path,
        "INSERT INTO synq_locks VALUES ('tiny', 'report', 'gone')",
        "CREATE TRIGGER keep BEFORE DELETE ON synq_locks BEGIN SELECT RAISE(IGNORE); END",
    )
    with pytest.raises(OSError, match="keeps the lock report of a dead driver"), one.ledger.exclusive("report"):
        pass
    assert isinstance(one.ledger.database, TrialDatabase)
