"""`synq smoke-run`: the whole pipeline in miniature on one classifier, or on the list of architectures."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from synq.common.exit_codes import report_error
from synq.config.command_line import Command
from synq.config.command_options import INT, config_option, option
from synq.config.parsing import between
from synq.config.run import RunConfig
from synq.train import TEACHER_SETTINGS

IGNORED = ("synthesis", "finetune", "evaluation", "reconstruction")
COMMON = (
    *TEACHER_SETTINGS,
    *(
        "teacher.num_classes",
        "teacher.output",
        "teacher.cam_layer",
        "quant.weight_bits",
        "quant.act_bits",
        "quant.act_points",
    ),
)
EXAMPLES = """\
  %(prog)s torchvision:resnet18 --teacher.weights random
  %(prog)s FILE.py:FUNCTION --teacher.weights W.pth --teacher.input_size 3 32 32 --teacher.mean 0.5 --teacher.std 0.5
  %(prog)s --all --jobs 2 --only resnet"""


@click.command("smoke-run", cls=Command, settings="run", common=COMMON, examples=EXAMPLES)
@config_option
@option("--all", "run_all", is_flag=True, help="run the architectures of the list instead of TEACHER")
@option("--only", several=True, metavar="TEXT", help="with --all: architectures whose name has a TEXT")
@option("--jobs", type=INT, default=1, help="concurrent architectures (default: 1)")
@option(
    "--formats",
    several=True,
    metavar="FORMAT",
    help="exported formats, some of: onnx packed torch (default: packed, and onnx if its packages are installed; with "
    "--all packed)",
)
@option("--page", metavar="FILE", help="write the table of --all as Markdown")
@option("--results", metavar="FILE", help="with --all: keep results in FILE, go on from them")
@click.pass_context
def command(
    ctx: click.Context,
    config: RunConfig,
    run_all: bool,
    only: tuple[str, ...],
    jobs: int,
    formats: tuple[str, ...],
    page: str | None,
    results: str | None,
) -> int:
    """Run the whole pipeline in miniature on TEACHER, from eight synthetic images to verified files, in about a minute.

    The metrics only show whether everything works: whether the student with quantizers bypassed equals the teacher bit
    for bit, and the SQNR of the logits at W8A8 in dB. Writing and verifying ONNX takes longer than everything else.
    Only the settings of `teacher`, `quant` and `runtime` are used. With --all, a list of about eighty untrained
    architectures is run; exit code 1 if the result of one differs from the expected one.
    """
    if run_all:
        between("jobs", jobs, 1)
        if given := [*(f"--config {file}" for file in ctx.obj.files), *(f"--{key}" for key in ctx.obj.overrides)]:
            raise ValueError(f"`--all` must be given without settings and TEACHER, but got {' '.join(given)}")
        return _all(only, jobs, formats or ("packed",), page, results)
    for name, value in (("only", " ".join(only)), ("page", page), ("results", results)):
        if value:
            raise ValueError(f"`{name}` must be left out without `--all`, but got {value!r}")
    for part in IGNORED:
        if any(key.startswith(f"{part}.") for key in ctx.obj.overrides):
            raise ValueError(
                f"`{part}` must be left out: a smoke run sets it; only teacher, quant and runtime are used"
            )
    return _one(config, formats or _formats())


def _one(config: RunConfig, formats: Sequence[str]) -> int:
    from synq.diagnostics.architectures import shown, smoke_run_in_scratch

    row = smoke_run_in_scratch(config, formats, lambda stage: print(f"  {stage}", flush=True))
    if row["status"] == "rejected":
        raise ValueError(row["reason"]) from row.get("error")
    for name, value in shown(row).items():
        if value not in (None, ""):
            print(f"{name:<12} {value}", flush=True)
    if row["status"] == "works":
        return 0
    failure = RuntimeError(row["reason"])
    failure.__cause__ = row.get("error")
    report_error(failure)
    return 1


def _formats() -> tuple[str, ...]:
    from synq.export.export import missing_packages

    missing = missing_packages()
    if missing:
        note = f"synq: without ONNX, for which {missing[0]} is missing: pip install 'synq[export]'"
        print(note, file=sys.stderr, flush=True)
    return ("packed",) if missing else ("onnx", "packed")


def _all(only: Sequence[str], jobs: int, formats: Sequence[str], page_file: str | None, results: str | None) -> int:
    from synq.common.files import write_text_atomic
    from synq.common.progress import passing_bar
    from synq.diagnostics.architectures import (
        crashed_row,
        page,
        read_list,
        read_results,
        smoke_run_entry,
        summary_lines,
        write_result,
    )
    from synq.sweeps.studies.pool import surviving_crashes, threads_each

    listed = read_list(only)
    file = None if results is None else Path(results)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()  # one that cannot be written is an error now, not after the first network
    rows = {} if file is None else read_results(file, listed, formats)
    if rows:
        print(f"synq: {len(rows)} of {len(listed)} networks are in {results}", flush=True)
    entries = {number: entry for number, entry in enumerate(listed) if number not in rows}
    work: Callable[..., dict] = partial(
        smoke_run_entry, threads=threads_each(jobs) if jobs > 1 else None, formats=formats
    )  # type: ignore[type-arg]
    with passing_bar(len(entries), "networks", "network", is_shown=True) as bar:
        for number, row in surviving_crashes(work, entries, jobs, crashed_row):
            rows[number] = row
            if file is not None:
                write_result(file, entries[number], formats, row)
            note = "" if row["as_listed"] else ", NOT AS LISTED"
            bar.clear()  # the printed line replaces the bar, which is drawn again below
            print(f"{row['teacher']}: {row['status']}{note}, {row['seconds']:.0f} s {row['reason']}", flush=True)
            bar.update()
    ordered = [rows[number] for number in range(len(listed))]
    print(summary_lines(ordered), flush=True)
    if page_file:
        write_text_atomic(page_file, page(ordered))
    return int(not all(row["as_listed"] for row in ordered))


main = command.run
