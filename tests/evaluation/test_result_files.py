"""The files of the result tables: complete ones are taken, damaged and foreign ones rejected in one line."""

import dataclasses
import hashlib
import importlib.util
import io
import pickle
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.source_tree import ROOT

PAGE = (ROOT / "docs" / "how-to" / "cifar-table.md").read_text(encoding="utf-8")


def _loaded(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return _loaded("result_files")


@pytest.fixture
def given(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as they would be published, of made weights and images that the tool takes for those of the tables."""
    folder = tmp_path / "given"
    folder.mkdir()
    torch.manual_seed(0)
    net = _loaded("cifar_teachers").cifar10_resnet20().eval()
    for name, tensor in net.state_dict().items():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
    state = {name: tensor for name, tensor in net.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "net.th")
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        answers = net((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1).numpy()
    answers[::3] = (answers[::3] + 1) % 10
    flat = images.transpose(0, 3, 1, 2).reshape(30, -1)
    content = pickle.dumps({"data": flat, "labels": answers.tolist()})
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("batches/test_batch")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    kept = np.arange(30)[::-1][:12]
    starts = [hashlib.sha256(images[row].tobytes()).digest()[:4] for row in kept]
    np.savez(tmp_path / "selection.npz", cifar10=np.frombuffer(b"".join(starts), dtype=np.uint8).reshape(-1, 4))
    made = dataclasses.replace(
        tool.NETWORKS[0],
        weights=tool.tensor_digest(state),
        pixels=tool.array_digest(images[kept], answers[kept]),
        top1=100 * 8 / 12,
        published_weights=("net.th", hashlib.sha256((folder / "net.th").read_bytes()).hexdigest()),
        published_images=(
            ("images.tar.gz", hashlib.md5((folder / "images.tar.gz").read_bytes()).hexdigest()),
            ("test_batch", hashlib.md5(content).hexdigest()),
        ),
    )
    (folder / "test_batch").write_bytes(content)
    monkeypatch.setattr(tool, "NETWORKS", (made,))
    monkeypatch.setattr(tool, "SELECTION", tmp_path / "selection.npz")
    return folder


def _run(tool: ModuleType, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = tool.command.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("images", ["images.tar.gz", "test_batch"])
def test_published_files_become_those_of_the_recipes(
    tool: ModuleType, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: str
) -> None:
    folder = tmp_path / "data"
    code, out, _ = _run(tool, capsys, folder)
    assert code == 1 and len(re.findall(r"  no  ", out)) == 2, "missing files are named, nothing is rejected"
    code, out, err = _run(tool, capsys, folder, "--from", given / "net.th", given / images)
    assert (code, err) == (0, "")
    assert "10 classes, 12 images of 3 x 32 x 32, top-1 66.67" in out
    made = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert made == {"teachers.py", *tool.NETWORKS[0].files}
    again = tmp_path / "again"  # the files of one folder are those of another, under any name
    given_again = [path.rename(path.with_name(f"my{path.suffix}")) for path in folder.glob("cifar*")]
    assert _run(tool, capsys, again, "--from", *given_again)[0] == 0


@pytest.mark.parametrize("name", ["net.th", "images.tar.gz", "cifar10_resnet20.safetensors", "cifar10_test_a.npz"])
def test_a_damaged_file_is_rejected_with_both_digests(
    tool: ModuleType, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = given / name
    if path.suffix == ".safetensors":
        save_file({"conv1.weight": torch.ones(16, 3, 3, 3)}, path)
    elif path.suffix == ".npz":
        np.savez(path, x=np.zeros((12, 32, 32, 3), np.uint8), y=np.zeros(12, np.int64))
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    code, _, err = _run(tool, capsys, tmp_path / "data", "--from", path)
    assert code == 2 and err.count("\n") == 1 and str(path) in err
    network = tool.NETWORKS[0]
    expected = {*network.published_weights, *network.published_images[0], network.weights, network.pixels}
    digests = re.findall(r"\b[0-9a-f]{32,64}\b", err)
    assert len(set(digests)) == 2 and digests[0] in expected and digests[1] not in expected
    assert not list((tmp_path / "data").glob("cifar*"))


def test_a_foreign_file_and_a_wrong_one_in_the_folder_are_rejected(
    tool: ModuleType, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("no weights")
    code, _, err = _run(tool, capsys, tmp_path / "data", "--from", foreign)
    assert code == 2 and "notes.txt" in err and hashlib.sha256(b"no weights").hexdigest() in err
    np.savez(tmp_path / "data" / "cifar10_test_a.npz", x=np.zeros((2, 32, 32, 3), np.uint8), y=np.zeros(2, np.int64))
    code, _, err = _run(tool, capsys, tmp_path / "data")
    assert code == 2 and "cifar10_test_a.npz" in err and tool.NETWORKS[0].pixels in err


def test_a_network_of_another_top1_is_rejected(
    tool: ModuleType, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "NETWORKS", (dataclasses.replace(tool.NETWORKS[0], top1=75.0),))
    code, _, err = _run(tool, capsys, tmp_path / "data", "--from", given / "net.th", given / "test_batch")
    assert code == 2 and "must reach a top-1 of 75.0" in err and "66.67" in err


def test_the_page_has_every_file_with_its_digest(tool: ModuleType) -> None:
    for network in tool.NETWORKS:
        for name, digest in (network.published_weights, *network.published_images):
            assert re.search(rf"`{re.escape(name)}`[^\n]*`{digest}`", PAGE), name
        assert all(f"`{name}`" in PAGE for name in network.files) and len(tool.recipes(network)) == 8


@pytest.mark.real
def test_the_real_files_are_right(tool: ModuleType, data_dir: Path, tmp_path: Path) -> None:
    files = [data_dir / name for network in tool.NETWORKS for name in network.files]
    assert tool.command.run([str(tmp_path / "data"), "--from", *map(str, files)]) == 0
