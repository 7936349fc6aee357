"""Errors that nothing expected: one line, an exit code of their own, the traceback in a file that the line names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from synq.common.exit_codes import OWN_FAULT, RUN_FAILED, USER_ERROR, exit_code
from synq.common.faults import reading


def logged(line: str) -> str:
    (path,) = re.findall(r"(/\S+\.log)", line)
    text = Path(path).read_text()
    Path(path).unlink()
    return text


def failing(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("error", [KeyError("agreement"), RuntimeError("two\nlines"), AssertionError(), TypeError("x")])
def test_r8_a_fault_of_the_program_is_one_line_with_a_log(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_code(failing(error)) == OWN_FAULT == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("synq: error: ") and type(error).__name__ in line and "please report it" in line
    text = logged(line)
    assert "Traceback" in text and "in work" in text and "synq 0" in text


def test_codes_of_input_and_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    for error, code in (
        (ValueError("a"), USER_ERROR),
        (OSError("b"), USER_ERROR),
        (MemoryError("c"), RUN_FAILED),
        (OutOfMemoryError("CUDA\nd"), RUN_FAILED),
    ):
        assert exit_code(failing(error)) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert ".log" not in line


@pytest.mark.parametrize(
    ("error", "found"), [(KeyError("agreement"), "it has no 'agreement'"), (TypeError("x"), "raised TypeError: x")]
)
def test_r8_an_unexpected_error_of_a_reader_names_the_file(
    error: Exception, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"`some.json` must hold a set, but ") as caught, reading("some.json", "a set"):
        raise error
    assert found in str(caught.value) and "\n" not in str(caught.value) and "Traceback" in logged(str(caught.value))
    with pytest.raises(ValueError, match=r"^as it was$"), reading("some.json", "a set"):
        raise ValueError("as it was")
