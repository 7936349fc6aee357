"""Code that files name: known by a mark that only its user can make, over everything that it imports."""

from pathlib import Path

import pytest

from synq.teacher.trust import check_trusted, code_mark, runs_code, trusting


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A file that imports another one and a package of its folder."""
    (tmp_path / "net.py").write_text("import blocks, torch\nfrom heads import make\n")
    (tmp_path / "blocks.py").write_text("WIDTH = 1\n")
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "__init__.py").write_text("from .inner import make\n")
    (tmp_path / "heads" / "inner.py").write_text("def make(): pass\n")
    (tmp_path / "other.py").write_text("X = 1\n")
    return tmp_path / "net.py"


def test_models_of_libraries_run_no_code() -> None:
    for spec in ("bundled:digits_resnet8", "torchvision:resnet18", "timm:resnet18", "pytorchcv:x", "memory:Net"):
        assert not runs_code(spec) and code_mark(spec) == ""
        check_trusted(spec, None, "record.json")
    assert runs_code("net.py:make") and runs_code("my.module:make")


@pytest.mark.parametrize("name", ["net.py", "blocks.py", "heads/inner.py"])
def test_the_mark_is_of_all_files_that_are_imported(name: str, code: Path) -> None:
    spec = f"{code}:make"
    mark = code_mark(spec)
    assert len(mark) == 64 == len(code_mark(spec)) and mark == code_mark(spec)
    check_trusted(spec, mark, "record.json")
    (code.parent / "other.py").write_text("X = 2\n")
    check_trusted(spec, mark, "record.json")
    with (code.parent / name).open("a") as file:
        file.write("open('ran', 'w')\n")
    with pytest.raises(ValueError, match=r"`record.json` names code, .*net.py:make, which is not run.*--trust"):
        check_trusted(spec, mark, "record.json")


def test_another_user_cannot_make_the_mark(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"{code}:make"
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))
        mark = code_mark(spec)
        check_trusted(spec, mark, "record.json")
    for found in (mark, "", None, 3):
        with pytest.raises(ValueError, match="which is not run"):
            check_trusted(spec, found, "record.json")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", "/dev/null/state")
        assert code_mark(spec) == ""
        with pytest.raises(ValueError, match="which is not run"):
            check_trusted(spec, "", "record.json")


def test_the_key_is_readable_by_its_user_only(tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code_mark(f"{code}:make")
    (key,) = (tmp_path / "state" / "synq").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size == 32


def test_what_is_named_runs_inside_the_block_only(code: Path) -> None:
    spec = f"{code}:make"
    for named in (True, [spec]):
        with trusting(named), trusting(False):
            check_trusted(spec, None, "record.json")
        with pytest.raises(ValueError, match="which is not run"):
            check_trusted(spec, None, "record.json")
    with trusting(["other.py:make"]), pytest.raises(ValueError, match="which is not run"):
        check_trusted(spec, None, "record.json")


def test_a_module_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_nets").mkdir()
    (tmp_path / "acme_nets" / "__init__.py").write_text("open('ran', 'w')\n")
    (tmp_path / "acme_nets" / "small.py").write_text("def make(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(code_mark("acme_nets.small:make")) == 64 and not (tmp_path / "ran").exists()
    assert code_mark("acme_nets.absent:make") == "" == code_mark("absent_package.x:make")
