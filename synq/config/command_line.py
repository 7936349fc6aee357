"""Command lines on top of click: an option per setting of a run, one-line errors, exit codes. Loads no torch.

    @click.command("export", cls=Command, examples=EXAMPLES)
    @argument("run", metavar="RUN", help="folder of a finished run")
    @option("--formats", several=True, help="some of: onnx packed torch")
    def command(run: str, formats: tuple[str, ...]) -> None:
        \"\"\"Write the student of a finished run as ONNX.\"\"\"

    main = command.run

Beyond click: options that take several values (`--seeds 0 1 2`), the most similar option in an error message, and a
first argument without its option (TEACHER for `--teacher.spec`).
"""

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import click

from synq.common.exit_codes import USER_ERROR, exit_code
from synq.config.command_help import GROUPS, full_help, group_help, overview, short_help
from synq.config.command_options import Argument, Option, key_of, label, parameter_name, setting_options
from synq.config.finetune import check_own_weight, has_own_weight
from synq.config.nearest import nearest, unknown_key
from synq.config.parsing import dotted_keys, load_config, one_of, values_from_text, with_overrides
from synq.config.run import RunConfig, load_run, make_absolute

HELP_FLAGS = ("-h", "--help")


class GivenSettings(NamedTuple):
    """What a command line gave of a run's settings, as the object of the click context."""

    files: tuple[str, ...]
    """Settings files."""
    overrides: dict[str, Any]
    """Values of options, by dotted key."""


class Command(click.Command):
    """A command whose errors are one line on standard error; options are never abbreviated.

    Args:
        name: As on the command line.
        usage: The usage line after the program's name; made from the options if empty.
        examples: Lines of examples; `%(prog)s` is the program's name.
        settings: Which settings of a run are options: "" none; "run" all, the callback gets `config`, a RunConfig with
            absolute paths, and the context's `obj` is the overrides by dotted key; "overrides" all, the callback gets
            `overrides`.
        common: Dotted keys of the settings in the short help.
        first: Option that the first argument is the value of; with "run", `--teacher.spec` or `--config`.
        advice: Advice at the end of the message about an unknown option.
        exit_codes: Meaning of the exit codes.
        resumes: Whether the same command, started again, resumes an interrupted one.
        failures: Returns the types of RuntimeError that mean a failed run, not a bug of this program.
    """

    def __init__(
        self,
        name: str | None,
        *,
        usage: str = "",
        examples: str = "",
        settings: str = "",
        common: Sequence[str] = (),
        first: str = "",
        advice: str = "see --help",
        exit_codes: str = "0 done, 1 a run failed, 2 input rejected, 130 interrupted",
        resumes: bool = False,
        failures: Callable[[], tuple[type[BaseException], ...]] = tuple,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, add_help_option=False, **kwargs)
        self.usage, self.examples, self.exit_codes = usage, examples, exit_codes
        self.settings, self.common = settings, common
        self.first = "--teacher.spec" if settings == "run" else first
        self.advice, self.resumes, self.failures = advice, resumes, failures

    @property
    def own_options(self) -> list[Option]:
        """Return the options that are not settings of a run."""
        return [param for param in self.params if isinstance(param, Option)]

    @property
    def own_arguments(self) -> list[Argument]:
        """Return the positional arguments."""
        return [param for param in self.params if isinstance(param, Argument)]

    @property
    def usage_line(self) -> str:
        """Return the usage line after the program's name."""
        if self.usage:
            return self.usage
        names = [f"{param.metavar}{'...' if param.nargs < 0 else ''}" for param in self.own_arguments]
        parts = [name if param.required else f"[{name}]" for name, param in zip(names, self.own_arguments, strict=True)]
        if self.settings == "run":
            parts += ["[TEACHER | FILE.toml]"]
        return " ".join([*parts, "[options]", *(["[--KEY VALUE ...]"] if self.settings else [])])

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters of the command and the settings of a run."""
        return [*self.params, *(setting_options() if self.settings else ())]

    def run(self, argv: Sequence[str] | None = None, program: str = "") -> int:
        """Run the command and return its exit code.

        Args:
            argv: The arguments; None takes `sys.argv[1:]`.
            program: Name of the program in the help; "synq NAME" if empty.
        """
        args = list(sys.argv[1:] if argv is None else argv)
        work = partial(self._work, args, program or f"synq {self.name}")
        return exit_code(work, resumes=self.resumes, failures=self.failures)

    def read(self, args: Sequence[str]) -> dict[str, Any]:
        """Return the parameters of the callback for these arguments, without calling it.

        Raises:
            ValueError: An argument is unknown, missing or out of range.
            OSError: A settings file cannot be read.
        """
        return self._parse(args, f"synq {self.name}").params

    def _work(self, args: Sequence[str], program: str) -> int:
        try:
            ctx = self._parse(args, program)
        except click.exceptions.Exit as end:
            return end.exit_code
        except (ValueError, OSError):
            if os.environ.get("RANK", "0") != "0":  # every process has read the same arguments
                return USER_ERROR
            raise
        with ctx:
            return int(self.invoke(ctx) or 0)

    def _parse(self, args: Sequence[str], program: str) -> click.Context:
        try:
            return self.make_context(program, list(args))
        except click.MissingParameter as error:
            name = label(error.param)
            raise ValueError(f"`{name}` must be given, but is not; {self.advice}") from None
        except click.UsageError as error:
            message = error.format_message().rstrip(".")
            raise ValueError(f"{message[:1].lower()}{message[1:]}; {self.advice}") from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; on a help flag, print the help and exit.

        Raises:
            ValueError: As `read`.
        """
        if self.first:
            args = name_first_argument(args, self.first, takes_file=self.settings == "run")
        level = next((arg for arg in args if arg in HELP_FLAGS or arg.startswith(("--help=", "--help-all"))), None)
        if level is not None:
            self._print_help(ctx, level, args)
            ctx.exit()
        given, positional = self._collect(args)
        self._check_number(positional, ctx.info_name or "")
        attached = [flag if value is None else f"{flag}={value}" for flag, values in given.items() for value in values]
        rest = super().parse_args(ctx, [*attached, "--", *positional])
        self._read_settings(ctx)
        return rest

    def _read_settings(self, ctx: click.Context) -> None:
        if not self.settings:
            return
        text = {key: ctx.params.pop(parameter_name(key)) for key in dotted_keys(RunConfig)}
        overrides = values_from_text(RunConfig, {key: values for key, values in text.items() if values})
        if self.settings == "overrides":
            ctx.params["overrides"] = overrides
        else:
            files = tuple(ctx.params.pop("config_files") or ())
            config = read_run(files, overrides)
            check_own_weight(config.finetune, is_given=has_own_weight(overrides, *map(load_config, files)))
            ctx.params["config"] = make_absolute(config)
            ctx.obj = GivenSettings(files, overrides)

    def _collect(self, args: Sequence[str]) -> tuple[dict[str, list[str | None]], list[str]]:
        """Return the values of each option, None for a flag's, and the positional arguments."""
        known = {key_of(flag): param for param in self.get_params(None) for flag in param.opts}  # type: ignore[arg-type]
        left, positional = list(args), list[str]()
        given: dict[str, list[str | None]] = {}
        while left:
            arg = left.pop(0)
            if arg == "--":
                positional += left
                break
            if not arg.startswith("-") or arg == "-":
                self._check_positional(arg)
                positional.append(arg)
                continue
            flag, equals, value = arg.partition("=")
            param = known.get(key_of(flag))
            if self.settings and not flag.startswith("--"):
                raise ValueError(f"each setting must read --KEY VALUE, but got {arg}; {self.advice}")
            if not isinstance(param, Option) or not flag.startswith("--"):
                raise ValueError(self._unknown(flag))
            flag = param.opts[0]
            if param.is_flag:
                if equals:
                    raise ValueError(f"`{label(param)}` must be given without a value, but got {value!r}")
                given[flag] = [None]
                continue
            values: list[str | None] = [value] if equals else []
            while not equals and left and not left[0].startswith("--") and (param.several or not values):
                values.append(left.pop(0))
            if not values:
                raise ValueError(f"`{label(param)}` must {param.rule}, but got none")
            given[flag] = [*given.get(flag, []), *values] if param.multiple and not param.several else values
        return given, positional

    def _check_positional(self, arg: str) -> None:
        if self.settings:
            name = "TEACHER" if self.settings == "run" else self.first.removeprefix("--").upper()
            order = f", and {name} must come first" if name else ""
            raise ValueError(f"each setting must read --KEY VALUE{order}, but got {arg}; {self.advice}")

    def _check_number(self, positional: Sequence[str], program: str) -> None:
        """Raise ValueError if there are more arguments than the command has, as where the shell expands a pattern."""
        known = self.own_arguments
        if any(param.nargs < 0 for param in known) or len(positional) <= len(known):
            return
        names = shlex.join(positional)
        if len(known) != 1:
            raise ValueError(f"there must be {len(known)} arguments, but got {len(positional)}: {names}; {self.advice}")
        name = label(known[0])
        raise ValueError(
            f"`{name}` must be one, but got {len(positional)}: {names}; choose one, or call the command for each: "
            f'`for {name} in {names}; do {program} "${name}"; done`'
        )

    def _unknown(self, flag: str) -> str:
        flags = {key_of(name): name for param in self.own_options for name in param.opts}
        if not self.settings:
            hint = nearest(flag, flags.values()) or f"; {self.advice}"
            if hint.endswith("?") and self.advice != "see --help":  # a similar name may be another thing
                hint += f" {self.advice[:1].upper()}{self.advice[1:]}"
            return f"`{flag}` must be an option of this command, but is not{hint}"
        key, keys = key_of(flag), dotted_keys(RunConfig)
        hint = nearest(key, [*flags, *keys])
        for name, written in flags.items():
            if f"`{name}`" in hint:
                hint = hint.replace(f"`{name}`", f"`{written}`")
                return f"`{flag}` must be an option of this command or a setting of a run, but is neither{hint}"
        return str(unknown_key(key, key, keys))

    def _print_help(self, ctx: click.Context, level: str, args: Sequence[str]) -> None:
        program, config = ctx.info_name or "", RunConfig()
        if self.settings == "run":  # the help shows the values that a run with these arguments would have
            given, _ = self._collect([arg for arg in args if arg not in (level, *HELP_FLAGS)])
            text = {key: given[f"--{key}"] for key in dotted_keys(RunConfig) if f"--{key}" in given}
            config = read_run(given.get("--config", []), values_from_text(RunConfig, text))  # type: ignore[arg-type]
        if level == "--help-all":
            text_of_help = full_help(self, program, config)
        elif level in HELP_FLAGS:
            text_of_help = short_help(self, program, config)
        elif level.startswith("--help="):
            group = level.removeprefix("--help=")
            if not self.settings:
                raise ValueError(
                    f"`help` must be given without a group for this command, but got {group!r}; see --help-all"
                )
            one_of("help", group, GROUPS)
            text_of_help = group_help(program, config, group)
        else:
            raise ValueError(self._unknown(level.partition("=")[0]))
        if os.environ.get("RANK", "0") == "0":
            print(text_of_help, flush=True)


def name_first_argument(args: Sequence[str], first: str, *, takes_file: bool) -> list[str]:
    """Return the arguments with an option inserted before the first one, unless that is an option itself.

    Args:
        args: The arguments.
        first: The option to insert.
        takes_file: Whether to insert `--config` before an argument that ends in .toml or .json.

    Raises:
        ValueError: The second argument has no option either.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    if len(args) > 1 and not args[1].startswith("-"):
        cure = "`--config FILE` names settings, `--teacher.spec` the teacher" if takes_file else "see --help"
        raise ValueError(
            f"only the first argument may come without its option, but got {args[1]!r} after {args[0]!r}; {cure}"
        )
    return ["--config" if takes_file and args[0].endswith((".toml", ".json")) else first, *args]


def read_run(files: Sequence[str], overrides: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a file, or the defaults without one, with overrides by dotted key.

    Raises:
        ValueError: There are two files, a key is unknown, or a value is out of range.
        OSError: The file cannot be read.
    """
    if len(files) > 1:
        raise ValueError("`config` must name one file, but got two")
    return with_overrides(load_run(files[0]) if files else RunConfig(), overrides)


class CommandGroup(click.Group):
    """Commands by section; the module of a command, with the attribute `command`, is imported when it is called.

    Args:
        name: Name of the program.
        version: Version that `--version` prints.
        sections: Title -> command -> (module, summary of the command).
    """

    def __init__(self, name: str, version: str, sections: Mapping[str, Mapping[str, tuple[str, str]]]) -> None:
        super().__init__(name)
        self.version, self.sections = version, sections
        self.modules = {name: module for part in sections.values() for name, (module, _) in part.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Command | None:
        """Import and return a command; None if there is none of this name."""
        module = self.modules.get(cmd_name)
        return None if module is None else importlib.import_module(module).command

    def run(self, argv: Sequence[str]) -> int:
        """Run the command named by the first argument and return its exit code."""
        return exit_code(partial(self._work, list(argv)))

    def _work(self, args: list[str]) -> int:
        if not args or args[0] in (*HELP_FLAGS, "help", "--help-all"):
            print(overview(self.name or "", self.version, self.sections), flush=True)
            return 0
        if args[0] == "--version":
            print(f"{self.name} {self.version}", flush=True)
            return 0
        if args[0].startswith("--help="):
            raise ValueError(f"`--help=GROUP` must follow a command, for example: {self.name} train {args[0]}")
        command = self.get_command(click.Context(self), args[0])
        if command is None:
            names, hint = ", ".join(self.modules), nearest(args[0], self.modules)
            raise ValueError(f"`COMMAND` must be one of {names}, but got {args[0]!r}{hint}")
        return command.run(args[1:], f"{self.name} {args[0]}")
