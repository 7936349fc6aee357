"""What the doors of commands have in common: how words are read, and how what went wrong is said. Loads no torch."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from synq.config.parsing import dotted_keys, nearest
from synq.config.run import RunConfig
from synq.train import USER_ERROR, name_first_word, report_error

UNKNOWN = "unrecognized arguments: "
"""How argparse begins its message about words that it has no use for."""


class Parser(argparse.ArgumentParser):
    """argparse that says in one line what is wrong, and which option was probably meant; options are never shortened."""

    def __init__(self, *, advice: str = "see --help", **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.advice = advice

    @property
    def flags(self) -> list[str]:
        """Every option but the help, as it is written."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        return [flag for flag in flags if flag.startswith("--") and flag != "--help"]

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and one line."""
        unknown, _, _ = message.removeprefix(UNKNOWN).strip().partition(" ")
        hint = nearest(unknown.partition("=")[0], self.flags) if unknown and message.startswith(UNKNOWN) else ""
        rest = hint or ("" if message.endswith("?") else f"; {self.advice}")
        report_error(ValueError(message + rest))
        raise SystemExit(USER_ERROR)

    def parse_beside_settings(self, words: Sequence[str], first: str = "") -> tuple[argparse.Namespace, list[str]]:
        """Read this command's own options; the other words are settings of a run.

        Args:
            words: What follows the command's name.
            first: The option whose value the first word is, if it is none itself; "" for the teacher or the settings file of a run.

        Returns:
            The options, and the words that are left.
        """
        known, own = ["config", *dotted_keys(RunConfig)], {flag[2:].replace("-", "_"): flag for flag in self.flags}
        try:
            words = name_first_word(words, first)
        except ValueError as error:
            self.error(str(error))
        arguments, rest = self.parse_known_args(words)
        if rest and not rest[0].startswith("-"):
            what = first.removeprefix("--").upper() or "TEACHER"
            self.error(f"each setting must read --KEY VALUE, and {what} must come first, but got {rest[0]}")
        for word in rest:
            name = word.partition("=")[0].replace("-", "_").removeprefix("__")
            if not word.startswith("--") or name in known:
                continue
            hint = nearest(name, [*own, *known])
            for option, flag in own.items():  # where a setting was meant, the reader of settings says so
                if f"`{option}`" in hint:
                    hint = hint.replace(f"`{option}`", f"`{flag}`")
                    self.error(
                        f"`--{name}` must be an option of this command or a setting of a run, but is neither{hint}"
                    )
        return arguments, rest


def check_paths(paths: Iterable[str | Path], name: str = "PATH") -> None:
    """Refuse what is not there, before anything is loaded that takes seconds.

    Raises:
        FileNotFoundError: One of them is absent.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"`{name}` must exist, but got {path}")


def exit_code(work: Callable[[], int | None], *, resumes: bool = False) -> int:
    """Do the work of a door and return its exit code; whatever goes wrong is one line on standard error.

    Args:
        work: What to do; a number that it returns is the exit code.
        resumes: Whether the same command, started again, goes on where it was interrupted.

    Returns:
        0 done, 1 a run failed, 2 the input was refused, 130 interrupted.
    """
    try:
        return work() or 0
    except BrokenPipeError:  # who read what was printed, as `head` does, has read enough
        return 0
    except (ValueError, OSError) as error:
        report_error(error)
        return USER_ERROR
    except BrokenProcessPool:
        reason = "a run's process died (too little memory?); the same command goes on, fewer `--jobs` need less"
        report_error(RuntimeError(reason))
        return 1
    except RuntimeError as error:
        from synq.finetune.loop import NonFiniteLossError  # torch, which a refused command line need not wait for

        if not isinstance(error, NonFiniteLossError):
            raise
        report_error(error)
        return 1
    except KeyboardInterrupt:
        print("synq: interrupted" + ("; the same command resumes" if resumes else ""), file=sys.stderr, flush=True)
        return 130
