"""Start workers in processes of their own and read what they report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 1800
SOLO = [sys.executable, "-m", "launch.benchmarks.worker"]


def two_processes(device: str) -> list[str]:
    """Return the words that start a worker as two processes of one group."""
    config = "accelerate_cpu2.yaml" if device == "cpu" else "accelerate_gpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / config)]
    return [*launcher, "--num_processes", "2", "-m", "launch.benchmarks.worker"]


def start(command: list[str], threads: int = 1) -> "subprocess.Popen[str]":
    """Start a worker with its own number of threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for a worker and return what it reports.

    Raises:
        ValueError: It failed; the message holds the end of what it said.
    """
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    if process.returncode != 0:
        raise ValueError(
            f"a worker of the benchmark must end well, but ended with {process.returncode}: {err.strip()[-500:]}"
        )
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found
