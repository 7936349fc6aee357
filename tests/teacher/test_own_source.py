"""Sources of teachers of a user: a name before the colon, what they return, and what is rejected."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import synq
from support.added import install, nothing_added
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet
from synq.config.run import TeacherConfig
from synq.teacher.teacher import load_teacher

FACTS: dict[str, Any] = {"input_size": SIZE, "mean": (0.5,), "std": (0.25,)}
ZOO = """
from support.api_tools import GrayNet
import synq

def load(name):
    nets = {"gray0": 0, "gray1": 1}
    return synq.SourceModel(module=GrayNet(nets[name]), input_size=(1, 12, 12), mean=(0.5,), std=(0.25,))
"""


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_added(monkeypatch):
        yield


def test_a_source_gets_the_text_after_the_colon() -> None:
    texts: list[str] = []

    @synq.teacher_source("zoo", version="1")
    def load(text: str) -> synq.SourceModel:
        texts.append(text)
        return synq.SourceModel(module=GrayNet(3), num_classes=5, default_dataset="none", **FACTS)

    found = load_teacher(TeacherConfig(spec="zoo@1:group/net:best"))
    assert texts == ["group/net:best"] and found.name == "zoo_group_net_best" and found.default_dataset == "none"
    assert (found.input_size, found.mean, found.std, found.num_classes) == (SIZE, (0.5,), (0.25,), 5)
    assert found.digest == synq.load_teacher(GrayNet(3), **INPUT).digest
    assert load_teacher(TeacherConfig(spec="zoo:x", mean=(0.25,), std=(0.5,))).mean == (0.25,), "settings go before it"


def test_a_source_may_return_a_network_alone() -> None:
    net = GrayNet(3)
    synq.teacher_source("zoo", version="1")(lambda text: nn.DataParallel(net))
    with pytest.raises(
        ValueError, match=r"`teacher\.input_size`, `teacher\.mean` and `teacher\.std` must be given: zoo"
    ):
        load_teacher(TeacherConfig(spec="zoo:x"))
    found = load_teacher(TeacherConfig(spec="zoo:x", **FACTS))
    assert found.digest == synq.load_teacher(net, **INPUT).digest
    assert all(weight.requires_grad for weight in net.parameters()), "the network of the source is copied"


def test_a_weight_file_goes_into_the_network_of_a_source(tmp_path: Path) -> None:
    torch.save(GrayNet(7).state_dict(), tmp_path / "net.pth")
    synq.teacher_source("zoo", version="1")(lambda text: synq.SourceModel(module=GrayNet(3), **FACTS))
    found = load_teacher(TeacherConfig(spec="zoo:x", weights=str(tmp_path / "net.pth")))
    assert found.digest == synq.load_teacher(GrayNet(7), **INPUT).digest and found.name == "zoo_x_net"
    with pytest.raises(ValueError, match=r"`teacher\.weights` must be a file or left out for zoo:x, but got 'DEFAULT'"):
        load_teacher(TeacherConfig(spec="zoo:x", weights="DEFAULT"))


BAD: dict[str, tuple[Callable[[str], Any], str]] = {
    "nothing": (lambda text: None, "must return a torch.nn.Module or a synq.SourceModel, but zoo:x returned NoneType"),
    "class": (lambda text: GrayNet, "zoo:x returned type"),
    "raises": (lambda text: {}[text], r"zoo:x raised KeyError: 'x'"),
    "exits": (lambda text: exit(1), "zoo:x raised SystemExit"),
    "size": (lambda text: synq.SourceModel(module=GrayNet(), input_size=(1, 12)), r"`teacher\.input_size` must be thr"),  # type: ignore[arg-type]
    "mean": (lambda text: synq.SourceModel(module=GrayNet(), mean=(128.0,), std=(64.0,)), "divide values for pixels"),
    "std": (lambda text: synq.SourceModel(module=GrayNet(), mean=(0.5,)), r"`teacher\.std` must be given exactly when"),
    "nan": (lambda text: with_nan(), "weights must be finite"),
    "untrained": (lambda text: synq.SourceModel(module=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), **FACTS),
                  "teacher must be trained"),
}  # fmt: skip


def with_nan() -> synq.SourceModel:
    net = GrayNet()
    net.fc.weight.data[0, 0] = float("nan")
    return synq.SourceModel(module=net, **FACTS)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_teacher_is_rejected(name: str) -> None:
    function, reason = BAD[name]
    synq.teacher_source("zoo", version="1")(function)
    with pytest.raises(ValueError, match=reason) as found:
        load_teacher(TeacherConfig(spec="zoo@1:x"))
    assert "\n" not in str(found.value)


def test_a_source_hides_a_module_and_no_source_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synq.teacher_source("support", version="1")(lambda text: synq.SourceModel(module=GrayNet(), **FACTS))
    assert load_teacher(TeacherConfig(spec="support:api_tools")).name == "support_api_tools"
    install(tmp_path, monkeypatch, "synq.teacher_sources", "load", ZOO)
    assert load_teacher(TeacherConfig(spec="bundled:digits_resnet8")).name == "digits_resnet8"


def test_a_source_of_a_package_in_a_run_a_sweep_and_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from synq.sweeps.spec_file import spec_from_dict
    from synq.train import main

    install(tmp_path / "site", monkeypatch, "synq.teacher_sources", "load", ZOO)
    run = synq.quantize("acme:gray1", config=RESEARCH, epochs=1, output_dir=tmp_path / "out", progress=False)
    assert run.record.config["teacher"]["spec"] == "acme@2.5:gray1" and run.record.model == "acme_gray1"
    assert run.record.teacher["digest"] == synq.load_teacher(GrayNet(1), **INPUT).digest
    assert synq.open_run(run.path).record == run.record
    (group,) = spec_from_dict({"models": ["acme:gray1"]}).groups
    assert group.key == "acme_gray1-W4A4" and group.base.teacher.spec == "acme@2.5:gray1"
    assert main(["acme:gray9", "--runtime.output_dir", str(tmp_path / "out")]) == 2
    assert "acme:gray9 raised KeyError: 'gray9'" in capsys.readouterr().err
    assert main(["acm:gray1", "--runtime.output_dir", str(tmp_path / "out")]) == 2
    assert "did you mean acme?" in capsys.readouterr().err
