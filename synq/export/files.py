"""Export a student to ONNX, packed safetensors or a torch.export program, written only after verification."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from synq.common.files import write_bytes_atomic
from synq.common.progress import Bar, passing_bar
from synq.evaluation.measure import Measure
from synq.export.kernels import count_kernels
from synq.export.operation_check import reason
from synq.export.packed import load_packed, save_packed
from synq.export.verify import Comparison, Engine, Tolerance, compare, engine_of, open_session

if TYPE_CHECKING:
    import onnx

    from synq.export.onnx_graph import Container

BATCH = 64
"""Images per forward pass of a comparison."""
Reader = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""(start, stop) -> images and labels of these rows of a set; labels are None for synthetic images."""


class ExportRejectedError(RuntimeError):
    """The outputs of an exported file differ from those of its student by more than the tolerance."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """Metadata and verification results of one exported file.

    Attributes:
        name: File name.
        format: onnx, packed, torch, tflite or pte.
        bytes: Size in bytes.
        sha256: Digest of the content.
        container: Integer types of an ONNX file of target research, see `onnx_graph.py`; the engine of a file that is
            for one; else "".
        comparisons: Comparison with the student, one for each set of images.
        integer_kernels, float_kernels: Number of convolutions and matrix products that ONNX Runtime runs with integer
            and with float kernels, on this machine; None for other formats.
        latency_ms: Median latency of one image on this machine's CPU, in ms; None if not measured, or if its spread is
            too large to store it.
        latency_ratio: Median ratio of the latency to that of the float teacher, round by round; None as above.
        latency_spread: Interquartile range of the latency relative to its median, see `timing.py`.
        session_entries: Configuration entries that a session of its engine needs on this processor.
    """

    name: str
    format: str
    bytes: int
    sha256: str
    container: str = ""
    comparisons: Sequence[Comparison] = ()
    integer_kernels: int | None = None
    float_kernels: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    latency_spread: float | None = None
    session_entries: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Checker:
    """Compare files with the integer form of a student, which is run once on each set of images.

    Attributes:
        form: The student as it is deployed: its integer form, or the simulation of its engine.
        simulated: The fine-tuned student, with fake quantization, on the CPU.
        images: (N, C, H, W) the run's sets of images by name: synthetic, and own for unlabeled ones of the user.
        measure: Provides the labeled images, if there are any.
        tolerance: Largest accepted difference.
        progress: Whether to show a progress bar.
        exact: Whether every logit of an ONNX or packed file must be bit-identical, see `exactness.py`.
        reference_logits: Logits of the integer form for each set of images, in batches.
        simulation: Comparison of the fine-tuned student with its integer form, for each set of images.
    """

    form: nn.Module
    simulated: nn.Module
    images: Mapping[str, Tensor]
    measure: Measure
    tolerance: Tolerance
    progress: bool = False
    exact: bool = False
    reference_logits: dict[str, list[Tensor]] = field(default_factory=dict, init=False)
    simulation: dict[str, Comparison] = field(default_factory=dict, init=False)

    @property
    def example(self) -> Tensor:
        """Return one image, (1, C, H, W)."""
        return next(iter(self.images.values()))[:1]

    @torch.no_grad()
    def __call__(self, name: str, engine: Engine, *, divides: bool = True) -> tuple[Comparison, ...]:
        """Compare a file with the student on every set of images.

        Args:
            name: Name of the file, for messages.
            engine: Runs the file.
            divides: Whether the file divides by the scale of an activation, as the integer form does.

        Returns:
            One comparison for each set of images.

        Raises:
            ExportRejectedError: If a comparison exceeds the tolerance.
        """
        comparisons, sources = [], list(self._sources())
        passes = 1 if self.reference_logits else 3  # the first call also runs the student, in both of its forms
        total = passes * sum(number for _, number, _ in sources)
        with passing_bar(total, f"check {name}", "image", is_shown=self.progress) as bar:
            for source, number, read in sources:
                parts = [(start, min(start + BATCH, number)) for start in range(0, number, BATCH)]
                if source not in self.reference_logits:
                    self.reference_logits[source] = [self._run_form(read(*part)[0], bar) for part in parts]
                    self.simulation[source] = self._compare(self.simulated, source, parts, read, bar)
                comparisons.append(self._compare(engine, source, parts, read, bar))
                violation = self.tolerance.violation(
                    comparisons[-1], self.simulation[source], exact=self.exact and divides
                )
                if violation:
                    raise ExportRejectedError(f"{name} was not written: {violation}")
        return tuple(comparisons)

    def _run_form(self, images: Tensor, bar: Bar) -> Tensor:
        bar.update(len(images))
        return self.form(images)

    def _compare(
        self, engine: Engine, source: str, parts: Sequence[tuple[int, int]], read: Reader, bar: Bar
    ) -> Comparison:
        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for logits, (start, stop) in zip(self.reference_logits[source], parts, strict=True):
                yield logits, *read(start, stop)
                bar.update(stop - start)

        return compare(engine, batches(), source=source, margin=self.tolerance.margin)

    def _sources(self) -> Iterator[tuple[str, int, Reader]]:
        """Yield the name of each set of images, its size, and its reader."""
        for name, images in self.images.items():
            yield name, len(images), partial(_rows, images)
        labeled, rows = self.measure.labeled, self.measure.reported
        if labeled is not None:
            yield "labeled", len(rows), lambda start, stop: labeled.batch(rows[start:stop])


def _rows(images: Tensor, start: int, stop: int) -> tuple[Tensor, None]:
    return images[start:stop], None


def export_onnx(
    path: Path, container: "Container", graph: "onnx.ModelProto", check: Checker
) -> tuple[ExportedFile, bytes]:
    """Write an ONNX file from the graph of an integer form, after verification.

    Args:
        path: The file.
        container: Integer types of the weights, see `onnx_graph.py`.
        graph: From `onnx_graph`.
        check: Compares the model with the student.

    Returns:
        Metadata of the file, and its content.

    Raises:
        ExportRejectedError: As `Checker`.
        ValueError, OSError: If the file cannot be written.
    """
    from synq.export.onnx_graph import write_container

    content = write_container(graph, container)
    comparisons = check(path.name, engine_of(open_session(content)))
    integers, floats = count_kernels(content)
    write_bytes_atomic(path, content)
    kernels = {"integer_kernels": integers, "float_kernels": floats}
    return metadata_of(path, "onnx", content, comparisons, container=container, **kernels), content


def export_packed(
    path: Path, form: fx.GraphModule, student: fx.GraphModule, about: dict[str, Any], check: Checker
) -> ExportedFile:
    """Write a packed file from an integer form, after verification.

    It is written to a temporary file first, from which it is loaded and compared.

    Args:
        path: The file.
        form: The integer form.
        student: Network of the student, from which the packed file is loaded.
        about: Additional metadata, see `save_packed`.
        check: Compares the loaded network with the student.

    Raises:
        ExportRejectedError: As `Checker`.
        OSError: If the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        save_packed(draft, form, about)
        comparisons = check(path.name, load_packed(draft, student))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return metadata_of(path, "packed", path.read_bytes(), comparisons)


def export_program(path: Path, form: fx.GraphModule, input_size: tuple[int, int, int], check: Checker) -> ExportedFile:
    """Write a ``torch.export`` program from an integer form, after verification of the deserialized program.

    Args:
        path: The file.
        form: An integer form with the operations "torch".
        input_size: (C, H, W) of one image; the number of images is dynamic.
        check: Compares the program with the student.

    Raises:
        ExportRejectedError: As `Checker`.
        ValueError: If ``torch.export`` cannot export the network for a dynamic number of images.
        OSError: If the file cannot be written.
    """
    shapes = ({0: torch.export.Dim("N", min=1)},)
    try:
        program = torch.export.export(form, (torch.zeros(2, *input_size),), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many types, all with the same meaning for the user
        raise ValueError(f"the student cannot be exported by torch.export: {reason(error)}") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    comparisons = check(path.name, torch.export.load(io.BytesIO(content)).module(), divides=False)
    write_bytes_atomic(path, content)
    return metadata_of(path, "torch", content, comparisons)


def metadata_of(
    path: Path, kind: str, content: bytes, comparisons: tuple[Comparison, ...], **facts: Any
) -> ExportedFile:
    """Return the metadata of a written file.

    Args:
        path: The file.
        kind: Its format.
        content: Its bytes.
        comparisons: How it was verified.
        facts: Other attributes of `ExportedFile`.
    """
    digest = hashlib.sha256(content).hexdigest()
    return ExportedFile(
        name=path.name, format=kind, bytes=len(content), sha256=digest, comparisons=comparisons, **facts
    )
