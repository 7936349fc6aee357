"""Tables of keys as users write them, nested or dotted, as nested ones. Standard library only."""

from collections.abc import Mapping
from typing import Any

from synq.config.parsing import shown


def nested_keys(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a mapping of nested or dotted keys with nested keys only, as new tables.

    For example {"a.b": 1, "a": {"c": 2}} gives {"a": {"b": 1, "c": 2}}.

    Args:
        values: The mapping.
        name: Its name, for messages.

    Raises:
        ValueError: A key has a value, and another key has it as a table.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parts, last = str(key).split(".")
        table = found
        for number, part in enumerate(parts, 1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                path = ".".join(parts[:number])
                raise ValueError(f"{name}: `{path}` must be a table of keys next to `{key}`, but got {shown(table)}")
        own = dict(value) if isinstance(value, Mapping) else value
        if isinstance(own, dict) and isinstance(table.get(last), dict):
            table[last] |= own
        else:
            table[last] = own
    return found


def merged_keys(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables with values by dotted key that go before theirs; what is no table stays, to be rejected.

    Args:
        tables: Nested keys.
        overrides: Values by dotted key.
    """
    merged = dict(tables)
    for key, value in overrides.items():
        part, _, rest = key.partition(".")
        below = merged.get(part, {})
        if not rest:
            merged[part] = value
        elif isinstance(below, Mapping):
            merged[part] = merged_keys(below, {rest: value})
    return merged
