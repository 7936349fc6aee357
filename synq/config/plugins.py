"""What users add without a fork: by a decorator, an entry point, or a file. Standard library only.

    decorator     @synq.loss_term("margin", version="1")            known in this process (`registration.py`)
    entry point   [project.entry-points."synq.loss_terms"]          known wherever the package is installed
                  margin = "my_package.losses:margin"
    file          FILE.py:FUNCTION or MODULE:FUNCTION               known wherever the file is

A configuration names one as NAME@VERSION, or as NAME@VERSION:TEXT where the function gets a text (the name of a model,
the part of a data set). So its digest depends on the version: the decorator's argument, the version of the package, or
the start of the digest of the file. Code is loaded only where a setting names it.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from synq.config.nearest import nearest

DIGITS = 8
"""Hexadecimal digits of the digest of a file, as its version."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of what users add, and the setting that names it."""

    setting: str
    """Dotted key of the setting, or key of a sweep."""
    decorator: str
    """Public name of the decorator; the group of entry points is its plural."""
    built_in: tuple[str, ...] = ()
    """Names of SynQ's, which nothing that is added replaces."""
    has_text: bool = False
    """Whether the name may be followed by a text for the function, NAME:TEXT."""
    forms: tuple[str, ...] = ("FILE.py:FUNCTION", "MODULE:FUNCTION")
    """Ways to name code that is not registered."""

    @property
    def group(self) -> str:
        """Return the group of the entry points."""
        return f"{self.decorator}s"


LOSS_TERM = Kind("finetune.own_term", "synq.loss_term")
SYNTHESIS_METHOD = Kind(
    "synthesis.method", "synq.synthesis_method", ("inversion", "zeroq", "gdfq", "genie", "gaussian", "own_images")
)
TEACHER_SOURCE = Kind(
    "teacher.spec",
    "synq.teacher_source",
    ("bundled", "torchvision", "timm", "pytorchcv", "hf", "memory"),
    has_text=True,
    forms=("FILE.py:FACTORY", "MODULE:FACTORY"),
)
DATASET_SOURCE = Kind(
    "evaluation.dataset",
    "synq.dataset_source",
    ("digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder", "npz", "none", "memory"),
    has_text=True,
    forms=("FILE.py:FUNCTION",),
)
SAMPLER = Kind("sampler", "synq.sampler", ("tpe", "random", "gp", "cmaes", "nsga2", "auto", "grid", "points"))
KINDS = (LOSS_TERM, SYNTHESIS_METHOD, TEACHER_SOURCE, DATASET_SOURCE, SAMPLER)
"""All kinds, settings of a run first."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A function that was registered by a decorator."""

    function: Callable[..., Any]
    """The function."""
    version: str
    """Its version."""


REGISTERED: dict[tuple[str, str], Registered] = {}
"""What decorators registered in this process, by decorator and name."""


class Named(NamedTuple):
    """The parts of a setting that may name an addition."""

    name: str
    """Registered name, FILE.py:FUNCTION or MODULE:FUNCTION."""
    version: str = ""
    """Version; "" without one."""
    text: str | None = None
    """Text for the function; None without a colon."""

    def __str__(self) -> str:
        version = f"@{self.version}" if self.version else ""
        return f"{self.name}{version}{'' if self.text is None else f':{self.text}'}"


def parsed(kind: Kind, value: str) -> Named:
    """Return the parts of the value of a setting. The path of a file may have an @, too.

    Args:
        kind: The kind that the setting names.
        value: NAME, FILE.py:FUNCTION or MODULE:FUNCTION, with or without @VERSION; NAME@VERSION:TEXT where it has a
            text.
    """
    if kind.has_text and not is_file(value):
        head, colon, text = value.partition(":")
        name, _, version = head.partition("@")
        return Named(name, version, text if colon else None)
    target, colon, last = value.rpartition(":")
    name, _, version = last.partition("@")
    return Named(f"{target}{colon}{name}", version)


def is_file(value: str) -> bool:
    """Return whether a value has the form FILE.py:FUNCTION."""
    return value.rpartition(":")[0].endswith(".py")


def is_added(kind: Kind, value: str) -> bool:
    """Return whether a value names something that a user added, known here or not.

    What has a text is only taken for an addition where it has a version or its name is registered, because it may be a
    module.

    Args:
        kind: The kind that the setting names.
        value: The value.
    """
    name, version, _ = parsed(kind, value)
    if name in kind.built_in:
        return False
    if not kind.has_text:
        return True
    if is_file(value):
        return "FILE.py:FUNCTION" in kind.forms
    return name.isidentifier() and (bool(version) or name in known(kind))


def known(kind: Kind) -> list[str]:
    """Return the names that decorators and installed packages give, sorted."""
    return sorted({name for group, name in REGISTERED if group == kind.group} | installed(kind).keys())


def installed(kind: Kind) -> dict[str, str]:
    """Return the names that installed packages give, with the versions of the packages."""
    return {name: point.dist.version if point.dist is not None else "0" for name, point in _entry_points(kind).items()}


def registered(kind: Kind, name: str) -> Callable[..., Any] | None:
    """Return the function that a decorator or an entry point gave a name, or None. An entry point is imported by this.

    Args:
        kind: Its kind.
        name: The name, without a version.
    """
    if (kind.group, name) in REGISTERED:
        return REGISTERED[kind.group, name].function
    point = _entry_points(kind).get(name)
    return None if point is None else point.load()


def versioned(kind: Kind, value: str) -> str:
    """Return a value with the version of what it names; one with a version, and names of SynQ's, as they are.

    Args:
        kind: The kind that the setting names.
        value: The value.

    Raises:
        ValueError: The name is not registered.
        FileNotFoundError: The file does not exist.
    """
    named = parsed(kind, value)
    return value if named.version or not is_added(kind, value) else str(named._replace(version=_version(kind, named)))


def unversioned(kind: Kind, value: str) -> str:
    """Return a value without the version of what it names.

    Args:
        kind: The kind that the setting names.
        value: The value.
    """
    return str(parsed(kind, value)._replace(version="")) if is_added(kind, value) else value


def check_version(kind: Kind, value: str) -> None:
    """Check that what a configuration names is known here and has its version.

    Args:
        kind: The kind that the setting names.
        value: As `versioned` returns it.

    Raises:
        ValueError: It is not registered, or has another version.
        FileNotFoundError: The file does not exist.
    """
    if not is_added(kind, value):
        return
    named = parsed(kind, value)
    version = _version(kind, named)
    if version != named.version:
        raise ValueError(
            f"`{kind.setting}` must have the version of its settings, {named.version or 'none'}, but {named.name} has "
            f"version {version or 'none'} now: name it without a version for a new run"
        )


def check_elsewhere(kind: Kind, value: str) -> None:
    """Check that other processes can load what a value names: that it is of a file, a module or an entry point.

    Args:
        kind: The kind that the setting names.
        value: As `versioned` returns it.

    Raises:
        ValueError: Only a decorator in this process can know it.
    """
    name = parsed(kind, value).name
    if is_added(kind, value) and ":" not in name and name not in installed(kind):
        raise ValueError(
            f"`{kind.setting}` must be {', '.join(kind.forms)} or a name of an entry point of {kind.group}, which the "
            f"processes of the trials can load, but got {name!r}, which a decorator gives in one process"
        )


def check_known(kind: Kind, value: str) -> None:
    """Check the name of a value that has no version: one of SynQ's, or known here; files are not read.

    Args:
        kind: The kind that the setting names.
        value: The value.

    Raises:
        ValueError: The name is not known.
    """
    named = parsed(kind, value)
    if not named.version and ":" not in named.name and named.name not in (*kind.built_in, *known(kind)):
        raise unknown_name(kind, named.name)


def unknown_name(kind: Kind, name: str) -> ValueError:
    """Return the error for a name that is not known, with the nearest that is.

    Args:
        kind: The kind that the setting names.
        name: The name.
    """
    names = [*(name for name in kind.built_in if name != "memory"), *known(kind)]
    listed = f"one of {', '.join(names)}, " if names else ""
    return ValueError(
        f"`{kind.setting}` must be {listed}{', '.join(kind.forms)} or a name that {kind.decorator} or an entry point "
        f"of {kind.group} registers in this process, but got {name!r}{nearest(name, names)}"
    )


def settings_in(config: Any) -> Iterator[tuple[Kind, str]]:
    """Yield what the settings of a run add: the kind and the value. A loss term of weight 0 is not among them.

    Args:
        config: A `RunConfig`.
    """
    for kind in KINDS:
        part, _, key = kind.setting.partition(".")
        value = getattr(getattr(config, part), key) if key else None
        if value is None or (kind is LOSS_TERM and not config.finetune.own_weight):
            continue
        if is_added(kind, value):
            yield kind, value


def _version(kind: Kind, named: Named) -> str:
    """Return the version of what is named; "" for a function of a module, whose version is not known."""
    name = named.name
    if (kind.group, name) in REGISTERED:
        return REGISTERED[kind.group, name].version
    if ":" in name:
        path = Path(name.rpartition(":")[0]).expanduser()
        if path.suffix != ".py":
            return ""
        if not path.is_file():
            raise FileNotFoundError(f"`{kind.setting}` must name an existing Python file, but got {path}")
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]
    if name not in installed(kind):
        raise unknown_name(kind, name)
    return installed(kind)[name]


@functools.cache  # reading the metadata of all packages takes a while
def _entry_points(kind: Kind) -> dict[str, metadata.EntryPoint]:
    points = metadata.entry_points(group=kind.group)
    return {point.name: point for point in points if point.name not in kind.built_in}
