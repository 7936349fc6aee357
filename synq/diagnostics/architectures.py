"""List of architectures for `synq smoke-run --all`, and tables of the results. Does not import torch."""

import importlib.resources
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synq.common.environment import environment
from synq.common.text_tables import Row, to_markdown, to_text
from synq.config.parsing import config_from_dict, config_to_dict, load_config
from synq.config.run import RunConfig, RuntimeConfig, TeacherConfig

OWN = "synq.diagnostics.example_networks:"
"""Prefix of the specs of our example networks."""
LIST = Path(str(importlib.resources.files("synq.diagnostics"))) / "architectures.toml"
PAGE_COLUMNS = (
    "teacher",
    "input",
    "result",
    "parameters",
    "layers",
    "batch norms",
    "map",
    "exact",
    "SQNR W8A8",
    "export",
    "s",
    "note",
)
SHOWN_COLUMNS = ("teacher", "input", "result", "map", "exact", "SQNR W8A8", "s")
HALF = 0.5
"""Mean and standard deviation of each channel: networks with random weights have no normalization."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Architecture of the list, with its expected result.

    Attributes:
        teacher: How the network is loaded.
        group: Title of its group.
        rejected: Part of the error message if the network must be rejected; "" if it must work.
        fails: Part of the error message if it is known to fail later, during the run; "" otherwise.
    """

    teacher: TeacherConfig
    group: str
    rejected: str = ""
    fails: str = ""

    @property
    def key(self) -> str:
        """Return what identifies the architecture in a file of results."""
        return json.dumps(config_to_dict(self.teacher), sort_keys=True)

    def agrees(self, row: Row) -> bool:
        """Return whether the result is the expected one."""
        if self.rejected:
            return row["status"] == "rejected" and self.rejected in row["reason"]
        if self.fails:
            return row["status"] == "fails" and self.fails in row["reason"]
        return bool(row["status"] == "works")


def read_list(only: Sequence[str] = ()) -> list[Entry]:
    """Return the architectures of the list, or only those whose spec contains one of the given strings.

    Raises:
        ValueError: No architecture matches, or the file is damaged.
    """
    content = load_config(LIST)
    entries = []
    for group in content["groups"]:
        for network in group["networks"]:
            given = {"spec": network} if isinstance(network, str) else dict(network)
            rejected, fails = given.pop("rejected", ""), given.pop("fails", "")
            size = given.setdefault("input_size", group.get("input_size", content["input_size"]))
            given |= {"weights": "random", "mean": [HALF] * size[0], "std": [HALF] * size[0]}
            if not given["spec"].startswith(OWN):
                given["num_classes"] = content["num_classes"]
            teacher = config_from_dict(TeacherConfig, given, source=str(LIST))
            entries.append(Entry(teacher=teacher, group=group["title"], rejected=rejected, fails=fails))
    kept = [entry for entry in entries if not only or any(text in entry.teacher.spec for text in only)]
    if not kept:
        raise ValueError(f"`only` must be part of a name in {LIST.name}, but got {' '.join(only)}")
    return kept


def smoke_run_entry(entry: Entry, threads: int | None = None, formats: Sequence[str] = ("packed",)) -> Row:
    """Run `smoke_run` on one architecture in a temporary folder, on the CPU.

    Args:
        entry: The architecture.
        threads: CPU threads of this process; None keeps the current number.
        formats: Formats to export.

    Returns:
        The row of `smoke_run` without the exception, with `group` and `as_listed` (the result is the expected one).
    """
    config = RunConfig(teacher=entry.teacher, runtime=RuntimeConfig(device="cpu", num_threads=threads))
    row = smoke_run_in_scratch(config, formats)
    row.pop("error", None)  # an exception may not be picklable
    row["commit"] = environment()["commit"]
    return {**row, "group": entry.group, "as_listed": entry.agrees(row)}


def smoke_run_in_scratch(
    config: RunConfig, formats: Sequence[str], on_stage: Callable[[str], None] = lambda stage: None
) -> Row:
    """Run `smoke_run` in a temporary folder; arguments and result as there."""
    from synq.diagnostics.smoke_run import (
        smoke_run,
    )  # imports torch, which is slow: a rejected command line must not wait

    with tempfile.TemporaryDirectory(prefix="synq-smoke-run-") as folder:
        return smoke_run(config, Path(folder), on_stage, formats)


def read_results(file: Path, entries: Sequence[Entry], formats: Sequence[str]) -> dict[int, Row]:
    """Return the results of a file by the number of their architecture; the last of each counts.

    A result counts only with the same settings and formats, whatever its commit, and only if it is as listed: faults
    are tried again. The last line may be incomplete, of a process that was killed.

    Args:
        file: Lines as of `write_result`; a file that does not exist has none.
        entries: The architectures.
        formats: Formats that are exported.

    Raises:
        ValueError: A line before the last is no result.
    """
    lines = file.read_text().splitlines() if file.is_file() else []
    found: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            stored = json.loads(line)
            if stored["formats"] == list(formats):
                found[stored["key"]] = stored["row"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"`results` must be a file of this command, but line {number} of {file} is none"
            ) from error
    kept = {number: found[entry.key] for number, entry in enumerate(entries) if entry.key in found}
    return {
        number: {**row, "group": entries[number].group, "as_listed": True}
        for number, row in kept.items()
        if entries[number].agrees(row)
    }


def write_result(file: Path, entry: Entry, formats: Sequence[str], row: Row) -> None:
    """Append the result of an architecture to a file, as one line of JSON.

    Args:
        file: The file, made if there is none; an incomplete last line is removed.
        entry: The architecture.
        formats: Formats that were exported.
        row: Of `smoke_run_entry`.
    """
    line = json.dumps({"key": entry.key, "formats": list(formats), "row": row})
    with file.open("a+b") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(f"{line}\n".encode())


def crashed_row(entry: Entry) -> Row:
    """Return the row of an architecture whose process crashed."""
    reason = "its process died: a crash in compiled code, or too little memory"
    about = {"teacher": entry.teacher.spec, "status": "fails", "reason": reason, "seconds": 0.0}
    return {**about, "group": entry.group, "as_listed": False}


def summary_lines(rows: Sequence[Row]) -> str:
    """Return a text table of all results and a line with their counts."""
    wrong = [row["teacher"] for row in rows if not row["as_listed"]]
    works = sum(row["status"] == "works" for row in rows)
    names = f": {', '.join(wrong)}" if wrong else ""
    table = to_text([shown(row) for row in rows], SHOWN_COLUMNS)
    return f"{table}\n{len(rows)} networks, {works} work, {len(wrong)} not as listed{names}"


def page(rows: Sequence[Row]) -> str:
    """Return a Markdown page with the results, one table for each group."""
    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))
    commits = list(dict.fromkeys(row.get("commit") or about["commit"] for row in rows))
    lines = [
        "# Architectures that were tried",
        "",
        "Made by `synq smoke-run --all --jobs 2 --page FILE`: each network, untrained and with batch-norm statistics "
        "of noise, goes",
        "through synthesis, W4A4 quantization, two fine-tuning steps, evaluation and a verified export (packed; "
        "`--formats onnx packed` adds",
        "ONNX, which takes longer than everything else); or it is rejected at once. `exact`: with quantizers "
        "bypassed, the student's logits equal",
        "the teacher's bit for bit. `SQNR W8A8`: power of the teacher's logits over that of their error at 8 "
        "bits, in dB; where it is below",
        "20, the note names the tensor with the largest error. Metrics of untrained networks show that everything "
        "works, not how well.",
        "`synq smoke-run TEACHER` does the same with your network.",
        "",
        f"Commit{'s' if len(commits) > 1 else ''} {', '.join(map(str, commits))}; {versions}.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [shown(row) for row in rows if row["group"] == group]
        lines += ["", f"## {group}", "", to_markdown(of_group, PAGE_COLUMNS).rstrip()]
    return "\n".join(lines) + "\n"


def shown(row: Row) -> dict[str, Any]:
    """Return a result formatted for the columns of the tables."""
    sqnr = row.get("sqnr_db")
    parameters = row.get("parameters")
    return {
        "teacher": row["teacher"].removeprefix(OWN),
        "input": row.get("input", ""),
        "result": row["status"],
        "parameters": "" if parameters is None else f"{parameters:,}",
        "layers": row.get("layers"),
        "batch norms": row.get("batch_norms"),
        "map": row.get("cam", ""),
        "exact": {True: "yes", False: "no"}.get(row.get("exact"), ""),  # type: ignore[arg-type]
        "SQNR W8A8": "" if sqnr is None else f"{sqnr:.1f} dB",
        "export": row.get("export", ""),
        "s": f"{row['seconds']:.0f}",
        "note": row["reason"] or row.get("note", ""),
    }
