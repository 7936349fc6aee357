"""From a run's folder to files that an engine runs, each compared with the student before it counts.

    run folder -> student -> integer form -> model.onnx (QuantizeLinear/DequantizeLinear), model.safetensors (packed), model.pt2 (torch.export)
               -> comparison with the student -> deployment figures, in the run's record too -> model card

A file under its final name has passed its comparison.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import fx

from synq.accounting import float_bytes
from synq.config_io import one_of
from synq.configs import RunConfig, config_from_dict
from synq.evaluation import Measure
from synq.exported_files import Checker, ExportedFile, export_onnx, export_packed, export_program
from synq.integer_form import BiasPlace, integer_form
from synq.model_card import card_values, siblings_of, write_card
from synq.onnx_file import NARROW, Container, write_onnx
from synq.packed_file import load_packed, read_packed
from synq.pipeline import build_student, prepare
from synq.results import RunRecord, read_record, write_record
from synq.students import Student
from synq.teacher_sources import RANDOM
from synq.teachers import Teacher, load_teacher
from synq.verification import Tolerance, latencies
from synq.weight_files import read_weights

FORMATS = ("onnx", "packed", "torch")
CONTAINERS = ("int4", "int8")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write and how to check it.

    Attributes:
        formats: Some of onnx, packed, torch.
        containers: ONNX files to write, int4 and int8; empty: int4 where a width is at most 4, else int8.
        tolerance: What a file may differ by.
        rounds: Runs of each model for its latency; 0 measures none.
        threads: Threads of ONNX Runtime when it is timed; 0: its default.
    """

    formats: Sequence[str] = FORMATS
    containers: Sequence[Container] = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    rounds: int = 30
    threads: int = 0

    def __post_init__(self) -> None:
        for word in self.formats:
            one_of("formats", word, FORMATS)
        for word in self.containers:
            one_of("container", word, CONTAINERS)
        if not self.formats:
            raise ValueError(f"`formats` must be some of {', '.join(FORMATS)}, but got none")


def open_run(folder: str | Path) -> tuple[Path, RunRecord, Teacher, Student]:
    """Return folder, record, teacher and student of a finished run.

    Args:
        folder: The run's folder, the record in it, or a sweep's record of it (records/TRIAL.json).

    Raises:
        FileNotFoundError: It is no run, or not a finished one.
        ValueError: A file is damaged, or the teacher is another one than then.
    """
    path = _run_folder(Path(folder))
    if not (path / "record.json").is_file():
        started = (path / "checkpoint.pt").exists() or (path / "config.json").exists()
        hint = (
            "it is not finished, start its command again" if started else "give the folder of one run, runs/NAME-DIGEST"
        )
        raise FileNotFoundError(f"`RUN` must hold record.json, but {path} does not: {hint}")
    record = read_record(path / "record.json")
    if record.status != "completed":
        raise ValueError(f"`RUN` must be a completed run, but {path} is {record.status}: {record.reason}")
    config = config_from_dict(RunConfig, record.config, source=str(path / "record.json"))
    teacher = load_teacher(config.teacher)
    if teacher.digest != record.teacher.get("digest"):
        raise ValueError(
            f"`RUN` must be of the teacher {config.teacher.spec} as it is now, but {path} is of other weights"
        )
    student = build_student(teacher, config.quant)
    weights = path / "student.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"`RUN` must hold student.safetensors, but {path} does not: run it again in another folder"
        )
    try:
        student.net.load_state_dict(read_weights(weights))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`RUN` must hold a student of its teacher, but {weights} is none: {reason}") from error
    return path, record, teacher, student


def export_run(
    folder: str | Path,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[Path, RunRecord]:
    """Export a finished run, compare every file with the student, and write the deployment figures into the run's record.

    Args:
        folder: The run's folder.
        out: Where the files go; None is the folder `export` in the run's own.
        options: What to write and how to check it.
        accelerator: Process group; None makes one for the CPU.

    Returns:
        The folder, and the record with its deployment figures.

    Raises:
        ExportRefusedError: A file differs from the student by more than the tolerance; it is not left behind.
        FileNotFoundError, ValueError, OSError: As `open_run`; or the disk refuses.
    """
    options, accelerator = options or ExportOptions(), accelerator or Accelerator(cpu=True)
    run, record, teacher, student = open_run(folder)
    target = Path(out) if out is not None else run / "export"
    config = config_from_dict(RunConfig, record.config)
    train_set, heldout = prepare(config, accelerator=accelerator)
    check = Checker(
        student=student.net,
        synthetic=torch.cat([heldout.images, train_set.images]),
        measure=Measure.prepare(config.evaluation, teacher, accelerator),
        tolerance=options.tolerance,
    )
    form, size = integer_form(student.net, bias_place=_bias_place(student)), teacher.input_size
    files: list[ExportedFile] = []
    models: dict[str, bytes] = {}
    for container in _containers(student, options):
        name = f"model_{container}.onnx" if len(options.containers) > 1 else "model.onnx"
        file, models[name] = export_onnx(target / name, container, form, size, check)
        files.append(file)
    if "packed" in options.formats:
        about = {"config": record.config, "input_size": list(size), "num_classes": teacher.num_classes}
        files.append(export_packed(target / "model.safetensors", form, student.net, about, check))
    if "torch" in options.formats:
        files.append(export_program(target / "model.pt2", form, size, check))
    figures = _sizes(student, teacher, files)
    if models:
        floating = write_onnx(integer_form(teacher.graph), size)
        figures["float_onnx_bytes"] = len(floating)
        if options.rounds:
            timed = {**models, "": floating}
            times = latencies(timed, heldout.images[:1], threads=options.threads, rounds=options.rounds)
            files = [replace(file, latency_ms=times.get(file.name)) for file in files]
            figures |= {"latency_ms": times[next(iter(models))], "float_latency_ms": times[""]}
    figures["files"] = [asdict(file) for file in files]
    record = replace(record, deployment=figures)
    for path in (run / "record.json", *_sweep_records(run, record)):
        write_record(path, replace(read_record(path), deployment=figures))
    write_card(target, card_values(record, siblings_of(record, run)))
    return target, record


def load_student(path: str | Path, spec: str | None = None) -> fx.GraphModule:
    """Return the network in a packed file, ready to run: images as the teacher takes them -> logits. No weights but the file's are read.

    Args:
        path: A file `model.safetensors` of an export.
        spec: Where the teacher's architecture comes from; None is the spec that the file names.

    Raises:
        FileNotFoundError, ValueError: As `read_packed`; or the architecture cannot be built, or is another one.
    """
    _, facts = read_packed(path)
    about = facts["about"]
    if "config" not in about:
        raise ValueError(f"a packed student must name its teacher, but {path} does not")
    config = config_from_dict(RunConfig, about["config"], source=str(path))
    architecture = replace(
        config.teacher,
        spec=spec or config.teacher.spec,
        weights=RANDOM,
        input_size=tuple(about["input_size"]),
        num_classes=about["num_classes"],
    )
    return load_packed(path, build_student(load_teacher(architecture), config.quant).net)


def _run_folder(path: Path) -> Path:
    if path.name == "record.json":
        return path.parent
    if path.suffix == ".json" and path.parent.name == "records" and path.is_file():
        record = read_record(path)
        return path.parent.parent / "runs" / f"{record.config['name']}-{record.config_digest}"
    return path


def _sweep_records(run: Path, record: RunRecord) -> list[Path]:
    """Return the records that a sweep keeps of this run, where it lies in one."""
    found = sorted((run.parent.parent / "records").glob("*.json")) if run.parent.name == "runs" else []
    return [path for path in found if read_record(path).config_digest == record.config_digest]


def _containers(student: Student, options: ExportOptions) -> Sequence[Container]:
    if "onnx" not in options.formats:
        return ()
    narrow = min(row.bits for row in student.rows) <= NARROW
    return tuple(dict.fromkeys(options.containers)) or (("int4",) if narrow else ("int8",))


def _bias_place(student: Student) -> BiasPlace:
    """Engines round a layer's own bias to the grid of its products, which only 8-bit operands make fine enough."""
    return "layer" if min(row.bits for row in student.rows) == 8 else "apart"


def _sizes(student: Student, teacher: Teacher, files: Sequence[ExportedFile]) -> dict[str, Any]:
    sizes = {file.format: file.bytes for file in reversed(files)}
    return {
        "onnx_bytes": sizes.get("onnx"),
        "packed_bytes": sizes.get("packed"),
        "float_bytes": float_bytes(teacher.module),
        "bitops": student.bitops,
    }
