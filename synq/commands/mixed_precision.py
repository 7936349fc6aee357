#!/usr/bin/env python3
"""Widths of single tensors under limits: `synq/commands/mixed_precision.py [TEACHER] [--activations] [--max-bytes N] [--max-bitops N] [--KEY VALUE ...]`."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import Parser, exit_code
from synq.common.progress import visible
from synq.common.text_tables import to_csv, to_text
from synq.config.parsing import between, require
from synq.config.run import QuantConfig, RunConfig, config_digest, config_to_dict, make_absolute
from synq.runs.record import write_json_atomic, write_text_atomic
from synq.train import read_command_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from synq.mixed_precision.ilp import Key, Limit
    from synq.mixed_precision.problem import WidthProblem
    from synq.mixed_precision.sensitivity import Score
    from synq.quant.bit_patterns import Role
    from synq.teacher.teacher import Teacher

COLUMNS = ("tensor", "role", "bits", "kl", "sqnr_db", "numel", "macs")
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user asks of the choice.

    Attributes:
        candidates: Widths to choose from.
        activations: Whether those of activations are chosen, too.
        activation_factor: What the KL of an activation counts beside that of a weight.
        max_bytes: Most bytes of the weights' codes; None for those of the widths as given.
        max_bitops: Most bit operations an image; None for those of the widths as given where activations are chosen, else no limit.
    """

    candidates: list[int]
    activations: bool
    activation_factor: float
    max_bytes: float | None
    max_bitops: float | None

    def __post_init__(self) -> None:
        for bits in self.candidates:
            between("candidates", bits, 2, 8)
        between("activation-factor", self.activation_factor, 0)
        for name, most in (("max-bytes", self.max_bytes), ("max-bitops", self.max_bitops)):
            require(name, "be a number >= 0", most, most is None or most >= 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the width of every layer's weights, and of every activation if asked, so that the teacher is missed least within limits.

    Without data: each tensor is rounded alone, to each width, and the distance from the teacher is measured on the run's synthetic images
    (made first, if they are not there yet); then the widths with the least sum are taken. What has its width by name, or by first_bits or
    last_bits, keeps it. Writes <output_dir>/<name>-widths-<digest>/: scan.csv, every tensor at every width, and settings.json, the same run
    with the widths found in quant.layer_weight_bits and quant.layer_act_bits. Every other word is a setting of the run, as for `synq train`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="synq widths", usage="%(prog)s [TEACHER] [options]", description=main.__doc__)
    parser.add_argument(
        "--activations", action="store_true", help="choose the widths of activations, too (default: as they are given)"
    )
    parser.add_argument(
        "--max-bytes", type=float, metavar="N",
        help="most packed bytes of all weights, scales not counted (default: of the widths as given; inf for no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bitops", type=float, metavar="N",
        help="most bit operations an image (default: with --activations those of the widths as given, else no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=list(WIDTHS), metavar="BITS", help="widths to choose from (default: 2 to 8)"
    )  # fmt: skip
    parser.add_argument(
        "--activation-factor", type=float, default=ACTIVATION_FACTOR, metavar="X",
        help="what the KL of an activation counts beside that of a weight, whose rounding the fine-tuning makes up for (default: %(default)g)",
    )  # fmt: skip
    arguments, rest = parser.parse_beside_settings(words)

    def work() -> None:
        config, _ = read_command_line(rest)
        candidates = sorted(set(arguments.candidates))
        _find(make_absolute(config), Wanted(**{**vars(arguments), "candidates": candidates}))

    return exit_code(work, resumes=True)


def _find(config: RunConfig, wanted: Wanted) -> None:
    from synq.mixed_precision.ilp import check_limits, choose_widths
    from synq.mixed_precision.problem import WidthProblem
    from synq.pipeline import build_student, prepare
    from synq.runtime import make_accelerator
    from synq.teacher.teacher import load_teacher

    accelerator, teacher = make_accelerator(config.runtime), load_teacher(config.teacher)
    student = build_student(teacher, config.quant)
    problem = WidthProblem(student, config.quant, activations=wanted.activations)
    if not problem.free:
        raise ValueError(
            "`quant` must leave a width to be chosen, but every one is given by name (`--quant.layer_weight_bits none` empties the names), "
            "`first_bits` or `last_bits`"
        )
    limits = [problem.bytes_limit(wanted.max_bytes), problem.bitops_limit(wanted.max_bitops)]
    if wanted.max_bitops is None and not wanted.activations:
        limits[1] = replace(limits[1], most=math.inf)
    check_limits(problem.widths(wanted.candidates), limits)
    train_set, _ = prepare(config, accelerator=accelerator)
    widths = sorted({*wanted.candidates, *(problem.as_given[key] for key in problem.free)})
    if not accelerator.is_main_process:  # one shows the progress of the scan
        config = replace(config, runtime=replace(config.runtime, progress=False))
    scores = _scan(config, teacher, train_set.images, widths, accelerator.device, activations=wanted.activations)
    if not accelerator.is_main_process:  # others have only made images
        return

    kls: dict[Key, dict[int, float]] = {}
    for score in scores:
        kls.setdefault((score.role, score.name), {})[score.bits] = score.kl
    factors = {"weight": 1.0, "activation": wanted.activation_factor}
    losses = {key: {bits: factors[key[0]] * kl for bits, kl in by_bits.items()} for key, by_bits in kls.items()}
    chosen = choose_widths(problem.options(losses, wanted.candidates), limits, problem.alike)

    found = replace(config, quant=problem.with_widths(chosen))
    folder = Path(config.runtime.output_dir) / f"{config.name}-widths-{config_digest(found)}"
    sizes = {(row.role, row.name): row for row in student.rows}
    rows = [
        {"tensor": score.name, "role": score.role, "bits": score.bits, "kl": score.kl, "sqnr_db": score.sqnr_db}
        | {"numel": sizes[score.role, score.name].numel, "macs": sizes[score.role, score.name].macs}
        for score in scores
    ]
    write_text_atomic(folder / "scan.csv", to_csv(rows, COLUMNS))
    write_json_atomic(folder / "settings.json", config_to_dict(found))
    print(_table(problem, kls, losses, chosen, widths, limits), end="")
    print(f"synq train --config {shlex.quote(str(folder / 'settings.json'))}", flush=True)


def _scan(
    config: RunConfig,
    teacher: "Teacher",
    images: "Tensor",
    widths: Sequence[int],
    device: "torch.device",
    *,
    activations: bool,
) -> list["Score"]:
    """Measure every tensor alone at every width, in a student that has this width everywhere."""
    from synq.mixed_precision.sensitivity import logits_of, scan_quantizers
    from synq.pipeline import build_student, low_pass
    from synq.quant.prepare import prepare_student
    from synq.runtime import dtype_of, place

    quant = config.quant
    images = low_pass(images[: quant.calib_images], config).to(device, dtype_of(config.runtime))
    place(teacher.graph, config.runtime, device, teacher.input_size)
    reference, scores = logits_of(teacher.graph, images), []
    ranges = {name: getattr(quant, name) for name in ("weight_range", "act_range", "mse_norm", "calib_images")}
    for bits in tqdm(widths, desc="widths", **visible(config.runtime.progress, leave=False)):
        uniform = QuantConfig(weight_bits=bits, act_bits=bits, act_points=quant.act_points, **ranges)
        net = build_student(teacher, uniform).net
        place(net, config.runtime, device, teacher.input_size)
        of_width = replace(config, quant=uniform)
        prepare_student(net, teacher.graph, images, of_width, device, image_range=teacher.pixel_range())
        roles: tuple[Role, ...] = ("weight", "activation") if activations else ("weight",)
        scores += scan_quantizers(net, images, reference, roles=roles, progress=config.runtime.progress)
    return scores


def _table(
    problem: "WidthProblem",
    kls: Mapping["Key", Mapping[int, float]],
    losses: Mapping["Key", Mapping[int, float]],
    chosen: Mapping["Key", int],
    widths: Sequence[int],
    limits: Sequence["Limit"],
) -> str:
    """Return the scan with the widths as given and as chosen, and the sums of both."""
    rows = [
        {"tensor": key[1], "role": key[0], "now": problem.as_given[key], "chosen": chosen[key]}
        | {f"{bits} bit": kl for bits, kl in by_bits.items()}
        for key, by_bits in kls.items()
    ]
    lines = [
        to_text(rows, ("tensor", "role", "now", "chosen", *(f"{bits} bit" for bits in widths))).rstrip(),
        "columns of bits: KL to the teacher in nats with this tensor alone rounded; their sum: activations count by --activation-factor",
    ]
    for label, choice in (("now", problem.as_given), ("chosen", chosen)):
        total = sum(by_bits[choice[key]] for key, by_bits in losses.items() if choice[key] in by_bits)
        size, bitops = (limit.spent(choice) for limit in limits)
        lines.append(
            f"{label + ':':<8} their sum {total:.4g}, {size:,.0f} bytes of weights, {bitops:,.0f} bit operations"
        )
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
