"""What the tests of sweeps share: a sweep of seconds on the bundled teacher, as keys and as a file, and a look at its tables."""

import csv
from pathlib import Path
from typing import Any

from sweeps.spec import SweepSpec, spec_from_dict

TINY: dict[str, Any] = {
    "bits": ["W8A8", "W3A3"],
    "base": {
        "synthesis": {"num_images": 32, "shard_size": 16, "iterations": 5},
        "quant": {"calib_images": 32},
        "finetune": {"epochs": 2, "batch_size": 16},
        "evaluation": {"heldout_images": 16, "num_images": 64},
    },
}
LR = {"finetune.lr": {"type": "choice", "values": [0.005, 1e-8, 1e20]}}


def tiny(folder: Path, **keys: Any) -> SweepSpec:
    return spec_from_dict({**TINY, "name": "tiny", "output_dir": str(folder), **keys})


def write_spec(path: Path, epochs: int) -> Path:
    """The tiny spec as a file."""
    lines = [
        'name = "tiny"',
        'bits = ["W8A8", "W3A3"]',
        "num_trials = 2",
        'scheduler = "none"',
        "[base.finetune]",
        f"epochs = {epochs}",
    ]
    lines += [
        "batch_size = 16",
        "[base.synthesis]",
        "num_images = 32",
        "shard_size = 16",
        "iterations = 5",
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
