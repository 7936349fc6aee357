"""`last_bits` under act_points relu: the non-linearity that the last layer reads has it, too, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.records import record
from support.student_tools import SIZE, Residual, trained
from support.sweep_tools import TINY, tiny
from synq.config.parsing import config_to_dict
from synq.config.run import QuantConfig, RunConfig, TeacherConfig, config_digest, config_from_dict, with_overrides
from synq.export.load import load_student
from synq.export.packed import load_packed, save_packed
from synq.mixed_precision.problem import MixedPrecisionProblem
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form
from synq.quant.student import Student, build_student, observe_ranges, quantize_model
from synq.runs.record import RunRecord, read_record, summary_line, write_record
from synq.sweeps.leaderboard.records import leaderboard_rows
from synq.sweeps.leaderboard.views import protocol_of
from synq.sweeps.reports.summary import run_facts
from synq.sweeps.state.ledger import Ledger
from synq.teacher.teacher import load_teacher


class _Head(nn.Module):
    """Two branches of a convolution and a non-linearity, and a head that joins and pools them in a way to be chosen."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout()
        self.gain = nn.Parameter(torch.rand(8))
        self.fc = nn.Linear(16 if head == "cat" else 4 if head == "half" else 8, 5)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)), F.silu(self.b(x))
        y = {
            "norm": lambda: self.norm(first),
            "half": lambda: first.chunk(2, 1)[0],
            "scale": lambda: first * 0.5 * self.gain.view(1, -1, 1, 1),
            "two pools": lambda: 0.5 * (F.adaptive_avg_pool2d(first, 1) + F.adaptive_max_pool2d(first, 1)),
            "size": lambda: F.avg_pool2d(first, first.size()[3]),
            "sizes": lambda: F.avg_pool2d(first, first.shape[2:]),  # type: ignore[arg-type]
            "sum over sizes": lambda: first.sum((2, 3), keepdim=True) / (first.size(2) * first.size(3)),
            "cat": lambda: torch.cat([first, second], 1),
            "sum": lambda: first + second,
            "sum with itself and another": lambda: first + F.avg_pool2d(first, 3, 1, 1) + second,
            "convolution": lambda: self.between(first),
            "gate": lambda: first * second.mean((2, 3), keepdim=True),
        }[self.head]()
        y = y.mean((2, 3))
        return self.fc(self.drop(y.view(y.shape[0], -1)))


def _student(net: nn.Module, **options: object) -> Student:
    traced = trace_classifier(trained(net), SIZE)
    return quantize_model(traced, QuantConfig(weight_bits=3, act_bits=3, **options))  # type: ignore[arg-type]


def _activations(student: Student) -> dict[str, int]:
    return {row.name: row.bits for row in student.rows if row.role == "activation" and row.bits < 32}


@pytest.mark.parametrize("head", ["norm", "half", "scale", "two pools", "size", "sizes", "sum over sizes"])
def test_the_last_layer_reads_what_is_pooled_scaled_or_cut_on_the_way(head: str) -> None:
    student = _student(_Head(head), last_bits=8)
    assert _activations(student) == {"relu": 8} and student.at_ends == {"relu"}


def test_the_last_layer_reads_all_that_is_joined() -> None:
    assert _student(_Head("cat"), last_bits=8).at_ends == {"relu", "silu"}


@pytest.mark.parametrize("head", ["sum", "sum with itself and another", "convolution"])
def test_a_sum_and_another_layers_output_are_values_of_their_own(head: str) -> None:
    student = _student(_Head(head), last_bits=8)
    assert {*_activations(student).values()} == {3} and not student.at_ends


def test_of_a_gate_the_product_is_read() -> None:
    student = _student(_Head("gate"), last_bits=8)
    assert student.at_ends == {"mul"} and _activations(student) == {"relu": 3, "silu": 3, "mul": 8}


class _TwiceLast(nn.Module):
    """The last layer is called twice, and followed by a non-linearity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.last(F.relu(self.conv(x))))
        return F.hardtanh(self.last(y)).mean((2, 3))


def test_every_call_of_the_last_layer_counts_and_nothing_after_it() -> None:
    assert _activations(_student(_TwiceLast(), last_bits=8)) == {"relu": 8, "silu": 8, "hardtanh": 3}


def test_a_long_chain_of_cuts_and_joins_takes_no_time() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            for _ in range(60):
                y = torch.cat(y.chunk(2, 1)[::-1], 1)
            return self.fc(y.mean((2, 3)))

    assert _student(Chain(), last_bits=8).at_ends == {"relu"}


def test_it_can_be_left_as_the_rest_and_named() -> None:
    assert _activations(_student(Residual(), last_bits=8)) == {"relu": 3, "relu_1": 3, "relu_2": 8}
    narrow = _student(Residual(), last_bits=8, last_bits_for_input=False)
    assert _activations(narrow) == {"relu": 3, "relu_1": 3, "relu_2": 3} and not narrow.at_ends
    named = _student(Residual(), last_bits=8, layer_act_bits={"relu_2": 5, "relu": 6})
    assert _activations(named) == {"relu": 6, "relu_1": 3, "relu_2": 5}
    assert _activations(_student(Residual(), first_bits=8)) == {"relu": 3, "relu_1": 3, "relu_2": 3}


def test_its_width_is_no_choice_of_a_scan() -> None:
    quant = QuantConfig(weight_bits=3, act_bits=3, last_bits=8)
    problem = MixedPrecisionProblem(_student(Residual(), last_bits=8), quant, activations=True)
    free = {name for role, name in problem.free if role == "activation"}
    assert free == {"relu", "relu_1"} and problem.as_given["activation", "relu_2"] == 8


def test_runs_of_both_kinds_have_digests_and_labels_of_their_kind(tmp_path: Path) -> None:
    wide = RunConfig(quant=QuantConfig(last_bits=8))
    write_record(tmp_path / "narrow.json", RunRecord(config=config_to_dict(_narrow(wide))))
    narrow = config_from_dict(RunConfig, read_record(tmp_path / "narrow.json").config)
    assert not narrow.quant.last_bits_for_input and config_digest(narrow) != config_digest(wide)
    assert (narrow.quant.layer_label, wide.quant.layer_label) == ("last_bits=weights_only", "")
    for changes in ({"quant.act_points": "inputs"}, {"quant.last_bits": None}, {"quant.last_bits": 4}):
        one, other = with_overrides(narrow, changes), with_overrides(wide, changes)
        assert config_digest(one) == config_digest(other) and one.quant.layer_label == "", "inactive"


def _narrow(config: RunConfig) -> RunConfig:
    return with_overrides(config, {"quant.last_bits_for_input": False})


def test_a_packed_file_opens_as_the_kind_it_is(tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig())
    quant = QuantConfig(last_bits=8, last_bits_for_input=False)
    student = build_student(teacher, quant)
    sample = torch.randn(4, *teacher.input_size)
    observe_ranges(student.net, sample, act_range="minmax")
    config = config_to_dict(RunConfig(quant=quant))
    about = {"config": config, "input_size": list(teacher.input_size), "num_classes": teacher.num_classes}
    form = integer_form(student.net)
    save_packed(tmp_path / "narrow.safetensors", form, about)
    assert torch.equal(load_student(tmp_path / "narrow.safetensors")(sample), form(sample))
    wide = build_student(teacher, QuantConfig(last_bits=8)).net
    with pytest.raises(ValueError, match=r"relu_6', 4\) where .*relu_6', 8\) is expected"):
        load_packed(tmp_path / "narrow.safetensors", wide)


def test_a_search_over_widths_does_not_go_on_with_students_of_another_kind(tmp_path: Path) -> None:
    """At the first of its widths the setting counts for nothing, at the others it does."""

    def ledger(folder: str, **quant: object) -> Ledger:
        keys: dict[str, Any] = {
            "bits": ["W8A8", "W4A4"],
            "second_objective": "size_bytes",
            "sampler": "nsga2",
            "scheduler": "none",
        }
        return Ledger(
            tiny(tmp_path / folder, **keys, base={**TINY["base"], "quant": {**TINY["base"]["quant"], **quant}})
        )

    narrow = ledger("a", last_bits=8, last_bits_for_input=False)
    narrow.open()
    narrow.close()
    with pytest.raises(ValueError, match="`output_dir` must be new or hold the same sweep"):
        ledger("a", last_bits=8).open()
    for again in (
        ledger("a", last_bits=8, last_bits_for_input=False),
        ledger("b", last_bits=8),
        ledger("b", last_bits=8),
    ):
        again.open()
        again.close()


def test_a_comparison_tells_the_two_apart() -> None:
    configs = [{"quant.last_bits": 8, "quant.last_bits_for_input": wide} for wide in (True, False)]
    configs.append({"quant.last_bits": 8, "quant.layer_weight_bits": {"conv1": 8}})
    rows = leaderboard_rows([record(0.1 + i, overrides=config) for i, config in enumerate(configs)])
    assert {protocol_of(row) for row in rows} == {"B (-/8)", "B (-/8, last_bits=weights_only)", "B (-/8, mixed)"}


def test_the_ends_stand_beside_the_protocol_of_a_run() -> None:
    ends = config_to_dict(RunConfig(quant=QuantConfig(first_bits=8, last_bits=8)))
    run = RunRecord(config=ends, model="net", weight_bits=4, act_bits=4, protocol="B", act_points="relu")
    assert summary_line(run).startswith("net W4A4 B (8/8) relu")
    assert ("protocol", "B (8/8), relu") in run_facts(run)
    plain = dataclasses.replace(run, config=config_to_dict(RunConfig()), protocol="A")
    assert summary_line(plain).startswith("net W4A4 A relu")
