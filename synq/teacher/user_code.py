"""Networks from a user's code: a function, class or instance in a file or an importable module."""

import copy
import difflib
import functools
import importlib
import importlib.util
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from synq.common.error_text import one_line
from synq.config.nearest import nearest
from synq.config.plugins import Kind, parsed, registered, unknown_name
from synq.config.spec_hints import hub_hint
from synq.teacher.process_state import process_state_kept
from synq.teacher.wrappers import check_layers, unwrapped

_HUBS = ("hub", "hf_hub", "hf-hub", "huggingface", "transformers")
_FAILURES = (Exception, SystemExit)
"""What a user's code may raise; SystemExit comes from a script that parses arguments, or from ``sys.exit``."""
_SIBLINGS: set[str] = set()
"""Names of the modules that the last user's file imported from its folder."""


def made_by_user(target: str, name: str, sources: Iterable[str]) -> nn.Module:
    """Return the network that a user's code makes, without wrappers such as ``nn.DataParallel``.

    What the code changes for the whole process (`process_state.py`) is put back.

    Args:
        target: Path of a Python file, or name of a module.
        name: A function or class that is called without arguments, or an instance, which is copied.
        sources: Names of other sources, for messages.

    Raises:
        ValueError: If the code fails, ends the process, or makes no network of layers with weights.
        FileNotFoundError: If the file does not exist.
    """
    spec = f"{target}:{name}"
    if "/" in name:
        raise ValueError(f"`teacher.spec` must name a known source, but got {spec}; {hub_hint(name)}")
    is_file = target.endswith(".py")
    with process_state_kept(target), _sibling_modules(target) if is_file else nullcontext():
        module = _load_file(target) if is_file else _import(target, name, sources)
        made = getattr(module, name, None)
        if not isinstance(made, nn.Module):
            made = _called(made, spec, target, module)
    if not isinstance(made, nn.Module):
        raise ValueError(f"the factory {spec} must return a torch.nn.Module, but got {type(made).__name__}")
    check_layers(made, spec)
    # An instance is a copy: a module is imported once, and loading weights must not change what it holds.
    return copy.deepcopy(unwrapped(made)) if made is getattr(module, name) else unwrapped(made)


def user_function(target: str, name: str, setting: str) -> Callable[..., Any]:
    """Return a function from a user's file or module; what the code changes for the whole process is put back.

    Args:
        target: Path of a Python file, or name of a module.
        name: Name of the function.
        setting: The setting that names it, for messages.

    Raises:
        ValueError: The code fails, ends the process, or has no such function.
        FileNotFoundError: The file does not exist.
    """
    is_file = target.endswith(".py")
    with process_state_kept(target), _sibling_modules(target) if is_file else nullcontext():
        module = _load_file(target, setting) if is_file else _import(target, name, (), setting)
        found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        near = nearest(name, names)
        raise ValueError(f"`{setting}` must name a function of {target}, but got {name!r}{near}")
    return found  # type: ignore[no-any-return]


def added_function(kind: Kind, value: str) -> Callable[..., Any]:
    """Return the function that a setting names: a registered one, or one of a file or module.

    Args:
        kind: The kind that the setting names.
        value: The value, as `synq.config.plugins.versioned` returns it; that of a file has its version, so that a
            changed file is read again.

    Raises:
        ValueError: There is no such function, or its code cannot be imported.
        FileNotFoundError: Its file does not exist.
    """
    name = parsed(kind, value).name
    if ":" in name:
        return _loaded(kind.setting, value)
    try:
        found = registered(kind, name)
    except _FAILURES as error:
        raise ValueError(
            f"`{kind.setting}` must name an entry point that can be imported, but {name} raised {one_line(error)}"
        ) from error
    if found is None:
        raise unknown_name(kind, name)
    if not callable(found):
        raise ValueError(f"`{kind.setting}` must name a function, but {name} is {type(found).__name__}")
    return found


def called(function: Callable[..., Any], argument: Any, rule: str, name: str, *, seed: int = 0) -> Any:
    """Return what a user's function makes of its argument; what it changes for the whole process is put back.

    Args:
        function: The function.
        argument: Its argument.
        rule: The requirement for what it returns, "`SETTING` must ...", for messages.
        name: Its name.
        seed: Seed of the global random generators of PyTorch, NumPy and Python inside the function, >= 0.

    Raises:
        ValueError: It raises anything, or ends the process.
        OutOfMemoryError: The memory of a GPU does not suffice.
    """
    try:
        with process_state_kept(name):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            return function(argument)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise ValueError(f"{rule}, but {name} raised {one_line(error)}") from error


@functools.lru_cache(maxsize=16)
def _loaded(setting: str, value: str) -> Callable[..., Any]:
    target, _, last = value.rpartition(":")
    return user_function(target, last.partition("@")[0], setting)


def slug(*parts: str) -> str:
    """Join parts into a lower-case name of letters, digits and underscores.

    ("timm", "resnet18.a1_in1k") gives "timm_resnet18_a1_in1k".
    """
    return re.sub(r"[^0-9A-Za-z]+", "_", "_".join(part for part in parts if part)).strip("_").lower()


def unknown(what: str, got: str, names: Iterable[str]) -> ValueError:
    """Return the error for a name that is not one of ``names``, with the nearest of them."""
    near = difflib.get_close_matches(got, list(names), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"`teacher` must name {what}, but got {got!r}{hint}")


def _called(factory: Any, spec: str, target: str, module: ModuleType) -> Any:
    if not callable(factory):
        names = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and (callable(value) or isinstance(value, nn.Module))
        ]
        raise unknown(f"a function of {target}", spec.rpartition(":")[2], names)
    try:
        return factory()
    except _FAILURES as error:
        raise ValueError(
            f"the factory {spec} must be callable without arguments and return a model, but raised {one_line(error)}"
        ) from error


def _load_file(target: str, setting: str = "teacher.spec") -> ModuleType:
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"`{setting}` must name an existing Python file, but got {path}")
    name = slug("synq_user", path.stem, f"{zlib.crc32(str(path).encode()):x}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module by name
    try:
        spec.loader.exec_module(module)
    except _FAILURES as error:
        raise ValueError(
            f"`{setting}` must name a Python file that can be imported, but {path} raised {one_line(error)}"
            f"{_script_hint(error)}"
        ) from error
    return module


@contextmanager
def _sibling_modules(target: str) -> Iterator[None]:
    """Let a user's file, and its factory, import the files in its folder, inside the ``with`` block.

    Those of an earlier file are forgotten first: files of the same name in another folder are other modules.
    """
    folder = Path(target).expanduser().resolve().parent
    for name in _SIBLINGS:
        sys.modules.pop(name, None)
    _SIBLINGS.clear()
    importlib.invalidate_caches()
    before = set(sys.modules)
    sys.path.append(str(folder))  # last, so that these files shadow no package
    try:
        yield
    finally:
        if str(folder) in sys.path:  # the file may have rearranged the list
            sys.path.remove(str(folder))
        if folder not in {Path(entry).resolve() for entry in sys.path}:  # otherwise they are everyone's
            _SIBLINGS.update(name for name in set(sys.modules) - before if _is_in(sys.modules[name], folder))


def _is_in(module: ModuleType, folder: Path) -> bool:
    """Return whether a module was found in ``folder``, and not in a folder of packages somewhere below it."""
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if not isinstance(place, str) or folder not in (path := Path(place).resolve()).parents:
        return False
    return path.relative_to(folder).parts[0].partition(".")[0] == module.__name__.partition(".")[0]


def _import(target: str, name: str, sources: Iterable[str], setting: str = "teacher.spec") -> ModuleType:
    try:
        return importlib.import_module(target)
    except ImportError as error:
        if not sources:
            raise ValueError(f"`{setting}` must name a module that can be imported, but {target!r}: {error}") from error
        near = difflib.get_close_matches(target, list(sources), n=1)
        if target.lower() in _HUBS:
            raise ValueError(
                f"`teacher.spec` must name a known source, but got {target}:{name}; {hub_hint(name)}"
            ) from error
        hint = f"; did you mean {near[0]}?" if near else f"; sources are {', '.join(sources)}, FILE.py and MODULE"
        raise ValueError(f"`teacher.spec` must name a known source, but {target!r}: {error}{hint}") from error
    except _FAILURES as error:
        raise ValueError(
            f"`{setting}` must name a module that can be imported, but {target!r} raised {one_line(error)}"
            f"{_script_hint(error)}"
        ) from error


def _script_hint(error: BaseException) -> str:
    if not isinstance(error, SystemExit):
        return ""
    return "; put what runs as a script under `if __name__ == '__main__':`"
