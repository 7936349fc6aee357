"""Small sets of labeled images as files, and a teacher that only has what they need."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from synq.teacher.teacher import Teacher


def npz(path: Path, *, num: int = 100, size: tuple[int, ...] = (8, 8)) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (num, *size), dtype=np.uint8)
    arrays = {"x": images, "y": np.arange(num) % 3}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def a_teacher(size: tuple[int, int, int], **fields: Any) -> Teacher:
    values = {"input_size": size, "mean": (0.0,) * size[0], "std": (1.0,) * size[0], "num_classes": 3}
    return SimpleNamespace(**{"preprocessing": None, "default_dataset": None, **values, **fields})  # type: ignore[return-value]


def image_folder(root: Path, num: int = 70) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [root / str(label) / f"{number:03}.png" for label in range(3) for number in range(num)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).save(file)
    return files
