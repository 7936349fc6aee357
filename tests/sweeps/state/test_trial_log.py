"""Logs of trials: what is in them, their bound, and the process as it was before."""

import faulthandler
import logging
import sys
import threading
import warnings
from pathlib import Path

import pytest

from synq.sweeps.state.trial_log import TrialLog, last_host, log_name, logged


def warned(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=1)


def test_a_log_has_prints_warnings_loggers_and_the_error_and_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / log_name("net-W4A4-t000")
    assert path == tmp_path / "logs" / "net-W4A4-t000.log"
    handler = logging.StreamHandler(sys.stderr)  # as a library makes it when it is imported
    logger = logging.getLogger("test_trial_log")
    logger.addHandler(handler)
    before = (sys.stdout, sys.stderr, handler.stream, faulthandler.is_enabled())
    for start in range(2):
        with pytest.raises(RuntimeError, match="boom"), warnings.catch_warnings(), logged(path):
            warnings.simplefilter("default")  # once per line, of a process that runs many trials
            warnings.showwarning = lambda *said: sys.stderr.write(
                warnings.formatwarning(*said[:4])
            )  # as without pytest
            print(f"start {start}")
            print("10 %\r20 %\r30 %")
            warned("odd input")
            logger.warning("from a library \x1b[31mred")
            print("no line break", end="")
            raise RuntimeError("boom")
    logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr, handler.stream, faulthandler.is_enabled()) == before
    text = path.read_text()
    for part in ("start 0", "start 1", "\n30 %\n", "no line break\n", "in test_a_log_has", "RuntimeError: boom"):
        assert part in text, part
    for part in ("UserWarning: odd input", "from a library ?[31mred\n", "process"):
        assert text.count(part) == 2, part
    assert "10 %" not in text and last_host(path) and last_host(tmp_path / "none") == ""
    printed = capsys.readouterr()
    assert "start 1" in printed.out and "10 %\r20 %" in printed.out and "from a library" in printed.err


def test_a_log_is_bounded_and_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "t.log"
    with TrialLog(path, max_bytes=4000) as log:
        log.event("starts")
        threads = [
            threading.Thread(target=lambda n=n: [log.write(f"thread {n} line {i}\n") for i in range(500)])
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.write("x" * 9000 + "\n")
        assert path.stat().st_size <= 4000
        log.write("the last line\n")
    text = path.read_text()
    assert text.startswith("=== ") and "bytes left out" in text and text.endswith("the last line\n")
    assert [file.name for file in path.parent.iterdir()] == ["t.log"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path / "gone" / "logs" / "t.log") as log:  # an unmounted folder is not made anew
        print("goes on")
        log.event("completed")
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == "goes on\n"
