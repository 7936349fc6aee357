"""Faults, from outside: killed drivers and workers, lost machines, full and vanished disks, Ctrl-C, a second driver."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sweep_tools import rows, write_spec


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the door as a user would, in a process group of its own that ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(root / "launch" / "sweep.py"), *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_repeats_nothing(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words = (str(write_spec(tmp_path / "tiny.toml", epochs=60)), "--output-dir", str(tmp_path / "out"))
    records = tmp_path / "out" / "records"
    process = start(*words)
    until(lambda: records.is_dir() and len(list(records.glob("*.json"))) >= 1, process)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    again = start(*words)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0, out
    assert f"{len(before)} trials are there already" in out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    trials = rows(tmp_path / "out" / "trials.csv")
    assert len(trials) == 4 and {row["status"] for row in trials} == {"completed"}
    assert len({row["config_digest"] for row in trials}) == 4


@pytest.mark.slow
def test_ctrl_c_writes_the_tables_and_a_lost_worker_is_replaced(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words = (str(write_spec(tmp_path / "tiny.toml", epochs=150)), "--output-dir", str(tmp_path / "out"))
    process = start(*words)
    runs = tmp_path / "out" / "runs"
    until(lambda: runs.is_dir() and len(list(runs.glob("*/checkpoint.pt"))) >= 1, process)
    found = subprocess.run(
        ["pgrep", "-f", "^ray::ImplicitFunc"], capture_output=True, text=True, check=False
    ).stdout.split()
    own = [pid for pid in map(int, found) if _is_below(pid, process.pid)]
    assert own, "no worker of this sweep was found"
    os.kill(own[0], signal.SIGKILL)
    until(lambda: len(list((tmp_path / "out" / "records").glob("*.json"))) >= 1, process)
    refused = start(*words)
    out, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "another sweep runs in" in out
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in out
    trials = rows(tmp_path / "out" / "trials.csv")
    assert trials and {row["status"] for row in trials} == {"completed"}, "a killed worker's trial was lost"


def _is_below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor
