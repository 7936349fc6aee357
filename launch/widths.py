#!/usr/bin/env python3
"""Widths of single layers under a budget: `launch/widths.py [TEACHER] [--cost bytes] [--budget N] [--candidates 2 3 4 ...] [--KEY VALUE ...]`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sweeps.pool import exit_code
from synq.config_io import between
from synq.configs import RunConfig, config_to_dict, make_absolute
from synq.results import write_json_atomic, write_text_atomic
from synq.table_text import Row, to_csv, to_text
from synq.train import read_command_line

COLUMNS = ("layer", "bits", "kl", "sqnr_db", "bytes", "bitops")
WIDTHS = (2, 3, 4, 5, 6, 8)


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the width of every layer's weights so that together they cost no more than a budget and the teacher is missed least.

    Without data: each layer is rounded alone, to each width, and its distance from the teacher is measured on the run's synthetic images
    (made first, if they are not there yet); then the widths with the least sum are taken. Writes <output_dir>/<name>-widths/: scan.csv,
    every layer at every width, and config.json, the same run with the widths found in quant.layer_weight_bits. Every other word is a
    setting of the run, as for `synq train`; the widths of activations stay as they are given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="synq widths", usage="%(prog)s [TEACHER] [options]", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--teacher", metavar="TEACHER", help="as `--teacher.spec`; as the first word it needs no --teacher"
    )
    parser.add_argument(
        "--cost", choices=("bytes", "bitops"), default="bytes",
        help="what the budget counts: packed bytes of the weights, or bit operations an image (default: bytes)",
    )  # fmt: skip
    parser.add_argument(
        "--budget",
        type=float,
        help="most that all layers may cost (default: what `quant.weight_bits` everywhere costs)",
    )
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=list(WIDTHS), metavar="BITS", help="widths to choose from (default: 2 3 4 5 6 8)"
    )  # fmt: skip
    first = ["--teacher", words.pop(0)] if words and not words[0].startswith("-") else []
    arguments, rest = parser.parse_known_args([*first, *words])

    def work() -> None:
        teacher = [] if arguments.teacher is None else ["--teacher.spec", arguments.teacher]
        config, _ = read_command_line([*rest, *teacher])
        for bits in arguments.candidates:
            between("candidates", bits, 2, 8)
        _find(make_absolute(config), sorted(set(arguments.candidates)), arguments.cost, arguments.budget)

    return exit_code(work)


def _find(config: RunConfig, candidates: list[int], cost: str, budget: float | None) -> None:
    from synq.pipeline import build_student, low_pass, prepare
    from synq.placement import make_accelerator, place
    from synq.sensitivity import choose_widths, logits_of, scan_widths, width_costs
    from synq.teachers import load_teacher

    quant = replace(config.quant, layer_weight_bits={}, first_bits=None, last_bits=None)
    accelerator, teacher = make_accelerator(config.runtime), load_teacher(config.teacher)
    uniform = build_student(teacher, quant)
    train_set, _ = prepare(config, accelerator=accelerator)
    images = low_pass(train_set.images[: quant.calib_images], config)
    for net in (teacher.graph, uniform.net):
        place(net, config.runtime, accelerator.device, teacher.input_size)
    scores = scan_widths(
        uniform.net,
        images,
        logits_of(teacher.graph, images),
        candidates,
        weight_range=quant.weight_range,
        norm=quant.mse_norm,
        progress=config.runtime.progress,
    )
    price = {kind: width_costs(uniform.rows, [*candidates, quant.weight_bits], kind) for kind in ("bytes", "bitops")}
    asked = {name: by_bits[quant.weight_bits] for name, by_bits in price[cost].items()}
    most = sum(asked.values()) if budget is None else budget
    losses: dict[str, dict[int, float]] = {}
    for score in scores:
        losses.setdefault(score.name, {})[score.bits] = score.kl
    costs = {name: {bits: by_bits[bits] for bits in candidates} for name, by_bits in price[cost].items()}
    chosen = choose_widths(losses, costs, most)

    rows: list[Row] = [
        {"layer": s.name, "bits": s.bits, "kl": s.kl, "sqnr_db": s.sqnr_db, **{kind: price[kind][s.name][s.bits] for kind in price}}
        for s in scores
    ]  # fmt: skip
    folder = Path(config.runtime.output_dir) / f"{config.name}-widths"
    found = replace(config, quant=replace(config.quant, layer_weight_bits=chosen))
    write_text_atomic(folder / "scan.csv", to_csv(rows, COLUMNS))
    write_json_atomic(folder / "config.json", config_to_dict(found))
    spent = sum(costs[name][bits] for name, bits in chosen.items())
    widths = [f"{bits} bit" for bits in candidates]
    table = [
        {"layer": name, "chosen": chosen[name], **{f"{bits} bit": losses[name][bits] for bits in candidates}}
        for name in losses
    ]
    print(to_text(table, ("layer", "chosen", *widths)))
    print(
        f"KL of each layer alone, nats; {spent} of {most:.0f} {cost}, {quant.weight_bits} bits everywhere: {sum(asked.values())}"
    )
    print(f"synq train --config {folder / 'config.json'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
