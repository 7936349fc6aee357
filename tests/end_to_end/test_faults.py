"""Faults, from outside: killed drivers and workers, lost machines, full and vanished disks, Ctrl-C, a second driver."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sweep_tools import Start, board, finish, listed, rows, until, whole


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Processes of this driver's trials."""
    found = subprocess.run(
        ["pgrep", "-f", "^ray::ImplicitFunc"], capture_output=True, text=True, check=False
    ).stdout.split()
    return [pid for pid in map(int, found) if _is_below(pid, process.pid)]


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_change_no_figure(
    start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    out = tmp_path / "out"
    words = (str(listed(tmp_path)), "--output-dir", str(out))
    process = start(*words)
    until(lambda: bool(list(out.glob("runs/*/checkpoint.pt"))), process)
    os.kill(workers(process)[0], signal.SIGKILL)
    until(lambda: bool(list(out.glob("records/*.json"))), process)
    process.kill()
    process.wait()
    whole(out, killed=True)
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    again = finish(start(*words))
    assert f"{len(before)} trials are there already" in again
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "a finished trial was run again"
    assert board(out) == undisturbed and len(undisturbed) == 4
    assert {row["status"] for row in rows(out / "trials.csv")} == {"completed"}, "a killed worker's trial was lost"
    whole(out, killed=True)


@pytest.mark.slow
def test_ctrl_c_writes_the_tables_and_a_second_driver_is_rejected(
    start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    out = tmp_path / "out"
    words = (str(listed(tmp_path)), "--output-dir", str(out))
    process = start(*words)
    until(lambda: bool(list(out.glob("records/*.json"))), process)
    process.send_signal(signal.SIGSTOP)  # or it may be finished before the second driver has started
    second = start(*words)
    text, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and "another sweep runs in" in text
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command resumes" in text
    assert rows(out / "trials.csv") and rows(out / "leaderboard.csv")
    whole(out)
    finish(start(*words))
    assert board(out) == undisturbed


NETS = """
import os

import ray

from synq.teacher.cifar_resnet import cifar_resnet


def net():
    return cifar_resnet(8, 10, 1, 4)


def _in_a_trial():
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def killer():
    if _in_a_trial():
        os.kill(os.getpid(), 9)
    return net()


def glutton():
    import torch

    if _in_a_trial():
        torch.empty(2**60)
    return net()
"""


@pytest.mark.slow
@pytest.mark.long
def test_trials_that_die_or_ask_for_too_much_are_recorded_and_the_sweep_goes_on(start: Start, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    model = (
        'weights = "random"\ninput_size = [1, 8, 8]\nmean = [0.0]\nstd = [1.0]\nnum_classes = 10\ndataset = "none"\n'
    )
    models = "".join(
        f'[[models]]\nspec = "{tmp_path}/nets.py:{name}"\n{model}' for name in ("killer", "glutton", "net")
    )
    spec = listed(tmp_path, epochs=2, head="num_trials = 1\nmax_failures = 1\n")
    spec.write_text(spec.read_text() + models)
    process = start(str(spec), "--output-dir", str(tmp_path / "out"))
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and "no trial was completed in killer-W3A3, glutton-W3A3" in text
    ended = {row["trial"].partition("-")[0]: row for row in rows(tmp_path / "out" / "trials.csv")}
    assert {name: row["status"] for name, row in ended.items()} == {
        "killer": "lost",
        "glutton": "failed",
        "net": "completed",
    }
    assert ended["killer"]["reason"].startswith("the worker died 2 times")
    assert "memory" in ended["glutton"]["reason"]
    logs = {name: (tmp_path / "out" / row["log"]).read_text() for name, row in ended.items()}
    assert logs["killer"].count("starts\n") == 2 and "the driver: lost: the worker died 2 times" in logs["killer"]
    assert "in glutton" in logs["glutton"] and "epoch 2/2: objective" in logs["net"]
    assert ended["killer"]["host"] == ended["net"]["host"] != ""
    command = [sys.executable, "-m", "synq.cli", "show", str(tmp_path / "out")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2 trials failed (1 failed, 1 lost)" in shown and ended["killer"]["log"] in shown


@pytest.mark.slow
@pytest.mark.long
def test_too_many_failures_end_the_sweep_and_can_be_tried_again(start: Start, tmp_path: Path) -> None:
    spec = listed(tmp_path, epochs=2, head="max_failed_trials = 2\nmax_concurrent = 1\n")
    text = spec.read_text()
    spec.write_text(
        re.sub(r"= 0\.0\d+\n", lambda match: f"= 1e{20 + len(match[0])}\n", text).replace("grad_clip", "grad_clip")
    )
    spec.write_text(spec.read_text().replace("[base.synthesis]", 'grad_clip = "none"\n[base.synthesis]'))
    process = start(str(spec), "--output-dir", str(tmp_path / "out"))
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and "stopped: 2 trials failed" in text, text
    failed = sorted(path.stem for path in (tmp_path / "out" / "records").glob("*.json"))
    assert len(failed) == 2
    again = start(str(spec), "--output-dir", str(tmp_path / "out"), "--retry-failed")
    text, _ = again.communicate(timeout=200)
    assert again.returncode == 1 and "2 were interrupted" in text
    assert sorted(path.stem for path in (tmp_path / "out" / "records").glob("*.json")) == failed


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_that_vanishes_ends_the_sweep_and_comes_back(
    start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    out = tmp_path / "out"
    words = (str(listed(tmp_path)), "--output-dir", str(out))
    process = start(*words)
    until(lambda: bool(list(out.glob("records/*.json"))), process)
    out.rename(tmp_path / "elsewhere")
    text, _ = process.communicate(timeout=100)
    assert (
        process.returncode == 2 and "`output_dir` must stay in place during a sweep" in text and "Traceback" not in text
    )
    assert not (out / "records").exists() and not (out / "plans").exists(), "a new sweep was begun in its place"
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "elsewhere").rename(out)
    whole(out)
    finish(start(*words))
    assert board(out) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 500 kB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_killed_processes_left_is_cleared_when_it_is_old(tmp_path: Path) -> None:
    from synq.sweeps.state.folder import LEFTOVER_SECONDS, SweepFolder

    old, new = tmp_path / "plans" / ".a.json.x.tmp", tmp_path / "records" / ".b.json.y.tmp"
    for path in (old, new):
        path.parent.mkdir()
        path.touch()
    os.utime(old, (0, time.time() - LEFTOVER_SECONDS - 1))
    folder = SweepFolder(tmp_path)
    folder.take()
    folder.give_back()
    assert not old.exists() and new.exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_full_disk_ends_the_sweep_and_leaves_no_half_file(
    start: Start, tmp_path: Path, small_disk: Path, undisturbed: list[dict[str, str]]
) -> None:
    out = small_disk / "out"
    words = (str(listed(tmp_path)), "--output-dir", str(out))
    process = start(*words)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "No space left on device" in text and "Traceback" not in text, text
    assert "the same command resumes" in text
    whole(out)
    assert not [row for row in map(json.loads, map(Path.read_text, out.glob("records/*"))) if row["status"] == "failed"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    finish(start(*words))
    assert board(out) == undisturbed


def _is_below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor
