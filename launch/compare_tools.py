"""Compare students for an engine with the files of quantization tools: one network, the same images, no other data.

    python launch/compare_tools.py OUTPUT --data FOLDER [--network NAME] [--targets onnxruntime litert ...]

A CIFAR ResNet-20 of FOLDER is quantized for each engine that is installed, from the same synthetic images and no
others: by the engine's own tool and others that are installed (8 bits where their name has nothing else, their
defaults, no training), and by this project at W8A8, W4A8 and W4A4. With --real the tools also get that many of the
labeled images, without their labels, instead: what they lose by having no data. Each file is then run in the engine on
all labeled images, and timed next to float, in turns. OUTPUT keeps one JSON file for each engine, to which rows are
added, so that engines and tools which need separate environments fill one table; it is printed at the end.

On a processor without VNNI the students for ONNX Runtime and OpenVINO are the portable ones, and "exact" is the top-1
of a file with ONNX Runtime's session entry that adds without saturation: what the same file has on other processors.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import torch
from other_tools import OTHER_TOOLS, SIMULATION
from result_files import NETWORKS, recipes
from torch import Tensor, nn

from synq.common.environment import environment
from synq.common.exit_codes import leave
from synq.common.files import read_json, write_json_atomic
from synq.common.text_tables import to_markdown
from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, argument, option
from synq.config.parsing import load_config
from synq.config.quant import BY_RULES, BYTE_BITS, PORTABLE_TARGETS, RESEARCH, TARGETS
from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.evaluation.measure import Measure
from synq.export.export import ExportOptions, export_run
from synq.export.targets.formats import FORMATS
from synq.export.timing import Latency, machine, run_latencies
from synq.export.verify import IMAGES, Engine
from synq.pipeline import check, prepare, run
from synq.runs.record import run_folder
from synq.runtime import make_accelerator
from synq.sweeps.benchmarks.engine_files import FLOAT, File, files_of
from synq.sweeps.benchmarks.engine_tools import own_file, own_tool
from synq.sweeps.benchmarks.table import processor_features
from synq.synthesis.run_sets import low_pass

Maker = tuple[str, Callable[[], File]]
"""Name of a file, and what makes it."""
BITS = ((8, 8), (4, 8), (4, 4))
BATCH = 64
NOT_TIMED = "not run"
COLUMNS = ("engine", "file", "top-1 %", "exact", "drop", "times float", "quartiles", "layers", "KiB", "seconds")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared.

    Attributes:
        network: Name of the network.
        data: Folder with the network, its weights and the labeled images.
        output: Folder of the results.
        seed: Of images and training.
        rounds: Of the timing.
        num_images, iterations: Of the synthesis.
        store: Folder of the synthetic images, which other runs may share; None for one in `output`.
        real: Number of labeled images for other files of the same tools.
    """

    network: str
    data: Path
    output: Path
    seed: int
    rounds: int
    num_images: int = 256
    iterations: int = 50
    store: Path | None = None
    real: int = 0

    def settings(self, target: str) -> RunConfig:
        """Return the settings of every run for a target but the bits.

        Args:
            target: The engine.
        """
        (network,) = (network for network in NETWORKS if network.name == self.network)
        weights, images = (self.data / name for name in network.files)
        teacher = load_config(recipes(network)[0])["teacher"]
        chosen = {
            "name": "compare",
            **{f"teacher.{key}": teacher[key] for key in ("input_size", "mean", "std")},
            "teacher.spec": f"{self.data / 'teachers.py'}:{network.name}",
            "teacher.weights": str(weights),
            "evaluation.dataset": f"npz:{images}",
            "synthesis.num_images": self.num_images,
            "synthesis.iterations": self.iterations,
            "runtime.output_dir": str(self.output / target),
            "runtime.store_dir": str(self.store or self.output / "images"),
            "runtime.device": "cpu",
            "runtime.progress": False,
            "quant.target": RESEARCH if target == SIMULATION else target,
            "quant.portable": target in PORTABLE_TARGETS and "VNNI" not in processor_features(),
            "seed": self.seed,
            "data_seed": self.seed,
        }
        return with_overrides(RunConfig(), chosen)


@torch.no_grad()
def top1_of(engine: Engine, measure: Measure) -> float:
    """Return the top-1 accuracy in percent of a file on all reported labeled images."""
    assert measure.labeled is not None
    right = 0
    for rows in measure.reported.split(BATCH):
        images, labels = measure.labeled.batch(rows)
        right += int((engine(images).argmax(1) == labels).sum())
    return 100 * right / len(measure.reported)


def exact_engine(content: bytes) -> Engine:
    """Open an ONNX file in ONNX Runtime so that no processor saturates its sums."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {IMAGES: images.numpy()})[0])


def student_file(config: RunConfig, target: str) -> File:
    """Train a student, verify its file in the engine, and return the file; one that was verified before is read."""
    form, folder = FORMATS[target], run_folder(config) / "export"
    record = run(config)
    if not record.deployment:
        folder, record = export_run(run_folder(config), options=ExportOptions(rounds=0, progress=False))
    (file,) = record.deployment["files"]
    content = (folder / file["name"]).read_bytes()
    return File.of(target, content, partial(form.open, content))


def tool_makers(target: str, network: nn.Module, content: bytes, images: Tensor, suffix: str) -> Iterator[Maker]:
    """Yield the name of each file of other tools for an engine, and what makes it.

    Args:
        target: The engine.
        network, content: The float network, and its file.
        images: (N, C, H, W) for the calibration.
        suffix: End of the names.
    """
    if target != SIMULATION and (tool := own_tool(target)):
        yield tool + suffix, lambda: own_file(target, network, content, images, 1)
    for name, other in OTHER_TOOLS.get(target, {}).items():
        if other.is_installed:
            yield name + suffix, partial(other.make, network, content, images)


def makers(case: Case, target: str, network: nn.Module, images: Tensor, real: Tensor) -> Iterator[Maker]:
    """Yield the name of each file of an engine, and what makes it.

    Args:
        case, target: What is compared.
        network: The float network.
        images: (N, C, H, W), the synthetic images as a student gets them, low-pass filtered.
        real: (M, C, H, W), real images for other files of the tools; may be empty.
    """
    if target == SIMULATION or not FORMATS[target].checked_for:
        engine = "onnxruntime" if target == SIMULATION else target
        files, content = files_of(engine, network, images, ((8, 8),), 1)
        yield FLOAT, lambda: files[FLOAT]
        yield from tool_makers(target, network, content, images, "")
        if len(real):
            yield from tool_makers(target, network, content, real, f", {len(real)} real images")
    for weight_bits, act_bits in () if target == SIMULATION else BITS:
        if target not in BY_RULES or act_bits == BYTE_BITS:
            bits = {"quant.weight_bits": weight_bits, "quant.act_bits": act_bits}
            config = make_absolute(with_overrides(case.settings(target), bits))
            portable = ", portable" if config.quant.portable else ""
            yield f"SynQ {config.quant.label}{portable}", partial(student_file, config, target)


def measure_files(case: Case, target: str, path: Path, only: tuple[str, ...] = ()) -> None:
    """Add a row to a JSON file for each file of an engine that can be made here, one after another, then the times.

    Rows that the JSON file has are kept: those with a time as they are, the others get one.

    Args:
        case, target: What is compared.
        path: The JSON file.
        only: Starts of the names of the files to make besides float; empty for all.
    """
    config = make_absolute(case.settings(target))
    accelerator = make_accelerator(config.runtime)
    teacher, measure = check(config, accelerator=accelerator)
    train_set, _ = prepare(config, accelerator=accelerator, teacher=teacher)  # no time below has that of the images
    images = low_pass(train_set.images, config, pixel_range=teacher.pixel_range())
    teacher_top1 = top1_of(teacher.graph, measure)
    timed = target != SIMULATION and not FORMATS[target].checked_for
    rows = {row["file"]: row for row in read_json(path)} if path.exists() else {}
    files: dict[str, File] = {}
    assert measure.labeled is not None
    real, _ = measure.labeled.batch(measure.reported[: case.real])
    for name, make in makers(case, target, teacher.graph, images, real):
        is_done = name in rows and (not timed or "times_float" in rows[name])
        if name != FLOAT and (is_done or (only and not name.startswith(only))):
            continue
        started = time.process_time()
        files[name] = make()
        seconds = time.process_time() - started
        if name in rows:
            continue
        rows[name] = {
            "model": teacher.name,
            "target": target,
            "file": name,
            "top1": top1_of(files[name].open(1), measure),
            "teacher_top1": teacher_top1,
            "images": len(measure.reported),
            "bytes": files[name].size,
            "seconds": seconds,
            "seed": case.seed,
            "synthesis": f"{case.num_images} x {case.iterations}",
            "machine": {**machine(1), "features": processor_features(), "commit": environment()["commit"]},
        }
        if target == "onnxruntime":
            rows[name]["exact_top1"] = top1_of(exact_engine(files[name].content), measure)
        write_json_atomic(path, list(rows.values()))
    if timed:
        found = {name: rows[name] for name in files if name != FLOAT or "times_float" not in rows[FLOAT]}
        _add_times(found, files, images[:1], case.rounds)
        write_json_atomic(path, list(rows.values()))


def _add_times(rows: Mapping[str, dict[str, Any]], files: Mapping[str, File], image: Tensor, rounds: int) -> None:
    """Add the kernels and the processor time of each file relative to float's: least, and quartiles of the rounds."""
    runners = {name: partial(file.open(1), image) for name, file in files.items()}
    times: Mapping[str, Latency] = run_latencies(runners, threads=1, rounds=rounds)
    for name, row in rows.items():
        own, teacher = times[name], times[FLOAT]
        ratios = [its / mine for its, mine in zip(teacher.rounds, own.rounds, strict=True)]
        row["times_float"] = min(teacher.rounds) / min(own.rounds)
        row["quartiles"] = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else [ratios[0]] * 3
        row["latency_ms"] = min(own.rounds)
        row["layers"] = files[name].layers()


def line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    form = FORMATS.get(row["target"])
    found = {
        "engine": SIMULATION if form is None else form.checked_for or form.engine,
        "file": row["file"],
        "top-1 %": f"{row['top1']:.2f}",
        "exact": f"{row['exact_top1']:.2f}" if "exact_top1" in row else "",
        "drop": f"{row['teacher_top1'] - row['top1']:.2f}",
        "times float": f"{row['times_float']:.2f}" if "times_float" in row else NOT_TIMED,
        "quartiles": f"{row['quartiles'][0]:.2f} to {row['quartiles'][2]:.2f}" if "quartiles" in row else "",
        "layers": f"{row['layers'][0]} of {row['layers'][1]}" if "layers" in row else "",
        "KiB": round(row["bytes"] / 1024) or "",
    }
    return found | ({} if row["file"] == FLOAT else {"seconds": round(row["seconds"])})


def table(folder: Path) -> str:
    """Return the table of all engines that were measured into a folder, and which were not."""
    paths = {target: folder / f"{target}.json" for target in (*TARGETS[1:], SIMULATION)}
    rows = [line(row) for path in paths.values() if path.exists() for row in read_json(path)]
    missing = [target for target, path in paths.items() if not path.exists()]
    return to_markdown(rows, COLUMNS) + (f"\nNot measured: {', '.join(missing)}.\n" if missing else "")


@click.command("compare_tools", cls=Command)
@argument("output", metavar="OUTPUT", help="folder of the results")
@option("--data", metavar="FOLDER", required=True, help="folder with the networks and their labeled images")
@option(
    "--network",
    type=OneOf(*(network.name for network in NETWORKS)),
    default=NETWORKS[0].name,
    metavar="NAME",
    help="the network (default: the CIFAR-10 ResNet-20)",
)
@option(
    "--targets",
    several=True,
    type=OneOf(*TARGETS[1:], SIMULATION),
    metavar="TARGET",
    help="engines, or simulation for tools that make no file (default: the engines that are installed)",
)
@option("--only", several=True, metavar="NAME", help="files whose name begins so (default: all)")
@option("--rounds", metavar="N", type=INT, default=21, help="rounds of the timing (default: 21)")
@option("--seed", metavar="N", type=INT, default=0, help="seed of images and training (default: 0)")
@option("--num-images", metavar="N", type=INT, default=256, help="synthetic images (default: 256)")
@option("--iterations", metavar="N", type=INT, default=50, help="iterations of the synthesis (default: 50)")
@option("--store", metavar="FOLDER", default=None, help="folder of the synthetic images (default: OUTPUT/images)")
@option("--real", metavar="N", type=INT, default=0, help="labeled images for a second file of each tool (default: 0)")
def command(
    output: str,
    data: str,
    network: str,
    targets: tuple[str, ...],
    only: tuple[str, ...],
    store: str | None,
    **numbers: int,
) -> None:
    """Measure what OUTPUT does not have yet, and print the table of everything that it has."""
    folder = Path(output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images = Path(store).resolve() if store else None
    case = Case(network=network, data=Path(data).resolve(), output=folder, store=images, **numbers)
    for target in targets or [target for target, form in FORMATS.items() if not form.missing()]:
        measure_files(case, target, folder / f"{target}.json", only)
    print(table(folder), end="")


if __name__ == "__main__":
    leave(command.run(program="python launch/compare_tools.py"))
