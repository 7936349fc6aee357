"""Measured time of each step of a student at each bit-width, in the engine of its target.

    milliseconds of a file  =  milliseconds of the W8A8 file  +  sum over tensors of (step at b bits - step at 8 bits)

Each step is timed alone, as a separate file, at all bit-widths in turns; the smallest of many times counts. What
differs by less than the times vary, or not again with all files opened anew, differs by nothing: engines that keep
every code in a byte run the same kernel. The limits of codes below 8 bits are one kernel with other constants, which is
timed once.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synq.common.files import read_json, write_json_atomic
from synq.common.progress import Bar, visible
from synq.engines.program import Grid, Layer, Program, Step
from synq.export.targets.formats import TargetFormat, image_size
from synq.export.timing import Latency, machine, run_latencies
from synq.mixed_precision.ilp import Key
from synq.mixed_precision.single_steps import signature, single_step, with_output_bits, with_weight_bits

ROUNDS = 25
"""Timed rounds of each step, of which the fastest counts."""
LEAST_CHANGE = 0.02
"""Smallest difference from 8 bits, relative to the step's time, that is not taken for noise."""
BASE_BITS = 8


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Times of the tensors of a student.

    Attributes:
        changes: Milliseconds more than at 8 bits, by tensor and bit-width; 0 where none was measured.
        rows: For each timed step: layer, role, bits, ms and change_ms.
        machine: Processor, threads and versions of the engines.
    """

    changes: Mapping[Key, Mapping[int, float]]
    rows: Sequence[dict[str, Any]]
    machine: Mapping[str, Any]

    def predicted(self, base: float, chosen: Mapping[Key, int]) -> float:
        """Return the milliseconds of a file.

        Args:
            base: Of the W8A8 file.
            chosen: Bit-candidates.
        """
        return base + sum(self.changes.get(key, {}).get(bits, 0.0) for key, bits in chosen.items())


def measure_layers(
    program: Program,
    form: TargetFormat,
    options: Mapping[Key, Sequence[int]],
    cache: Path,
    *,
    threads: int = 1,
    rounds: int = ROUNDS,
    progress: bool = False,
) -> LayerTimes:
    """Time each step of a W8A8 program at the bit-widths that its tensors may have.

    Args:
        program: The W8A8 program, with observed ranges.
        form: Format of its target.
        options: Bit-candidates by tensor.
        cache: Folder of measured times: one file for each target, processor, engine version and number of threads, so
            that nothing is measured twice.
        threads: Threads of the engine; with one, processor time is measured.
        rounds: Timed rounds, >= 1.
        progress: Whether a terminal shows a progress bar.
    """
    about = machine(threads)
    path = cache / f"{program.target}-{hashlib.sha256(json.dumps([about, rounds]).encode()).hexdigest()[:12]}.json"
    known: dict[str, dict[str, float]] = read_json(path)["steps"] if path.exists() else {}
    changes: dict[Key, dict[int, float]] = {}
    rows = []
    for key, candidates in Bar(options.items(), desc="layer times", **visible(progress, leave=False)):
        total = dict.fromkeys(candidates, 0.0)
        for step in _steps_of(program, key):
            variants = {bits: _variant(program, step, key, bits) for bits in sorted({*candidates, BASE_BITS})}
            times = _times(variants, form, known, threads, rounds)
            for bits in total:
                total[bits] += times[bits]["change_ms"]
            rows += [{"layer": step.layer, "role": key[0], "bits": bits, **found} for bits, found in times.items()]
        changes[key] = total
    write_json_atomic(path, {"machine": about, "rounds": rounds, "steps": known})
    return LayerTimes(changes=changes, rows=rows, machine=about)


def file_times(
    contents: Mapping[str, bytes], program: Program, form: TargetFormat, *, threads: int = 1, rounds: int = 2 * ROUNDS
) -> dict[str, float]:
    """Return the smallest time of whole files in ms, taken in turns on one image.

    Args:
        contents: Files by name.
        program: One of their programs, for the size of an image.
        form: Their format.
        threads: Threads of the engine.
        rounds: Timed rounds, >= 1.
    """
    found = _latencies(contents, program, form, threads, rounds)
    return {name: min(latency.rounds) for name, latency in found.items()}


def _steps_of(program: Program, key: Key) -> list[Step]:
    """Return the calls of a layer, or the step that rounds an activation."""
    role, name = key
    if role == "weight":
        return [step for step in program.steps if isinstance(step, Layer) and step.layer == name]
    return [step for step in program.steps if step.output == name]


def _variant(program: Program, step: Step, key: Key, bits: int) -> Program:
    grid = program.grids.get(step.output)
    if key[0] == "weight":
        assert isinstance(step, Layer)
        return single_step(program, with_weight_bits(step, bits), grid)
    assert isinstance(grid, Grid)
    return single_step(program, *with_output_bits(step, grid, bits))


def _times(
    variants: Mapping[int, Program], form: TargetFormat, known: dict[str, dict[str, float]], threads: int, rounds: int
) -> dict[int, dict[str, float]]:
    """Return ``ms`` and ``change_ms`` of each variant of a step; measured ones are added to ``known``."""
    names = {bits: signature(program) for bits, program in variants.items()}
    # All variants of a step are timed in the same turns, so a missing one brings the others with it.
    if not all(name in known for name in names.values()):
        contents = {name: form.write(variants[bits]) for bits, name in names.items()}
        base = names[BASE_BITS]
        found = _latencies(contents, variants[BASE_BITS], form, threads, rounds)
        changes = {name: _change(own, found[base]) for name, own in found.items()}
        if any(changes.values()):  # where its memory is also changes the time of an opened file: open all again
            again = _latencies(contents, variants[BASE_BITS], form, threads, rounds)
            changes = {name: _smaller(change, _change(again[name], again[base])) for name, change in changes.items()}
        known |= {name: {"ms": min(own.rounds), "change_ms": changes[name]} for name, own in found.items()}
    return {bits: known[name] for bits, name in names.items()}


def _change(own: Latency, base: Latency) -> float:
    """Return how much longer a variant takes in ms; 0 unless most rounds agree that it differs."""
    change = min(own.rounds) - min(base.rounds)
    pairs = [a - b for a, b in zip(own.rounds, base.rounds, strict=True)]
    if len(pairs) > 1:
        low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
        if low <= 0 <= high or (low > 0) != (change > 0):
            return 0.0
    return change if abs(change) > LEAST_CHANGE * min(base.rounds) else 0.0


def _smaller(first: float, second: float) -> float:
    """Return the smaller of two changes; 0 if one is 0 or their signs differ."""
    return min(first, second, key=abs) if first * second > 0 else 0.0


def _latencies(
    contents: Mapping[str, bytes], program: Program, form: TargetFormat, threads: int, rounds: int
) -> dict[str, Latency]:
    images = torch.randn(1, *image_size(program), generator=torch.Generator().manual_seed(0))

    def runner(content: bytes) -> Callable[[], object]:
        engine = form.open(content, threads)
        return lambda: engine(images)

    return run_latencies({name: runner(content) for name, content in contents.items()}, threads=threads, rounds=rounds)
