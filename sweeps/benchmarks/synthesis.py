"""Speed of synthesis against a plain loop and against its upper bound, the teacher's bare forward and backward pass."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.config.run import SynthesisConfig
from synq.network.bn_stats import bn_targets
from synq.synthesis.inversion import invert

from .subjects import KINDS, Subject, build_subject
from .table import Context, Row, Target
from .timing import Spread, wait

CONFIG = SynthesisConfig()
BATCH = {"resnet20": {"cpu": 256, "cuda": 256}, "resnet18": {"cpu": 16, "cuda": 128}}
ITERATIONS = {"cpu": 4, "cuda": 40}


def seconds_of_invert(subject: Subject, iterations: int, device: torch.device) -> float:
    """Return the seconds per iteration of `invert`, from the end of the first to the end of the last iteration."""
    stamps: dict[int, float] = {}

    def stamp(done: int, _: Tensor) -> None:
        if done in (1, iterations + 1):
            wait(device)
            stamps[done] = time.perf_counter()

    invert(
        subject.module,
        subject.labels.cpu(),
        tuple(subject.images.shape[1:]),  # type: ignore[arg-type]
        bn_targets(subject.module),
        config=CONFIG,
        generator=torch.Generator().manual_seed(0),
        iterations=iterations + 1,
        device=device,
        on_iteration=stamp,
    )
    return (stamps[iterations + 1] - stamps[1]) / iterations


def seconds_of_bare(subject: Subject, iterations: int, device: torch.device) -> float:
    """Return the seconds per iteration of the teacher's forward pass and the backward pass to the pixels only."""
    images = subject.images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        torch.autograd.grad(F.cross_entropy(subject.module(images), subject.labels), images)

    return _seconds(step, iterations, device)


def seconds_of_plain(subject: Subject, iterations: int, device: torch.device) -> float:
    """Return the seconds per iteration of a plain loop: a hook and a loss per layer, the loss read in each step."""
    images = subject.images.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=CONFIG.lr)
    layers = [layer for layer in subject.module.modules() if isinstance(layer, _BatchNorm)]
    losses: list[Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        losses.append((mean - layer.running_mean).square().sum() + (variance - layer.running_var).square().sum())

    def step() -> None:
        losses.clear()
        flipped = images.flip(-1) if torch.rand(()) < 0.5 else images
        logits = subject.module(torch.roll(flipped, (1, 1), (-2, -1)))
        loss = CONFIG.inception_weight * F.cross_entropy(logits, subject.labels) + sum(losses) / len(layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        return _seconds(step, iterations, device)
    finally:
        for handle in handles:
            handle.remove()


def _seconds(step: Callable[[], None], iterations: int, device: torch.device) -> float:
    step()
    wait(device)
    started = time.perf_counter()
    for _ in range(iterations):
        step()
    wait(device)
    return (time.perf_counter() - started) / iterations


def rows(context: Context) -> Iterator[Row]:
    """Measure both networks at the batch size of synthesis (a smaller one for 224 pixels on CPU)."""
    device, iterations = context.device, ITERATIONS[context.device.type]
    for key in KINDS:
        subject = build_subject(key, device, context.seed, BATCH[key][device.type])
        kinds = {"SynQ": seconds_of_invert, "bare": seconds_of_bare, "plain": seconds_of_plain}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(max(3, context.rounds // 2)):
            for name in list(kinds) if number % 2 else reversed(kinds):
                seconds[name].append(kinds[name](subject, iterations, device))

        def ratio(a: str, b: str) -> Spread:
            return Spread.of([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])  # noqa: B023

        count = len(subject.images)
        yield Row(
            group="synthesis",
            what=f"{subject.name}: images x iterations per second",
            value=Spread.of([count / each for each in seconds["SynQ"]]),
            unit="/s",
        )
        share = Spread.of([100 * x / y for x, y in zip(seconds["bare"], seconds["SynQ"], strict=True)])
        yield Row(
            group="synthesis",
            what=f"{subject.name}: share of the rate of bare forward and backward",
            value=share,
            unit="%",
            target=Target(at_least=85),
            note="bare: cross-entropy to the pixels, same layout, batch norms by PyTorch",
        )
        yield Row(
            group="synthesis",
            what=f"{subject.name}: plain loop over SynQ's",
            value=ratio("plain", "SynQ"),
            unit="x",
            note="plain: a hook and a loss per layer, loss read in every step",
        )
