"""The parts of `.ci/gpu`, each run in a separate process: its last line is a line of JSON, its values.

Imports no Ray: a machine with PyTorch and the other packages of SynQ suffices.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
"""Exit code of a part that cannot run on this machine, as automake has it; its last line is the reason."""
FULL, QUICK = "full", "quick"


class SkippedError(Exception):
    """A part that this machine cannot run; the message is the reason."""


def tests(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Run the tests marked gpu."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        raise SkippedError("pytest is not installed") from None
    if device != "cuda":
        raise SkippedError("the tests marked gpu need a CUDA device")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/end_to_end/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with code {done.returncode}; see the log of this part")
    return {"result": done.stdout.strip().splitlines()[-1]}


def bench(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Run `synq bench`: its groups for one device, or the smallest of them."""
    from synq import cli

    groups = ["ceilings", "steps", "synthesis", "population"] if size == FULL else ["population"]
    rounds = "5" if size == FULL else "1"
    code = cli.run(
        ["bench", "--only", *groups, "--rounds", rounds, "--device", device, "--output-dir", str(folder / "bench")]
    )
    if code != 0:
        raise RuntimeError(f"synq bench ended with code {code}")
    rows = json.loads((folder / "bench" / "bench.json").read_text())["rows"]
    return {row["what"]: row["value"]["median"] for row in rows}


UNTRAINED = """
from synq.teacher.cifar_resnet import cifar_resnet


def resnet20():
    return cifar_resnet(20, 10)
"""


def resnet20(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Quantize a ResNet-20 at W4A4 on as many images as the paper has: of CIFAR-10 where its files are."""
    from synq.config.run import RunConfig, load_run, with_overrides
    from synq.pipeline import run

    data = os.environ.get("SYNQ_DATA_DIR")
    if size == QUICK:
        config, network = RunConfig(), "the bundled network"
    elif data:
        config, network = load_run(ROOT / "sweeps" / "specs" / "runs" / "cifar10_resnet20.toml"), "CIFAR-10, trained"
    else:
        file = folder / "untrained.py"
        file.write_text(UNTRAINED)
        teacher = {
            "teacher.spec": f"{file}:resnet20",
            "teacher.weights": "random",
            "teacher.input_size": (3, 32, 32),
            "teacher.mean": (0.5,),
            "teacher.std": (0.25,),
            "evaluation.dataset": "none",
        }
        config, network = with_overrides(RunConfig(), teacher), "random weights: times only (SYNQ_DATA_DIR is not set)"
    sizes = (5120, 1024, 1000, 64, 15) if size == FULL else (64, 32, 4, 16, 1)
    images, shard, iterations, batch, epochs = sizes
    record = run(
        with_overrides(
            config,
            {
                "synthesis.num_images": images,
                "synthesis.shard_size": shard,
                "synthesis.iterations": iterations,
                "finetune.batch_size": batch,
                "finetune.epochs": epochs,
                "runtime.device": device,
                "runtime.output_dir": str(folder / "runs"),
                "runtime.progress": False,
            },
        )
    )
    return {
        "network": network,
        "images x iterations, epochs": f"{images} x {iterations}, {epochs}",
        **{name: getattr(record, name) for name in ("status", "teacher_top1", "rtn_top1", "top1", "objective_value")},
        **{f"seconds of {name}": round(value, 2) for name, value in record.seconds.items()},
    }


def collective(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Reduce a tensor in a process group of one: NCCL on a GPU, gloo on a CPU."""
    import torch
    from torch import distributed

    backend = "nccl" if device == "cuda" else "gloo"
    store = distributed.FileStore(str(folder / f"store-{os.getpid()}"), 1)
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        values = torch.arange(2.0**20 if size == FULL else 2.0**10, device=device)
        wanted = values.clone()
        distributed.all_reduce(values)
        if not torch.equal(values, wanted):
            raise RuntimeError(f"{backend} must sum over one process to the same values, but did not")
    finally:
        distributed.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    return {"backend": f"{backend} {version}".strip(), "processes": 1, "values": values.numel()}


def memory_fraction(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Limit a process to a quarter of the GPU, as a sweep with 0.25 GPUs does: an eighth fits, a half is rejected."""
    import torch

    if device != "cuda":
        raise SkippedError("a part of a GPU's memory needs a CUDA device")
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.25)
    torch.empty(total // 8, dtype=torch.uint8, device=device)
    try:
        torch.empty(total // 2, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return {"total GiB": round(total / 2**30, 1), "an eighth": "fits", "a half": "rejected"}
    raise RuntimeError("half of the GPU's memory must be rejected under a fraction of 0.25, but was given")


TRAIN = """
import json, sys, time
from synq.config.run import RunConfig, with_overrides
from synq.pipeline import run
values, seed = json.loads(sys.argv[1]), int(sys.argv[2])
run(with_overrides(RunConfig(), {**values, "name": f"warm_up{seed}", "seed": seed + 1000, "finetune.epochs": 1}))
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
record = run(with_overrides(RunConfig(), {**values, "name": f"student{seed}", "seed": seed}))
assert not record.student_of, "a student of other seeds must be trained, not taken over"
print(time.perf_counter() - started, flush=True)
"""


def students(device: str, size: str, folder: Path) -> dict[str, Any]:
    """Train one student alone, then several at once in separate processes, on one device."""
    count, epochs = (4, 30) if size == FULL else (2, 1)
    values: dict[str, Any] = {
        "synthesis.num_images": 512 if size == FULL else 32,
        "synthesis.shard_size": 128 if size == FULL else 16,
        "synthesis.iterations": 20 if size == FULL else 2,
        "finetune.batch_size": 16,
        "finetune.epochs": epochs,
        "evaluation.heldout_images": 16,
        "evaluation.dataset": "none",
        "runtime.device": device,
        "runtime.num_threads": 1,
        "runtime.output_dir": str(folder / "students"),
        "runtime.progress": False,
    }
    (single,) = _together(values, [0])
    several = _together(values, range(1, count + 1))
    slowest = max(several)
    return {
        "students": count,
        "seconds alone": round(single, 2),
        "seconds of the slowest of them together": round(slowest, 2),
        "gain over one after another": round(count * single / slowest, 2),
    }


def _together(values: dict[str, Any], seeds: Iterable[int]) -> list[float]:
    """Return the seconds of a run of each seed; all begin when all are ready."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(values), str(seed)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            while (line := process.stdout.readline()) not in ("ready\n", ""):
                continue
            if not line:
                raise RuntimeError(f"a student's process ended with code {process.wait()}")
        printed = [process.communicate()[0].split() for process in _all_started(processes)]
        if codes := [process.returncode for process in processes if process.returncode != 0]:
            raise RuntimeError(f"a student's process ended with code {codes[0]}")
        return [float(fields[-1]) for fields in printed]
    finally:
        for process in processes:
            process.kill()


def _all_started(processes: "list[subprocess.Popen[str]]") -> "list[subprocess.Popen[str]]":
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


PARTS: dict[str, tuple[Callable[[str, str, Path], dict[str, Any]], int]] = {
    "collective": (collective, 60),
    "memory_fraction": (memory_fraction, 60),
    "tests": (tests, 150),
    "resnet20": (resnet20, 240),
    "students": (students, 120),
    "bench": (bench, 150),
}
"""Function and time limit in seconds of each part, the most telling first."""


def main() -> int:
    """Run the part that the arguments name, and return its exit code: 0, 1 failed, `SKIPPED`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("size", choices=(FULL, QUICK))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    started = time.perf_counter()
    try:
        values = PARTS[given.part][0](given.device, given.size, given.folder)
    except SkippedError as reason:
        print(reason, flush=True)
        return SKIPPED
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    print(json.dumps({**values, "seconds without imports": round(time.perf_counter() - started, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))  # a checkout that is not installed
    sys.exit(main())
