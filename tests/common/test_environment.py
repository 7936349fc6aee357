"""The commit, versions and host that a run record holds."""

import subprocess
from pathlib import Path

import pytest

import synq
from synq.common.environment import environment
from synq.common.files import write_text_atomic


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_known_marked_dirty_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "synq" / "__init__.py"
    write_text_atomic(file, "1")
    monkeypatch.setattr(synq, "__file__", str(file))
    assert environment()["commit"] == "unknown"
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "x")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert len(environment()["commit"]) >= 12 and commit.startswith(environment()["commit"])
    file.write_text("2")
    assert environment()["commit"] == f"{commit[:12]}-dirty"
    monkeypatch.setenv("SYNQ_COMMIT", "abc")
    assert environment()["commit"] == "abc"


def test_the_environment_names_versions_and_host() -> None:
    facts = environment()
    assert set(facts) == {"commit", "versions", "host"}
    assert {"python", "torch", "accelerate"} <= set(facts["versions"]) and facts["host"]
