"""Start benchmark workers as separate processes and read their results."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import synq


class WorkerError(RuntimeError):
    """A process of the benchmark failed."""


ROOT = Path(synq.__file__).resolve().parent.parent
"""Folder that holds the package `synq`: a checkout, or site-packages."""
TIMEOUT = 1800
"""Time limit of a worker, in seconds."""
WORKER = f"{__package__}.worker"
SOLO = [sys.executable, "-m", WORKER]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", WORKER]
"""Command that starts a worker as two processes of one process group."""


def start(command: list[str], threads: int = 1) -> "subprocess.Popen[str]":
    """Start a process with a number of CPU threads, in a new session, so that its children can be killed with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def stop(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Wait for a process and return its standard output and standard error.

    Raises:
        WorkerError: It failed or timed out; the message has the end of its standard error.
    """
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"a process of the benchmark must end within {TIMEOUT} s, but was stopped") from None
    finally:
        stop(process)
    if process.returncode != 0:
        code, end = process.returncode, err.strip()[-500:]
        raise WorkerError(f"a process of the benchmark must exit with code 0, but exited with {code}: {end}")
    return out, err


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for a worker and return its result: the JSON on its last line of output.

    Raises:
        WorkerError: Raised by `finish`.
    """
    found: dict[str, Any] = json.loads(finish(process)[0].strip().splitlines()[-1])
    return found
