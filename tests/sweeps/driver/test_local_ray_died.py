"""R4, R10: a process of the Ray that a sweep started dies in mid-sweep: one line, the tables, exit 1, no waiting."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.sweep_tools import tiny
from synq.common.notices import forget_notices
from synq.sweeps.driver import local_ray as module
from synq.sweeps.driver import tuner
from synq.sweeps.driver.local_ray import LocalRayDiedError, local_ray
from synq.sweeps.state.ledger import Ledger

LIMIT = 30.0


@pytest.fixture(params=["raylet", "gcs_server"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real program of the name of Ray's process, started where Ray would start it."""
    import ray

    path = tmp_path / request.param
    path.symlink_to("/bin/sleep")
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(subprocess.Popen([path, "1"])))
    monkeypatch.setattr(ray, "shutdown", lambda: [process.wait() for process in started])
    return path


def wait() -> None:
    """Wait as Ray's loops do, which catch every Exception."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except Exception:
            continue


def test_r4_r10_the_death_ends_the_block_at_once(daemon: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LocalRayDiedError, match=f"its process {daemon.name} died"), local_ray():
        wait()
    assert time.monotonic() - began < LIMIT / 2


def test_r4_r10_an_interrupt_of_compiled_code_has_the_same_meaning(daemon: Path) -> None:
    with pytest.raises(LocalRayDiedError, match=daemon.name), local_ray():
        try:
            wait()
        except KeyboardInterrupt:  # as Ray does with what a signal handler raises in a call of it
            raise KeyboardInterrupt from None


def test_r4_r10_an_error_that_is_swallowed_has_the_same_meaning(daemon: Path) -> None:
    with pytest.raises(LocalRayDiedError, match=daemon.name), local_ray(), contextlib.suppress(BaseException):
        wait()


def test_r4_r10_a_block_that_goes_on_is_interrupted_again(daemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(LocalRayDiedError, match=daemon.name), local_ray():
        for _ in range(2):
            with contextlib.suppress(BaseException):
                wait()
        wait()
    assert time.monotonic() - began < LIMIT / 2


def test_r4_r10_a_call_that_runs_no_signal_handler_does_not_hold_the_process(
    daemon: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.3)
    forget_notices()
    child = os.fork()
    if child == 0:
        with local_ray():  # the signal waits, as in compiled code that asks Ray's head
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            time.sleep(LIMIT)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert daemon.name in line and line.endswith("the same command goes on")


def test_r4_r10_a_block_that_ends_by_itself_stops_ray(daemon: Path) -> None:
    with local_ray():
        pass
    with pytest.raises(KeyError), local_ray():
        raise KeyError


def test_r4_r10_the_sweep_ends_with_one_line_and_its_tables(
    daemon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny(tmp_path / "sweep", space={"finetune.lr": {"type": "choice", "values": [0.005]}}, num_trials=1)
    monkeypatch.setattr(tuner, "check_shared", lambda folder: None)
    monkeypatch.setattr(tuner, "_check_groups", lambda *_: wait())
    monkeypatch.setattr("synq.sweeps.driver.cluster.capacity", lambda *_: _Capacity())
    assert tuner.run_sweep(spec) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if daemon.name in line]
    assert len(lines) == 1 and lines[0].endswith("the same command goes on")
    assert (tmp_path / "sweep" / "trials.csv").is_file()
    Ledger(spec).open()  # its lock was released


@pytest.mark.parametrize("daemon", ["raylet"], indirect=True)
def test_a_worker_that_was_ended_for_memory_while_it_started_stops_the_sweep_with_one_line(
    daemon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.exceptions import OutOfMemoryError

    def ended(*_: object) -> None:  # as in ray.air.execution._internal.actor_manager
        raise RuntimeError("Caught unexpected exception: 2 worker(s) were killed") from OutOfMemoryError("full")

    spec = tiny(tmp_path / "sweep", space={"finetune.lr": {"type": "choice", "values": [0.005]}}, num_trials=1)
    monkeypatch.setattr(tuner, "check_shared", lambda folder: None)
    monkeypatch.setattr(tuner, "_check_groups", lambda *_: None)
    monkeypatch.setattr(tuner, "make_all_sets", lambda *_: None)
    monkeypatch.setattr(tuner, "_tune", ended)
    monkeypatch.setattr("synq.sweeps.driver.cluster.capacity", lambda *_: _Capacity())
    assert tuner.run_sweep(spec) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert "the memory is full" in line and line.endswith("the same command goes on")
    Ledger(spec).open()  # its lock was released


class _Capacity:
    note = ""
    summary = "1 node"

    def concurrent(self, search: object) -> int:
        return 1
