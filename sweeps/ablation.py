"""What each idea of SynQ buys: the same run with filter, CAM and masking switched off in turn, paired on shared data seeds.

Every row of a bit-width is trained on the same synthetic sets with the same seeds, so a difference between rows is a
difference between ideas. Runs are ordinary runs: a stopped ablation goes on where it was, a finished one is only read.
"""

import csv
import io
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from synq.configs import RunConfig, parse_bits, with_overrides
from synq.results import RunRecord, write_text_atomic

Overrides = Mapping[str, Any]

ROWS: dict[str, Overrides] = {
    "SynQ, all on": {},
    "filter off": {"finetune.lowpass_cutoff": None},
    "CAM off": {"finetune.cam_weight": 0.0},
    "masking off": {"finetune.difficulty_threshold": 1.0},
    "all off": {
        "finetune.lowpass_cutoff": None,
        "finetune.cam_weight": 0.0,
        "finetune.difficulty_threshold": 1.0,
    },
    "all off, no hard labels": {
        "finetune.lowpass_cutoff": None,
        "finetune.cam_weight": 0.0,
        "finetune.ce_weight": 0.0,
    },
}
"""Rows by name. Masking off gives every image a hard label, as the methods before SynQ do; the last row is distillation alone."""
REFERENCE = "all off"
COLUMNS = (
    *(
        "bits",
        "protocol",
        "act_points",
        "row",
        "num_seeds",
        "teacher_top1",
        "rtn_top1",
        "top1_mean",
        "top1_std",
        "drop_mean",
    ),
    *("gain_over_all_off", "gain_stderr", "kl_mean", "kept_share", "num_eval", "seconds_mean"),
)
Cell = tuple[str, str, int]


def plan(
    base: RunConfig, bits: Sequence[str], seeds: Sequence[int], rows: Sequence[str] = tuple(ROWS)
) -> dict[Cell, RunConfig]:
    """Return the run of every (bits, row, seed); a seed drives both the synthetic set and the fine-tuning.

    Raises:
        ValueError: If an idea is already off in `base`, so that switching it off would compare a run with itself.
    """
    settings = base.finetune
    for name, off in (
        ("lowpass_cutoff", settings.lowpass_cutoff is None),
        ("cam_weight", settings.cam_weight == 0),
        ("ce_weight", settings.ce_weight == 0),
        ("difficulty_threshold", settings.difficulty_threshold >= 1),
    ):
        if off:
            raise ValueError(
                f"`finetune.{name}` must be on in the run that is ablated, but got {getattr(settings, name)}"
            )
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise ValueError(f"`rows` must be some of {', '.join(ROWS)}, but got {unknown[0]!r}")
    runs = {}
    for label in bits:
        weight_bits, act_bits = parse_bits(label)
        for seed in seeds:
            for row in rows:
                changes = {"quant.weight_bits": weight_bits, "quant.act_bits": act_bits, **ROWS[row]}
                config = with_overrides(base, {**changes, "seed": seed, "data_seed": seed})
                runs[label, row, seed] = config
    return runs


def run_all(
    runs: Mapping[Cell, RunConfig], jobs: int, on_done: Callable[[Cell, RunRecord], None]
) -> dict[Cell, RunRecord]:
    """Do all runs in `jobs` processes at a time, the cores divided between them; finished ones are only read.

    Raises:
        ValueError: If `jobs` is below 1.
        Exception: The first error of a run, after the runs under way have ended.
    """
    if jobs < 1:
        raise ValueError(f"`jobs` must be >= 1, but got {jobs}")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done: dict[Cell, RunRecord] = {}
    # Fresh interpreters: a forked torch may hang on the locks of threads that are gone.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[RunRecord], Cell] = {}
        for cell, config in runs.items():
            runtime = replace(config.runtime, num_threads=config.runtime.num_threads or threads, progress=False)
            waiting[pool.submit(_run_one, replace(config, runtime=runtime))] = cell
        try:
            for future in as_completed(waiting):
                done[waiting[future]] = future.result()
                on_done(waiting[future], future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def _run_one(config: RunConfig) -> RunRecord:
    os.environ["OMP_NUM_THREADS"] = str(config.runtime.num_threads)
    from synq.pipeline import run

    return run(config)


def table(records: Mapping[Cell, RunRecord]) -> list[dict[str, Any]]:
    """Return one line per (bits, row), in the order given.

    The gain is the mean over seeds of top1(row) - top1("all off") on the same seed, with the standard error of that
    mean: pairing takes out what the seeds share.
    """
    lines = []
    for label, row in dict.fromkeys((label, row) for label, row, _ in records):
        cells = {seed: r for (a, b, seed), r in records.items() if (a, b) == (label, row)}
        reference = {seed: r for (a, b, seed), r in records.items() if (a, b) == (label, REFERENCE)}
        gains = [
            r.top1 - other.top1
            for seed, r in cells.items()
            if (other := reference.get(seed)) is not None and r.top1 is not None and other.top1 is not None
        ]
        first = next(iter(cells.values()))
        paired = row != REFERENCE and bool(gains)
        lines.append(
            {
                "bits": label,
                "protocol": first.protocol,
                "act_points": first.act_points,
                "row": row,
                "num_seeds": len(cells),
                "teacher_top1": first.teacher_top1,
                "rtn_top1": _mean(r.rtn_top1 for r in cells.values()),
                "top1_mean": _mean(r.top1 for r in cells.values()),
                "top1_std": _std([r.top1 for r in cells.values()]),
                "drop_mean": _mean(r.drop for r in cells.values()),
                "gain_over_all_off": _mean(gains) if paired else None,
                "gain_stderr": _stderr(gains) if paired else None,
                "kl_mean": _mean(r.fidelity.get("kl") for r in cells.values()),
                "kept_share": _mean(r.kept_share for r in cells.values()),
                "num_eval": first.num_eval,
                "seconds_mean": _mean(r.seconds.get("finetune") for r in cells.values()),
            }
        )
    return lines


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    head = "| bits | row | seeds | RTN top-1 | top-1 | drop | gain over all off | held-out KL |"
    parts = [head, "|" + "---|" * 8]
    for line in lines:
        top1 = "-" if line["top1_mean"] is None else f"{line['top1_mean']:.2f} ± {line['top1_std'] or 0:.2f}"
        gain = (
            "-"
            if line["gain_over_all_off"] is None
            else f"{line['gain_over_all_off']:+.2f} ± {line['gain_stderr'] or 0:.2f}"
        )
        cells = (
            line["bits"],
            line["row"],
            line["num_seeds"],
            _show(line["rtn_top1"]),
            top1,
            _show(line["drop_mean"]),
            gain,
        )
        parts.append(f"| {' | '.join(map(str, cells))} | {_show(line['kl_mean'], 4)} |")
    return "\n".join(parts) + "\n"


def write_tables(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ablation.csv and ablation.md, by rename."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text_atomic(folder / "ablation.csv", text.getvalue())
    write_text_atomic(folder / "ablation.md", markdown(lines))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _stderr(values: Sequence[float]) -> float | None:
    spread = _std(values)
    return None if spread is None else spread / math.sqrt(len(values))


def _show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
