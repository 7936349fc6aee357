"""`synq show`: summary of runs and sweeps in a terminal."""

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import argument

EXAMPLES = """\
  %(prog)s runs/demo                a sweep, finished or not
  %(prog)s runs/run-DIGEST          a run"""


@click.command("show", cls=Command, examples=EXAMPLES, exit_codes="0 done, 2 input rejected, 130 interrupted")
@argument("paths", nargs=-1, required=True, metavar="PATH", help="folder of a sweep or a run, or a record file")
def command(paths: tuple[str, ...]) -> None:
    """Print the results of a run or a sweep, finished or not: best settings, metrics, failures."""
    check_paths(paths)
    from synq.sweeps.reports.terminal import show

    show(paths)


main = command.run
