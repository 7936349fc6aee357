"""The file of each target: how it is written, in which engine it is verified, and what that engine promises."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synq.engines.program import Program
from synq.export.verify import IMAGES, Engine, Tolerance, engine_of, open_session
from synq.quant.integer_form import integer_form
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from openvino import CompiledModel

Opener = Callable[[bytes, int], Engine]
"""(content of a file, threads) -> what runs it; 0 threads: the engine's default."""


@dataclass(frozen=True, kw_only=True)
class TargetFormat:
    """The file of one target.

    Attributes:
        file: Its name.
        format: Its format, as in `ExportedFile`.
        engine: Name of the engine that verifies it, for messages.
        packages: Packages that writing and verifying need.
        extra: The project's extra that has them.
        write: Returns the content of the file of a program.
        write_float: Returns the content of the float teacher's file of the same format, for its time and size.
        open: Opens content in the engine with its default options.
        bit_equal: Whether every logit must be the simulation's to the last bit.
        agreement: Else the smallest percentage of images with the same class that may be asked for.
    """

    file: str
    format: str
    engine: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[Program], bytes]
    write_float: Callable[[Teacher, Program], bytes]
    open: Opener
    bit_equal: bool = True
    agreement: float = 100.0

    def tolerance(self, given: Tolerance) -> Tolerance:
        """Return the tolerance of a verification: no stricter than what the engine can promise."""
        return given if self.bit_equal else replace(given, agreement=min(given.agreement, self.agreement))

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.packages if find_spec(name.replace("-", "_")) is None]


def format_of(target: str) -> TargetFormat:
    """Return the format of a target.

    Raises:
        ValueError: If no file is written for it, or a package is missing.
    """
    if target not in FORMATS:
        raise ValueError(
            f"`quant.target` must be one of {', '.join(FORMATS)} to write a file, but got {target}: files of "
            "this engine are not written yet"
        )
    found = FORMATS[target]
    if missing := found.missing():
        raise ValueError(
            f"the file of target {target} must be written and verified with {' and '.join(found.packages)}, but "
            f"{missing[0]} is missing: pip install 'synq[{found.extra}]'"
        )
    return found


def _standard_onnx(program: Program) -> bytes:
    from synq.export.standard_onnx import standard_onnx

    return bytes(standard_onnx(program).SerializeToString())


def _float_onnx(teacher: Teacher, program: Program) -> bytes:
    from synq.export.onnx_graph import write_onnx

    return write_onnx(integer_form(teacher.graph, operations="onnx"), teacher.input_size)


def _in_onnxruntime(content: bytes, threads: int) -> Engine:
    return engine_of(open_session(content, threads))


def in_openvino(content: bytes, threads: int, *, precision: str = "f32") -> Engine:
    """Open an ONNX file in OpenVINO on the CPU.

    Args:
        content: The file.
        threads: Threads of one inference; 0: the engine's default.
        precision: Hint for what is not quantized: f32, or bf16, the default on CPUs that have it.
    """
    import openvino

    core = openvino.Core()
    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled: CompiledModel = core.compile_model(core.read_model(content, b""), "CPU", options)
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        found = request.infer({IMAGES: images.float().numpy()})
        return torch.from_numpy(next(iter(found.values())).copy())

    return run


_ONNX = partial(
    TargetFormat, file="model.onnx", format="onnx", write=_standard_onnx, write_float=_float_onnx, extra="export"
)
FORMATS: dict[str, TargetFormat] = {
    "onnxruntime": _ONNX(
        engine="ONNX Runtime", packages=("onnx", "onnxruntime", "onnxscript", "ml_dtypes"), open=_in_onnxruntime
    ),
}
"""By target."""
