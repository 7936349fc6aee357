#!/usr/bin/env python3
"""Measure the speed of this machine and of SynQ on it: `synq/commands/bench.py [--only GROUP ...] [--output-dir DIR] ...`."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser
from synq.sweeps.benchmarks.launcher import WorkerError
from synq.train import USER_ERROR, report_error

if TYPE_CHECKING:
    from synq.sweeps.benchmarks.table import Context, Row

GROUPS = {
    "ceilings": "What the machine can do: matrix product, memory, and each kernel's share of it",
    "steps": "A fine-tuning step",
    "options": "Layout, number format, compilation",
    "synthesis": "Synthesis",
    "curves": "Cost curves and memory",
    "population": "Several students in one process",
    "processes": "Two processes (DDP)",
    "sweep": "Trials side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure ratios side by side in one process, alternating, and print and write a table with their spread.

    Random weights and images: nothing is downloaded. All groups take about half an hour on two CPU cores. Exit code 0: measured (a missed
    target is a figure, not an error), 1: a process of it failed, 2: the words were refused.
    """
    listing = "; ".join(f"{name}: {title.lower()}" for name, title in GROUPS.items())
    parser = Parser(prog="synq bench", description=main.__doc__, epilog=listing)
    parser.add_argument("--only", metavar="GROUP", nargs="+", choices=GROUPS, help="groups to measure (default: all)")
    parser.add_argument("--skip", metavar="GROUP", nargs="+", choices=GROUPS, default=[], help="groups to leave out")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads (default: what PyTorch takes, one per core)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="rounds of each comparison (default: 9)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights and images (default: 0)")
    parser.add_argument(
        "--output-dir", metavar="DIR", default="runs/bench", help="for bench.json and bench.md (default: runs/bench)"
    )
    words = parser.parse_args(argv)
    if words.rounds < 1 or (words.threads is not None and words.threads < 1):
        report_error(ValueError(f"--rounds and --threads must be >= 1, but got {words.rounds} and {words.threads}"))
        return USER_ERROR
    chosen = [name for name in (words.only or GROUPS) if name not in words.skip]
    try:
        measure(chosen, words)
    except (ValueError, OSError) as error:
        report_error(error)
        return USER_ERROR
    except WorkerError as error:
        report_error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def measure(chosen: Iterable[str], words: argparse.Namespace) -> None:
    """Measure the chosen groups; what is there is written after each, so that an interrupted benchmark leaves its part."""
    import torch

    from synq.config.run import RuntimeConfig
    from synq.runs.record import write_bytes_atomic, write_json_atomic
    from synq.runtime import make_accelerator
    from synq.sweeps.benchmarks.table import Context, as_json, machine, markdown

    device = make_accelerator(RuntimeConfig(device=words.device, num_threads=words.threads)).device
    context = Context(device=device, threads=torch.get_num_threads(), rounds=words.rounds, seed=words.seed)
    folder = Path(words.output_dir)
    facts, done = machine(context), []
    write_json_atomic(
        folder / "bench.json", as_json([], facts)
    )  # a folder that cannot be written is told before the work
    for name in chosen:
        torch.manual_seed(context.seed)
        started, rows = time.perf_counter(), []
        print(f"\n{GROUPS[name]}", flush=True)
        for row in _rows_of(name)(context):
            rows.append(row)
            what, value, spread, target, _ = row.cells()
            print(
                f"  {what}: {value}" + (f" ({spread})" if spread else "") + (f"   [{target}]" if target else ""),
                flush=True,
            )
        if not rows:
            print("  nothing to measure on this device")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        done.append((GROUPS[name], rows))
        write_json_atomic(folder / "bench.json", as_json(done, facts))
        write_bytes_atomic(folder / "bench.md", markdown(done, facts).encode())
    missed = [row for _, rows in done for row in rows if row.verdict() == "NO"]
    print(
        f"\n{folder / 'bench.md'} | {sum(row.target is not None for _, rows in done for row in rows)} targets, {len(missed)} missed"
    )


def _rows_of(name: str) -> "Callable[[Context], Iterable[Row]]":
    """Return the function that measures one group; only what is asked for is imported."""
    function: Callable[[Context], Iterable[Row]] = importlib.import_module(f"synq.sweeps.benchmarks.{name}").rows
    return function


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's threads may otherwise hold the process after the work is done
