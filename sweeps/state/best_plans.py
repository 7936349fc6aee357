"""The best completed trials of a group: what is run again on more seeds. Imports neither Ray nor torch."""

import math
from collections.abc import Iterable, Mapping

from synq.runs.record import RunRecord

from ..constraints import record_violations
from ..space import BITS, value_of
from ..spec import SweepSpec
from .plans import Plan


def completed(record: RunRecord | None) -> RunRecord | None:
    """Return a record that has a finite objective; None for another."""
    has_result = record is not None and record.status == "completed" and _finite(record.objective_value)
    return record if has_result else None


def best_plans(spec: SweepSpec, plans: Iterable[Plan], records: Mapping[str, RunRecord], top_k: int) -> list[Plan]:
    """Return the plans of the `top_k` best completed trials that satisfy the constraints, best first.

    If the search includes the bit-width, `top_k` plans are returned for each bit-width.

    Args:
        spec: The sweep.
        plans: Plans of one group.
        records: Records by the names of trials.
        top_k: Number of plans.
    """
    sign = 1 if spec.search.minimize else -1
    scored: dict[str, list[tuple[float, int, Plan]]] = {}
    for plan in plans:
        record = completed(records.get(plan.trial))
        if record is not None and not record_violations(spec.constraints, record):
            same_bits = scored.setdefault(value_of(plan.config, BITS), [])
            same_bits.append((sign * float(record.objective_value or 0.0), plan.index, plan))
    return [plan for part in scored.values() for *_, plan in sorted(part, key=lambda item: item[:2])[:top_k]]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
