"""Functions that users add without a fork: by a decorator, an entry point, or a file. Standard library only.

    decorator     @synq.loss_term("margin", version="1")            known in this process
    entry point   [project.entry-points."synq.loss_terms"]          known wherever the package is installed
                  margin = "my_package.losses:margin"
    file          FILE.py:FUNCTION or MODULE:FUNCTION               known wherever the file is

A configuration names one as NAME@VERSION, so that its digest depends on the version: the decorator's argument, the
version of the package, or the start of the digest of the file.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from synq.config.nearest import nearest

F = TypeVar("F", bound=Callable[..., Any])
LOSS_TERMS = "synq.loss_terms"
"""Group of the entry points of loss terms."""
DIGITS = 8
"""Hexadecimal digits of the digest of a file, as its version."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A function that was registered by a decorator."""

    function: Callable[..., Any]
    """The function."""
    version: str
    """Its version."""


_REGISTERED: dict[str, Registered] = {}


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
    if not name.isidentifier():
        raise ValueError(f"`name` must be letters, digits and underscores, but got {name!r}")
    if not version or "@" in version or ":" in version:
        raise ValueError(f"`version` must be a text without @ and colons, but got {version!r}")

    def register(function: F) -> F:
        _REGISTERED[name] = Registered(function, version)
        return function

    return register


def registered(name: str) -> Callable[..., Any] | None:
    """Return the function that a decorator or an entry point gave a name, or None.

    Args:
        name: The name, without a version.
    """
    if name in _REGISTERED:
        return _REGISTERED[name].function
    point = _entry_points().get(name)
    return None if point is None else point.load()


def versioned(text: str) -> str:
    """Return a loss term as NAME@VERSION; one with a version is returned as it is, also where it is not known.

    Args:
        text: NAME, FILE.py:FUNCTION or MODULE:FUNCTION, with or without @VERSION.

    Raises:
        ValueError: The name is not registered.
        FileNotFoundError: The file does not exist.
    """
    if split_version(text)[1]:
        return text
    version = _version(text)
    return f"{text}@{version}" if version else text


def split_version(text: str) -> tuple[str, str]:
    """Return the name and the version of NAME@VERSION; "" without a version. The path of a file may have an @, too.

    Args:
        text: NAME, FILE.py:FUNCTION or MODULE:FUNCTION, with or without @VERSION.
    """
    target, colon, last = text.rpartition(":")
    name, _, version = last.partition("@")
    return f"{target}{colon}{name}", version


def check_version(text: str) -> None:
    """Check that a loss term is known here and has the version of a configuration.

    Args:
        text: As `versioned` returns it.

    Raises:
        ValueError: It is not registered, or has another version.
        FileNotFoundError: The file does not exist.
    """
    name, wanted = split_version(text)
    version = _version(name)
    if version != wanted:
        raise ValueError(
            f"`finetune.own_term` must have the version of its settings, {wanted or 'none'}, but {name} has version "
            f"{version or 'none'} now: name it without a version for a new run"
        )


def check_elsewhere(text: str | None) -> None:
    """Check that other processes can load a loss term: that it is of a file, a module or an entry point.

    Args:
        text: As `versioned` returns it; None without a term.

    Raises:
        ValueError: Only a decorator in this process can know it.
    """
    name = "" if text is None else split_version(text)[0]
    if name and ":" not in name and name not in _entry_points():
        raise ValueError(
            f"`finetune.own_term` must be FILE.py:FUNCTION, MODULE:FUNCTION or a name of an entry point of {LOSS_TERMS}"
            f", which the processes of the trials can load, but got {name!r}, which a decorator gives in one process"
        )


def _version(name: str) -> str:
    """Return the version of a loss term; "" for one of a module, whose version is not known."""
    if name in _REGISTERED:
        return _REGISTERED[name].version
    if ":" in name:
        path = Path(name.rpartition(":")[0]).expanduser()
        if path.suffix != ".py":
            return ""
        if not path.is_file():
            raise FileNotFoundError(f"`finetune.own_term` must name an existing Python file, but got {path}")
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]
    points = _entry_points()
    if name not in points:
        known = sorted({*_REGISTERED, *points})
        listed = f"one of {', '.join(known)}, " if known else ""
        raise ValueError(
            f"`finetune.own_term` must be {listed}FILE.py:FUNCTION, MODULE:FUNCTION or a name that synq.loss_term or "
            f"an entry point of {LOSS_TERMS} registers in this process, but got {name!r}{nearest(name, known)}"
        )
    dist = points[name].dist
    return dist.version if dist is not None else "0"


@functools.cache  # reading the metadata of all packages takes a while
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=LOSS_TERMS)}
