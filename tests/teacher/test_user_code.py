"""What a user's file changes in the process, how it may give its network, and what a network may be wrapped in."""

import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synq.cli import run
from synq.config.run import SynthesisConfig, TeacherConfig
from synq.synthesis.generate import ensure_set
from synq.synthesis.store import SetStore
from synq.teacher.sources import build_source
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.user_code import made_by_user

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Linear(6, 5)
    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
def net():
    return Net()
"""
FACTS: dict[str, Any] = {"weights": "random", "input_size": (3, 12, 12), "mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.fixture
def user_file(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a file: the network above, and more lines."""

    def write(more: str, before: str = "") -> Path:
        path = tmp_path / "users.py"
        path.write_text(before + NET + more)
        return path

    return write


def load(path: Path, name: str = "net") -> Teacher:
    return load_teacher(TeacherConfig(spec=f"{path}:{name}", **FACTS))


def process_state() -> list[Any]:
    flags = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)
    return [
        *(torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), flags),
        *(torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu"), torch.get_rng_state().tolist()),
        *(random.getstate(), np.random.get_state()[1].tolist(), list(warnings.filters), os.getcwd()),
    ]


CHANGES = {
    "gradients": "torch.set_grad_enabled(False)",
    "no_grad": "torch.no_grad().__enter__()",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('cpu:0')",
    "threads": "torch.set_num_threads(2)",
    "determinism": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "cudnn": "torch.backends.cudnn.benchmark = True; torch.backends.cudnn.deterministic = True",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "seeds": "import random, numpy; torch.manual_seed(9); random.seed(9); numpy.random.seed(9)",
    "warnings": "import warnings; warnings.simplefilter('error')",
    "folder": "import os; os.chdir('/')",
}


@pytest.mark.parametrize("name", CHANGES)
def test_bugs_13_what_a_file_changes_for_the_process_is_put_back(name: str, user_file: Callable[[str], Path]) -> None:
    load(user_file(""))  # imports of libraries add warning filters
    before = process_state()
    teacher = load(user_file(f"{CHANGES[name]}\n"))
    assert process_state() == before
    image = torch.zeros(1, 3, 12, 12, requires_grad=True)
    assert teacher.module(image).requires_grad
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}


def test_bugs_13_a_default_device_without_values_is_named(user_file: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"9 of its tensors are on the meta device"):
        load(user_file("", before="import torch\ntorch.set_default_device('meta')\n"))
    assert torch.zeros(1).device.type == "cpu"


def test_bugs_13_weights_drawn_by_numpy_and_python_are_the_same_each_time(user_file: Callable[[str], Path]) -> None:
    path = user_file(
        "import random, numpy\ndef drawn():\n    made = Net()\n    with torch.no_grad():\n"
        "        made.fc.bias.copy_(torch.tensor(numpy.random.rand(5)))\n        made.fc.bias[0] = random.random()\n"
        "    return made\n"
    )
    assert load(path, "drawn").digest == load(path, "drawn").digest


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', required=True)\np.parse_args()",
            r"users\.py raised SystemExit: the following arguments are required: --lr; put what runs .* under `if",
        ),
        ("import sys\nsys.exit('x')", r"users\.py raised SystemExit: x; put"),
        ("raise SystemExit", r"users\.py raised SystemExit; put"),
        ("import click\n@click.command()\ndef run(): pass\nrun()", r"users\.py raised SystemExit: 0; put"),
        ("exit(3)", r"users\.py raised SystemExit: 3; put"),
    ],
)
def test_bugs_13_a_script_that_ends_the_process_is_named(
    lines: str, message: str, user_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        load(user_file(f"{lines}\n"))
    assert not capsys.readouterr().err


def test_bugs_13_a_factory_that_ends_the_process_is_named(user_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"users\.py:ends must be callable .* raised SystemExit: 3"):
        load(user_file("import sys\ndef ends(): sys.exit(3)\n"), "ends")


def test_bugs_13_a_script_with_optional_arguments_gets_its_defaults(user_file: Callable[[str], Path]) -> None:
    lines = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', default=1.0)\np.parse_args()\n"
    assert load(user_file(lines)).num_classes == 5


WRAPPED = {
    "parallel": "nn.DataParallel(Net())",
    "averaged": "torch.optim.swa_utils.AveragedModel(Net())",
    "twice": "nn.DataParallel(torch.optim.swa_utils.AveragedModel(Net()))",
    "compiled": "torch.compile(Net())",
    "part": "nn.Sequential(nn.Identity(), nn.DataParallel(Net()))",
    "subclass": "type('Ema', (torch.optim.swa_utils.AveragedModel,), {})(Net())",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_bugs_13_wrappers_are_taken_off(name: str, user_file: Callable[[str], Path]) -> None:
    path = user_file(f"def wrapped(): return {WRAPPED[name]}\n")
    plain, teacher = load(path), load(path, "wrapped")
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher.module(x), plain.module(x)) and torch.equal(teacher.graph(x), plain.module(x))
    assert {type(part).__name__ for part in teacher.module.modules()} <= {
        *("Net", "Conv2d", "BatchNorm2d", "Linear", "Sequential", "Identity")
    }


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("torch.nn.Module.to_empty(Net(), device='meta')", r"9 of its tensors are on the meta device"),
        (
            "nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())",
            r"lazy layers \(0.weight.*call it once on a batch",
        ),
        ("nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(5))", r"lazy layers \(2.weight, 2.bias\)"),
    ],
)
def test_bugs_13_networks_without_weights_are_named(made: str, message: str, user_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(user_file(f"def odd(): return {made}\n"), "odd")


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("torch.jit.script(Net())", r"but it is TorchScript \(Net\)"),
        ("torch.jit.trace(Net().eval(), torch.zeros(1, 3, 12, 12))", r"but it is TorchScript \(Net\)"),
        ("nn.Sequential(torch.jit.script(Net()))", r"but its part '0' is TorchScript \(Net\)"),
    ],
)
def test_f_2_torchscript_is_named(made: str, message: str, user_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(user_file(f"def odd(): return {made}\n"), "odd")


def test_f_7_an_instance_is_taken_and_is_not_changed(user_file: Callable[[str], Path]) -> None:
    path = user_file("made = Net()\nwrapped = nn.DataParallel(Net())\n")
    source = build_source(TeacherConfig(spec=f"{path}:made", **FACTS))
    assert isinstance(source.module, nn.Module) and source.name == "made_random"
    assert load(path, "wrapped").num_classes == 5 and load(path, "Net").num_classes == 5
    with pytest.raises(ValueError, match=r"must name a function of .*; did you mean made"):
        load(path, "mades")


GRADIENTS = """
class Frozen(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)
class Squeezed(Net):
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).squeeze())
"""


@pytest.mark.parametrize("name", ["Frozen", "Squeezed"])
def test_bugs_5_synthesis_uses_the_graph_where_the_network_has_no_logits_or_gradient_for_one_image(
    name: str, user_file: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = load(user_file(GRADIENTS), name)
    config = SynthesisConfig(num_images=3, shard_size=2, iterations=2, start="white")
    made = ensure_set(teacher, config, 0, SetStore(tmp_path / "store"), progress=False)
    assert len(made.images) == 3 and bool(torch.isfinite(made.images).all())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("return self.fc(x.flatten(2).mean(2)).view(2, 5)", r"must accept any batch size, .* fails .* for 3"),
        ("return self.fc(x.flatten(2).mean(2))[:2]", r"must accept any batch size, .* returns \(2, 5\) for 3"),
        ("x = x.flatten(2).mean(2); return self.fc(x - x.mean(0))", r"must classify each image by itself"),
        ("return self.fc(x.flatten(2).mean(2)) + x.std()", r"must classify each image by itself"),
    ],
)
def test_bugs_5_what_depends_on_the_other_images_is_rejected(
    lines: str, message: str, user_file: Callable[[str], Path]
) -> None:
    code = (
        f"class Odd(Net):\n    def forward(self, x):\n        x = torch.relu(self.bn(self.conv(x)))\n        {lines}\n"
    )
    with pytest.raises(ValueError, match=message):
        load(user_file(code), "Odd")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("model.onnx", "has neither batch-norm statistics nor layers that can be trained"),
        ("folder/Net.PT", "a weight file goes to `--teacher.weights`"),
        ("net.pth", "a weight file goes to `--teacher.weights`"),
        ("net.ckpt", "a weight file goes to `--teacher.weights`"),
        ("nets.py", "name the function that returns the network: nets.py:FUNCTION"),
        ("microsoft/resnet-50", "a model of Hugging Face is hf:microsoft/resnet-50, or hf:FOLDER"),
        ("transformers:google/vit", "a model of Hugging Face is hf:google/vit, or hf:FOLDER"),
    ],
)
def test_f_3_and_f_8_what_stands_for_a_teacher_is_explained(
    spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", spec, "--teacher.weights", "random"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


FAMILY = """
from torch import nn
from blocks_of_user import WIDTH

class Net(nn.Sequential):
    def __init__(self):
        from head_of_user import make_head  # only here
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), *make_head(WIDTH))
"""


def test_bugs_5_each_file_has_the_files_of_its_own_folder(tmp_path: Path) -> None:
    path, widths = list(sys.path), {"a": 4, "b": 8}
    for name, width in widths.items():
        (tmp_path / name / "head_of_user").mkdir(parents=True)
        (tmp_path / name / "net.py").write_text(FAMILY)
        (tmp_path / name / "blocks_of_user.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / name / "head_of_user" / "__init__.py").write_text("from .head import make_head\n")
        (tmp_path / name / "head_of_user" / "head.py").write_text(
            f"from torch import nn\ndef make_head(width):\n    return nn.Flatten(), nn.Linear(width * 36, {width})\n"
        )
    for name in ("a", "b", "a"):
        net = made_by_user(str(tmp_path / name / "net.py"), "Net", [])
        assert net(torch.zeros(2, 3, 8, 8)).shape == (2, widths[name])
    assert sys.path == path
