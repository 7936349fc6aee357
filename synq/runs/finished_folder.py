"""Where a finished run is, given its folder, its record, or a sweep's record of the trial. Loads no torch."""

from contextlib import suppress
from pathlib import Path

from synq.runs.record import RunRecord, read_record


def finished_folder(folder: str | Path) -> Path:
    """Return the folder of a completed run.

    Args:
        folder: As for `open_run`.

    Raises:
        FileNotFoundError: The folder has no finished run.
        ValueError: Its record is damaged, or the run failed or was pruned.
    """
    path = Path(folder).resolve()
    if _is_trial(path):
        _check_completed(read_record(path), path)
    path = _run_folder(path)
    if not (path / "record.json").is_file():
        started = (path / "checkpoint.pt").exists() or (path / "config.json").exists()
        hint = "it is not finished, start its command again" if started else _hint_for(path)
        raise FileNotFoundError(f"`RUN` must hold record.json, but {path} does not: {hint}")
    _check_completed(read_record(path / "record.json"), path)
    return path


def _check_completed(record: RunRecord, path: Path) -> None:
    if record.status != "completed":
        raise ValueError(f"`RUN` must be a completed run, but {path} is {record.status}: {record.reason}")


def _hint_for(path: Path) -> str:
    """Return the advice for a folder that is not a run."""
    for file in sorted((path / "records").glob("*.json")):
        with suppress(ValueError):  # a damaged one does not hide the others
            if read_record(file).status == "completed" and _run_folder(file).is_dir():
                return f"it is a sweep, give one of its trials, such as {file}"
    return "give the folder of one run, runs/NAME-DIGEST"


def _is_trial(path: Path) -> bool:
    """Return whether a path is a sweep's record of a trial."""
    return path.suffix == ".json" and path.parent.name == "records" and path.is_file()


def _run_folder(path: Path) -> Path:
    if path.name == "record.json":
        return path.parent
    if _is_trial(path):
        record = read_record(path)
        return path.parent.parent / "runs" / f"{record.config['name']}-{record.config_digest}"
    return path
