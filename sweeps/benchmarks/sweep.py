"""Trials per hour with one, two and four concurrent trials on this machine or GPU, and the overhead of a trial."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .launcher import WorkerError, finish, start
from .table import Context, Row
from .timing import Spread

CONCURRENT = (1, 2, 4)
TRIALS = 8
ACCOUNT = re.compile(r"(\d+) trials in ([\d.]+) s, (\d+) at a time: (\d+) % of the time in [^,]+, ([\d.]+) s a trial")
"""The line about the use of time that a sweep prints at its end."""


def spec(folder: Path, device: str) -> dict[str, object]:
    """Return the spec of a sweep of equal trials on the bundled teacher: one bit-width, no pruning, no repetitions."""
    return {
        "name": "bench",
        "models": ["bundled:digits_resnet8"],
        "bits": ["W4A4"],
        "num_trials": TRIALS,
        "seeds": [0],
        "sampler": "random",
        "scheduler": "none",
        "final_top_k": 1,
        "base": {
            "synthesis": {"num_images": 768, "shard_size": 128, "iterations": 20},
            "finetune": {"epochs": 12},
            "evaluation": {"heldout_images": 128},
            "runtime": {"store_dir": str(folder / "store"), "device": device},
        },
    }


def rows(context: Context) -> Iterator[Row]:
    """Run the same sweep with an increasing number of concurrent trials; the synthetic sets are made once, before."""
    device = context.device.type
    with tempfile.TemporaryDirectory(prefix="synq-bench-") as name:
        folder = Path(name)
        file = folder / "bench.json"
        file.write_text(json.dumps(spec(folder, device)))
        _run(file, folder / "warm", 1, device, trials=2)
        first = 0.0
        for number in CONCURRENT:
            span, share, around, real = _run(file, folder / f"at-{number}", number, device, trials=TRIALS)
            rate = 3600 * TRIALS / span
            first = first or rate
            yield Row(
                group="sweep",
                what=f"{TRIALS} trials of the demo, one thread each, {real} at a time ({number} asked for): "
                "trials per hour",
                value=Spread.of([rate]),
                unit="/h",
                note=f"{rate / first:.2f} times one at a time; {share:.0f} % in their own work, "
                f"{around:.2f} s a trial around it",
            )


def _run(file: Path, output: Path, concurrent: int, device: str, *, trials: int) -> tuple[float, float, float, int]:
    """Run the sweep in a separate process.

    Returns:
        Seconds from the first start to the last end, percent of the time in trials, seconds of overhead per trial, and
        the number of concurrent trials.

    Raises:
        WorkerError: It failed; the message has the end of its standard error.
    """
    cores = os.cpu_count() or 1
    part = ["--cpus-per-worker", str(min(1, cores / concurrent))]
    if device == "cuda":
        part += ["--gpus-per-worker", str(1 / concurrent)]
    args = [
        str(file),
        "--output-dir",
        str(output),
        "--max-concurrent",
        str(concurrent),
        "--num-trials",
        str(trials),
        *part,
    ]
    process = start([sys.executable, "-m", "synq.cli", "sweep", *args])
    out, err = finish(process)
    found = ACCOUNT.search(out + err)
    if found is None:
        raise WorkerError(
            f"the sweep of the benchmark must print how its time was used, but printed {err.strip()[-500:]}"
        )
    return float(found[2]), float(found[4]), float(found[5]), int(found[3])
