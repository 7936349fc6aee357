"""What a run refuses: other files of the same name, and, before any work, what cannot work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from synq.config.run import RunConfig, with_overrides
from synq.pipeline import check, prepare, run
from synq.runs.record import run_folder
from synq.runtime import make_accelerator


def test_other_weights_of_the_same_name_are_not_mixed_up(config: RunConfig, tmp_path: Path) -> None:
    factory = tmp_path / "model.py"
    factory.write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(),"
        " nn.Linear(4, 10))\n"
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        namespace: dict[str, Any] = {}
        exec(factory.read_text(), namespace)
        net = namespace["net"]()
        net[1].running_mean += 0.1
        (tmp_path / str(seed)).mkdir()
        safetensors.torch.save_file(net.state_dict(), tmp_path / str(seed) / "w.safetensors")
    teacher = {
        "teacher.spec": f"{factory}:net",
        "teacher.input_size": (1, 16, 16),
        "teacher.mean": (0.5,),
        "teacher.std": (0.5,),
        "evaluation.dataset": "none",
    }
    runs = [
        with_overrides(config, {**teacher, "teacher.weights": str(tmp_path / str(s) / "w.safetensors")}) for s in (0, 1)
    ]
    run(runs[0])
    with pytest.raises(ValueError, match="must not mix teachers"):
        run(runs[1])
    (run_folder(runs[0]) / "record.json").unlink()  # stopped before its end: the checkpoint is another teacher's
    with pytest.raises(ValueError, match="must not mix runs"):
        run(runs[1])


def test_other_labeled_images_of_the_same_name_are_not_mixed_up(config: RunConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "t.npz", x=rng.integers(0, 255, (20, 16, 16), dtype=np.uint8), y=np.arange(20) % 10)
    runs = [with_overrides(config, {"evaluation.dataset": f"npz:{tmp_path}/{name}/t.npz"}) for name in ("a", "b")]
    assert run(runs[0]).eval_digest
    with pytest.raises(ValueError, match="must not mix labeled sets"):
        run(runs[1])


def test_what_cannot_work_is_said_before_any_image_is_made(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)\n"
        "    def forward(self, x):\n"
        "        return self.fc(torch.linalg.svdvals(self.bn(self.conv(x)).flatten(2))[:, :4])\n"
    )
    bad = {
        "teacher.spec": f"{tmp_path}/model.py:Net",
        "teacher.weights": "random",
        "teacher.input_size": (1, 16, 16),
        "teacher.mean": (0.5,),
        "teacher.std": (0.5,),
        "evaluation.dataset": "none",
    }
    for act in (run, check, prepare):
        with pytest.raises(ValueError, match=r"svdvals.*: its tensors would stay float"):
            act(with_overrides(config, bad))
    assert not (tmp_path / "store").exists()


def test_gradient_accumulation_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be 1"):
        make_accelerator(config.runtime)


def test_rejections_come_before_any_work(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no GPU") if not torch.cuda.is_available() else pytest.raises(ValueError):
        run(with_overrides(config, {"runtime.device": "cuda"}))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError):
        run(with_overrides(config, {"runtime.output_dir": str(blocked)}))
    with pytest.raises(FileNotFoundError, match=r"absent.npz"):
        run(with_overrides(config, {"evaluation.dataset": f"npz:{tmp_path}/absent.npz"}))
    assert not list(tmp_path.glob("store/*")), "no image was made"


def test_a_small_disk_is_refused_before_the_images_are_made(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_overrides(config, {"finetune.lowpass_cutoff": 0.6})
    monkeypatch.setattr("synq.synthesis.lowpass.LARGE_SET_BYTES", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        OSError, match=r"runtime\.output_dir must have .* MiB free for the filtered images of 1 processes"
    ):
        run(config)
    assert not list(Path(config.runtime.output_dir).rglob("*.safetensors"))
    run(with_overrides(config, {"finetune.lowpass_cutoff": None}))


def test_a_compiled_run_without_a_compiler_is_refused_before(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function: object) -> object:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("torch.compile", no_compiler)
    with pytest.raises(ValueError, match=r"runtime\.compile must be false here.*no working C\+\+ compiler"):
        check(with_overrides(config, {"runtime.compile": True}))
    check(config)


def test_a_compiled_run_is_refused_before_the_work_where_the_map_is_differentiated(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"teacher.spec": "torchvision:mobilenet_v3_small", "teacher.weights": "random", "runtime.compile": True}
    words |= {"evaluation.dataset": "none", "finetune.cam_weight": 1.0}
    monkeypatch.setattr(
        "torch.compile", lambda function: function
    )  # whether there is a compiler is another test's matter
    with pytest.raises(ValueError, match=r"runtime\.compile must be false for this teacher.*finetune\.cam_weight to 0"):
        check(with_overrides(config, words))
    check(with_overrides(config, {**words, "finetune.cam_weight": 0.0}))
