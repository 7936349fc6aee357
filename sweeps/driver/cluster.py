"""The Ray cluster of a sweep: join an existing one, or start Ray on this machine. Imports Ray only when called."""

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
from synq.common.text_tables import plural

from ..search_config import SearchConfig
from .local_ray import local_ray, own_sigterm

ROOT = Path(synq.__file__).resolve().parent.parent
"""Parent folder of the package `synq`: a checkout, or site-packages."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Size of the object store of a Ray started here, in bytes: only small objects pass through it, sets are files."""
REACH_SECONDS = 10.0
"""Timeout of a connection to the head of a cluster, in seconds."""
PROBE_SECONDS = 60.0
"""Timeout of a machine's check for a file, in seconds."""


def prepare_environment() -> None:
    """Set Ray's environment variables, unless they are set already; call it before anything imports Ray.

    Disables Tune's displays, loggers and signal handler. Without a cluster also: loopback only, no token, no usage
    report.
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
    if str(ROOT) not in path.split(os.pathsep):  # workers must find this package from any working directory
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), path) if part)


def output_root() -> Path:
    """Return the base of a relative output_dir: the current folder, or ~/synq in an uploaded copy of the project.

    `ray job submit --working-dir` runs in a copy that Ray deletes some time after the job; results must not be in it.
    """
    here = Path.cwd()
    return Path.home() / "synq" if "working_dir_files" in here.parts else here


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity of a cluster for trials."""

    trials: int
    """Maximum number of concurrent trials."""
    summary: str
    """Number of nodes, CPUs and GPUs, in one line."""
    note: str = ""
    """Hint for the user, for example about unused GPUs; "" for none."""

    def concurrent(self, search: SearchConfig) -> int:
        """Return the number of concurrent trials of a sweep: what fits, or less if the sweep limits it."""
        return min(self.trials, search.max_concurrent or self.trials)


@contextmanager
def cluster(search: SearchConfig) -> Iterator[Capacity]:
    """Join the cluster at RAY_ADDRESS (Ray sets it for its jobs), or start Ray on this machine alone.

    Yields:
        Capacity of the cluster.

    Raises:
        ValueError: There is no such cluster, or a trial does not fit into it.
        OSError: Ray does not start on this machine.
    """
    import ray

    if ray.is_initialized():  # by the caller, who also shuts it down
        yield capacity(search)
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ValueError(
            f"`RAY_ADDRESS` must be left out or name a cluster that this machine belongs to, but got {address!r}: from "
            "outside use `ray job submit --working-dir . -- python launch/sweep.py`"
        )
    _check_reachable(address or "")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        # A trial that does not fit is rejected at once, not after the half minute that Ray may take to start.
        capacity(search, [this_machine(with_gpus=search.gpus_per_worker > 0)])
        with local_ray(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet):
            yield capacity(search)
        return
    try:
        with own_sigterm():
            ray.init(**quiet, **_for_workers())
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"`RAY_ADDRESS` must name a running Ray cluster, but got {address!r}: {error}") from None
    try:
        yield capacity(search)
    finally:
        ray.shutdown()


def this_machine(*, with_gpus: bool = True) -> dict[str, float]:
    """Return the CPUs and GPUs of this machine under Ray's names, without starting Ray.

    Args:
        with_gpus: Whether to count GPUs, which imports torch.
    """
    gpus = 0
    if with_gpus:
        import torch

        gpus = torch.cuda.device_count()
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}


def _check_reachable(address: str) -> None:
    """Check that a cluster's address (host:port) accepts connections; Ray itself would try for minutes.

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
    """Return the runtime environment of the workers of a joined cluster: the path of this package, and its commit.

    A submitted job gets it from its submission; Ray rejects a second one.
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
    """Check that all machines of the cluster see a folder: records of trials would otherwise be lost.

    Raises:
        ValueError: A machine did not find a file that was just written there.
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
            except ray.exceptions.RayError:  # a machine that does not respond will run no trial either
                continue
            if not is_visible:
                host = node["NodeManagerHostname"]
                raise ValueError(
                    f"`output_dir` must be on a file system that all machines share, but {host} does not see {folder}"
                )
    finally:
        probe.unlink(missing_ok=True)


def capacity(search: SearchConfig, nodes: Sequence[Mapping[str, float]] | None = None) -> Capacity:
    """Return the capacity of the cluster; each worker of a trial is placed on one machine.

    Args:
        search: Resources and number of workers of a trial.
        nodes: CPU and GPU of each machine; None asks Ray.

    Raises:
        ValueError: A trial does not fit, so that it would wait forever.
    """
    if nodes is None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus, workers = search.cpus_per_worker, search.gpus_per_worker, search.workers_per_trial
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    if gpus and not total["GPU"]:
        here = f"{plural(len(nodes), 'node')}, {plural(total['CPU'], 'CPU')}"
        raise ValueError(
            f"`gpus_per_worker` must be left out or 0, because no GPU is in this cluster ({here}), but got {gpus:g}"
        )
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > most[name]:
            raise ValueError(
                f"`{name.lower()}s_per_worker` must be at most {most[name]:g} (the largest machine of the cluster), "
                f"but got {need:g}"
            )
    slots = sum(_slots(node, cpus, gpus) for node in nodes)
    if slots == 0:
        raise ValueError(
            f"`cpus_per_worker` and `gpus_per_worker` must fit one machine together, but got {cpus:g} and {gpus:g}"
        )
    if workers > slots:
        raise ValueError(
            f"`workers_per_trial` must be at most {slots} (the cluster's capacity for workers of {cpus:g} CPUs and "
            f"{gpus:g} GPUs), but got {workers}"
        )
    unused = gpus == 0 and total["GPU"] > 0
    return Capacity(
        trials=slots // workers,
        summary=f"{plural(len(nodes), 'node')}, {plural(total['CPU'], 'CPU')}, {plural(total['GPU'], 'GPU')}",
        note="GPUs are present but unused: --gpus-per-worker 1 gives each worker one" if unused else "",
    )


def _slots(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return the number of workers that fit one machine; a device is shared by workers with equal fractions of it."""
    counts = [node.get("CPU", 0.0) / cpus]
    if gpus:
        counts.append(node.get("GPU", 0.0) * int(1 / gpus + 1e-9))
    return int(min(counts) + 1e-9)
