"""`synq mixed-precision`: bits of single layers under limits, found without data."""

import shlex

import click

from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, config_option, option
from synq.config.run import RunConfig
from synq.train import TEACHER_SETTINGS

CANDIDATES = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_FACTOR = 4.0
COMMON = (
    *TEACHER_SETTINGS,
    *("quant.weight_bits", "quant.act_bits", "synthesis.num_images"),
    "runtime.output_dir",
)
EXAMPLES = """\
  %(prog)s bundled:digits_resnet8 --activations          no larger, and no more bit operations, than now
  %(prog)s torchvision:resnet18 --max-bytes inf --max-bitops 2e10 --candidates 2 4 8"""


@click.command("mixed-precision", cls=Command, settings="run", common=COMMON, examples=EXAMPLES, resumes=True)
@config_option
@option("--activations", is_flag=True, help="choose the bits of activations, too (default: only those of weights)")
@option(
    "--max-bytes",
    type=FLOAT,
    help="most packed bytes of all weights, scales not counted (default: of the bits as given; inf for no limit)",
)
@option(
    "--max-bitops",
    type=FLOAT,
    help="most bit operations an image (default: with --activations those of the bits as given, else no limit)",
)
@option(
    "--candidates",
    several=True,
    type=INT,
    metavar="BITS",
    default=CANDIDATES,
    help="bit-widths to choose from (default: 2 to 8)",
)
@option(
    "--activation-factor",
    type=FLOAT,
    default=ACTIVATION_FACTOR,
    help="weight of the KL of an activation; that of a weight counts 1 (default: 4)",
)
def command(
    config: RunConfig,
    activations: bool,
    max_bytes: float | None,
    max_bitops: float | None,
    candidates: tuple[int, ...],
    activation_factor: float,
) -> None:
    """Choose the bits of every layer's weights and activations with the least KL to the teacher within limits.

    Without data: each tensor is rounded alone, to each bit-width, and the KL to the teacher is measured on the run's
    synthetic images (made first, if they are not stored yet); then the bits with the least sum are taken. The KL of an
    activation counts more, since fine-tuning makes up for the rounding of weights. A tensor that has its bits by name,
    or by first_bits or last_bits, keeps them. Writes <output_dir>/<name>-mixed-precision-<digest>/: scan.csv, every
    tensor at every bit-width, and settings.json, the same run with the bits found in quant.layer_weight_bits and
    quant.layer_act_bits.
    """
    from synq.mixed_precision.search import SearchOptions, search

    options = SearchOptions(
        candidates=sorted(set(candidates)),
        activations=activations,
        activation_factor=activation_factor,
        max_bytes=max_bytes,
        max_bitops=max_bitops,
    )
    found = search(config, options)
    if found is not None:
        settings, table = found
        print(table, end="")
        print(f"synq train --config {shlex.quote(str(settings))}", flush=True)


main = command.run
