"""The text of `--help`, made from the docstrings under the fields of the settings. Loads no torch."""

import ast
import dataclasses
import functools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from synq.config.command_options import Argument, Option
from synq.config.parsing import dotted_keys
from synq.config.plugins import KINDS, installed
from synq.config.run import RunConfig

GROUPS = tuple(part.name for part in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(part.type))
"""Tables of the settings: teacher, synthesis, quant, reconstruction, finetune, evaluation, runtime."""
MIN_WIDTH, MAX_WIDTH = 80, 120
LEFT_WIDTH = 42
"""Maximum width of the column of options, in characters; a longer option gets a separate line."""
ONE_LINE_CHOICES = 24
"""Maximum length of the choices of a setting next to its option, in characters; longer ones follow its help."""


class Described(Protocol):
    """The attributes of a command that its help shows; see `Command`."""

    help: str | None
    settings: str
    common: Sequence[str]
    examples: str
    exit_codes: str

    @property
    def own_arguments(self) -> list[Argument]: ...

    @property
    def own_options(self) -> list[Option]: ...

    @property
    def usage_line(self) -> str: ...


def overview(program: str, version: str, sections: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """Return the help of a program: its commands by section, one line each.

    Args:
        program: Name of the program.
        version: Version of the program.
        sections: Title -> command -> (module, summary of the command).
    """
    lines = [
        f"usage: {program} COMMAND ...",
        "",
        f"SynQ {version}: quantize a pre-trained image classifier without any data.",
    ]
    for title, commands in sections.items():
        lines += ["", f"{title}:", *(f"  {program} {name:<16} {work}" for name, (_, work) in commands.items())]
    lines += ["", f"`{program} COMMAND --help` has the essentials of a command, `--help-all` everything.",
              "Several processes or GPUs: `accelerate launch synq/train.py` takes the arguments of `synq "
              "train`."]  # fmt: skip
    return "\n".join(lines)


def short_help(command: Described, program: str, config: RunConfig, width: int | None = None) -> str:
    """Return the short help of a command, fewer than 40 lines.

    Args:
        command: The command.
        program: The program and command as the user called it.
        config: Its values are shown as defaults.
        width: Line width in characters; None takes that of the terminal, 80 to 120.
    """
    width = width or _width()
    sentence = (command.help or "").partition("\n\n")[0]
    lines = [*_usage(command, program, width), "", *textwrap.wrap(" ".join(sentence.split()), width), ""]
    options = [(left, right) for left, right, is_common in _own(command) if is_common]
    flag, more = "--help[-all]", "this, or everything"
    if command.settings:
        flag, more = "--help[-all|=GROUP]", f"this, everything, or the settings of one of: {', '.join(GROUPS)}"
    lines += _definitions([*options, (flag, more)], width)
    if command.common:
        lines += ["", f"settings used most, of {len(dotted_keys(RunConfig))}, with their [default]:"]
        lines += _definitions(settings_rows(config, command.common, choices_first=True), width, one_line=True)
    return "\n".join([*lines, *_closing(command, program)])


def full_help(command: Described, program: str, config: RunConfig) -> str:
    """Return the full help of a command: its description, all options and all settings."""
    width = _width()
    lines = _usage(command, program, width)
    for part in (command.help or "").split("\n\n"):
        lines += ["", *textwrap.wrap(" ".join(part.split()), width)]
    lines += ["", *_definitions([(left, right) for left, right, _ in _own(command)], width)]
    if command.settings:
        for group in ("", *GROUPS):
            lines += ["", *_group_lines(config, group, width)]
    return "\n".join([*lines, *_closing(command, program)])


def group_help(program: str, config: RunConfig, group: str) -> str:
    """Return the help of all settings of one group."""
    return "\n".join([*_group_lines(config, group, _width()), *_added_lines(f"{group}.")])


def _group_lines(config: RunConfig, group: str, width: int) -> list[str]:
    keys = [key for key in dotted_keys(RunConfig) if key.rpartition(".")[0] == group]
    doc = field_docs(RunConfig)[group] if group else "The run itself."
    return [f"{group or 'run'}: {doc[:1].lower()}{doc[1:]}", *_definitions(settings_rows(config, keys), width)]


def _usage(command: Described, program: str, width: int) -> list[str]:
    return textwrap.wrap(f"usage: {program} {command.usage_line}", width, subsequent_indent=" " * 7)


def _closing(command: Described, program: str) -> list[str]:
    examples = command.examples.replace("%(prog)s", program).rstrip().splitlines()
    return [
        *(["", "examples:"] if examples else []), *examples, *_added_lines(), "", f"exit codes: {command.exit_codes}"
    ]  # fmt: skip


def _added_lines(start: str = "") -> list[str]:
    """Return what installed packages add, one line for each setting whose name has this start; [] if it is nothing."""
    found = {}
    for kind in KINDS:
        text = ":..." if kind.has_text else ""
        names = [f"{name}{text} ({version})" for name, version in sorted(installed(kind).items())]
        if names and kind.setting.startswith(start):
            found[kind.setting] = ", ".join(names)
    return ["", "from installed packages:", *(f"  {key}: {names}" for key, names in found.items())] if found else []


def _own(command: Described) -> list[tuple[str, str, bool]]:
    """Return (option or argument, help, whether it is common) of a command, without the settings."""
    rows = [(argument.metavar or "", str(argument.help), True) for argument in command.own_arguments]
    for option in command.own_options:
        value = (
            "" if option.is_flag else f" {option.metavar or option.type.name.upper()}{' ...' if option.several else ''}"
        )
        rows.append((f"{option.opts[0]}{value}", option.help or "", option.is_common))
    return rows


def _width() -> int:
    if not sys.stdout.isatty():
        return MAX_WIDTH
    return min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)


def _definitions(rows: Sequence[tuple[str, str]], width: int, *, one_line: bool = False) -> list[str]:
    """Return the lines of a table of two columns; with `one_line`, each row is truncated to one line."""
    column = min(max((len(left) for left, _ in rows), default=0), LEFT_WIDTH) + 2
    lines = []
    for left, right in rows:
        room = width - column - 2
        if one_line:
            lines.append(f"  {left:<{column}}{_cut(right, room - max(0, len(left) + 2 - column))}".rstrip())
            continue
        first, *others = textwrap.wrap(right, room) or [""]
        if len(left) + 2 > column:
            lines.append(f"  {left}")
            left = ""
        lines += [f"  {left:<{column}}{first}".rstrip(), *(f"  {'':<{column}}{line}" for line in others)]
    return lines


def _cut(text: str, room: int) -> str:
    """Return one line of help with the default in brackets at its end; the text before it is truncated to fit."""
    start, _, default = text.rpartition("(default: ")
    end = f" [{default[:-1]}]"
    start = start.rstrip()
    if len(start) + len(end) > room:
        start = start[: max(0, room - len(end) - 3)].rpartition(" ")[0].rstrip(" ,;:(") + "..."
    return f"{start}{end}"


def settings_rows(config: RunConfig, keys: Iterable[str], *, choices_first: bool = False) -> list[tuple[str, str]]:
    """Return (option with its type, docstring and value in `config`) of each setting, given by dotted key.

    Args:
        config: The run.
        keys: The settings.
        choices_first: Whether choices come before the docstring, where a line is too short for both.
    """
    docs, hints = field_docs(RunConfig), _hints(RunConfig)
    rows = []
    for key in keys:
        name, choices = _metavar(hints[key], "None" if key in _none_is_text(RunConfig) else "none")
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        parts = [f"{doc} " if (doc := docs[key]) else "", f"One of {choices}. " if choices else ""]
        if choices_first:
            parts.reverse()
        default = name.rpartition("|")[2] if value is None else _text(value)
        rows.append((f"--{key} {name}", f"{''.join(parts)}(default: {default})"))
    return rows


@functools.cache
def field_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the docstring under each field of a configuration class by dotted key, nested parts included."""
    found: dict[str, str] = {}
    written = _docs_in(cls.__module__).get(cls.__name__, {})
    for field in dataclasses.fields(cls):
        found[f"{prefix}{field.name}"] = written.get(field.name, "")
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= field_docs(field.type, f"{prefix}{field.name}.")
    return found


@functools.cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """Return class -> field -> docstring of a module; empty if its source file is missing."""
    path = Path(sys.modules[module].__file__ or "")
    if path.suffix != ".py" or not path.is_file():
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            docs = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if is_field and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    docs[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


@functools.cache
def _hints(cls: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= _hints(field.type, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = field.type
    return found


def _none_is_text(cls: type) -> set[str]:
    """Return the dotted keys of the settings in which "none" is a value, so that only "None" means None."""
    parts = {field.name: field.type for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.type)}
    return {f"{part}.{key}" for part, kind in parts.items() for key in getattr(kind, "NONE_IS_TEXT", ())}


def _metavar(hint: Any, none: str = "none") -> tuple[str, str]:
    """Return the type of a setting as shown next to its option, and its choices if they are too long for that.

    Args:
        hint: The type.
        none: The text that means None.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        name, choices = _metavar(inner)
        return f"{name}|{none}", choices
    if origin is Literal:
        short = "|".join(args)
        return (short, "") if len(short) <= ONE_LINE_CHOICES else ("NAME", ", ".join(args))
    if origin is tuple:
        name = _metavar(args[0])[0]
        return f"{name} ..." if args[-1] is Ellipsis else " ".join([name] * len(args)), ""
    if origin is dict:
        return f"NAME={_metavar(args[1])[0]} ...", ""
    return {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}[hint], ""


def _text(value: Any) -> str:
    """Return a value as written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={part}" for name, part in value.items()) or "none"
    return str(value)
