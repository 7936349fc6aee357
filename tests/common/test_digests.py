"""Digests of files: written with them, checked when they are read, none demanded of files of earlier versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.sealed import flip, unsealed
from synq.common import digests
from synq.common.digests import (
    KEY,
    check_file,
    file_digest,
    read_sealed,
    read_sealed_json,
    report_unsealed,
    write_sealed,
    write_sealed_json,
)
from synq.common.files import DamagedFileError

VALUES: dict[str, Any] = {"name": "run ü", "top1": 90.25, "many": [1, 2.5, None, {"deep": [True, -0.0]}], "n": 10**30}


def test_values_come_back_and_the_digest_is_the_last_key(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed_json(path, VALUES)
    assert read_sealed_json(path) == (VALUES, True)
    assert list(json.loads(path.read_text()))[-1] == KEY


def test_another_layout_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed_json(path, VALUES)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_sealed_json(path) == (VALUES, True)


def test_each_flipped_bit_of_json_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed_json(path, VALUES)
    whole = path.read_bytes()
    found = 0
    for at in range(len(whole)):
        for bit in (0, 4, 7):
            path.write_bytes(whole)
            flip(path, at, bit)
            try:
                content, is_sealed = read_sealed_json(path)
            except DamagedFileError as error:
                assert str(path) in str(error) and error.path == path
                found += 1
            else:  # white space, an exponent's case, or the name of the digest, which makes it an unknown key
                assert content == VALUES or not is_sealed
    assert found > 2 * len(whole)


def test_each_flipped_bit_of_states_is_found_or_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_sealed(path, b"states" * 20)
    assert read_sealed(path) == (b"states" * 20, True)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole)
        flip(path, at)
        try:
            content, is_sealed = read_sealed(path)
        except DamagedFileError as error:
            assert str(path) in str(error)
        else:
            assert not is_sealed and content.startswith(b"states" * 20)


def test_files_of_earlier_versions_are_read_with_one_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    write_sealed_json(path, VALUES)
    assert read_sealed_json(unsealed(path)) == (VALUES, False)
    for name in ("a", "b"):
        report_unsealed(tmp_path / name)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "without a digest" in line
    (tmp_path / "short").write_bytes(b"x")
    assert read_sealed(tmp_path / "short") == (b"x", False)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    path.write_bytes(b"weights")
    first = file_digest(path)
    check_file(path, {"student": first})
    with monkeypatch.context() as patch:
        patch.setattr(digests, "open", None, raising=False)
        assert file_digest(path) == first
    flip(path, 3)
    with pytest.raises(DamagedFileError, match=r"student` must be as it was written.*: do this"):
        check_file(path, {"student": first}, "do this")
