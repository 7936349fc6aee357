#!/usr/bin/env python3
"""Files that an engine runs, from a finished run: `synq/commands/export.py RUN [--out DIR] [--formats onnx packed torch] [--container int4 int8 matmul]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, check_paths, exit_code
from synq.config.run import PLACES
from synq.train import report_error


def main(argv: Sequence[str] | None = None) -> int:
    """Write the student of a finished run as ONNX (QuantizeLinear/DequantizeLinear), packed safetensors and a torch.export program.

    Every file is run on the run's synthetic images, and on its labelled ones where it has some, beside the student; one that differs by
    more than the tolerance is refused. Sizes, BitOps and the latency in ONNX Runtime beside the float teacher's go into the run's record,
    and with everything else into a model card (README.md and card.json) beside the files.
    """
    parser = Parser(prog="synq export", description=main.__doc__)
    parser.add_argument(
        "run", metavar="RUN", help="folder of a finished run, its record.json, or a sweep's records/TRIAL.json"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the files go, in the place of an earlier export (default: RUN/export)"
    )
    parser.add_argument(
        "--formats", nargs="+", default=["onnx", "packed", "torch"], help="some of: onnx packed torch (default: all)"
    )
    parser.add_argument(
        "--container", nargs="+", default=[], metavar="TYPE",
        help="how ONNX holds integers: int4 (codes of at most 4 bits in half a byte, the smallest), int8 (in bytes), matmul (in bytes, and "
        "convolutions as products of integer matrices, the fastest on a CPU but for convolutions in groups); or several (default: int4 where a width is at most 4, else int8)",
    )  # fmt: skip
    parser.add_argument(
        "--agreement", type=float, default=99.9,
        help="least percent of images with the student's class; one image may always differ, and twice as many as on which the student "
        "differs when it adds floats (default: 99.9)",
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=float, default=0.0,
        help="count only images on which the student's two largest logits differ by more (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--mean-difference", type=float, default=0.05,
        help="largest mean difference of the logits, as a share of their standard deviation (default: 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of ONNX Runtime when it is timed (default: its own)"
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="timed runs of each model; 0 times nothing (default: 30)"
    )
    for name in PLACES:
        parser.add_argument(f"--{name}", metavar="PLACE", help="where it lies now, if it was moved since the run")
    arguments = parser.parse_args(argv)
    try:
        return exit_code(lambda: _export(arguments))
    except RuntimeError as error:
        from synq.export.files import ExportRefusedError  # torch, as in `exit_code`

        if not isinstance(error, ExportRefusedError):
            raise
        report_error(error)
        return 1


def _export(arguments: argparse.Namespace) -> None:
    check_paths([arguments.run], "RUN")
    from synq.common.text_tables import to_text
    from synq.export.card import FILE_COLUMNS, file_rows
    from synq.export.export import ExportOptions, export_run
    from synq.export.verify import Tolerance

    tolerance = Tolerance(
        agreement=arguments.agreement, margin=arguments.margin, mean_difference=arguments.mean_difference
    )
    options = ExportOptions(
        formats=arguments.formats,
        containers=arguments.container,
        tolerance=tolerance,
        rounds=arguments.rounds,
        threads=arguments.threads,
        places={name: place for name in PLACES if (place := getattr(arguments, name)) is not None},
        progress=True,
    )
    folder, record = export_run(arguments.run, arguments.out, options)
    print(to_text(file_rows(record.deployment), FILE_COLUMNS), end="")
    print(folder, flush=True)


if __name__ == "__main__":
    sys.exit(main())
