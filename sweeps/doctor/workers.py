"""Workloads that the checks of a cluster run on its nodes: sweeps, process groups, GPU arithmetic.

They measure; workload_checks.py evaluates the results. Ray and torch are imported where they are used.
"""

import io
import os
import platform
import tempfile
import time
from contextlib import redirect_stdout
from typing import Any

from synq.runs.record import read_record

from ..driver.cluster import prepare_environment
from .probes import machine_id

REDUCED_BYTES = {"gloo": 8 * 2**20, "nccl": 64 * 2**20}
"""Size of the tensor that a process group reduces, by backend."""
REPEATS = 5


class Runner:
    """An actor that runs sweeps and process groups, so that the check can kill it with everything it started."""

    def __init__(self) -> None:
        prepare_environment()  # before Ray Tune is imported, which reads the environment then

    def sweep(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run a sweep.

        Returns:
            code (the exit code of `run_sweep`), printed (its output), and records: status, reason, device, host,
            objective_value and top1 of each trial.

        Raises:
            ValueError, OSError: Raised by `run_sweep`.
        """
        from ..driver.tuner import run_sweep
        from ..spec_file import spec_from_dict

        spec, printed = spec_from_dict(values), io.StringIO()
        with redirect_stdout(printed):
            code = run_sweep(spec)
        records = [read_record(path) for path in sorted((spec.output_dir / "records").glob("*.json"))]
        names = ("status", "reason", "device", "host", "objective_value", "top1")
        rows = [{name: getattr(record, name) for name in names} for record in records]
        return {"code": code, "printed": printed.getvalue(), "records": rows}

    def group(self, collector: Any, workers: int, gpu: bool) -> None:
        """Start a process group whose workers reduce a tensor (`join_group`).

        Args:
            collector: The `ReportCollector` actor to which each worker reports its progress.
            workers: Number of processes.
            gpu: Whether each worker has a GPU; else each has a CPU.
        """
        import ray.train
        from ray.train.torch import TorchTrainer

        with tempfile.TemporaryDirectory(prefix="synq-check-") as folder:
            TorchTrainer(
                join_group,
                train_loop_config={"collector": collector, "gpu": gpu},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=workers,
                    use_gpu=gpu,
                    resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
                    placement_strategy="SPREAD",
                ),
                run_config=ray.train.RunConfig(name="check", storage_path=folder),
            ).fit()


class ReportCollector:
    """An actor that collects the reports of the workers of a process group."""

    def __init__(self) -> None:
        self.reports: dict[int, dict[str, Any]] = {}

    def update(self, rank: int, facts: dict[str, Any]) -> None:
        """Add entries to the report of a worker."""
        self.reports.setdefault(rank, {}).update(facts)

    def all(self) -> dict[int, dict[str, Any]]:
        """Return the report of each worker by rank."""
        return self.reports


def join_group(task: dict[str, Any]) -> None:
    """Reduce tensors with the other workers, through Accelerate as a trial does; Ray Train calls it in each worker.

    Args:
        task: collector (`ReportCollector`) and gpu.
    """
    import ray
    import ray.train
    import torch
    from torch import distributed

    from synq.config.run import RuntimeConfig
    from synq.runtime import make_accelerator

    rank = ray.train.get_context().get_world_rank()

    def report(**facts: Any) -> None:
        ray.get(task["collector"].update.remote(rank, facts))

    report(host=platform.node(), machine=machine_id(), node=ray.get_runtime_context().get_node_id())
    accelerator = make_accelerator(RuntimeConfig(device="cuda" if task["gpu"] else "cpu", num_threads=1))
    world, backend = accelerator.num_processes, str(distributed.get_backend())
    report(joined=True, world=world, backend=backend, device=str(accelerator.device))
    addend = torch.full((16,), float(rank + 1), device=accelerator.device)
    total = accelerator.reduce(addend, reduction="sum")
    right = bool((total == world * (world + 1) / 2).all())
    size = REDUCED_BYTES["nccl" if task["gpu"] else "gloo"]
    large = torch.ones(size // 4, device=accelerator.device)
    distributed.all_reduce(large)  # the first one also opens the connections, so it is not timed
    right = right and bool((large == world).all())
    large.zero_()
    _synchronize(accelerator.device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_reduce(large)
    _synchronize(accelerator.device)
    seconds = (time.perf_counter() - started) / REPEATS
    report(right=right, bytes_per_second=size / seconds)


class GpuSharer:
    """An actor that occupies a fraction of one GPU, as a trial does."""

    def compute(self) -> dict[str, Any]:
        """Multiply matrices on the GPU and return device, pid, and whether the product is right."""
        import torch

        ones = torch.ones(1024, 1024, device="cuda")
        right = float((ones @ ones)[0, 0]) == 1024.0
        return {"device": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid(), "right": right}


def gpu_facts(count: int) -> list[dict[str, Any]]:
    """Measure every GPU of a Ray task; see `measure_device`.

    Raises:
        OSError: torch does not see `count` GPUs.
    """
    import torch

    visible = torch.cuda.device_count()
    if visible != count:
        raise OSError(f"a task that has {count} GPUs must see them all, but torch sees {visible}")
    return [measure_device(f"cuda:{index}") for index in range(count)]


def measure_device(device: str, *, size: int = 1024, large: int = 8192) -> dict[str, Any]:
    """Measure the accuracy and speed of matrix products on a device.

    Args:
        device: Name of the device, as torch has it.
        size: Rows of the square matrices whose product is compared with float64 on the CPU.
        large: Rows of the square matrices whose product is timed.

    Returns:
        name, memory and free (bytes), and for fp32 and bf16: NAME_error, the largest absolute error over the largest
        absolute value, and NAME_tflops.
    """
    import torch

    facts: dict[str, Any] = {"name": device, "memory": 0, "free": 0}
    target = torch.device(device)
    if target.type == "cuda":
        free, memory = torch.cuda.mem_get_info(target)
        facts = {"name": torch.cuda.get_device_name(target), "memory": memory, "free": free}
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = left.to(dtype), right.to(dtype)
        exact = a.double() @ b.double()
        found = (a.to(target) @ b.to(target)).cpu().double()
        facts[f"{name}_error"] = float((found - exact).abs().max() / exact.abs().max())
        big = torch.randn(large, large, device=target, dtype=dtype)
        torch.mm(big, big)  # the first one also loads the kernels, so it is not timed
        _synchronize(target)
        started = time.perf_counter()
        for _ in range(REPEATS):
            torch.mm(big, big)
        _synchronize(target)
        facts[f"{name}_tflops"] = 2 * large**3 * REPEATS / (time.perf_counter() - started) / 1e12
    return facts


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
