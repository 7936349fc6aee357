"""Code that a record or a packed file names: it runs only if the user named it, or if it is that of the user's own run.

The record of a run holds a mark of the code that made its teacher: an HMAC of the code under a key that only this user
has (`KEY_FILE`). Files of strangers can name code, and even bring it along, but cannot have the mark. The code is the
file with all files of its folder that it imports.
"""

import ast
import hashlib
import hmac
import importlib.util
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from synq.config.plugins import TEACHER_SOURCE, is_added

KEY_FILE = "synq/key"
"""File of the user's key in $XDG_STATE_HOME, which is ~/.local/state by default."""
_NAMED: ContextVar[frozenset[str] | None] = ContextVar("synq_named_code", default=frozenset())
"""Specs that the user has named; None means all."""


@contextmanager
def trusting(specs: bool | Iterable[str]) -> Iterator[None]:
    """Run code that records and packed files name, inside the ``with`` block, in this thread.

    Args:
        specs: Specs that the user has named; True for all, False for none.
    """
    before = _NAMED.get()
    given: frozenset[str] = frozenset() if isinstance(specs, bool) else frozenset(specs)
    token = _NAMED.set(None if specs is True or before is None else before | given)
    try:
        yield
    finally:
        _NAMED.reset(token)


def code_mark(spec: str) -> str:
    """Return the mark of the code of a spec for this user; "" for a model of a library, or where there is no key.

    Args:
        spec: As `teacher.spec`.
    """
    files, key = _code(spec), _user_key()
    if not files or key is None:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return hmac.new(key, digest.digest(), hashlib.sha256).hexdigest()


def check_trusted(spec: str, mark: object, source: str | Path) -> None:
    """Check that the code of a spec may run.

    Args:
        spec: The spec that a file names.
        mark: The mark in that file, if it has one.
        source: The file, for the message.

    Raises:
        ValueError: It may not: the user has not named it, and it is not the code of an own run.
    """
    named = _NAMED.get()
    if not runs_code(spec) or named is None or spec in named:
        return
    with suppress(OSError):
        own = code_mark(spec)
        if own and isinstance(mark, str) and hmac.compare_digest(own, mark):
            return
    raise ValueError(
        f"`{source}` names code, {spec}, which is not run: you have not named it, and it is not known as the code of a "
        "run of yours (it was changed since, or the run is of another user or an earlier version); "
        "`--teacher.spec` with it, or `--trust`, in Python `trust=True`, runs it"
    )


def runs_code(spec: str) -> bool:
    """Return whether a spec names a user's code, not a model of a library or of an installed source."""
    return spec.partition(":")[0] not in TEACHER_SOURCE.built_in and not is_added(TEACHER_SOURCE, spec)


def _code(spec: str) -> list[Path]:
    """Return the file of a spec and the files of its folder that it imports, sorted; [] if there is no such file."""
    if not runs_code(spec):
        return []
    target = spec.rpartition(":")[0]
    first = Path(target).expanduser() if target.endswith(".py") else _module_file(target)
    if first is None or not first.is_file():
        return []
    found, waiting = {first.resolve()}, [first.resolve()]
    while waiting:
        for file in _imported(waiting.pop()):
            if file not in found:
                found.add(file)
                waiting.append(file)
    return sorted(found)


def _module_file(name: str) -> Path | None:
    """Return the file of a module without importing anything; None if it is not found."""
    top, *rest = name.split(".")
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(top)
        if found is not None and not rest and found.origin:
            return Path(found.origin)
        for folder in (found.submodule_search_locations or ()) if found is not None else ():
            inner = Path(folder).joinpath(*rest)
            for file in (inner.with_suffix(".py"), inner / "__init__.py"):
                if file.is_file():
                    return file
    return None


def _imported(file: Path) -> Iterator[Path]:
    """Yield the files of a file's folder that it imports; of a package, all files."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # importing it fails, too
        return
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").partition(".")[0], *(alias.name for alias in node.names)}
    for name in sorted(names - {""}):
        if (module := file.parent / f"{name}.py").is_file():
            yield module.resolve()
        if (file.parent / name / "__init__.py").is_file():
            yield from (part.resolve() for part in sorted((file.parent / name).rglob("*.py")))


def _user_key() -> bytes | None:
    """Return this user's key, made on first use; None if it cannot be stored."""
    root = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(root).expanduser() / KEY_FILE
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".key.{os.getpid()}")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with suppress(FileExistsError):  # another process was first
                os.link(draft, path)
            draft.unlink()
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == 32 else None
