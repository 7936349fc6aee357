#!/usr/bin/env python3
"""Which label-free measure ranks settings as top-1 does: `synq/commands/fidelity_study.py SWEEP_DIR [--bits W3A3 ...] [--output-dir D]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, check_paths, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every measure on every view with the top-1 of a sweep's finished trials. The labels serve this comparison alone."""
    parser = Parser(prog="fidelity_study", description=main.__doc__)
    parser.add_argument(
        "sweep", metavar="SWEEP_DIR", type=Path, help="folder of a sweep whose teacher has labelled images"
    )
    parser.add_argument("--bits", nargs="+", default=[], help="bit-widths, such as W3A3 (default: all)")
    parser.add_argument("--output-dir", type=Path, help="folder of the tables (default: SWEEP_DIR/fidelity_study)")
    parser.add_argument("--views", nargs="+", help="views to look at, for a quick study (default: all)")
    parser.add_argument(
        "--bn-only", action="store_true", help="also make held-out images without class loss and study them"
    )
    parser.add_argument("--best", type=int, default=15, help="rows of each group that are printed (default: 15)")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _study(arguments))


def _study(arguments: argparse.Namespace) -> None:
    check_paths([arguments.sweep], "SWEEP_DIR")
    from synq.sweeps.studies.fidelity_study import VIEWS, study  # torch, which a refused command line need not wait for
    from synq.sweeps.studies.rank_table import markdown, write_tables

    folder = arguments.output_dir or arguments.sweep / "fidelity_study"
    views = arguments.views or tuple(VIEWS)
    rows = study(arguments.sweep, folder, bits=arguments.bits, views=views, bn_only=arguments.bn_only)
    write_tables(folder, rows, arguments.best)
    print(markdown(rows, arguments.best), end="")
    print(folder / "fidelity_study.csv", flush=True)


if __name__ == "__main__":
    sys.exit(main())
