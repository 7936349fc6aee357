"""The benchmark run of `synq bench`: measure groups of benchmarks and write their table."""

import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch

from synq.common.files import write_json_atomic, write_text_atomic
from synq.config.run import RuntimeConfig
from synq.runtime import make_accelerator

from .table import Context, Row, as_json, machine, markdown

GROUPS = {
    "ceilings": "Hardware limits: matrix product, memory, and the share that each kernel reaches",
    "steps": "A fine-tuning step",
    "options": "Layout, number format, compilation",
    "synthesis": "Synthesis",
    "curves": "Cost curves and memory",
    "population": "Several students in one process",
    "processes": "Two processes (DDP)",
    "sweep": "Concurrent trials",
    "engines": "Integer files in their engines",
}


def measure(
    groups: Iterable[str],
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    rounds: int = 9,
    seed: int = 0,
    engines: tuple[str, ...] = (),
    networks: tuple[str, ...] = (),
    output_dir: str | Path = "runs/bench",
) -> None:
    """Measure groups of benchmarks, print them, and write bench.json and bench.md after each group.

    Args:
        groups: Names of groups (`GROUPS`).
        device: Device; auto uses a GPU if there is one.
        threads: CPU threads; None uses PyTorch's default.
        rounds: Timed rounds of each comparison.
        seed: Seed of weights and images.
        engines: Targets that the group engines measures; empty: those whose engines are installed.
        networks: Networks that the same group measures; empty: all.
        output_dir: Folder of bench.json and bench.md.

    Raises:
        OSError: The folder is not writable.
        WorkerError: A worker process failed.
    """
    accelerator = make_accelerator(RuntimeConfig(device=device, num_threads=threads))
    context = Context(
        device=accelerator.device,
        threads=torch.get_num_threads(),
        rounds=rounds,
        seed=seed,
        engines=engines,
        networks=networks,
    )
    folder, facts, done = Path(output_dir), machine(context), []
    # A folder that cannot be written is reported before the work.
    write_json_atomic(folder / "bench.json", as_json([], facts))
    for name in groups:
        torch.manual_seed(context.seed)
        started, rows = time.perf_counter(), []
        print(f"\n{GROUPS[name]}", flush=True)
        for row in rows_of(name)(context):
            rows.append(row)
            what, value, spread, target, _ = row.cells()
            suffix = (f" ({spread})" if spread else "") + (f"   [{target}]" if target else "")
            print(f"  {what}: {value}{suffix}", flush=True)
        if not rows:
            print("  nothing to measure on this device")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        done.append((GROUPS[name], rows))
        write_json_atomic(folder / "bench.json", as_json(done, facts))
        write_text_atomic(folder / "bench.md", markdown(done, facts))
    all_rows = [row for _, rows in done for row in rows]
    targets, missed = sum(row.target is not None for row in all_rows), sum(row.verdict() == "NO" for row in all_rows)
    print(f"\n{folder / 'bench.md'} | {targets} targets, {missed} missed")


def rows_of(name: str) -> Callable[[Context], Iterable[Row]]:
    """Return the function that measures a group, after importing only the module of that group."""
    function: Callable[[Context], Iterable[Row]] = importlib.import_module(f"{__package__}.{name}").rows
    return function
