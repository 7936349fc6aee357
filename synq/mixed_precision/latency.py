"""A latency as a limit of a mixed-precision search: the budget, the constraint, and what the chosen file takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synq.config.quant import BY_RULES, RESEARCH, QuantConfig
from synq.config.run import RunConfig
from synq.engines.deployed import program_of
from synq.engines.program import Program
from synq.export.targets.formats import TargetFormat, format_of
from synq.mixed_precision.ilp import Key, Limit
from synq.mixed_precision.layer_times import BASE_BITS, LayerTimes, file_times, measure_layers
from synq.mixed_precision.profiles import layer_profile
from synq.quant.student import build_student, observe_ranges
from synq.teacher.teacher import Teacher

BASE, MIXED, FLOAT = "w8a8", "mixed", "float"
"""Names of the timed files."""
NAME = "latency-budget"


@dataclass(frozen=True, kw_only=True)
class LatencyBudget:
    """Largest latency of the file that is wanted.

    Attributes:
        amount: > 0.
        in_ms: Whether it is in milliseconds, else relative to the W8A8 file.
        threads: Threads of the engine.
    """

    amount: float
    in_ms: bool
    threads: int = 1

    def milliseconds(self, base: float) -> float:
        """Return the budget in ms.

        Args:
            base: Latency of the W8A8 file in ms.
        """
        return self.amount if self.in_ms else self.amount * base


def parse_budget(text: str, threads: int = 1) -> LatencyBudget:
    """Return the budget that a text has: "0.9" (of the W8A8 file) or "12ms".

    Raises:
        ValueError: If it is neither, or not above 0; or there is no thread.
    """
    number, in_ms = text.strip().removesuffix("ms").strip(), text.strip().endswith("ms")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise ValueError(
            f"`{NAME}` must be a number above 0, relative to the W8A8 file, or milliseconds such as 12ms, but got "
            f"{text}"
        )
    if threads < 1:
        raise ValueError(f"`latency-threads` must be at least 1, but got {threads}")
    return LatencyBudget(amount=amount, in_ms=in_ms, threads=threads)


def latency_format(quant: QuantConfig) -> TargetFormat:
    """Return the format whose engine measures the latency.

    Raises:
        ValueError: If the target is no engine or one that does not run here, or a package is missing.
    """
    if quant.target in (RESEARCH, *BY_RULES):
        raise ValueError(
            f"`{NAME}` must have an engine to be measured in, but `quant.target` is {quant.target}: set it to "
            "onnxruntime, openvino, litert or executorch"
        )
    return format_of(quant.target)


@dataclass(frozen=True, kw_only=True)
class MeasuredLatency:
    """The times that a search with a latency budget is made with.

    Attributes:
        budget: The budget.
        base: Latency of the W8A8 file in ms.
        times: Of its steps.
        form: Format of the target.
        program: The W8A8 program.
    """

    budget: LatencyBudget
    base: float
    times: LayerTimes
    form: TargetFormat
    program: Program

    def limit(self) -> Limit:
        """Return the constraint: the predicted latency of a choice must not exceed the budget."""
        single = {key: dict(changes) for key, changes in self.times.changes.items()}
        first = next(iter(single))
        single[first] = {bits: self.base + change for bits, change in single[first].items()}
        return Limit(name=NAME, most=self.budget.milliseconds(self.base), unit="ms", single=single)

    def report(self, config: RunConfig, teacher: Teacher, images: Tensor, chosen: Mapping[Key, int]) -> dict[str, Any]:
        """Time the file of a choice next to the W8A8 and the float file, and return it next to the prediction.

        Args:
            config: The run with the chosen bit-widths.
            teacher: Its teacher.
            images: (N, C, H, W), to observe ranges on.
            chosen: The chosen bit-widths.

        Returns:
            Plain JSON values; times in ms, ratios to the W8A8 file.

        Raises:
            ValueError: If an operation has no form in the engine.
        """
        program = _program(config.quant, teacher, images)
        contents = {
            BASE: self.form.write(self.program),
            MIXED: self.form.write(program),
            FLOAT: self.form.write_float(teacher.graph, program),
        }
        found = file_times(contents, program, self.form, threads=self.budget.threads)
        predicted = self.times.predicted(self.base, chosen)
        profile = layer_profile(contents[MIXED], program, self.form, threads=self.budget.threads)
        return {
            "target": config.quant.target,
            "engine": self.form.engine,
            "machine": dict(self.times.machine),
            "budget_ms": self.budget.milliseconds(self.base),
            "w8a8_ms": found[BASE],
            "float_ms": found[FLOAT],
            "predicted_ms": predicted,
            "predicted_ratio": predicted / self.base,
            "measured_ms": found[MIXED],
            "measured_ratio": found[MIXED] / found[BASE],
            "steps": list(self.times.rows),
            "profile_ms": profile.milliseconds,
            "profile": profile.lines(),
        }


def measure_latency(
    config: RunConfig,
    teacher: Teacher,
    images: Tensor,
    options: Mapping[Key, Sequence[int]],
    budget: LatencyBudget,
) -> MeasuredLatency:
    """Time the W8A8 file of a student, and each of its steps at the bit-widths to choose from.

    Times of steps are kept in ``<output_dir>/layer-times/`` for later searches.

    Args:
        config: The run.
        teacher: Its teacher.
        images: (N, C, H, W), to observe ranges on, which no time depends on but by the zero point of a ReLU.
        options: Bit-widths by tensor.
        budget: The budget.

    Raises:
        ValueError: If an operation has no form in the engine, or a package is missing.
    """
    form = latency_format(config.quant)
    program = _program(config.quant.at_uniform_bits(BASE_BITS), teacher, images)
    cache = Path(config.runtime.output_dir) / "layer-times"
    times = measure_layers(
        program, form, options, cache, threads=budget.threads, progress=config.runtime.progress is not False
    )
    base = file_times({BASE: form.write(program)}, program, form, threads=budget.threads)[BASE]
    return MeasuredLatency(budget=budget, base=base, times=times, form=form, program=program)


def latency_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the result of `MeasuredLatency.report` in lines: the machine, what bit-widths change, and the file."""
    about = found["machine"]
    threads = about["threads"]
    lines = [
        f"latency in {found['engine']} on {about['cpu']}, {threads} thread{'' if threads == 1 else 's'}: W8A8 "
        f"{found['w8a8_ms']:.4g} ms, float {found['float_ms']:.4g} ms"
    ]
    for role, what in (("weight", "weights"), ("activation", "activations")):
        rows = [row for row in found["steps"] if row["role"] == role and row["bits"] != BASE_BITS]
        changed = [1000 * row["change_ms"] for row in rows if row["change_ms"]]
        if changed:
            lines.append(
                f"bits of {what} below 8 change the time of {len(changed)} of {len(rows)} timed forms, by "
                f"{min(changed):+.3g} to {max(changed):+.3g} us"
            )
        elif rows:
            lines.append(f"no bit-width of {what} changes the time of a layer here")
    lines.append(
        f"chosen:  predicted {found['predicted_ms']:.4g} ms ({found['predicted_ratio']:.3f} of W8A8), measured "
        f"{found['measured_ms']:.4g} ms ({found['measured_ratio']:.3f})"
    )
    lines += found["profile"]
    if found["measured_ms"] > found["budget_ms"]:
        lines.append(
            f"the measured file takes more than the budget of {found['budget_ms']:.4g} ms: give a lower --{NAME}"
        )
    return lines


@torch.no_grad()
def _program(quant: QuantConfig, teacher: Teacher, images: Tensor) -> Program:
    """Return the program of a student with rounded weights and the ranges of some images."""
    plain = replace(quant, weight_range="minmax", act_range="minmax", learned_steps="none", rounding="nearest")
    student = build_student(teacher, plain)
    net = student.net.to("cpu").float()
    observe_ranges(net, images.to("cpu").float(), act_range="minmax")
    return program_of(net, plain, teacher.input_size)
