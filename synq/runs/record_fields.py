"""Fields inside the tables and lists of a record, each of the kind that its readers expect. Standard library only."""

import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from synq.config.parsing import shown

LARGEST = sys.float_info.max
"""Largest absolute value of a number."""
_ROW_FIELDS = {"name": str, "role": str, "kind": str, "bits": int, "numel": int}


def misfit(content: Mapping[str, Any]) -> str:
    """Return the first field of a record's values that no reader expects, as "FIELD = VALUE"; "" without one.

    Args:
        content: Values of a record whose fields have the right outer type.
    """
    return next(_misfits(content), "")


def _misfits(content: Mapping[str, Any]) -> Iterator[str]:
    for name in ("objective_value", "teacher_top1", "rtn_top1", "top1", "top5", "drop", "num_eval", "size_bytes"):
        yield from _unless(_is_number_or_none, name, content.get(name))
    for name in ("bitops", "total_seconds", "set_seconds", "kept_share", "codes_changed", "weight_bits", "act_bits"):
        yield from _unless(_is_number_or_none, name, content.get(name))
    for name in ("fidelity", "rtn_fidelity", "seconds"):
        for key, value in content.get(name, {}).items():
            yield from _unless(_is_number_or_none, f"{name}.{key}", value)
    for number, row in enumerate(content.get("loss_history", [])):
        yield from _unless(lambda value: isinstance(value, dict), f"loss_history[{number}]", row)
        for key, value in row.items():
            yield from _unless(_is_number_or_none, f"loss_history[{number}].{key}", value)
    for number, row in enumerate(content.get("layers", [])):
        yield from _unless(lambda value: isinstance(value, dict), f"layers[{number}]", row)
        for key, kind in _ROW_FIELDS.items():
            rule = _of_kind(kind)
            yield from _unless(rule, f"layers[{number}].{key}", row.get(key))
    for name in ("versions", "files"):
        for key, value in content.get(name, {}).items():
            yield from _unless(_of_kind(str), f"{name}.{key}", value)
    for number, value in enumerate(content.get("warnings", [])):
        yield from _unless(_of_kind(str), f"warnings[{number}]", value)
    yield from _unless(_is_time, "started", content.get("started", ""))
    yield from _teacher_misfits(content.get("teacher", {}))
    yield from _deployment_misfits(content.get("deployment", {}))


def _teacher_misfits(teacher: Mapping[str, Any]) -> Iterator[str]:
    for key in ("spec", "digest", "name"):
        yield from _unless(_of_kind(str), f"teacher.{key}", teacher.get(key, ""))
    yield from _unless(_is_number_or_none, "teacher.num_classes", teacher.get("num_classes"))
    yield from _unless(_is_size, "teacher.input_size", teacher.get("input_size"))
    for key in ("mean", "std"):
        yield from _unless(_are_numbers, f"teacher.{key}", teacher.get(key, []))


def _deployment_misfits(deployment: Mapping[str, Any]) -> Iterator[str]:
    for key, value in deployment.items():
        if key not in (
            "files",
            "tolerance",
            "own_rounding",
            "machine",
            "exact",
            "engine",
            "conformance",
            "checked_for",
        ):
            yield from _unless(_is_number_or_none, f"deployment.{key}", value)
    files = deployment.get("files", [])
    yield from _unless(_of_kind(list), "deployment.files", files)
    for number, row in enumerate(files):
        yield from _unless(_of_kind(dict), f"deployment.files[{number}]", row)
        for key, kind in {"name": str, "format": str, "bytes": int, "sha256": str}.items():
            yield from _unless(_of_kind(kind), f"deployment.files[{number}].{key}", row.get(key))


def _unless(rule: Callable[[Any], bool], name: str, value: Any) -> Iterator[str]:
    """Yield the field unless its value keeps the rule; the caller stops at the first one."""
    if not rule(value):
        yield f"{name} = {shown(value)}"


def _of_kind(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # false for NaN


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and part >= 1 for part in value)


def _is_time(value: Any) -> bool:
    try:
        return value == "" or datetime.fromisoformat(value) is not None
    except (ValueError, TypeError):
        return False
