"""Progress of long work: a bar on a terminal, after a delay; lines at intervals in a log."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.common import progress as bars
from synq.common.progress import note, passing_bar, visible
from synq.config.run import RunConfig, config_to_dict, with_overrides
from synq.evaluation.measure import evaluate
from synq.pipeline import run
from synq.runs.record import run_folder
from synq.sweeps.studies.pool import run_all

SCRIPT = """
import sys, time, json
from pathlib import Path
from synq.common import progress as bars
bars.APPEARS_AFTER = float(sys.argv[2])
from synq.commands.export import main
from synq.sweeps.studies.pool import run_all
from synq.config.run import RunConfig, config_from_dict
from synq.runs.record import run_folder
config = config_from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
run_all({"only": config}, 1, lambda cell, record: print("done", cell, flush=True))
arguments = ["--formats", "packed", "--agreement", "0", "--mean-difference", "9"]
assert main([str(run_folder(config)), *arguments]) == 0
"""
TITLES = ("runs:", "train images:", "fine-tune:", "labeled images:", "teacher's logits:", "check model.safetensors:")


@pytest.fixture
def config(tiny_settings: dict[str, Any], tmp_path: Path) -> RunConfig:
    return with_overrides(RunConfig(), {**tiny_settings, "runtime.output_dir": str(tmp_path), "runtime.progress": True})


def _command(config: RunConfig, folder: Path, appears_after: float) -> list[str]:
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    return [sys.executable, "-c", SCRIPT, str(folder / "config.json"), str(appears_after)]


def _on_a_terminal(command: list[str], cwd: Path) -> str:
    """Run a command whose standard error is a terminal; returns what it wrote there."""
    own, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 120))  # a new one has no room at all
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=other, cwd=cwd)
    os.close(other)
    written = b""
    try:
        while part := os.read(own, 65536):
            written += part
    except OSError:  # raised by a terminal after its last writer has closed it
        pass
    os.close(own)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


@pytest.mark.slow
def test_a_terminal_sees_every_bar_and_a_pipe_none(config: RunConfig, root: Path, tmp_path: Path) -> None:
    shown = _on_a_terminal(_command(config, tmp_path, 0.0), root)
    assert [title for title in TITLES if title not in shown] == []
    again = with_overrides(config, {"seed": 1})
    done = subprocess.run(_command(again, tmp_path, 0.0), capture_output=True, text=True, cwd=root, check=True)
    # Whole lines of notices (the forecast, poor images), and nothing of a bar.
    assert all(line.startswith("synq: ") for line in done.stderr.split("\n")[:-1]) and "\r" not in done.stderr
    assert [title for title in TITLES if title in done.stderr] == [] and done.stdout.startswith("done only\n")
    for name in (config, again):
        assert (run_folder(name) / "export" / "model.safetensors").exists(), "both did the work"


def test_runs_that_are_only_read_show_no_bar_that_would_flash(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(with_overrides(config, {"runtime.progress": False}))
    monkeypatch.setattr(bars, "APPEARS_AFTER", 600.0)
    capsys.readouterr()  # notices of the run itself, printed once per process
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_all({"only": config}, 1, lambda cell, found: print(cell)) == {"only": record}
    captured = capsys.readouterr()
    assert captured.out == "only\n" and captured.err.strip() == ""


def test_a_bar_comes_after_its_while_and_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "APPEARS_AFTER", 0.2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with passing_bar(3, "work", "step", is_shown=True) as bar:
        bar.update()
        assert "work" not in capsys.readouterr().err
        time.sleep(0.3)
        bar.update()
        assert "work:  67%" in capsys.readouterr().err
    assert capsys.readouterr().err.endswith("\r"), "the line is wiped"
    with passing_bar(3, "work", "step", is_shown=False) as bar:
        time.sleep(0.3)
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_counting_counts_the_same_below_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.15)
            return x

    monkeypatch.setattr(bars, "APPEARS_AFTER", 0.2)
    logits, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 6

    def count(progress: bool) -> float:
        return evaluate(
            Slow(),
            lambda rows: (logits[rows], labels[rows]),
            torch.arange(40),
            batch_size=10,
            accelerator=Accelerator(cpu=True),
            progress=progress,
        ).top1

    quiet = count(False)
    assert count(True) == quiet and capsys.readouterr().err == "", "no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert count(False) == quiet and capsys.readouterr().err == ""
    assert count(True) == quiet and "labeled images:" in capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(bars, "LOGGED_EVERY", 2.5)
    with (
        bars.Bar(total=8, desc="work", **visible(True, bar_format="{n}")) as bar,
        passing_bar(2, "part", "p", is_shown=True),
    ):
        for number in range(8):
            now += 1.25
            note(bar, f"loss={number}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["2", "4", "6", "8"], lines
    *running, last = lines
    assert all(re.fullmatch(r"synq: work: \d of 8, 00:0\d, about 00:0\d left, loss=\d", line) for line in running), (
        lines
    )
    assert last == "synq: work: 8 of 8, 00:10, loss=7", "no time is left"
    with bars.Bar(total=8, desc="work", **visible(False)) as bar:
        bar.update()
    monkeypatch.setattr(bars, "LOGGED_EVERY", 60.0)
    with passing_bar(2, "quick", "p", is_shown=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_log_that_fails_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(bars, "LOGGED_EVERY", 0.0)
    for stderr in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        with passing_bar(3, "work", "step", is_shown=True) as bar:
            bar.update()
            bar.update(2)
            assert bar.n == 3 or bar.disable


@pytest.mark.parametrize("parts", [3, 7, 10, 30, 100])
def test_f_13_a_bar_whose_parts_add_up_to_more_than_its_total_has_no_negative_time(
    parts: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(bars, "LOGGED_EVERY", 1.0)
    with bars.Bar(total=1, desc="work", **visible(True)) as bar:
        for _ in range(parts):
            now += 2.0
            bar.update(1 / parts)
        bar.update(1e-12)
        now += 2.0
        bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and not any("-0" in line for line in lines), lines
    assert "left" not in lines[-1] and "left" in lines[0]
