"""Parsing of command lines, help texts and error reports."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from synq import cli
from synq.common.exit_codes import exit_code
from synq.config.command_help import GROUPS, field_docs, short_help
from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, OneOf, argument, option
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig, make_absolute, with_overrides

MAX_CPU_SECONDS = 0.4
HELP_LINES = 40


@click.command("anything", cls=Command, settings="run")
@option("--config", "config_files", metavar="FILE", multiple=True, rule="name one file")
@option("--max-bytes", type=FLOAT)
@option("--seeds", several=True, type=INT)
@option("--activations", is_flag=True)
def with_settings(**_: object) -> None:
    """Take the settings of a run."""


@click.command("plain", cls=Command)
@argument("path", metavar="PATH", help="a path")
@option("--max-bytes", type=FLOAT)
@option("--format", "kind", type=OneOf("csv", "markdown"))
@option("--only", several=True)
@option("--where", multiple=True)
@option("--activations", is_flag=True)
def without_settings(**_: object) -> None:
    """Take none."""


def rejected(command: Command, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert command.run(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("synq: error: ")


def get(name: str) -> Command:
    command = cli.GROUP.get_command(click.Context(cli.GROUP), name)
    assert command is not None
    return command


def test_options_and_settings_may_be_in_any_order(tmp_path: Path) -> None:
    args = ["timm:resnet18", "--seed", "3", "--activations", "--quant.layer_weight_bits", "fc=8", "--max-bytes=5"]
    found = with_settings.read([*args, "--seeds", "0", "1", "--finetune.grad-clip", "none"])
    assert (found["activations"], found["max_bytes"], found["seeds"]) == (True, 5.0, (0, 1))
    overrides = {"teacher.spec": "timm:resnet18", "seed": 3, "quant.layer_weight_bits": {"fc": 8}}
    expected = with_overrides(RunConfig(), {**overrides, "finetune.grad_clip": None})
    assert found["config"] == make_absolute(expected)
    file = tmp_path / "run.toml"
    file.write_text("seed = 7\n")
    for start in ([str(file)], ["--config", str(file)], [f"--config={file}"]):
        assert with_settings.read([*start, "--activations"])["config"].seed == 7
    assert with_settings.read(["--seeds", "0", "1", "--seeds", "2"])["seeds"] == (2,), "the last list counts"
    found = without_settings.read(["--only", "a", "b", "--where", "x", "--max_bytes", "-1", "--where", "y", "--", "-z"])
    assert (found["only"], found["where"], found["max_bytes"], found["path"]) == (("a", "b"), ("x", "y"), -1.0, "-z")


def test_the_error_of_an_unknown_option_suggests_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(with_settings, ["--max_byte=3"], capsys)
    assert line == (
        "`--max_byte` must be an option of this command or a setting of a run, but is neither; did you mean "
        "`--max-bytes`?"
    )
    for arg, hint in (("--finetune.lrr=3", "`finetune.lr`"), ("--lr", "`synthesis.lr` or `finetune.lr`")):
        assert rejected(with_settings, [arg, "1"], capsys).endswith(f"but got an unknown one; did you mean {hint}?")
    line = rejected(without_settings, ["--activation"], capsys)
    assert line == "`--activation` must be an option of this command, but is not; did you mean `--activations`?"
    line = rejected(without_settings, ["--zzz", "3"], capsys)
    assert line == "`--zzz` must be an option of this command, but is not; see --help"
    assert rejected(without_settings, ["-x"], capsys).startswith("`-x` must be an option of this command")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "`PATH` must be given, but is not; see --help"),
        (
            ["a", "b c"],
            "`PATH` must be one, but got 2: a 'b c'; choose one, or call the command for each: "
            "`for PATH in a 'b c'; do synq plain \"$PATH\"; done`",
        ),
        (["a", "--max-bytes", "x"], "`max-bytes` must be a number, but got 'x'"),
        (["a", "--max-bytes", "--activations"], "`max-bytes` must be given one value, but got none"),
        (["a", "--format", "csw"], "`format` must be one of csv, markdown, but got 'csw'; did you mean `csv`?"),
        (["a", "--activations=yes"], "`activations` must be given without a value, but got 'yes'"),
        (["--help=quant"], "`help` must be given without a group for this command, but got 'quant'; see --help-all"),
    ],
)
def test_invalid_values_are_one_line_errors(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rejected(without_settings, args, capsys) == message


def test_a_teacher_after_the_options_is_rejected_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(with_settings, ["--activations", "timm:resnet18"], capsys)
    assert line == "each setting must read --KEY VALUE, and TEACHER must come first, but got timm:resnet18; see --help"


def test_only_the_first_argument_may_omit_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    line = rejected(with_settings, ["timm:resnet18", "run.toml", "--activations"], capsys)
    assert line.startswith(
        "only the first argument may come without its option, but got 'run.toml' after 'timm:resnet18'"
    )


def test_only_the_main_process_reports_errors_and_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert with_settings.run(["--nosuch", "1"]) == 2 and with_settings.run(["--help"]) == 0
    assert capsys.readouterr() == ("", "")


def test_bugs_and_interrupts_have_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "synq: interrupted\n"
    assert exit_code(lambda: fail(KeyboardInterrupt()), resumes=True) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: fail(RuntimeError("bug"))) == 70
    assert "RuntimeError: bug; please report it" in capsys.readouterr().err
    assert exit_code(lambda: fail(RecursionError("of a run")), failures=lambda: (RecursionError,)) == 1
    assert capsys.readouterr().err == "synq: error: of a run\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_short_help_fits_on_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: synq {name} ") and "examples:" in lines and len(lines) < HELP_LINES
    assert lines[-1].startswith("exit codes: 0 ") and lines[-1].endswith(", 130 interrupted")
    assert max(map(len, lines)) <= 125
    assert len(short_help(get(name), f"synq {name}", RunConfig(), 80).splitlines()) < HELP_LINES, "in 80 columns"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_complete_help_has_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = get(name)
    assert cli.run([name, "--help-all"]) == 0
    text = capsys.readouterr().out
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    expected = {
        param.opts[0] for param in command.get_params(click.Context(command)) if isinstance(param, click.Option)
    }
    assert expected == listed and all(param.help for param in command.own_options)
    assert all(param.metavar in text for param in command.own_arguments)


def test_the_help_of_a_group_has_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    keys = dotted_keys(RunConfig)
    assert {key.rpartition(".")[0] for key in keys} == {"", *GROUPS}
    for group in GROUPS:
        assert cli.run(["train", f"--help={group}"]) == 0
        text = capsys.readouterr().out
        listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert listed == [f"--{key}" for key in keys if key.startswith(f"{group}.")]
    assert cli.run(["train", "--help=quantt"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"synq: error: `help` must be one of {', '.join(GROUPS)}, but got 'quantt'; did you mean `quant`?\n"
    )


def test_every_setting_has_a_docstring() -> None:
    docs = field_docs(RunConfig)
    assert not [key for key in dotted_keys(RunConfig) if not docs[key]]
    assert docs["finetune.lr"] == "Peak learning rate." and docs["quant"]


def test_rows_in_the_help_are_those_of_the_library() -> None:
    from synq.sweeps.studies import ablation, recipes

    for name, rows in (("ablate", ablation.ROWS), ("recipe", recipes.ROWS)):
        (text,) = (param.help or "" for param in get(name).own_options if param.opts == ["--rows"])
        assert all(row in text for row in rows)


def cpu_seconds(args: list[str]) -> float:
    """Return the processor time of `python -m synq.cli` with these arguments."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'synq.cli', *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["train", "--help-all"]], ids=" ".join)
def test_the_help_takes_little_processor_time(args: list[str]) -> None:
    best = min(cpu_seconds(args) for _ in range(5))  # other load can only increase it
    assert best < MAX_CPU_SECONDS, f"{best:.2f} s"


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_the_help_imports_nothing_large(name: str) -> None:
    code = (
        "import sys\nfrom synq.cli import run\n"
        f"assert run({[*([name] if name else []), '--help']!r}) == 0\n"
        "large = {'torch', 'ray', 'optuna', 'pandas', 'numpy', 'rich', 'tqdm', 'sweeps', 'launch'}\n"
        "print(sorted(large & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr.strip() == "[]"


def test_packages_that_do_not_fit_together_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A package installed later may downgrade NumPy below what pandas needs: W&B's `sweeps` 0.3.0 asks for numpy <
    2.
    """

    def work() -> None:
        try:
            raise ImportError("Please upgrade numpy to >= 2.0.2")
        except ImportError as error:
            raise ImportError("C extension not built") from error

    assert exit_code(work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Please upgrade numpy to >= 2.0.2; `python -m pip check`" in line and "C extension" not in line


def test_a_module_of_ours_that_is_missing_is_no_fault_of_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ModuleNotFoundError("No module named 'synq.absent'", name="synq.absent")

    assert exit_code(work) == 70
    assert "No module named 'synq.absent'; please report it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sweep", ""], "`spec` must name"),
        (["smoke-run", "run.toml", "--all"], "but got --config run.toml"),
        (["smoke-run", "--all", "--seed", "1"], "but got --seed"),
        (["smoke-run", "--only", "x"], "but got 'x'"),
        (["train", "-s", "3"], "must read --KEY VALUE, but got -s"),
        (["export", "RUN", "--formats"], "must be given at least one value"),
        (["ablate", "a", "b"], "see --help"),
        (["--help=quant"], "synq train --help=quant"),
    ],
)
def test_arguments_that_mean_nothing_are_one_line(
    args: list[str], message: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.toml").write_text("[finetune]\nlr = 0.5\n")
    assert cli.run(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_two_help_flags_are_one_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "-h", "--help"]) == 0
    assert "usage: synq train" in capsys.readouterr().out
