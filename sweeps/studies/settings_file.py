"""Parsing of files that describe several runs of one setting (ablations, recipes). Imports neither Ray nor torch."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from synq.config.file_kinds import read_as
from synq.config.nearest import nearest, unknown_key
from synq.config.parsing import config_from_dict, dotted_keys, require
from synq.config.run import load_config, parse_bits

T = TypeVar("T")
VARIED = {"quant.weight_bits": "bits", "quant.act_bits": "bits", "seed": "seeds", "data_seed": "seeds"}
"""Settings of a run that such a file sets at its top level, and the top-level key."""


def read_settings(
    cls: type[T], path: str | Path, kind: str, *, required: Iterable[str], base: str = "", apart: Iterable[str] = ()
) -> T:
    """Parse a TOML or JSON file into a dataclass.

    Args:
        cls: The dataclass; some of its fields are parts of a `RunConfig`.
        path: The file.
        kind: Expected kind of file, one of `file_kinds.py`.
        required: Required top-level keys.
        base: Table that holds the run's settings; "" for the top level.
        apart: Top-level keys that are parsed elsewhere; the dataclass must have defaults for them.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: It is damaged, a key is missing or unknown, or bit-widths or seeds are given twice.
    """
    content = load_config(path, "spec")
    with read_as(kind, content, path):
        return _read(cls, content, str(path), required=required, base=base, apart=apart)


def _read(
    cls: type[T], content: Mapping[str, Any], source: str, *, required: Iterable[str], base: str, apart: Iterable[str]
) -> T:
    prefix = f"{base}." if base else ""
    for key in required:
        if key not in content:
            raise ValueError(f"{source}: `{key}` must be given, but is missing")
    for name, instead in {**VARIED, **({"name": "name"} if base else {})}.items():
        table: Any = content.get(base, {}) if base else content
        *parts, last = name.split(".")
        for part in parts:
            table = table.get(part, {}) if isinstance(table, Mapping) else {}
        if isinstance(table, Mapping) and last in table:
            rule = f"be left out (it is set by the file's `{instead}`)"
            raise ValueError(f"{source}: `{prefix}{name}` must {rule}, but got {table[last]!r}")
    left = {key: value for key, value in content.items() if key not in set(apart)}
    return config_from_dict(cls, left, source=source)


def read_part(cls: type[T], table: Any, name: str, source: str) -> T:
    """Parse an optional table that must hold every key of `cls`.

    Raises:
        ValueError: A key is missing, unknown or of another type.
    """
    require(name, "be a table of keys", table, isinstance(table, Mapping))
    for key in table:
        if key not in dotted_keys(cls):
            known = [f"{name}.{field}" for field in dotted_keys(cls)]
            raise ValueError(f"{source}: {unknown_key(f'{name}.{key}', f'{name}.{key}', known)}")
    for key in dotted_keys(cls):
        if key not in table:
            raise ValueError(f"{source}: `{name}.{key}` must be given in a table [{name}], but is missing")
    return config_from_dict(cls, table, source=f"{source} [{name}]")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for an empty list of seeds, or one with duplicates, which would count one run as two."""
    require("seeds", "have at least one entry", list(seeds), len(seeds) > 0)
    require("seeds", "have no entry twice", list(seeds), len(set(seeds)) == len(seeds))


def check_bits(bits: Sequence[str]) -> None:
    """Raise ValueError for an empty list of bit-widths, or one with duplicates or invalid entries."""
    require("bits", "have at least one entry", list(bits), len(bits) > 0)
    require("bits", "have no entry twice", list(bits), len(set(bits)) == len(bits))
    for label in bits:
        parse_bits(label)


def check_rows(rows: Sequence[str], known: Iterable[str]) -> None:
    """Raise ValueError for an empty list of rows, or one with unknown names."""
    known = tuple(known)
    require("rows", "have at least one entry", list(rows), len(rows) > 0)
    for row in rows:
        if row not in known:
            raise ValueError(f"`rows` must be some of {', '.join(known)}, but got {row!r}{nearest(row, known)}")


def check_overrides(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `overrides` of a run, by dotted key, for a command with separate options for bit-widths and seeds.

    Raises:
        ValueError: One of the overrides is set by those options.
    """
    for name, instead in VARIED.items():
        if name in overrides:
            raise ValueError(f"`{name}` must be left out (`{instead}` sets it), but got {overrides[name]}")
    return overrides
