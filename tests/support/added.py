"""Functions that a user adds: a package with entry points, and what to forget between two tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from synq.config import plugins
from synq.teacher import user_code


@contextmanager
def nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without registered functions and known entry points, and forget those of the ``with`` block."""
    monkeypatch.setattr(plugins, "REGISTERED", {})
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()
    user_code._loaded.cache_clear()
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, function: str, code: str, *, version: str = "2.5"
) -> None:
    """Install a package `acme` with one entry point, acme, as pip would, in a folder on the path."""
    module = f"acme_{group.rpartition('.')[2]}"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nacme = {module}:{function}\n")
    monkeypatch.syspath_prepend(str(folder))
    plugins._entry_points.cache_clear()
