"""`synq synthesize`: only the synthetic images of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from synq.config.budget import planned_keys
from synq.config.command_line import Command, GivenSettings
from synq.config.command_options import OneOf, budget_options, config_option, option
from synq.config.parsing import load_config
from synq.config.run import RunConfig
from synq.synthesis.calibration_scripts import SCRIPTS
from synq.train import TEACHER_SETTINGS, on_every_process

if TYPE_CHECKING:
    from accelerate import Accelerator

COMMON = (
    *TEACHER_SETTINGS,
    *("synthesis.method", "synthesis.num_images", "synthesis.iterations"),
    *("data_seed", "runtime.output_dir"),
)
TOOLS = tuple(SCRIPTS)
EXAMPLES = """\
  %(prog)s torchvision:resnet18 --teacher.weights IMAGENET1K_V1 --synthesis.num_images 256
  %(prog)s --config run.toml --npz images.npz
  %(prog)s --config run.toml --for onnxruntime --folder calibration"""


@click.command("synthesize", cls=Command, settings="run", common=COMMON, examples=EXAMPLES, resumes=True)
@config_option
@budget_options
@option(
    "--npz",
    metavar="FILE.npz",
    rule="name a file that ends in .npz",
    help="also write the training images for calibration by other tools: arrays `images` (N, C, H, W) float32, "
    "normalized as network input, `labels` (N,), `mean` and `std` per channel",
)
@option(
    "--for",
    "tool",
    metavar="TOOL",
    type=OneOf(*TOOLS),
    rule=f"be one of {', '.join(TOOLS)}",
    help=f"also write the images as another quantizer reads them, with a script: {', '.join(TOOLS)}",
)
@option("--folder", metavar="FOLDER", rule="name a folder", help="output folder of --for (calibration-TOOL)")
def command(
    config: RunConfig,
    quality: str | None,
    max_minutes: float | None,
    npz: str | None,
    tool: str | None,
    folder: str | None,
) -> int:
    """Synthesize the training and held-out images of a run, and stop.

    `synq train` with the same settings finds them in the store. All settings of a run are accepted; the images depend
    on teacher, synthesis, data_seed and evaluation.heldout_images. As in `synq train`, --quality chooses how many there
    are, unless the settings do.
    """
    if npz is not None and not npz.endswith(".npz"):
        raise ValueError(f"`npz` must name a file that ends in .npz, but got {npz!r}")
    if folder is not None and tool is None:
        raise ValueError("`folder` must come with `for`, whose output it names, but got no `for`")
    output = Path(folder or f"calibration-{tool}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"`folder` must be a folder, but {output} is a file; choose another name")

    given: GivenSettings = click.get_current_context().obj
    keys = planned_keys(given.overrides, *map(load_config, given.files))

    def work(accelerator: "Accelerator") -> tuple[list[str], list[str]]:
        from synq.budget import budgeted
        from synq.pipeline import prepare
        from synq.synthesis.calibration import write_calibration
        from synq.synthesis.npz import write_npz
        from synq.teacher.teacher import load_teacher

        chosen, _ = budgeted(config, quality, max_minutes, keys, accelerator=accelerator)
        sets = prepare(chosen, accelerator=accelerator)
        lines = [f"{part.path} | {len(part.labels)} images" for part in sets]
        if npz is not None and accelerator.is_main_process:
            write_npz(npz, sets[0], load_teacher(config.teacher))
            lines.append(f"{npz} | {len(sets[0].labels)} images")
        if tool is not None and accelerator.is_main_process:
            written = write_calibration(output, tool, sets[0], load_teacher(config.teacher))
            lines.append(f"{' and '.join(map(str, written))} | {len(sets[0].labels)} images")
        return lines, []

    return on_every_process(config, work)


main = command.run
