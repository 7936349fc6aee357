"""Speed of integer files in their engines: ours, the engine's own tool's, and the float network's, in turns.

Every ratio is the time of the float file over that of another one in the same engine, round by round: larger is faster.
With one thread the processor time is measured, with several the time on the clock (`run_latencies`).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from synq.export.targets.formats import FORMATS
from synq.export.timing import Latency, run_latencies
from synq.export.verify import Engine

from .engine_files import FLOAT, File, files_of
from .engine_tools import own_file, own_tool
from .subjects import Kind, classifier
from .table import Context, Row, Target, processor_features
from .timing import Spread

CASES = ((1, 1), (8, 1), (1, 2))
"""Images of a run, and threads."""
CALIBRATION = 8
"""Images on which ranges are observed; their number does not change the speed."""
OWN_SHARE, LOW_BITS_SHARE = 0.98, 0.97
"""Smallest accepted speed relative to the own tool's file, and of 4 bits relative to 8 bits."""
BITS = {"onnxruntime": ((8, 8), (4, 4)), "openvino": ((8, 8),), "litert": ((8, 8),), "executorch": ((8, 8),)}
"""Bit-widths of the students of each engine."""
SPEEDUPS = {
    ("onnxruntime", "resnet18"): 2.7,
    ("openvino", "resnet18"): 3.2,
    ("litert", "resnet18"): 3.2,
    ("executorch", "resnet18"): 2.5,
    ("onnxruntime", "mobilenet_v2"): 1.75,
    ("openvino", "mobilenet_v2"): 1.9,
    ("litert", "mobilenet_v2"): 1.9,
    ("executorch", "mobilenet_v2"): 1.9,
}
"""Speeds of W8A8 relative to float that one image on one thread should reach on a processor with VNNI."""
AMX_SPEEDUPS = {
    ("openvino", "resnet18"): 6.0,
    ("litert", "resnet18"): 5.5,
    ("executorch", "mobilenet_v2"): 1.45,
}
"""Those that differ on a processor with AMX, whose float kernels are faster, too."""


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None)  # type: ignore[no-any-return]

    return build


KINDS = {
    name: Kind(title, _torchvision(name), (3, 224, 224), 1000, {"cpu": CALIBRATION})
    for name, title in (
        ("resnet18", "ResNet-18"),
        ("mobilenet_v2", "MobileNetV2"),
        ("mobilenet_v3_large", "MobileNetV3-Large"),
    )
}


def rows(context: Context) -> Iterable[Row]:
    """Measure every installed engine and network, or those of the context, in every case."""
    for target in context.engines or tuple(BITS):
        if missing := FORMATS[target].missing():
            if context.engines:
                raise ValueError(
                    f"`--engines` must name installed engines, but for {target} {missing[0]} is missing: "
                    f"pip install 'synq[{FORMATS[target].extra}]'"
                )
            continue
        for key in context.networks or tuple(KINDS):
            yield from _rows_of_network(context, target, key, KINDS[key])


def _rows_of_network(context: Context, target: str, key: str, kind: Kind) -> Iterable[Row]:
    module = classifier(kind, context.seed)
    images = torch.randn(CALIBRATION, *kind.size)
    tool, made, made_batch = own_tool(target), None, 0
    for batch, threads in CASES:
        if threads > (os.cpu_count() or 1):
            continue
        if made is None or (target == "executorch" and batch != made_batch):
            files, content = files_of(target, module, images, BITS[target], batch)
            if tool:
                files[tool] = own_file(target, module, content, images, batch)
            made, made_batch = (files, content), batch
        runners = _runners(target, *made, images[:batch], threads)
        times = run_latencies(runners, threads=threads, rounds=context.rounds)
        title = f"{FORMATS[target].engine}, {kind.name}, {_counted(batch, 'image')}, {_counted(threads, 'thread')}"
        has_targets = (batch, threads) == (1, 1) and "VNNI" in processor_features()
        speedup = _wanted(target, key) if has_targets else None
        yield from _rows(title, made[0], times, speedup, with_layers=(batch, threads) == CASES[0])
        if tool:
            share = OWN_SHARE if has_targets else None
            note = _least(times[tool], times["W8A8"])
            yield _row(f"{title}: W8A8 to {tool}", _ratios(times[tool], times["W8A8"]), share, note)
        if "W4A4" in times:
            share = LOW_BITS_SHARE if has_targets else None
            size = f"{made[0]['W4A4'].size / made[0]['W8A8'].size:.3f} of its bytes"
            note = f"{size}; {_least(times['W8A8'], times['W4A4'])}"
            yield _row(f"{title}: W4A4 to W8A8", _ratios(times["W8A8"], times["W4A4"]), share, note)


def _wanted(target: str, network: str) -> float | None:
    """Return the speed that W8A8 should reach on this processor; None where none was set."""
    found = AMX_SPEEDUPS if "AMX" in processor_features() else {}
    return found.get((target, network), SPEEDUPS.get((target, network)))


def _rows(
    title: str, files: Mapping[str, File], times: Mapping[str, Latency], speedup: float | None, *, with_layers: bool
) -> Iterable[Row]:
    """Return a row for each file but the float one: its speed relative to that."""
    for name, latency in times.items():
        if name != FLOAT:
            note = _note(latency, times[FLOAT], files.get(name), files[FLOAT], with_layers=with_layers)
            at_least = speedup if name == "W8A8" else None
            yield _row(f"{title}: {name}", _ratios(times[FLOAT], latency), at_least, note)


def _runners(
    target: str, candidates: Mapping[str, File], content: bytes, images: torch.Tensor, threads: int
) -> dict[str, Callable[[], object]]:
    engines: dict[str, Engine] = {name: file.open(threads) for name, file in candidates.items()}
    if target == "openvino":
        from synq.export.targets.formats import in_openvino

        engines["float, computed in bf16"] = in_openvino(content, threads, precision="bf16")
    return {name: partial(engine, images) for name, engine in engines.items()}


def _row(what: str, ratios: Spread, at_least: float | None, note: str) -> Row:
    return Row(
        group="engines",
        what=what,
        value=ratios,
        unit="x",
        target=None if at_least is None else Target(at_least=at_least),
        note=note,
    )


def _ratios(slow: Latency, fast: Latency) -> Spread:
    return Spread.of([a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)])


def _least(slow: Latency, fast: Latency) -> str:
    return (
        f"least times {min(slow.rounds):.2f} and {min(fast.rounds):.2f} ms: {min(slow.rounds) / min(fast.rounds):.2f} x"
    )


def _note(latency: Latency, teacher: Latency, file: File | None, float_file: File, *, with_layers: bool) -> str:
    parts = [_least(teacher, latency)]
    if file is not None and with_layers:
        integers, layers = file.layers()
        parts += [
            f"{file.size / 1e6:.2f} of {float_file.size / 1e6:.2f} MB",
            f"{integers} of {layers} layers in integers",
        ]
    return "; ".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
