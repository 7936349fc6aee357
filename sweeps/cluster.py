"""Where a sweep runs: on the Ray cluster it is given, or on a Ray of its own on this machine. Imports Ray only when called."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweeps.spec import SearchConfig
from synq.results import environment, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20
"""Size of the object store of a Ray of our own; nothing large passes through it, sets are files."""
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
def cluster(search: SearchConfig) -> Iterator[str]:
    """Join the cluster that RAY_ADDRESS names (a job of Ray is told so), or start Ray on this machine alone.

    Yields:
        A remark for the user, or "".

    Raises:
        ValueError: There is no such cluster, or no machine of it can hold a trial.
    """
    import ray

    if ray.is_initialized():  # the caller's own Ray, which stays his
        yield _check_resources(search)
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ValueError(
            f"`RAY_ADDRESS` must be left out or name a cluster that this machine belongs to, but got {address!r}: from outside use "
            "`ray job submit --working-dir . -- python launch/sweep.py`"
        )
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(**quiet, **_for_workers())
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"`RAY_ADDRESS` must name a running Ray cluster, but got {address!r}: {error}") from None
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    try:
        yield _check_resources(search)
    finally:
        ray.shutdown()


def _for_workers() -> dict[str, Any]:
    """What the workers of a joined cluster must be told: where this package lies, and which commit it is of.

    A job is told so by what it was submitted with; Ray refuses to have that said twice.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    commit = environment()["commit"]
    told = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        **({} if commit == "unknown" else {"SYNQ_COMMIT": commit}),
    }
    return {"runtime_env": {"env_vars": told}}


def check_shared(folder: Path) -> None:
    """Refuse a folder that a machine of the cluster does not see: its trials' records would be lost.

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
        look: Any = ray.remote(num_cpus=0)(lambda path: os.path.exists(path))  # a lambda travels by value
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        answers = [look.options(scheduling_strategy=place).remote(str(probe)) for place in places]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                seen = ray.get(answer, timeout=PROBE_SECONDS)
            except ray.exceptions.RayError:  # a machine that cannot answer will hold no trial either
                continue
            if not seen:
                raise ValueError(
                    f"`output_dir` must be on a file system that all machines share, but {node['NodeManagerHostname']} does not "
                    f"see {folder}"
                )
    finally:
        probe.unlink(missing_ok=True)


def _check_resources(search: SearchConfig) -> str:
    """Refuse a trial that no machine of the cluster can hold, which would wait for ever; remark on GPUs left unused."""
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
    unused = gpus == 0 and any(node.get("GPU", 0.0) > 0 for node in nodes)
    return "GPUs are present but unused: --gpus-per-trial 1 gives each trial one" if unused else ""
