"""Files of engines that are damaged, of another engine or of another version: one line names each, none is opened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.sealed import edit, flip
from synq.commands.export import main as export
from synq.commands.verify import main as verify
from synq.common.notices import forget_notices
from synq.config.run import RunConfig, with_overrides
from synq.export.targets.formats import FORMATS
from synq.pipeline import run
from synq.runs.record import run_folder

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore")  # of imports of ExecuTorch


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, object]
) -> Path:
    """The export of a run of each target whose engine is installed."""
    if missing := FORMATS[request.param].missing():
        pytest.skip(f"{missing[0]} is not installed")
    given = {"runtime.output_dir": str(tmp_path_factory.mktemp("engine")), "quant.target": request.param}
    config = with_overrides(RunConfig(), {**tiny_settings, **given, "quant.weight_bits": 8, "quant.act_bits": 8})
    run(config)
    assert export([str(run_folder(config)), "--rounds", "0"]) == 0
    return run_folder(config)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _newer(file: Path) -> None:
    """Write the version of another format into the file, at the place where each has its own."""
    content = bytearray(file.read_bytes())
    content[1 if file.suffix == ".onnx" else 4] += 1  # IR version; identifier of a FlatBuffers file
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda file: flip(file, file.stat().st_size // 2),
    "truncated": _cut,
    "empty": lambda file: file.write_bytes(b""),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "text": lambda file: file.write_text("<html>404</html>"),
    "other version": _newer,
    "removed": lambda file: file.unlink(),
}


@pytest.mark.slow
def test_a_damaged_file_is_one_line_with_its_name(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    (file,) = (path for path in (exported / "export").iterdir() if path.name.startswith("model."))
    for name, damage in DAMAGES.items():
        copy = shutil.copytree(exported / "export", tmp_path / name)
        damage(copy / file.name)
        forget_notices()
        capsys.readouterr()
        assert verify([str(copy)]) == 1, name
        found = capsys.readouterr()
        [line] = found.out.splitlines()
        assert line.count(str(copy / file.name)) and "Traceback" not in found.err, name


@pytest.mark.slow
def test_a_file_or_a_card_of_another_engine_is_named(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    names = {form.file for form in FORMATS.values()}
    (file,) = (path for path in (exported / "export").iterdir() if path.name in names)
    other = next(name for name in sorted(names) if name != file.name)
    copy = shutil.copytree(exported / "export", tmp_path / "added")
    shutil.copy(copy / file.name, copy / other)
    assert verify([str(copy)]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert f"`{copy / other}`" in line and "is not on the card" in line
    copy = shutil.copytree(exported / "export", tmp_path / "card")
    edit(copy / "card.json", lambda card: card["config"]["quant"].update(target="research"))
    assert verify([str(copy)]) == 1
    assert any("card.json" in line for line in capsys.readouterr().out.splitlines())
