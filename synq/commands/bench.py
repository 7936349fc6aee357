"""`synq bench`: benchmark of this machine and of SynQ on it."""

from typing import Literal

import click

from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, option

GROUPS = ("ceilings", "steps", "options", "synthesis", "curves", "population", "processes", "sweep", "engines")
ENGINES = ("onnxruntime", "openvino", "litert", "executorch")
NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large")
EXAMPLES = """\
  %(prog)s                               all groups, about half an hour on two CPU cores
  %(prog)s --only steps synthesis --rounds 3
  %(prog)s --only engines --engines onnxruntime --rounds 41"""


def _failures() -> tuple[type[BaseException], ...]:
    from synq.sweeps.benchmarks.launcher import WorkerError

    return (WorkerError,)


@click.command(
    "bench",
    cls=Command,
    examples=EXAMPLES,
    exit_codes="0 done (a missed target is no error), 1 a process failed, 2 input rejected, 130 interrupted",
    failures=_failures,
)
@option(
    "--only",
    several=True,
    type=OneOf(*GROUPS),
    metavar="GROUP",
    help=f"some of: {' '.join(GROUPS)} (default: all)",
)
@option("--skip", several=True, type=OneOf(*GROUPS), metavar="GROUP", help="groups to leave out")
@option(
    "--device",
    type=OneOf("auto", "cpu", "cuda"),
    default="auto",
    metavar="DEVICE",
    help="auto, cpu or cuda (default: a GPU if there is one)",
)
@option("--threads", metavar="N", type=INT, help="CPU threads (default: PyTorch's, one per core)")
@option("--rounds", metavar="N", type=INT, default=9, help="rounds of each comparison (default: 9)")
@option("--seed", metavar="N", type=INT, default=0, help="seed of weights and images (default: 0)")
@option(
    "--engines",
    several=True,
    type=OneOf(*ENGINES),
    metavar="ENGINE",
    help=f"what the group engines measures: some of {' '.join(ENGINES)} (default: those that are installed)",
)
@option(
    "--networks",
    several=True,
    type=OneOf(*NETWORKS),
    metavar="NETWORK",
    help=f"what the group engines runs: some of {' '.join(NETWORKS)} (default: all)",
)
@option(
    "--output-dir", metavar="DIR", default="runs/bench", help="folder of bench.json and bench.md (default: runs/bench)"
)
def command(
    only: tuple[str, ...],
    skip: tuple[str, ...],
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    rounds: int,
    seed: int,
    engines: tuple[str, ...],
    networks: tuple[str, ...],
    output_dir: str,
) -> None:
    """Measure time ratios of alternating calls in one process, and print and write a table with their quartiles.

    Weights and images are random, so nothing is downloaded. Groups: peak throughput of the machine (ceilings),
    fine-tuning steps, options (memory format, dtype, compilation), synthesis, time and memory against problem size
    (curves), several students in one process (population), two processes (DDP), concurrent trials of a sweep, integer
    files next to float and next to those of each engine's own tool (engines).
    """
    if rounds < 1 or (threads is not None and threads < 1):
        raise ValueError(f"`rounds` and `threads` must be >= 1, but got {rounds} and {threads}")
    from synq.sweeps.benchmarks.measure import measure

    chosen = [name for name in (only or GROUPS) if name not in skip]
    measure(
        chosen,
        device=device,
        threads=threads,
        rounds=rounds,
        seed=seed,
        engines=engines,
        networks=networks,
        output_dir=output_dir,
    )


main = command.run
