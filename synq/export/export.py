"""Export the student of a finished run to files for inference engines, each verified against the student.

    run folder -> student -> integer form -> model.onnx (QuantizeLinear/DequantizeLinear), model.safetensors (packed),
    model.pt2 (torch.export) -> comparison with the student -> deployment metrics in the run's record -> model card

A file has its final name only after it has passed the comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from synq.common.notices import print_notice
from synq.config.parsing import between, one_of
from synq.config.quant import RESEARCH
from synq.config.run import PATH_SETTINGS
from synq.config.synthesis import OWN_IMAGES
from synq.engines.deployed import deployed_network
from synq.engines.simulation import Simulation
from synq.evaluation.measure import Measure
from synq.export.card import card_values, readable_record, siblings_of, write_card
from synq.export.exactness import inexact_steps
from synq.export.files import Checker, ExportedFile, export_onnx, export_packed, export_program
from synq.export.out_folder import check_out_folder, draft_of, publish
from synq.export.packed import channel_affines
from synq.export.targets.export import FLOAT, conformance_of, export_target, target_latencies, with_latency
from synq.export.targets.formats import TargetFormat, format_of
from synq.export.timing import Latency, latencies, machine
from synq.export.verify import Tolerance
from synq.quant.cost import float_bytes
from synq.quant.integer_form import integer_form
from synq.quant.student import Student
from synq.runs.expected_agreement import doubts
from synq.runs.finished import open_run
from synq.runs.record import DEPLOYED, RunRecord, read_record, write_record
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from synq.export.onnx_graph import Container

FORMATS = ("onnx", "packed", "torch")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "ml_dtypes")
"""Packages that the ONNX format requires; the other formats do not."""
MAX_TOP1_DIFFERENCE = 1.0
"""Largest difference of a student's top-1 from its record's, in points, that another device may make."""
MAX_IMAGES = 2
"""The same in images, where that is more."""
CONTAINERS = ("int4", "int8", "matmul")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Formats of an export, and how its files are verified and timed.

    Attributes:
        formats: Some of FORMATS, for a student of target research; empty: all, or the one file of its engine.
        containers: ONNX files to write, some of CONTAINERS; empty: int4 if a bit-width is at most 4, otherwise int8.
        tolerance: Largest accepted difference of a file from the student.
        rounds: Timed runs of each model; 0 measures no latency.
        threads: Threads of ONNX Runtime in timed runs; 0: its default. Only with one is the processor time measured,
            see `timing.py`.
        with_float: Whether the float teacher is exported to ONNX too, to measure size and latency; not kept.
        path_overrides: Current paths of the run's teacher, images and labels, by configuration key, if they were moved.
        progress: Whether a terminal shows progress bars.
        without_labels: Whether the run's labeled images are out of reach, so that synthetic ones must do.
    """

    formats: Sequence[str] = ()
    containers: "Sequence[Container]" = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    rounds: int = 30
    threads: int = 1
    with_float: bool = True
    path_overrides: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False
    without_labels: bool = False

    def __post_init__(self) -> None:
        for key in self.path_overrides:
            one_of("path_overrides", key, PATH_SETTINGS)
        for name in self.formats:
            one_of("formats", name, FORMATS)
        for name in self.containers:
            one_of("container", name, CONTAINERS)
        if self.containers and "onnx" not in (self.formats or FORMATS):
            raise ValueError("`container` must be left out unless `formats` has onnx: the other formats have none")
        between("rounds", self.rounds, 0)
        between("threads", self.threads, 0)
        if "onnx" in self.formats:
            check_onnx_packages()

    def format_for(self, target: str) -> TargetFormat | None:
        """Return the file of an engine; None for target research, whose files are those of ``formats``.

        Raises:
            ValueError: If packages are missing, or options do not fit the target.
        """
        if target == RESEARCH:
            if not self.formats:
                check_onnx_packages()
            return None
        form = format_of(target)
        for name, given in (("formats", self.formats), ("container", self.containers)):
            if given:
                raise ValueError(
                    f"`{name}` must be left out for a student of target {target}, whose one file is {form.file}, "
                    f"but got {', '.join(given)}"
                )
        return form


def check_onnx_packages() -> None:
    """Raise ValueError if a package of ONNX_PACKAGES is missing."""
    if missing := missing_packages():
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
        FileNotFoundError, ValueError, OSError: As `open_run`; ValueError also if no file of the options can be written
            for the run's target, OSError if a file cannot be written.
    """
    options, accelerator = options or ExportOptions(), accelerator or Accelerator(cpu=True)
    run = open_run(folder, options.path_overrides, teacher)
    record, student, quant, evaluation = run.record, run.student, run.config.quant, run.config.evaluation
    if options.without_labels:
        evaluation = replace(evaluation, dataset="none", objective="synthetic")
    for_engine = options.format_for(quant.target)
    for text in doubts(record.expected_agreement):  # before anything is written
        print_notice(f"warning: {text}")
    target = (Path(out) if out is not None else run.folder / "export").resolve()
    check_out_folder(target)
    siblings, copies = siblings_of(record, run.folder), _sweep_records(run.folder, record)
    with draft_of(target) as draft:  # first, so that a place that cannot be written to costs no work
        train_set, heldout = run.synthetic_sets()
        deployed = deployed_network(student.net, quant, run.teacher.input_size)
        check = Checker(
            form=deployed,
            simulated=student.net,
            images=_images_by_source(run.config.synthesis.method, train_set.images, heldout.images),
            measure=Measure.prepare(evaluation, run.teacher, accelerator, quant=run.config.quant),
            tolerance=options.tolerance if for_engine is None else for_engine.tolerance(options.tolerance),
            progress=options.progress,
            exact=_is_exact(deployed, for_engine),
        )
        if not options.without_labels and not check.measure.has_labels_of(record.eval_digest):
            raise ValueError(
                "`RUN` must have the labeled images with which it was evaluated, but they have changed or are missing: "
                "give their current path with `--evaluation.dataset`"
            )
        if for_engine is None:
            metrics = _write_files(draft, record, run.teacher, student, check, options)
        else:
            metrics = _write_target_file(draft, for_engine, run.teacher, student, check, options)
        _check_top1(record, check)
        record = replace(record, deployment=metrics)
        write_card(draft, card_values(record, siblings))
        publish(draft, target)
    for path in (run.folder / "record.json", *copies):
        there = read_record(path)
        # An export of fewer formats keeps the columns that it did not measure.
        kept = {key: there.deployment.get(key) for key in DEPLOYED if record.deployment.get(key) is None}
        write_record(path, replace(there, deployment={**record.deployment, **kept}))
    return target, record


def _images_by_source(method: str, trained: Tensor, heldout: Tensor) -> dict[str, Tensor]:
    """Return the images of a run by what they are: those of the user are own, all others synthetic."""
    if method == OWN_IMAGES:
        return {"synthetic": heldout, "own": trained}
    return {"synthetic": torch.cat([heldout, trained])}


def _check_top1(record: RunRecord, check: Checker) -> None:
    """Raise ValueError if the student that was read is not the one whose accuracy is on record.

    Another device, whose float sums round differently, may have given a few images another class.
    """
    found = check.simulation.get("labeled")
    if found is None or record.top1 is None:
        return
    measured, allowed = found.student_top1, max(MAX_TOP1_DIFFERENCE, 100 * MAX_IMAGES / found.images)
    if measured is not None and abs(measured - record.top1) > allowed:
        raise ValueError(
            f"the student of `RUN` must have the top-1 of its record, {record.top1:.2f}, but has {measured:.2f} on the "
            "same images: its files are damaged, of another run, or of another version of SynQ; train it again"
        )


def _is_exact(deployed: nn.Module, form: TargetFormat | None) -> bool:
    """Return whether every logit of a file must be that of the deployed network, to the last bit."""
    if form is not None:
        return form.bit_equal
    assert isinstance(deployed, fx.GraphModule)
    return not inexact_steps(deployed)


def _write_files(
    target: Path, record: RunRecord, teacher: Teacher, student: Student, check: Checker, options: ExportOptions
) -> dict[str, Any]:
    """Write and verify the files that ``options`` select; return the deployment metrics."""
    form = check.form
    assert isinstance(form, fx.GraphModule)
    containers, size, formats = _containers(student, options), teacher.input_size, options.formats or FORMATS
    files: list[ExportedFile] = []
    models: dict[str, bytes] = {}
    if containers:
        from synq.export.onnx_graph import check_operations, onnx_graph, write_onnx

        check_operations(form)
        graph = onnx_graph(integer_form(student.net, operations="onnx"), size)
    for container in containers:
        name = f"model_{container}.onnx" if len(options.containers) > 1 else "model.onnx"
        file, models[name] = export_onnx(target / name, container, graph, check)
        files.append(file)
    if "packed" in formats:
        about = {
            **_code_of(record),
            "config": record.config,
            "input_size": list(size),
            "num_classes": teacher.num_classes,
        }
        files.append(export_packed(target / "model.safetensors", form, student.net, about, check))
    if "torch" in formats:
        files.append(export_program(target / "model.pt2", integer_form(student.net, operations="torch"), size, check))
    metrics = _sizes(student, teacher, files)
    if models and options.with_float:
        float_model = write_onnx(integer_form(teacher.graph, operations="onnx"), size)
        metrics["float_onnx_bytes"] = len(float_model)
        if options.rounds:
            timed = {**models, FLOAT: float_model}
            times = latencies(timed, check.example, threads=options.threads, rounds=options.rounds)
            files = [with_latency(file, times) if file.name in times else file for file in files]
            metrics |= _speed(times[next(iter(models))], times[FLOAT])
    return metrics | _verification(files, check, options) | {"float_norms": len(channel_affines(form))}


def _code_of(record: RunRecord) -> dict[str, Any]:
    return {"code": record.teacher["code"]} if "code" in record.teacher else {}


def _write_target_file(
    folder: Path, form: TargetFormat, teacher: Teacher, student: Student, check: Checker, options: ExportOptions
) -> dict[str, Any]:
    """Write and verify the file of a student for an engine; return the deployment metrics."""
    assert isinstance(check.form, Simulation)
    program = check.form.program
    file, content = export_target(folder, program, form, check)
    metrics = _sizes(student, teacher, [file])
    if options.with_float:
        float_file = form.write_float(teacher.graph, program)
        metrics["float_onnx_bytes"] = len(float_file)
        if options.rounds and not form.checked_for:
            contents, images = {file.name: content, FLOAT: float_file}, check.example
            times = target_latencies(
                contents,
                form,
                images,
                threads=options.threads,
                rounds=options.rounds,
                entries=file.session_entries,
            )
            file = with_latency(file, times)
            metrics |= _speed(times[file.name], times[FLOAT])
    metrics |= {"float_norms": 0, "engine": form.engine, "conformance": conformance_of(content, form)}
    metrics |= {"checked_for": form.checked_for} if form.checked_for else {}
    return metrics | _verification([file], check, options)


def _verification(files: Sequence[ExportedFile], check: Checker, options: ExportOptions) -> dict[str, Any]:
    """Return the deployment metrics of the files, how they were verified, and where."""
    return {
        "files": [asdict(file) for file in files],
        "tolerance": asdict(check.tolerance),
        "exact": check.exact,
        "own_rounding": [asdict(comparison) for comparison in check.simulation.values()],
        "machine": machine(options.threads),
    }


def _speed(first: Latency, teacher: Latency) -> dict[str, Any]:
    """Return the deployment metrics of the first ONNX file's speed; without stable times none but their spread."""
    metrics: dict[str, Any] = {"latency_spread": max(first.spread, teacher.spread)}
    if first.is_stable and teacher.is_stable:
        metrics |= {"latency_ms": first.median, "float_latency_ms": teacher.median}
        metrics["latency_ratio"] = first.ratio_to(teacher)
    return metrics


def _sweep_records(run: Path, record: RunRecord) -> list[Path]:
    """Return the paths of the sweep's records of this run; empty if the run is not part of a sweep."""
    found = sorted((run.parent.parent / "records").glob("*.json")) if run.parent.name == "runs" else []
    readable = [(path, readable_record(path)) for path in found]  # other files may be in that folder
    return [path for path, other in readable if other is not None and other.config_digest == record.config_digest]


def _containers(student: Student, options: ExportOptions) -> "Sequence[Container]":
    if "onnx" not in (options.formats or FORMATS):
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
