"""Synthetic images in the form in which the calibrators of other quantizers read them: an array and a short script."""

import io
from pathlib import Path

import numpy as np

from synq.common.files import write_bytes_atomic, write_text_atomic
from synq.synthesis.calibration_scripts import SCRIPTS
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.teacher import Teacher

TOOLS = tuple(SCRIPTS)
"""Quantizers for which images can be written."""
CHANNELS_LAST = ("litert",)
"""Those whose networks read (N, H, W, C)."""
IMAGES, SCRIPT = "images.npy", "calibrate.py"
"""Names of the files that are written."""


def write_calibration(folder: str | Path, tool: str, synthetic: SyntheticSet, teacher: Teacher) -> list[Path]:
    """Write a synthetic set for the calibrator of another quantizer.

    The array is float32, (N, C, H, W), or (N, H, W, C) for LiteRT, normalized as the network's input: it goes into a
    float network as it is. The script needs only NumPy and the quantizer, not SynQ.

    Args:
        folder: Output folder; files of the same names in it are replaced.
        tool: One of `TOOLS`.
        synthetic: The set.
        teacher: Its teacher.

    Returns:
        The files: `images.npy` and `calibrate.py`.

    Raises:
        ValueError: If there is no such tool.
        OSError: If a file cannot be written.
    """
    if tool not in TOOLS:
        raise ValueError(f"`for` must be one of {', '.join(TOOLS)}, but got {tool!r}")
    images = synthetic.images.float().numpy()
    if tool in CHANNELS_LAST:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    buffer = io.BytesIO()
    np.save(buffer, images)
    facts = {
        "COUNT": str(len(images)),
        "NAME": teacher.name,
        "SHAPE": str(tuple(images.shape)),
        "MEAN": ", ".join(f"{value:g}" for value in teacher.mean),
        "STD": ", ".join(f"{value:g}" for value in teacher.std),
    }
    script = SCRIPTS[tool]
    for name, value in facts.items():
        script = script.replace(f"${name}", value)
    paths = [Path(folder) / IMAGES, Path(folder) / SCRIPT]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(paths[0], buffer.getvalue())
    write_text_atomic(paths[1], script)
    return paths
