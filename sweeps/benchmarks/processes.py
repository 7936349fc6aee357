"""Efficiency of two processes that train one student (DDP), with one thread or one GPU each."""

import statistics
from collections.abc import Iterator

import torch

from .launcher import SOLO, TWO, result, start, stop
from .table import Context, Row, Target
from .timing import Spread

IMAGES, BATCH, EPOCHS = 512, 128, 4
ROUNDS = 3


def rows(context: Context) -> Iterator[Row]:
    """Train the same global batches with one and two processes; on CPU also with two independent processes."""
    device = context.device.type
    if device == "cuda" and torch.cuda.device_count() < 2:
        return
    scale = 1 if device == "cpu" else 16
    args = [
        "--images",
        str(IMAGES * scale),
        "--batch",
        str(BATCH * scale),
        "--epochs",
        str(EPOCHS),
        "--device",
        device,
    ]
    seconds: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    for _ in range(min(ROUNDS, context.rounds)):
        seconds["one"].append(_epoch(result(start([*SOLO, *args]))))
        seconds["two"].append(_epoch(result(start([*TWO, *args]))))
        if device == "cpu":
            independent = [start([*SOLO, *args]) for _ in range(2)]
            try:
                seconds["apart"].append(statistics.mean([_epoch(result(process)) for process in independent]))
            finally:
                for process in independent:
                    stop(process)
    efficiency = [one / two / 2 for one, two in zip(seconds["one"], seconds["two"], strict=True)]
    each = "1 thread" if device == "cpu" else "1 GPU"
    yield Row(
        group="processes",
        what=f"ResNet-20, 32 px, global batch {BATCH * scale}: efficiency of 2 processes x {each}",
        value=Spread.of(efficiency),
        unit="",
        target=Target(at_least=0.9),
        note=f"epochs of {IMAGES * scale} images: 1 process {_text(seconds['one'])}, "
        f"2 processes {_text(seconds['two'])}",
    )
    if seconds["apart"]:
        yield Row(
            group="processes",
            what="the same for two processes that do not communicate: the machine's limit",
            value=Spread.of([one / apart for one, apart in zip(seconds["one"], seconds["apart"], strict=True)]),
            unit="",
            note="two cores share memory, cache and clock",
        )


def _epoch(found: dict[str, list[float]]) -> float:
    """Return the median seconds of an epoch, without the first one, which warms up."""
    return statistics.median(found["epoch_seconds"][1:])


def _text(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s"
