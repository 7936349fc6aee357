"""Latency of ONNX models in ONNX Runtime on the CPU, taken in turns, with its spread."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import Tensor

from synq.common.processor import VNNI_FLAGS, processor_flags, processor_name
from synq.export.verify import IMAGES, open_session

MAX_SPREAD = 0.2
"""Largest interquartile range of the times, relative to their median, at which a latency is stored."""
WARMUP_ROUNDS = 3
"""Rounds before the timed ones: the first runs allocate memory."""
TURN_SECONDS = 0.01
"""Approximate duration of one turn of one model: a fast model runs several times in a turn."""

PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "ai-edge-litert", "executorch")
"""Packages whose versions a record has, where they are installed."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one model, one for each round.

    Attributes:
        rounds: Milliseconds per run, > 0, in the order of the rounds.
    """

    rounds: Sequence[float]

    @property
    def median(self) -> float:
        """Return the median in ms."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Return the interquartile range of the times relative to their median; 0 for a single round."""
        if len(self.rounds) == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def is_stable(self) -> bool:
        """Return whether the times are close enough to each other for the median to mean something."""
        return self.spread <= MAX_SPREAD

    def ratio_to(self, other: "Latency") -> float:
        """Return the median over the rounds of the ratio of these times to those of another model."""
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))


def latencies(models: Mapping[str, bytes], images: Tensor, *, threads: int = 1, rounds: int = 30) -> dict[str, Latency]:
    """Return the latency of each ONNX model on ``images`` in ONNX Runtime.

    Args:
        models: ONNX models by name.
        images: (N, C, H, W); one run processes all of them.
        threads: Threads within an operation; 0: the default of ONNX Runtime.
        rounds: Timed rounds, >= 1.
    """
    feed = {IMAGES: images.float().numpy()}

    def runner(model: bytes) -> Callable[[], object]:
        session = open_session(model, threads)
        return lambda: session.run(None, feed)

    return run_latencies({name: runner(model) for name, model in models.items()}, threads=threads, rounds=rounds)


def run_latencies(
    runners: Mapping[str, Callable[[], object]], *, threads: int = 1, rounds: int = 30
) -> dict[str, Latency]:
    """Return the latency of functions, each of which runs one model.

    Every round runs each model once, in rotating order, so that other load of the machine affects all of them equally.
    With one thread, the time is the processor time of that thread: waiting for a processor that another program uses
    does not count. With several, it is the wall-clock time, because their processor time is not a latency.

    Args:
        runners: By name of the model.
        threads: Threads that a model uses; 0: all.
        rounds: Timed rounds, >= 1.
    """
    # An engine may compute on a thread of its pool even if it uses one only, so it is the time of the process.
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    names = list(runners)

    def run(name: str, count: int) -> float:
        """Run a model ``count`` times, and return the milliseconds of one run."""
        started = clock()
        for _ in range(count):
            runners[name]()
        return max(clock() - started, 1) / count / 1e6  # a coarse clock may not have moved

    counts = {name: max(1, math.ceil(1000 * TURN_SECONDS / min(run(name, 1), run(name, 1)))) for name in names}
    counts = {name: min(count, 1000) for name, count in counts.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-WARMUP_ROUNDS, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = run(name, counts[name] if number >= 0 else 1)
            if number >= 0:
                times[name].append(elapsed)
    return {name: Latency(rounds=values) for name, values in times.items()}


def unstable_times(spread: float) -> str:
    """Return why a latency was not stored.

    Args:
        spread: Interquartile range of the times relative to their median, above `MAX_SPREAD`.
    """
    return (
        f"the middle half of the times spread over {100 * spread:.0f} % of their median, but at most "
        f"{100 * MAX_SPREAD:.0f} % is accepted: export again while the machine is less busy"
    )


def machine(threads: int) -> dict[str, Any]:
    """Return processor, its instruction set, threads (None: the engine's default) and versions, for the record.

    Args:
        threads: As for `latencies`.
    """
    return {
        "cpu": processor_name(),
        "instructions": _instructions(),
        "threads": threads or None,
        "versions": _versions(),
    }


def _instructions() -> str:
    """Return the widest vector instructions of an x86 processor, which decide a softmax's bits, and VNNI; or ""."""
    flags = processor_flags()
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return f"{widest} {'with' if flags & VNNI_FLAGS else 'without'} VNNI" if widest else ""


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # the distribution may have another name, such as onnxruntime-gpu
            versions[name] = metadata.version(name)
    return versions
