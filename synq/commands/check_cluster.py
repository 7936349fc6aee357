#!/usr/bin/env python3
"""Verify a cluster before hours are spent on it: `synq/commands/check_cluster.py [--output-dir DIR_OR_ADDRESS] [--workers N] ...`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, exit_code
from synq.sweeps.driver.cluster import prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Check nodes, clocks, the place for results, GPUs, process groups, small sweeps and a killed worker, and say what was verified.

    Exit code 0: nothing failed, 1: something did, 2: the words were refused or there is no cluster.
    """
    parser = Parser(prog="synq check-cluster", description=main.__doc__)
    parser.add_argument(
        "--output-dir", metavar="DIR_OR_ADDRESS", help="where results will lie: a folder or s3://... (default: runs)"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, default=2, help="processes that must work together (default: 2)"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="limit of each check (default: 120)"
    )
    parser.add_argument(
        "--skip", metavar="NAME", nargs="+", default=[], help="checks to leave out, such as nccl faults"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything found as JSON")
    arguments = parser.parse_args(argv)
    prepare_environment()
    from synq.sweeps.doctor.check import check_cluster

    return exit_code(
        lambda: check_cluster(
            output_dir=arguments.output_dir,
            workers=arguments.workers,
            timeout=arguments.timeout,
            skip=arguments.skip,
            json_file=arguments.json,
        )
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's threads, and a check that hangs, may otherwise hold the process
