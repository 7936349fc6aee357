"""The file of each target: how it is written, in which engine it is verified, and what that engine promises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from synq.engines.program import Program
from synq.export.verify import Engine, Tolerance, engine_of, open_session
from synq.quant.integer_form import integer_form

if TYPE_CHECKING:
    import openvino

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
        write_float: Returns the content of the file of the traced float network, of the same format, for its time and
            size; the program gives the size of an image.
        open: Opens content in the engine with its default options.
        session_entries: Configuration entries of a session without which files of full 8-bit weights are computed
            wrong on processors without VNNI; empty if there are none.
        bit_equal: Whether every logit must be the simulation's to the last bit.
        agreement: Else the smallest percentage of images with the same class that may be asked for.
        checked_for: Name of the engine that does not run here, whose published rules the file must keep; "" if the
            engine that verifies the file is the one that it is for.
    """

    file: str
    format: str
    engine: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[Program], bytes]
    write_float: Callable[[fx.GraphModule, Program], bytes]
    open: Opener
    session_entries: Mapping[str, str] = field(default_factory=dict)
    bit_equal: bool = True
    agreement: float = 100.0
    checked_for: str = ""

    def tolerance(self, given: Tolerance) -> Tolerance:
        """Return the tolerance of a verification: no stricter than what the engine can promise."""
        return given if self.bit_equal else replace(given, agreement=min(given.agreement, self.agreement))

    def opener(self, entries: Mapping[str, str]) -> Opener:
        """Return how a file is opened with configuration entries of the session; `open` for none."""
        if not entries:
            return self.open
        return lambda content, threads: engine_of(open_session(content, threads, entries=entries))

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


def missing_note(target: str) -> str:
    """Return what must be installed before a student for a target can be exported; "" if nothing is missing."""
    found = FORMATS.get(target)
    missing = [] if found is None else found.missing()
    if found is None or not missing:
        return ""
    return f"to export the student later, {missing[0]} is needed: pip install 'synq[{found.extra}]'"


def image_size(program: Program) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of a program."""
    channels, height, width = program.shapes[program.image]
    return channels, height, width


def _standard_onnx(program: Program) -> bytes:
    from synq.export.standard_onnx import standard_onnx

    return bytes(standard_onnx(program).SerializeToString())


def _float_onnx(graph: fx.GraphModule, program: Program) -> bytes:
    from synq.export.onnx_graph import write_onnx

    return write_onnx(integer_form(graph, operations="onnx"), image_size(program))


def _in_onnxruntime(content: bytes, threads: int) -> Engine:
    return engine_of(open_session(content, threads))


def _by_the_standard(content: bytes, threads: int, *, batch: int = 0) -> Engine:
    """Open an ONNX file in ONNX Runtime without graph optimizations: each node is computed as the standard defines it.

    Args:
        content: The file.
        threads: Threads of one operation; 0: the engine's default.
        batch: Number of images that the file fixes; 0: any.
    """
    run = engine_of(open_session(content, threads, optimizes=False))
    return (lambda images: torch.cat([run(part) for part in images.split(batch)])) if batch else run


def in_openvino(content: bytes, threads: int, *, precision: str = "f32") -> Engine:
    """Open an ONNX file in OpenVINO on the CPU.

    Args:
        content: The file.
        threads: Threads of one inference; 0: the engine's default.
        precision: Hint for what is not quantized: f32, or bf16, the default on CPUs that have it.
    """
    import openvino

    return model_in_openvino(openvino.Core().read_model(content, b""), threads, precision=precision)


def model_in_openvino(model: "openvino.Model", threads: int, *, precision: str = "f32") -> Engine:
    """Compile a model of OpenVINO for the CPU; see `in_openvino`."""
    import openvino

    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        found = request.infer([images.float().numpy()])
        return torch.from_numpy(next(iter(found.values())).copy())

    return run


def _tflite(program: Program) -> bytes:
    from synq.export.tflite import write_tflite

    return write_tflite(program)


def _float_tflite(graph: fx.GraphModule, program: Program) -> bytes:
    from synq.export.tflite import write_tflite

    return write_tflite(program, floats=True)


def _in_litert(content: bytes, threads: int) -> Engine:
    """Open a .tflite file in LiteRT with its default delegate; one interpreter for each number of images."""
    from ai_edge_litert.interpreter import Interpreter

    interpreters: dict[int, Any] = {}

    def opened(batch: int) -> Any:
        interpreter = Interpreter(model_content=content, num_threads=threads or None)
        (image,) = interpreter.get_input_details()
        interpreter.resize_tensor_input(image["index"], [batch, *image["shape"][1:]])
        interpreter.allocate_tensors()
        return interpreter

    def run(images: Tensor) -> Tensor:
        batch = len(images)
        if batch not in interpreters:
            interpreters[batch] = opened(batch)
        interpreter = interpreters[batch]
        interpreter.set_tensor(
            interpreter.get_input_details()[0]["index"], images.float().permute(0, 2, 3, 1).contiguous().numpy()
        )
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())

    return run


def _pte(program: Program) -> bytes:
    from synq.export.executorch import write_pte

    return write_pte(program)


def _float_pte(graph: fx.GraphModule, program: Program) -> bytes:
    from synq.export.executorch import lowered_to_xnnpack

    return lowered_to_xnnpack(graph, image_size(program))


def _in_executorch(content: bytes, threads: int) -> Engine:
    """Open a .pte file in ExecuTorch, which runs as many images at once as the file was written for.

    Its threads are those of the process: files that were opened with another number must not run afterwards.
    """
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    # A reset frees the threads that opened files refer to, so there is none without need.
    if threads and portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(content)
    method = program.load_method("forward")
    assert method is not None
    batch = method.metadata.input_tensor_meta(0).sizes()[0]

    def run(images: Tensor, keep: object = program) -> Tensor:  # a method does not keep its program alive
        parts = images.float().contiguous().split(batch)
        return torch.cat([method.execute([part])[0].clone() for part in parts])

    return run


PRECISE_SUMS = {"session.x64quantprecision": "1"}
"""Entry by which ONNX Runtime (1.32) adds products of 8 bits without saturation on x86 processors without VNNI."""
_ONNX = partial(
    TargetFormat, file="model.onnx", format="onnx", write=_standard_onnx, write_float=_float_onnx, extra="export"
)
FORMATS: dict[str, TargetFormat] = {
    "onnxruntime": _ONNX(
        engine="ONNX Runtime",
        packages=("onnx", "onnxruntime", "onnxscript", "ml_dtypes"),
        open=_in_onnxruntime,
        session_entries=PRECISE_SUMS,
    ),
    "openvino": _ONNX(
        engine="OpenVINO",
        packages=("onnx", "openvino", "onnxruntime", "onnxscript", "ml_dtypes"),
        extra="openvino",
        open=in_openvino,
        bit_equal=False,
        agreement=99.0,
    ),
    "tensorrt": _ONNX(
        engine="ONNX Runtime without graph optimizations",
        packages=("onnx", "onnxruntime", "onnxscript", "ml_dtypes"),
        open=_by_the_standard,
        bit_equal=False,
        agreement=99.0,
        checked_for="TensorRT",
    ),
    "qnn": _ONNX(
        engine="ONNX Runtime without graph optimizations",
        packages=("onnx", "onnxruntime", "onnxscript", "ml_dtypes"),
        open=partial(_by_the_standard, batch=1),
        bit_equal=False,
        agreement=99.0,
        checked_for="QNN HTP",
    ),
    "litert": TargetFormat(
        file="model.tflite",
        format="tflite",
        engine="LiteRT",
        packages=("ai_edge_litert", "flatbuffers"),
        extra="litert",
        write=_tflite,
        write_float=_float_tflite,
        open=_in_litert,
    ),
    "executorch": TargetFormat(
        file="model.pte",
        format="pte",
        engine="ExecuTorch",
        packages=("executorch",),
        extra="executorch",
        write=_pte,
        write_float=_float_pte,
        open=_in_executorch,
    ),
}
"""By target."""
