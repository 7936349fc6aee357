"""The list of architectures that `synq smoke-run --all` tries, and the results as tables. Loads no torch."""

import importlib.resources
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synq.common.environment import environment
from synq.common.text_tables import Row, to_markdown, to_text
from synq.config.parsing import config_from_dict, load_config
from synq.config.run import RunConfig, RuntimeConfig, TeacherConfig

OWN = "synq.diagnostics.example_networks:"
"""Where the networks come from that were written for the list."""
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
"""Mean and standard deviation per channel of the images: with random weights there are none to know."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture of the list.

    Attributes:
        teacher: Where it comes from.
        group: Title of its group.
        rejected: Part of the message with which it must be rejected; "" where it must work.
    """

    teacher: TeacherConfig
    group: str
    rejected: str = ""

    def agrees(self, row: Row) -> bool:
        """Return whether the result is the one that the list expects."""
        if self.rejected:
            return row["status"] == "rejected" and self.rejected in row["reason"]
        return bool(row["status"] == "works")


def read_list(only: Sequence[str] = ()) -> list[Entry]:
    """Return the architectures of the list, or those with one of the texts in their name.

    Raises:
        ValueError: None is left, or the file is damaged.
    """
    content = load_config(LIST)
    entries = []
    for group in content["groups"]:
        for network in group["networks"]:
            given = {"spec": network} if isinstance(network, str) else dict(network)
            rejected = given.pop("rejected", "")
            size = given.setdefault("input_size", group.get("input_size", content["input_size"]))
            given |= {"weights": "random", "mean": [HALF] * size[0], "std": [HALF] * size[0]}
            if not given["spec"].startswith(OWN):
                given["num_classes"] = content["num_classes"]
            teacher = config_from_dict(TeacherConfig, given, source=str(LIST))
            entries.append(Entry(teacher=teacher, group=group["title"], rejected=rejected))
    kept = [entry for entry in entries if not only or any(text in entry.teacher.spec for text in only)]
    if not kept:
        raise ValueError(f"`only` must be part of a name in {LIST.name}, but got {' '.join(only)}")
    return kept


def smoke_run_entry(entry: Entry, threads: int | None = None, formats: Sequence[str] = ("packed",)) -> Row:
    """Do a smoke run of one architecture in a scratch folder, on the CPU.

    Args:
        entry: The architecture.
        threads: Threads of this process; None leaves them as they are.
        formats: What is exported.

    Returns:
        What `smoke_run` returns without the exception, and `group` and `as_listed`.
    """
    config = RunConfig(teacher=entry.teacher, runtime=RuntimeConfig(device="cpu", num_threads=threads))
    row = smoke_run_in_scratch(config, formats)
    row.pop("error", None)  # an exception need not survive the way between processes
    return {**row, "group": entry.group, "as_listed": entry.agrees(row)}


def smoke_run_in_scratch(
    config: RunConfig, formats: Sequence[str], on_stage: Callable[[str], None] = lambda stage: None
) -> Row:
    """Do a smoke run in a folder that is removed afterwards; arguments and result as `smoke_run`."""
    from synq.diagnostics.smoke_run import smoke_run  # torch, which a rejected command line need not wait for

    with tempfile.TemporaryDirectory(prefix="synq-smoke-run-") as folder:
        return smoke_run(config, Path(folder), on_stage, formats)


def crashed_row(entry: Entry) -> Row:
    """Return the row of an architecture whose process died."""
    reason = "its process died: a crash in compiled code, or too little memory"
    about = {"teacher": entry.teacher.spec, "status": "fails", "reason": reason, "seconds": 0.0}
    return {**about, "group": entry.group, "as_listed": False}


def summary_lines(rows: Sequence[Row]) -> str:
    """Return the table of all architectures and a line that counts them."""
    wrong = [row["teacher"] for row in rows if not row["as_listed"]]
    works = sum(row["status"] == "works" for row in rows)
    names = f": {', '.join(wrong)}" if wrong else ""
    table = to_text([shown(row) for row in rows], SHOWN_COLUMNS)
    return f"{table}\n{len(rows)} networks, {works} work, {len(wrong)} not as listed{names}"


def page(rows: Sequence[Row]) -> str:
    """Return the table of all architectures as a Markdown page, group by group."""
    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))
    lines = [
        "# Architectures that were tried",
        "",
        "Made by `synq smoke-run --all --jobs 2 --page FILE`: each network, untrained and with batch-norm statistics "
        "of noise, goes",
        "through synthesis, W4A4 quantization, two fine-tuning steps, evaluation and a verified export (packed; "
        "`--formats onnx packed` adds",
        "ONNX, which takes longer than all the rest); or it is rejected at once. `exact`: with its quantizers "
        "bypassed the student gives the",
        "teacher's logits bit for bit. `SQNR W8A8`: power of the teacher's logits over that of their error at 8 "
        "bits, in dB; where it is below",
        "20 the note names the tensor that costs most by itself. Metrics of untrained networks tell that everything "
        "works, not how well.",
        "`synq smoke-run TEACHER` does the same with yours.",
        "",
        f"Commit {about['commit']}, {versions}.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [shown(row) for row in rows if row["group"] == group]
        lines += ["", f"## {group}", "", to_markdown(of_group, PAGE_COLUMNS).rstrip()]
    return "\n".join(lines) + "\n"


def shown(row: Row) -> dict[str, Any]:
    """Return a row with the columns and units of the table."""
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
