"""Speed of the runtime options on this device: memory format, precision, compilation; below 1, the option is faster."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from synq.config.run import RuntimeConfig
from synq.finetune.responses import teacher_response
from synq.finetune.training_loss import training_loss
from synq.losses import kd_kl

from .steps import CONFIG, calls, updated
from .subjects import KINDS, build_subject
from .table import Context, Row, Target
from .timing import Times, alternate


def rows(context: Context) -> Iterator[Row]:
    """Compare memory formats and precisions of both networks, and compiled with eager steps (minutes) of ResNet-20."""
    for key in KINDS:
        yield from _placed_rows(key, context)
    yield from _compiled_rows(context)


def _placed_step(key: str, runtime: RuntimeConfig, context: Context) -> Callable[[], None]:
    """Return a full fine-tuning step of a network placed with `runtime`, with precomputed outputs of the teacher."""
    subject = build_subject(key, context.device, context.seed, runtime=runtime)
    autocast = partial(torch.autocast, context.device.type, torch.bfloat16, enabled=runtime.precision == "bf16")
    view = teacher_response(subject.teacher, subject.images, subject.labels)

    def loss() -> Tensor:
        with autocast():
            return training_loss(subject.student.net, subject.student, view, subject.images, subject.labels, CONFIG)[0]

    return updated(subject.student.net, loss)


def _placed_rows(key: str, context: Context) -> Iterator[Row]:
    default, other = "channels_last", "contiguous"
    if context.device.type != "cpu":
        default, other = other, default
    runtimes = {
        default: RuntimeConfig(memory_format=default),  # type: ignore[arg-type]
        other: RuntimeConfig(memory_format=other),  # type: ignore[arg-type]
        "bf16": RuntimeConfig(precision="bf16"),
    }
    steps = {what: _placed_step(key, runtime, context) for what, runtime in runtimes.items()}
    times = alternate(steps, rounds=max(3, context.rounds // 2), device=context.device)
    for what in (other, "bf16"):
        yield _row(f"{KINDS[key].name}: full step, {what} over {default} float32", times, what, default)


def _compiled_rows(context: Context) -> Iterator[Row]:
    subject = build_subject("resnet20", context.device, context.seed)
    eager = calls(subject)
    student, plain = torch.compile(subject.student.net), torch.compile(copy.deepcopy(subject.plain))
    fast = calls(subject, student)  # type: ignore[arg-type]
    target_logits = teacher_response(subject.teacher, subject.images, subject.labels)[0]
    compiled_float = updated(plain, lambda: kd_kl(plain(subject.images), target_logits, CONFIG.kd_temperature).mean())  # type: ignore[arg-type]
    times = alternate(
        {
            "eager": eager["full"],
            "compiled": fast["full"],
            "compiled quantized": fast["quantized"],
            "compiled float": compiled_float,
            "eager float": eager["float"],
        },
        rounds=context.rounds,
        device=context.device,
    )
    yield _row(f"{subject.name}: full step, compiled over eager", times, "compiled", "eager")
    yield _row(f"{subject.name}: float step, compiled over eager", times, "compiled float", "eager float")
    target = None if context.device.type == "cpu" else Target(at_most=1.25)
    what = f"{subject.name}: quantized over float step, both compiled"
    yield _row(what, times, "compiled quantized", "compiled float", target)


def _row(what: str, times: Times, name: str, to: str, target: Target | None = None) -> Row:
    return Row(group="options", what=what, value=times.ratio(name, to), unit="x", target=target)
