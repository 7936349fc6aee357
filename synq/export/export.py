"""Export the student of a finished run to files for inference engines, each verified against the student.

    run folder -> student -> integer form -> model.onnx (QuantizeLinear/DequantizeLinear), model.safetensors (packed),
    model.pt2 (torch.export) -> comparison with the student -> deployment metrics in the run's record -> model card

A file has its final name only after it has passed the comparison.
"""

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from synq.config.parsing import between, one_of
from synq.config.quant import RESEARCH
from synq.config.run import PATH_SETTINGS
from synq.evaluation.measure import Measure
from synq.export.card import card_values, is_card, readable_record, siblings_of, write_card
from synq.export.exactness import inexact_steps
from synq.export.files import Checker, ExportedFile, export_onnx, export_packed, export_program
from synq.export.packed import channel_affines
from synq.export.timing import Latency, latencies
from synq.export.verify import Tolerance
from synq.quant.cost import float_bytes
from synq.quant.integer_form import integer_form
from synq.quant.student import Student
from synq.runs.finished import open_run
from synq.runs.record import DEPLOYED, RunRecord, read_record, write_record
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from synq.export.onnx_graph import Container

FORMATS = ("onnx", "packed", "torch")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "ml_dtypes")
"""Packages that the ONNX format requires; the other formats do not."""
CONTAINERS = ("int4", "int8", "matmul")
MANAGED = (
    *("model.onnx", "model_int4.onnx", "model_int8.onnx", "model_matmul.onnx", "model.safetensors", "model.pt2"),
    *("README.md", "card.json"),
)
"""Names of the files that an export may write; files of an earlier export are removed."""
DRAFT = ".draft"
"""Subfolder of the export in which its files are written before they are published."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Formats of an export, and how its files are verified and timed.

    Attributes:
        formats: Some of FORMATS.
        containers: ONNX files to write, some of CONTAINERS; empty: int4 if a bit-width is at most 4, otherwise int8.
        tolerance: Largest accepted difference of a file from the student.
        rounds: Timed runs of each model; 0 measures no latency.
        threads: Threads of ONNX Runtime in timed runs; 0: its default. Only with one is the processor time measured,
            see `timing.py`.
        with_float: Whether the float teacher is exported to ONNX too, to measure size and latency; not kept.
        path_overrides: Current paths of the run's teacher, images and labels, by configuration key, if they were moved.
        progress: Whether a terminal shows progress bars.
    """

    formats: Sequence[str] = FORMATS
    containers: "Sequence[Container]" = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    rounds: int = 30
    threads: int = 1
    with_float: bool = True
    path_overrides: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False

    def __post_init__(self) -> None:
        for key in self.path_overrides:
            one_of("path_overrides", key, PATH_SETTINGS)
        for name in self.formats:
            one_of("formats", name, FORMATS)
        for name in self.containers:
            one_of("container", name, CONTAINERS)
        if not self.formats:
            raise ValueError(f"`formats` must be some of {', '.join(FORMATS)}, but got none")
        if self.containers and "onnx" not in self.formats:
            raise ValueError("`container` must be left out unless `formats` has onnx: the other formats have none")
        between("rounds", self.rounds, 0)
        between("threads", self.threads, 0)
        if "onnx" in self.formats and (missing := missing_packages()):
            raise ValueError(
                f"`formats` must not have onnx without the package {missing[0]}, but it is missing: "
                "pip install 'synq[export]'"
            )


def missing_packages() -> list[str]:
    """Return the packages of ONNX_PACKAGES that are not installed."""
    found = {name: find_spec(name) for name in ONNX_PACKAGES}
    return [
        name for name, spec in found.items() if spec is None or spec.origin is None
    ]  # a namespace package has no origin


def export_run(
    folder: str | Path,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    accelerator: Accelerator | None = None,
    teacher: Teacher | None = None,
) -> tuple[Path, RunRecord]:
    """Export a finished run, verify every file against the student, and add the deployment metrics to the run's record.

    Args:
        folder: The run's folder.
        out: Folder of the exported files; None means the subfolder `export` of ``folder``.
        options: Formats, verification and timing; None means the defaults.
        accelerator: Process group; None creates one for the CPU.
        teacher: As for `open_run`; on the CPU, in float32.

    Returns:
        The folder, and the record with its deployment metrics.

    Raises:
        ExportRejectedError: If a file differs from the student by more than the tolerance; no file is written then.
        FileNotFoundError, ValueError, OSError: As `open_run`; ValueError also if the student is for an engine, OSError
            if a file cannot be written.
    """
    options, accelerator = options or ExportOptions(), accelerator or Accelerator(cpu=True)
    run = open_run(folder, options.path_overrides, teacher)
    if (engine := run.config.quant.target) != RESEARCH:
        raise ValueError(
            f"`RUN` must have `quant.target` {RESEARCH} to be exported as {', '.join(options.formats)}, but got "
            f"{engine}, which computes other values: write its file with `--target {engine}`"
        )
    record, student = run.record, run.student
    target = (Path(out) if out is not None else run.folder / "export").resolve()
    _check_target(target)
    siblings, copies = siblings_of(record, run.folder), _sweep_records(run.folder, record)
    with _draft_of(target) as draft:  # first, so that a place that cannot be written to costs no work
        train_set, heldout = run.synthetic_sets()
        form = integer_form(student.net)
        check = Checker(
            form=form,
            simulated=student.net,
            synthetic=torch.cat([heldout.images, train_set.images]),
            measure=Measure.prepare(run.config.evaluation, run.teacher, accelerator),
            tolerance=options.tolerance,
            progress=options.progress,
            exact=not inexact_steps(form),
        )
        if not check.measure.has_labels_of(record.eval_digest):
            raise ValueError(
                "`RUN` must have the labeled images with which it was evaluated, but they have changed or are missing: "
                "give their current path with `--evaluation.dataset`"
            )
        record = replace(record, deployment=_write_files(draft, record, run.teacher, student, check, options))
        write_card(draft, card_values(record, siblings))
        _publish(draft, target)
    for path in (run.folder / "record.json", *copies):
        there = read_record(path)
        # An export of fewer formats keeps the columns that it did not measure.
        kept = {key: there.deployment.get(key) for key in DEPLOYED if record.deployment.get(key) is None}
        write_record(path, replace(there, deployment={**record.deployment, **kept}))
    return target, record


def _check_target(target: Path) -> None:
    """Raise if an export to ``target`` would overwrite files that are not from an earlier export.

    Raises:
        ValueError: If it is a file, or a folder that has a file of a managed name but is not an export.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"`out` must be a folder, but {target} is a file")
    foreign = [name for name in MANAGED if (target / name).exists()]
    interrupted = (target / DRAFT).exists()  # killed while publishing its files
    if foreign and not interrupted and not is_card(target / "card.json"):
        raise ValueError(
            f"`out` must be a new folder or an earlier export, but {target} has {foreign[0]} and no card.json "
            "of an export"
        )


def _write_files(
    target: Path, record: RunRecord, teacher: Teacher, student: Student, check: Checker, options: ExportOptions
) -> dict[str, Any]:
    """Write and verify the files that ``options`` select; return the deployment metrics."""
    containers, size = _containers(student, options), teacher.input_size
    files: list[ExportedFile] = []
    models: dict[str, bytes] = {}
    if containers:
        from synq.export.onnx_graph import check_operations, onnx_graph, write_onnx

        check_operations(check.form)
        graph = onnx_graph(integer_form(student.net, operations="onnx"), size)
    for container in containers:
        name = f"model_{container}.onnx" if len(options.containers) > 1 else "model.onnx"
        file, models[name] = export_onnx(target / name, container, graph, check)
        files.append(file)
    if "packed" in options.formats:
        about = {"config": record.config, "input_size": list(size), "num_classes": teacher.num_classes}
        files.append(export_packed(target / "model.safetensors", check.form, student.net, about, check))
    if "torch" in options.formats:
        files.append(export_program(target / "model.pt2", integer_form(student.net, operations="torch"), size, check))
    metrics = _sizes(student, teacher, files)
    if models and options.with_float:
        float_model = write_onnx(integer_form(teacher.graph, operations="onnx"), size)
        metrics["float_onnx_bytes"] = len(float_model)
        if options.rounds:
            timed = {**models, "": float_model}
            times = latencies(timed, check.synthetic[:1], threads=options.threads, rounds=options.rounds)
            files = [_timed(file, times) if file.name in times else file for file in files]
            metrics |= _speed(times[next(iter(models))], times[""])
    metrics["files"] = [asdict(file) for file in files]
    metrics["tolerance"], metrics["exact"] = asdict(options.tolerance), check.exact
    metrics["own_rounding"] = [asdict(comparison) for comparison in check.simulation.values()]
    metrics["float_norms"] = len(channel_affines(check.form))
    metrics["machine"] = {"cpu": _cpu(), "threads": options.threads or None, "versions": _versions()}
    return metrics


def _timed(file: ExportedFile, times: Mapping[str, Latency]) -> ExportedFile:
    """Return the metadata of a file with its latency, if that is stable."""
    own, teacher = times[file.name], times[""]
    return replace(
        file,
        latency_spread=own.spread,
        latency_ms=own.median if own.is_stable else None,
        latency_ratio=own.ratio_to(teacher) if own.is_stable and teacher.is_stable else None,
    )


def _speed(first: Latency, teacher: Latency) -> dict[str, Any]:
    """Return the deployment metrics of the first ONNX file's speed; without stable times none but their spread."""
    metrics: dict[str, Any] = {"latency_spread": max(first.spread, teacher.spread)}
    if first.is_stable and teacher.is_stable:
        metrics |= {"latency_ms": first.median, "float_latency_ms": teacher.median}
        metrics["latency_ratio"] = first.ratio_to(teacher)
    return metrics


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    """Yield a temporary folder in ``target`` to write to: an export is published as a whole or not at all."""
    draft = target / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # raised if the export succeeded: the folder is not empty
            target.rmdir()


def _publish(draft: Path, target: Path) -> None:
    """Replace the files of an earlier export by those in ``draft``; other files of the folder stay."""
    for name in MANAGED:
        (target / name).unlink(missing_ok=True)
    for path in sorted(draft.iterdir()):
        path.replace(target / path.name)


def _cpu() -> str:
    """Return the model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "onnx", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):  # the distribution may have another name, such as onnxruntime-gpu
            versions[name] = metadata.version(name)
    return versions


def _sweep_records(run: Path, record: RunRecord) -> list[Path]:
    """Return the paths of the sweep's records of this run; empty if the run is not part of a sweep."""
    found = sorted((run.parent.parent / "records").glob("*.json")) if run.parent.name == "runs" else []
    readable = [(path, readable_record(path)) for path in found]  # other files may be in that folder
    return [path for path, other in readable if other is not None and other.config_digest == record.config_digest]


def _containers(student: Student, options: ExportOptions) -> "Sequence[Container]":
    if "onnx" not in options.formats:
        return ()
    from synq.export.onnx_graph import INT4_BITS

    fits_int4 = min(row.bits for row in student.rows) <= INT4_BITS
    return tuple(dict.fromkeys(options.containers)) or (("int4",) if fits_int4 else ("int8",))


def _sizes(student: Student, teacher: Teacher, files: Sequence[ExportedFile]) -> dict[str, Any]:
    sizes = {file.format: file.bytes for file in reversed(files)}
    return {
        "onnx_bytes": sizes.get("onnx"),
        "packed_bytes": sizes.get("packed"),
        "float_bytes": float_bytes(teacher.module),
        "bitops": student.bitops,
    }
