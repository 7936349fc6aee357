"""Commands, options, settings, specs and Python in README and docs/ are ones that the code knows; nothing is run."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.source_tree import ROOT
from synq.cli import GROUP
from synq.config.command_line import Command
from synq.config.command_options import setting_options
from synq.config.parsing import config_from_dict, dotted_keys, with_overrides
from synq.config.run import RunConfig
from synq.sweeps.spec_file import SpecFile, parse_spec

HISTORY = (
    "docs/results/LOG.md",
    "docs/results/RESULTS.md",
    "docs/results/BENCHMARKS.md",
    "docs/results/ARCHITECTURES.md",
)
"""Results keep the names and options of their day."""
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if str(path.relative_to(ROOT)) not in HISTORY
]
OTHERS = {
    *("--config_file", "--num_processes", "--cpu", "--working-dir", "--runtime-env-json"),  # accelerate, ray
    *("--requeue", "--ip-address", "--env", "--num-nodes", "--use-spot"),  # Slurm, hostname, SkyPilot
    *("--torch-backend", "--quick"),  # uv, .ci/gpu
    *("--head", "--check", "--strict", "--dist", "--help-all", "--help", "--flag"),
}
"""Options in prose that belong to other programs, or to every command."""


def blocks(path: Path, language: str) -> Iterator[str]:
    """Yield the code blocks of a language, without the indentation of the block."""
    pattern = rf"^([ ]*)```{language}\n(.*?)^\1```$"
    for indent, text in re.findall(pattern, path.read_text(encoding="utf-8"), re.M | re.S):
        yield re.sub(rf"^{indent}", "", text, flags=re.M)


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (command of synq, arguments) of every line of a shell block that calls it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for part in _split(words, {"&&", "|", ";", "||"}):
            while part and ("=" in part[0] or part[0] in ("python", "timeout", "time")):
                part = part[1:]
            if part[:3] == ["ray", "job", "submit"]:
                part = part[part.index("--") + 1 :] if "--" in part else part[-1:]
                part = part[1:] if part[:1] == ["python"] else part
            if not part:
                continue
            if part[0] == "synq" and len(part) > 1 and not part[1].startswith("-"):
                yield part[1], part[2:]
            elif part[0] == "launch/sweep.py":
                yield "sweep", part[1:]
            elif "synq/train.py" in part:
                yield "train", part[part.index("synq/train.py") + 1 :]


def _split(words: list[str], signs: set[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in signs:
            yield part
            part = []
        else:
            part.append(word)


SHELL = [(path, *call) for path in PAGES for text in blocks(path, "bash") for call in commands_in(text)]


def read(name: str, args: list[str]) -> None:
    """Parse the arguments of a command as it does itself; a placeholder for a file need not exist."""
    command = GROUP.get_command(None, name)  # type: ignore[arg-type]
    assert isinstance(command, Command), f"`synq {name}` does not exist"
    if any(arg.startswith("--help") for arg in args):
        return
    try:
        command.read(args)
    except FileNotFoundError as error:
        missing = str(error.filename or error).replace(f"{ROOT}/", "")
        assert not re.search(r"\b(sweeps|launch|docs)/", missing), f"{missing} does not exist"


@pytest.mark.parametrize(("path", "name", "args"), SHELL, ids=lambda part: str(getattr(part, "stem", part))[:60])
def test_a_command_in_a_document_is_known(
    path: Path, name: str, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SYNQ_DATA_DIR", "/data")
    read(name, args)
    for arg in args:
        if re.match(r"(sweeps|launch|docs|synq)/", arg):
            assert (ROOT / arg).exists(), f"{arg} does not exist"


def examples_of_help(name: str) -> list[tuple[str, list[str]]]:
    """Return the commands among the examples of a command's help, without the remarks two spaces behind them."""
    command = GROUP.get_command(None, name)  # type: ignore[arg-type]
    assert isinstance(command, Command)
    text = command.examples.replace("%(prog)s", f"synq {name}").replace("\\\n", " ")
    lines = [re.sub(r"(?<=\S)\s{2,}.*", "", line.strip()) for line in text.splitlines()]
    return [call for line in lines if line for call in commands_in(line)]


@pytest.mark.parametrize("name", GROUP.modules)
def test_the_examples_of_a_help_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calls = examples_of_help(name)
    assert any(called == name for called, _ in calls)
    for called, args in calls:
        read(called, args)


def test_every_page_with_commands_is_seen() -> None:
    assert len(SHELL) > 60 and len({path for path, *_ in SHELL}) > 15
    names = {name for _, name, _ in SHELL}
    assert set(GROUP.modules) - names == set(), "each command is shown once at least"


@pytest.mark.parametrize(
    "line", ["synq trian", "synq train --finetune.lrr 1", "synq sweep --jobs 2", "python launch/sweep.py a b c"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    ((name, args),) = commands_in(line)
    with pytest.raises((ValueError, AssertionError)):
        read(name, args)


def test_options_and_settings_in_prose_are_known() -> None:
    known = {flag.replace("_", "-") for flag in OTHERS}
    for name in GROUP.modules:
        command = GROUP.get_command(None, name)  # type: ignore[arg-type]
        assert isinstance(command, Command)
        known |= {flag.replace("_", "-") for option in command.own_options for flag in option.opts}
    known |= {flag.replace("_", "-") for option in setting_options() for flag in option.opts}
    keys = {*dotted_keys(RunConfig), *(field for field in RunConfig.__dataclass_fields__)}
    groups = "teacher|synthesis|quant|reconstruction|finetune|evaluation|runtime"
    wrong = []
    for path in PAGES:
        text = re.sub(r"^[ ]*```.*?^[ ]*```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)
            wrong += [f"{path.name}: {flag}" for flag in flags if flag.replace("_", "-") not in known]
            named = re.findall(rf"(?<![\w./])(?:{groups})\.[a-z_]+", code) if "(" not in code else []
            wrong += [f"{path.name}: {key}" for key in named if key not in keys]
    assert not wrong


TOML = [(path, text) for path in PAGES for text in blocks(path, "toml")]


@pytest.mark.parametrize(("path", "text"), TOML, ids=lambda part: getattr(part, "stem", "block"))
def test_a_toml_block_is_a_spec_or_settings(path: Path, text: str) -> None:
    content = tomllib.loads(text)
    if content.keys() <= RunConfig.__dataclass_fields__.keys():
        config_from_dict(RunConfig, content)
        return
    parsed: SpecFile = parse_spec(content)
    base = {f"{part}.{key}": value for part, table in parsed.base.items() for key, value in table.items()}
    with_overrides(RunConfig(), {"quant.target": (parsed.targets or ("research",))[0], **base})


PYTHON = [(path, text) for path in PAGES for text in blocks(path, "python")]


@pytest.mark.parametrize(("path", "text"), PYTHON, ids=lambda part: getattr(part, "stem", "block"))
def test_a_python_block_is_python(path: Path, text: str) -> None:
    ast.parse(text, filename=path.name)
