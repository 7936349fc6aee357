"""`synq train` and `synq`: arguments, one line of output, exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors.torch

from synq import cli, train
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig, config_digest, config_to_dict, make_absolute, with_overrides
from synq.runs.record import RunRecord, read_record, write_config

SUMMARY = re.compile(
    r"^digits_resnet8 W4A4 A relu \| teacher \d+\.\d\d \| RTN \d+\.\d\d \| final \d+\.\d\d \| "
    r"drop -?\d+\.\d\d ± \d+\.\d\d \(64 images\) \| \d+ s \+ \d+ s of synthesis$"
)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture
def args(
    tiny_settings: dict[str, object], as_args: Callable[[dict[str, object]], list[str]], in_tmp: Path
) -> list[str]:
    """Return the command-line arguments of a small run in ./out."""
    return as_args({**tiny_settings, "runtime.output_dir": "out"})


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_help_has_every_setting_with_its_value(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    assert train.main(["--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    keys = dotted_keys(RunConfig)
    assert [key for key in keys if not re.search(rf"--{re.escape(key)} [^-].*?\(default: ", text)] == []
    assert text.count("(default: ") == len(keys)
    assert "--config FILE" in text and "Peak learning rate. (default: 0.01)" in text
    (in_tmp / "a.toml").write_text("[finetune]\nlr = 0.25\n")
    assert train.main(["--help-all", "--config", "a.toml"]) == 0
    assert "Peak learning rate. (default: 0.25)" in " ".join(capsys.readouterr().out.split())
    assert train.main(["a.toml", "--finetune.lr", "0.125", "-h"]) == 0
    assert "Peak learning rate. [0.125]" in capsys.readouterr().out
    assert os.listdir(in_tmp) == ["a.toml"]


def test_a_run_writes_a_record_and_one_line_and_is_not_repeated(
    capsys: pytest.CaptureFixture[str], args: list[str], in_tmp: Path
) -> None:
    assert train.main(args) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert SUMMARY.match(line), line
    (path,) = in_tmp.glob("out/run-*/record.json")
    record = read_record(path)
    assert record.status == "completed" and path.parent.name == f"run-{record.config_digest}"
    assert record.config["synthesis"]["num_images"] == 32 and record.num_eval == 64
    assert record.config["runtime"]["output_dir"] == str(in_tmp / "out")
    assert record.top1 is not None and record.teacher_top1 is not None
    assert record.drop == pytest.approx(record.teacher_top1 - record.top1)
    assert not list(in_tmp.rglob("*.tmp"))
    before = {name: (in_tmp / name).stat().st_mtime_ns for name in _tree(in_tmp)}
    assert train.main(args) == 0
    again = capsys.readouterr()
    assert again.out.splitlines() == [line]
    assert f"synq: finished before, nothing to do: {path.parent}" in again.err.splitlines()
    assert {name: (in_tmp / name).stat().st_mtime_ns for name in _tree(in_tmp)} == before


def test_the_command_line_overrides_the_file(capsys: pytest.CaptureFixture[str], args: list[str], in_tmp: Path) -> None:
    (in_tmp / "a.json").write_text(
        json.dumps({"name": "file", "finetune": {"lr": 0.25, "kd_temperature": 2}, "seed": 3})
    )
    assert train.main(["--config=a.json", *args, "--finetune.lr", "0.125"]) == 0
    (path,) = in_tmp.glob("out/file-*/record.json")
    config = read_record(path).config
    assert (config["finetune"]["lr"], config["finetune"]["kd_temperature"], config["seed"]) == (0.125, 2.0, 3)


NO_BATCH_NORM = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 10))\n"
)
WITH_BATCH_NORM = (
    "from torch import nn\n"
    "def make():\n"
    "    pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]\n"
    "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *pool)\n"
)
OWN = "--teacher.spec net.py:make --teacher.input_size 1 16 16 --teacher.mean 0.5 --teacher.std 0.5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--finetune.cam_wieght 1", "did you mean `finetune.cam_weight`?"),
        ("--lowpass_cutof 1", "did you mean `finetune.lowpass_cutoff`?"),
        ("--quant.weight_bits 1", "`quant.weight_bits` must be a whole number in [2, 8], but got 1"),
        ("--config absent.toml", "must name an existing file, but got 'absent.toml'"),
        ("--config", "`config` must name one file, but got none"),
        ("--config bad.toml", "bad.toml: `finetune.lrr` must be a known key"),
        ("--runtime.output_dir file/out", "file/out"),
        ("--teacher.spec bundled:digits_resnet9", "digits_resnet8"),
        ("--teacher.spec net.py:make --teacher.weights absent.pth", "absent.pth"),
        (f"{OWN} --teacher.weights nan.safetensors", "NaN"),
        ("--evaluation.dataset npz:absent.npz", "absent.npz"),
        ("--finetune.batch_size 64", "`finetune.batch_size` must be <= `synthesis.num_images` (32)"),
    ],
)
def test_invalid_input_is_a_one_line_error_with_exit_code_2_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], args: list[str], in_tmp: Path, line: str, message: str
) -> None:
    import safetensors.torch
    import torch

    (in_tmp / "file").write_text("in the way")
    (in_tmp / "bad.toml").write_text("[finetune]\nlrr = 1\n")
    (in_tmp / "net.py").write_text(WITH_BATCH_NORM if "nan" in line else NO_BATCH_NORM)
    shapes = {"0.weight": (4, 1, 3, 3), "0.bias": (4,), "5.weight": (10, 4), "5.bias": (10,)}
    shapes |= {f"1.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
    nan = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()} | {
        "1.num_batches_tracked": torch.tensor(1)
    }
    safetensors.torch.save_file(nan, in_tmp / "nan.safetensors")
    before = _tree(in_tmp)
    assert train.main([*args, *line.split()]) == 2
    captured = capsys.readouterr()
    (only,) = captured.err.splitlines()
    assert only.startswith("synq: error: ") and message in only and captured.out == ""
    written = {name: content for name, content in _tree(in_tmp).items() if "__pycache__" not in name}
    assert written == before


def test_the_first_argument_is_the_teacher_or_a_file_of_settings(in_tmp: Path) -> None:
    assert train.command.read(["timm:resnet18"])["config"].teacher.spec == "timm:resnet18"
    Path("run.toml").write_text("[finetune]\nlr = 0.5\n")
    found = train.command.read(["run.toml"])["config"]
    assert found == make_absolute(with_overrides(RunConfig(), {"finetune.lr": 0.5}))
    with pytest.raises(ValueError, match="one file, but got two"):
        train.command.read(["run.toml", "--config", "run.toml"])


def test_the_written_settings_of_a_run_reproduce_its_digest(in_tmp: Path) -> None:
    config = with_overrides(RunConfig(), {"finetune.grad_clip_relative": None, "finetune.lr": 0.5})
    write_config("config.json", config)
    found = train.command.read(["--config", "config.json"])["config"]
    assert found == make_absolute(config) and config_digest(found) == config_digest(config)
    Path("dumped.json").write_text(json.dumps(config_to_dict(config)))
    assert train.command.read(["--config", "dumped.json"])["config"] == make_absolute(config), (
        "complete settings need no format number"
    )
    finetune = config_to_dict(config)["finetune"]
    del finetune["lr"]
    Path("by_hand.json").write_text(json.dumps({"finetune": finetune}))
    found = train.command.read(["--config", "by_hand.json", "--finetune.lr", "0.25"])["config"]
    assert found == make_absolute(with_overrides(config, {"finetune.lr": 0.25}))
    Path("by_hand.json").write_text(json.dumps({"finetune": {"lr": 0.5}}))
    assert train.command.read(["by_hand.json"])["config"] == make_absolute(
        with_overrides(RunConfig(), {"finetune.lr": 0.5})
    )


def test_failure_and_interrupt_have_separate_exit_codes(
    capsys: pytest.CaptureFixture[str], args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synq import pipeline
    from synq.finetune import loop as finetune

    def raise_now(error: BaseException) -> None:
        def run(*_: object, **__: object) -> RunRecord:
            raise error

        monkeypatch.setattr(pipeline, "run", run)

    raise_now(finetune.NonFiniteLossError("the term cam is nan"))
    assert train.main(args) == 1
    raise_now(KeyboardInterrupt())
    assert train.main(args) == 130
    assert capsys.readouterr().err.splitlines() == [
        "synq: error: the term cam is nan",
        "synq: interrupted; the same command resumes",
    ]
    raise_now(AssertionError("a bug"))
    assert train.main(args) == 70  # a fault of ours: never bad input, its traceback is in a log
    assert "a bug" in capsys.readouterr().err


def test_the_file_can_be_started_without_an_installed_package(root: Path, in_tmp: Path) -> None:
    # -S: no site-packages, so neither an installed synq nor third-party packages except click can be imported.
    (in_tmp / "third").mkdir()
    (in_tmp / "third" / "click").symlink_to(Path(click.__file__).parent)
    command = [sys.executable, "-S", str(root / "synq" / "train.py"), "--finetune.lrr", "1"]
    environment = {**os.environ, "PYTHONPATH": str(in_tmp / "third")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=in_tmp, check=False, env=environment)
    assert (
        done.returncode == 2
        and done.stderr.endswith("did you mean `finetune.lr`?\n")
        and len(done.stderr.splitlines()) == 1
    )


def _launch(root: Path, processes: int) -> list[str]:
    config = [] if processes == 1 else ["--config_file", str(root / "launch" / "accelerate_cpu2.yaml")]
    port = [] if processes == 1 else ["--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *config, *port, str(root / "synq" / "train.py")]


@pytest.mark.slow
def test_two_processes_print_one_line(
    root: Path, args: list[str], in_tmp: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_process([*_launch(root, 2), *args], cwd=in_tmp)
    assert code == 0, err
    assert len([line for line in out.splitlines() if SUMMARY.match(line)]) == 1 == len(out.splitlines())
    (path,) = in_tmp.glob("out/run-*/record.json")
    assert "2 processes" in read_record(path).device
    before = _tree(in_tmp / "out")
    code, out, err = run_process([*_launch(root, 2), *args, "--finetune.batch_size", "15"], cwd=in_tmp)
    errors = [line for line in err.splitlines() if "synq: error" in line]
    assert (
        code != 0 and len(errors) == 1 and "batch_size must be divisible by the number of processes (2)" in errors[0]
    ), err
    assert _tree(in_tmp / "out") == before


@pytest.mark.slow
def test_accelerate_launch_starts_the_file(
    root: Path, args: list[str], in_tmp: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_process([*_launch(root, 1), *args], cwd=in_tmp)
    assert code == 0 and SUMMARY.match(out.splitlines()[-1]), err


def test_the_console_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"synq {name}" in out for name in cli.COMMANDS)
    assert cli.run(["--version"]) == 0
    assert cli.run(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("synq ") and captured.err.endswith("but got 'trian'; did you mean `train`?\n")


def test_the_console_command_imports_nothing_large() -> None:
    code = "import sys, synq.cli; print([m for m in sys.modules if m.startswith(('torch', 'ray', 'synq.sweeps'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_console_command_trains_and_synthesizes(
    capsys: pytest.CaptureFixture[str], args: list[str], in_tmp: Path
) -> None:
    assert cli.run(["synthesize", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" | ")[2] for line in lines] == ["32 images", "16 images"]
    assert not list(in_tmp.glob("out/run-*"))
    sets = _tree(in_tmp / "out" / "store")
    assert cli.run(["train", *args]) == 0
    assert SUMMARY.match(capsys.readouterr().out.splitlines()[-1])
    assert _tree(in_tmp / "out" / "store") == sets


def test_images_are_exported_for_other_tools(capsys: pytest.CaptureFixture[str], args: list[str], in_tmp: Path) -> None:
    assert cli.run(["synthesize", *args, "--npz", "images.npz"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "images.npz | 32 images"
    with np.load(in_tmp / "images.npz") as made:
        assert {name: (array.dtype.str[1:], array.shape) for name, array in made.items()} == {
            "images": ("f4", (32, 1, 16, 16)),
            "labels": ("i8", (32,)),
            "mean": ("f4", (1,)),
            "std": ("f4", (1,)),
        }
        (stored,) = (
            safetensors.torch.load_file(path) for path in in_tmp.glob("out/store/*/images.safetensors")
            if len(safetensors.torch.load_file(path)["labels"]) == 32
        )  # fmt: skip
        assert np.array_equal(made["images"], stored["images"].numpy())
        assert np.array_equal(made["labels"], stored["labels"].numpy())
    for bad in (["--npz"], ["--npz", "images.npy"]):
        assert cli.run(["synthesize", *args, *bad]) == 2
        assert "`npz` must name a file that ends in .npz" in capsys.readouterr().err
    assert cli.run(["synthesize", "--help"]) == 0
    assert (
        "Synthesize the training and held-out images" in (text := capsys.readouterr().out) and "--npz FILE.npz" in text
    )
    assert cli.run(["train", *args, "--npz", "images.npz"]) == 2, "only synthesize has this option"


@pytest.mark.parametrize(("name", "option"), [("sweep", "--num-trials"), ("leaderboard", "PATH"), ("export", "RUN")])
def test_the_other_commands_can_be_called(capsys: pytest.CaptureFixture[str], name: str, option: str) -> None:
    assert cli.run([name, "--help"]) == 0 and option in capsys.readouterr().out


def test_a_pipe_closed_early_causes_no_traceback(root: Path, run_process: Callable[..., tuple[int, str, str]]) -> None:
    command = f"{sys.executable} {root / 'synq' / 'train.py'} --help | head -1"
    code, out, err = run_process(["bash", "-c", command])
    assert (code, err) == (0, "") and out.startswith("usage")


def test_random_weights_are_the_same_in_every_process(args: list[str], in_tmp: Path) -> None:
    (in_tmp / "model.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *head)\n"
    )
    spec = ["--teacher.spec", "model.py:net", "--teacher.weights", "random", "--teacher.input_size", "1,16,16"]
    facts = ["--teacher.mean", "0.5", "--teacher.std", "0.5", "--evaluation.dataset", "none"]
    assert train.main([*args, *spec, *facts]) == 0
    assert train.main([*args, *spec, *facts]) == 0, "other weights would be rejected as those of another teacher"
