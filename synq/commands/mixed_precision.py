"""`synq mixed-precision`: mixed-precision bit allocation under size and BitOps budgets, without data."""

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
    *("quant.weight_bits", "quant.act_bits"),
    "runtime.output_dir",
)
EXAMPLES = """\
  %(prog)s bundled:digits_resnet8 --activations
  %(prog)s bundled:digits_resnet8 --quant.target onnxruntime --activations --latency-budget 1.02
  %(prog)s torchvision:resnet18 --max-bytes inf --max-bitops 2e10 --candidates 2 4 8"""


@click.command("mixed-precision", cls=Command, settings="run", common=COMMON, examples=EXAMPLES, resumes=True)
@config_option
@option("--activations", is_flag=True, help="also choose the bits of activations (default: only weights)")
@option(
    "--max-bytes",
    type=FLOAT,
    help="bytes of the packed weights (default: those at the given bits; inf for no budget)",
)
@option(
    "--max-bitops",
    type=FLOAT,
    help="BitOps of an image (default: with --activations those at the given bits)",
)
@option(
    "--latency-budget",
    metavar="RATIO|MS",
    help="latency in the engine of quant.target, of that of W8A8 (1.05) or in ms (12ms)",
)
@option("--latency-threads", type=INT, default=1, help="threads of the engine for --latency-budget (default: 1)")
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
    help="factor of the KL of activations (default: 4)",
)
def command(
    config: RunConfig,
    activations: bool,
    max_bytes: float | None,
    max_bitops: float | None,
    latency_budget: str | None,
    latency_threads: int,
    candidates: tuple[int, ...],
    activation_factor: float,
) -> None:
    """Choose the bits of each layer's weights and activations that minimize the KL to the teacher within budgets.

    No data is needed: one tensor at a time is quantized, at each candidate bit-width, and the KL to the teacher is
    measured on the run's synthetic images (synthesized first if they are not stored yet); then the allocation with the
    smallest sum is chosen. The KL of activations has a larger factor, since fine-tuning compensates the rounding of
    weights. Tensors whose bits are set by name, or by first_bits or last_bits, keep them. Writes
    <output_dir>/<name>-mixed-precision-<digest>/: scan.csv, the KL of every tensor at every bit-width, and
    settings.json, the same run with the chosen bits in quant.layer_weight_bits and quant.layer_act_bits.

    For an engine (quant.target) the bytes are those of its file, and every operation must have a form there. With
    --latency-budget each layer is timed in the engine at each bit-width, once for a processor and engine version
    (<output_dir>/layer-times/), and the file of the result next to those of W8A8 and float (latency.json).
    """
    from synq.mixed_precision.latency import parse_budget
    from synq.mixed_precision.search import SearchOptions, search

    options = SearchOptions(
        candidates=sorted(set(candidates)),
        activations=activations,
        activation_factor=activation_factor,
        max_bytes=max_bytes,
        max_bitops=max_bitops,
        latency=None if latency_budget is None else parse_budget(latency_budget, latency_threads),
    )
    found = search(config, options)
    if found is not None:
        settings, table = found
        print(table, end="")
        print(f"synq train --config {shlex.quote(str(settings))}", flush=True)


main = command.run
