"""What each layer of a whole file takes, by the profiler of its engine.

Steps that are timed as separate files (`layer_times.py`) show what a bit-width changes; the profile shows where the
time of a file goes, with fused steps and without the cost of a call. OpenVINO counts microseconds per node
(PERF_COUNT) and ExecuTorch per operator of XNNPACK (ETDump). ONNX Runtime is timed step by step only, and the Python
package of LiteRT has no profiler of operators.
"""

import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from synq.engines.program import Program
from synq.export.targets.formats import TargetFormat, image_size

OTHER = "other steps"
ROUNDS, WARMUP = 25, 3
XNNPACK_LAYERS = ("Convolution", "Fully Connected", "Deconvolution")
"""Beginnings of the names of XNNPACK's operators with weights."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Times of the layers of a file.

    Attributes:
        milliseconds: By layer, in the order of the program, and of everything else under `OTHER`; medians. Empty
            without a profiler.
        note: One line: where the times are from, or why there are none.
    """

    milliseconds: dict[str, float]
    note: str

    def lines(self) -> list[str]:
        """Return the profile as text: the share of the layers, and the slowest of them."""
        if not self.milliseconds:
            return [self.note]
        layers = {name: time for name, time in self.milliseconds.items() if name != OTHER}
        slowest = sorted(layers, key=lambda name: -layers[name])[:3]
        named = ", ".join(f"{name} {1000 * layers[name]:.0f} us" for name in slowest)
        total = sum(self.milliseconds.values())
        return [f"{self.note}: {len(layers)} layers take {sum(layers.values()):.4g} of {total:.4g} ms, most {named}"]


def layer_profile(
    content: bytes, program: Program, form: TargetFormat, *, threads: int = 1, rounds: int = ROUNDS
) -> Profile:
    """Return what each layer of a file takes on one image.

    Args:
        content: The file.
        program: Its program.
        form: Its format.
        threads: Threads of the engine.
        rounds: Runs after the first few, >= 1.
    """
    if program.target not in _PROFILERS:
        reason = "the Python package has no profiler of operators" if program.target == "litert" else "not profiled"
        return Profile(milliseconds={}, note=f"{form.engine}: {reason}; its steps are timed as separate files only")
    source, profiler = _PROFILERS[program.target]
    images = torch.randn(1, *image_size(program), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = defaultdict(list)
    names = [step.layer for step in program.layers()]
    for events in profiler(content, images, threads, rounds, names):
        total = dict.fromkeys([*names, OTHER], 0.0)
        for name, milliseconds in events:
            total[name if name in total else OTHER] += milliseconds
        for name, milliseconds in total.items():
            times[name].append(milliseconds)
    return Profile(
        milliseconds={name: statistics.median(values) for name, values in times.items()},
        note=f"profile of {form.engine} ({source})",
    )


Events = Sequence[tuple[str, float]]
"""Layer, or any other name, and milliseconds."""


def _in_openvino(content: bytes, images: Tensor, threads: int, rounds: int, names: Sequence[str]) -> Iterator[Events]:
    import openvino

    core = openvino.Core()
    options: dict[str, object] = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(core.read_model(content, b""), "CPU", options).create_infer_request()
    for number in range(-WARMUP, rounds):
        request.infer([images.numpy()])
        if number >= 0:
            # A node is called by the layer whose operation it begins with, followed by what was fused into it.
            yield [
                (info.node_name.partition("/")[0], info.real_time.total_seconds() * 1000)
                for info in request.get_profiling_info()
            ]


def _in_executorch(content: bytes, images: Tensor, threads: int, rounds: int, names: Sequence[str]) -> Iterator[Events]:
    from executorch.extension.pybindings import portable_lib

    if threads and portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch_from_buffer(content, enable_etdump=True)
    for _ in range(WARMUP + rounds):
        module.forward([images])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no tensors to debug, and of what it imports
        from executorch.devtools import Inspector

        module.write_etdump_result_to_file(str(Path(folder) / "times"), str(Path(folder) / "tensors"))
        blocks = Inspector(etdump_path=str(Path(folder) / "times")).event_blocks
    found = [event for block in blocks for event in block.events if event.is_delegated_op and event.perf_data]
    layers = [event for event in found if event.name.startswith(XNNPACK_LAYERS)]
    # XNNPACK runs operators in the order of the program and knows no names of layers.
    name_of = dict(zip(map(id, layers), names, strict=True)) if len(layers) == len(names) else {}
    for number in range(WARMUP, WARMUP + rounds):
        yield [(name_of.get(id(event), event.name), event.perf_data.raw[number]) for event in found]


_PROFILERS: dict[str, tuple[str, Callable[..., Iterator[Events]]]] = {
    "openvino": ("PERF_COUNT", _in_openvino),
    "executorch": ("ETDump", _in_executorch),
}
"""Target -> name of the profiler, and the function that runs a file under it."""
