"""Where a sweep runs: on the Ray cluster it is given, or on a Ray of its own on this machine. Imports Ray only when called."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweeps.spec import SearchConfig

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20
"""Size of the object store of a Ray of our own; nothing large passes through it, sets are files."""


def prepare_environment() -> None:
    """Set what Ray reads when it is imported: call it before anything imports Ray. What the user has set stays.

    Always: Tune's own displays, loggers and signal handler off. Without a cluster also: loopback only, no token, no usage report.
    """
    quiet = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    alone = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, value in {**quiet, **({} if os.environ.get("RAY_ADDRESS") else alone)}.items():
        os.environ.setdefault(name, value)
    path = os.environ.get("PYTHONPATH", "")
    if str(ROOT) not in path.split(os.pathsep):  # workers must find this package from wherever the sweep was started
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), path) if part)


def output_root() -> Path:
    """Return the folder against which a relative output_dir is taken: the current one, or the home folder in an uploaded copy.

    `ray job submit --working-dir` runs in a copy of the project that Ray deletes some time after the job; results must outlive it.
    """
    here = Path.cwd()
    return Path.home() / "synq" if "working_dir_files" in here.parts else here


@contextmanager
def cluster(search: SearchConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (a job of Ray is told so), or start Ray on this machine alone."""
    import ray

    if ray.is_initialized():  # the caller's own Ray, which stays his
        _check_resources(search)
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(**quiet)
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"`RAY_ADDRESS` must name a running Ray cluster, but got {address!r}: {error}") from None
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    try:
        _check_resources(search)
        yield
    finally:
        ray.shutdown()


def _check_resources(search: SearchConfig) -> None:
    """Refuse a trial that no machine of the cluster can hold, which would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, need in (("CPU", search.cpus_per_trial), ("GPU", search.gpus_per_trial)):
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if need > most:
            raise ValueError(
                f"`{name.lower()}s_per_trial` must be at most {most:g} (the largest machine of the cluster), but got {need:g}"
            )
    cpus, gpus = search.cpus_per_trial, search.gpus_per_trial
    if not any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
        raise ValueError(
            f"`cpus_per_trial` and `gpus_per_trial` must fit one machine together, but got {cpus:g} and {gpus:g}"
        )
