"""From a run's folder to files that an engine runs, each compared with the student before it counts.

    run folder -> student -> integer form -> model.onnx (QuantizeLinear/DequantizeLinear), model.safetensors (packed), model.pt2 (torch.export)
               -> comparison with the student -> deployment figures, in the run's record too -> model card

A file under its final name has passed its comparison.
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
from synq.config.run import PLACES
from synq.evaluation.measure import Measure
from synq.export.card import card_values, is_card, readable_record, siblings_of, write_card
from synq.export.files import Checker, ExportedFile, export_onnx, export_packed, export_program
from synq.export.packed import channel_affines
from synq.export.verify import Tolerance, latencies
from synq.quant.cost import float_bytes
from synq.quant.integer_form import integer_form
from synq.quant.student import Student
from synq.runs.finished import open_run, synthetic_sets
from synq.runs.record import DEPLOYED, RunRecord, read_record, write_record
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from synq.export.onnx_graph import Container

FORMATS = ("onnx", "packed", "torch")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "ml_dtypes")
"""What ONNX files need; the other formats do without."""
CONTAINERS = ("int4", "int8", "matmul")
MANAGED = (
    *("model.onnx", "model_int4.onnx", "model_int8.onnx", "model_matmul.onnx", "model.safetensors", "model.pt2"),
    *("README.md", "card.json"),
)
"""Names that an export may write, and removes when a later one does not."""
DRAFT = ".draft"
"""Folder in that of the export in which its files are made."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write and how to check it.

    Attributes:
        formats: Some of onnx, packed, torch.
        containers: ONNX files to write, some of CONTAINERS; empty: int4 where a width is at most 4, else int8.
        tolerance: What a file may differ by.
        rounds: Runs of each model for its latency; 0 measures none.
        threads: Threads of ONNX Runtime when it is timed; 0: its default.
        beside_float: Whether the teacher itself is written as ONNX, too, for its size and latency; it is not kept.
        places: Where the run's teacher, images and labels lie now, by the names in PLACES, where they have been moved since.
        progress: Whether a terminal shows progress bars.
    """

    formats: Sequence[str] = FORMATS
    containers: "Sequence[Container]" = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    rounds: int = 30
    threads: int = 0
    beside_float: bool = True
    places: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False

    def __post_init__(self) -> None:
        for word in self.places:
            one_of("places", word, PLACES)
        for word in self.formats:
            one_of("formats", word, FORMATS)
        for word in self.containers:
            one_of("container", word, CONTAINERS)
        if not self.formats:
            raise ValueError(f"`formats` must be some of {', '.join(FORMATS)}, but got none")
        if self.containers and "onnx" not in self.formats:
            raise ValueError("`container` must be left out where `formats` has no onnx: the other files have none")
        between("rounds", self.rounds, 0)
        between("threads", self.threads, 0)
        if "onnx" in self.formats and (missing := missing_packages()):
            raise ValueError(
                f"`formats` must do without onnx, or have {missing[0]}, which is missing: pip install 'synq[export]'"
            )


def missing_packages() -> list[str]:
    """Return the packages of ONNX_PACKAGES that are not installed."""
    found = {name: find_spec(name) for name in ONNX_PACKAGES}
    return [name for name, spec in found.items() if spec is None or spec.origin is None]  # a mere folder has no origin


def export_run(
    folder: str | Path,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    accelerator: Accelerator | None = None,
    teacher: Teacher | None = None,
) -> tuple[Path, RunRecord]:
    """Export a finished run, compare every file with the student, and write the deployment figures into the run's record.

    Args:
        folder: The run's folder.
        out: Where the files go; None is the folder `export` in the run's own.
        options: What to write and how to check it.
        accelerator: Process group; None makes one for the CPU.
        teacher: As for `open_run`; on the CPU, in float32.

    Returns:
        The folder, and the record with its deployment figures.

    Raises:
        ExportRefusedError: A file differs from the student by more than the tolerance; it is not left behind.
        FileNotFoundError, ValueError, OSError: As `open_run`; or the disk refuses.
    """
    options, accelerator = options or ExportOptions(), accelerator or Accelerator(cpu=True)
    run, record, config, teacher, student = open_run(folder, options.places, teacher)
    target = (Path(out) if out is not None else run / "export").resolve()
    _check_target(target)
    siblings, copies = siblings_of(record, run), _sweep_records(run, record)
    with _draft_of(target) as draft:  # first, so that a place that cannot be written to costs no work
        check = Checker(
            form=integer_form(student.net),
            simulated=student.net,
            synthetic=torch.cat([part.images for part in synthetic_sets(config, teacher, record)]),
            measure=Measure.prepare(config.evaluation, teacher, accelerator),
            tolerance=options.tolerance,
            progress=options.progress,
        )
        if check.measure.labels_digest != record.eval_digest:
            raise ValueError(
                "`RUN` must find its labelled images as they were, but they have changed since, or were not there: "
                "`--evaluation.dataset` says where they are now"
            )
        record = replace(record, deployment=_write_files(draft, record, teacher, student, check, options))
        write_card(draft, card_values(record, siblings))
        _publish(draft, target)
    for path in (run / "record.json", *copies):
        there = read_record(path)
        # A narrower export leaves the columns that it did not measure as they were.
        kept = {key: there.deployment.get(key) for key in DEPLOYED if record.deployment.get(key) is None}
        write_record(path, replace(there, deployment={**record.deployment, **kept}))
    return target, record


def _check_target(target: Path) -> None:
    """Refuse a place where an export would overwrite what is none of its own, before anything is made.

    Raises:
        ValueError: It is a file, or holds a file of a name that an export writes, without being an export.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"`out` must be a folder, but {target} is a file")
    foreign = [name for name in MANAGED if (target / name).exists()]
    killed = (target / DRAFT).exists()  # while it put its files in place
    if foreign and not killed and not is_card(target / "card.json"):
        raise ValueError(
            f"`out` must be a new folder or one of an earlier export, but {target} holds {foreign[0]} and no card.json of ours"
        )


def _write_files(
    target: Path, record: RunRecord, teacher: Teacher, student: Student, check: Checker, options: ExportOptions
) -> dict[str, Any]:
    """Write and check what the options ask for; returns the deployment figures."""
    containers, size = _containers(student, options), teacher.input_size
    files: list[ExportedFile] = []
    models: dict[str, bytes] = {}
    if containers:
        from synq.export.onnx_graph import onnx_graph, write_onnx

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
    figures = _sizes(student, teacher, files)
    if models and options.beside_float:
        floating = write_onnx(integer_form(teacher.graph, operations="onnx"), size)
        figures["float_onnx_bytes"] = len(floating)
        if options.rounds:
            timed = {**models, "": floating}
            times = latencies(timed, check.synthetic[:1], threads=options.threads, rounds=options.rounds)
            files = [replace(file, latency_ms=times.get(file.name)) for file in files]
            figures |= {"latency_ms": times[next(iter(models))], "float_latency_ms": times[""]}
    figures["files"] = [asdict(file) for file in files]
    figures["tolerance"] = asdict(options.tolerance)
    figures["own_rounding"] = [asdict(own) for own in check.own.values()]
    figures["float_norms"] = len(channel_affines(check.form))
    figures["machine"] = {"cpu": _cpu(), "threads": options.threads or None, "versions": _versions()}
    return figures


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    """A folder in ``target`` to write in, gone afterwards: an export is there as a whole or not at all."""
    draft = target / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # not empty: what we wish for
            target.rmdir()


def _publish(draft: Path, target: Path) -> None:
    """Put the files of a draft in the place of an earlier export's; other files of the folder stay."""
    for name in MANAGED:
        (target / name).unlink(missing_ok=True)
    for path in sorted(draft.iterdir()):
        path.replace(target / path.name)


def _cpu() -> str:
    """Name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "onnx", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):  # it may have another name, as onnxruntime-gpu
            versions[name] = metadata.version(name)
    return versions


def _sweep_records(run: Path, record: RunRecord) -> list[Path]:
    """Return the records that a sweep keeps of this run, where it lies in one."""
    found = sorted((run.parent.parent / "records").glob("*.json")) if run.parent.name == "runs" else []
    readable = [(path, readable_record(path)) for path in found]  # what lies beside a run need not be ours
    return [path for path, other in readable if other is not None and other.config_digest == record.config_digest]


def _containers(student: Student, options: ExportOptions) -> "Sequence[Container]":
    if "onnx" not in options.formats:
        return ()
    from synq.export.onnx_graph import NARROW

    narrow = min(row.bits for row in student.rows) <= NARROW
    return tuple(dict.fromkeys(options.containers)) or (("int4",) if narrow else ("int8",))


def _sizes(student: Student, teacher: Teacher, files: Sequence[ExportedFile]) -> dict[str, Any]:
    sizes = {file.format: file.bytes for file in reversed(files)}
    return {
        "onnx_bytes": sizes.get("onnx"),
        "packed_bytes": sizes.get("packed"),
        "float_bytes": float_bytes(teacher.module),
        "bitops": student.bitops,
    }
