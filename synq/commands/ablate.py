#!/usr/bin/env python3
"""What each idea buys on one teacher: `synq/commands/ablate.py [SPEC | --config FILE] [--bits W4A4 W3A3] [--seeds 0 1 2] [--finetune.lr 0.01 ...]`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, exit_code
from synq.config.run import RunConfig, load_run, make_absolute, with_overrides
from synq.runs.record import RunRecord, summary_line
from synq.sweeps.studies.ablation import ROWS, AblationSpec, Cell, load_ablation, markdown, plan, table, write_tables
from synq.sweeps.studies.pool import run_all
from synq.sweeps.studies.settings_file import read_overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration with every combination of filter, CAM and soft labels, on shared seeds, and print the paired table.

    The configuration must have all three on. It comes from SPEC, a file that holds the whole ablation (tables go to
    <output_dir>/<name>), or from --config, a file of one run (tables go to <output_dir>). Every other word is a setting of the run,
    as for synq/train.py. The same command resumes an ablation that was stopped.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="ablate", usage="%(prog)s [SPEC] [options]", description=main.__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--spec", metavar="SPEC", help="file of an ablation; as the first word it needs no --spec")
    source.add_argument("--config", metavar="FILE", help="file of one run, as for synq/train.py")
    parser.add_argument("--bits", nargs="+", help="bit-widths (default: those of SPEC, or W4A4 W3A3)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="seeds of data and training (default: those of SPEC, or 0 1 2)"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help=f"some of: {', '.join(ROWS)} (default: those of SPEC, or all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, the cores divided between them (default: 1)"
    )
    arguments, rest = parser.parse_beside_settings(words, "--spec")
    return exit_code(lambda: _ablate(arguments, rest), resumes=True)


def _ablate(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    spec, folder = _read(arguments, words)
    bits, seeds, rows = (getattr(arguments, key) or getattr(spec, key) for key in ("bits", "seeds", "rows"))
    runs = plan(spec.base, bits, seeds, rows)
    records = run_all(runs, arguments.jobs, _say)
    lines = table({cell: records[cell] for cell in runs})
    write_tables(folder, lines)
    print(markdown(lines), end="")
    print(folder / "ablation.csv", flush=True)


def _read(arguments: argparse.Namespace, words: Sequence[str]) -> tuple[AblationSpec, Path]:
    """Return the ablation with absolute paths, and the folder of its tables."""
    overrides, path = read_overrides(words), arguments.config
    if arguments.spec is not None:
        spec = load_ablation(arguments.spec)
    else:
        config = load_run(path) if path else RunConfig()
        spec = AblationSpec(name=config.name, bits=("W4A4", "W3A3"), seeds=(0, 1, 2), base=config)
    base = make_absolute(with_overrides(spec.base, overrides))
    folder = Path(base.runtime.output_dir)
    return replace(spec, base=base), folder if arguments.spec is None else folder / base.name


def _say(cell: Cell, record: RunRecord) -> None:
    label, row, seed = cell
    print(f"{label} seed {seed} {row}: {summary_line(record)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
