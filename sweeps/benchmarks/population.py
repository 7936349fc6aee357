"""Possible gains of training several students in one process: a shared teacher pass, streams, grouped convolutions."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.finetune.responses import Response, teacher_response
from synq.finetune.training_loss import training_loss

from .steps import CONFIG, updated
from .subjects import Subject, build_subject
from .table import Context, Row
from .timing import alternate

STUDENTS = {"cpu": 4, "cuda": 8}
LAYERS = ((16, 32), (32, 16), (64, 8))
"""Channels and side length in pixels of the three stages of a ResNet-20."""


def rows(context: Context) -> Iterator[Row]:
    """Compare separate steps of K students with a shared teacher pass, CUDA streams, and grouped convolutions."""
    device, count = context.device, STUDENTS[context.device.type]
    subjects = [build_subject("resnet20", device, context.seed) for _ in range(count)]
    times = alternate(_steps(subjects), rounds=max(3, context.rounds // 2), device=device)

    def row(what: str, name: str, note: str = "") -> Row:
        return Row(
            group="population", what=f"{count} ResNet-20: {what}", value=times.ratio("solo", name), unit="x", note=note
        )

    yield row(
        "solo steps over steps that share one live teacher pass",
        "shared",
        "gain with augmentation of the training images",
    )
    if device.type == "cuda":
        times_cached = alternate(_stream_steps(subjects, device), rounds=max(3, context.rounds // 2), device=device)
        yield Row(
            group="population",
            what=f"{count} ResNet-20, teacher's outputs stored: solo steps over steps on {count} streams",
            value=times_cached.ratio("one after another", "streams"),
            unit="x",
        )
    for channels, side in LAYERS:
        seconds = alternate(_convolutions(count, channels, side, context), rounds=context.rounds, device=device)
        yield Row(
            group="population",
            what=f"{count} convolutions {channels} x {channels}, {side} px, forward and backward: apart over grouped",
            value=seconds.ratio("apart", "grouped"),
            unit="x",
            note="the ceiling of batching whole students; above 1: grouping wins",
        )


def _steps(subjects: list[Subject]) -> dict[str, Callable[[], None]]:
    """Return steps of all students: `solo` with a teacher pass for each student, `shared` with one pass for all."""
    first = subjects[0]

    def solo() -> None:
        for subject in subjects:
            view = teacher_response(first.teacher, first.images, first.labels)
            _step(subject, first, view)

    def shared() -> None:
        view = teacher_response(first.teacher, first.images, first.labels)
        for subject in subjects:
            _step(subject, first, view)

    return {"solo": solo, "shared": shared}


def _stream_steps(subjects: list[Subject], device: torch.device) -> dict[str, Callable[[], None]]:
    first = subjects[0]
    view = teacher_response(first.teacher, first.images, first.labels)

    def apart() -> None:
        for subject in subjects:
            _step(subject, first, view)

    streams = [torch.cuda.Stream(device) for _ in subjects]

    def on_streams() -> None:
        for subject, stream in zip(subjects, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                _step(subject, first, view)
        for stream in streams:
            torch.cuda.current_stream(device).wait_stream(stream)

    return {"one after another": apart, "streams": on_streams}


def _step(subject: Subject, data: Subject, view: Response) -> None:
    net, student = subject.student.net, subject.student
    updated(net, lambda: training_loss(net, student, view, data.images, data.labels, CONFIG)[0])()


def _convolutions(count: int, channels: int, side: int, context: Context) -> dict[str, Callable[[], None]]:
    device, batch = context.device, 64 if context.device.type == "cpu" else 256
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format

    def pair(groups: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, groups * channels, side, side, device=device).contiguous(memory_format=layout)
        weight = torch.randn(groups * channels, channels, 3, 3, device=device).contiguous(memory_format=layout)
        return x.requires_grad_(), weight.requires_grad_()

    separate, joined = [pair(1) for _ in range(count)], pair(count)

    def both(x: Tensor, weight: Tensor, groups: int) -> None:
        out = F.conv2d(x, weight, padding=1, groups=groups)
        torch.autograd.grad(out, (x, weight), out.detach())

    def apart() -> None:
        for x, weight in separate:
            both(x, weight, 1)

    return {"apart": apart, "grouped": lambda: both(*joined, count)}
