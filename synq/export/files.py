"""The three kinds of files of an export, each written only after it has answered as the student does."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.common.progress import passing_bar
from synq.evaluation.measure import Measure
from synq.export.packed import load_packed, save_packed
from synq.export.verify import Comparison, Engine, Tolerance, compare, count_kernels, engine_of, open_session
from synq.runs.record import write_bytes_atomic

if TYPE_CHECKING:
    import onnx

    from synq.export.onnx_graph import Container

BATCH = 64
"""Images per forward pass of a comparison."""
Reader = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""Gives images and labels from a first to a last row of a set."""


class ExportRefusedError(RuntimeError):
    """An exported file does not compute what its student computes."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file and what is known of it.

    Attributes:
        name: File name.
        format: onnx, packed or torch.
        bytes: Size.
        sha256: Digest of the content.
        container: How an ONNX file holds integers, see `onnx_file.py`.
        comparisons: What it was compared on.
        integer_kernels, float_kernels: Convolutions and matrix products that ONNX Runtime runs in integers and in float, on this machine.
        latency_ms: Median of one image on this machine's CPU.
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


@dataclass
class Checker:
    """Compares files with the integer form of one student, which is run once on each set of images.

    Attributes:
        form: The integer form of the student.
        simulated: The student of the fine-tuning, on the CPU, which rounds floats.
        synthetic: (N, C, H, W) all synthetic images of the run.
        measure: Opens the labelled images, where there are some.
        tolerance: What a file may differ by.
        progress: Whether a terminal shows a progress bar.
        wanted: The logits of the integer form on each set of images, in batches.
        own: The student of the fine-tuning beside its integer form.
    """

    form: fx.GraphModule
    simulated: nn.Module
    synthetic: Tensor
    measure: Measure
    tolerance: Tolerance
    progress: bool = False
    wanted: dict[str, list[Tensor]] = field(default_factory=dict, init=False)
    own: dict[str, Comparison] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def __call__(self, name: str, engine: Engine) -> tuple[Comparison, ...]:
        """Compare a file with the student on every set of images.

        Raises:
            ExportRefusedError: It differs by more than the tolerance.
        """
        found, sources = [], list(self._sources())
        passes = 1 if self.wanted else 3  # the first time the student answers, too, in both of its forms
        total = passes * sum(number for _, number, _ in sources)
        with passing_bar(total, f"check {name}", "image", is_shown=self.progress) as bar:
            for source, number, read in sources:
                parts = [(start, min(start + BATCH, number)) for start in range(0, number, BATCH)]
                if source not in self.wanted:
                    self.wanted[source] = [self._answer(read(*part)[0], bar) for part in parts]
                    self.own[source] = self._compared(self.simulated, source, parts, read, bar)
                found.append(self._compared(engine, source, parts, read, bar))
                complaint = self.tolerance.complaint(found[-1], self.own[source])
                if complaint:
                    raise ExportRefusedError(f"{name} was not written: {complaint}")
        return tuple(found)

    def _answer(self, images: Tensor, bar: tqdm) -> Tensor:
        bar.update(len(images))
        return self.form(images)

    def _compared(
        self, engine: Engine, source: str, parts: Sequence[tuple[int, int]], read: Reader, bar: tqdm
    ) -> Comparison:
        def answered() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for wanted, (start, stop) in zip(self.wanted[source], parts, strict=True):
                yield wanted, *read(start, stop)
                bar.update(stop - start)

        return compare(engine, answered(), source=source, margin=self.tolerance.margin)

    def _sources(self) -> Iterator[tuple[str, int, Reader]]:
        """Give each set's name, its size, and what reads images and labels of a part of it."""
        yield "synthetic", len(self.synthetic), lambda start, stop: (self.synthetic[start:stop], None)
        labelled, rows = self.measure.labelled, self.measure.reported
        if labelled is not None:
            yield "labelled", len(rows), lambda start, stop: labelled.batch(rows[start:stop])


def export_onnx(
    path: Path, container: "Container", graph: "onnx.ModelProto", check: Checker
) -> tuple[ExportedFile, bytes]:
    """Write the graph of an integer form (`onnx_graph`) as a file; returns what is known of it, and its content.

    Raises:
        ExportRefusedError: As `Checker`.
        ValueError, OSError: It cannot be written.
    """
    from synq.export.onnx_graph import write_container

    content = write_container(graph, container)
    comparisons = check(path.name, engine_of(open_session(content)))
    integers, floats = count_kernels(content)
    write_bytes_atomic(path, content)
    kernels = {"integer_kernels": integers, "float_kernels": floats}
    return _described(path, "onnx", content, comparisons, container=container, **kernels), content


def export_packed(
    path: Path, form: fx.GraphModule, student: fx.GraphModule, about: dict[str, Any], check: Checker
) -> ExportedFile:
    """Write an integer form packed: under another name first, from which it is read back and compared.

    Raises:
        ExportRefusedError: As `Checker`.
        OSError: The disk refuses.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        save_packed(draft, form, about)
        comparisons = check(path.name, load_packed(draft, student))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return _described(path, "packed", path.read_bytes(), comparisons)


def export_program(path: Path, form: fx.GraphModule, input_size: tuple[int, int, int], check: Checker) -> ExportedFile:
    """Write an integer form as a program of ``torch.export``, any number of images; what is compared is what a reader gets.

    Raises:
        ExportRefusedError: As `Checker`.
        OSError: The disk refuses.
    """
    shapes = ({0: torch.export.Dim("N", min=1)},)
    program = torch.export.export(form, (torch.zeros(2, *input_size),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    comparisons = check(path.name, torch.export.load(io.BytesIO(content)).module())
    write_bytes_atomic(path, content)
    return _described(path, "torch", content, comparisons)


def _described(
    path: Path, kind: str, content: bytes, comparisons: tuple[Comparison, ...], **facts: Any
) -> ExportedFile:
    digest = hashlib.sha256(content).hexdigest()
    return ExportedFile(
        name=path.name, format=kind, bytes=len(content), sha256=digest, comparisons=comparisons, **facts
    )
