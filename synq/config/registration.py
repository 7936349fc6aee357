"""Decorators that register functions of a user in this process; see `plugins.py`. Standard library only."""

from collections.abc import Callable
from typing import Any, TypeVar

from synq.config import plugins
from synq.config.plugins import (
    DATASET_SOURCE,
    LOSS_TERM,
    SAMPLER,
    SYNTHESIS_METHOD,
    TEACHER_SOURCE,
    Kind,
    Registered,
)

F = TypeVar("F", bound=Callable[..., Any])


def loss_term(name: str, *, version: str) -> Callable[[F], F]:
    """Register a function as a loss term of fine-tuning, which `finetune.own_term` then names; a decorator.

    The function takes `synq.LossInputs` and returns the term of each image, (N,); the loss gets `finetune.own_weight`
    times their mean. Raise the version with every change of its values: it is part of the digest of a run. Trials of a
    sweep run in other processes, which know entry points and files only.

    Args:
        name: Letters, digits and underscores.
        version: Any text without @ and colons.

    Raises:
        ValueError: Name or version has another form.
    """
    return _registers(LOSS_TERM, name, version)


def synthesis_method(name: str, *, version: str) -> Callable[[F], F]:
    """Register a function as a way to make images, which `synthesis.method` then names; a decorator.

    The function takes `synq.SynthesisInputs` and returns the images of one shard, (N, C, H, W), or (images, labels).
    Version and processes: as for `loss_term`.

    Args:
        name: Letters, digits and underscores; none of SynQ's methods.
        version: Any text without @ and colons.

    Raises:
        ValueError: Name or version has another form.
    """
    return _registers(SYNTHESIS_METHOD, name, version)


def teacher_source(name: str, *, version: str) -> Callable[[F], F]:
    """Register a function as a source of teachers, which `teacher.spec` then names as NAME:MODEL; a decorator.

    The function takes MODEL, a text, and returns a network (`torch.nn.Module`) with its weights, or a
    `synq.SourceModel` with its input size and normalization, too. Version and processes: as for `loss_term`.

    Args:
        name: Letters, digits and underscores; none of SynQ's sources. It hides a module of that name.
        version: Any text without @ and colons.

    Raises:
        ValueError: Name or version has another form.
    """
    return _registers(TEACHER_SOURCE, name, version)


def dataset_source(name: str, *, version: str) -> Callable[[F], F]:
    """Register a function as a source of labeled images, which `evaluation.dataset` then names; a decorator.

    NAME:TEXT calls it with TEXT, NAME alone with "". It returns what `dataset` of `synq.quantize` takes: (images,
    labels), a `torch.utils.data.Dataset` or an iterable of (image, label). Version and processes: as for `loss_term`.

    Args:
        name: Letters, digits and underscores; none of SynQ's sets.
        version: Any text without @ and colons.

    Raises:
        ValueError: Name or version has another form.
    """
    return _registers(DATASET_SOURCE, name, version)


def sampler(name: str, *, version: str) -> Callable[[F], F]:
    """Register a function as a sampler, which `sampler` of a sweep then names; a decorator.

    The function takes `synq.SamplerInputs` and returns an `optuna.samplers.BaseSampler`. It is called in the process
    that starts the sweep, for every proposal, with another seed each. Raise the version with every change.

    Args:
        name: Letters, digits and underscores; none of SynQ's samplers.
        version: Any text without @ and colons.

    Raises:
        ValueError: Name or version has another form.
    """
    return _registers(SAMPLER, name, version)


def _registers(kind: Kind, name: str, version: str) -> Callable[[F], F]:
    if not name.isidentifier():
        raise ValueError(f"`name` must be letters, digits and underscores, but got {name!r}")
    if name in kind.built_in:
        raise ValueError(f"`name` must not be one of SynQ's ({', '.join(kind.built_in)}), but got {name!r}")
    if not version or "@" in version or ":" in version:
        raise ValueError(f"`version` must be a text without @ and colons, but got {version!r}")

    def register(function: F) -> F:
        plugins.REGISTERED[kind.group, name] = Registered(function, version)
        return function

    return register
