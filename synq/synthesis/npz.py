"""Synthetic sets as NPZ files, which other tools read."""

import io
from pathlib import Path

import numpy as np

from synq.common.files import write_bytes_atomic
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.teacher import Teacher


def write_npz(path: str | Path, synthetic: SyntheticSet, teacher: Teacher) -> None:
    """Write a synthetic set as an NPZ file for other tools, atomically.

    The arrays are `images` (N, C, H, W), float32, normalized as the network's input; `labels` (N,), int64; and `mean`
    and `std` of the normalization, each (C,), float32.

    Args:
        path: Output file.
        synthetic: The set.
        teacher: Its teacher.

    Raises:
        OSError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    mean, std = (np.asarray(values, np.float32) for values in (teacher.mean, teacher.std))
    np.savez(buffer, images=synthetic.images.float().numpy(), labels=synthetic.labels.numpy(), mean=mean, std=std)
    write_bytes_atomic(path, buffer.getvalue())
