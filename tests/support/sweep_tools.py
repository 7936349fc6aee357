"""What the tests of sweeps share: a sweep of seconds on the bundled teacher, as keys and as a file, and a look at
its tables.
"""

import contextlib
import csv
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from synq.sweeps.spec import SweepSpec
from synq.sweeps.spec_file import spec_from_dict

TINY: dict[str, Any] = {
    "bits": ["W8A8", "W3A3"],
    "report": False,  # a page takes seconds; one test makes it
    "base": {
        "synthesis": {"num_images": 32, "shard_size": 16, "iterations": 5, "start": "white"},
        "quant": {"calib_images": 32},
        "finetune": {"epochs": 2, "batch_size": 16},
        "evaluation": {"heldout_images": 16, "num_images": 64},
    },
}
LR = {"finetune.lr": {"type": "choice", "values": [0.005, 1e-8, 1e20]}}


@contextlib.contextmanager
def ray_head() -> Iterator[str]:
    """A Ray of two cores without a dashboard, for the jobs of several drivers; its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 2**27, "include_dashboard": False},
    )
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def tiny(folder: Path, **keys: Any) -> SweepSpec:
    return spec_from_dict({**TINY, "name": "tiny", "output_dir": str(folder), **keys})


def write_spec(path: Path, epochs: int) -> Path:
    """The tiny spec as a file."""
    lines = [
        'name = "tiny"',
        'bits = ["W8A8", "W3A3"]',
        "num_trials = 2",
        'scheduler = "none"',
        "report = false",
        "[base.finetune]",
        f"epochs = {epochs}",
    ]
    lines += [
        "batch_size = 16",
        "[base.synthesis]",
        "num_images = 32",
        "shard_size = 16",
        "iterations = 5",
        'start = "white"',
        "[base.quant]",
    ]
    lines += [
        "calib_images = 32",
        "[base.evaluation]",
        "heldout_images = 16",
        "num_images = 64",
        '[space."finetune.lr"]',
    ]
    path.write_text("\n".join([*lines, 'type = "float"', "low = 1e-4", "high = 1e-2", "log = true", ""]))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Start = Callable[..., subprocess.Popen[str]]


def until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def finish(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """Wait for a driver that must end well; returns what it printed."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def listed(folder: Path, *, epochs: int = 16, head: str = "") -> Path:
    """A sweep over four listed points, none of them stopped early, as a file."""
    points = "".join(f'[[points]]\n"finetune.lr" = {lr}\n' for lr in (0.001, 0.003, 0.01, 0.02))
    text = write_spec(folder / "base.toml", epochs=epochs).read_text()
    text = (
        text[: text.index("[space")]
        .replace('bits = ["W8A8", "W3A3"]', 'bits = ["W3A3"]')
        .replace("num_trials = 2\n", head)
    )
    path = folder / "listed.toml"
    path.write_text(f'sampler = "points"\n{text}{points}')
    return path


def board(folder: Path) -> list[dict[str, str]]:
    """The leaderboard without what time and place put into it."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "device", "versions", "commit")}
        for row in rows(folder / "leaderboard.csv")
    ]


def whole(folder: Path, *, killed: bool = False) -> None:
    """Every file of a sweep reads: nothing half written has a name of its own, and only a killed writer leaves a
    temporary one.
    """
    for path in [
        *folder.glob("*.json"),
        *folder.glob("plans/*"),
        *folder.glob("records/*"),
        *folder.glob("runs/*/*.json"),
    ]:
        assert isinstance(json.loads(path.read_text()), dict), path
    for path in folder.glob("*.csv"):
        assert rows(path), path
    assert killed or not list(folder.rglob("*.tmp"))
