"""The environment of a run: commit of the code, package versions and host. Standard library only."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import synq

RECORDED_PACKAGES = ("synq", "torch", "torchvision", "accelerate", "ray", "optuna", "numpy")
"""Packages whose versions every run record holds."""


def environment() -> dict[str, Any]:
    """Return commit, versions and host, which a result depends on besides its settings.

    The commit is that of the checkout that holds the package, with the suffix -dirty where tracked files differ from
    it, or "unknown" (installed from a wheel, or sent to a cluster without its .git folder, unless the variable
    SYNQ_COMMIT holds it).
    """
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"commit": os.environ.get("SYNQ_COMMIT") or _commit(), "versions": versions, "host": platform.node()}


def _commit() -> str:
    root = Path(str(synq.__file__)).resolve().parent.parent
    if not (root / ".git").exists():  # not the commit of a project that has this package in its virtual environment
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"
