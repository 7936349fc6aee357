"""The settings of a call: a configuration as an object, a file or a mapping, with the arguments of the call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synq.config.parsing import config_from_dict, load_config, with_overrides
from synq.config.quant import RESEARCH
from synq.config.run import RunConfig, load_run

Config = RunConfig | Mapping[str, Any] | str | Path | None
"""A `RunConfig`; a mapping with its keys, nested or dotted; a file; or nothing."""
SHIPPED_TARGET = "onnxruntime"
"""Target of a student for which none is chosen."""
RESEARCH_KEYS = ("act_points", "last_bits_for_input")
"""Settings that only a student of target research has; giving one chooses it."""


def settings_of(config: Config, arguments: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a call.

    Args:
        config: The settings that the arguments override. The target is `SHIPPED_TARGET` unless a `RunConfig`, or a key
            of a mapping or file, chooses it.
        arguments: Values by dotted key; None for those that were not given.

    Raises:
        ValueError: A key is unknown or a value invalid; the message names it.
        OSError: The file cannot be read.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if isinstance(config, RunConfig):
        return with_overrides(config, _plain(given))
    if isinstance(config, str | Path):
        base, quant = load_run(config), load_config(config).get("quant", {})
    elif config is None or isinstance(config, Mapping):
        nested = _nested(config or {})
        base, quant = config_from_dict(RunConfig, nested, source="config"), nested.get("quant", {})
    else:
        raise ValueError(
            "`config` must be a RunConfig, a mapping with its keys or the path of a .toml or .json file, but got "
            f"{type(config).__name__}"
        )
    if "target" not in quant and not any(quant.get(key, RESEARCH) != RESEARCH for key in RESEARCH_KEYS):
        given.setdefault("quant.target", SHIPPED_TARGET)
    return with_overrides(base, _plain(given))


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping of nested or dotted keys with nested keys only."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        *parts, last = str(key).split(".")
        table = found
        for number, part in enumerate(parts, 1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                name = ".".join(parts[:number])
                raise ValueError(f"config: `{name}` must be a table of keys next to `{key}`, but got {table!r}")
        plain = _plain_value(value)
        if isinstance(plain, dict) and isinstance(table.get(last), dict):
            table[last] |= plain
        else:
            table[last] = plain
    return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    """Return a value as a file would have it: paths as text, numbers of NumPy and PyTorch as Python's."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(part) for part in value]
    if hasattr(value, "tolist"):  # a number or array of NumPy or PyTorch
        return value.tolist()
    return value
