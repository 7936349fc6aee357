"""`synq export`: deployment files of the student of a finished run."""

from typing import Any

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, argument, moved_options, moved_paths, option

EXAMPLES = """\
  %(prog)s runs/run-DIGEST
  %(prog)s runs/demo/records/TRIAL.json --formats onnx --container int4 --out exported"""


def _failures() -> tuple[type[BaseException], ...]:
    from synq.export.files import ExportRejectedError

    return (ExportRejectedError,)


@click.command(
    "export",
    cls=Command,
    examples=EXAMPLES,
    exit_codes="0 done, 1 a file differs from the student, 2 input rejected, 130 interrupted",
    failures=_failures,
)
@argument("run", metavar="RUN", help="folder of a finished run, its record.json, or a sweep's records/TRIAL.json")
@option("--out", metavar="DIR", help="folder of the files; an earlier export is replaced (default: RUN/export)")
@option(
    "--formats",
    several=True,
    metavar="FORMAT",
    help="some of: onnx packed torch (default: all); a student for an engine has one file, of its engine's format",
)
@option(
    "--container",
    several=True,
    metavar="TYPE",
    help="integer type of ONNX weights: int4 (at most 4 bits, two per byte, smallest file), int8, or matmul (int8 with "
    "convolutions as integer matrix products, fastest on a CPU except for grouped convolutions); or several (default: "
    "int4 for weights of at most 4 bits, else int8)",
)
@option(
    "--agreement",
    type=FLOAT,
    default=99.9,
    help="smallest percentage of images with the student's class; one image may always differ, and twice as many as "
    "change class between integer and float sums of the student (default: 99.9)",
)
@option(
    "--margin",
    type=FLOAT,
    default=0.0,
    help="ignore images whose two largest logits of the student differ by no more than this (default: 0)",
)
@option(
    "--mean-difference",
    type=FLOAT,
    default=0.05,
    help="largest mean difference of the logits, as a fraction of their standard deviation (default: 0.05)",
)
@option(
    "--threads",
    type=INT,
    default=1,
    help="threads of ONNX Runtime for the latency; with one, the processor time is measured, which other programs "
    "affect least; 0: chosen by ONNX Runtime (default: 1)",
)
@option("--rounds", type=INT, default=30, help="timed runs of each model; 0 for no timing (default: 30)")
@moved_options
def command(
    run: str,
    out: str | None,
    formats: tuple[str, ...],
    container: tuple[str, ...],
    agreement: float,
    margin: float,
    mean_difference: float,
    threads: int,
    rounds: int,
    **moved: Any,
) -> None:
    """Write the student of a finished run as ONNX (QDQ), packed safetensors and a torch.export program.

    A student for an engine (`quant.target`) is written as the file that this engine runs in integer kernels, and is
    verified and timed in it.

    Every file is verified: its outputs on the run's synthetic images, and on its labeled images if there are any, are
    compared with the student's, and a file that differs by more than the tolerance is rejected. Sizes, BitOps and the
    latency in ONNX Runtime, for student and float teacher, are added to the run's record and to a model card (README.md
    and card.json) next to the files.
    """
    check_paths([run], "RUN")
    from synq.common.text_tables import to_text
    from synq.export.card_text import FILE_COLUMNS, file_rows
    from synq.export.export import ExportOptions, export_run
    from synq.export.timing import unstable_times
    from synq.export.verify import Tolerance
    from synq.runs.expected_agreement import agreement_line
    from synq.teacher.trust import trusting

    options = ExportOptions(
        formats=formats,
        containers=container,  # type: ignore[arg-type]  # checked by ExportOptions
        tolerance=Tolerance(agreement=agreement, margin=margin, mean_difference=mean_difference),
        rounds=rounds,
        threads=threads,
        path_overrides=moved_paths(moved),
        progress=True,
    )
    with trusting(moved["trust"]):
        folder, record = export_run(run, out, options)
    print(to_text(file_rows(record.deployment), FILE_COLUMNS), end="")
    metrics = record.deployment
    if metrics.get("latency_ms") is None and metrics.get("latency_spread") is not None:
        print(f"latency not stored: {unstable_times(metrics['latency_spread'])}")
    print(agreement_line(record.expected_agreement))
    print(folder, flush=True)


main = command.run
