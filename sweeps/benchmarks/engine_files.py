"""The files of one network for an engine: float, the students', and how each is opened."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from synq.config.quant import QuantConfig
from synq.engines.deployed import program_of
from synq.engines.program import Program
from synq.export.targets.formats import FORMATS, image_size
from synq.export.verify import Engine
from synq.network.tracing import trace_classifier
from synq.quant.student import observe_ranges, quantize_model

from .engine_kernels import Layers, layers_in

FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file for an engine.

    Attributes:
        size: In bytes.
        open: Threads -> what runs it.
        layers: Returns how many layers run with integers, and how many there are.
        content: Its bytes; empty if it has no such form.
    """

    size: int
    open: Callable[[int], Engine]
    layers: Callable[[], Layers]
    content: bytes = b""

    @classmethod
    def of(cls, target: str, content: bytes, opener: Callable[[int], Engine]) -> "File":
        """Return the file with a content."""
        return cls(size=len(content), open=opener, layers=lambda: layers_in(target, content), content=content)


def files_of(
    target: str, module: nn.Module, images: Tensor, bits: tuple[tuple[int, int], ...], batch: int
) -> tuple[dict[str, File], bytes]:
    """Return the files of a network by name, and the content of the float one.

    Args:
        target: Name of the engine.
        module: The classifier, in evaluation mode.
        images: (N, C, H, W), on which ranges are observed.
        bits: Bit-widths of weights and activations of each student.
        batch: Images of one run, which a file of ExecuTorch fixes.
    """
    form, size = FORMATS[target], tuple(images.shape[1:])
    graph = trace_classifier(module, size)  # type: ignore[arg-type]
    found: dict[str, File] = {}
    content = b""
    for weight_bits, act_bits in bits:
        program = _program(graph, images, QuantConfig(target=target, weight_bits=weight_bits, act_bits=act_bits))  # type: ignore[arg-type]
        if not found:
            # Batch norms are folded before the file is written: not every tool does so, and what it then leaves in
            # float would be the fault of the file.
            folded = trace_classifier(fuse(copy.deepcopy(module)), size)  # type: ignore[arg-type]
            content = _float_file(target, folded, program, batch)
            found[FLOAT] = File.of(target, content, partial(form.open, content))
        student = _student_file(target, program, batch)
        found[f"W{weight_bits}A{act_bits}"] = File.of(target, student, partial(form.open, student))
    return found, content


def parts_of(images: Tensor, batch: int) -> list[Tensor]:
    """Return images as batches of one size, with repetitions if there are too few."""
    count = -(-len(images) // batch)
    rows = images.repeat(-(-count * batch // len(images)), 1, 1, 1)[: count * batch]
    return list(rows.split(batch))


def _program(graph: fx.GraphModule, images: Tensor, quant: QuantConfig) -> Program:
    student = quantize_model(graph, quant)
    observe_ranges(student.net, images, act_range="minmax")
    size = tuple(images.shape[1:])
    return program_of(student.net, quant, size)  # type: ignore[arg-type]


def _float_file(target: str, graph: fx.GraphModule, program: Program, batch: int) -> bytes:
    if target == "executorch":
        from synq.export.executorch import lowered_to_xnnpack

        return lowered_to_xnnpack(graph, image_size(program), batch)
    return FORMATS[target].write_float(graph, program)


def _student_file(target: str, program: Program, batch: int) -> bytes:
    if target == "executorch":
        from synq.export.executorch import write_pte

        return write_pte(program, batch)
    return FORMATS[target].write(program)
