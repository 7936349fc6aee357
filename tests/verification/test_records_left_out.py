"""R3: one damaged run among others: one line names it, and the others are shown."""

from pathlib import Path

import pytest

from support.made_sweeps import made_sweep
from support.sealed import edit, flip
from synq.commands.leaderboard import main as leaderboard
from synq.commands.report import main as report
from synq.common.notices import forget_notices


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of six trials, five of which are completed."""
    return made_sweep(tmp_path / "sweep", trials=6, bits=("W4A4",))


def damaged(folder: Path, how: str) -> Path:
    path = sorted((folder / "records").glob("*.json"))[1]
    if how == "flipped":
        return flip(path, path.read_bytes().index(b'"objective_value": 0.') + 22)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:300])
        return path
    return edit(path, lambda content: content.update(drop=50.0))


@pytest.mark.parametrize("how", ["flipped", "cut off", "contradicting"])
def test_r3_the_leaderboard_names_the_damaged_record_and_shows_the_others(
    how: str, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leaderboard([str(sweep), "--print", "--format", "csv"]) == 0
    before = capsys.readouterr().out.splitlines()
    path = damaged(sweep, how)
    forget_notices()
    assert leaderboard([str(sweep), "--print", "--format", "csv"]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("synq: warning: left out: ") and f"`{path}`" in line
    assert len(captured.out.splitlines()) == len(before) - 1 > 2
    forget_notices()
    assert leaderboard([str(path), "--print"]) == 2, "a record that is named is not left out"
    for other in (sweep / "records").glob("*.json"):
        if other != path:
            other.unlink()
    assert leaderboard([str(sweep)]) == 2, "there is nothing to show"


def test_r3_the_page_names_the_damaged_record_and_shows_the_others(sweep: Path) -> None:
    path = damaged(sweep, "flipped")
    assert report([str(sweep), "--runs", "0"]) == 0
    text = (sweep / "report.html").read_text()
    (line,) = [line for line in text.splitlines() if "Not read:" in line]
    assert str(path) in line
    names = [file.stem for file in sorted((sweep / "records").glob("*.json"))]
    table = text[text.index('id="table-trials"') :]
    assert [name for name in names if f">{name}<" in table] == [name for name in names if name != path.stem]
