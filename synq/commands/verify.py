"""`synq verify`: digests and consistency of runs, sweeps, exports, packed students and tables."""

import json
import sys

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import argument, option

EXAMPLES = """\
  %(prog)s runs/demo                     a sweep: plans, records, runs, images, tables
  %(prog)s runs/run-DIGEST --deep        a run, its student measured again
  %(prog)s exported model.safetensors    an export, a packed student
  %(prog)s runs/monday runs/tuesday      two sweeps, and records of one setting and seed that differ"""


@click.command(
    "verify",
    cls=Command,
    examples=EXAMPLES,
    exit_codes="0 nothing is wrong, 1 something is, 2 input rejected, 130 interrupted",
)
@argument(
    "paths",
    nargs=-1,
    required=True,
    metavar="PATH",
    help="folder of a run, a sweep or an export, a folder of them, a record, a packed student, or a table (CSV)",
)
@option("--deep", is_flag=True, help="also measure students and run exported files again, and compare")
@option("--trust", is_flag=True, help="run code that a record names, see docs/how-to/verify.md")
@option("--json", "as_json", is_flag=True, help="print the findings as a list in JSON")
def command(paths: tuple[str, ...], deep: bool, trust: bool, as_json: bool) -> int:
    """Check that files are as they were written, and that records, exports and tables fit each other.

    One line for each finding. Checked are the digests of all files, configuration and bits, drop = teacher - top-1 =
    (lost - gained) / n, the ranges of all metrics, records of one setting and seed that differ, and files of another
    run. Nothing is changed.
    """
    check_paths(paths)
    from synq.sweeps.verification import verify
    from synq.teacher.trust import trusting

    with trusting(trust):
        findings = verify(paths, deep=deep)
    if as_json:
        print(json.dumps([{"path": one.path, "finding": one.text} for one in findings.found], indent=2), flush=True)
    else:
        for finding in findings.found:
            print(finding.line(), flush=True)
    for text in findings.skipped:
        print(f"synq: note: {text}", file=sys.stderr)
    result = f"{len(findings.found)} findings" if findings.found else "nothing is wrong"
    print(f"synq: {findings.num_checked} files checked: {result}", file=sys.stderr, flush=True)
    return 1 if findings.found else 0


main = command.run
