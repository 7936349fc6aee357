"""Cost of a fine-tuning step against plain distillation, the reference (textbook) step, and float training."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from synq.config.run import FinetuneConfig
from synq.finetune.responses import teacher_response
from synq.finetune.training_loss import training_loss
from synq.losses import kd_kl
from synq.synthesis.lowpass import cutoff_in_bins, gaussian_lowpass

from .subjects import KINDS, Subject, build_subject
from .table import Context, Row, Target
from .textbook import PASSES, textbook_loss
from .timing import Spread, Times, alternate

CONFIG = FinetuneConfig()


def updated(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a whole step: loss, backward, clipping, optimizer; the learning rate is 0, so the weights stay."""
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1e30)
        optimizer.step()
        optimizer.zero_grad()

    return step


def calls(subject: Subject, student: nn.Module | None = None) -> dict[str, Callable[[], None]]:
    """Return the steps to compare, by name.

    Args:
        subject: The networks.
        student: Module for the student's forward pass, such as a compiled one; None is the student itself.
    """
    net, images, labels = subject.student.net, subject.images, subject.labels
    forward = net if student is None else student
    height, width = images.shape[-2:]
    assert CONFIG.lowpass_cutoff is not None
    bins = cutoff_in_bins(CONFIG.lowpass_cutoff, CONFIG.lowpass_unit, height, width)
    cached = teacher_response(subject.teacher, images, labels)

    def plain_loss() -> Tensor:
        with torch.no_grad():
            teacher_logits = subject.teacher.net(images)[0]
        return kd_kl(forward(images)[0], teacher_logits, CONFIG.kd_temperature).mean()

    def live_loss() -> Tensor:
        view = teacher_response(subject.teacher, images, labels)
        return training_loss(forward, subject.student, view, images, labels, CONFIG)[0]

    def cached_loss() -> Tensor:
        return training_loss(forward, subject.student, cached, images, labels, CONFIG)[0]

    def float_loss() -> Tensor:
        return kd_kl(subject.plain(images), cached[0], CONFIG.kd_temperature).mean()

    def quantized_loss() -> Tensor:
        return kd_kl(forward(images)[0], cached[0], CONFIG.kd_temperature).mean()

    def teacher_only() -> None:
        with torch.no_grad():
            subject.teacher.net(images)

    return {
        "plain distillation": updated(net, plain_loss),
        "full, teacher live": updated(net, live_loss),
        "full": updated(net, cached_loss),
        "textbook": updated(net, lambda: textbook_loss(subject.student, subject.teacher, images, labels, CONFIG, bins)),
        "float": updated(subject.plain, float_loss),
        "quantized": updated(net, quantized_loss),
        "teacher": teacher_only,
        "filter": lambda: _discard(gaussian_lowpass(images, bins)),
    }


def _discard(_: Tensor) -> None:
    return None


def rows(context: Context) -> Iterator[Row]:
    """Measure ResNet-20 at 32 pixels and ResNet-18 at 224."""
    for key in KINDS:
        subject = build_subject(key, context.device, context.seed)
        times = alternate(calls(subject), rounds=context.rounds, device=context.device)
        yield from _rows_of(subject, times, context)


def _rows_of(subject: Subject, times: Times, context: Context) -> Iterator[Row]:
    def row(what: str, **rest: object) -> Row:
        return Row(group="steps", what=f"{subject.name}: {what}", **rest)  # type: ignore[arg-type]

    over_plain = times.ratio("full, teacher live", "plain distillation")
    yield row(
        "full step, images per second",
        value=Spread.of([len(subject.images) / seconds for seconds in times.seconds["full"]]),
        unit="images/s",
    )
    yield row(
        "SynQ's own share over plain distillation (teacher live in both)",
        value=Spread(*(100 * (part - 1) for part in (over_plain.median, over_plain.low, over_plain.high))),
        unit="%",
        target=Target(at_most=3),
        note="the paper's code: 17.81 %",
    )
    yield row(
        "full step as a run does it, over plain distillation",
        value=times.ratio("full", "plain distillation"),
        unit="x",
        note="the teacher's outputs are computed once, before",
    )
    # For a fair comparison, the teacher's single pass over the images is spread over the epochs that use it.
    amortized = [
        book / (full + teacher / CONFIG.epochs)
        for book, full, teacher in zip(*(times.seconds[n] for n in ("textbook", "full", "teacher")), strict=True)
    ]
    yield row(
        "textbook step over full step",
        value=Spread.of(amortized),
        unit="x",
        target=Target(at_least=2.5),
        note=f"textbook: {PASSES}, filter; full: student F + B, teacher F / {CONFIG.epochs}",
    )
    yield row(
        "textbook step over full step with the teacher live",
        value=times.ratio("textbook", "full, teacher live"),
        unit="x",
        note="what is left with augmentation: full: teacher F, student F + B",
    )
    filtered = [100 * part / full for part, full in zip(times.seconds["filter"], times.seconds["full"], strict=True)]
    yield row(
        "filter in every step, share of a full step", value=Spread.of(filtered), unit="%", note="a run filters once"
    )
    at_most = 1.35 if context.device.type == "cpu" else 1.25
    note = "" if context.device.type == "cpu" else "eager; the target is for the compiled step (group options)"
    yield row(
        "quantized step over float step",
        value=times.ratio("quantized", "float"),
        unit="x",
        target=Target(at_most=at_most),
        note=note,
    )
