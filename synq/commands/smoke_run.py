#!/usr/bin/env python3
"""Does everything work on a classifier? `synq/commands/smoke_run.py [TEACHER] [--KEY VALUE ...]`, or `--all [--jobs N] [--only WORD ...] [--page FILE]`."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, exit_code
from synq.common.progress import passing_bar
from synq.common.text_tables import Row, to_markdown, to_text
from synq.config.parsing import between, require
from synq.config.run import RunConfig, RuntimeConfig, TeacherConfig, config_from_dict, load_config, make_absolute
from synq.runs.record import environment, write_text_atomic
from synq.sweeps.studies.pool import in_processes, threads_each
from synq.train import read_command_line, report_error

LIST = Path(__file__).resolve().parent / "architectures.toml"
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
"""Mean and standard deviation of images that no weights say anything about."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network of the list.

    Attributes:
        teacher: Where it comes from.
        group: Title of its group.
        refused: Part of the message with which it is to be refused; "" where it is to work.
    """

    teacher: TeacherConfig
    group: str
    refused: str = ""

    def agrees(self, row: Row) -> bool:
        """Whether what happened is what the list says."""
        if self.refused:
            return row["status"] == "refused" and self.refused in row["reason"]
        return bool(row["status"] == "works")


def main(argv: Sequence[str] | None = None) -> int:
    """Do a run in miniature on TEACHER, from eight synthetic images to verified ONNX and packed files: a minute, before hours are spent.

    Its figures only say that everything works: whether the student without its rounding is the teacher bit for bit, and how many dB the logits
    keep at W8A8. Every other word is a setting of `teacher`, `quant` or `runtime`, as for `synq train`. With --all it is done with the networks
    of synq/diagnostics/architectures.toml, untrained; exit code 1 if one of them does otherwise than the list says.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="synq rehearse", usage="%(prog)s [TEACHER] [options]", description=main.__doc__)
    parser.add_argument("--all", action="store_true", help="try the networks of the list instead of TEACHER")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="of these, those with a WORD in their name"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="networks at a time, the cores divided between them (default: 1)"
    )
    parser.add_argument(
        "--formats", nargs="+", metavar="FORMAT",
        help="what is exported, some of: onnx packed torch (default: onnx, if its packages are there, and packed; with --all packed, because ONNX takes longer than all the rest)",
    )  # fmt: skip
    parser.add_argument("--page", metavar="FILE", help="write the table of --all as Markdown")
    arguments, rest = parser.parse_beside_settings(words)
    failed: list[str] = []
    work = _all if arguments.all else _one
    return exit_code(lambda: failed.extend(work(arguments, rest))) or int(bool(failed))


def read_list(only: Sequence[str] = ()) -> list[Entry]:
    """Return the networks of the list, or those with one of the words in their name.

    Raises:
        ValueError: If none is left, or the file is damaged.
    """
    content = load_config(LIST)
    entries = []
    for group in content["groups"]:
        for network in group["networks"]:
            given = {"spec": network} if isinstance(network, str) else dict(network)
            refused = given.pop("refused", "")
            size = given.setdefault("input_size", group.get("input_size", content["input_size"]))
            given |= {"weights": "random", "mean": [HALF] * size[0], "std": [HALF] * size[0]}
            if not given["spec"].startswith("launch."):
                given["num_classes"] = content["num_classes"]
            teacher = config_from_dict(TeacherConfig, given, source=str(LIST))
            entries.append(Entry(teacher=teacher, group=group["title"], refused=refused))
    kept = [entry for entry in entries if not only or any(word in entry.teacher.spec for word in only)]
    if not kept:
        raise ValueError(f"`only` must be part of a name in {LIST.name}, but got {' '.join(only)}")
    return kept


def rehearse_entry(entry: Entry, threads: int | None = None, formats: Sequence[str] = ("packed",)) -> Row:
    """Rehearse one network of the list in a folder of its own, gone afterwards."""
    config = RunConfig(teacher=entry.teacher, runtime=RuntimeConfig(device="cpu", num_threads=threads))
    row = _rehearse(config, lambda stage: None, formats)
    row.pop("error", None)  # an exception need not survive the way between processes
    return {**row, "group": entry.group, "as_listed": entry.agrees(row)}


def _rehearse(config: RunConfig, say: Callable[[str], None], formats: Sequence[str]) -> Row:
    from synq.diagnostics.smoke_run import rehearse

    with tempfile.TemporaryDirectory(prefix="synq-rehearsal-") as folder:
        return rehearse(config, Path(folder), say, formats)


def _one(arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    for name in ("only", "page"):
        require(name, "be left out without `--all`", getattr(arguments, name), not getattr(arguments, name))
    config = make_absolute(read_command_line(words)[0])
    for part in ("synthesis", "finetune", "evaluation", "reconstruction"):
        if any(word.startswith(f"--{part}.") for word in words):
            raise ValueError(
                f"`{part}` must be left out: a rehearsal has its own, only teacher, quant and runtime count"
            )
    formats = arguments.formats or _formats()
    row = _rehearse(config, lambda stage: print(f"  {stage}", flush=True), formats)
    error = row.get("error")
    if row["status"] == "refused":
        raise ValueError(row["reason"]) from error
    for name, value in _shown(row).items():
        if value not in (None, ""):
            print(f"{name:<12} {value}", flush=True)
    if row["status"] == "works":
        return []
    failure = RuntimeError(row["reason"])
    failure.__cause__ = error
    report_error(failure)
    return [row["teacher"]]


def _formats() -> tuple[str, ...]:
    from synq.export.export import missing_packages

    if missing := missing_packages():
        print(
            f"synq: without ONNX, for which {missing[0]} is missing: pip install 'synq[export]'",
            file=sys.stderr,
            flush=True,
        )
    return ("packed",) if missing else ("onnx", "packed")


def _all(arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    between("jobs", arguments.jobs, 1)
    if words:
        raise ValueError(f"`--all` must stand without settings and TEACHER, but got {' '.join(words)}")
    entries = read_list(arguments.only)
    rows: dict[int, Row] = {}
    with passing_bar(len(entries), "networks", "network", is_shown=True) as bar:
        for number, row in in_turn(entries, arguments.jobs, arguments.formats or ("packed",)):
            rows[number] = row
            otherwise = "" if row["as_listed"] else ", OTHERWISE THAN LISTED"
            bar.clear()  # the line takes its place, and it is drawn again below
            print(f"{row['teacher']}: {row['status']}{otherwise}, {row['seconds']:.0f} s {row['reason']}", flush=True)
            bar.update()
    ordered = [rows[number] for number in range(len(entries))]
    print(to_text([_shown(row) for row in ordered], SHOWN_COLUMNS))
    wrong = [row["teacher"] for row in ordered if not row["as_listed"]]
    print(f"{len(ordered)} networks, {sum(row['status'] == 'works' for row in ordered)} work, "
          f"{len(wrong)} otherwise than listed{': ' + ', '.join(wrong) if wrong else ''}", flush=True)  # fmt: skip
    if arguments.page:
        write_text_atomic(arguments.page, page(ordered))
    return wrong


def in_turn(entries: Sequence[Entry], jobs: int, formats: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """Give every row as it is done: one after the other in this process, or in `jobs` fresh ones, whatever becomes of those."""
    if jobs == 1:
        yield from ((number, rehearse_entry(entry, None, formats)) for number, entry in enumerate(entries))
        return
    work = partial(rehearse_entry, threads=threads_each(jobs), formats=formats)
    waiting = dict(enumerate(entries))
    while waiting:
        try:
            for number, row in in_processes(work, dict(waiting), jobs):
                del waiting[number]
                yield number, row
        except BrokenProcessPool:  # by one of those that were under way: each of them once more, alone
            for number in list(waiting)[:jobs]:
                yield number, _alone(work, waiting.pop(number))


def _alone(work: Callable[[Entry], Row], entry: Entry) -> Row:
    try:
        ((_, row),) = in_processes(work, {0: entry}, 1)
    except BrokenProcessPool:
        reason = "its process died: a crash in compiled code, or too little memory"
        spec = entry.teacher.spec
        return {
            "teacher": spec,
            "status": "fails",
            "reason": reason,
            "seconds": 0.0,
            "group": entry.group,
            "as_listed": False,
        }
    return row


def page(rows: Sequence[Row]) -> str:
    """Return the table of all networks as a Markdown page, group by group."""
    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))
    lines = [
        "# Networks that were tried",
        "",
        "Made by `synq rehearse --all --jobs 2 --page FILE`: each network, untrained and with batch-norm statistics of noise, goes",
        "through synthesis, W4A4 quantization, two fine-tuning steps, evaluation and a verified export (packed; `--formats onnx packed` adds ONNX, which takes longer than all the rest); or it is refused at once.",
        "`exact`: with its quantizers bypassed the student gives the teacher's logits bit for bit. `SQNR W8A8`: power of the teacher's logits over",
        "that of their error at 8 bits, in dB; where it is below 20 the note names the tensor that costs most by itself. Figures of untrained networks",
        "say that everything works, not how well. `synq rehearse TEACHER` does the same with yours.",
        "",
        f"Commit {about['commit']}, {versions}.",
    ]  # fmt: skip
    for group in dict.fromkeys(row["group"] for row in rows):
        shown = [_shown(row) for row in rows if row["group"] == group]
        lines += ["", f"## {group}", "", to_markdown(shown, PAGE_COLUMNS).rstrip()]
    return "\n".join(lines) + "\n"


def _shown(row: Row) -> dict[str, Any]:
    """Return a row in the words of the table."""
    sqnr = row.get("sqnr_db")
    parameters = row.get("parameters")
    return {
        "teacher": row["teacher"].removeprefix("synq.diagnostics.example_networks:"),
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


if __name__ == "__main__":
    sys.exit(main())
