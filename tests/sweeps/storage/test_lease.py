"""The lease on a folder: which driver is rejected, what is taken over, and when a holder detects that it was lost."""

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synq.sweeps.storage import lease as lease_module
from synq.sweeps.storage.lease import Lease
from synq.sweeps.storage.object_store import Storage, open_storage

NAME = "sweep.lease.json"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """Return an empty folder."""
    return open_storage(tmp_path.as_uri())


@pytest.fixture
def make(store: Storage) -> Iterator[Callable[..., Lease]]:
    """Yield a function that makes fast leases: renewed every 0.05 s, stale after 0.5 s."""
    made: list[Lease] = []

    def one(**times: float) -> Lease:
        made.append(Lease(store, **{"every": 0.05, "stale_after": 0.5, "settle": 0.05, **times}))
        return made[-1]

    yield one
    for lease in made:
        lease.release()


def _write(store: Storage, **changes: Any) -> None:
    """Write the lease of a driver on another machine."""
    holder = {"owner": "o", "host": "elsewhere", "pid": 7, "place": "elsewhere", "birth": "1", "beat": 1}
    store.put(json.dumps({**holder, "time": time.time(), **changes}).encode(), NAME)


def _holder(store: Storage) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(store.read(NAME) or b"{}")
    return content


def _until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end, "the condition must become true"
        time.sleep(0.01)


def test_a_second_driver_is_rejected_until_the_first_releases(store: Storage, make: Callable[..., Lease]) -> None:
    first = make(stale_after=60.0)
    first.acquire()
    beat = _holder(store)["beat"]
    _until(lambda: _holder(store)["beat"] > beat + 1)
    in_use = (
        r"`output_dir` must not be in use, but another sweep runs in file:///.* "
        rf"\(host .*, pid {os.getpid()}, last renewal 0 s ago\)"
    )
    with pytest.raises(ValueError, match=in_use):
        make().acquire()
    first.release()
    assert not first.lost and store.names("") == []
    make().acquire()


def test_one_of_several_concurrent_drivers_gets_the_lease(make: Callable[..., Lease]) -> None:
    together = threading.Barrier(4)
    outcomes: list[str] = []

    def run(lease: Lease) -> None:
        together.wait()
        try:
            lease.acquire()
            outcomes.append("")
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(make(settle=0.5, stale_after=60.0),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and outcomes.count("") == 1
    assert all("must not be in use" in outcome for outcome in outcomes if outcome)


ACQUIRE = """
import sys; from synq.sweeps.storage.lease import Lease; from synq.sweeps.storage.object_store import open_storage
Lease(open_storage(sys.argv[1]), settle=0).acquire(); print(1, flush=True); sys.stdin.read()
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(
    store: Storage, make: Callable[..., Lease]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ACQUIRE, store.address], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"pid {process.pid}"):
            make(stale_after=90.0).acquire()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but not yet reaped by its parent
        make(stale_after=90.0).acquire(pytest.fail)
    assert _holder(store)["pid"] == os.getpid()


def test_a_reused_pid_is_another_process(store: Storage, make: Callable[..., Lease]) -> None:
    _write(store, pid=os.getpid(), place=lease_module.pid_namespace(), birth="1")
    make(stale_after=90.0).acquire(pytest.fail)


def test_a_process_with_unreadable_status_may_run(
    store: Storage, make: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "start_time", lambda pid: "unknown")
    _write(store, place=lease_module.pid_namespace(), birth="1")
    with pytest.raises(ValueError, match="must not be in use"):
        make(stale_after=90.0).acquire()


@pytest.mark.parametrize("seconds", [0.0, -0.4, 0.4])
def test_a_recent_lease_of_another_machine_is_respected(
    store: Storage, make: Callable[..., Lease], seconds: float
) -> None:
    _write(store, time=time.time() + 100 * seconds)
    with pytest.raises(ValueError, match=r"host elsewhere, pid 7, last renewal \d+ s ago"):
        make(stale_after=90.0).acquire(pytest.fail)


@pytest.mark.parametrize("content", [{"time": 5.0}, {"time": 4e9}, {"pid": "?"}, None])
def test_an_old_lease_whose_counter_stays_is_taken(
    store: Storage, make: Callable[..., Lease], content: dict[str, Any] | None
) -> None:
    _write(store, **(content or {}))
    if content is None:
        store.put(b'{"owner": ', NAME)
    logged: list[str] = []
    started = time.monotonic()
    make().acquire(logged.append)
    assert time.monotonic() - started > 0.5 and len(logged) == 1 and "old lease in file:///" in logged[0]
    assert _holder(store)["pid"] == os.getpid()


def test_a_lease_whose_counter_changes_is_respected_at_any_time(store: Storage, make: Callable[..., Lease]) -> None:
    _write(store, time=5.0)
    with pytest.raises(ValueError, match="must not be in use"):
        make().acquire(lambda text: _write(store, time=5.0, beat=2))


def test_a_lease_that_is_released_while_watched_is_free(store: Storage, make: Callable[..., Lease]) -> None:
    _write(store, time=5.0)
    started = time.monotonic()
    make(stale_after=60.0).acquire(lambda text: store.delete(NAME))
    assert time.monotonic() - started < 50


def test_a_holder_detects_another_one(store: Storage, make: Callable[..., Lease]) -> None:
    lease = make(stale_after=60.0)
    lease.acquire()
    _until(lambda: lease.lost or _write(store))  # a renewal may be about to write over it
    assert "another sweep runs in" in lease.lost and "host elsewhere" in lease.lost
    lease.release()
    assert _holder(store)["owner"] == "o"  # the other holder keeps its lease


def test_a_holder_that_cannot_renew_has_lost(
    store: Storage, make: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = make(stale_after=3.0)
    lease.acquire()
    failed = []

    def fail(self: Storage, content: Path | bytes, name: str) -> None:
        failed.append(name)
        raise OSError("the network is down")

    monkeypatch.setattr(Storage, "put", fail)
    _until(lambda: len(failed) > 1)
    assert not lease.lost  # not yet
    time.sleep(3.2)  # without reading `lost` meanwhile
    monkeypatch.undo()
    time.sleep(0.3)  # renewals would succeed again, but another driver may have written meanwhile
    assert "must stay writable" in lease.lost and "the network is down" in lease.lost
    lease.release()
    assert store.read(NAME) is not None, "a lease that was lost expires: another driver may watch it"


def test_a_short_fault_is_survived(store: Storage, make: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch) -> None:
    lease = make(stale_after=20.0)
    lease.acquire()
    read, faults = Storage.read, []

    def flaky(self: Storage, name: str) -> bytes | None:
        if len(faults) < 3:
            faults.append(name)
            raise OSError("the network is down")
        return read(self, name)

    monkeypatch.setattr(Storage, "read", flaky)
    beat = json.loads((Path(store.path(NAME))).read_bytes())["beat"]
    _until(lambda: _holder(store).get("beat", 0) > beat if len(faults) == 3 else False)
    assert not lease.lost


def test_a_renewal_that_hangs_counts_as_lost(make: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch) -> None:
    lease, go = make(), threading.Event()
    lease.acquire()
    monkeypatch.setattr(Storage, "read", lambda self, name: go.wait(30) and None)
    _until(lambda: lease.lost)
    assert "does not respond" in lease.lost
    go.set()


def test_inconsistent_times_are_rejected(store: Storage) -> None:
    with pytest.raises(ValueError, match=r"`stale_after` must be more than twice `every`, but got 30 and 20"):
        Lease(store, every=20.0, stale_after=30.0)


def test_drivers_of_all_versions_have_the_same_times() -> None:
    parameters = inspect.signature(Lease).parameters
    assert [parameters[name].default for name in ("every", "stale_after")] == [20.0, 90.0]


def test_the_start_time_is_that_of_a_process_that_runs() -> None:
    started = lease_module.start_time(os.getpid())
    assert started.isdecimal() and started == lease_module.start_time(os.getpid())
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lease_module.start_time(process.pid) == "ended"  # a zombie
    assert lease_module.start_time(process.pid) == "ended"
