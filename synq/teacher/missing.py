"""Missing facts about a model: weights, input size, normalization, all in one message."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.common.text_tables import enumeration
from synq.config.run import TeacherConfig
from synq.teacher.sources import MEMORY, RANDOM, SourceModel

InputFormat = tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]
SIZES = (32, 224, 28, 64, 96, 299)
"""Sizes of square images, in pixels, that are tried for a guess."""
MANY_CLASSES = 500
"""Number of classes from which on images of 224 pixels are likelier than those of 32."""


def check_given(config: TeacherConfig, source: SourceModel) -> InputFormat:
    """Return input size, mean and std: configured values first, then those of the source.

    Means of 0 and variances of 1 in every BatchNorm mean that no weights were loaded.

    Raises:
        ValueError: Something is neither configured nor known. The message names all of it, with what the model lets
            one guess.
    """
    input_size = config.input_size or source.input_size
    mean, std = config.mean or source.mean, config.std or source.std
    untrained = config.weights != RANDOM and not _is_trained(source.module)
    missing = [
        *(["`teacher.weights`"] if untrained else []),
        *(["`teacher.input_size`"] if input_size is None else []),
        *(["`teacher.mean`"] if mean is None else []),
        *(["`teacher.std`"] if std is None else []),
    ]
    if missing == ["`teacher.weights`"]:
        if _in_memory(config):
            cure = "load its weights into it first (load_state_dict)"
        elif config.weights:
            cure = f"{config.weights} must contain trained weights"
        else:
            cure = "give its weight file as `teacher.weights`"
        raise ValueError(
            f"teacher must be trained, but the BatchNorm statistics of {source.name} have their initial values; "
            f"{cure}, or set `--teacher.weights {RANDOM}` to use untrained weights on purpose"
        )
    if missing:
        raise ValueError(_message(config, source, missing))
    assert input_size is not None and mean is not None and std is not None
    mean, std = (values * input_size[0] if len(values) == 1 else values for values in (mean, std))
    for field, values in (("mean", mean), ("std", std)):
        if len(values) != input_size[0]:
            raise ValueError(f"`teacher.{field}` must have {input_size[0]} values, one per channel, but got {values}")
    if min(std) <= 0:
        raise ValueError(f"`teacher.std` must be > 0, but got {std}")
    return input_size, mean, std


def _in_memory(config: TeacherConfig) -> bool:
    """Return whether the model is an object of the caller, which no weight file is loaded into."""
    return config.spec.startswith(f"{MEMORY}:")


def _is_trained(module: nn.Module) -> bool:
    """Return whether BatchNorm statistics show training; a network without any counts as trained."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(part.running_mean, part.running_var) for part in norms]
    known = [(mean, var) for mean, var in kept if mean is not None and var is not None]
    return not known or any(bool((mean != 0).any()) or bool((var != 1).any()) for mean, var in known)


def _message(config: TeacherConfig, source: SourceModel, missing: list[str]) -> str:
    """Return one message about everything that is missing."""
    parts = [f"{enumeration(missing)} must be given: {config.spec} does not define {'them' if missing[1:] else 'it'}"]
    if "`teacher.weights`" in missing:
        if _in_memory(config):
            given = "load trained ones into it first (load_state_dict), or give `random` to use these on purpose"
        else:
            given = f"{config.weights} holds none" if config.weights else "a file, or `random` to use them on purpose"
        parts.append(f"weights: all BatchNorm statistics have their initial values ({given})")
    known = config.input_size or source.input_size
    channels = known[0] if known else _channels(source.module)
    if "`teacher.input_size`" in missing:
        size = _guessed_size(source)
        guess = "" if size is None else f", perhaps {','.join(map(str, size))}, which the network accepts"
        parts.append(f"input size: C,H,W{guess}")
    if "`teacher.mean`" in missing or "`teacher.std`" in missing:
        rgb = " (ImageNet's are 0.485,0.456,0.406 and 0.229,0.224,0.225)" if channels == 3 else ""
        parts.append(
            f"mean and std: per channel, for images in [0, 1], as in its training{rgb}; they are not guessed, since "
            "wrong values would silently cost accuracy"
        )
    return "; ".join(parts)


def _guessed_size(source: SourceModel) -> tuple[int, int, int] | None:
    """Return an input size that the model accepts; None if none of `SIZES` is."""
    channels = _channels(source.module)
    accepted = list(_accepted(source.module, channels))
    classes = source.num_classes or next(
        (part.out_features for part in reversed(list(source.module.modules())) if isinstance(part, nn.Linear)), 0
    )
    if classes >= MANY_CLASSES and 224 in accepted:
        accepted = [224]
    return (channels, accepted[0], accepted[0]) if accepted else None


def _channels(module: nn.Module) -> int:
    """Return the number of input channels of the first convolution; 0 without one."""
    return next((part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d)), 0)


def _accepted(module: nn.Module, channels: int) -> Iterator[int]:
    for size in SIZES:
        try:
            with torch.no_grad():
                module(torch.zeros(2, channels, size, size))
        except Exception:  # the model's code may raise anything; then it does not accept this size
            continue
        yield size
