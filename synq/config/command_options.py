"""Options and arguments of commands: extensions of click, and one option per setting of a run. Loads no torch."""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import click

from synq.config.budget import QUALITIES
from synq.config.parsing import dotted_keys, one_of
from synq.config.run import PATH_SETTINGS, RunConfig

Function = TypeVar("Function", bound=Callable[..., Any])


class Option(click.Option):
    """An option with one value, or with several: `--seeds 0 1 2`.

    Attributes:
        several: Whether it takes all arguments up to the next option; if given twice, the last list counts.
        rule: Requirement for its value, for the message if the value is missing.
        is_common: Whether the short help lists it.
    """

    def __init__(
        self,
        *args: Any,
        several: bool = False,
        multiple: bool = False,
        rule: str = "",
        is_common: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{**kwargs, "multiple": several or multiple})
        self.several, self.is_common = several, is_common
        self.rule = rule or ("be given at least one value" if several else "be given one value")


class Argument(click.Argument):
    """A positional argument with a line of help."""

    def __init__(self, *args: Any, help: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = help


option = partial(click.option, cls=Option)
argument = partial(click.argument, cls=Argument)
config_option = option(
    "--config",
    "config_files",
    metavar="FILE",
    multiple=True,
    rule="name one file",
    help="TOML or JSON file of settings, with the keys below; options override it",
)


class WholeNumber(click.ParamType):
    """An integer."""

    name = "int"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; raise ValueError if it is none."""
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"`{label(param)}` must be a whole number, but got {value!r}") from None


class Number(click.ParamType):
    """A floating-point number; inf and nan pass, the command checks them."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; raise ValueError if it is none."""
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"`{label(param)}` must be a number, but got {value!r}") from None


class OneOf(click.ParamType):
    """One of several choices."""

    name = "choice"

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the choice; raise ValueError, which names the most similar one, if it is none."""
        one_of(label(param), value, self.choices)
        return str(value)


INT, FLOAT = WholeNumber(), Number()


def label(param: click.Parameter | None) -> str:
    """Return the name of a parameter in messages: an option without its dashes, an argument's metavar."""
    if isinstance(param, click.Option):
        return param.opts[0].removeprefix("--")
    return "" if param is None else str(param.metavar or param.name)


def key_of(flag: str) -> str:
    """Return "finetune.grad_clip" for "--finetune.grad-clip"."""
    return flag.removeprefix("--").replace("-", "_")


def parameter_name(key: str) -> str:
    """Return the name of the click parameter of a setting."""
    return "setting_" + key.replace(".", "__")


@functools.cache
def setting_options() -> tuple[Option, ...]:
    """Return one option for each setting of a run; whether it takes several values is for its reader to check."""
    kind: dict[str, Any] = {"several": True, "type": click.UNPROCESSED, "rule": "be given one value"}
    return tuple(Option([f"--{key}", parameter_name(key)], **kind) for key in dotted_keys(RunConfig))


def budget_options(function: Function) -> Function:
    """Add `--quality` and `--max-minutes`, which choose the budget of a run."""
    function = option(
        "--max-minutes",
        metavar="N",
        type=FLOAT,
        help="longest time of the run, by its forecast",
    )(function)
    return option(
        "--quality",
        metavar="NAME",
        type=OneOf(*QUALITIES),
        rule=f"be one of {', '.join(QUALITIES)}",
        help="budget, if no setting gives one: draft, standard, best [standard]",
    )(function)


def moved_options(function: Function) -> Function:
    """Add `--trust`, and an option for each setting that is a path, for files moved since the run."""
    function = option("--trust", is_flag=True, is_common=False, help="run the code that the record names")(function)
    for key in reversed(PATH_SETTINGS):
        help = "new path, if it was moved since the run"
        function = option(f"--{key}", parameter_name(key), metavar="PATH", is_common=False, help=help)(function)
    return function


def moved_paths(moved: Mapping[str, Any]) -> dict[str, str]:
    """Return the values given to the options of `moved_options`, by dotted key."""
    return {key: path for key in PATH_SETTINGS if (path := moved[parameter_name(key)]) is not None}
