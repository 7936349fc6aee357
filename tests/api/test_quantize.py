"""`synq.quantize` of a network in memory: the run, its student, resuming, the process and the folder around it."""

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import synq
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet, labeled
from synq.common.notices import forget_notices


@pytest.fixture(scope="module")
def net() -> GrayNet:
    return GrayNet()


@pytest.fixture(scope="module")
def run(net: GrayNet, tmp_path_factory: pytest.TempPathFactory) -> synq.Run:
    folder = tmp_path_factory.mktemp("api")
    return synq.quantize(net, 4, 4, **INPUT, config=RESEARCH, dataset=labeled(), output_dir=folder, progress=False)


def again(net: nn.Module, folder: Path, **more: Any) -> synq.Run:
    return synq.quantize(net, **INPUT, config=RESEARCH, output_dir=folder, progress=False, **more)


def test_a_run_has_metrics_and_a_student(run: synq.Run, net: GrayNet) -> None:
    assert run.metrics["num_eval"] == 40 and 0 <= run.metrics["agreement"] <= 100
    assert run.record.teacher["mean"] == [0.5] and run.config.teacher.spec.startswith("memory:graynet-")
    assert str(run.path) in run._repr_html_() and "W4A4" in str(run)
    assert run.images.images.shape == (32, *SIZE) and len(run.images.labels) == 32
    levels = run.student.state_dict()
    assert levels["conv1.weight"].shape == net.conv1.weight.shape


def test_the_student_behaves_as_a_module(run: synq.Run, tmp_path: Path) -> None:
    student, images = run.student, torch.randn(3, *SIZE)
    assert isinstance(student, nn.Module) and not student.training
    logits = student(images)
    torch.save(student, tmp_path / "student.pt")
    loaded = torch.load(tmp_path / "student.pt", weights_only=False)
    copied = copy.deepcopy(student)
    copied.load_state_dict(student.state_dict())
    for other in (loaded, copied, student.eval().to("cpu")):
        assert torch.equal(other(images), logits)
    assert torch.equal(synq.load_student(run.path, model=GrayNet())(images), logits)
    assert copied.double()(images.double()).dtype == torch.float64
    assert run.evaluate().top1 == run.record.top1, "a student that was moved changes no file"


def test_the_deployed_student_classifies_as_it_was_measured(run: synq.Run) -> None:
    images, labels = labeled()
    hits = run.deployed((images - 0.5) / 0.25).argmax(1) == labels
    assert 100 * int(hits.sum()) / 40 == run.record.top1


def test_evaluate_counts_other_labels(run: synq.Run) -> None:
    images, labels = labeled(20, seed=1)
    result = run.evaluate((images, labels))
    hits = run.teacher.graph((images - 0.5) / 0.25).argmax(1) == labels
    assert result.num_eval == 20 and result.teacher_top1 == 100 * int(hits.sum()) / 20
    with pytest.raises(ValueError, match=r"not normalized ones \(leave out transforms.Normalize\)"):
        run.evaluate((2 * images - 1, labels))
    with pytest.raises(ValueError, match="must have labels"):
        run.evaluate(images)


def test_the_same_network_finds_its_run(run: synq.Run, net: GrayNet) -> None:
    events: list[synq.Progress] = []
    found = again(net, run.path.parent, dataset=labeled(), on_progress=events.append)
    assert found.path == run.path and found.record == run.record
    assert {event.stage for event in events} == {"teacher"}, "nothing is computed again"
    other = again(GrayNet(seed=1), run.path.parent, epochs=0)
    assert other.path != run.path


def test_open_run_needs_the_network_of_the_run(run: synq.Run) -> None:
    opened = synq.open_run(run.path, model=GrayNet(), dataset=labeled())
    assert opened.record == run.record and opened.evaluate().top1 == run.record.top1
    with pytest.raises(ValueError, match="`model` must be the network of the run, because graynet"):
        synq.open_run(run.path)
    with pytest.raises(ValueError, match="`model` must have the code and the weights of the run"):
        synq.open_run(run.path, model=GrayNet(seed=1))
    with pytest.raises(ValueError, match="were in the memory of a program: give them again, as `dataset`"):
        synq.open_run(run.path, model=GrayNet()).evaluate()


def test_an_interrupted_run_resumes(net: GrayNet, tmp_path: Path) -> None:
    def interrupt(event: synq.Progress) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(net, tmp_path, on_progress=interrupt)
    done: list[int] = []
    resumed = again(net, tmp_path, on_progress=lambda event: done.append(event.done))
    assert done.count(1) == 0 and done.count(2) == 1, "the first epoch is not trained again"
    whole = again(net, tmp_path / "whole")
    state, expected = resumed.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_in_an_event_loop_and_in_threads(net: GrayNet, tmp_path: Path) -> None:
    async def cell() -> synq.Run:
        return again(net, tmp_path / "loop", epochs=1)

    runs = [asyncio.run(cell())]
    threads = [
        threading.Thread(target=lambda name=name: runs.append(again(net, tmp_path / name, epochs=1)))  # type: ignore[misc]
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 3 and len({run.metrics["kl"] for run in runs}) == 1


def test_nothing_is_printed_or_written_elsewhere(
    net: GrayNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    run = again(net, tmp_path / "out", epochs=1, dataset=labeled())
    run.evaluate()
    run.export(formats=["packed"])
    assert capfd.readouterr() == ("", "")
    assert not list(here.iterdir()) and not list(home.iterdir())
    synq.quantize(net, **INPUT, config=RESEARCH, output_dir=tmp_path / "loud", epochs=1)
    assert "synq: " in capfd.readouterr().err


def test_a_relative_folder_is_below_the_current_one(
    net: GrayNet, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = again(net, Path("out"), epochs=0)
    assert run.path.parent == in_tmp / "out"


def test_settings_by_mapping_file_and_object(net: GrayNet, tmp_path: Path) -> None:
    from synq.api.settings import settings_of

    assert settings_of(None, {}).quant.target == "onnxruntime"
    assert settings_of({"quant.act_points": "inputs"}, {}).quant.target == "research"
    assert settings_of(synq.RunConfig(), {}).quant.target == "research"
    assert settings_of(synq.RunConfig(), {"quant.target": "litert"}).quant.target == "litert"
    file = tmp_path / "run.toml"
    file.write_text("[finetune]\nlr = 0.5\n")
    found = settings_of(file, {"finetune.epochs": 3})
    assert (found.finetune.lr, found.finetune.epochs, found.quant.target) == (0.5, 3, "onnxruntime")
    with pytest.raises(ValueError, match=r"finetune\.lrr.*finetune\.lr"):
        settings_of({"finetune.lrr": 1}, {})
    with pytest.raises(ValueError, match="`config` must be a RunConfig"):
        settings_of(3, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`synthesis` must be a table of keys next to `synthesis\.iterations`, but"):
        settings_of({"synthesis": 5, "synthesis.iterations": 3}, {})
    bits = {"conv1": 4}
    given = {"quant": {"layer_weight_bits": bits, "weight_bits": np.int64(5)}, "quant.layer_weight_bits.fc": 3}
    quant = settings_of({**given, "runtime": {"output_dir": Path("x")}}, {}).quant
    assert quant.layer_weight_bits == {"conv1": 4, "fc": 3} and quant.weight_bits == 5 and bits == {"conv1": 4}


def test_the_student_is_an_ordinary_module_whatever_mode_it_is_first_read_in(run: synq.Run, net: GrayNet) -> None:
    opened = synq.open_run(run.path, model=net)
    with torch.inference_mode():
        student = opened.student
    assert not any(tensor.is_inference() for tensor in (*student.parameters(), *student.buffers()))
    assert torch.equal(student(torch.ones(1, *SIZE)), run.student(torch.ones(1, *SIZE)))


def test_what_a_run_warns_of_is_printed(net: GrayNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget_notices()  # those of other tests in this process
    made = synq.quantize(net, **INPUT, config=RESEARCH, output_dir=tmp_path, seed=3)
    printed = capsys.readouterr().err
    assert made.record.warnings, "an untrained network, with few images"
    assert all(" ".join(text.split()) in printed for text in made.record.warnings)
    assert "expected agreement" in printed or "agreement with the teacher on real images" in printed


def test_rejected_input_leaves_no_folder(net: GrayNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 channel\(s\)"):
        synq.quantize(net, **INPUT, images=np.zeros((32, 9, 9, 3), np.uint8), config=RESEARCH, output_dir=tmp_path)
    assert not list(tmp_path.glob("*run*"))
