"""Messages about rules between settings: they show both values, and which of them is a default that nobody gave."""

import dataclasses
from typing import Any

from synq.config.parsing import shown


def noted(config: Any, field: str) -> str:
    """Return the value of a setting for a message, with a note if it is the default: "64, the default", or "32".

    Args:
        config: A configuration dataclass.
        field: Name of its field.
    """
    value = getattr(config, field)
    (default,) = (part.default for part in dataclasses.fields(config) if part.name == field)
    return f"{shown(value)}, the default" if value == default else shown(value)


def require_setting(config: Any, key: str, rule: str, holds: bool, *, cure: str = "") -> None:
    """Raise ValueError "`key` must <rule>, but got <value>, the default: <cure>" unless `holds`.

    Args:
        config: The configuration dataclass that the setting is in.
        key: Dotted key of the setting; its last part is a field of `config`.
        rule: What must hold; it has the other setting's value by `noted`.
        holds: Whether it holds.
        cure: What to set, where the rule does not show it.

    Raises:
        ValueError: It does not hold.
    """
    if not holds:
        value = noted(config, key.rpartition(".")[2])
        raise ValueError(f"`{key}` must {rule}, but got {value}{f': {cure}' if cure else ''}")
