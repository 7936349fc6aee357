"""Scaling: time against images and iterations (linear), memory against images and epochs (constant)."""

import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from synq.config.run import SynthesisConfig
from synq.network.bn_stats import bn_targets
from synq.synthesis.inversion import invert

from .launcher import SOLO, result, start
from .subjects import KINDS, classifier
from .table import Context, Row, Target
from .timing import Spread, wait

SHARD = {"cpu": 64, "cuda": 256}
SHARDS = (1, 2, 3, 4)
ITERATIONS = (4, 8, 12, 16)
SMALL_SET, LARGE_SET = 24_000, 96_000
"""Images of 32 x 32 pixels: 295 MB and 1.2 GB; both are filtered onto disk."""
IMAGE_BYTES = 3 * 32 * 32 * 4
MANY_EPOCHS = 50


def rows(context: Context) -> Iterator[Row]:
    """Fit lines to times of synthesis; fine-tune on small and large sets, for few and many epochs, in new processes."""
    for name, unit, xs in (("images", SHARD[context.device.type], SHARDS), ("iterations", 1, ITERATIONS)):
        ys = [_synthesis(context, *((x, 4) if name == "images" else (1, x))) for x in xs]
        slope, misfit = fit_through_zero(xs, ys)
        times = ", ".join(f"{x * unit}: {y:.2f} s" for x, y in zip(xs, ys, strict=True))
        yield Row(
            group="curves",
            what=f"synthesis of shards one by one, time against {name}: largest departure from a line through 0",
            value=Spread.of([100 * misfit]),
            unit="%",
            note=f"{times}; {1e3 * slope / unit:.3g} ms each",
        )
    device = ["--device", context.device.type]
    short, long = (result(start([*SOLO, *device, "--images", "64", "--epochs", str(n)])) for n in (3, MANY_EPOCHS))
    growth = statistics.median(long["memory_after_epoch"][-5:]) / statistics.median(long["memory_after_epoch"][1:6]) - 1
    yield Row(
        group="curves",
        what=f"fine-tuning, own memory after {MANY_EPOCHS} epochs over that after the first: growth",
        value=Spread.of([100 * growth]),
        unit="%",
        target=Target(at_most=2),
        note=f"peak {_mib(short['peak'])} with 3 epochs, {_mib(long['peak'])} with {MANY_EPOCHS}",
    )
    first, last = (statistics.median(part) for part in (long["epoch_seconds"][1:11], long["epoch_seconds"][-10:]))
    yield Row(
        group="curves",
        what=f"fine-tuning, seconds of an epoch: last ten of {MANY_EPOCHS} over the first ten",
        value=Spread.of([last / first]),
        unit="x",
        target=Target(at_most=1.1),
        note=f"{first:.3f} s, {last:.3f} s",
    )
    small, large = (
        result(start([*SOLO, *device, "--tiny", "--images", str(count), "--batch", "256", "--epochs", "1"]))
        for count in (SMALL_SET, LARGE_SET)
    )
    grown = (large["peak"] - small["peak"]) / (LARGE_SET - SMALL_SET) / IMAGE_BYTES
    sets = f"{_mib(SMALL_SET * IMAGE_BYTES)} and {_mib(LARGE_SET * IMAGE_BYTES)}"
    yield Row(
        group="curves",
        what=f"own memory of filtering and training on {LARGE_SET} images and on {SMALL_SET}: "
        "growth, share of the set's",
        value=Spread.of([100 * grown]),
        unit="%",
        target=Target(at_most=5),
        note=f"peaks {_mib(small['peak'])} and {_mib(large['peak'])}, sets {sets}; the teacher's logits and maps grow",
    )


def fit_through_zero(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Fit a line through zero with the least squared relative error.

    Returns:
        The slope, and the largest relative deviation of a value from the line.
    """
    rates = [y / x for x, y in zip(xs, ys, strict=True)]
    slope = sum(rates) / len(rates)
    return slope, max(abs(rate / slope - 1) for rate in rates)


def _synthesis(context: Context, shards: int, iterations: int) -> float:
    """Return the time of synthesizing shards one after another, in seconds; the minimum of three runs."""
    kind, device = KINDS["resnet20"], context.device
    module = classifier(kind, context.seed).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = torch.arange(SHARD[device.type]) % kind.classes
    seconds = []
    for _ in range(3):
        wait(device)
        started = time.perf_counter()
        for shard in range(shards):
            invert(
                module,
                labels,
                kind.size,
                bn_targets(module),
                config=SynthesisConfig(),
                generator=torch.Generator().manual_seed(shard),
                iterations=iterations,
                device=device,
            )
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"
