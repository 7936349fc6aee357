"""Files are complete or absent, whatever goes wrong while they are written."""

import errno
import os
from pathlib import Path

import pytest

from synq.common import files
from synq.common.files import (
    check_paths,
    check_writable,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)


def test_a_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old")
    write_text_atomic(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü" and os.listdir(tmp_path) == ["x.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"old": True})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json_atomic(path, {"old": False})
    assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert read_json(path) == {"old": True} and os.listdir(tmp_path) == ["x.json"]


def test_an_interrupt_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bytes_atomic(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x\.json"):
        write_json_atomic(tmp_path / "file" / "x.json", {})


def test_paths_that_are_not_there_are_refused(tmp_path: Path) -> None:
    check_paths([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"`RUN` must exist, but got .*nothing"):
        check_paths([tmp_path, tmp_path / "nothing"], "RUN")


def test_a_folder_that_is_only_checked_is_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "run-1")
    assert not (tmp_path / "runs" / "run-1").exists()
    (tmp_path / "kept").mkdir()
    check_writable(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
