"""Start of Ray on this machine: what a dead or slow process of it leads to, and what is refused before it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.sweep_tools import tiny
from synq.common.notices import forget_notices
from synq.sweeps.driver.cluster import cluster
from synq.sweeps.driver.local_ray import start_local_ray
from synq.sweeps.driver.stop_reason import interruptible

LIMIT = 20.0
"""Seconds that the stand-in of Ray's start waits, as Ray itself waits for a process that no longer exists."""


@pytest.fixture
def raylet(tmp_path: Path) -> Path:
    """A real program of the name of Ray's process, which sleeps as long as its argument says."""
    path = tmp_path / "raylet"
    path.symlink_to("/bin/sleep")
    return path


def _wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except Exception:  # as Ray's loops do
            continue


def test_f_10_a_dead_raylet_is_noticed_and_the_start_repeated_once(
    raylet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    starts: list[subprocess.Popen[bytes]] = []

    def dies(**options: Any) -> None:
        starts.append(subprocess.Popen([raylet, "1"]))
        _wait(LIMIT)

    forget_notices()
    monkeypatch.setattr(ray, "init", dies)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"did not in 2 attempts: its process raylet ended .*; a machine that is busy"):
        start_local_ray()
    assert [process.wait(1) for process in starts] == [0, 0] and time.monotonic() - began < LIMIT / 2
    assert "one more attempt" in capsys.readouterr().err


def test_f_10_the_second_attempt_may_succeed_and_nothing_of_the_first_is_left(
    raylet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    started: list[subprocess.Popen[bytes]] = []

    def slow_once(**options: Any) -> None:
        started.append(subprocess.Popen([raylet, "60"]))
        if len(started) == 1:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", slow_once)
    start_local_ray(include_dashboard=False)
    assert len(started) == 2
    assert started[0].wait(5) == -9, "the processes of the failed start are ended"
    assert started[1].poll() is None
    started[1].kill()
    started[1].wait()


def test_processes_that_others_start_meanwhile_outlive_a_failed_start(
    raylet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    script = Path(ray.__file__).parent / "dashboard" / "dashboard.py"
    words = {
        "ours": ["/bin/sleep", "60"],
        "raylet": [raylet, "60"],
        "dashboard": [sys.executable, "-c", "import time; time.sleep(60)", script],
    }
    started: dict[str, subprocess.Popen[bytes]] = {}

    def fails(**options: Any) -> None:
        if not started:
            started.update({name: subprocess.Popen(command) for name, command in words.items()})
            time.sleep(0.5)  # until they run their programs
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fails)
    start_local_ray()
    try:
        assert started["raylet"].wait(5) == started["dashboard"].wait(5) == -9
        assert started["ours"].poll() is None, "a worker of the caller's own"
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_f_10_a_process_of_another_name_may_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def with_helper(**options: Any) -> None:
        helper = subprocess.Popen(["/bin/sleep", "0.1"])
        _wait(1.5)
        helper.wait()

    monkeypatch.setattr(ray, "init", with_helper)
    start_local_ray()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpus_per_worker": 1}, r"no GPU is in this cluster \(1 node, \d+ CPUs?\), but got 1"),
        ({"gpus_per_worker": 0.25}, "no GPU is in this cluster"),
        ({"gpus_per_worker": 1, "workers_per_trial": 2}, "no GPU is in this cluster"),
        ({"cpus_per_worker": 4096}, "`cpus_per_worker` must be at most"),
        ({"workers_per_trial": 4096}, "`workers_per_trial` must be at most"),
    ],
)
def test_f_9_what_this_machine_lacks_is_said_before_ray_starts(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    import torch

    def never(**options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", never)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    search = tiny(tmp_path, **keys).search
    with pytest.raises(ValueError, match=message), cluster(search):
        pass


def test_f_11_the_number_of_concurrent_trials_is_that_of_the_limit(tmp_path: Path) -> None:
    from synq.sweeps.driver.cluster import capacity

    node = {"CPU": 8.0, "GPU": 0.0}
    for limit, number in ((None, 8), (1, 1), (3, 3), (100, 8)):
        search = tiny(tmp_path, max_concurrent=limit).search if limit else tiny(tmp_path).search
        assert capacity(search, [node]).concurrent(search) == number


def test_an_interrupt_while_ray_starts_ends_its_processes_and_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import utils

    program, agent = tmp_path / "raylet", tmp_path / "agent"
    program.symlink_to("/bin/bash")  # a real program of the name of Ray's process, which starts an agent
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(**options: Any) -> None:
        utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as Ray does first
        started.append(subprocess.Popen([program, "-c", f"/bin/sleep 60 & echo $! > {agent}.pid; wait"]))
        while not Path(f"{agent}.pid").exists() or not Path(f"{agent}.pid").read_text().strip():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        _wait(LIMIT)

    monkeypatch.setattr(ray, "init", interrupted)
    with pytest.raises(KeyboardInterrupt), interruptible():
        start_local_ray()
    assert [process.wait(5) for process in started] == [-9]
    pid = int(Path(f"{agent}.pid").read_text())
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "its agent outlives it, which takes a minute to notice"
        time.sleep(0.05)
