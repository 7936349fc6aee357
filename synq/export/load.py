"""Load a student from a packed file. Does not require ONNX."""

from dataclasses import replace
from pathlib import Path

from torch import fx

from synq.config.run import RunConfig, config_from_dict
from synq.export.packed import load_packed, read_packed
from synq.quant.student import build_student
from synq.teacher.sources import RANDOM
from synq.teacher.teacher import load_teacher
from synq.teacher.trust import check_trusted


def load_student(path: str | Path, spec: str | None = None) -> fx.GraphModule:
    """Return the network of a packed file: images, normalized as for the teacher, -> logits. No other weights are read.

    Args:
        path: A file `model.safetensors` of an export.
        spec: Source of the teacher's architecture; None: the spec in the file.

    Returns:
        (N, C, H, W) -> logits (N, K), on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: As `read_packed`; ValueError also if the architecture cannot be built or differs,
            or is made by code that may not run (`synq.teacher.trust`): give it as ``spec``.
    """
    _, facts = read_packed(path)
    about = facts["about"]
    if "config" not in about:
        raise ValueError(f"a packed student must name its teacher, but {path} does not")
    for name in ("input_size", "num_classes"):
        if name not in about:
            raise ValueError(f"`{path}` must hold a packed student, but its `about` has no {name}")
    config = config_from_dict(RunConfig, about["config"], source=str(path))
    if spec is None:
        check_trusted(config.teacher.spec, about.get("code"), path)
    architecture = replace(
        config.teacher,
        spec=spec or config.teacher.spec,
        weights=RANDOM,
        input_size=tuple(about["input_size"]),
        num_classes=about["num_classes"],
    )
    return load_packed(path, build_student(load_teacher(architecture), config.quant).net)
