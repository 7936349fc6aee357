#!/usr/bin/env python3
"""Many runs and a ranked table: `launch/sweep.py [SPEC] [--output-dir D] [--num-trials N] ...`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sweeps.cluster import output_root, prepare_environment
from sweeps.spec import DEMO_SPEC, load_spec

USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """Answers a wrong word with one line, as every other door does."""

    def error(self, message: str) -> NoReturn:
        print(f"synq: error: {message}; everything else stands in the spec (--help, README)", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep over models, bit-widths and settings and rank the results. The same command resumes a sweep that was stopped."""
    parser = _Parser(prog="sweep", description=main.__doc__)
    parser.add_argument(
        "spec", nargs="?", default=DEMO_SPEC, metavar="SPEC", help="a .toml or .json file (default: a small demo)"
    )
    parser.add_argument("--output-dir", help="folder of the sweep (default: runs/NAME)")
    parser.add_argument("--num-trials", type=int, help="trials of each (model, bits) group")
    parser.add_argument("--max-concurrent", type=int, help="most trials at one time")
    parser.add_argument("--cpus-per-trial", type=float, help="CPU cores and threads of a trial")
    parser.add_argument(
        "--gpus-per-trial", type=float, help="GPUs of a trial; parts such as 0.25 share one, 0 is the CPU"
    )
    arguments = vars(parser.parse_args(argv))
    path = arguments.pop("spec")
    try:
        given = {key: value for key, value in arguments.items() if value is not None}
        spec = load_spec(path, given, root=output_root())
        prepare_environment()
        from sweeps.tuner import run_sweep

        status = run_sweep(spec)
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError) as error:
        print(f"synq: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = USER_ERROR
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's threads may otherwise hold the process after the work is done
