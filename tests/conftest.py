"""What every test shares: one thread, a quiet Ray on loopback, and small random classifiers. Heavy imports wait for
their fixture.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from synq.config.run import RunConfig, TeacherConfig

# Before anything imports torch or Ray. Ray's own variables: no token file, everything on 127.0.0.1, no usage report.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AIR_NEW_OUTPUT="0",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "RAY_ADDRESS", "SYNQ_TRACEBACK", "SYNQ_COMMIT"):
    os.environ.pop(name, None)
_RAY_FOLDER = tempfile.mkdtemp(prefix="sq")  # short: Ray puts sockets below it, whose paths may have 107 bytes
os.environ["RAY_TMPDIR"] = _RAY_FOLDER
os.environ["XDG_STATE_HOME"] = f"{_RAY_FOLDER}/state"  # the key of `synq.teacher.trust`

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What the imports of all tests made stays until the end: a full collection need not look at it again, a second
    each time.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the tests of each package took, set-up and worker processes added, the longest first."""
    seconds: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = "/".join(report.nodeid.split("::")[0].split("/")[1:-1]) or "tests"
                seconds[folder] += report.duration
                number[folder] += report.when == "call"
    if len(seconds) > 1:
        terminalreporter.section("seconds by package")
        for folder, total in seconds.most_common():
            terminalreporter.line(f"{total:8.1f} s  {number[folder]:5} tests  {folder}")


def pytest_sessionfinish() -> None:
    """Remove Ray's folder; the session's fixtures, Ray's among them, have ended by now."""
    shutil.rmtree(_RAY_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread wherever torch is loaded already; tests must not fight over the cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real images and weights; skips where there is none."""
    folder = os.environ.get("SYNQ_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs SYNQ_DATA_DIR, a folder of real images and weights")
    return Path(folder).resolve()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _random_classifier(channels: int, num_classes: int, seed: int) -> "nn.Module":
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim > 1 else 0.1))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1.0)
    return net.eval().requires_grad_(False)


@pytest.fixture
def make_classifier() -> Callable[..., "nn.Module"]:
    """Maker of random conv-BN-ReLU classifiers: `make_classifier(channels=3, num_classes=5, seed=0)`; any input of
    8 pixels or more.
    """

    def make(channels: int = 3, num_classes: int = 5, seed: int = 0) -> "nn.Module":
        return _random_classifier(channels, num_classes, seed)

    return make


@pytest.fixture
def tiny_classifier(make_classifier: Callable[..., "nn.Module"]) -> "nn.Module":
    """A random conv-BN-ReLU classifier of 3-channel images and 5 classes, in eval mode, frozen."""
    return make_classifier()


@pytest.fixture
def gray_classifier(make_classifier: Callable[..., "nn.Module"]) -> "nn.Module":
    """As `tiny_classifier`, for 1-channel images."""
    return make_classifier(channels=1)


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, object]:
    """Dotted overrides that make a run on the bundled teacher a matter of a second or less; add folders and the rest.

    Images begin as white noise: fitting it first is half the time of so small a run. `test_pipeline.py` holds one run
    with the fit.
    """
    return {
        "synthesis.start": "white",
        "synthesis.num_images": 32,
        "synthesis.shard_size": 16,
        "synthesis.iterations": 2,
        "quant.calib_images": 32,
        "finetune.epochs": 1,
        "finetune.batch_size": 16,
        "evaluation.heldout_images": 16,
        "evaluation.num_images": 64,
        "runtime.device": "cpu",
        "runtime.progress": False,
    }


@pytest.fixture
def config(tiny_settings: dict[str, object], tmp_path: Path) -> "RunConfig":
    """A run of `tiny_settings` that writes to the test's folder."""
    from synq.config.run import RunConfig, with_overrides

    return with_overrides(RunConfig(), {**tiny_settings, "runtime.output_dir": str(tmp_path)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, object]) -> Path:
    """The folder of a finished run whose student can be exported."""
    from synq.config.run import RunConfig, with_overrides
    from synq.pipeline import run
    from synq.runs.record import run_folder

    folder = tmp_path_factory.mktemp("runs")
    config = with_overrides(
        RunConfig(),
        {**tiny_settings, "runtime.output_dir": str(folder), "quant.weight_bits": 4, "quant.act_points": "inputs"},
    )
    run(config)
    return run_folder(config)


@pytest.fixture(scope="module")
def accelerator() -> "Accelerator":
    """One process on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A user's file of models, the tiny one among them."""
    from support.tiny_model import MODEL_FILE

    path = tmp_path / "my models.py"
    path.write_text(MODEL_FILE)
    return path


@pytest.fixture
def make_config(model_file: Path, tmp_path: Path) -> Callable[..., "TeacherConfig"]:
    """A configuration of the tiny model with its weights in a safetensors file; fields can be replaced."""
    from safetensors.torch import save_file

    from support.tiny_model import HALF, SIZE, trained_state
    from synq.config.run import TeacherConfig

    def make(factory: str = "tiny", **fields: object) -> TeacherConfig:
        values: dict[str, object] = {"spec": f"{model_file}:{factory}", "input_size": SIZE, "mean": HALF, "std": HALF}
        if "weights" not in fields:
            path = tmp_path / "tiny.safetensors"
            save_file(trained_state(), path)
            values["weights"] = str(path)
        return TeacherConfig(**{**values, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture
def as_args() -> Callable[[dict[str, object]], list[str]]:
    """Return a function that turns settings by dotted key into command-line arguments."""

    def args(overrides: dict[str, object]) -> list[str]:
        pairs = ([f"--{key}", str(value)] for key, value in overrides.items())
        return [arg for pair in pairs for arg in pair]

    return args


@pytest.fixture(scope="session")
def run_process() -> Callable[..., "tuple[int, str, str]"]:
    """Run a command in a process group of its own: `(returncode, stdout, stderr)`; the whole group ends at the time
    limit.
    """

    def run(words: Sequence[str], *, cwd: Path = ROOT, timeout: float = 120, **variables: str) -> tuple[int, str, str]:
        process = subprocess.Popen(
            list(words),
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{' '.join(words)} took more than {timeout} s\n{out}\n{err}") from None
        return process.returncode, out, err

    return run


@pytest.fixture
def torch_rng_untouched() -> Iterator[None]:
    """Fail a test that moves torch's global random state."""
    import torch

    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made sweep of two groups."""
    from support.made_sweeps import made_sweep

    return made_sweep(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The leaderboard of the sweep over listed points when nothing happens."""
    from support.sweep_tools import board, listed, whole

    folder = tmp_path_factory.mktemp("undisturbed")
    words = [
        sys.executable,
        str(root / "launch" / "sweep.py"),
        str(listed(folder)),
        "--output-dir",
        str(folder / "out"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    whole(folder / "out")
    return board(folder / "out")


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the door of a sweep as a user would, in a process group of its own that ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(root / "launch" / "sweep.py"), *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **variables},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
