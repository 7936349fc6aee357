"""Addresses: valid ones, rejected ones, the folder of local copies; and which errors of a store are retried."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from synq.sweeps.storage import object_store as storage
from synq.sweeps.storage.object_store import Storage, cache_root, is_address, local_copy, open_storage


class Faulty:
    """A file system that raises an error a number of times before it works."""

    type_name = "s3"

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def delete_file(self, path: str) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error


SLOW_DOWN = OSError("When deleting 'b/x':\n AWS Error SLOW_DOWN during DeleteObject (HTTP status 503)")


def test_transient_errors_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.01))
    for error, times, calls in (
        (SLOW_DOWN, 2, 3),
        (TimeoutError("timed out"), 1, 2),
        (ConnectionResetError(104, "reset"), 1, 2),
    ):
        files = Faulty(error, times)
        Storage("s3://b/f", files, "b/f").delete("x")
        assert files.calls == calls
    for error, calls, number in (
        (SLOW_DOWN, 3, errno.EIO),
        (OSError("AWS Error ACCESS_DENIED"), 1, errno.EIO),
        (OSError("UNAVAILABLE: could not authenticate"), 1, errno.EIO),
        (OSError(errno.ENOSPC, "No space left"), 1, errno.ENOSPC),
        (KeyError("bug of a back end"), 1, errno.EIO),
    ):
        files = Faulty(error, 9)
        with pytest.raises(OSError, match=r"s3://b/f/x") as caught:
            Storage("s3://b/f?region=x", files, "b/f").delete("x")
        assert (files.calls, caught.value.errno) == (calls, number) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address, why",
    [
        ("nope://b/x", "nope"),
        ("s3:///x", "bucket"),
        ("s3://b/x?color=red", "color"),
        ("file:///x?region=a", "options"),
        ("file://b/x", "hostname"),
        ("runs/x", "an address"),
        ("s3://[b/x", "cannot be read"),
        ("s3://b/a/../c", "part . or .."),
        ("s3://b/./c?region=a", "part . or .."),
        ("memory://a/%2e%2e/c", "part . or .."),
        ("sftp://me:hidden@host/x", "password"),
    ],
)
def test_addresses_that_cannot_be_opened(address: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        open_storage(address)
    assert "\n" not in str(caught.value) and "hidden" not in str(caught.value)
    assert str(caught.value).startswith("`output_dir` must ")


def test_names_stay_below_the_folder() -> None:
    for name in ("../x", "a/../../x", "/x"):
        with pytest.raises(ValueError, match="below the folder"):
            open_storage("memory://b/f").put(b"", name)
    with pytest.raises(ValueError, match="none of"):  # fsspec would expand it, and move another file
        open_storage("memory://b/f").put(b"", "what?")


def test_the_cache_of_fsspec_is_invalidated(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    dropped: list[None] = []
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: dropped.append(None))
    store = open_storage("memory://listed")
    store.names("")
    store.exists("x")
    assert len(dropped) == 2


def test_the_folder_of_local_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [is_address(text) for text in ("s3://b", "file:///x", "a+b://c", "/x", "C:/x", "x://", "://x")] == [
        *(True, True, True, False, False, True, False)
    ]
    monkeypatch.delenv("SYNQ_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "synq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "synq"
    monkeypatch.setenv("SYNQ_CACHE_DIR", str(tmp_path / "own"))
    copies = [
        local_copy(text) for text in ("s3://b/x y?region=a", "s3://b/x y", "s3://c/x y", "s3://b/x%20y/", "s3://b")
    ]
    assert {copy.parent for copy in copies} == {tmp_path / "own" / "sweeps"}
    assert copies[1] == copies[3] and len(set(copies)) == 4
    assert [copy.name[:-12] for copy in copies] == ["x_y-"] * 4 + ["b-"] and "region" not in str(copies)


def test_nothing_heavy_is_imported(run_process: Callable[..., tuple[int, str, str]]) -> None:
    code = (
        "import sys, json, synq.sweeps.storage.object_store; "
        "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    loaded = set(json.loads(run_process([sys.executable, "-c", code])[1]))
    assert "filelock" in loaded and not loaded & {"torch", "ray", "optuna", "pyarrow", "fsspec", "numpy"}
