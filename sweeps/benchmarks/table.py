"""Rows of the benchmark, as text, Markdown and JSON."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from synq.common.processor import processor_flags, processor_name

from .timing import Spread


@dataclass(frozen=True, kw_only=True)
class Target:
    """Bounds that a result should meet."""

    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        """Return whether a value is within the bounds."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result with its unit and target."""

    group: str
    what: str
    value: Spread
    unit: str
    target: Target | None = None
    note: str = ""

    def verdict(self) -> str:
        """Return "yes" or "NO": whether the median meets the target; "" without a target."""
        if self.target is None:
            return ""
        return "yes" if self.target.met(self.value.median) else "NO"

    def cells(self) -> list[str]:
        """Return the cells of the row as text, in the order of `HEAD`."""
        value, low, high = (f"{number:.4g}" for number in (self.value.median, self.value.low, self.value.high))
        spread = "" if low == high else f"{low} to {high}"
        target = "" if self.target is None else f"{self.target}: {self.verdict()}"
        return [self.what, f"{value} {self.unit}".strip(), spread, target, self.note]


@dataclass(frozen=True)
class Context:
    """Settings that all groups share."""

    device: torch.device
    threads: int
    rounds: int
    seed: int = 0
    engines: tuple[str, ...] = ()  # of the group engines; empty: those that are installed
    networks: tuple[str, ...] = ()  # of the same group; empty: all


HEAD = ["what", "median", "quartiles", "target", "note"]


def markdown(groups: Sequence[tuple[str, Sequence[Row]]], facts: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    for title, rows in groups:
        lines += [f"### {title}", "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        lines += [f"| {' | '.join(row.cells())} |" for row in rows] + [""]
    return "\n".join(lines)


def as_json(groups: Sequence[tuple[str, Sequence[Row]]], facts: dict[str, Any]) -> dict[str, Any]:
    """Return all rows as JSON values, with `met`: whether the target was met, None without one."""
    rows = [
        {**dataclasses.asdict(row), "met": None if row.target is None else row.target.met(row.value.median)}
        for _, part in groups
        for row in part
    ]
    return {"facts": facts, "rows": rows}


def machine(context: Context) -> dict[str, Any]:
    """Return the hardware, versions and settings on which the results depend."""
    cuda = context.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(context.device) if cuda else processor_name(),
        **({} if cuda else {"features": " ".join(processor_features()) or "unknown"}),
        "threads": context.threads,
        "rounds": context.rounds,
        "seed": context.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16",),
    "AMX": ("amx_int8",),
}
"""Features that the speed of integer kernels depends on, and the flags of Linux that show them."""


def processor_features() -> list[str]:
    """Return which of `FEATURES` the processor has; empty where they are unknown."""
    flags = processor_flags()
    return [name for name, shown in FEATURES.items() if flags.intersection(shown)]
