"""R4, R10: a process of the Ray that a sweep started is killed in mid-sweep; the same command then goes on."""

import os
import signal
import time
from pathlib import Path

import pytest

from support.ray_processes import DAEMONS, below, processes_of
from support.sweep_tools import Start, board, finish, listed, until

LIMIT = 45.0
"""Seconds until the sweep has ended; without a look at Ray's processes it waits for a minute, or for ever."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("daemon", DAEMONS)
def test_r4_r10_a_sweep_whose_ray_died_ends_in_one_line_and_goes_on_by_the_same_command(
    daemon: str, start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    out = tmp_path / "out"
    words = (str(listed(tmp_path)), "--output-dir", str(out))
    process = start(*words)
    until(lambda: bool(list(out.glob("runs/*/checkpoint.pt"))), process)
    (pid,) = processes_of(process.pid, daemon)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and time.monotonic() - began < LIMIT
    lines = [line for line in text.splitlines() if line.endswith("the same command goes on")]
    assert len(lines) == 1 and f"its process {daemon} died" in lines[0], text
    assert "Traceback" not in text
    finish(start(*words))
    assert board(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("name", DAEMONS)
def test_a_sweep_that_is_stopped_while_ray_starts_leaves_no_process(name: str, start: Start, tmp_path: Path) -> None:
    """Ray's agents, started by its raylet, go on for a minute without it."""
    process = start(str(listed(tmp_path)), "--output-dir", str(tmp_path / "out"))
    until(lambda: bool(processes_of(process.pid, name)), process)
    time.sleep(2.0 if name == "raylet" else 0.0)
    seen = set(below(process.pid))
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "interrupted; the tables are in" in text, text
    end = time.monotonic() + 10
    while left := [pid for pid in seen if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.2)
