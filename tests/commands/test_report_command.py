"""`synq report` and `synq show`: output, one-line errors, and a failed report does not affect the sweep."""

import shutil
from pathlib import Path

import pytest

from support.made_sweeps import made_sweep
from support.sealed import edit
from synq.commands.export import main as export
from synq.commands.report import main as report
from synq.commands.show import main as show
from synq.runs.record import read_record
from synq.sweeps.reports.summary import sweep_verdict
from synq.sweeps.reports.sweep_view import read_sweep


def test_invalid_arguments_are_one_line_errors(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in (
        ([str(tmp_path / "nosuch")], "`PATH` must exist"),
        ([str(tmp_path)], "must hold run records"),
        ([str(folder), str(folder)], "`PATH` must be different folders or files"),
        ([str(folder), "--runs", "-1"], "`runs` must"),
        ([str(folder), "--images", "0"], "`images` must"),
    ):
        assert report(args) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert show([str(tmp_path / "nosuch")]) == 2


def test_an_invalid_sweep_file_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    assert show([str(tmp_path)]) == 2 and report([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("must hold a sweep's search and groups") == 2


def test_a_failed_report_does_not_fail_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import synq.sweeps.reports.make
    from synq.sweeps.driver.tuner import _is_drawn, _report

    folder = made_sweep(tmp_path, trials=1, bits=("W4A4",))
    spec = SimpleNamespace(output_dir=folder, address="", groups=())
    assert not _is_drawn(spec)  # type: ignore[arg-type]
    assert _report(spec, None) == f"{folder}/report.html"  # type: ignore[arg-type]
    assert _is_drawn(spec)  # type: ignore[arg-type]
    next((folder / "records").iterdir()).touch()
    assert not _is_drawn(spec), "a record that is newer than the page"  # type: ignore[arg-type]
    for error in (SystemExit(3), KeyboardInterrupt(), KeyError("x"), OSError(28, "No space left on device")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(synq.sweeps.reports.make, "make_report", fail)
        assert _report(spec, None).startswith("no report.html: ")  # type: ignore[arg-type]


def test_the_folder_of_records_is_rejected_with_the_path_of_its_sweep(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show([str(folder / "records")]) == 2
    assert f"must be the whole sweep, {folder.resolve()}, but got" in capsys.readouterr().err


def test_the_error_of_exporting_a_sweep_names_an_exportable_trial(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(folder)]) == 2
    assert "give the folder of one run" in capsys.readouterr().err, "none of its runs exists"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    done = [path for path in sorted((copy / "records").iterdir()) if read_record(path).status == "completed"]
    record = read_record(done[1])
    (copy / "runs" / f"{record.config['name']}-{record.config_digest}").mkdir(parents=True)
    assert export([str(copy)]) == 2
    assert f"it is a sweep, give one of its trials, such as {done[1]}" in capsys.readouterr().err


def test_show_prints_the_verdict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show([str(folder)]) == 0
    text = capsys.readouterr().out
    for line in sweep_verdict(read_sweep(folder), read_sweep(folder).standings()):
        assert " ".join(line.split()) in " ".join(text.split())
    assert "and 1 more, in trials.csv" in text and "\x1b" not in text
    record = sorted((folder / "records").glob("*.json"))[0]
    shutil.copy(record, tmp_path / "t.json")
    edit(tmp_path / "t.json", lambda content: content.update(status="failed", reason="\x1b[2J"))
    assert show([str(tmp_path / "t.json")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert show([str(record)]) == 0
    text = capsys.readouterr().out
    assert "a drop of" in text and "± 0.64 (standard error, paired by image)" in " ".join(text.split())


def test_an_unfinished_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint.pt").write_text("")
    assert show([str(tmp_path)]) == 0 and "not finished, last saved" in capsys.readouterr().out
    assert report([str(tmp_path)]) == 2 and "must be a finished run" in capsys.readouterr().err


def test_a_page_is_only_written_to_an_html_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.csv"
    notes.write_text("mine")
    assert report([str(folder), "--runs", "0", "--output", str(notes)]) == 2
    assert "must end in .html" in capsys.readouterr().err and notes.read_text() == "mine"
    assert show([str(notes)]) == 2
    error = capsys.readouterr().err
    assert "must hold JSON, but it does not" in error and "remove" not in error
