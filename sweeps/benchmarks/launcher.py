"""Start workers as separate processes and read what they report."""

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
WORKER = f"{__package__}.worker"
SOLO = [sys.executable, "-m", WORKER]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", WORKER]
"""Starts a worker as two processes of one group."""


def start(command: list[str], threads: int = 1) -> "subprocess.Popen[str]":
    """Start a process with its own number of threads, in a new session, so that its children can be ended with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process with everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Wait for a process and return what it wrote.

    Raises:
        WorkerError: It failed or took too long; the message holds the end of its standard error.
    """
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"a process of the benchmark must end within {TIMEOUT} s, but was stopped") from None
    finally:
        stop(process)
    if process.returncode != 0:
        code, end = process.returncode, err.strip()[-500:]
        raise WorkerError(f"a process of the benchmark must end well, but ended with {code}: {end}")
    return out, err


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for a worker and return what it reports; raises as `finish`."""
    found: dict[str, Any] = json.loads(finish(process)[0].strip().splitlines()[-1])
    return found
