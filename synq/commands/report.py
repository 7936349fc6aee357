#!/usr/bin/env python3
"""A page that shows what came of a run, a sweep, or several sweeps side by side: `synq/commands/report.py PATH... [--output FILE] [--runs N]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, check_paths, exit_code
from synq.config.run import PLACES

EXAMPLES = """\
examples:
  %(prog)s runs/demo                               the page of a sweep, finished or not: runs/demo/report.html
  %(prog)s runs/run-DIGEST                         the page of one run
  %(prog)s runs/demo/records/TRIAL.json            the page of one trial of a sweep
  %(prog)s runs/monday runs/tuesday --output c.html   two sweeps side by side, with the published figures

Beside FILE.html lie FILE_figures/*.svg and *.png. Pages are made of records and of what the runs left; nothing is trained or synthesised.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write one self-contained HTML page (no network, no other file) and its drawings as SVG and PNG."""
    parser = Parser(
        prog="synq report",
        description=main.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of a sweep or a run, or a record file")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the page goes (default: report.html in PATH; TRIAL.html beside the records' folder; comparison.html)",
    )
    parser.add_argument(
        "--runs", type=int, default=None, metavar="N",
        help="of a sweep: look into the best run of the first N groups, which loads their networks (default: 4; 0: records alone)",
    )  # fmt: skip
    parser.add_argument(
        "--images",
        type=int,
        default=None,
        metavar="N",
        help="images that the networks of a run are asked about (default: as many as take seconds)",
    )
    for name in PLACES:
        parser.add_argument(f"--{name}", metavar="PLACE", help="where it lies now, if it was moved since the run")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> None:
    check_paths(arguments.paths)
    from synq.sweeps.reports.make import make_report

    places = {name: place for name in PLACES if (place := getattr(arguments, name)) is not None}
    options = {} if arguments.runs is None else {"runs": arguments.runs}
    written = make_report(arguments.paths, arguments.output, places=places, num_images=arguments.images, **options)
    print(f"{written[0]} and {len(written) - 1} drawings beside it" if len(written) > 1 else written[0])


if __name__ == "__main__":
    sys.exit(main())
