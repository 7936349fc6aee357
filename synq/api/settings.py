"""The settings of a call: a configuration as an object, a file or a mapping, with the arguments of the call."""

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from synq.config.budget import BLEND_KEY, PLANNED_KEYS, ROUNDING_KEYS, planned_keys
from synq.config.finetune import check_own_weight, has_own_weight
from synq.config.key_tables import merged_keys, nested_keys
from synq.config.parsing import config_from_dict, load_config, with_overrides
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
    given = _plain({key: value for key, value in arguments.items() if value is not None})
    if isinstance(config, RunConfig):
        check_own_weight(config.finetune)
        return with_overrides(config, given)
    try:
        base = _built(config, {})
    except ValueError:  # valid perhaps with the arguments, as a batch of more images than there are by default
        base = _built(config, given)
    if not _chooses_target(_written(config).get("quant", {})):
        given.setdefault("quant.target", SHIPPED_TARGET)
    check_own_weight(base.finetune, is_given=has_own_weight(_written(config)))
    return with_overrides(base, given)


def with_shipped_target(config: RunConfig, file: str | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a command line with `SHIPPED_TARGET`, unless they choose a target.

    Args:
        config: The settings, those of the file and the overrides among them.
        file: The settings file; None if there is none.
        overrides: Values of options, by dotted key.
    """
    quant = {**_written(file).get("quant", {}), **nested_keys(_plain(overrides), "config").get("quant", {})}
    return config if _chooses_target(quant) else with_overrides(config, {"quant.target": SHIPPED_TARGET})


def _chooses_target(quant: Mapping[str, Any]) -> bool:
    return "target" in quant or any(key in quant for key in RESEARCH_KEYS)


def chosen_num_images(config: Config) -> Any:
    """Return the number of training images that settings choose; None if they leave it to the images.

    Args:
        config: As for `settings_of`. A `RunConfig` has every key, so its default is no choice.
    """
    if isinstance(config, RunConfig):
        number = config.synthesis.num_images
        return None if number == RunConfig().synthesis.num_images else number
    return _written(config).get("synthesis", {}).get("num_images")


def planned_keys_of(config: Config, arguments: Mapping[str, Any], quality: str | None = None) -> set[str]:
    """Return the keys of a plan that a call chooses.

    Args:
        config: As for `settings_of`; a `RunConfig` chooses all or, if there is a `quality`, rounding and blending that
            are not the defaults.
        arguments: Values by dotted key; None for those that were not given.
        quality: Name of the quality that the call asks for; None if it does not.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if isinstance(config, RunConfig):
        if quality is None:
            return set(PLANNED_KEYS)
        plain = RunConfig()
        changed = {key for key in (*ROUNDING_KEYS, BLEND_KEY) if attrgetter(key)(config) != attrgetter(key)(plain)}
        return planned_keys(given) | changed
    return planned_keys(_written(config), given)


def _built(config: Config, given: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a file or a mapping, with those by dotted key that go before them."""
    if isinstance(config, str | Path):
        return load_run(config, given)
    return config_from_dict(RunConfig, merged_keys(_written(config), given), source="config")


def _written(config: Config) -> dict[str, Any]:
    """Return the tables of keys that a file or a mapping has."""
    if isinstance(config, str | Path):
        return load_config(config)
    if config is None or isinstance(config, Mapping):
        return nested_keys(_plain(config or {}), "config")
    raise ValueError(
        "`config` must be a RunConfig, a mapping with its keys or the path of a .toml or .json file, but got "
        f"{type(config).__name__}"
    )


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
