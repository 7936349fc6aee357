#!/usr/bin/env python3
"""Many runs and a ranked table: `launch/sweep.py [SPEC] [--output-dir D] [--num-trials N] ...`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser
from synq.sweeps.driver.cluster import output_root, prepare_environment
from synq.sweeps.spec_file import DEMO_SPEC, load_spec
from synq.train import USER_ERROR, report_error


def _num_trials(word: str) -> dict[str, int]:
    """Read N, or +N for N more."""
    if not word.removeprefix("+").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number N or +N, but got {word!r}")
    return {"more_trials" if word.startswith("+") else "num_trials": int(word)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep over models, bit-widths and settings and rank the results. The same command resumes a sweep that was stopped."""
    parser = Parser(
        prog="synq sweep", description=main.__doc__, advice="everything else stands in the spec (--help, README)"
    )
    parser.add_argument(
        "spec", nargs="?", default=DEMO_SPEC, metavar="SPEC", help="a .toml or .json file (default: a small demo)"
    )
    parser.add_argument("--output-dir", help="folder of the sweep, or an address (s3://...) (default: runs/NAME)")
    parser.add_argument(
        "--num-trials",
        metavar="N",
        type=_num_trials,
        help="trials of each (model, bits) group; +N: that many more than it has",
    )
    parser.add_argument("--max-concurrent", metavar="N", type=int, help="most trials at one time")
    parser.add_argument("--workers-per-trial", metavar="N", type=int, help="processes that train one student together")
    parser.add_argument("--cpus-per-worker", metavar="X", type=float, help="CPU cores and threads of each of them")
    parser.add_argument(
        "--gpus-per-worker", metavar="X", type=float, help="GPUs of each; parts such as 0.25 share one, 0 is the CPU"
    )
    parser.add_argument("--retry-failed", action="store_const", const=True, help="run trials again that failed before")
    parser.add_argument(
        "--no-report", dest="report", action="store_const", const=False, help="end without making report.html"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be run, on what and for how long, and stop"
    )
    arguments = vars(parser.parse_args(argv))
    path, dry_run = arguments.pop("spec"), arguments.pop("dry_run")
    arguments |= arguments.pop("num_trials") or {}
    try:
        given = {key: value for key, value in arguments.items() if value is not None}
        spec = load_spec(path, given, root=output_root())
        prepare_environment()
        if dry_run:
            from synq.sweeps.driver.dry_run import print_preview

            print_preview(spec)
            return 0
        from synq.sweeps.driver.tuner import run_sweep

        status = run_sweep(spec)
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError) as error:
        report_error(error)
        status = USER_ERROR
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's threads may otherwise hold the process after the work is done
