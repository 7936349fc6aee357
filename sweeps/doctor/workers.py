"""What the check of a cluster lets its machines do: sweeps, process groups, work on GPUs. Nothing here judges.

Ray and torch are imported where they are used.
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
from .probes import machine

REDUCED_BYTES = {"gloo": 8 * 2**20, "nccl": 64 * 2**20}
"""What the workers of a process group add up."""
REPEATS = 5


class Runner:
    """Drives sweeps and process groups in a process beside the check's, which can end it with everything it has started."""

    def __init__(self) -> None:
        prepare_environment()  # Tune reads it when it is imported, which is later

    def sweep(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run a sweep.

        Returns:
            code (as of `run_sweep`), printed, and records: status, reason, device, host, objective_value and top1 of each.

        Raises:
            ValueError, OSError: As `run_sweep`.
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

    def group(self, box: Any, workers: int, gpu: bool) -> None:
        """Let some processes join a group and add up a tensor; each tells the box how far it came (`join_group`)."""
        import ray.train
        from ray.train.torch import TorchTrainer

        with tempfile.TemporaryDirectory(prefix="synq-check-") as folder:
            TorchTrainer(
                join_group,
                train_loop_config={"box": box, "gpu": gpu},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=workers,
                    use_gpu=gpu,
                    resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
                    placement_strategy="SPREAD",
                ),
                run_config=ray.train.RunConfig(name="check", storage_path=folder),
            ).fit()


class Box:
    """Keeps what the workers of a process group say."""

    def __init__(self) -> None:
        self.said: dict[int, dict[str, Any]] = {}

    def put(self, rank: int, facts: dict[str, Any]) -> None:
        """Add to what a worker has said."""
        self.said.setdefault(rank, {}).update(facts)

    def all(self) -> dict[int, dict[str, Any]]:
        """Return what each worker has said."""
        return self.said


def join_group(task: dict[str, Any]) -> None:
    """Add up tensors with the other workers, through Accelerate as a trial does. Ray Train calls it in each of them."""
    import ray
    import ray.train
    import torch
    from torch import distributed

    from synq.config.run import RuntimeConfig
    from synq.runtime import make_accelerator

    rank = ray.train.get_context().get_world_rank()

    def say(**facts: Any) -> None:
        ray.get(task["box"].put.remote(rank, facts))

    say(host=platform.node(), machine=machine(), node=ray.get_runtime_context().get_node_id())
    accelerator = make_accelerator(RuntimeConfig(device="cuda" if task["gpu"] else "cpu", num_threads=1))
    world, backend = accelerator.num_processes, str(distributed.get_backend())
    say(joined=True, world=world, backend=backend, device=str(accelerator.device))
    mine = torch.full((16,), float(rank + 1), device=accelerator.device)
    total = accelerator.reduce(mine, reduction="sum")
    right = bool((total == world * (world + 1) / 2).all())
    size = REDUCED_BYTES["nccl" if task["gpu"] else "gloo"]
    large = torch.ones(size // 4, device=accelerator.device)
    distributed.all_reduce(large)  # the first one also opens the connections
    right = right and bool((large == world).all())
    large.zero_()
    _wait_for(accelerator.device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_reduce(large)
    _wait_for(accelerator.device)
    seconds = (time.perf_counter() - started) / REPEATS
    say(right=right, bytes_per_second=size / seconds)


class GpuSharer:
    """Holds a part of one GPU, as a trial does."""

    def where(self) -> dict[str, Any]:
        """Work on the device and return which one it is."""
        import torch

        ones = torch.ones(1024, 1024, device="cuda")
        right = float((ones @ ones)[0, 0]) == 1024.0
        return {"device": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid(), "right": right}


def gpu_facts(count: int) -> list[dict[str, Any]]:
    """Measure the GPUs that a task was given; see `measure_device`."""
    import torch

    seen = torch.cuda.device_count()
    if seen != count:
        raise OSError(f"a task that has {count} GPUs must see them all, but torch sees {seen}")
    return [measure_device(f"cuda:{index}") for index in range(count)]


def measure_device(device: str, *, size: int = 1024, large: int = 8192) -> dict[str, Any]:
    """Multiply matrices on a device.

    Args:
        device: Name of the device, as torch has it.
        size: Rows of the matrices that are compared with the CPU's float64.
        large: Rows of those whose multiplication is timed.

    Returns:
        name, memory and free (bytes), and for fp32 and bf16: NAME_error, the largest difference over the largest value, and
        NAME_tflops.
    """
    import torch

    facts: dict[str, Any] = {"name": device, "memory": 0, "free": 0}
    place = torch.device(device)
    if place.type == "cuda":
        free, memory = torch.cuda.mem_get_info(place)
        facts = {"name": torch.cuda.get_device_name(place), "memory": memory, "free": free}
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = left.to(dtype), right.to(dtype)
        exact = a.double() @ b.double()
        found = (a.to(place) @ b.to(place)).cpu().double()
        facts[f"{name}_error"] = float((found - exact).abs().max() / exact.abs().max())
        big = torch.randn(large, large, device=place, dtype=dtype)
        torch.mm(big, big)  # the first one also loads the kernels
        _wait_for(place)
        started = time.perf_counter()
        for _ in range(REPEATS):
            torch.mm(big, big)
        _wait_for(place)
        facts[f"{name}_tflops"] = 2 * large**3 * REPEATS / (time.perf_counter() - started) / 1e12
    return facts


def _wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
