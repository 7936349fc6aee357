"""Interleaved timing: every round runs each call once, so that a slow phase of the machine affects all equally."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARMUP_ROUNDS = 1
"""Rounds before the timed ones."""


@dataclass(frozen=True)
class Spread:
    """A result of several rounds: the median, and the lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarize one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of each call in each round."""

    seconds: Mapping[str, list[float]]

    def of(self, name: str) -> Spread:
        """Return the spread of the seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Return the spread of the ratios of the seconds of `name` to those of `to`, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(calls: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device) -> Times:
    """Run every call once a round, in rotating order, and measure its wall-clock time.

    Args:
        calls: Functions by name; each must restore the state that it changes.
        rounds: Timed rounds, after one to warm up.
        device: Device to synchronize before and after every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-WARMUP_ROUNDS, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wait(device)
            started = time.perf_counter()
            calls[name]()
            wait(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return Times(seconds)
