"""Lines of the driver about the groups of a sweep at its end. Imports neither Ray nor torch."""

from collections.abc import Mapping
from typing import Any

from synq.common.text_tables import plural

from ..constraints import constraints_text, record_violations
from ..search_config import LISTED
from ..state.ledger import Ledger


def group_lines(ledger: Ledger, exhausted: set[str], invalid: Mapping[str, str]) -> list[str]:
    """Return lines about groups whose search ended early, and about those without a result.

    Args:
        ledger: Trials of the sweep.
        exhausted: Keys of the groups without further settings.
        invalid: By group, the error of the last settings that are invalid together.
    """
    spec, lines = ledger.spec, []
    listed = spec.search.sampler in LISTED
    for key in sorted(exhausted):
        why = f"; others are invalid together, for example: {invalid[key]}" if key in invalid else ""
        number = ledger.num_plans(key)
        lines.append(f"{key}: the {'list' if listed else 'search'} has only {number} different settings{why}")
    lines += [stopped_line(key, one) for key, one in ledger.stopped.items()]
    for group in spec.groups:
        results = [record for plan in ledger.group_plans(group.key) if (record := ledger.result(plan)) is not None]
        if results and not ledger.best(group.key):
            example = record_violations(spec.constraints, results[0])
            lines.append(
                f"{group.key}: none of {plural(len(results), 'completed trial')} satisfies the constraints "
                f"{constraints_text(spec.constraints)} (the first has {example}), so none is best"
            )
    if empty := without_result(ledger):
        lines.append(f"no trial was completed in {', '.join(empty)}; the lines above or trials.csv have the reason")
    return lines


def stopped_line(group: str, stopped: Mapping[str, Any]) -> str:
    """Return the line about a group whose search `stop_when` has ended.

    Args:
        group: Key of the group.
        stopped: Its entry of `Ledger.stopped`.
    """
    return f"{group}: search ended after {stopped['after']} of {stopped['num_trials']} trials, {stopped['reason']}"


def without_result(ledger: Ledger) -> list[str]:
    """Return the keys of the groups without a completed trial of the search."""
    keys = [group.key for group in ledger.spec.groups]
    return [key for key in keys if not any(ledger.result(plan) for plan in ledger.group_plans(key))]


def is_success(ledger: Ledger) -> bool:
    """Return whether every group has a completed trial, and one of them a trial that satisfies the constraints."""
    return not without_result(ledger) and any(ledger.best(group.key) for group in ledger.spec.groups)
