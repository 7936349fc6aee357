"""Mixed-precision search: the bit-width of each tensor, minimizing the KL to the teacher under size and BitOps limits.

Needs no real data: the KL to the teacher with a single tensor quantized, at each candidate bit-width, is measured on
the run's synthetic images; then the bit-widths with the smallest sum within the limits are chosen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from synq.common.files import write_json_atomic, write_text_atomic
from synq.common.progress import Bar, visible
from synq.common.text_tables import to_csv, to_text
from synq.config.parsing import between, require
from synq.config.run import RunConfig, config_digest, config_to_dict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from synq.mixed_precision.ilp import Key, Limit
    from synq.mixed_precision.latency import LatencyBudget
    from synq.mixed_precision.problem import MixedPrecisionProblem
    from synq.mixed_precision.sensitivity import Score
    from synq.quant.bit_patterns import Role
    from synq.teacher.teacher import Teacher

COLUMNS = ("tensor", "role", "bits", "kl", "sqnr_db", "numel", "macs")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Candidates and limits of a mixed-precision search.

    Attributes:
        candidates: Bit-widths to choose from, each in [2, 8].
        activations: Whether to choose the bit-widths of activations, too.
        activation_factor: Factor >= 0 of the KL of an activation in the sum; that of a weight has factor 1.
        max_bytes: Maximum size of the integer weights in bytes; None takes that of the given bit-widths.
        max_bitops: Maximum number of bit operations per image; None takes that of the given bit-widths if activations
            are chosen, else sets no limit.
        latency: Latency in the engine of the target; None sets no limit and measures nothing.
    """

    candidates: list[int]
    activations: bool
    activation_factor: float
    max_bytes: float | None
    max_bitops: float | None
    latency: "LatencyBudget | None" = None

    def __post_init__(self) -> None:
        for bits in self.candidates:
            between("candidates", bits, 2, 8)
        between("activation-factor", self.activation_factor, 0)
        for name, most in (("max-bytes", self.max_bytes), ("max-bitops", self.max_bitops)):
            require(name, "be a number >= 0", most, most is None or most >= 0)


def search(config: RunConfig, options: SearchOptions) -> tuple[Path, str] | None:
    """Choose the bit-width of each tensor; write the sensitivity scan and the resulting settings.

    Writes to <output_dir>/<name>-mixed-precision-<digest>/: scan.csv, every tensor at every bit-width, and
    settings.json, the same run with the chosen bit-widths in `quant.layer_weight_bits` and `quant.layer_act_bits`; with
    a latency budget also latency.json, the measured time of every step, and of the file next to the predicted one. The
    synthetic images are made first if they are not stored yet. The main process scans and writes; other processes only
    take part in the synthesis.

    Args:
        config: The run; its `quant` has the given bit-widths, and the limits if `options` has none.
        options: Candidates and limits.

    Returns:
        The settings file, and the scan with its sums as a table; None in all processes but the main one.

    Raises:
        ValueError: No bit-width is free, the limits cannot be met, or an operation has no form in the engine.
    """
    import torch

    from synq.engines.deployed import check_deployable
    from synq.mixed_precision.ilp import check_limits, choose_bits
    from synq.mixed_precision.latency import latency_format, latency_lines, measure_latency
    from synq.mixed_precision.problem import MixedPrecisionProblem
    from synq.pipeline import prepare
    from synq.quant.student import build_student
    from synq.runtime import make_accelerator, place
    from synq.synthesis.run_sets import low_pass
    from synq.teacher.teacher import load_teacher

    if options.latency is not None:
        latency_format(config.quant)
    accelerator, teacher = make_accelerator(config.runtime), load_teacher(config.teacher)
    student = build_student(teacher, config.quant)
    check_deployable(student.net, config.quant, teacher.input_size)
    problem = MixedPrecisionProblem(student, config.quant, activations=options.activations)
    if not problem.free:
        raise ValueError(
            "`quant` must leave a bit-width to choose, but all are set by name (`--quant.layer_weight_bits none` "
            "clears the names), `first_bits` or `last_bits`"
        )
    limits = [problem.bytes_limit(options.max_bytes), problem.bitops_limit(options.max_bitops)]
    if options.max_bitops is None and not options.activations:
        limits[1] = replace(limits[1], most=math.inf)
    check_limits(problem.bits_options(options.candidates), limits)
    train_set, _ = prepare(config, accelerator=accelerator)
    bit_widths = sorted({*options.candidates, *(problem.as_given[key] for key in problem.free)})
    if not accelerator.is_main_process:  # the main process alone shows the progress of the scan
        config = replace(config, runtime=replace(config.runtime, progress=False))
    images = low_pass(train_set.images[: config.quant.calib_images], config, pixel_range=teacher.pixel_range())
    measured = None
    if options.latency is not None and accelerator.is_main_process:  # before the scan: a limit may be out of reach
        possible = {
            key: sorted({*bits, problem.as_given[key]})
            for key, bits in problem.bits_options(options.candidates).items()
        }
        measured = measure_latency(config, teacher, images, possible, options.latency)
        limits.append(measured.limit())
        check_limits(problem.bits_options(options.candidates), limits)
    scores = _scan(config, teacher, images, bit_widths, accelerator.device, activations=options.activations)
    if not accelerator.is_main_process:
        return None

    kls: dict[Key, dict[int, float]] = {}
    for score in scores:
        kls.setdefault((score.role, score.name), {})[score.bits] = score.kl
    factors = {"weight": 1.0, "activation": options.activation_factor}
    losses = {key: {bits: factors[key[0]] * kl for bits, kl in by_bits.items()} for key, by_bits in kls.items()}
    chosen = choose_bits(problem.options(losses, options.candidates), limits, problem.tied)

    found = replace(config, quant=problem.with_bits(chosen))
    folder = Path(config.runtime.output_dir) / f"{config.name}-mixed-precision-{config_digest(found)}"
    sizes = {(row.role, row.name): row for row in student.rows}
    rows = [
        {"tensor": score.name, "role": score.role, "bits": score.bits, "kl": score.kl, "sqnr_db": score.sqnr_db}
        | {"numel": sizes[score.role, score.name].numel, "macs": sizes[score.role, score.name].macs}
        for score in scores
    ]
    write_text_atomic(folder / "scan.csv", to_csv(rows, COLUMNS))
    write_json_atomic(folder / "settings.json", config_to_dict(found))
    table = _table(problem, kls, losses, chosen, bit_widths, limits)
    if measured is not None:
        place(teacher.graph, config.runtime, torch.device("cpu"), teacher.input_size)
        latency = measured.report(found, teacher, images, chosen)
        write_json_atomic(folder / "latency.json", latency)
        table += "".join(f"{line}\n" for line in latency_lines(latency))
    return folder / "settings.json", table


def _scan(
    config: RunConfig,
    teacher: "Teacher",
    images: "Tensor",
    bit_widths: Sequence[int],
    device: "torch.device",
    *,
    activations: bool,
) -> list["Score"]:
    """Measure the sensitivity of every tensor at every bit-width, each in a student of uniform bit-width."""
    from synq.mixed_precision.sensitivity import scan_quantizers
    from synq.network.logits import logits_of
    from synq.quant.prepare import prepare_student
    from synq.quant.student import build_student
    from synq.runtime import dtype_of, place

    quant = config.quant
    images = images.to(device, dtype_of(config.runtime))
    place(teacher.graph, config.runtime, device, teacher.input_size)
    reference, scores = logits_of(teacher.graph, images), []
    ranges = {name: getattr(quant, name) for name in ("weight_range", "act_range", "mse_norm", "calib_images")}
    for bits in Bar(bit_widths, desc="bit-widths", **visible(config.runtime.progress, leave=False)):
        uniform = replace(quant.at_uniform_bits(bits), **ranges)
        net = build_student(teacher, uniform).net
        place(net, config.runtime, device, teacher.input_size)
        uniform_run = replace(config, quant=uniform)
        prepare_student(net, teacher.graph, images, uniform_run, device, image_range=teacher.pixel_range())
        roles: tuple[Role, ...] = ("weight", "activation") if activations else ("weight",)
        scores += scan_quantizers(net, images, reference, roles=roles, progress=config.runtime.progress)
    return scores


def _table(
    problem: "MixedPrecisionProblem",
    kls: Mapping["Key", Mapping[int, float]],
    losses: Mapping["Key", Mapping[int, float]],
    chosen: Mapping["Key", int],
    bit_widths: Sequence[int],
    limits: Sequence["Limit"],
) -> str:
    """Return the scan as a table, with the given and the chosen bit-widths and the sums of both."""
    rows = [
        {"tensor": key[1], "role": key[0], "now": problem.as_given[key], "chosen": chosen[key]}
        | {f"{bits} bit": kl for bits, kl in by_bits.items()}
        for key, by_bits in kls.items()
    ]
    lines = [
        to_text(rows, ("tensor", "role", "now", "chosen", *(f"{bits} bit" for bits in bit_widths))).rstrip(),
        "columns of bits: KL to the teacher in nats with only this tensor quantized; their sum: activations count by "
        "--activation-factor",
    ]
    for label, choice in (("now", problem.as_given), ("chosen", chosen)):
        total = sum(by_bits[choice[key]] for key, by_bits in losses.items() if choice[key] in by_bits)
        size, bitops = (limit.spent(choice) for limit in limits[:2])
        lines.append(
            f"{label + ':':<8} their sum {total:.4g}, {size:,.0f} bytes of weights, {bitops:,.0f} bit operations"
        )
    return "".join(f"{line}\n" for line in lines)
