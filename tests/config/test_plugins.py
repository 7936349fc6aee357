"""What users add: names, versions and files in the settings, the same for all kinds; the help that lists them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import synq
from support.added import install, nothing_added
from synq.config import plugins
from synq.config.identity import config_digest, make_absolute
from synq.config.run import RunConfig, with_overrides

DECORATORS: dict[str, Any] = {
    "synq.loss_term": synq.loss_term,
    "synq.synthesis_method": synq.synthesis_method,
    "synq.teacher_source": synq.teacher_source,
    "synq.dataset_source": synq.dataset_source,
    "synq.sampler": synq.sampler,
}
OF_RUNS = tuple(kind for kind in plugins.KINDS if "." in kind.setting)
all_kinds = pytest.mark.parametrize("kind", plugins.KINDS, ids=lambda kind: kind.setting)


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_added(monkeypatch):
        yield


def settings(kind: plugins.Kind, value: str) -> RunConfig:
    more = {"finetune.own_weight": 1.0} if kind is plugins.LOSS_TERM else {}
    return with_overrides(RunConfig(), {kind.setting: value, **more})


@all_kinds
def test_a_decorator_registers_a_name_with_a_version(kind: plugins.Kind) -> None:
    decorate = DECORATORS[kind.decorator]
    text = ":one/two" if kind.has_text else ""

    def function(inputs: Any) -> Any:
        return inputs

    assert decorate("mine", version="7")(function) is function
    assert plugins.known(kind) == ["mine"] and plugins.registered(kind, "mine") is function
    assert plugins.versioned(kind, f"mine{text}") == f"mine@7{text}" == plugins.versioned(kind, f"mine@7{text}")
    assert plugins.unversioned(kind, f"mine@7{text}") == f"mine{text}"
    others = [other for other in plugins.KINDS if other is not kind]
    assert not any(plugins.known(other) for other in others)
    for name, version, reason in (("a-b", "1", "`name` must be letters"), ("mine", "1@2", "`version` must be a text")):
        with pytest.raises(ValueError, match=reason):
            decorate(name, version=version)
    for name in kind.built_in[:1]:
        with pytest.raises(ValueError, match="`name` must not be one of SynQ's"):
            decorate(name, version="1")
        assert plugins.versioned(kind, name) == name and not plugins.is_added(kind, name)


@pytest.mark.parametrize("kind", OF_RUNS, ids=lambda kind: kind.setting)
def test_the_version_is_part_of_the_digest_and_is_checked(kind: plugins.Kind) -> None:
    decorate = DECORATORS[kind.decorator]
    text = ":one/two.pth" if kind.has_text else ""
    digests = []
    for version in ("1", "2"):
        decorate("mine", version=version)(lambda inputs: inputs)
        config = make_absolute(settings(kind, f"mine{text}"))
        assert make_absolute(config) == config
        assert list(plugins.settings_in(config)) == [(kind, f"mine@{version}{text}")]
        digests.append(config_digest(config))
    assert digests[0] != digests[1]
    plugins.check_version(kind, f"mine@2{text}")
    with pytest.raises(
        ValueError, match=f"`{kind.setting}` must have the version of its settings, 1, but mine has ver"
    ):
        plugins.check_version(kind, f"mine@1{text}")
    with pytest.raises(ValueError, match=f"{kind.group}, which the processes of the trials can load, but got 'mine'"):
        plugins.check_elsewhere(kind, f"mine@2{text}")


@all_kinds
def test_an_entry_point_has_the_version_of_its_package(
    kind: plugins.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "one", monkeypatch, kind.group, "made", "raise AssertionError('imported too early')\n")
    text = ":one" if kind.has_text else ""
    assert plugins.installed(kind) == {"acme": "2.5"} and plugins.versioned(kind, f"acme{text}") == f"acme@2.5{text}"
    plugins.check_version(kind, f"acme@2.5{text}")
    plugins.check_elsewhere(kind, f"acme@2.5{text}")
    with pytest.raises(AssertionError, match="imported too early"):  # only where a setting names it
        plugins.registered(kind, "acme")


@all_kinds
def test_a_file_is_known_by_its_content_and_its_name(kind: plugins.Kind, tmp_path: Path) -> None:
    file = tmp_path / "me@home" / "mine.py"
    file.parent.mkdir()
    file.write_text("def f(inputs): pass\n")
    value = f"{file}:f"
    if kind is plugins.TEACHER_SOURCE:  # FILE.py:FACTORY, whose weights have a digest in every record
        assert not plugins.is_added(kind, value) and plugins.versioned(kind, value) == value
        return
    first = plugins.versioned(kind, value)
    assert plugins.parsed(kind, first)[::2] == (value, None) and len(plugins.parsed(kind, first).version) == 8
    file.write_text("def f(inputs): return 1\n")
    assert plugins.versioned(kind, value) != first and plugins.versioned(kind, first) == first
    plugins.check_elsewhere(kind, first)
    with pytest.raises(FileNotFoundError, match="must name an existing Python file"):
        plugins.versioned(kind, f"{tmp_path}/none.py:f")


@pytest.mark.parametrize("kind", OF_RUNS, ids=lambda kind: kind.setting)
def test_a_run_in_a_moved_folder_has_the_same_digest(kind: plugins.Kind, tmp_path: Path) -> None:
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "mine.py").write_text("def f(inputs): pass\n")
        digests.add(config_digest(make_absolute(settings(kind, f"{folder}/mine.py:f"))))
    assert len(digests) == 1


@pytest.mark.parametrize("kind", OF_RUNS, ids=lambda kind: kind.setting)
def test_an_unknown_name_is_one_line_with_the_nearest(
    kind: plugins.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from synq.train import main

    install(tmp_path / "one", monkeypatch, kind.group, "made", "")
    given = [
        f"--{kind.setting}",
        "acmee:x" if kind.has_text else "acmee",
        "--runtime.output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*given, *(["--finetune.own_weight", "1"] if kind is plugins.LOSS_TERM else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"`{kind.setting}` must" in line and "acme" in line.partition("did you mean")[2], line
    assert not (tmp_path / "out").exists()


def test_the_help_lists_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from synq.cli import GROUP

    def shown(*args: str) -> str:
        assert GROUP.run(args) == 0
        return str(capsys.readouterr().out)

    before = shown("train", "--help")
    assert "from installed packages" not in before
    for number, kind in enumerate(plugins.KINDS):
        install(tmp_path / str(number), monkeypatch, kind.group, "made", "raise AssertionError\n")
    for command in ("train", "sweep", "synthesize"):
        for flag in ("--help", "--help-all"):
            text = shown(command, flag)
            lines = text[text.index("from installed packages:") :].splitlines()[1:6]
            assert [line.split(":")[0].strip() for line in lines] == [kind.setting for kind in plugins.KINDS]
            assert all("acme" in line and "(2.5)" in line for line in lines)
    assert "  evaluation.dataset: acme:... (2.5)" in shown("train", "--help=evaluation")
    assert "acme" not in shown("train", "--help=quant")


@pytest.mark.parametrize("by", ["mapping", "object"])
def test_a_term_without_a_weight_is_an_error(by: str, tmp_path: Path, capsys: Any) -> None:
    from synq.api.settings import settings_of
    from synq.sweeps.spec_file import spec_from_dict
    from synq.train import main

    file = tmp_path / "mine.py"
    file.write_text("def f(inputs): pass\n")
    term = {"finetune.own_term": f"{file}:f"}
    reason = r"`finetune\.own_weight` must be given with `finetune\.own_term`, .* give a weight, such as 1"
    with pytest.raises(ValueError, match=reason):
        settings_of(term if by == "mapping" else with_overrides(RunConfig(), term), {})
    assert settings_of({**term, "finetune.own_weight": 0.0}, {}).finetune.own_weight == 0.0
    with pytest.raises(ValueError, match=reason):
        spec_from_dict({"base": term, "space": {"finetune.lr": {"type": "choice", "values": [0.1]}}})
    space = {"finetune.own_weight": {"type": "choice", "values": [0.0, 1.0]}}
    assert spec_from_dict({"base": term, "space": space}).groups[0].base.finetune.own_weight == 0.0
    assert main(["--finetune.own_term", f"{file}:f", "--runtime.output_dir", str(tmp_path / "out")]) == 2
    assert "give a weight, such as 1" in capsys.readouterr().err
    settings_file = tmp_path / "run.toml"
    settings_file.write_text(f'[finetune]\nown_term = "{file}:f"\n')
    assert main([str(settings_file), "--runtime.output_dir", str(tmp_path / "out")]) == 2
    assert "give a weight, such as 1" in capsys.readouterr().err and not (tmp_path / "out").exists()
