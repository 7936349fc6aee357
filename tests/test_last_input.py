"""`last_bits` under act_points relu: the non-linearity that the last layer reads has it, too, and nothing else."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from student_tools import SIZE, Residual, trained
from torch import Tensor, nn

from synq.config_io import config_to_dict
from synq.configs import QuantConfig, RunConfig, config_digest, config_from_dict, with_overrides
from synq.results import RunRecord, read_record, write_record
from synq.students import Student, quantize_model
from synq.tracing import trace_classifier
from synq.width_problem import WidthProblem


class _Head(nn.Module):
    """Two branches of a convolution and a non-linearity, and a head that joins them in a way to be chosen."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout()
        self.fc = nn.Linear(16 if join == "cat" else 4 if join == "halves" else 8, 5)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)), F.silu(self.b(x))
        y = {
            "norm": lambda: self.norm(second + first.mean()),
            "cat": lambda: torch.cat([first, second], 1),
            "sum": lambda: first + second,
            "convolution": lambda: self.between(first),
            "halves": lambda: first.chunk(2, 1)[0],
            "scaled": lambda: first * 0.5,
            "plain": lambda: self.norm(first),
        }[self.join]()
        y = F.avg_pool2d(y, 2).mean((2, 3))
        return self.fc(self.drop(y.view(y.size(0), -1)))


def _student(net: nn.Module, **options: object) -> Student:
    traced = trace_classifier(trained(net), SIZE)
    return quantize_model(traced, weight_bits=3, act_bits=3, **options)  # type: ignore[arg-type]


def _activations(student: Student) -> dict[str, int]:
    return {row.name: row.bits for row in student.rows if row.role == "activation" and row.bits < 32}


@pytest.mark.parametrize(
    ("join", "widths"),
    [
        ("plain", {"relu": 8}),
        ("cat", {"relu": 8, "silu": 8}),
        ("halves", {"relu": 8}),
        ("scaled", {"relu": 8}),
        ("sum", {"relu": 3, "silu": 3}),
        ("norm", {"relu": 3, "silu": 3}),
        ("convolution", {"relu": 3}),
    ],
)
def test_what_the_last_layer_reads(join: str, widths: dict[str, int]) -> None:
    """Pooled, normalised, scaled, cut or joined it is still read; a sum and another layer's output are values of their own."""
    student = _student(_Head(join), last_bits=8)
    assert _activations(student) == widths
    assert student.before_last == {name for name, bits in widths.items() if bits == 8}


def test_it_can_be_left_as_the_rest_and_named() -> None:
    assert _activations(_student(Residual(), last_bits=8)) == {"relu": 3, "relu_1": 3, "relu_2": 8}
    narrow = _student(Residual(), last_bits=8, last_bits_for_input=False)
    assert _activations(narrow) == {"relu": 3, "relu_1": 3, "relu_2": 3} and not narrow.before_last
    named = _student(Residual(), last_bits=8, layer_act_bits={"relu_2": 5, "relu": 6})
    assert _activations(named) == {"relu": 6, "relu_1": 3, "relu_2": 5}
    assert _activations(_student(Residual(), first_bits=8)) == {"relu": 3, "relu_1": 3, "relu_2": 3}


def test_its_width_is_no_choice_of_a_scan() -> None:
    quant = QuantConfig(weight_bits=3, act_bits=3, last_bits=8)
    problem = WidthProblem(_student(Residual(), last_bits=8), quant, activations=True)
    free = {name for role, name in problem.free if role == "activation"}
    assert free == {"relu", "relu_1"} and problem.as_given["activation", "relu_2"] == 8


def test_older_runs_keep_their_digest_and_are_ranked_apart(tmp_path: Path) -> None:
    """Until there was this setting, the activation before the last layer had the width of the rest."""
    new = RunConfig(quant=QuantConfig(last_bits=8))
    stored = config_to_dict(new)
    del stored["quant"]["last_bits_for_input"]
    write_record(tmp_path / "old.json", RunRecord(config=stored))
    old = config_from_dict(RunConfig, read_record(tmp_path / "old.json").config)
    assert not old.quant.last_bits_for_input and config_digest(old) != config_digest(new)
    assert (old.quant.layer_label, new.quant.layer_label) == ("last_input=A4", "")
    for words in ({"quant.act_points": "inputs"}, {"quant.last_bits": None}, {"quant.last_bits": 4}):
        narrow, wide = with_overrides(old, words), with_overrides(new, words)
        assert config_digest(narrow) == config_digest(wide) and narrow.quant.layer_label == ""
