"""Counts are exact under any batch size; fidelity is what its formulas say; nothing moves while measuring."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.configs import EvaluationConfig, TeacherConfig
from synq.evaluation import Measure, evaluate, fidelity
from synq.teachers import load_teacher


class Echo(nn.Module):
    """Gives back its input as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("batch_size", [1, 7, 82, 500])
def test_counts_are_exact(accelerator: Accelerator, batch_size: int) -> None:
    logits = torch.randn(82, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 9, (82,), generator=torch.Generator().manual_seed(1))
    got = evaluate(
        Echo(),
        lambda rows: (logits[rows], labels[rows]),
        torch.arange(82),
        batch_size=batch_size,
        accelerator=accelerator,
    )
    order = logits.argsort(1, descending=True)
    first = sum(int(order[i, 0] == labels[i]) for i in range(82))
    five = sum(int(labels[i] in order[i, :5]) for i in range(82))
    assert (got.top1, got.top5, got.num_images) == (100 * first / 82, 100 * five / 82, 82)


def test_top5_of_three_classes_is_everything(accelerator: Accelerator) -> None:
    labels = torch.tensor([0, 1, 2])
    got = evaluate(
        Echo(), lambda rows: (torch.eye(3)[rows], labels[rows]), torch.arange(3), batch_size=2, accelerator=accelerator
    )
    assert (got.top1, got.top5) == (100.0, 100.0)


def test_nothing_to_count_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="at least one labelled image"):
        evaluate(Echo(), lambda rows: (rows, rows), torch.arange(0), batch_size=2, accelerator=accelerator)


def test_fidelity_by_hand(accelerator: Accelerator) -> None:
    wanted = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x == x.amax(1, keepdim=True), 0.0, math.log(3)).flip(1)

    got = fidelity(Echo(), Other(), wanted, batch_size=1, accelerator=accelerator)
    # Image 1: (1/2, 1/2) against (1/2, 1/2). Image 2: (3/4, 1/4) against (3/4, 1/4).
    assert got["kl"] == pytest.approx(0.0, abs=1e-7)
    uniform = fidelity(Echo(), lambda_module(lambda x: 0 * x), wanted, batch_size=2, accelerator=accelerator)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert uniform["kl"] == pytest.approx(expected / 2, rel=1e-6)
    assert uniform["logit_mse"] == pytest.approx((math.log(3) / 2) ** 2 / 2, rel=1e-6)


def lambda_module(function: object) -> nn.Module:
    return type("Lambda", (nn.Module,), {"forward": lambda self, x: function(x)})()  # type: ignore[operator]


def test_measuring_has_no_side_effect(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    before = {key: value.clone() for key, value in tiny_classifier.state_dict().items()}
    x = torch.randn(10, 3, 8, 8)
    fidelity(tiny_classifier, tiny_classifier, x, batch_size=4, accelerator=accelerator)
    assert all(torch.equal(value, before[key]) for key, value in tiny_classifier.state_dict().items())
    assert not [m for m in tiny_classifier.modules() if m._forward_hooks]


def test_selection_part_and_reported_part_are_disjoint(accelerator: Accelerator) -> None:
    teacher = load_teacher(TeacherConfig())
    measure = Measure.prepare(EvaluationConfig(objective="selection", selection_fraction=0.3), teacher, accelerator)
    measure.heldout = torch.randn(4, *teacher.input_size)
    assert measure.labelled is not None
    assert len(measure.chosen) + len(measure.reported) == len(measure.labelled)
    assert not set(measure.chosen.tolist()) & set(measure.reported.tolist())
    result = measure(teacher.graph)
    assert result.num_eval == len(measure.reported)
    assert result.objective == measure.objective(teacher.graph) > 90


def test_synthetic_objective_of_the_teacher_itself_is_zero(accelerator: Accelerator) -> None:
    teacher = load_teacher(TeacherConfig())
    measure = Measure.prepare(EvaluationConfig(dataset="none"), teacher, accelerator)
    measure.heldout = torch.randn(4, *teacher.input_size)
    result = measure(teacher.graph)
    assert result.objective == pytest.approx(0.0, abs=1e-12) and result.fidelity["agreement"] == 100.0
    assert (result.top1, result.num_eval) == (None, None)


def test_selection_without_labels_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match=r"evaluation.objective.* must be synthetic"):
        Measure.prepare(
            EvaluationConfig(dataset="none", objective="selection"), load_teacher(TeacherConfig()), accelerator
        )
