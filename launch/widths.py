#!/usr/bin/env python3
"""Widths of single layers under a budget: `launch/widths.py [TEACHER] [--cost bytes] [--budget N] [--candidates 2 3 4 ...] [--KEY VALUE ...]`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sweeps.pool import exit_code
from synq.config_io import between, require
from synq.configs import RunConfig, config_digest, config_to_dict, make_absolute
from synq.results import write_json_atomic, write_text_atomic
from synq.table_text import to_csv, to_text
from synq.train import read_command_line

T = TypeVar("T")
Cost = Literal["bytes", "bitops"]
COSTS: tuple[Cost, ...] = ("bytes", "bitops")
UNITS = {"bytes": "bytes of weights", "bitops": "bit operations"}
COLUMNS = ("layer", "bits", "kl", "sqnr_db", "bytes", "bitops")
WIDTHS = (2, 3, 4, 5, 6, 8)


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the width of every layer's weights so that together they cost no more than a budget and the teacher is missed least.

    Without data: each layer is rounded alone, to each width, and its distance from the teacher is measured on the run's synthetic images
    (made first, if they are not there yet); then the widths with the least sum are taken. Layers whose width is given by name, first_bits
    or last_bits keep it. Writes <output_dir>/<name>-widths-<digest>/: scan.csv, every layer at every width, and config.json, the same run
    with the widths found in quant.layer_weight_bits. Every other word is a setting of the run, as for `synq train`; the widths of
    activations stay as they are given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="synq widths", usage="%(prog)s [TEACHER] [options]", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--cost", choices=COSTS, default="bytes",
        help="what the budget counts: packed bytes of the weights, or bit operations an image (default: bytes)",
    )  # fmt: skip
    parser.add_argument(
        "--budget",
        type=float,
        help="most that the weights of all layers may cost, scales not counted (default: what they cost with the widths as given)",
    )
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=list(WIDTHS), metavar="BITS", help="widths to choose from (default: 2 3 4 5 6 8)"
    )  # fmt: skip
    first = ["--teacher.spec", words.pop(0)] if words and not words[0].startswith("-") else []
    arguments, rest = parser.parse_known_args(words)

    def work() -> None:
        config, _ = read_command_line([*rest, *first])
        for bits in arguments.candidates:
            between("candidates", bits, 2, 8)
        if arguments.budget is not None:
            between("budget", arguments.budget, 0)
        _find(make_absolute(config), sorted(set(arguments.candidates)), arguments.cost, arguments.budget)

    return exit_code(work)


def _find(config: RunConfig, candidates: list[int], cost: Cost, budget: float | None) -> None:
    from synq.pipeline import build_student, low_pass, prepare
    from synq.placement import make_accelerator, place
    from synq.sensitivity import choose_widths, logits_of, named_layers, scan_widths, width_costs
    from synq.teachers import load_teacher

    quant = config.quant
    accelerator, teacher = make_accelerator(config.runtime), load_teacher(config.teacher)
    student = build_student(teacher, quant)
    before = {row.name: row.bits for row in student.rows if row.role == "weight"}
    fixed = named_layers(list(before), quant)
    if len(fixed) == len(before):
        rule = "leave a layer whose width is to be chosen (none empties it)"
        require("quant.layer_weight_bits", rule, quant.layer_label, False)
    train_set, _ = prepare(config, accelerator=accelerator)
    images = low_pass(train_set.images[: quant.calib_images], config)
    for net in (teacher.graph, student.net):
        place(net, config.runtime, accelerator.device, teacher.input_size)
    widths = sorted({*candidates, *before.values()})
    scores = scan_widths(
        student.net,
        images,
        logits_of(teacher.graph, images),
        widths,
        weight_range=quant.weight_range,
        norm=quant.mse_norm,
        progress=config.runtime.progress,
    )
    prices = {kind: width_costs(student.rows, widths, kind) for kind in COSTS}
    losses: dict[str, dict[int, float]] = {name: {} for name in before}
    for score in scores:
        losses[score.name][score.bits] = score.kl

    def allowed(table: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, T]]:
        choices = {name: [before[name]] if name in fixed else candidates for name in table}
        return {name: {bits: table[name][bits] for bits in choices[name]} for name in table}

    price = prices[cost]
    as_given = sum(price[name][bits] for name, bits in before.items())
    dearest = sum(max(by_bits.values()) for by_bits in allowed(price).values())
    most = min(as_given if budget is None else budget, dearest)
    chosen = choose_widths(allowed(losses), allowed(price), most)

    named = {name: bits for name, bits in chosen.items() if name not in fixed}
    found = replace(config, quant=replace(quant, layer_weight_bits={**quant.layer_weight_bits, **named}))
    folder = Path(config.runtime.output_dir) / f"{config.name}-widths-{config_digest(found)}"
    rows = [
        {"layer": score.name, "bits": score.bits, "kl": score.kl, "sqnr_db": score.sqnr_db}
        | {kind: prices[kind][score.name][score.bits] for kind in COSTS}
        for score in scores
    ]
    write_text_atomic(folder / "scan.csv", to_csv(rows, COLUMNS))
    write_json_atomic(folder / "config.json", config_to_dict(found))
    table = [
        {"layer": name, "now": before[name], "chosen": chosen[name], **{f"{bits} bit": kl for bits, kl in kls.items()}}
        for name, kls in losses.items()
    ]
    print(to_text(table, ("layer", "now", "chosen", *(f"{bits} bit" for bits in widths))))
    print("columns of bits: KL to the teacher in nats with this layer alone rounded")
    for label, choice in (("now", before), ("chosen", chosen)):
        total = sum(losses[name][bits] for name, bits in choice.items())
        spent = sum(price[name][bits] for name, bits in choice.items())
        print(f"{label + ':':<8} their sum {total:.4g}, {spent:,} {UNITS[cost]}")
    print(f"synq train --config {folder / 'config.json'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
