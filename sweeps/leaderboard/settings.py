"""Settings of a configuration as columns of the tables: which of them vary, their cells and their headings.

A column of a setting has the key `params.KEY`, for example `params.finetune.own_weight`. Imports neither Ray nor torch.
"""

import functools
import operator
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from synq.common.text_tables import csv_line, plain
from synq.config.command_help import field_docs
from synq.config.identity import map_spec_path
from synq.config.parsing import dotted_keys, is_number
from synq.config.run import RunConfig

from ..space import IDENTITY
from .columns import BEST_TABLE, RUN_COLUMNS, SETTINGS, Column

PREFIX = "params."
"""Start of the key of a column with a setting."""
PARTS = ("synthesis.", "quant.", "reconstruction.", "finetune.")
"""Parts of a configuration whose settings get a column if they vary between the rows of a table."""
WITH_COLUMN = ("quant.portable", "quant.float_attention")
"""Settings of `IDENTITY` that get such a column."""
WITHOUT_COLUMN = (*(key for key in IDENTITY if key not in WITH_COLUMN), "finetune.log_every")
"""Settings of these parts without such a column: bits, points and target have one anyway, one has no effect."""
KEYS = tuple(key for key in dotted_keys(RunConfig) if "." in key)
"""Dotted keys of all settings; name and seeds belong to a run, not to a row of a leaderboard."""
COLUMN_KEYS = tuple(key for key in KEYS if key.startswith(PARTS) and key not in WITHOUT_COLUMN)
"""Settings that get a column if they vary."""
VIOLATES = "violates"
"""Column that is only shown where it is not empty."""
UNKNOWN = ""
"""Value of a setting that a record does not have."""
SPELLINGS = {
    "act": "activation", "augment": "augmentation", "bn": "BN", "bns": "BNS", "calib": "calibration", "cam": "CAM",
    "ce": "CE", "dim": "dimension", "ema": "EMA", "grad": "gradient", "iterations": "steps", "kd": "KD",
    "lowpass": "low-pass", "mse": "MSE", "num": "", "perturb": "perturbation", "prob": "probability",
}  # fmt: skip
"""Parts of the names of settings as they are written in headings."""
HEADINGS = {
    "synthesis.num_images": "synthetic images",
    "synthesis.hard_sample_gamma": "hard-sample gamma",
    "quant.learned_steps": "learned step sizes",
    "finetune.lowpass_unit": "cutoff unit",
    "finetune.step_lr_factor": "step-size lr factor",
    "finetune.own_term": "own loss term",
}
"""Headings that do not follow from the name of the setting."""

Values = tuple[Any, ...]
"""The values of a run for `KEYS`."""

_values_of = operator.attrgetter(*KEYS)
_USUAL = {column.key: column for column in RUN_COLUMNS}
_INDEX = {key: number for number, key in enumerate(KEYS)}
_FUNCTIONS = [_INDEX[key] for key in ("synthesis.method", "finetune.own_term")]
_COLUMN_INDEX = [(key, _INDEX[key]) for key in COLUMN_KEYS]


def read_settings(config: RunConfig, *, trained: bool = True) -> Values:
    """Return the values of a configuration for `KEYS`; functions of files by the name of the file only, as in digests.

    Args:
        config: The configuration of a run.
        trained: Whether its record has the settings of fine-tuning; they are unknown otherwise.
    """
    values: Values = _values_of(config)
    if any(values[number] and ".py:" in values[number] for number in _FUNCTIONS):
        short = {number: map_spec_path(values[number] or "", os.path.basename) or None for number in _FUNCTIONS}
        values = tuple(short.get(number, value) for number, value in enumerate(values))
    if trained:
        return values
    return tuple(UNKNOWN if key.startswith("finetune.") else value for key, value in zip(KEYS, values, strict=True))


def value_of(values: Values, key: str) -> Any:
    """Return the value of a setting, by its dotted key."""
    return values[_INDEX[key]]


def varying(rows: Iterable[Values]) -> list[str]:
    """Return the dotted keys of `COLUMN_KEYS` that have different known values in rows, in the configuration's order.

    A setting is not counted in rows that do not have it.
    """
    by_key = list(zip(*rows, strict=True))
    if not by_key:
        return []
    return [key for key, number in _COLUMN_INDEX if len({*by_key[number]} - {UNKNOWN}) > 1]


def setting_cell(value: Any) -> Any:
    """Return the cell of a value: a number, or its text; "None" for None, because an empty cell means unknown."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={one}" for key, one in value.items())
    return " ".join(map(plain, value)) if isinstance(value, list | tuple) else value


def setting_cells_of(values: Values, keys: Iterable[str]) -> dict[str, Any]:
    """Return the cells of settings by the keys of their columns."""
    return {f"{PREFIX}{key}": setting_cell(values[_INDEX[key]]) for key in keys}


def line_of(values: Values, keys: Iterable[str]) -> str:
    """Return the cells of settings as the end of a line of CSV, from the comma on; "" without settings."""
    return _end_of_line(*(setting_cell(values[_INDEX[key]]) for key in keys))


@functools.lru_cache(maxsize=65536, typed=True)  # a table is written again after every trial
def _end_of_line(*cells: Any) -> str:
    return csv_line([None, *cells]) if cells else ""


@functools.cache
def setting_column(key: str) -> Column:
    """Return the column of a setting: its heading in the terms of the field, its meaning from the configuration.

    Args:
        key: The dotted key.
    """
    part, _, name = key.partition(".")
    text = " ".join(filter(None, (SPELLINGS.get(one, one) for one in name.split("_"))))
    heading = text if part in ("finetune", "quant") else f"{part} {text}"
    meaning = field_docs(RunConfig).get(key) or f"the setting {key}"
    is_text = not is_number(RunConfig, key)
    return Column(
        f"{PREFIX}{key}", meaning, short=HEADINGS.get(key, heading), is_text=is_text,
        texts=() if is_text else ("None",),
    )  # fmt: skip


def column_of(name: str) -> Column:
    """Return a column of leaderboard.csv or trials.csv, usual or of a setting, by its name."""
    return _USUAL[name] if name in _USUAL else setting_column(name.removeprefix(PREFIX))


def searched_in(about: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of the settings that a sweep searches, in the order of its space.

    Args:
        about: Content of its sweep.json; {} gives none.
    """
    names = [one.get("name") if isinstance(one, dict) else one for one in about.get("space", [])]
    return [name for name in dict.fromkeys(names) if name in _INDEX]  # not the bit-widths of two objectives


def shown_columns(keys: Collection[str], rows: Sequence[Values], *, violated: bool = False) -> list[Column]:
    """Return the columns of a table that is read, not parsed: of the settings only those that vary between its rows.

    Args:
        keys: The usual columns, keys of `RUN_COLUMNS`.
        rows: The settings of its rows.
        violated: Whether a row violates a constraint, so that the column `violates` is not empty.
    """
    changing = _changing(rows)
    usual = [column for column in RUN_COLUMNS if column.key in keys and (violated or column.key != VIOLATES)]
    kept = [column for column in usual if column.key not in SETTINGS or f"finetune.{column.key}" in changing]
    indices = [number for number, column in enumerate(usual) if column.key in SETTINGS]
    left = sum(column in kept for column in usual[: max(indices, default=len(usual) - 1) + 1])
    own = [key for key in changing if key.removeprefix("finetune.") not in SETTINGS]
    return [*kept[:left], *map(setting_column, own), *kept[left:]]


def _changing(rows: Sequence[Values]) -> dict[str, None]:
    """Return the settings that vary, and those whose unit varies."""
    found = dict.fromkeys(varying(rows))
    for key, column in SETTINGS.items():
        if f"finetune.{column.unit_key}" in found:
            found[f"finetune.{key}"] = None
    return found


def best_columns(keys: Sequence[str]) -> list[Column]:
    """Return the columns of the best settings: those of `BEST_TABLE` with the settings before the trial.

    Args:
        keys: Dotted keys of the settings that were searched or vary.
    """
    names = [key.removeprefix("finetune.") for key in keys]
    units = {SETTINGS[name].unit_key for name in names if name in SETTINGS}  # of a cell that has another unit anyway
    found = [
        SETTINGS[name] if name in SETTINGS else setting_column(key)
        for name, key in zip(names, keys, strict=True)
        if name not in units
    ]
    return [*BEST_TABLE[:-1], *found, BEST_TABLE[-1]]


def constants_text(rows: Sequence[Values], searched: Iterable[str] = ()) -> str:
    """Return the settings that are the same in all rows, for the line above a table; "" if there are none.

    Args:
        rows: The settings of the rows.
        searched: Dotted keys of settings to name besides those that most sweeps search.
    """
    if not rows:
        return ""
    keys = dict.fromkeys([*(f"finetune.{key}" for key in SETTINGS), *searched])
    changing = _changing(rows)
    parts = [f"{_heading(key)} {text}" for key in keys if key not in changing and (text := _with_unit(rows[0], key))]
    return f"the same in all rows: {', '.join(parts)}" if parts else ""


def _heading(key: str) -> str:
    name = key.removeprefix("finetune.")
    return SETTINGS[name].heading if name in SETTINGS else setting_column(key).heading


def _with_unit(values: Values, key: str) -> str:
    cell = setting_cell(value_of(values, key))
    column = SETTINGS.get(key.removeprefix("finetune."))
    unit = column.unit_key if column is not None and cell != "None" else ""
    text = f"{cell:.4g}" if isinstance(cell, float) else plain(cell)
    return f"{text} {value_of(values, f'finetune.{unit}')}" if text and unit else text
