"""How a trial ended whose workers died, by the error that Ray raises. Imports Ray, not torch."""

import re
import time
from contextlib import suppress
from pathlib import Path

import ray.exceptions
from ray import cloudpickle
from ray.tune.experiment import Trial

from synq.runs.record import Status

NOTICE_SECONDS = 20.0
"""Seconds in which Ray notices by its own checks that a machine is gone."""
_MACHINE = re.compile(r"\bnode\b[^.]*\b(died|dead|removed|terminated|drained|preempt)|\bpreempt", re.IGNORECASE)
"""Texts of Ray about a machine that has left the cluster."""


def last_error(trial: Trial) -> object:
    """Return the last error of a trial: Ray's, or its text if it cannot be read, or "unknown".

    Ray Tune writes it into a folder of the driver and copies that to the storage later, often after it has reported the
    error; `Trial.get_error` only reads the copy.
    """
    with suppress(Exception):  # absent, or of a class that is not importable here
        return cloudpickle.loads(Path(trial.pickled_error_file or "").read_bytes())
    with suppress(OSError):
        return Path(trial.error_file or "").read_text(encoding="utf-8")
    return trial.get_pickled_error() or trial.get_error() or "unknown"


def has_left(address: str, seconds: float = NOTICE_SECONDS) -> bool:
    """Return whether a machine has left the cluster; Ray knows that some seconds after its workers are unreachable.

    Args:
        address: IP address of the machine; "" if it is not known.
        seconds: How long to wait for Ray to know it.
    """
    end = time.monotonic() + seconds
    while address and ray.is_initialized():
        if any(node["NodeManagerAddress"] == address and not node["Alive"] for node in ray.nodes()):
            return True
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return False


def death_status(error: object, address: str = "") -> Status:
    """Return the status of a trial by the last error of its workers.

    Args:
        error: An error of Ray; anything else is an error of the trial.
        address: IP address of the trial's machine, which decides where Ray's error does not name one.

    Returns:
        pre-empted if its machine left the cluster, lost if its process died for another reason, such as `kill -9`; else
        failed, also where Ray ended the process because the memory was full.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, ray.exceptions.NodeDiedError):
        return "pre-empted"
    if isinstance(cause, ray.exceptions.RayActorError):
        if cause.preempted or _MACHINE.search(str(cause)):
            return "pre-empted"
        is_unreachable = isinstance(cause, ray.exceptions.ActorUnavailableError)  # the first sign of a lost machine
        return "pre-empted" if is_unreachable and has_left(address) else "lost"
    return "lost" if isinstance(cause, ray.exceptions.WorkerCrashedError) else "failed"
