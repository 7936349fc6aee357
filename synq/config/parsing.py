"""Strict conversion between plain mappings (TOML, JSON, dotted overrides) and frozen dataclasses."""

import dataclasses
import functools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from synq.config.nearest import nearest, unknown_key

T = TypeVar("T")


MAX_SHOWN = 200
"""Characters of a value that a message repeats."""
MAX_DEPTH = 20
"""Levels of tables and lists in each other that a file may have; those of this project have at most four."""


def shown(value: object) -> str:
    """Return a value as Python writes it, for a message, on one line; a long one is shortened."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python converts to text
        return "a number of thousands of digits"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def require(name: str, rule: str, value: object, holds: bool) -> None:
    """Raise ValueError "`name` must <rule>, but got <value>" unless `holds`."""
    if not holds:
        raise ValueError(f"`{name}` must {rule}, but got {shown(value)}")


def check_format(path: str | Path, what: str, found: object, current: int, cure: str) -> None:
    """Raise if a file has another format number than this version of SynQ writes.

    Args:
        path: The file.
        what: Its content, for the message.
        found: Its format number; None if it has none.
        current: The format number of this version.
        cure: What to do about a file of an earlier version, for the message.

    Raises:
        ValueError: "`PATH` must hold WHAT of format 2, but got format 1, written by an earlier version of SynQ: CURE".
    """
    if found == current:
        return
    if isinstance(found, int) and found > current:
        age, cure = "a later", f"update SynQ, or {cure}"
    else:
        age = "an earlier"
    got = "no format number" if found is None else f"format {found}"
    raise ValueError(
        f"`{path}` must hold {what} of format {current}, but got {got}, written by {age} version of SynQ: {cure}"
    )


def between(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless a value is a finite number in [low, high], or in (low, high] with `open_low`."""
    try:
        is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of float
        is_finite = False
    if is_finite and (low < value if open_low else low <= value) and value <= high:
        return  # before the message is made, which takes longer
    span = f"be a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    require(name, span if high < math.inf else f"be a finite number {'>' if open_low else '>='} {low:g}", value, False)


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message names the most similar one."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}, but got {shown(value)}{nearest(str(value), choices)}"
        )


def dotted_keys(cls: type) -> list[str]:
    """Return every dotted key of a configuration class, for example `finetune.lr`."""
    return list(_dotted_hints(cls))


def is_number(cls: type, key: str) -> bool:
    """Return whether the values of a dotted key of a configuration class are numbers, or None."""
    hint = _dotted_hints(cls)[key]
    return {*(typing.get_args(hint) or (hint,))} <= {int, float, types.NoneType}


def config_from_dict(cls: type[T], mapping: Mapping[str, Any], *, source: str = "") -> T:
    """Build `cls` from a mapping of plain values, nested parts included; missing keys have their defaults.

    Lists become tuples, and whole numbers floats, according to the type of the field; nothing else is converted. TOML
    has no null: the texts "none" and "None" mean None where None is allowed. A class names the fields in which "none"
    is a value in NONE_IS_TEXT.

    Args:
        cls: A configuration dataclass.
        mapping: Keys are field names; nested parts are mappings.
        source: Origin of the mapping, for messages.

    Raises:
        ValueError: For an unknown key (the message names the most similar one), a wrong type, or a value out of range.
    """
    try:
        return _build(cls, mapping, "", cls)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


@functools.cache  # reading the hints of a class takes longer than building it
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {part.name: hints[part.name] for part in dataclasses.fields(cls)}


def _build(cls: type[T], mapping: Mapping[str, Any], prefix: str, root: type) -> T:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"`{prefix[:-1]}` must be a table of keys, but got {shown(mapping)}")
    fields = _fields(typing.cast(type, cls))
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise unknown_key(f"{prefix}{key}", f"{prefix}{key}", [*_tables(root), *dotted_keys(root)])
        if value == "None" or (value == "none" and key not in getattr(cls, "NONE_IS_TEXT", ())):
            value = _none_if_allowed(fields[key], value)
        hint = fields[key]
        values[key] = value if type(value) is hint else _convert(hint, value, f"{prefix}{key}", root)
    return cls(**values)


@functools.cache
def _tables(cls: type) -> tuple[str, ...]:
    """Return the names of the parts of a configuration class that are tables."""
    return tuple(name for name, hint in _fields(cls).items() if dataclasses.is_dataclass(hint))


def _none_if_allowed(hint: Any, value: Any) -> Any:
    return None if types.NoneType in typing.get_args(hint) else value


def _convert(hint: Any, value: Any, name: str, root: type) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.", root)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        return None if value is None else _convert(inner, value, name, root)
    if origin is Literal:
        one_of(name, value, args)
        return value
    if origin is tuple:
        sized = args[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (sized and len(value) != len(args)):
            raise ValueError(
                f"`{name}` must be a list of {len(args) if sized else 'any number of'} values, but got {shown(value)}"
            )
        return tuple(_convert(args[0], part, name, root) for part in value)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"`{name}` must be a table of names and values, but got {shown(value)}")
        for key, part in value.items():
            rule = "be one value (in TOML, quote a name with dots)"
            require(f"{name}.{key}", rule, part, not isinstance(part, Mapping))
        return {key: _convert(args[1], part, f"{name}.{key}", root) for key, part in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(
                f"`{name}` must be a number below 1e308, but got one of {len(str(abs(value)))} digits"
            ) from None
    if type(value) is not hint:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"`{name}` must be {expected[hint]}, but got {shown(value)}")
    return value


def config_to_dict(config: object) -> dict[str, Any]:
    """Return a deep copy of a configuration as plain JSON values: parts become dicts, tuples become lists."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"a configuration object is needed, but got {config!r}")
    values = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    return {
        name: config_to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else dict(value)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def with_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """Return a copy with dotted keys replaced, for example `{"finetune.lr": 1e-4}`.

    Raises:
        ValueError: As `config_from_dict`.
    """
    mapping = config_to_dict(config)
    for key, value in overrides.items():
        if key not in dotted_keys(type(config)):
            raise unknown_key(key, key, dotted_keys(type(config)))
        *parts, last = key.split(".")
        table = mapping
        for part in parts:
            table = table[part]
        table[last] = value
    return config_from_dict(type(config), mapping)


def values_from_text(cls: type, text: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Convert settings from text, `{"finetune.lr": ["1e-4"]}`, to the types of their fields.

    A Boolean is always written as true or false, so that no argument can mean its opposite. Values are only converted
    here; `with_overrides` checks them, with the same messages as for a file.

    Args:
        cls: A configuration dataclass.
        text: The arguments of each option, by dotted key.

    Raises:
        ValueError: A key is unknown (the message names the most similar one) or a value is missing.
    """
    hints = _dotted_hints(cls)
    for key in text:
        if key not in hints:
            raise unknown_key(key, key, hints)
    return {key: _read(hints[key], list(values), key) for key, values in text.items()}


@functools.cache
def _dotted_hints(cls: Any, prefix: str = "") -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for name, hint in _fields(cls).items():
        hints |= (
            _dotted_hints(typing.cast(Any, hint), f"{prefix}{name}.")
            if dataclasses.is_dataclass(hint)
            else {f"{prefix}{name}": hint}
        )
    return hints


def _read(hint: Any, args: list[str], name: str) -> Any:
    """Convert arguments to the type `hint`; an invalid one stays text, for the later check to reject by name."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    optional = len(kinds) < len(typing.get_args(hint))
    kind = kinds[0] if optional else hint
    if optional and args == ["None"]:
        return None
    if typing.get_origin(kind) is tuple:
        args = [part for arg in args for part in arg.split(",") if part]  # 3 32 32 and 3,32,32 are the same
        return [_read(typing.get_args(kind)[0], [arg], name) for arg in args] if args != ["none"] else "none"
    if typing.get_origin(kind) is dict:  # conv1=8,fc=8 and conv1=8 fc=8 are the same; none is an empty table
        if args == ["none"]:
            return {}
        pairs = [part.rpartition("=") for arg in args for part in arg.split(",") if part]
        if not all(key and value for key, _, value in pairs):
            raise ValueError(
                f"`{name}` must be given as NAME=VALUE NAME=VALUE, such as conv1=8, but got {' '.join(args)}"
            )
        if len({key for key, _, _ in pairs}) < len(pairs):
            raise ValueError(f"`{name}` must have no name twice, but got {' '.join(args)}")
        return {key: _read(typing.get_args(kind)[1], [value], f"{name}.{key}") for key, _, value in pairs}
    if len(args) != 1:
        cure = "; TEACHER, which has no option, goes first" if ":" in " ".join(args[1:]) else ""
        raise ValueError(f"`{name}` must be given one value, but got {' '.join(args) or 'none'}{cure}")
    arg = args[0]
    readers: dict[Any, Callable[[str], Any]] = {bool: _read_bool, int: int, float: float}
    try:
        return readers[kind](arg) if kind in readers else arg
    except ValueError:
        return arg


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def load_config(path: str | Path, name: str = "config") -> dict[str, Any]:
    """Read a TOML or JSON file as a dict.

    Args:
        path: The file; its suffix, .toml or .json, is its format.
        name: The name of the file in messages.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not valid, has another suffix, or holds no table.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"`{name}` must name a .toml or .json file, but got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"`{name}` must name an existing file, but got {str(path)!r}")
    kind = path.suffix[1:].upper()
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except RecursionError:
        raise ValueError(f"`{name}` must be valid {kind}, but got {str(path)!r}, nested too deeply") from None
    except ValueError as error:  # of the syntax, the encoding, or a number of more digits than Python reads
        reason = shown(str(error))[1:-1]
        raise ValueError(f"`{name}` must be valid {kind}, but got {str(path)!r}: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"`{name}` must hold a table of keys, but got {str(path)!r} with a {type(content).__name__}")
    if _is_deeper(content, MAX_DEPTH):
        rule = f"hold at most {MAX_DEPTH} levels of tables and lists"
        raise ValueError(f"`{name}` must {rule}, but got more in {str(path)!r}")
    return content


def _is_deeper(content: object, levels: int) -> bool:
    """Return whether tables and lists are nested in more levels; counts without recursion."""
    layer: list[object] = [content]
    for _ in range(levels):
        layer = [
            part
            for value in layer
            if isinstance(value, Mapping | list)
            for part in (value.values() if isinstance(value, Mapping) else value)
        ]
    return any(isinstance(value, Mapping | list) for value in layer)


def parse_bits(label: str) -> tuple[int, int]:
    """Return the bits of weights and activations in a label: "W3A8" gives (3, 8).

    Raises:
        ValueError: The label has another form, or a bit-width is outside [2, 8].
    """
    match = re.fullmatch(r"W([2-8])A([2-8])", label)
    if match is None:
        raise ValueError(f"`bits` must read W<2..8>A<2..8>, for example W4A4, but got {shown(label)}")
    return int(match[1]), int(match[2])
