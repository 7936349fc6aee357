"""Compare students for an engine with the file of the engine's own quantization tool: one network, the same images.

    python launch/compare_tools.py OUTPUT --data FOLDER [--targets onnxruntime litert ...] [--rounds 21] [--seed 0]

The CIFAR-10 ResNet-20 of FOLDER is quantized for each engine that is installed, from the same synthetic images and no
others: by the engine's own tool (8 bits, its defaults, no training), and by this project at W8A8, W4A8 and W4A4. Each
file is then run in the engine on all labeled images, and timed next to float, in turns. OUTPUT keeps one JSON file for
each engine, so that engines which need separate environments fill one table; it is printed at the end.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import torch
from accelerate import Accelerator
from torch import Tensor

from synq.common.exit_codes import leave
from synq.common.files import read_json, write_json_atomic
from synq.common.text_tables import to_markdown
from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, argument, option
from synq.config.quant import BY_RULES, RESEARCH, TARGETS
from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.evaluation.measure import Measure
from synq.export.export import ExportOptions, export_run
from synq.export.targets.formats import FORMATS
from synq.export.timing import Latency, run_latencies
from synq.export.verify import Engine
from synq.pipeline import run
from synq.runs.finished import open_run
from synq.runs.record import run_folder
from synq.sweeps.benchmarks.engine_files import FLOAT, files_of
from synq.sweeps.benchmarks.engine_tools import TOOLS, own_file, own_tool

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BITS = ((8, 8), (4, 8), (4, 4))
BATCH = 64
COLUMNS = ("engine", "file", "top-1 %", "drop", "times float", "quartiles", "KiB", "seconds")


def settings_of(data: Path, output: Path, target: str, seed: int) -> dict[str, Any]:
    """Return the settings of every run for a target but the bits.

    Args:
        data: Folder with the network, its weights and the labeled images.
        output: Folder of the runs.
        target: The engine.
        seed: Of images and training.
    """
    return {
        "name": "compare",
        "teacher.spec": f"{data / 'teachers.py'}:cifar10_resnet20",
        "teacher.weights": str(data / "cifar10_resnet20.safetensors"),
        "teacher.input_size": [3, 32, 32],
        "teacher.mean": MEAN,
        "teacher.std": STD,
        "evaluation.dataset": f"npz:{data / 'cifar10_test_a.npz'}",
        "synthesis.num_images": 256,
        "synthesis.iterations": 50,
        "runtime.output_dir": str(output / target),
        "runtime.store_dir": str(output / "images"),
        "runtime.device": "cpu",
        "runtime.progress": False,
        "quant.target": target,
        "seed": seed,
        "data_seed": seed,
    }


def top1_of(engine: Engine, measure: Measure) -> float:
    """Return the top-1 accuracy in percent of a file on all reported labeled images."""
    assert measure.labeled is not None
    right = 0
    for rows in measure.reported.split(BATCH):
        images, labels = measure.labeled.batch(rows)
        right += int((engine(images).argmax(1) == labels).sum())
    return 100 * right / len(measure.reported)


def measured(data: Path, output: Path, target: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each file of an engine.

    Args:
        data, output, target, seed: As `settings_of`.
        rounds: Of the timing.
    """
    base = with_overrides(RunConfig(), settings_of(data, output, target, seed))
    at = {"quant.weight_bits": 8, "quant.act_bits": 8}
    rounded = make_absolute(with_overrides(base, {**at, "finetune.epochs": 0}))
    run(rounded)  # makes the images: no other time below has that of making them
    opened = open_run(run_folder(rounded))
    images, teacher = opened.synthetic_sets()[0].images, opened.teacher
    measure = Measure.prepare(opened.config.evaluation, teacher, Accelerator(cpu=True), quant=opened.config.quant)
    teacher_top1 = top1_of(teacher.graph, measure)
    form, rows = FORMATS[target], []
    engines: dict[str, Engine] = {}
    if not form.checked_for:
        files, content = files_of(target, teacher.graph, images, ((8, 8),), 1)
        engines[FLOAT] = files[FLOAT].open(1)
        rows.append(_row(FLOAT, top1_of(engines[FLOAT], measure), teacher_top1, len(content), 0.0))
    if not form.checked_for and (tool := own_tool(target)):
        started = time.perf_counter()
        own = own_file(target, teacher.graph, content, images, 1)
        seconds = time.perf_counter() - started
        engines[tool] = own.open(1)
        rows.append(_row(tool, top1_of(engines[tool], measure), teacher_top1, own.size, seconds))
    for weight_bits, act_bits in BITS:
        if target in BY_RULES and act_bits < 8:
            continue
        name = f"W{weight_bits}A{act_bits}"
        config = make_absolute(with_overrides(base, {"quant.weight_bits": weight_bits, "quant.act_bits": act_bits}))
        started = time.perf_counter()
        run(config)
        folder, record = export_run(run_folder(config), options=ExportOptions(rounds=0, progress=False))
        (file,) = record.deployment["files"]
        found = (folder / file["name"]).read_bytes()
        engines[name] = form.open(found, 1)
        top1 = file["comparisons"][-1]["file_top1"]
        rows.append(_row(name, top1, teacher_top1, len(found), time.perf_counter() - started))
    if form.checked_for:
        return [row | {"times float": "not run"} for row in rows]
    return list(_timed(rows, engines, images[:1], rounds))


def _row(name: str, top1: float, teacher: float, size: int, seconds: float) -> dict[str, Any]:
    row = {"file": name, "top-1 %": round(top1, 2), "drop": round(teacher - top1, 2), "KiB": round(size / 1024)}
    return row | ({"seconds": round(seconds)} if seconds else {})


def _timed(
    rows: list[dict[str, Any]], engines: Mapping[str, Engine], image: Tensor, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows with the least processor time of each file relative to float's, and quartiles of the rounds."""
    runners = {name: partial(engine, image) for name, engine in engines.items()}
    times: Mapping[str, Latency] = run_latencies(runners, threads=1, rounds=rounds)
    for row in rows:
        own, teacher = times[row["file"]], times[FLOAT]
        ratios = [its / mine for its, mine in zip(teacher.rounds, own.rounds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (ratios[0],) * 3
        least = min(teacher.rounds) / min(own.rounds)
        yield row | {"times float": f"{least:.2f}", "quartiles": f"{low:.2f} to {high:.2f}"}


def table(output: Path) -> str:
    """Return the table of all engines that were measured into a folder, and what is missing."""
    rows, missing = [], []
    for target in TARGETS:
        path = output / f"{target}.json"
        if path.exists():
            engine = FORMATS[target].checked_for or FORMATS[target].engine
            rows += [{"engine": engine, **row} for row in read_json(path)]
            if not any(row["file"] == TOOLS[target][0] for row in read_json(path) if target in TOOLS):
                missing += (
                    [f"{target}: the quantization tool of its engine was not installed"] if target in TOOLS else []
                )
        elif target != RESEARCH:
            missing.append(f"{target}: not measured")
    return to_markdown(rows, COLUMNS) + (f"\nMissing: {'; '.join(missing)}.\n" if missing else "")


@click.command("compare_tools", cls=Command)
@argument("output", metavar="OUTPUT", help="folder of the results")
@option("--data", metavar="FOLDER", required=True, help="folder with the CIFAR-10 ResNet-20 and its labeled images")
@option(
    "--targets",
    several=True,
    type=OneOf(*(target for target in TARGETS if target != RESEARCH)),
    metavar="TARGET",
    help="engines (default: those that are installed)",
)
@option("--rounds", metavar="N", type=INT, default=21, help="rounds of the timing (default: 21)")
@option("--seed", metavar="N", type=INT, default=0, help="seed of images and training (default: 0)")
def command(output: str, data: str, targets: tuple[str, ...], rounds: int, seed: int) -> None:
    """Measure, and print the table of everything that OUTPUT has."""
    folder = Path(output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for target in targets or [target for target, form in FORMATS.items() if not form.missing()]:
        found = measured(Path(data).resolve(), folder, target, seed, rounds)
        write_json_atomic(folder / f"{target}.json", found)
        print(json.dumps(found), flush=True)
    print(table(folder), end="")


if __name__ == "__main__":
    leave(command.run(program="python launch/compare_tools.py"))
