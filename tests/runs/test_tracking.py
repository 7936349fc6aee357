"""What a run tells its tracker, read back from the files; and that a tracker changes nothing else."""

import importlib.metadata
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from support.sweep_tools import tiny, write_spec
from synq import train
from synq.common.files import read_json
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig, config_digest, with_overrides
from synq.finetune.loop import NonFiniteLossError
from synq.finetune.schedule import lr_at
from synq.pipeline import run
from synq.runs.record import read_record, run_folder
from synq.runs.tracking import METRICS

Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture
def config(tiny_settings: dict[str, Any], tmp_path: Path) -> RunConfig:
    words = {"runtime.output_dir": str(tmp_path), "runtime.tracker": "tensorboard", "finetune.epochs": 3}
    return with_overrides(RunConfig(), {**tiny_settings, **words})


def curves(folder: Path) -> Curves:
    """(step, value) of each curve in all event files of a run."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hyperparameters(folder: Path) -> list[dict[str, Any]]:
    """The hyper-parameters of each time that they were logged."""
    found = []
    for path in sorted((folder / "tensorboard").glob("*/events*")):
        events = EventAccumulator(str(path.parent))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        found.append({key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()})
    return found


def test_epochs_and_figures_are_those_of_the_record(config: RunConfig) -> None:
    record, found = run(config), curves(run_folder(config))
    assert len(record.loss_history) == 3
    terms = {name.replace(" ", "_"): name for name in record.loss_history[0] if name != "epoch"}
    assert {tag for tag in found if tag.startswith("train/")} == {f"train/{name}" for name in [*terms, "lr"]}
    for tag, name in terms.items():
        assert found[f"train/{tag}"] == [(n, pytest.approx(e[name])) for n, e in enumerate(record.loss_history, 1)]
    assert found["train/lr"] == [(n, pytest.approx(lr_at(2 * n - 1, 2, config.finetune))) for n in (1, 2, 3)]
    figures = {name: getattr(record, name) for name in METRICS}
    figures |= {f"fidelity_{name}": value for name, value in record.fidelity.items()}
    figures |= {f"rtn_fidelity_{name}": value for name, value in record.rtn_fidelity.items()}
    assert {"top1", "drop", "fidelity_kl", "rtn_fidelity_kl"} <= set(figures)
    results = {tag.removeprefix("result/"): value for tag, value in found.items() if tag.startswith("result/")}
    assert results == {name: [(3, pytest.approx(value))] for name, value in figures.items() if value is not None}


def test_the_configuration_is_there_by_its_dotted_keys(config: RunConfig) -> None:
    config = with_overrides(config, {"teacher.input_size": [1, 16, 16], "quant.layer_weight_bits": {"conv1": 8}})
    run(config)
    (found,) = hyperparameters(run_folder(config))
    assert found["finetune.lr"] == config.finetune.lr and found["quant.weight_bits"] == 4
    assert (found["teacher.input_size"], found["quant.layer_weight_bits"]) == ("[1, 16, 16]", '{"conv1": 8}')
    missing = set(dotted_keys(RunConfig)) - set(found)
    assert "teacher.weights" in missing and all(_value(config, key) is None for key in missing)


def _value(config: RunConfig, key: str) -> object:
    part, _, name = key.rpartition(".")
    return getattr(getattr(config, part) if part else config, name)


@pytest.mark.parametrize("every_epoch", [False, True])
def test_the_objective_stands_where_it_was_measured(config: RunConfig, every_epoch: bool) -> None:
    config = with_overrides(config, {"evaluation.every_epoch": every_epoch})
    record, found = run(config), curves(run_folder(config))
    assert ("objective_value" in record.loss_history[0]) == every_epoch
    measured = [(n, pytest.approx(e["objective_value"])) for n, e in enumerate(record.loss_history, 1) if every_epoch]
    assert found.get("train/objective_value", []) == measured


def test_it_is_off_by_default_and_changes_no_result(config: RunConfig, tmp_path: Path) -> None:
    assert RunConfig().runtime.tracker == "none"
    words = {"runtime.tracker": "none", "runtime.output_dir": str(tmp_path / "plain")}
    plain = with_overrides(config, words)
    assert config_digest(plain) == config_digest(config)
    first, second = run(config), run(plain)
    for key in ("fidelity", "top1", "rtn_fidelity", "codes_changed", "config_digest"):
        assert getattr(first, key) == getattr(second, key)
    written = {path.name for path in run_folder(plain).iterdir()}
    assert {path.name for path in run_folder(config).iterdir()} - written == {"tensorboard", "tracker.json"}


def test_a_resumed_run_goes_on_at_its_epoch_and_a_finished_one_logs_nothing(config: RunConfig) -> None:
    class StoppedError(Exception):
        pass

    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 3:
            raise StoppedError

    config = with_overrides(config, {"finetune.epochs": 5})
    with pytest.raises(StoppedError):
        run(config, on_epoch=stop)
    folder = run_folder(config)
    assert [step for step, _ in curves(folder)["train/loss"]] == [1, 2, 3]
    record = run(config)
    found = curves(folder)
    # The third epoch was logged but not yet saved: it is run, and logged, again.
    assert [step for step, _ in found["train/loss"]] in ([1, 2, 3, 4, 5], [1, 2, 3, 3, 4, 5])
    assert dict(found["train/loss"]) == {n: pytest.approx(e["loss"]) for n, e in enumerate(record.loss_history, 1)}
    assert found["result/top1"] == [(5, pytest.approx(record.top1))]
    assert len(hyperparameters(folder)) == 1, "once for a run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(config) == record and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_one_run_leaves_nothing_to_the_next_in_its_process(config: RunConfig) -> None:
    """As the trials of a sweep in one worker: one that diverges, one that does not, one without a tracker."""
    bad = with_overrides(config, {"finetune.lr": 1e30, "finetune.grad_clip": None, "finetune.log_every": 1})
    with pytest.raises(NonFiniteLossError):
        run(bad)
    good, plain = (with_overrides(config, words) for words in ({"seed": 1}, {"seed": 2, "runtime.tracker": "none"}))
    left = sorted(run_folder(bad).rglob("*"))
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=config.runtime.output_dir)
    during: list[int] = []
    record = run(good, accelerator=accelerator, on_epoch=lambda epoch: during.append(_writers()))
    assert accelerator.trackers == [], "or `end_training` and the next run would write to them"
    run(plain)
    assert curves(run_folder(good))["result/top1"] == [(3, pytest.approx(record.top1))]
    assert not (run_folder(plain) / "tensorboard").exists() and sorted(run_folder(bad).rglob("*")) == left
    assert during == [1, 1, 1] and _writers() == 0


def _writers() -> int:
    """Number of threads that write event files."""
    return sum(type(thread).__name__ == "_AsyncWriterThread" for thread in threading.enumerate())


def test_a_process_group_made_without_the_tracker_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be made with log_with='tensorboard'.*but got none"):
        run(config, accelerator=Accelerator(cpu=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_before_any_work(
    tracker: str, tiny_settings: dict[str, object], as_args: Callable[..., list[str]], in_tmp: Path, capsys: Any
) -> None:
    if tracker in {name for names in importlib.metadata.packages_distributions().values() for name in names}:
        pytest.skip(f"{tracker} is installed")
    words = as_args({**tiny_settings, "runtime.output_dir": "out", "runtime.tracker": tracker})
    assert train.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"synq: error: `runtime.tracker` must be one whose package is installed, but got {tracker}: pip "
        f"install {tracker}"
    )
    assert not list(in_tmp.iterdir())


def test_a_tracker_that_cannot_be_opened_is_one_line(config: RunConfig) -> None:
    (folder := run_folder(config)).mkdir()
    (folder / "tensorboard").write_text("in the way")
    with pytest.raises(
        ValueError, match=r"`runtime.tracker` must be one that can be opened here, but got tensorboard: "
    ):
        run(config)
    (folder / "tensorboard").unlink()
    assert run(config).status == "completed"
    assert len(curves(folder)["train/loss"]) == 3


@pytest.mark.slow
def test_two_processes_log_every_value_once(
    root: Path,
    tiny_settings: dict[str, object],
    as_args: Callable[..., list[str]],
    in_tmp: Path,
    run_process: Callable[..., tuple[int, str, str]],
) -> None:
    launcher = ["--config_file", str(root / "launch" / "accelerate_cpu2.yaml"), "--main_process_port", "0"]
    settings = {**tiny_settings, "runtime.output_dir": "out", "runtime.tracker": "tensorboard", "finetune.epochs": 2}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(root / "synq" / "train.py")]
    code, _, err = run_process([*command, *as_args(settings)], cwd=in_tmp)
    assert code == 0, err
    (folder,) = in_tmp.glob("out/run-*")
    record, found = read_record(folder / "record.json"), curves(folder)
    assert "2 processes" in record.device
    assert found["train/loss"] == [(n, pytest.approx(e["loss"])) for n, e in enumerate(record.loss_history, 1)]
    assert found["result/top1"] == [(2, pytest.approx(record.top1))] and len(hyperparameters(folder)) == 1


@pytest.mark.slow
def test_the_trials_of_a_sweep_log_into_their_own_folders(
    root: Path, tmp_path: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    """Two trials in one worker, since Ray gives it to one after the other; the objective is measured after every
    epoch.
    """
    spec = write_spec(tmp_path / "spec.toml", epochs=2)
    text = spec.read_text().replace('bits = ["W8A8", "W3A3"]', 'bits = ["W3A3"]\nmax_concurrent = 1')
    spec.write_text(f'{text}[base.runtime]\ntracker = "tensorboard"\n')
    out = tmp_path / "out"
    code, said, err = run_process(
        [sys.executable, str(root / "launch" / "sweep.py"), str(spec), "--output-dir", str(out)], timeout=200
    )
    assert code == 0, said + err
    folders = sorted((out / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        record, found = read_record(folder / "record.json"), curves(folder)
        losses, objectives = found["train/loss"], found["train/objective_value"]
        assert losses == [(n, pytest.approx(e["loss"])) for n, e in enumerate(record.loss_history, 1)]
        assert objectives == [(n, pytest.approx(e["objective_value"])) for n, e in enumerate(record.loss_history, 1)]
        assert found["result/objective_value"] == [(2, pytest.approx(record.objective_value))]
        assert hyperparameters(folder)[0]["finetune.lr"] == record.config["finetune"]["lr"]
        kept = read_json(folder / "tracker.json")
        assert {**kept, "file_digest": ""} == {"tracker": "tensorboard", "id": "", "file_digest": ""}


def test_an_unknown_tracker_is_refused_in_a_spec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`runtime.tracker` must be one of none, tensorboard, wandb, mlflow"):
        tiny(tmp_path, base={"runtime": {"tracker": "tensorbord"}})


def test_a_tracker_that_fails_on_the_way_costs_no_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def gone(self: Accelerator, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        calls.append(step or 0)
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(Accelerator, "log", gone)
    with pytest.warns(UserWarning, match="tensorboard failed, the run continues without it: the server has gone"):
        record = run(config)
    assert record.status == "completed" and calls == [1]  # it is asked no more
