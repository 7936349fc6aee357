"""Several drivers of one sweep, with folders of their own or one folder, without Ray."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.databases import quick_sqlite
from support.shared_drivers import DRIVERS, KEYS, NAMES, SPACE, Driver, joining
from support.sweep_tools import TINY, tiny
from synq.sweeps.state.ledger import Ledger


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_sqlite():
        yield


@pytest.fixture(params=["separate", "common"])
def join(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Start a driver: in a folder of its own, or in that of all."""
    with joining(tmp_path, is_common=request.param == "common") as make:
        yield make


def told(driver: Driver, *otherwise: tuple[str, str]) -> list[tuple[str, str]]:
    """The trials of the copy of the study: name and state, in order; without a copy, `otherwise`."""
    if driver.searcher.copy is None:
        return list(otherwise)
    driver.searcher.complete_copy()
    (study,) = driver.searcher.copy._studies.values()
    trials = driver.searcher.copy._storage.get_all_trials(study)
    return [(trial.user_attrs["trial"], trial.state.name) for trial in trials]


def test_two_drivers_share_the_trials_and_each_has_all_tables(join: Callable[..., Driver]) -> None:
    one, two = join("a"), join("b")
    running = [(driver, driver.start()) for driver in (one, two, one, two)]
    assert [started[1] for _, started in running if started] == NAMES[:4], "each point once, in the order of the list"
    assert one.searcher.num_left() == 6 and two.ledger.elsewhere(NAMES[0]) and not two.ledger.elsewhere(NAMES[1])
    for driver, started in reversed(running):
        assert started is not None
        driver.end(started)
    for driver in (two, one):
        started = driver.start()
        assert started is not None
        driver.end(started)
    finals = [driver.start() for driver in (one, two)]
    assert finals[0] is not None and finals[0][1] == f"{NAMES[0]}-s1" and finals[1] is None, "the best, on a seed more"
    assert two.searcher.suggest("wait") is None, "it waits, in case the other driver dies"
    one.end(finals[0])
    for driver in (one, two):
        assert driver.start() is None and driver.searcher.suggest("end") == "FINISHED"
        driver.ledger.write_tables()
        assert driver.searcher.num_left() == 0
    assert one.ledger.records == two.ledger.records and len(one.ledger.records) == 7
    for name in ("trials.csv", "leaderboard.csv"):
        assert (one.ledger.root / name).read_text() == (two.ledger.root / name).read_text()
    complete = [(name, "COMPLETE") for name in NAMES]
    assert sorted(told(one, *complete)) == complete and told(two) == told(one)


def test_a_driver_that_loses_the_race_for_the_last_trial_waits_for_it(join: Callable[..., Driver]) -> None:
    one, two = join("a"), join("b")
    for driver in (one, two) * 3:
        started = driver.start()
        assert started is not None
        driver.end(started)
    one.searcher.sync()
    two.searcher.sync()
    final = one.start()
    assert final is not None
    two.searcher._synced = time.monotonic()  # it has just looked
    heard: list[str] = []
    two.searcher.listeners.append(lambda plan: heard.append(plan.trial))
    assert two.searcher.suggest("race") is None, "it does not end"
    one.end(final)
    two.searcher.sync()
    assert set(heard) == {final[1]} and two.searcher.num_left() == 0


def test_the_trials_of_a_killed_driver_go_on_elsewhere(join: Callable[..., Driver]) -> None:
    one, two = join("a"), join("b")
    first, second = one.start(), two.start()
    assert first is not None and second is not None
    one.searcher.on_trial_result(first[0], {"epoch": 1, "epochs": 2, "objective_value": 0.001})
    one.ledger.note(first[1], {1: 0.001})
    two.searcher.sync()
    assert two.ledger.plans[first[1]].history == [(1, 0.001)] and told(two, (NAMES[0], "RUNNING"))[0] == (
        NAMES[0],
        "RUNNING",
    )
    one.die()
    taken = two.start()
    assert taken is not None and taken[1] == first[1] and two.ledger.plans[taken[1]].history == [(1, 0.001)]
    two.end(taken)
    two.end(second)
    three = join("c")
    assert {name: record.objective_value for name, record in three.ledger.records.items()} == {
        NAMES[0]: 0.001,
        NAMES[1]: 0.002,
    }
    complete = [(name, "COMPLETE") for name in NAMES[:2]]
    assert sorted(told(three, *complete)) == complete, "one row for each, none that runs"


def test_a_driver_that_was_counted_as_dead_changes_nothing(join: Callable[..., Driver]) -> None:
    one, two = join("a"), join("b")
    first = one.start()
    assert first is not None
    two.ledger.database._dead.add(one.ledger.database.owner)
    taken = two.start()
    assert taken is not None and taken[1] == first[1]
    two.end(taken)
    other = two.start()
    assert other is not None
    two.end(other)
    one.end(first, objective_value=5.0)
    heard: list[str] = []
    one.searcher.listeners.append(lambda plan: heard.append(plan.trial))
    one.searcher.sync()
    assert heard == [other[1]], "what it read as it was rejected"
    assert one.ledger.records[first[1]].objective_value == two.ledger.records[first[1]].objective_value == 0.001
    assert join("c").ledger.records[first[1]].objective_value == 0.001


def test_a_record_that_a_worker_just_wrote_survives_the_look_of_another_driver(join: Callable[..., Driver]) -> None:
    one, two = join("a"), join("b")
    first = one.start()
    assert first is not None
    one.write(first[1])  # its driver does not know yet
    one.ledger.note(first[1], {1: 0.5})
    two.searcher.sync()
    assert one.ledger.record_path(first[1]).is_file()


def test_failed_trials_are_run_again_where_it_is_asked_for_by_any_driver(join: Callable[..., Driver]) -> None:
    one = join("a")
    for status in ("failed", "pre-empted"):
        started = one.start()
        assert started is not None
        one.end(started, status=status, objective_value=None, reason="why")
    again = join("b", retry=["pre-empted"])
    assert set(again.ledger.records) == {NAMES[0]}
    one.searcher.sync()
    assert set(one.ledger.records) == {NAMES[0]} and [plan.trial for plan in one.searcher.interrupted] == [NAMES[1]]
    started = one.start()
    assert started is not None and started[1] == NAMES[1]
    one.end(started)
    again.searcher.sync()
    assert again.ledger.records[NAMES[1]].status == "completed"
    ends = [(NAMES[0], "FAIL"), (NAMES[1], "COMPLETE"), (NAMES[1], "FAIL")]
    assert sorted(told(again, *ends)) == ends


def test_neither_the_folder_nor_the_database_is_needed_alone(tmp_path: Path) -> None:
    def join(folder: str, database: str) -> Driver:
        copied = database == "second"
        DRIVERS.append(Driver(tmp_path / folder, f"sqlite:///{tmp_path}/{database}.db", copied=copied))
        return DRIVERS[-1]

    one = join("a", "first")
    for _ in range(2):
        started = one.start()
        assert started is not None
        one.end(started)
    running = one.start()
    assert running is not None
    one.ledger.close()
    other = join("b", "first")  # a new folder
    assert other.ledger.records == one.ledger.records and other.searcher.interrupted[0].trial == running[1]
    other.ledger.close()
    again = join("a", "second")  # a new database
    assert again.ledger.records == one.ledger.records and again.searcher.interrupted[0].trial == running[1]
    assert sorted(told(again)) == [(name, "COMPLETE") for name in NAMES[:2]]
    again.ledger.close()
    DRIVERS.clear()


def test_a_sweep_of_that_name_with_other_settings_and_a_driver_alone_are_rejected(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/studies.db"
    one = Driver(tmp_path / "a", address)
    with pytest.raises(ValueError, match="`study_storage` must have no other sweep of the same name, but got tiny in"):
        Driver(tmp_path / "b", address, base={**TINY["base"], "finetune": {"epochs": 9, "batch_size": 16}})
    alone = Ledger(tiny(tmp_path / "a", **KEYS))
    with pytest.raises(ValueError, match="`output_dir` must not be in use"):
        alone.open()
    one.ledger.close()
    alone.open()
    with pytest.raises(ValueError, match="`output_dir` must not be in use"):
        Driver(tmp_path / "a", address)
    alone.close()


def test_more_trials_are_agreed_on_once(tmp_path: Path) -> None:
    address, keys = f"sqlite:///{tmp_path}/studies.db", {"sampler": "random", "points": [], "seeds": [], "space": SPACE}
    one = Driver(tmp_path / "a", address, num_trials=2, **keys)
    for _ in range(2):
        started = one.start()
        assert started is not None
        one.end(started)
    one.ledger.finish()
    one.ledger.close()
    more = {**keys, "more_trials": 3}
    two, three = Driver(tmp_path / "b", address, **more), Driver(tmp_path / "a", address, **more)
    assert (two.ledger.spec.search.num_trials, three.ledger.spec.search.num_trials) == (5, 5)
    assert json.loads((three.ledger.root / "sweep.json").read_text())["finished"] == 2
    for driver in (two, three):
        driver.ledger.close()


@pytest.mark.parametrize("lost", ["driver", "database"])
def test_the_end_of_a_search_is_that_of_all_drivers_and_is_kept(tmp_path: Path, lost: str) -> None:
    address = f"sqlite:///{tmp_path}/studies.db"
    keys: dict[str, Any] = {
        "sampler": "random", "points": [], "seeds": [], "space": SPACE, "num_trials": 9, "stop_when": "stagnation",
    }  # fmt: skip
    one, two = Driver(tmp_path / "a", address, **keys), Driver(tmp_path / "b", address, **keys)
    group = NAMES[0].removesuffix("-t000")
    one.ledger.stop_group(group, "first")
    two.ledger.stop_group(group, "second")
    assert two.ledger.stopped == one.ledger.stopped and one.ledger.stopped[group]["reason"] == "first"
    three = Driver(tmp_path / "c", address, **keys)
    assert three.start() is None and three.searcher.num_left() == 0
    four = Driver(tmp_path / "d", address, **{**keys, "stop_when": "budget"})
    assert four.searcher.num_left() == 9 and not four.ledger.stopped
    for driver in (one, two, three, four):
        driver.ledger.close()
    if lost == "database":
        address = f"sqlite:///{tmp_path}/other.db"
        again = Driver(tmp_path / "b", address, **keys)
        assert again.ledger.stopped[group]["reason"] == "first"
    else:
        again = Driver(tmp_path / "b", address, **keys)
        assert not again.ledger.stopped, "a driver without `stop_when` has let the search go on"
        again.ledger.stop_group(group, "again")
        more = Driver(tmp_path / "a", address, **{**keys, "num_trials": 10})
        assert not more.ledger.stopped, "a larger budget is decided anew"
        more.ledger.stop_group(group, "with more")
        again.searcher.sync()
        assert again.ledger.stopped[group]["reason"] == "with more"
        stored = json.loads((again.ledger.root / "sweep.json").read_text())
        assert stored["stopped"] == more.ledger.stopped
        more.ledger.close()
    again.ledger.close()
