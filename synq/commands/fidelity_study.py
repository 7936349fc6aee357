"""`synq fidelity-study`: which label-free metric ranks settings as top-1 does."""

from pathlib import Path

import click

from synq.common.files import check_paths
from synq.config.command_line import Command
from synq.config.command_options import INT, argument, option

EXAMPLES = """\
  %(prog)s runs/cifar10_resnet20 --bits W3A3
  %(prog)s runs/demo --views noise_0.25 mixup_0.5 --best 5"""


@click.command("fidelity-study", cls=Command, examples=EXAMPLES, exit_codes="0 done, 2 input rejected, 130 interrupted")
@argument("sweep", metavar="SWEEP_DIR", help="folder of a sweep whose teacher has labeled images")
@option("--bits", several=True, metavar="LABEL", help="bit-widths, such as W3A3 (default: all)")
@option("--output-dir", metavar="DIR", help="folder of the tables (default: SWEEP_DIR/fidelity_study)")
@option("--views", several=True, metavar="NAME", help="perturbations of the images, for a quick study (default: all)")
@option("--bn-only", is_flag=True, help="also evaluate on held-out images synthesized without the class loss")
@option("--best", type=INT, default=15, help="printed rows of each group (default: 15)")
def command(
    sweep: str, bits: tuple[str, ...], output_dir: str | None, views: tuple[str, ...], bn_only: bool, best: int
) -> None:
    """Compute the rank correlation of every metric, on every view of the images, with the top-1 of a sweep's trials.

    Labels are used only for this comparison.
    """
    check_paths([sweep], "SWEEP_DIR")
    from synq.sweeps.studies.fidelity_study import VIEWS, study
    from synq.sweeps.studies.rank_table import markdown, write_tables

    folder = Path(output_dir) if output_dir is not None else Path(sweep) / "fidelity_study"
    rows = study(Path(sweep), folder, bits=list(bits), views=views or tuple(VIEWS), bn_only=bn_only)
    write_tables(folder, rows, best)
    print(markdown(rows, best), end="")
    print(folder / "fidelity_study.csv", flush=True)


main = command.run
