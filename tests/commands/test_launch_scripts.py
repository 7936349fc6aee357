"""Scripts of launch/: each takes the arguments that its help names."""

import importlib.util
import sys
from pathlib import Path

import click
import pytest

from synq.config.command_line import Command

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [path for path in sorted(LAUNCH.glob("*.py")) if "cls=Command" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_argument_of_a_script_is_accepted_and_in_its_usage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(LAUNCH), *sys.path])
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    command = module.command
    assert isinstance(command, Command)
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    assert command.own_arguments == arguments, "made by `argument`, which the parser of the options knows"
    assert all(str(param.metavar) in command.usage_line for param in arguments)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 5
