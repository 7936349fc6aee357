"""Where a sweep runs: on the Ray cluster it is given, or on a separate Ray on this machine. Imports Ray only when called."""

import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synq
from synq.common.environment import environment
from synq.common.files import write_text_atomic

from ..search_config import SearchConfig

ROOT = Path(synq.__file__).resolve().parent.parent
"""Folder that holds the package `synq`: a checkout, or site-packages."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Size of the object store of a Ray that we start; nothing large passes through it, sets are files."""
REACH_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection."""
PROBE_SECONDS = 60.0
"""How long a machine may take to look for a file."""


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
    local = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, value in {**quiet, **({} if os.environ.get("RAY_ADDRESS") else local)}.items():
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


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a cluster holds."""

    trials: int
    """Trials that it holds at one time."""
    summary: str
    """Its nodes, CPUs and GPUs, in one line."""
    note: str = ""
    """What the user may have overlooked."""


@contextmanager
def cluster(search: SearchConfig) -> Iterator[Capacity]:
    """Join the cluster that RAY_ADDRESS names (Ray sets it for its jobs), or start Ray on this machine alone.

    Yields:
        How many trials it holds.

    Raises:
        ValueError: There is no such cluster, or it cannot hold a trial.
    """
    import ray

    if ray.is_initialized():  # the caller's own Ray, which stays his
        yield capacity(search)
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ValueError(
            f"`RAY_ADDRESS` must be left out or name a cluster that this machine belongs to, but got {address!r}: from outside use "
            "`ray job submit --working-dir . -- python launch/sweep.py`"
        )
    _check_reachable(address or "")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(**quiet, **_for_workers())
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"`RAY_ADDRESS` must name a running Ray cluster, but got {address!r}: {error}") from None
    else:
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        except Exception as error:  # Ray raises a bare one where its processes do not come up
            raise OSError(f"Ray must start on this machine, but it did not: {error}") from error
    try:
        yield capacity(search)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Reject the address of a cluster (host:port) that cannot be reached; Ray itself tries for minutes.

    Raises:
        ValueError: The connection fails.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = f"{address!r}: {error} (is its head running, is a firewall between?)"
        raise ValueError(f"`RAY_ADDRESS` must name a running Ray cluster, but got {why}") from None


def _for_workers() -> dict[str, Any]:
    """Return the environment of the workers of a joined cluster: where this package is, and its commit.

    A submitted job has that from its submission, and Ray rejects it when it is given twice.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    commit = environment()["commit"]
    variables = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        **({} if commit == "unknown" else {"SYNQ_COMMIT": commit}),
    }
    return {"runtime_env": {"env_vars": variables}}


def check_shared(folder: Path) -> None:
    """Reject a folder that a machine of the cluster does not see: its trials' records would be lost.

    Raises:
        ValueError: A machine looked for a file that was just written there, and did not find it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    probe = folder / f".probe-{uuid.uuid4().hex}"
    write_text_atomic(probe, "")
    try:
        exists: Any = ray.remote(num_cpus=0)(lambda path: os.path.exists(path))  # a lambda travels by value
        strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        pending = [exists.options(scheduling_strategy=strategy).remote(str(probe)) for strategy in strategies]
        for node, reply in zip(nodes, pending, strict=True):
            try:
                is_visible = ray.get(reply, timeout=PROBE_SECONDS)
            except ray.exceptions.RayError:  # a machine that does not respond will hold no trial either
                continue
            if not is_visible:
                raise ValueError(
                    f"`output_dir` must be on a file system that all machines share, but {node['NodeManagerHostname']} does not "
                    f"see {folder}"
                )
    finally:
        probe.unlink(missing_ok=True)


def capacity(search: SearchConfig, nodes: Sequence[Mapping[str, float]] | None = None) -> Capacity:
    """Return how many trials the cluster holds, each of its workers whole on one machine.

    Args:
        search: What a trial needs.
        nodes: CPU and GPU of each machine; None asks Ray.

    Raises:
        ValueError: It cannot hold one, which would wait for ever.
    """
    if nodes is None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus, workers = search.cpus_per_worker, search.gpus_per_worker, search.workers_per_trial
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > most[name]:
            raise ValueError(
                f"`{name.lower()}s_per_worker` must be at most {most[name]:g} (the largest machine of the cluster), but got {need:g}"
            )
    slots = sum(_slots(node, cpus, gpus) for node in nodes)
    if slots == 0:
        raise ValueError(
            f"`cpus_per_worker` and `gpus_per_worker` must fit one machine together, but got {cpus:g} and {gpus:g}"
        )
    if workers > slots:
        raise ValueError(
            f"`workers_per_trial` must be at most {slots} (as many workers of {cpus:g} CPUs and {gpus:g} GPUs does the cluster hold), "
            f"but got {workers}"
        )
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    machines = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    unused = gpus == 0 and total["GPU"] > 0
    return Capacity(
        trials=slots // workers,
        summary=f"{machines}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs",
        note="GPUs are present but unused: --gpus-per-worker 1 gives each worker one" if unused else "",
    )


def _slots(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Workers that one machine holds. A device is shared by whole parts: two halves, but not 0.6 and 0.4 of two devices."""
    counts = [node.get("CPU", 0.0) / cpus]
    if gpus:
        counts.append(node.get("GPU", 0.0) * int(1 / gpus + 1e-9))
    return int(min(counts) + 1e-9)
