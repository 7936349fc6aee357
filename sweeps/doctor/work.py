"""Checks of what a cluster does: arithmetic of its GPUs, process groups, small sweeps of the bundled teacher, a killed worker."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synq.common.files import read_json

from ..storage.addresses import local_copy
from .probes import LOOK_SECONDS
from .site import FailedError, Passed, Site, SkippedError
from .workers import REDUCED_BYTES, Box, GpuSharer, gpu_facts

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest difference to the CPU over the largest value."""
SHARERS = 4
TRIALS = 4
GROUP_SIZE = 8
"""Images of one process in one step."""
FAULT_EPOCHS = 80
"""So many that there is time for a kill between the first and the last."""
TRIAL_ACTOR = "ImplicitFunc"
"""How Ray Tune names the actors of trials."""
BUSY = "the cluster has no free place (other jobs: ray status)"


def check_gpus(site: Site) -> Passed:
    """Every GPU multiplies as the CPU does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = _gpus(site)
    tasks: dict[str, Any] = {}
    for node, count in gpus.items():
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=site.logical_gpus(node), max_retries=0)(gpu_facts)
        tasks[node] = task.options(scheduling_strategy=place).remote(count)
    said = []
    try:
        for node, answer in tasks.items():
            for number, facts in enumerate(ray.get(answer, timeout=site.left())):
                said.append(judge_device(facts, f"{site.name(node)}, GPU {number}"))
    except ray.exceptions.GetTimeoutError:
        raise FailedError(f"no answer in time: {BUSY}, or a driver hangs (nvidia-smi, dmesg)") from None
    finally:
        for answer in tasks.values():
            ray.cancel(answer, force=True)
    return Passed("; ".join(said), {"gpus": f"{sum(gpus.values())} GPUs: {said[0]}"})


def judge_device(facts: Mapping[str, Any], where: str) -> str:
    """Return what was measured of a device, in words.

    Args:
        facts: As from `measure_device`.
        where: Which device it is.

    Raises:
        FailedError: It computes something else than the CPU.
    """
    for name, limit in TOLERANCE.items():
        error = facts[f"{name}_error"]
        if not error <= limit:  # NaN, too
            raise FailedError(
                f"{where} ({facts['name']}): a {name} product must be within {limit:g} of the CPU's, but got {error:.2g}: "
                "look at the driver, the CUDA build of torch (line `nodes`) and the device's ECC errors"
            )
    speed = ", ".join(f"{name} {facts[f'{name}_tflops']:.1f} TFLOP/s" for name in TOLERANCE)
    memory = f"{facts['free'] / 2**30:.1f} of {facts['memory'] / 2**30:.1f} GiB free"
    return f"{facts['name']} ({where}): {speed}, {memory}"


def check_packing(site: Site) -> Passed:
    """Four workers that ask for a quarter of a GPU each get the same one, at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = next(iter(_gpus(site)))
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    sharer = ray.remote(num_cpus=0, num_gpus=1 / SHARERS)(GpuSharer).options(scheduling_strategy=place)
    actors: list[Any] = [sharer.remote() for _ in range(SHARERS)]
    try:
        found = ray.get([actor.where.remote() for actor in actors], timeout=site.left())
        again = ray.get([actor.where.remote() for actor in actors], timeout=site.left())  # all of them are alive still
    except ray.exceptions.GetTimeoutError:
        raise FailedError(f"four workers of a quarter of a GPU must run at the same time, but do not: {BUSY}") from None
    finally:
        for actor in actors:
            ray.kill(actor)
    devices = sorted({one["device"] for one in found})
    pids = {one["pid"] for one in found}
    if len(devices) != 1 or not devices[0]:
        raise FailedError(
            f"four quarters must be of one device, but got CUDA_VISIBLE_DEVICES {devices} (do others use the GPUs?)"
        )
    if len(pids) != SHARERS or {one["pid"] for one in again} != pids or not all(one["right"] for one in found):
        raise FailedError(f"four processes must compute on device {devices[0]}, but got {found}")
    detail = f"{SHARERS} processes of 0.25 GPU on device {devices[0]} of {site.name(node)} at the same time"
    return Passed(detail, {"packing": detail})


def check_gloo(site: Site) -> Passed:
    """Processes on CPUs, on different nodes where there are several, add up a tensor."""
    _enough_cpus(site, site.workers)
    return _group(site, site.workers, gpu=False)


def check_nccl(site: Site) -> Passed:
    """Processes with a GPU each, on different nodes where there are several, add up a tensor."""
    count = sum(_gpus(site).values())
    if count < 2:
        raise SkippedError(f"needs 2 GPUs, but there is {count}")
    return _group(site, min(site.workers, count), gpu=True)


def _group(site: Site, workers: int, *, gpu: bool) -> Passed:
    import ray

    backend = "nccl" if gpu else "gloo"
    box: Any = ray.remote(num_cpus=0)(Box).remote()
    task = site.start("group", box, workers, gpu)
    try:
        site.finish(task, "late")
    except FailedError as error:
        said = ray.get(box.all.remote(), timeout=5)
        text = where_it_hangs(said, workers, backend) if str(error) == "late" else f"{error}; {_interface(backend)}"
        raise FailedError(text) from None
    said = ray.get(box.all.remote(), timeout=5)
    return judge_group(said, workers, backend)


def where_it_hangs(said: Mapping[int, Mapping[str, Any]], workers: int, backend: str) -> str:
    """Return how far the workers of a group came before their time was over, and the likely cause."""
    hosts = ", ".join(sorted({str(facts["host"]) for facts in said.values()}))
    joined = sum("joined" in facts for facts in said.values())
    if not said:
        return (
            f"no worker began: {BUSY}, or they cannot reach each other to form a group: a firewall between the machines must let all "
            f"ports through, {_interface(backend)}"
        )
    if joined < workers:
        return f"{joined} of {workers} workers joined the group ({hosts}): a firewall between the machines, or {_interface(backend)}"
    return f"all {workers} workers joined ({hosts}), but their data does not pass: {_interface(backend)}"


def _interface(backend: str) -> str:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    more = "; NCCL_DEBUG=INFO says more, NCCL_IB_DISABLE=1 leaves InfiniBand out" if backend == "nccl" else ""
    return f"or {name} must name the interface that connects the machines (ip addr){more}"


def judge_group(said: Mapping[int, Mapping[str, Any]], workers: int, backend: str) -> Passed:
    """Return what a group did.

    Raises:
        FailedError: It was smaller than asked for, of another kind, or added up wrongly.
    """
    worlds = {facts.get("world") for facts in said.values()}
    if set(said) != set(range(workers)) or worlds != {workers}:
        raise FailedError(
            f"{workers} processes must form one group, but got {len(said)} that see {sorted(map(str, worlds))}"
        )
    kinds = {facts["backend"] for facts in said.values()}
    if not all(backend in kind for kind in kinds):
        raise FailedError(f"the group must be of {backend}, but got {sorted(kinds)}")
    wrong = sorted(rank for rank, facts in said.items() if not facts.get("right"))
    if wrong:
        raise FailedError(
            f"a sum over {workers} processes must be right, but is not on rank {wrong}: look at the network and at NCCL_P2P_DISABLE"
        )
    machines, nodes = ({facts[name] for facts in said.values()} for name in ("machine", "node"))
    rate = min(facts["bytes_per_second"] for facts in said.values())
    size = REDUCED_BYTES[backend] // 2**20
    detail = (
        f"{workers} processes on {len(nodes)} node{'s' * (len(nodes) > 1)} of {len(machines)} machine{'s' * (len(machines) > 1)}, "
        f"sums right, {size} MiB at {rate / 1e9:.2f} GB/s"
    )
    claims = [backend, f"{backend} machines"] if len(machines) > 1 else [backend]
    return Passed(detail, dict.fromkeys(claims, detail), {f"{backend} machines": detail})


def check_sweep(site: Site) -> Passed:
    """A sweep of four trials, one process each, on GPUs where there are."""
    count = sum(site.gpus().values())
    share = (1.0 if count >= TRIALS else 0.25) if count else 0.0
    _enough_cpus(site, 1)
    answer = _sweep(site, "sweep", TRIALS, epochs=2, gpus_per_worker=share)
    detail = judge_records(answer, TRIALS, gpu=bool(count))
    claim = "sweep gpus" if count else "sweep"
    return Passed(detail, {claim: detail}, {"sweep gpus": site.no_gpus(), "sweep": "the trials took GPUs"})


def check_wide(site: Site) -> Passed:
    """A trial of several processes, which train one student together."""
    gpu = sum(site.gpus().values()) >= site.workers
    _enough_cpus(site, site.workers)
    answer = _sweep(site, "wide", 1, epochs=2, workers_per_trial=site.workers, gpus_per_worker=float(gpu))
    detail = judge_records(answer, 1, gpu=gpu, processes=site.workers)
    fewer = f"needs {site.workers} GPUs: {site.no_gpus()}"
    return Passed(detail, {"wide gpus" if gpu else "wide": detail}, {"wide gpus": fewer, "wide": "the trial took GPUs"})


def judge_records(answer: Mapping[str, Any], trials: int, *, gpu: bool, processes: int = 1) -> str:
    """Return what a sweep did, in words.

    Args:
        answer: As from `Runner.sweep`.
        trials: How many it must have.
        gpu: Whether they must have run on GPUs.
        processes: How many of each trial must have taken part.

    Raises:
        FailedError: One is missing or failed, or ran on something else.
    """
    records: Sequence[Mapping[str, Any]] = answer["records"]
    bad = [record for record in records if record["status"] != "completed"]
    if answer["code"] != 0 or bad or len(records) != trials:
        why = bad[0]["reason"] if bad else " ".join(answer["printed"].split())[-300:]
        raise FailedError(f"{trials} trials must be completed, but {len(records) - len(bad)} are: {why}")
    devices = sorted({str(record["device"]) for record in records})
    for device in devices:
        if device.startswith("cpu") == gpu:
            raise FailedError(f"trials must run on {'GPUs' if gpu else 'CPUs'}, but one ran on {device}")
        if processes > 1 and not device.endswith(f" x {processes} processes"):
            raise FailedError(f"{processes} processes must take part in a trial, but it ran on {device}")
    hosts = ", ".join(sorted({str(record["host"]) for record in records}))
    values = sorted(float(record["objective_value"]) for record in records)
    words = f"{values[0]:.3g}" + (f"..{values[-1]:.3g}" if trials > 1 else "")
    return f"{trials} trial{'s' * (trials > 1)} completed on {', '.join(devices)} ({hosts}), objective {words}"


def check_faults(site: Site) -> Passed:
    """A trial whose process is killed in the midst is completed by another one."""
    count = sum(site.gpus().values())
    _enough_cpus(site, 1)
    values = _spec(site, "faults", 1, epochs=FAULT_EPOCHS, gpus_per_worker=1.0 if count else 0.0)
    task = site.start("sweep", values)
    victim, epoch = _wait_for_epoch(site, task, folder_of(values))
    host = site.name(victim["Address"]["NodeID"])
    site.ask_all("kill", victim["Pid"], only=[victim["Address"]["NodeID"]])
    late = f"a trial must go on after its process was killed (epoch {epoch}, {host}), but did not end in time"
    answer = site.finish(task, late)
    judge_records(answer, 1, gpu=bool(count))
    detail = (
        f"process {victim['Pid']} on {host} killed after epoch {epoch} of {FAULT_EPOCHS}, the trial completed on "
        f"{answer['records'][0]['host']}"
    )
    return Passed(detail, {"faults": detail})


def _wait_for_epoch(site: Site, task: Any, folder: Path) -> tuple[dict[str, Any], int]:
    """Return the actor of the only trial once that has finished an epoch, and the epoch."""
    import ray

    while site.left() > LOOK_SECONDS * 2:
        if ray.wait([task], timeout=LOOK_SECONDS)[0]:
            site.finish(task, "")
            raise FailedError("the trial ended before its process could be killed, which says nothing")
        history = [one for path in (folder / "plans").glob("*.json") for one in read_json(path)["history"]]
        actors = trial_actors() if history else []
        if actors:
            return actors[0], int(history[-1][0])
    site.end_runner()
    raise FailedError(f"the trial did not finish an epoch in time: {BUSY}, or the machine is slow (--timeout)")


def trial_actors() -> list[dict[str, Any]]:
    """Return the living actors of this job's trials. Ray's public list needs its dashboard, which a local Ray has not.

    Raises:
        SkippedError: This version of Ray has no such list.
    """
    import ray

    try:
        from ray._private.state import actors
    except ImportError:
        raise SkippedError(f"ray {ray.__version__} does not say which processes are whose") from None
    job = ray.get_runtime_context().get_job_id()
    mine = [actor for actor in actors().values() if actor["JobID"] == job and actor["State"] == "ALIVE"]
    return [actor for actor in mine if TRIAL_ACTOR in actor["ActorClassName"]]


def _sweep(site: Site, name: str, trials: int, *, epochs: int, **keys: Any) -> dict[str, Any]:
    task = site.start("sweep", _spec(site, name, trials, epochs=epochs, **keys))
    return site.finish(
        task,
        f"the sweep did not end in time: {BUSY}, the machine is slow (--timeout), or the workers do not reach each other",
    )


def _spec(site: Site, name: str, trials: int, *, epochs: int, **keys: Any) -> dict[str, Any]:
    """A sweep of the bundled teacher that takes seconds, as plain values."""
    return {
        "name": name,
        "output_dir": site.place(name),
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
    """Return the folder, on the driver's machine, of a sweep as plain values."""
    place = str(values["output_dir"])
    return local_copy(place) if "://" in place else Path(place)


def _gpus(site: Site) -> dict[str, int]:
    gpus = site.gpus()
    if not gpus:
        raise SkippedError(site.no_gpus())
    return gpus


def _enough_cpus(site: Site, workers: int) -> None:
    path_overrides = sum(int(node["resources"].get("CPU", 0)) for node in site.nodes.values())
    if path_overrides < workers:
        raise SkippedError(f"needs {workers} CPUs, but the cluster has {path_overrides}")
