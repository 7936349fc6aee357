"""`synq recipe`: chosen settings on several seeds, next to their baselines."""

from pathlib import Path
from typing import Any

import click

from synq.commands import run_failures
from synq.config.command_line import Command
from synq.config.command_options import INT, option
from synq.config.run import make_absolute, with_overrides

EXAMPLES = """\
  %(prog)s sweeps/specs/recipes/digits_resnet8_w3a3.toml
  %(prog)s sweeps/specs/recipes/cifar10_resnet20_a_w4a4.toml --jobs 2 --runtime.output_dir out
  %(prog)s SPEC --seeds 0 --rows recipe"""


@click.command(
    "recipe",
    cls=Command,
    settings="overrides",
    usage="SPEC [options] [--KEY VALUE ...]",
    first="--spec",
    common=("runtime.output_dir", "runtime.store_dir", "runtime.device", "runtime.num_threads", "evaluation.data_dir"),
    examples=EXAMPLES,
    resumes=True,
    failures=run_failures,
)
@option("--spec", metavar="SPEC", required=True, help="file of a recipe; as the first argument it needs no --spec")
@option("--seeds", several=True, type=INT, help="seeds of data and training (default: those of the file)")
@option(
    "--rows",
    several=True,
    metavar="ROW",
    help="some of: noise inputs recipe (default: all that differ from the recipe)",
)
@option("--jobs", type=INT, default=1, help="runs at a time, the cores divided between them (default: 1)")
def command(spec: str, seeds: tuple[int, ...], rows: tuple[str, ...], jobs: int, overrides: dict[str, Any]) -> None:
    """Run a recipe on its seeds, next to rounding to nearest, noise images and low-bit inputs, and print the table.

    Settings of the run are those of `synq train`: folders, device, or a change of the recipe (then it is no longer
    compared with the metrics that the file expects). Tables go to <output_dir>/<name>. The same command resumes a
    recipe that was stopped; finished runs are only read.
    """
    from synq.runs.record import summary_line
    from synq.sweeps.studies.pool import run_all
    from synq.sweeps.studies.recipes import compare, load_recipe, markdown, plan, same_result, table, write_tables
    from synq.sweeps.studies.settings_file import check_overrides

    recipe = load_recipe(spec)
    written = recipe.base()
    base = make_absolute(with_overrides(written, check_overrides(overrides)))
    runs = plan(base, seeds or recipe.seeds, list(rows) or None)
    records = run_all(
        runs, jobs, lambda cell, record: print(f"{cell[0]} seed {cell[1]}: {summary_line(record)}", flush=True)
    )
    records = {cell: records[cell] for cell in runs}
    lines = table(records, recipe.published)
    comparison = ""
    if recipe.expected is not None:
        comparison = compare(recipe.expected, records, same_result(written, base))
    folder = Path(base.runtime.output_dir) / base.name
    write_tables(folder, lines, comparison)
    print(markdown(lines, comparison), end="")
    print(folder / "recipe.csv", flush=True)


main = command.run
