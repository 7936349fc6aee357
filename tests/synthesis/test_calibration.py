"""Synthetic images for the calibrators of other quantizers."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synq import cli
from synq.commands import synthesize
from synq.config.run import TeacherConfig
from synq.export.targets.formats import PRECISE_SUMS
from synq.export.verify import open_session, sums_saturate
from synq.synthesis.calibration import TOOLS, write_calibration
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.teacher import load_teacher

ARGS = [
    "--finetune.batch_size",
    "8",
    "--synthesis.num_images",
    "8",
    "--synthesis.iterations",
    "1",
    "--evaluation.heldout_images",
    "8",
]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tool", TOOLS)
def test_images_and_script_of_each_quantizer(tool: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["synthesize", *ARGS, "--runtime.output_dir", "out", "--for", tool]) == 0
    assert f"calibration-{tool}/calibrate.py | 8 images" in capsys.readouterr().out
    images = np.load(in_folder / f"calibration-{tool}" / "images.npy")
    assert images.dtype == np.float32
    assert images.shape == ((8, 16, 16, 1) if tool == "litert" else (8, 1, 16, 16))
    script = (in_folder / f"calibration-{tool}" / "calibrate.py").read_text()
    assert "$" not in script and "8 synthetic images of digits_resnet8" in str(ast.get_docstring(ast.parse(script)))


def test_the_command_knows_the_tools_without_loading_them() -> None:
    assert synthesize.TOOLS == TOOLS


@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
def test_onnxruntime_quantizes_with_them(in_folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert cli.run(["synthesize", *ARGS, "--runtime.output_dir", "out", "--for", "onnxruntime", "--folder", "c"]) == 0
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)
    ).eval()
    torch.onnx.export(net, (torch.zeros(1, 1, 16, 16),), "float.onnx", dynamo=False)
    done = subprocess.run(
        [sys.executable, "c/calibrate.py", "float.onnx", "int8.onnx"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    import onnx

    kinds = {node.op_type for node in onnx.load("int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds and "BatchNormalization" not in kinds
    images = np.load("c/images.npy")
    session = open_session(Path("int8.onnx").read_bytes(), entries=PRECISE_SUMS if sums_saturate() else {})
    found = np.concatenate([session.run(None, {session.get_inputs()[0].name: images[i : i + 1]})[0] for i in range(8)])
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "tensorrt"], "`for` must be one of onnxruntime, nncf, litert, modelopt, aimet, mct"),
        (["--folder", "c"], "`folder` must come with `for`"),
        (["--for", "nncf", "--folder", "file"], "`folder` must be a folder, but file is a file"),
    ],
)
def test_bad_options(options: list[str], message: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "file").write_text("")
    assert cli.run(["synthesize", *ARGS, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (in_folder / "runs").exists()


def test_unknown_tools_are_rejected(tmp_path: Path) -> None:
    empty = SyntheticSet(
        path=tmp_path, images=torch.zeros(1, 1, 16, 16), labels=torch.zeros(1).long(), manifest={}, digest=""
    )
    with pytest.raises(ValueError, match="`for` must be one of"):
        write_calibration(tmp_path, "tensorrt", empty, load_teacher(TeacherConfig()))
