"""`synq check-cluster`: check that a Ray cluster can run a sweep."""

import click

from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, option

EXAMPLES = """\
  %(prog)s                                               this machine, or the cluster that RAY_ADDRESS names
  %(prog)s --output-dir s3://bucket/sweeps --workers 4 --json report.json
  %(prog)s --skip nccl faults"""


@click.command(
    "check-cluster",
    cls=Command,
    examples=EXAMPLES,
    exit_codes="0 nothing failed, 1 a check failed, 2 input rejected or no cluster, 130 interrupted",
)
@option(
    "--output-dir", metavar="DIR_OR_ADDRESS", help="where a sweep would write: a folder or s3://... (default: runs)"
)
@option("--workers", type=INT, metavar="N", default=2, help="size of the process groups (default: 2)")
@option("--timeout", type=FLOAT, metavar="SECONDS", default=120.0, help="timeout of each check (default: 120)")
@option("--skip", several=True, metavar="NAME", help="checks to leave out, such as nccl faults")
@option("--json", "json_file", metavar="FILE", help="also write the results as JSON")
def command(
    output_dir: str | None, workers: int, timeout: float, skip: tuple[str, ...], json_file: str | None
) -> int | None:
    """Check nodes, clocks, the output folder, GPUs, process groups, small sweeps and recovery from a killed worker.

    What a single GPU can do, and how fast, `.ci/gpu` of a checkout shows, without Ray.
    """
    from synq.sweeps.driver.cluster import prepare_environment

    prepare_environment()
    from synq.sweeps.doctor.check import check_cluster

    return check_cluster(output_dir=output_dir, workers=workers, timeout=timeout, skip=list(skip), json_file=json_file)


main = command.run
