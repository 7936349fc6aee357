"""`synq report`: HTML page of a run, a sweep, or a comparison of several sweeps."""

from typing import Any

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import INT, argument, moved_options, moved_paths, option

EXAMPLES = """\
  %(prog)s runs/demo                               the page of a sweep, finished or not: runs/demo/report.html
  %(prog)s runs/run-DIGEST                         the page of one run
  %(prog)s runs/demo/records/TRIAL.json            the page of one trial of a sweep
  %(prog)s runs/monday runs/tuesday --output c.html   comparison of two sweeps, with published results"""


@click.command("report", cls=Command, examples=EXAMPLES, exit_codes="0 done, 2 input rejected, 130 interrupted")
@argument("paths", nargs=-1, required=True, metavar="PATH", help="folder of a sweep or a run, or a record file")
@option(
    "--output",
    metavar="FILE",
    help="file of the page (default: report.html in PATH; TRIAL.html next to the folder records; comparison.html)",
)
@option(
    "--runs",
    type=INT,
    metavar="N",
    help="number of groups of a sweep whose best run is analyzed, which loads the networks (default: 4; 0: only "
    "records)",
)
@option(
    "--images",
    "num_images",
    type=INT,
    metavar="N",
    help="images on which the networks of a run are evaluated (default: by image size, so that it takes seconds)",
)
@option(
    "--tools",
    several=True,
    metavar="FILE.json",
    help="results of launch/compare_tools.py: files of other quantization tools as points of the chart of accuracy "
    "against latency of a sweep",
)
@moved_options
def command(
    paths: tuple[str, ...],
    output: str | None,
    runs: int | None,
    num_images: int | None,
    tools: tuple[str, ...],
    **moved: Any,
) -> None:
    """Write a self-contained HTML page and its plots as SVG and PNG.

    The plots are in FILE_figures/ next to FILE.html. A page is made from records and the files of the runs; nothing is
    trained or synthesized.
    """
    check_paths(paths)
    from synq.sweeps.reports.make import make_report
    from synq.teacher.trust import trusting

    options: dict[str, Any] = {} if runs is None else {"runs": runs}
    with trusting(moved["trust"]):
        written = make_report(
            paths, output, path_overrides=moved_paths(moved), num_images=num_images, tools=tools, **options
        )
    print(f"{written[0]} and {len(written) - 1} plots" if len(written) > 1 else written[0])


main = command.run
