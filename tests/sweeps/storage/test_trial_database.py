"""The trials of a sweep in a database, as its drivers see them: claims, ends, drivers that have gone."""

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.databases import quick_sqlite
from synq.sweeps.storage.databases import attempt
from synq.sweeps.storage.trial_database import TrialDatabase

Open = Callable[..., TrialDatabase]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Open]:
    """Open the sweep `one` of a database as another driver."""
    opened: list[TrialDatabase] = []
    quick = quick_sqlite()
    quick.__enter__()

    def make(sweep: str = "one", **timing: float) -> TrialDatabase:
        opened.append(TrialDatabase(f"sqlite:///{tmp_path}/trials.db", sweep, **timing))
        return opened[-1]

    yield make
    for one in opened:
        one.leave()
    quick.__exit__(None, None, None)


def test_a_trial_is_claimed_and_ended_once(driver: Open) -> None:
    one, two, other = driver(), driver(), driver("other sweep")
    assert one.add("t0", "g search", "d0", "plan 0") and one.add("t0", "g search", "d0", "plan 0"), "a call repeated"
    assert not two.add("t0", "g search", "d9", "plan 9"), "its name"
    assert not two.add("t1", "g search", "d0", "plan 0"), "its settings"
    assert two.add("t1", "g final", "d0", "plan 1") and other.add("t0", "g search", "d0", "plan of another sweep")
    assert [(row.trial, row.owner) for row in two.changes()] == [("t0", one.owner), ("t1", two.owner)]
    assert not two.changes() and not two.take("t0", "") and not two.note("t0", "wrong")
    assert one.note("t0", "plan 0, epoch 1") and [row.plan for row in two.changes()] == ["plan 0, epoch 1"]
    assert not two.settle("t0", "", "stolen") and one.settle("t0", "plan 0, epoch 2", "record 0")
    assert one.settle("t0", "plan 0, epoch 2", "record 0"), "a call repeated"
    assert not one.settle("t0", "", "a second record") and not two.take("t0", one.owner)
    (row,) = two.changes()
    assert (row.owner, row.plan, row.record) == ("", "plan 0, epoch 2", "record 0")
    assert (
        not two.reopen("t0", "plan 1", "another record")
        and two.reopen("t0", "plan 1", "record 0")
        and one.take("t0", "")
    )
    assert len(other.changes()) == 1


def test_many_claims_at_once_give_each_trial_one_driver(driver: Open) -> None:
    drivers, won = [driver() for _ in range(4)], [[], [], [], []]  # type: ignore[var-annotated]

    def work(number: int) -> None:
        for index in range(20):
            if drivers[number].add(f"t{index}", "g search", f"d{index}", f"plan of {number}"):
                won[number].append(f"t{index}")
                drivers[number].settle(f"t{index}", "plan", f"record of {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trial for part in won for trial in part) == sorted(f"t{index}" for index in range(20))
    for row in drivers[0].changes():
        assert row.record == f"record of {next(n for n in range(4) if row.trial in won[n])}" and not row.owner


def test_a_driver_that_leaves_gives_its_trials_back_and_a_dead_one_loses_them(driver: Open, tmp_path: Path) -> None:
    one = driver()
    leaving = driver()
    leaving.add("t0", "g search", "d0", "plan 0")
    leaving.leave()
    assert one.take("t0", "") and one.is_alive(one.owner) and not one.is_alive("")
    script = (
        "import os, sys; from synq.sweeps.storage.trial_database import TrialDatabase\n"
        f"one = TrialDatabase('sqlite:///{tmp_path}/trials.db', 'one'); one.add('t1', 'g search', 'd1', 'plan')\n"
        "print(one.owner, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    owner = process.stdout.readline().strip()
    assert one.is_alive(owner)
    process.kill()
    process.communicate()
    started = time.monotonic()
    assert not one.is_alive(owner) and time.monotonic() - started < 5, "its process was on this machine"
    assert one.take("t1", owner)


def test_a_driver_elsewhere_is_dead_once_its_counter_stands_still(driver: Open, tmp_path: Path) -> None:
    beating = driver(every=0.05, stale_after=0.4)
    hanging = driver(every=10.0, stale_after=30.0)
    one = driver(every=0.05, stale_after=0.4)
    database = sqlite3.connect(tmp_path / "trials.db")
    with database:  # as if on other machines
        database.execute('UPDATE synq_drivers SET about = replace(about, \'"place": "\', \'"place": "elsewhere\')')
    database.close()
    end = time.monotonic() + 0.8
    states = []
    while time.monotonic() < end:
        states.append((one.is_alive(beating.owner), one.is_alive(hanging.owner)))
        time.sleep(0.02)
    assert {alive for alive, _ in states} == {True} and states[0][1] and not states[-1][1]


def test_a_lock_is_held_by_one_driver_and_taken_over_from_a_dead_one(driver: Open) -> None:
    one, two = driver(), driver()
    order: list[str] = []

    def second() -> None:
        with two.lock("sets"):
            order.append("second")

    thread = threading.Thread(target=second)
    with one.lock("sets"), one.lock("report"):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    lost = driver()
    context = lost.lock("sets")
    context.__enter__()
    one._dead.add(lost.owner)
    with one.lock("sets"):
        pass


def test_drivers_agree_on_one_value_and_a_rejected_one_changes_nothing(driver: Open) -> None:
    one, two = driver(), driver()
    assert one.agree(lambda agreed: {**agreed, "n": 1}) == {"n": 1}
    with pytest.raises(ValueError, match="differs"):
        two.agree(lambda agreed: (_ for _ in ()).throw(ValueError("it differs")))
    assert two.agree(lambda agreed: {"n": agreed["n"] + 1}) == {"n": 2}


def test_what_cannot_be_opened_or_reached_is_one_line_without_password(tmp_path: Path, driver: Open) -> None:
    for address, part in {
        "nosuch://me:secret@x/y": "nosuch://me:...@x/y",
        "sqlite://": "a database in memory",
        "postgresql+nosuch://me:secret@127.0.0.1:1/x": "postgresql+nosuch://me:...@127.0.0.1:1/x",
        f"sqlite:///{tmp_path}/none/trials.db": "unable to open",
    }.items():
        with pytest.raises(ValueError, match="`study_storage` must be a database that can be opened") as caught:
            TrialDatabase(address, "one")
        assert part in str(caught.value) and "secret" not in str(caught.value) and "\n" not in str(caught.value)
    one = driver(every=0.05, stale_after=0.3)
    one._renewed -= 1
    assert one.lost.startswith("`study_storage` must stay reachable, but sqlite:///")


def test_a_server_that_comes_back_is_waited_for_and_other_errors_are_not() -> None:
    from sqlalchemy.exc import OperationalError, ProgrammingError

    calls: list[float] = []

    def restarts() -> str:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise OperationalError("SELECT", {}, Exception("server closed the connection, password=s3cret"))
        return "done"

    assert attempt(restarts, "postgresql://me:s3cret@host/db", (0.01, 0.01)) == "done" and len(calls) == 3
    calls.clear()
    with pytest.raises(OSError, match=r"must stay reachable, but postgresql.* is not: server") as at:
        attempt(restarts, "postgresql://me:s3cret@host/db", (0.01,))
    assert "s3cret" not in str(at.value)

    def denied() -> None:
        calls.append(0.0)
        raise RuntimeError("of Optuna") from ProgrammingError("SELECT", {}, Exception("permission denied"))

    calls.clear()
    with pytest.raises(OSError, match="permission denied"):
        attempt(denied, "postgresql://host/db", (0.01, 0.01))
    assert len(calls) == 1
