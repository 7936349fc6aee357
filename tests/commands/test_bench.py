"""The benchmark: its arithmetic, its reference step, its rows, and the command. No test asserts a speed."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from synq.commands import bench
from synq.commands.bench import main
from synq.finetune.responses import teacher_response
from synq.finetune.training_loss import training_loss
from synq.sweeps.benchmarks import ceilings, curves, population, steps, synthesis
from synq.sweeps.benchmarks.launcher import SOLO, TWO, WorkerError, result, start
from synq.sweeps.benchmarks.measure import GROUPS, rows_of
from synq.sweeps.benchmarks.subjects import TINY, Subject, build_subject
from synq.sweeps.benchmarks.table import Context, Row, Target, as_json, machine, markdown
from synq.sweeps.benchmarks.textbook import textbook_loss
from synq.sweeps.benchmarks.timing import Spread, Times, alternate
from synq.synthesis.lowpass import gaussian_lowpass

CPU = torch.device("cpu")
CONTEXT = Context(device=CPU, threads=1, rounds=2)
KIND = replace(TINY, batch={"cpu": 4})


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Replace every network by a small one, so that rows take seconds."""
    for module in (steps, ceilings, synthesis, population, curves):
        monkeypatch.setattr(module, "KINDS", {"resnet20": KIND}, raising=False)
    for module in (steps, ceilings, synthesis, population):
        monkeypatch.setattr(
            module, "build_subject", lambda key, device, seed, batch=None: build_subject(KIND, device, seed, batch)
        )
    monkeypatch.setattr(synthesis, "BATCH", {"resnet20": {"cpu": 4}})
    return build_subject(KIND, CPU, 0)


def test_the_reference_step_has_the_loss_and_the_gradient_of_the_fast_step(subject: Subject) -> None:
    student, teacher, images, labels = subject.student, subject.teacher, subject.images.double(), subject.labels
    for net in (student.net, teacher.net):
        net.double()  # the logits are almost equal: in float32 their difference has few digits
    config = replace(steps.CONFIG, difficulty_threshold=0.9, ce_weight=0.5)
    filtered = gaussian_lowpass(images, 5.0)
    view = teacher_response(teacher, filtered, labels)
    fast, terms = training_loss(student.net, student, view, filtered, labels, config)
    slow = textbook_loss(student, teacher, images, labels, config, 5.0)
    torch.testing.assert_close(slow, fast, rtol=1e-9, atol=0)
    assert 0 < float(terms["kept"]) < 1 and float(terms["cam"]) > 0

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(student.net.parameters())))

    slow_gradient, fast_gradient = (torch.cat([part.flatten() for part in gradients(loss)]) for loss in (slow, fast))
    assert float((slow_gradient - fast_gradient).norm() / fast_gradient.norm()) < 1e-9


def test_every_round_runs_every_call_once_in_rotating_order() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], None]] = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = alternate(calls, rounds=3, device=CPU)
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(part) == list("abc") for part in rounds) and len({part[0] for part in rounds[1:]}) == 3
    assert {len(values) for values in times.seconds.values()} == {3}


def test_ratios_are_taken_round_by_round() -> None:
    times = Times({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]})
    assert times.ratio("a", "b") == Spread(2.0, 1.5, 2.5) and times.of("b").median == 2.0
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_a_table_lists_missed_targets() -> None:
    def row(value: float, target: Target | None) -> Row:
        return Row(group="g", what="w", value=Spread(value, value / 2, value), unit="x", target=target)

    rows = [row(2.0, Target(at_most=3)), row(4.0, Target(at_most=3)), row(4.0, Target(at_least=4)), row(1.0, None)]
    text = markdown([("Title", rows)], machine(CONTEXT))
    assert [row.verdict() for row in rows] == ["yes", "NO", "yes", ""]
    assert "### Title" in text and "| w | 4 x | 2 to 4 | <= 3: NO |  |" in text and "threads 1" in text
    found = as_json([("Title", rows)], machine(CONTEXT))
    assert [row["met"] for row in found["rows"]] == [True, False, True, None]
    assert found["facts"]["torch"] == torch.__version__


def test_steps_do_not_change_the_student(subject: Subject) -> None:
    before = {name: value.clone() for name, value in subject.student.net.state_dict().items()}
    for step in steps.calls(subject).values():
        step()
    assert all(torch.equal(value, before[name]) for name, value in subject.student.net.state_dict().items())


@pytest.mark.parametrize(
    ("group", "count"),
    [(steps, 7), (ceilings, 15), (synthesis, 3), pytest.param(population, 4, marks=pytest.mark.slow)],
    ids=["steps", "ceilings", "synthesis", "population"],
)
def test_groups_return_their_rows(subject: Subject, monkeypatch: pytest.MonkeyPatch, group: object, count: int) -> None:
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**20})
    found = list(group.rows(CONTEXT))  # type: ignore[attr-defined]
    assert len(found) == count and len({row.what for row in found}) == count
    assert all(torch.isfinite(torch.tensor([row.value.median, row.value.low, row.value.high])).all() for row in found)


def test_fit_through_zero() -> None:
    assert curves.fit_through_zero([1, 2, 4], [3.0, 6.0, 12.0]) == (3.0, 0.0)
    slope, misfit = curves.fit_through_zero([1, 2], [1.0, 4.0])
    assert slope == 1.5 and misfit == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_worker_trains_on_disk_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--tiny", "--images", "24", "--batch", "8", "--epochs", "3", "--device", "cpu"]
    found = result(start([*SOLO, *args]))
    assert len(found["epoch_seconds"]) == 3 == len(found["memory_after_epoch"])
    assert found["processes"] == 1 and found["peak"] >= max(found["memory_after_epoch"]) > 2**20


@pytest.mark.slow
def test_the_error_of_a_failed_worker_has_the_reason() -> None:
    with pytest.raises(WorkerError, match=r"(?s)process of the benchmark must exit with code 0.*batch_size"):
        result(start([*SOLO, "--tiny", "--images", "4", "--batch", "8", "--device", "cpu"]))


def test_the_command_writes_what_it_prints(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--only", "steps", "--rounds", "1", "--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["rows"]) == 7 and found["facts"]["rounds"] == 1
    for row in found["rows"]:
        assert row["what"] in out and row["what"] in (tmp_path / "bench.md").read_text()
    assert re.search(r"bench\.md \| 3 targets, \d missed", out)


@pytest.mark.parametrize("args", [["--only", "nothing"], ["--rounds", "0"], ["--threads", "-1"]])
def test_invalid_arguments_are_rejected(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*args, "--output-dir", str(tmp_path / "out")]
    assert main(args) == 2 and "error" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_rejected_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--only", "steps", "--output-dir", str(tmp_path / "file" / "deeper")]) == 2
    assert "file" in capsys.readouterr().err


def test_every_group_has_its_module() -> None:
    assert tuple(GROUPS) == bench.GROUPS
    for name in GROUPS:
        assert callable(rows_of(name))


@pytest.mark.slow
def test_two_processes_train_one_student_together() -> None:
    args = ["--tiny", "--images", "32", "--batch", "8", "--epochs", "2", "--device", "cpu"]
    assert result(start([*TWO, *args]))["processes"] == 2
