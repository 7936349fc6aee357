#!/usr/bin/env python3
"""What each idea buys on one teacher: `launch/ablate.py --config FILE [--bits W4A4 W3A3] [--seeds 0 1 2] [--finetune.lr 0.01 ...]`."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sweeps.ablation import ROWS, Cell, markdown, plan, run_all, table, write_tables
from synq.configs import make_absolute
from synq.results import RunRecord, summary_line
from synq.train import USER_ERROR, read_command_line, report_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration with filter, CAM and masking switched off in turn, on shared seeds, and print the paired table.

    The configuration must have all three on. Every other word is a setting of the run, as for synq/train.py. The same command
    resumes an ablation that was stopped.
    """
    parser = argparse.ArgumentParser(prog="ablate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--bits", nargs="+", default=["W4A4", "W3A3"], help="bit-widths (default: W4A4 W3A3)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of data and training (default: 0 1 2)"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"some of: {', '.join(ROWS)}")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, the cores divided between them (default: 1)"
    )
    arguments, words = parser.parse_known_args(argv)
    try:
        config, _ = read_command_line(words)
        config = make_absolute(config)
        runs = plan(config, arguments.bits, arguments.seeds, arguments.rows)
        records = run_all(runs, arguments.jobs, _say)
        lines = table({cell: records[cell] for cell in runs})
        folder = Path(config.runtime.output_dir)
        write_tables(folder, lines)
    except (ValueError, OSError) as error:
        report_error(error)
        return USER_ERROR
    except BrokenProcessPool:
        report_error(
            RuntimeError(
                "a run's process died (too little memory?); the same command goes on, fewer `--jobs` need less"
            )
        )
        return 1
    except RuntimeError as error:
        from synq.finetune import NonFiniteLossError  # torch, which a refused command line need not wait for

        if not isinstance(error, NonFiniteLossError):
            raise
        report_error(error)
        return 1
    except KeyboardInterrupt:
        print("synq: interrupted; the same command resumes", file=sys.stderr, flush=True)
        return 130
    print(markdown(lines), end="")
    print(folder / "ablation.csv", flush=True)
    return 0


def _say(cell: Cell, record: RunRecord) -> None:
    label, row, seed = cell
    print(f"{label} seed {seed} {row}: {summary_line(record)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
