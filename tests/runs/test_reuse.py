"""Other labeled images: a finished student is counted on them, and never trained again for them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from support.sealed import edit
from synq import pipeline
from synq.commands.evaluate import main
from synq.common.notices import forget_notices
from synq.config.run import RunConfig, config_digest, config_from_dict, with_overrides
from synq.pipeline import run
from synq.runs.finished import open_run
from synq.runs.record import read_record, run_folder
from synq.runs.recount import recount
from synq.runtime import make_accelerator


def _labeled_file(path: Path, number: int, seed: int) -> str:
    """Write scikit-learn's digits in another order, as a file of the user's."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.random.default_rng(seed).permutation(len(digits.target))[:number]
    images = np.kron(digits.images[rows] * 255 / 16, np.ones((2, 2)))
    np.savez(path, x=images.astype(np.uint8), y=digits.target[rows])
    return f"npz:{path}"


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the student was trained again")

    monkeypatch.setattr(pipeline, "finetune", trains)


def test_m_5_labels_are_no_part_of_a_student(config: RunConfig) -> None:
    digest = config_digest(config, with_evaluation=False)
    for changes in (
        {"evaluation.dataset": "none"},
        {"evaluation.num_images": 5},
        {"evaluation.heldout_images": 8},
        {"evaluation.objective": "selection"},
        {"evaluation.fidelity_measure": "kl_t4"},
        {"evaluation.every_epoch": True},
    ):
        other = with_overrides(config, changes)
        assert config_digest(other, with_evaluation=False) == digest and config_digest(other) != config_digest(config)
    for changes in ({"finetune.lr": 0.5}, {"seed": 1}, {"quant.calib_images": 16}, {"teacher.weights": "random"}):
        assert config_digest(with_overrides(config, changes), with_evaluation=False) != digest


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation.dataset": "FILE"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"evaluation.dataset": "none"},
                {"evaluation.num_images": 32},
                {"evaluation.heldout_images": 8},
                {"evaluation.fidelity_measure": "kl_t4", "name": "other"},
            )
        ),
        {"evaluation.dataset": "FILE", "quant.rounding": "adaround", "reconstruction.iterations": 3,
            "reconstruction.images": 16},
    ],
)  # fmt: skip
def test_m_5_a_run_with_another_evaluation_measures_the_finished_student(
    changes: dict[str, Any], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    forget_notices()
    file = _labeled_file(tmp_path / "mine.npz", 100, seed=1)
    changes = {key: file if value == "FILE" else value for key, value in changes.items()}
    apart = {key: value for key, value in changes.items() if not key.startswith(("evaluation.", "name"))}
    first = with_overrides(config, apart)
    other = with_overrides(config, changes)
    run(first)
    trained = run(with_overrides(other, {"runtime.output_dir": str(tmp_path / "apart")}))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finetune", None)
        counted = run(other)
    assert "is measured and not trained again" in capsys.readouterr().err
    for key in (
        "top1",
        "top5",
        "teacher_top1",
        "rtn_top1",
        "lost",
        "gained",
        "num_eval",
        "objective_value",
        "fidelity",
    ):
        assert getattr(counted, key) == getattr(trained, key), key
    for key in (
        "objective_value",
        "rtn_fidelity",
        "eval_digest",
        "heldout_digest",
        "config_digest",
        "codes_changed",
        "rounding",
    ):
        assert getattr(counted, key) == getattr(trained, key), key
    assert counted.student_of == run_folder(first).name and trained.student_of == ""
    assert [epoch["loss"] for epoch in counted.loss_history] == [epoch["loss"] for epoch in trained.loss_history]
    states = [safetensors.torch.load_file(run_folder(c) / "student.safetensors") for c in (first, other)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert read_record(run_folder(other) / "record.json") == counted and run(other) == counted


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune.lr": 0.02},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"seed": 3},
                {"evaluation.every_epoch": True},
                {"quant.weight_bits": 3},
                {"teacher.weights": "random"},
            )
        ),
    ],
)
def test_m_5_another_student_is_trained(changes: dict[str, Any], config: RunConfig) -> None:
    run(config)
    record = run(with_overrides(config, {**changes, "evaluation.num_images": 32}))
    assert record.student_of == "" and record.total_seconds


def test_m_5_a_damaged_folder_hides_no_student(config: RunConfig, never_trains: None, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from synq.finetune.loop import finetune

        patch.setattr(pipeline, "finetune", finetune)
        run(config)
    for name in ("a-damaged", "b-empty"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "record.json", "student.safetensors"):
            (tmp_path / name / file).write_text("{" if name == "a-damaged" else "")
    assert run(with_overrides(config, {"evaluation.num_images": 32})).student_of == run_folder(config).name


def test_m_5_the_run_that_trained_goes_before_those_that_measured(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the calibration, which only its folder has, is repeated, and written into a folder of another run."""
    settings = {"quant.rounding": "adaround", "reconstruction.iterations": 3, "reconstruction.images": 16}
    first, second, third, fourth = (
        with_overrides(config, {**settings, **changes})
        for changes in ({}, *({"evaluation.num_images": number} for number in (32, 40, 48)))
    )
    run(first)
    monkeypatch.setattr(pipeline, "finetune", None)
    assert run(second).student_of == run_folder(first).name
    measured = run_folder(second).rename(tmp_path / "a")  # the first one by name
    with monkeypatch.context() as patch:
        patch.setattr("synq.finetune.networks.prepare_student", None)
        assert run(third).student_of == run_folder(first).name
    shutil.rmtree(run_folder(first))
    assert run(fourth).student_of == run_folder(first).name
    assert not (measured / "prepared.pt").exists() and (run_folder(fourth) / "prepared.pt").is_file()


def test_m_5_a_damaged_student_is_named_and_not_taken_over(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    file = run_folder(config) / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(with_overrides(config, {"evaluation.num_images": 32})).student_of == ""
    assert f"`{file}` must be as it was written" in capsys.readouterr().err


def test_m_5_the_rule_for_image_files_is_not_applied_to_arrays(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / finished.name)
    changed = {"dataset": "imagefolder:/val", "resize_size": 40, "interpolation": "bicubic"}

    def change(content: dict[str, Any]) -> None:
        content["config"]["evaluation"] |= changed
        content["config_digest"] = config_digest(config_from_dict(RunConfig, content["config"]))

    edit(folder / "record.json", change)
    assert main([str(folder), "--dataset", _labeled_file(tmp_path / "mine.npz", 20, seed=3)]) == 0
    assert "20 images" in capsys.readouterr().out


def test_m_5_a_run_in_float64_is_counted_in_float64(config: RunConfig) -> None:
    config = with_overrides(config, {"runtime.precision": "fp64"})
    record, found = run(config), open_run(run_folder(config))
    result = recount(found, found.config.evaluation, make_accelerator(found.config.runtime))
    assert all(p.dtype is torch.float64 for net in (found.student.net, found.teacher.graph) for p in net.parameters())
    assert (result.top1, result.lost, result.gained) == (record.top1, record.lost, record.gained)


def test_images_that_the_run_selected_by_are_not_counted(config: RunConfig, tmp_path: Path) -> None:
    record = run(with_overrides(config, {"evaluation.objective": "selection"}))
    folder = next(path.parent for path in Path(config.runtime.output_dir).glob("*/record.json"))
    assert main([str(folder), "--json", str(tmp_path / "own.json")]) == 0
    own = json.loads((tmp_path / "own.json").read_text())
    assert (own["num_eval"], own["top1"], own["lost"]) == (record.num_eval, record.top1, record.lost)


def test_m_5_the_command_counts_a_finished_student(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, record = (finished / "record.json").read_bytes(), read_record(finished / "record.json")
    assert main([str(finished), "--json", str(tmp_path / "own.json")]) == 0
    own = json.loads((tmp_path / "own.json").read_text())
    keys = ("top1", "top5", "teacher_top1", "num_eval", "lost", "gained", "drop", "drop_stderr")
    assert {key: own[key] for key in keys} == {key: getattr(record, key) for key in keys}
    assert own["labels_digest"] == record.eval_digest
    capsys.readouterr()
    file = _labeled_file(tmp_path / "mine.npz", 100, seed=2)
    began = time.monotonic()
    assert main([str(finished), "--dataset", file, "--json", str(tmp_path / "other.json")]) == 0
    assert time.monotonic() - began < 60
    other = json.loads((tmp_path / "other.json").read_text())
    line = capsys.readouterr().out.splitlines()[0]
    assert other["num_eval"] == 100 and "100 images | teacher " in line and " ± " in line and line.startswith(file)
    assert (finished / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "none"], "`dataset` must name labeled images"),
        (["--dataset", "npz:absent.npz"], "absent.npz"),
        (["--dataset", "cifar11"], "cifar11"),
        (["--num-images", "0"], "`evaluation.num_images` must be"),
        (["--batch-size", "-1"], "`evaluation.batch_size` must be"),
        (["--num_image", "3"], "did you mean `--num-images`?"),
    ],
)
def test_m_5_what_cannot_be_counted_is_refused_in_one_line(
    args: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), *args]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("\n") == 1
