"""`synq recipe`: fixed settings on several seeds, compared with baselines."""

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
@option(
    "--spec", metavar="SPEC", required=True, help="file of a recipe; --spec may be omitted if it is the first argument"
)
@option("--seeds", several=True, type=INT, help="seeds of data and training (default: those of the file)")
@option(
    "--rows",
    several=True,
    metavar="ROW",
    help="some of: naive noise real inputs recipe (default: the recipe and all baselines that differ from it)",
)
@option("--jobs", type=INT, default=1, help="concurrent runs, which share the CPU cores (default: 1)")
def command(spec: str, seeds: tuple[int, ...], rows: tuple[str, ...], jobs: int, overrides: dict[str, Any]) -> None:
    """Run a recipe on its seeds and print a table with the baselines: round to nearest, noise, real images.

    Settings of `synq train` override those of the recipe, such as folders and device; if a setting changes the results,
    they are not compared with the expected metrics of the file. Tables of all finished runs of the recipe are written
    to <output_dir>/<name>; another teacher, or other settings, have a separate folder, <name>-MODEL-DIGEST, and
    another teacher no expected or published metrics. The same command resumes a recipe that was stopped; finished runs
    are not repeated.
    """
    from synq.runs.record import summary_line
    from synq.sweeps.studies.expected import compare
    from synq.sweeps.studies.pool import run_all
    from synq.sweeps.studies.recipes import load_recipe, markdown, plan, table, write_tables
    from synq.sweeps.studies.settings_file import check_overrides
    from synq.sweeps.studies.study_folder import same_result, same_teacher, tables_folder, with_finished

    recipe = load_recipe(spec)
    written = recipe.base()
    base = make_absolute(with_overrides(written, check_overrides(overrides)))
    runs = plan(base, seeds or recipe.seeds, list(rows) or None, recipe.real_images)
    records = run_all(
        runs, jobs, lambda cell, record: print(f"{cell[0]} seed {cell[1]}: {summary_line(record)}", flush=True)
    )
    all_seeds = dict.fromkeys([*recipe.seeds, *seeds])
    records = with_finished(runs, records, plan(base, list(all_seeds), None, recipe.real_images))
    its_own = same_teacher(written, base)  # other networks have no expectation in this file
    lines = table(records, recipe.published if its_own else None)
    comparison = ""
    if recipe.expected is not None and its_own:
        comparison = compare(recipe.expected, records, same_result(written, base))
    folder = tables_folder(base.name, written, base, next(iter(records.values())).model)
    write_tables(folder, lines, comparison)
    print(markdown(lines, comparison), end="")
    print(folder / "recipe.csv", flush=True)


main = command.run
