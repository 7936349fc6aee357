#!/usr/bin/env python3
"""A chosen setting on several seeds, beside its baselines: `synq/commands/recipe.py SPEC [--seeds 0 1 2] [--jobs N] [--rows ...] [--KEY VALUE ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, exit_code
from synq.config.run import make_absolute, with_overrides
from synq.runs.record import RunRecord, summary_line
from synq.sweeps.studies.pool import run_all
from synq.sweeps.studies.recipes import (
    ROWS,
    Cell,
    compare,
    load_recipe,
    markdown,
    plan,
    same_result,
    table,
    write_tables,
)
from synq.sweeps.studies.settings_file import read_overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe in SPEC on its seeds, with plain rounding, noise for images and low-bit inputs beside it, and print the table.

    Every other word is a setting of the run, as for synq/train.py: folders, device, or a change of the recipe (then it is no longer
    compared with the figures that the file expects). Tables go to <output_dir>/<name>. The same command resumes a recipe that was
    stopped; finished runs are only read.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="synq recipe", usage="%(prog)s SPEC [options]", description=main.__doc__)
    parser.add_argument(
        "--spec", metavar="SPEC", required=True, help="file of a recipe; as the first word it needs no --spec"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of data and training (default: those of the file)")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help=f"some of: {' '.join(ROWS)} (default: all that differ from the recipe)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, the cores divided between them (default: 1)"
    )
    arguments, rest = parser.parse_beside_settings(words, "--spec")
    return exit_code(lambda: _cook(arguments, rest), resumes=True)


def _cook(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    recipe = load_recipe(arguments.spec)
    written = recipe.base()
    base = make_absolute(with_overrides(written, read_overrides(words)))
    runs = plan(base, arguments.seeds or recipe.seeds, arguments.rows)
    records = run_all(runs, arguments.jobs, _say)
    records = {cell: records[cell] for cell in runs}
    lines = table(records, recipe.published)
    comparison = ""
    if recipe.expected is not None:
        comparison = compare(recipe.expected, records, same_result(written, base))
    folder = Path(base.runtime.output_dir) / base.name
    write_tables(folder, lines, comparison)
    print(markdown(lines, comparison), end="")
    print(folder / "recipe.csv", flush=True)


def _say(cell: Cell, record: RunRecord) -> None:
    row, seed = cell
    print(f"{row} seed {seed}: {summary_line(record)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
