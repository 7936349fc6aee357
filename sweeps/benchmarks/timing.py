"""Time things side by side: every round runs each of them once, so that a slow minute of the machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class Spread:
    """A figure from several rounds: median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarize at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of each call in each round."""

    seconds: Mapping[str, list[float]]

    def of(self, name: str) -> Spread:
        """Return the seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Return seconds of `name` over seconds of `to`, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(calls: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device) -> Times:
    """Run every call once a round, each time in another order, and take its time by the wall clock.

    Args:
        calls: By name; each leaves things as it found them.
        rounds: Rounds that count, after one to warm up.
        device: Waited for before and after every call.
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
