"""Smoke runs of many architectures: each works, or is rejected with the message that the list expects."""

import json
import math
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from synq.cli import run
from synq.common.notices import forget_notices
from synq.common.text_tables import Row
from synq.config.run import RunConfig, RuntimeConfig, TeacherConfig
from synq.diagnostics.architectures import OWN, Entry, crashed_row, page, read_list, smoke_run_entry
from synq.diagnostics.smoke_run import GOOD_DB, smoke_run
from synq.sweeps.studies.pool import surviving_crashes
from synq.teacher.teacher import Teacher, load_teacher

SAMPLE = ("functional", "gated", "one_channel", "five_channels", "linear_only", "two_heads", "convolutional_head")
"""Small example networks; the whole list is a slow test."""
OF_LIBRARIES = ("timm:lcnet_050", "pytorchcv:preresnet20_cifar10")
"""Networks with hardswish and gates, and with batch norms before convolutions."""


def name_of(entry: Entry) -> str:
    output = f"-{entry.teacher.output}" if entry.teacher.output else ""
    return f"{entry.teacher.spec.rpartition(':')[2]}{output}-{'x'.join(map(str, entry.teacher.input_size or ()))}"


def check(row: Row, entry: Entry) -> None:
    assert row["as_listed"], row
    if entry.rejected:
        assert row["seconds"] < 60, "at once"
        return
    if entry.fails:
        return
    assert row["exact"] is True and math.isfinite(row["loss"]) and row["export"] in ("packed", "int4, packed")
    assert row["sqnr_db"] >= GOOD_DB or row["note"].startswith("worst tensor at W8A8: "), row


def marked(entry: Entry) -> ParameterSet:
    """Return the entry, marked as slow if the network comes from a library, which takes seconds."""
    own = entry.teacher.spec.startswith(OWN)
    return pytest.param(entry, id=name_of(entry), marks=() if own else pytest.mark.slow)


@pytest.mark.parametrize("entry", [marked(entry) for entry in read_list((*SAMPLE, *OF_LIBRARIES))])
def test_a_sample_of_the_list(entry: Entry) -> None:
    check(smoke_run_entry(entry, 1), entry)


@pytest.mark.parametrize("entry", [marked(entry) for entry in read_list() if entry.rejected])
def test_networks_listed_as_rejected_are_rejected_at_once(entry: Entry) -> None:
    check(smoke_run_entry(entry, 1), entry)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("entry", [entry for entry in read_list() if not entry.rejected], ids=name_of)
def test_the_whole_list(entry: Entry) -> None:
    check(smoke_run_entry(entry, 2, ("onnx", "packed")), entry)


def test_the_list_covers_libraries_and_input_sizes() -> None:
    entries = read_list()
    works = [entry for entry in entries if not entry.rejected and not entry.fails]
    assert len(entries) >= 110 and len(works) >= 100 and len({name_of(entry) for entry in works}) == len(works)
    assert {entry.teacher.spec.partition(":")[0] for entry in works} == {
        *("torchvision", "timm", "pytorchcv", OWN.removesuffix(":"))
    }
    assert {entry.teacher.input_size[0] for entry in works if entry.teacher.input_size} == {1, 3, 5}
    with pytest.raises(ValueError, match="`only` must be part of a name"):
        read_list(["nosuch"])


def test_a_network_that_fails_during_the_run_reports_the_stage(tmp_path: Path) -> None:
    """The forward pass works, the backward pass does not."""
    path = tmp_path / "bad.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Bad(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)\n"
        "    def forward(self, x):\n        y = torch.sigmoid(self.bn(self.conv(x)))\n        y += 1\n"
        "        return self.fc(y.mean((2, 3)))\n"
    )
    teacher = TeacherConfig(spec=f"{path}:Bad", weights="random", input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    stages: list[str] = []
    row = smoke_run(RunConfig(teacher=teacher, runtime=RuntimeConfig(device="cpu")), tmp_path, stages.append)
    assert row["status"] == "fails" and "modified by an inplace operation" in row["reason"]
    assert stages[-1] == "synthesis, fine-tuning, evaluation" and row["exact"] is True


def test_the_teacher_is_loaded_once_before_and_once_after_its_statistics_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[TeacherConfig] = []

    def counted(config: TeacherConfig) -> Teacher:
        loaded.append(config)
        return load_teacher(config)

    for module in ("diagnostics.smoke_run", "pipeline", "runs.finished"):
        monkeypatch.setattr(f"synq.{module}.load_teacher", counted)
    (entry,) = read_list(["convolutional_head"])
    check(smoke_run_entry(entry, 1), entry)
    assert [Path(config.weights or "").name for config in loaded] == ["random", "weights.safetensors"]


def test_the_page_is_markdown_with_every_row(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    args = [
        "smoke-run",
        "--all",
        "--only",
        "example_networks:branching",
        "example_networks:audio",
        "--page",
        str(target),
    ]
    assert run(args) == 0
    text = target.read_text()
    assert "| audio |" in text and "| branching |" in text
    assert text.count("| rejected |") == 2 and "traceable by torch.fx" in text
    worked: Row = {"teacher": "a|b", "group": "G", "status": "works", "reason": "", "seconds": 1.0, "sqnr_db": math.inf}
    assert "## G" in page([worked]) and "a\\|b" in page([worked])


def test_an_unexpected_result_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    network = {"spec": f"{OWN}branching"}
    listed.write_text(
        json.dumps({"input_size": [3, 8, 8], "num_classes": 10, "groups": [{"title": "T", "networks": [network]}]})
    )
    monkeypatch.setattr("synq.diagnostics.architectures.LIST", listed)
    assert run(["smoke-run", "--all"]) == 1


@pytest.mark.slow
def test_a_process_that_crashes_is_a_row_and_the_others_continue(tmp_path: Path) -> None:
    path = tmp_path / "dies.py"
    path.write_text("import os\ndef die():\n    os.abort()\n")
    facts = {"weights": "random", "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    specs = [f"{path}:die", f"{OWN}branching", f"{OWN}branching"]
    entries = [Entry(teacher=TeacherConfig(spec=spec, **facts), group="T") for spec in specs]  # type: ignore[arg-type]
    rows = dict(surviving_crashes(smoke_run_entry, dict(enumerate(entries)), 2, crashed_row))
    assert [rows[number]["status"] for number in range(3)] == ["fails", "rejected", "rejected"]
    assert "its process died" in rows[0]["reason"]
    assert "| fails |" in page(list(rows.values()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "`teacher.spec` must read SOURCE:NAME"),
        ([f"{OWN}audio", "--teacher.weights", "random"], "`teacher.input_size`"),
        (["--all", "--quant.weight_bits", "3"], "`--all` must be given without settings"),
        (["--only", "resnet"], "`only` must be left out without `--all`"),
        (["--finetune.lr", "5"], "`finetune` must be left out: a smoke run sets it"),
        (["--all", "--jobs", "0"], "`jobs` must be a finite number >= 1"),
    ],
)
def test_bad_arguments_are_rejected(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smoke-run", *args]) == 2
    assert message in capsys.readouterr().err


def test_results_in_a_file_are_kept_and_faults_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, target = tmp_path / "results.jsonl", tmp_path / "page.md"
    names = [OWN + name for name in ("convolutional_head", "branching", "audio")]
    args = ["smoke-run", "--all", "--only", *names, "--results", str(file)]
    assert run(args) == 0
    lines = file.read_text().splitlines()
    assert len(lines) == len(names)
    fault = json.loads(lines[0])  # the first one is one that works
    fault["row"] |= {"status": "fails", "reason": "killed"}
    kept = json.loads(lines[1])
    kept["row"]["commit"] = "0123abcd"
    file.write_text("\n".join([json.dumps(fault), json.dumps(kept), lines[2][:40]]))  # killed while it wrote
    capsys.readouterr()
    assert run([*args, "--page", str(target)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"synq: 1 of 3 networks are in {file}\n") and "convolutional_head: works" in printed
    assert [json.loads(line)["row"]["status"] for line in file.read_text().splitlines()] == [
        *("fails", "rejected"),
        *("works", "rejected"),
    ]
    page_text = target.read_text()
    assert "0123abcd" in page_text and "killed" not in page_text and "| audio |" in page_text
    file.write_text("nonsense\n" + file.read_text())
    assert run(args) == 2
    assert "line 1 of" in capsys.readouterr().err


def test_results_that_cannot_be_kept_are_an_error_before_the_first_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["smoke-run", "--all", "--only", OWN + "audio", "--results"]  # rejected at once
    assert run([*args, str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert str(tmp_path) in printed.err and "audio" not in printed.out
    assert run([*args, str(tmp_path / "new" / "results.jsonl")]) == 0
    assert (tmp_path / "new" / "results.jsonl").read_text().count("\n") == 1


def test_no_advice_about_the_miniature(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = read_list(["convolutional_head"])
    forget_notices()
    check(smoke_run_entry(entry, 1), entry)
    assert "synthesis" not in capsys.readouterr().err
