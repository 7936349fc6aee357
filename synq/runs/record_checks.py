"""Checks of a record by itself: numbers in their ranges, metrics that fit each other and the configuration.

They are made where a record enters a table, and by `synq verify`. Standard library only.
"""

import math
from collections.abc import Iterator

from synq.common.statistics import drop_of
from synq.config.parsing import shown
from synq.config.run import RunConfig
from synq.runs.record import RunRecord

ROUNDING = 1e-6
"""Largest relative or absolute difference of two values of one metric that rounding may make."""
NEGATIVE_KL = 1e-4
"""How far below 0 rounding may bring a divergence."""


def contradictions(record: RunRecord, config: RunConfig) -> list[str]:
    """Return what a record states that cannot be, or that its own configuration contradicts; [] if nothing.

    Args:
        record: The record.
        config: Its configuration.
    """
    return [*_of_configuration(record, config), *_out_of_range(record), *_unequal(record)]


def _of_configuration(record: RunRecord, config: RunConfig) -> Iterator[str]:
    quant = config.quant
    wanted = {
        "weight_bits": quant.weight_bits,
        "act_bits": quant.act_bits,
        "protocol": config.protocol,
        "act_points": quant.points,
        "objective": config.evaluation.objective,
        "seed": config.seed,
        "data_seed": config.data_seed,
    }
    for name, value in wanted.items():
        if getattr(record, name) != value:
            yield f"{name} is {shown(getattr(record, name))}, but its configuration has {shown(value)}"


def _out_of_range(record: RunRecord) -> Iterator[str]:
    percents = ("teacher_top1", "rtn_top1", "top1", "top5")
    bounds: dict[str, tuple[float | None, float, float]] = {
        **{name: (getattr(record, name), 0, 100) for name in percents},
        **{name: (getattr(record, name), 0, 1) for name in ("kept_share", "codes_changed")},
        **{name: (getattr(record, name), 0, math.inf) for name in ("size_bytes", "bitops", "num_eval")},
        **{name: (getattr(record, name), 0, math.inf) for name in ("lost", "gained", "rtn_lost", "rtn_gained")},
        "drop": (record.drop, -100, 100),
    }
    for part in ("fidelity", "rtn_fidelity"):
        for name, value in getattr(record, part).items():
            high = 100 if name in ("agreement", "disagreement") else math.inf
            bounds[f"{part}.{name}"] = (value, -math.inf if "sqnr" in name else -NEGATIVE_KL, high)
    high = 100 if record.objective == "selection" else math.inf
    bounds["objective_value"] = (record.objective_value, -NEGATIVE_KL, high)
    for name, (value, low, limit) in bounds.items():
        if value is not None and not low <= value <= limit:
            yield f"{name} is {value:g}, but must be in [{low:g}, {limit:g}]"


def _unequal(record: RunRecord) -> Iterator[str]:
    both = (record.teacher_top1, record.top1, record.drop)
    if None not in both and not is_same(both[0] - both[1], both[2]):  # type: ignore[operator, arg-type]
        yield f"drop is {record.drop:g}, but teacher_top1 - top1 is {both[0] - both[1]:g}"  # type: ignore[operator]
    counted = drop_of(record.lost, record.gained, record.num_eval)
    if counted is not None and record.drop is not None and not is_same(counted, record.drop):
        yield f"drop is {record.drop:g}, but 100 (lost - gained) / num_eval is {counted:g}"


def is_same(one: float | None, other: float | None) -> bool:
    """Return whether two values differ by rounding at most."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING)
