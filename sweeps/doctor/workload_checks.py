"""Checks that run workloads on a cluster: GPU arithmetic, process groups, small sweeps, a killed worker process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synq.common.files import read_json

from ..storage.addresses import is_address, local_copy
from .cluster_state import Cluster, FailedError, Passed, SkippedError
from .probes import POLL_SECONDS
from .workers import REDUCED_BYTES, GpuSharer, ReportCollector, gpu_facts

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Maximum of the largest absolute error over the largest absolute value, against float64 on the CPU."""
SHARERS = 4
TRIALS = 4
GROUP_SIZE = 8
"""Batch size of one process."""
FAULT_EPOCHS = 80
"""Enough epochs to kill the process between the first and the last."""
TRIAL_ACTOR = "ImplicitFunc"
"""Part of the class name of the actors in which Ray Tune runs trials."""
BUSY = "the cluster has no free resources (other jobs: ray status)"


def check_gpus(cluster: Cluster) -> Passed:
    """Check that every GPU multiplies as the CPU does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = _gpus(cluster)
    tasks: dict[str, Any] = {}
    for node, count in gpus.items():
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=cluster.logical_gpus(node), max_retries=0)(gpu_facts)
        tasks[node] = task.options(scheduling_strategy=on_node).remote(count)
    summaries = []
    try:
        for node, task in tasks.items():
            for number, facts in enumerate(ray.get(task, timeout=cluster.seconds_left())):
                summaries.append(validate_device(facts, f"{cluster.node_name(node)}, GPU {number}"))
    except ray.exceptions.GetTimeoutError:
        raise FailedError(f"no reply in time: {BUSY}, or a driver hangs (nvidia-smi, dmesg)") from None
    finally:
        for task in tasks.values():
            ray.cancel(task, force=True)
    return Passed("; ".join(summaries), {"gpus": f"{sum(gpus.values())} GPUs: {summaries[0]}"})


def validate_device(facts: Mapping[str, Any], where: str) -> str:
    """Return speed and memory of a device as text, after validating its products.

    Args:
        facts: Result of `measure_device`.
        where: Node and index of the device, for the text.

    Raises:
        FailedError: A product differs from the CPU's by more than `TOLERANCE`.
    """
    for name, limit in TOLERANCE.items():
        error = facts[f"{name}_error"]
        if not error <= limit:  # NaN, too
            raise FailedError(
                f"{where} ({facts['name']}): a {name} product must be within {limit:g} of the CPU's, but got "
                f"{error:.2g}: look at the driver, torch's CUDA build (line `nodes`) and the device's ECC errors"
            )
    speed = ", ".join(f"{name} {facts[f'{name}_tflops']:.1f} TFLOP/s" for name in TOLERANCE)
    memory = f"{facts['free'] / 2**30:.1f} of {facts['memory'] / 2**30:.1f} GiB free"
    return f"{facts['name']} ({where}): {speed}, {memory}"


def check_packing(cluster: Cluster) -> Passed:
    """Check that four workers with a quarter of a GPU each share one device at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = next(iter(_gpus(cluster)))
    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    sharer = ray.remote(num_cpus=0, num_gpus=1 / SHARERS)(GpuSharer).options(scheduling_strategy=on_node)
    actors: list[Any] = [sharer.remote() for _ in range(SHARERS)]
    try:
        found = ray.get([actor.compute.remote() for actor in actors], timeout=cluster.seconds_left())
        # A second call succeeds only if all of them are alive at the same time.
        again = ray.get([actor.compute.remote() for actor in actors], timeout=cluster.seconds_left())
    except ray.exceptions.GetTimeoutError:
        raise FailedError(f"four workers of a quarter of a GPU must run at the same time, but do not: {BUSY}") from None
    finally:
        for actor in actors:
            ray.kill(actor)
    devices = sorted({one["device"] for one in found})
    pids = {one["pid"] for one in found}
    if len(devices) != 1 or not devices[0]:
        raise FailedError(
            f"four quarters must be of one device, but got CUDA_VISIBLE_DEVICES {devices} (do other jobs use the GPUs?)"
        )
    if len(pids) != SHARERS or {one["pid"] for one in again} != pids or not all(one["right"] for one in found):
        raise FailedError(f"four processes must compute on device {devices[0]}, but got {found}")
    detail = f"{SHARERS} processes of 0.25 GPU on device {devices[0]} of {cluster.node_name(node)} at the same time"
    return Passed(detail, {"packing": detail})


def check_gloo(cluster: Cluster) -> Passed:
    """Check that a process group on CPUs, spread over the nodes, reduces a tensor (gloo)."""
    _enough_cpus(cluster, cluster.workers)
    return _group(cluster, cluster.workers, gpu=False)


def check_nccl(cluster: Cluster) -> Passed:
    """Check that a process group with a GPU each, spread over the nodes, reduces a tensor (NCCL)."""
    count = sum(_gpus(cluster).values())
    if count < 2:
        more = "; `.ci/gpu` of a checkout checks NCCL with one" if count == 1 else ""
        raise SkippedError(f"needs 2 GPUs, but there is {count}{more}")
    return _group(cluster, min(cluster.workers, count), gpu=True)


def _group(cluster: Cluster, workers: int, *, gpu: bool) -> Passed:
    import ray

    backend = "nccl" if gpu else "gloo"
    collector: Any = ray.remote(num_cpus=0)(ReportCollector).remote()
    task = cluster.start("group", collector, workers, gpu)
    timed_out = "timed out"
    try:
        cluster.finish(task, timed_out)
    except FailedError as error:
        reports = ray.get(collector.all.remote(), timeout=5)
        if str(error) == timed_out:
            raise FailedError(diagnose_hang(reports, workers, backend)) from None
        raise FailedError(f"{error}; {_interface(backend)}") from None
    reports = ray.get(collector.all.remote(), timeout=5)
    return validate_group(reports, workers, backend)


def diagnose_hang(reports: Mapping[int, Mapping[str, Any]], workers: int, backend: str) -> str:
    """Return how far the workers of a process group came before the timeout, and the likely cause.

    Args:
        reports: Report of each worker that started, by rank (`join_group`).
        workers: Number of processes of the group.
        backend: gloo or nccl.
    """
    hosts = ", ".join(sorted({str(facts["host"]) for facts in reports.values()}))
    joined = sum("joined" in facts for facts in reports.values())
    if not reports:
        return (
            f"no worker started: {BUSY}, or they cannot reach each other to form a group: a firewall between the "
            f"machines must let all ports through, or {_interface(backend)}"
        )
    if joined < workers:
        return (
            f"{joined} of {workers} workers joined the group ({hosts}): a firewall between the machines, or "
            f"{_interface(backend)}"
        )
    return f"all {workers} workers joined ({hosts}), but cannot exchange data: {_interface(backend)}"


def _interface(backend: str) -> str:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    more = "; NCCL_DEBUG=INFO logs more, NCCL_IB_DISABLE=1 leaves InfiniBand out" if backend == "nccl" else ""
    return f"{name} must name the interface that connects the machines (ip addr){more}"


def validate_group(reports: Mapping[int, Mapping[str, Any]], workers: int, backend: str) -> Passed:
    """Return the size and speed of a process group, after validating its reports.

    Args:
        reports: Report of each worker by rank (`join_group`).
        workers: Number of processes that the group must have.
        backend: The backend that it must use, gloo or nccl.

    Raises:
        FailedError: The group has another size or backend, or a sum is wrong.
    """
    worlds = {facts.get("world") for facts in reports.values()}
    if set(reports) != set(range(workers)) or worlds != {workers}:
        raise FailedError(
            f"{workers} processes must form one group, but got {len(reports)} that see {sorted(map(str, worlds))}"
        )
    backends = {facts["backend"] for facts in reports.values()}
    if not all(backend in one for one in backends):
        raise FailedError(f"the group must be of {backend}, but got {sorted(backends)}")
    wrong = sorted(rank for rank, facts in reports.items() if not facts.get("right"))
    if wrong:
        raise FailedError(
            f"a sum over {workers} processes must be right, but is not on rank {wrong}: look at the network and at "
            "NCCL_P2P_DISABLE"
        )
    machines, nodes = ({facts[name] for facts in reports.values()} for name in ("machine", "node"))
    rate = min(facts["bytes_per_second"] for facts in reports.values())
    size = REDUCED_BYTES[backend] // 2**20
    detail = (
        f"{workers} processes on {len(nodes)} node{'s' * (len(nodes) > 1)} of "
        f"{len(machines)} machine{'s' * (len(machines) > 1)}, sums right, {size} MiB at {rate / 1e9:.2f} GB/s"
    )
    claims = [backend, f"{backend} machines"] if len(machines) > 1 else [backend]
    return Passed(detail, dict.fromkeys(claims, detail), {f"{backend} machines": detail})


def check_sweep(cluster: Cluster) -> Passed:
    """Check that a sweep of four trials with one process each completes, on GPUs if there are any."""
    count = sum(cluster.gpus().values())
    share = (1.0 if count >= TRIALS else 0.25) if count else 0.0
    _enough_cpus(cluster, 1)
    outcome = _sweep(cluster, "sweep", TRIALS, epochs=2, gpus_per_worker=share)
    detail = validate_records(outcome, TRIALS, gpu=bool(count))
    claim = "sweep gpus" if count else "sweep"
    return Passed(detail, {claim: detail}, {"sweep gpus": cluster.no_gpus_reason(), "sweep": "the trials took GPUs"})


def check_wide(cluster: Cluster) -> Passed:
    """Check that a trial of several processes, which train one student together, completes."""
    gpu = sum(cluster.gpus().values()) >= cluster.workers
    _enough_cpus(cluster, cluster.workers)
    outcome = _sweep(cluster, "wide", 1, epochs=2, workers_per_trial=cluster.workers, gpus_per_worker=float(gpu))
    detail = validate_records(outcome, 1, gpu=gpu, processes=cluster.workers)
    fewer = f"needs {cluster.workers} GPUs: {cluster.no_gpus_reason()}"
    return Passed(detail, {"wide gpus" if gpu else "wide": detail}, {"wide gpus": fewer, "wide": "the trial took GPUs"})


def validate_records(outcome: Mapping[str, Any], trials: int, *, gpu: bool, processes: int = 1) -> str:
    """Return the devices, hosts and objectives of a sweep as text, after validating its records.

    Args:
        outcome: Result of `Runner.sweep`.
        trials: Number of trials that must be completed.
        gpu: Whether they must have run on GPUs.
        processes: Number of processes that each trial must have used.

    Raises:
        FailedError: A trial is missing or failed, or ran on another kind of device or number of processes.
    """
    records: Sequence[Mapping[str, Any]] = outcome["records"]
    bad = [record for record in records if record["status"] != "completed"]
    if outcome["code"] != 0 or bad or len(records) != trials:
        why = bad[0]["reason"] if bad else " ".join(outcome["printed"].split())[-300:]
        raise FailedError(f"{trials} trials must be completed, but {len(records) - len(bad)} are: {why}")
    devices = sorted({str(record["device"]) for record in records})
    for device in devices:
        if device.startswith("cpu") == gpu:
            raise FailedError(f"trials must run on {'GPUs' if gpu else 'CPUs'}, but one ran on {device}")
        if processes > 1 and not device.endswith(f" x {processes} processes"):
            raise FailedError(f"{processes} processes must take part in a trial, but it ran on {device}")
    hosts = ", ".join(sorted({str(record["host"]) for record in records}))
    values = sorted(float(record["objective_value"]) for record in records)
    objectives = f"{values[0]:.3g}" + (f"..{values[-1]:.3g}" if trials > 1 else "")
    return f"{trials} trial{'s' * (trials > 1)} completed on {', '.join(devices)} ({hosts}), objective {objectives}"


def check_faults(cluster: Cluster) -> Passed:
    """Check that a trial whose process is killed in mid-training is completed by another process."""
    count = sum(cluster.gpus().values())
    _enough_cpus(cluster, 1)
    values = _spec(cluster, "faults", 1, epochs=FAULT_EPOCHS, gpus_per_worker=1.0 if count else 0.0)
    task = cluster.start("sweep", values)
    victim, epoch = _wait_for_epoch(cluster, task, folder_of(values))
    host = cluster.node_name(victim["Address"]["NodeID"])
    cluster.call_or_fail("kill", victim["Pid"], only=[victim["Address"]["NodeID"]])
    message = f"a trial must go on after its process was killed (epoch {epoch}, {host}), but did not end in time"
    outcome = cluster.finish(task, message)
    validate_records(outcome, 1, gpu=bool(count))
    detail = (
        f"process {victim['Pid']} on {host} killed after epoch {epoch} of {FAULT_EPOCHS}, the trial completed on "
        f"{outcome['records'][0]['host']}"
    )
    return Passed(detail, {"faults": detail})


def _wait_for_epoch(cluster: Cluster, task: Any, folder: Path) -> tuple[dict[str, Any], int]:
    """Return the actor of the only trial and its epoch, once the trial has finished an epoch."""
    import ray

    while cluster.seconds_left() > POLL_SECONDS * 2:
        if ray.wait([task], timeout=POLL_SECONDS)[0]:
            cluster.finish(task, "")
            raise FailedError("the trial ended before its process could be killed, so nothing was tested")
        history = [one for path in (folder / "plans").glob("*.json") for one in read_json(path)["history"]]
        actors = trial_actors() if history else []
        if actors:
            return actors[0], int(history[-1][0])
    cluster.kill_runner()
    raise FailedError(f"the trial did not finish an epoch in time: {BUSY}, or the machine is slow (--timeout)")


def trial_actors() -> list[dict[str, Any]]:
    """Return the live actors of this job's trials.

    Ray's public API for this needs the dashboard, which a local Ray does not run.

    Raises:
        SkippedError: This version of Ray does not list actors.
    """
    import ray

    try:
        from ray._private.state import actors
    except ImportError:
        raise SkippedError(f"ray {ray.__version__} does not list the actors of a job") from None
    job = ray.get_runtime_context().get_job_id()
    mine = [actor for actor in actors().values() if actor["JobID"] == job and actor["State"] == "ALIVE"]
    return [actor for actor in mine if TRIAL_ACTOR in actor["ActorClassName"]]


def _sweep(cluster: Cluster, name: str, trials: int, *, epochs: int, **keys: Any) -> dict[str, Any]:
    task = cluster.start("sweep", _spec(cluster, name, trials, epochs=epochs, **keys))
    return cluster.finish(
        task,
        f"the sweep did not end in time: {BUSY}, the machine is slow (--timeout), or the workers cannot connect",
    )


def _spec(cluster: Cluster, name: str, trials: int, *, epochs: int, **keys: Any) -> dict[str, Any]:
    """Return the spec, as plain values, of a sweep of the bundled teacher that takes seconds."""
    return {
        "name": name,
        "output_dir": cluster.output_dir(name),
        "models": ["bundled:digits_resnet8"],
        "bits": ["W4A4"],
        "num_trials": trials,
        "sampler": "random",
        "scheduler": "none",
        "base": {
            "synthesis": {"num_images": 16 * GROUP_SIZE, "shard_size": 64, "iterations": 5},
            "quant": {"calib_images": 32},
            "finetune": {"epochs": epochs, "batch_size": GROUP_SIZE * keys.get("workers_per_trial", 1)},
            "evaluation": {"heldout_images": 16, "num_images": 64},
        },
        "space": {"finetune.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}},
        **keys,
    }


def folder_of(values: Mapping[str, Any]) -> Path:
    """Return the folder of a sweep on the driver's machine, from the spec as plain values."""
    output_dir = str(values["output_dir"])
    return local_copy(output_dir) if is_address(output_dir) else Path(output_dir)


def _gpus(cluster: Cluster) -> dict[str, int]:
    gpus = cluster.gpus()
    if not gpus:
        raise SkippedError(cluster.no_gpus_reason())
    return gpus


def _enough_cpus(cluster: Cluster, workers: int) -> None:
    cpus = sum(int(node["resources"].get("CPU", 0)) for node in cluster.nodes.values())
    if cpus < workers:
        raise SkippedError(f"needs {workers} CPUs, but the cluster has {cpus}")
