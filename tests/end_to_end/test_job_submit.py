"""`ray job submit` in its three forms against a real head on loopback: all succeed and leave the same columns."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from synq.sweeps.leaderboard.columns import LEADERBOARD_COLUMNS, TRIAL_COLUMNS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SPEC = """
name = "demo"
bits = ["W8A8", "W3A3"]
num_trials = 1
[base.synthesis]
num_images = 32
shard_size = 16
iterations = 2
[base.quant]
calib_images = 32
[base.finetune]
epochs = 1
batch_size = 16
lowpass_unit = "nyquist"
[base.evaluation]
heldout_images = 16
num_images = 64
"""
"""Stands in for the demo, so that the literal commands need no further words."""


NOT_READY = "No available agent to submit job, please try again later"
"""What a head replies whose dashboard is there before its agent, on a busy machine; a user does what it asks for."""
ATTEMPTS = 5


@dataclass(frozen=True)
class Head:
    """A running head, started in a project."""

    project: Path
    home: Path
    environment: dict[str, str]
    address: str

    def submit(self, *words: str) -> str:
        """Run `ray job submit WORDS` in the project and return what it printed."""
        command = [str(Path(sys.executable).parent / "ray"), "job", "submit", *words]
        for _ in range(ATTEMPTS):
            done = subprocess.run(
                command,
                cwd=self.project,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
            if NOT_READY not in done.stdout + done.stderr:
                break
            time.sleep(3)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Head]:
    """`ray start --head` in a copy of the project whose demo is a matter of seconds."""
    project, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("home")
    for name in ("synq", "sweeps", "launch"):
        shutil.copytree(root / name, project / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".rayignore"):
        shutil.copy(root / name, project / name)
    (project / "sweeps" / "specs" / "demo.toml").write_text(SPEC)
    python = Path(sys.executable).parent
    environment = {**os.environ, "HOME": str(home), "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment.pop("PYTHONPATH", None)
    port, dashboard = _free_port(), _free_port()
    words = ["start", "--head", "--block", "--num-cpus", "2", "--port", str(port), "--dashboard-port", str(dashboard)]
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            [str(python / "ray"), *words], cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            end = time.monotonic() + 60
            while not _answers(f"{url}/api/version"):
                assert process.poll() is None and time.monotonic() < end, (home / "head.log").read_text()
                time.sleep(0.3)
            yield Head(project, home, {**environment, "RAY_ADDRESS": url}, f"127.0.0.1:{port}")
        finally:
            process.send_signal(
                signal.SIGTERM
            )  # a head started with --block ends its own processes, and no other Ray's
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.long
def test_a_driver_from_another_folder_tells_the_workers_what_they_run(head: Head, tmp_path: Path) -> None:
    words = [sys.executable, str(head.project / "launch" / "sweep.py"), "--output-dir", str(tmp_path / "out")]
    told = {**head.environment, "RAY_ADDRESS": head.address, "SYNQ_COMMIT": "of-the-driver"}
    done = subprocess.run(words, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        assert {row["commit"] for row in csv.DictReader(file)} == {"of-the-driver"}


def check(folder: Path, printed: str) -> None:
    """The tables are whole, with the agreed columns, and the log says where they are."""
    for name, columns in (("trials.csv", TRIAL_COLUMNS), ("leaderboard.csv", LEADERBOARD_COLUMNS)):
        lines = (folder / name).read_text().splitlines()
        assert lines[0].startswith(",".join(columns)) and len(lines) == 3
        assert str(folder / name) in printed
    assert "succeeded" in printed and "[2/2]" in printed
    assert "Traceback" not in printed and "\x1b[2K" not in printed, "a live display in a job's log"


@pytest.mark.long
def test_python_with_working_dir(head: Head) -> None:
    printed = head.submit("--working-dir", ".", "--", "python", "launch/sweep.py")
    check(head.home / "synq" / "runs" / "demo", printed)  # not into the uploaded copy, which Ray deletes


@pytest.mark.long
def test_executable_with_working_dir(head: Head) -> None:
    folder = head.home / "second"
    check(folder, head.submit("--working-dir", ".", "--", "launch/sweep.py", "--output-dir", str(folder)))


def test_literal_form_from_a_head_started_in_the_project(head: Head) -> None:
    check(head.project / "runs" / "demo", head.submit("launch/sweep.py"))
