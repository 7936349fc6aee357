"""Write the file of a student for an engine: verified in that engine image by image, and timed next to float."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from synq.common.files import write_bytes_atomic
from synq.common.notices import print_notice
from synq.engines.program import Program
from synq.export.card_text import session_warning
from synq.export.files import Checker, ExportedFile, ExportRejectedError, metadata_of
from synq.export.targets.formats import TargetFormat
from synq.export.timing import Latency, run_latencies
from synq.export.verify import sums_saturate

FLOAT = ""
"""Name of the float teacher among timed models."""


def export_target(folder: Path, program: Program, form: TargetFormat, check: Checker) -> tuple[ExportedFile, bytes]:
    """Write the file of a program, after its verification.

    Args:
        folder: Folder of the file.
        program: The program.
        form: Format of its target.
        check: Compares the file with the simulation of the program.

    Returns:
        Metadata of the file, and its content. On a processor without VNNI a file that the default session computes
        wrong is verified with the format's `session_entries`, which the metadata have.

    Raises:
        ExportRejectedError: If the file differs from the simulation by more than its engine promises.
        ValueError, OSError: If it cannot be written; ValueError also if it breaks a published rule of an engine that
            does not run here.
    """
    content = form.write(program)
    _check_rules(content, program.target, form)
    entries: Mapping[str, str] = {}
    try:
        comparisons = check(form.file, form.open(content, 0))
    except ExportRejectedError:
        if not (form.session_entries and sums_saturate()):
            raise
        entries = form.session_entries
        comparisons = check(form.file, form.opener(entries)(content, 0))
        print_notice(f"warning: {session_warning(entries)}")
    kernels: dict[str, int] = {}
    if form.format == "onnx" and not form.checked_for:
        from synq.export.kernels import count_kernels

        integers, floats = count_kernels(content)
        kernels = {"integer_kernels": integers, "float_kernels": floats}
    path = folder / form.file
    write_bytes_atomic(path, content)
    facts = {"container": program.target, "session_entries": dict(entries), **kernels}
    return metadata_of(path, form.format, content, comparisons, **facts), content


def _check_rules(content: bytes, target: str, form: TargetFormat) -> None:
    """Raise ValueError if a file for an engine that does not run here breaks one of its published rules."""
    if not form.checked_for:
        return
    import onnx

    from synq.export.conformance import violations

    if found := violations(onnx.load_from_string(content), target):  # type: ignore[arg-type]
        raise ValueError(
            f"{form.file} must keep the published rules of {form.checked_for}, but breaks {len(found)} of them: "
            f"{found[0]}. Set `quant.target` to onnxruntime, which has a form for each operation"
        )


def target_latencies(
    contents: Mapping[str, bytes],
    form: TargetFormat,
    images: Tensor,
    *,
    threads: int,
    rounds: int,
    entries: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Latency]:
    """Return the latency of files in the engine of their target, taken in turns.

    Args:
        contents: Files by name, the float teacher's under `FLOAT`.
        form: Format of the target.
        images: (N, C, H, W); one run processes all of them.
        threads: Threads of one run; with one, processor time is measured.
        rounds: Timed rounds, >= 1.
        entries: Configuration entries of the sessions.
    """

    def runner(content: bytes) -> Callable[[], object]:
        engine = form.opener(entries)(content, threads)
        return lambda: engine(images)

    return run_latencies({name: runner(content) for name, content in contents.items()}, threads=threads, rounds=rounds)


def with_latency(file: ExportedFile, times: Mapping[str, Latency]) -> ExportedFile:
    """Return the metadata of a file with its latency, if that is stable.

    Args:
        file: The metadata.
        times: By file name, the float teacher's under `FLOAT`.
    """
    own, teacher = times[file.name], times[FLOAT]
    return replace(
        file,
        latency_spread=own.spread,
        latency_ms=own.median if own.is_stable else None,
        latency_ratio=own.ratio_to(teacher) if own.is_stable and teacher.is_stable else None,
    )


def conformance_of(content: bytes, form: TargetFormat) -> dict[str, dict[str, object]]:
    """Return how many published rules of engines that do not run here a file breaks, and the first, by engine.

    Empty if the file is not ONNX.

    Args:
        content: The file.
        form: Its format.
    """
    if form.format != "onnx":
        return {}
    import onnx

    from synq.export.conformance import ENGINES, violations

    model = onnx.load_from_string(content)
    found = {engine: violations(model, engine) for engine in ENGINES}
    return {engine: {"violations": len(lines), "first": next(iter(lines), "")} for engine, lines in found.items()}
