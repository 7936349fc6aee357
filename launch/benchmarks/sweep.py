"""Row e: trials per hour, one, two and four at a time on this machine or GPU, and what lies around a trial."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.benchmarks.launcher import ROOT, TIMEOUT
from launch.benchmarks.table import Context, Row
from launch.benchmarks.timing import Spread

CONCURRENT = (1, 2, 4)
TRIALS = 8
ACCOUNT = re.compile(
    r"(\d+) trials in ([\d.]+) s, (\d+) at a time: (\d+) % of the time in their own work, ([\d.]+) s a trial"
)


def spec(folder: Path, device: str) -> dict[str, object]:
    """Return a sweep of equal trials on the bundled teacher: one width, no pruning, no repetitions."""
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
    """Run the same sweep with more and more trials at a time; the synthetic sets are made before, once."""
    device = context.device.type
    with tempfile.TemporaryDirectory(prefix="synq-bench-") as name:
        folder = Path(name)
        file = folder / "bench.json"
        file.write_text(json.dumps(spec(folder, device)))
        _run(file, folder / "warm", 1, device, trials=2)
        first = 0.0
        for number in CONCURRENT:
            span, share, around = _run(file, folder / f"at-{number}", number, device, trials=TRIALS)
            rate = 3600 * TRIALS / span
            first = first or rate
            yield Row(
                group="sweep",
                what=f"{TRIALS} trials of the demo, {number} at a time: trials per hour",
                value=Spread.of([rate]),
                unit="/h",
                note=f"{rate / first:.2f} times one at a time; {share:.0f} % in their own work, {around:.2f} s a trial around it",
            )


def _run(file: Path, output: Path, concurrent: int, device: str, *, trials: int) -> tuple[float, float, float]:
    """Run the sweep; return (seconds from the first start to the last end, percent in own work, seconds around a trial).

    Raises:
        ValueError: It failed; the message holds the end of what it said.
    """
    part = (
        ["--gpus-per-worker", str(1 / concurrent)]
        if device == "cuda"
        else ["--cpus-per-worker", str(min(1, 2 / concurrent))]
    )
    words = [
        str(file),
        "--output-dir",
        str(output),
        "--max-concurrent",
        str(concurrent),
        "--num-trials",
        str(trials),
        *part,
    ]
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    found = ACCOUNT.search(done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        raise ValueError(
            f"the sweep of the benchmark must end well, but ended with {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return float(found[2]), float(found[4]), float(found[5])
