"""How the doors read their words and say what is wrong."""

from pathlib import Path

import pytest

from synq.commands.arguments import Parser, check_paths, exit_code


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="synq anything")
    parser.add_argument("--max-bytes", type=float)
    parser.add_argument("--activations", action="store_true")
    return parser


def _refused(parser: Parser, words: list[str], capsys: pytest.CaptureFixture[str], *, alone: bool = False) -> str:
    with pytest.raises(SystemExit) as exit_of:
        parser.parse_args(words) if alone else parser.parse_beside_settings(words)
    assert exit_of.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("synq: error: ")


def test_own_options_and_settings_of_a_run_stand_in_any_order(parser: Parser) -> None:
    words = ["timm:resnet18", "--seed", "3", "--activations", "--quant.layer_weight_bits", "fc=8", "--max-bytes=5"]
    arguments, rest = parser.parse_beside_settings([*words, "--config=a.toml"])
    assert (arguments.activations, arguments.max_bytes) == (True, 5.0)
    left = ["--teacher.spec", "timm:resnet18", "--seed", "3", "--quant.layer_weight_bits", "fc=8", "--config=a.toml"]
    assert rest == left
    assert parser.parse_beside_settings(["run.toml", "--activations"])[1] == ["--config", "run.toml"]
    assert parser.parse_beside_settings(["3", "--activations"], "--max-bytes")[0].max_bytes == 3
    assert parser.parse_beside_settings(["--finetune.grad-clip", "1"])[1]


def test_a_mistyped_option_gets_the_nearest_one(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(parser, ["--max-byte", "3"], capsys).endswith("but is neither; did you mean `--max-bytes`?")
    for words in (["--finetune.lrr=3"], ["--lr", "1"], ["--act_bits", "3"], ["--images", "3"], ["--hel", "3"]):
        assert parser.parse_beside_settings(words)[1] == words, "refused with the settings"
    assert _refused(parser, ["--max_byte=3"], capsys).startswith("`--max_byte` must be an option of this command or")
    assert _refused(parser, [""], capsys, alone=True).endswith("; see --help")
    line = _refused(parser, ["--activation"], capsys, alone=True)
    assert line == "unrecognized arguments: --activation; did you mean `--activations`?"
    assert _refused(parser, ["--zzz", "3"], capsys, alone=True) == "unrecognized arguments: --zzz 3; see --help"
    assert _refused(parser, ["--max-bytes", "x"], capsys).endswith("invalid float value: 'x'; see --help")


def test_a_teacher_behind_the_options_is_told_its_place(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(parser, ["--activations", "timm:resnet18"], capsys)
    assert line == "each setting must read --KEY VALUE, and TEACHER must come first, but got timm:resnet18; see --help"


def test_only_the_first_word_stands_alone(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(parser, ["timm:resnet18", "run.toml", "--activations"], capsys)
    assert line.startswith("only the first word may stand without its key, but got 'run.toml' behind 'timm:resnet18'")


def test_paths_that_are_not_there_are_refused(tmp_path: Path) -> None:
    check_paths([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"`RUN` must exist, but got .*nothing"):
        check_paths([tmp_path, tmp_path / "nothing"], "RUN")


def test_a_fault_of_ours_is_not_hidden_and_an_interruption_has_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fault(error: BaseException) -> None:
        raise error

    assert exit_code(lambda: fault(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "synq: interrupted\n"
    assert exit_code(lambda: fault(KeyboardInterrupt()), resumes=True) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert exit_code(lambda: None) == 0
    with pytest.raises(RuntimeError, match="ours"):
        exit_code(lambda: fault(RuntimeError("ours")))
