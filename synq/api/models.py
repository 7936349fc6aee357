"""From what a user calls a model to a teacher and its settings."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.teacher.input_format import input_format
from synq.teacher.memory import file_error, memory_teacher
from synq.teacher.sources import MEMORY
from synq.teacher.teacher import Teacher, load_teacher

Model = Any
"""A network (`torch.nn.Module`), an object with one as its `model`, or a spec as text."""


def teacher_arguments(
    *,
    weights: str | Path | None,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
) -> dict[str, Any]:
    """Return arguments of a call about its teacher, by dotted key; one number as mean or std is that of one channel."""
    numbers = {
        name: (value,) if isinstance(value, int | float) else value for name, value in (("mean", mean), ("std", std))
    }
    return {
        "teacher.weights": weights,
        "teacher.input_size": input_size,
        **{f"teacher.{name}": value for name, value in numbers.items()},
    }


def open_model(model: Model, config: RunConfig, preprocessing: object = None) -> tuple[RunConfig, Teacher]:
    """Return a run with the teacher that a model is, and the teacher.

    Args:
        model: A network in memory, a spec, or None for that of the settings.
        config: The run.
        preprocessing: As for `input_format`.

    Raises:
        ValueError: It is no network, or none that can be a teacher, or its input is unknown; see `load_teacher`.
        OSError: A file cannot be read.
    """
    if model is not None and not isinstance(model, str):
        if config.teacher.spec != RunConfig().teacher.spec and not config.teacher.spec.startswith(f"{MEMORY}:"):
            raise ValueError(
                f"`teacher.spec` must be left out where the model is an object, but got {config.teacher.spec!r}"
            )
        settings, teacher = memory_teacher(model, make_absolute(config).teacher, preprocessing)
        return replace(make_absolute(config), teacher=settings), teacher
    if model is not None:
        if ":" not in model and (reason := file_error(model)):
            raise ValueError(reason)
        config = with_overrides(config, {"teacher.spec": model})
    config, rule = make_absolute(config), None
    if preprocessing is not None:
        settings = config.teacher
        known = input_format(None, preprocessing, settings.input_size)
        found = {"input_size": known.input_size, "mean": known.mean, "std": known.std}
        missing = {key: value for key, value in found.items() if getattr(settings, key) is None and value is not None}
        config = with_overrides(config, {f"teacher.{key}": list(value) for key, value in missing.items()})
        rule = known.rule
    teacher = load_teacher(config.teacher)
    return config, teacher if rule is None else replace(teacher, preprocessing=rule)


def working_copy(teacher: Teacher) -> Teacher:
    """Return a teacher whose graph may be moved to a device and another dtype, as a run does."""
    return replace(teacher, graph=copy.deepcopy(teacher.graph))


def is_network(model: Model) -> bool:
    """Return whether a model is an object, whose run can only be opened with it."""
    return isinstance(model, nn.Module) or isinstance(getattr(model, "model", None), nn.Module)
