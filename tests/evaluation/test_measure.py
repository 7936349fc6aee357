"""Counts are exact under any batch size; fidelity is what its formulas say; measuring changes nothing."""

import copy
import math
import typing

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from synq.config.run import FIDELITY_MEASURES, EvaluationConfig, QuantConfig, TeacherConfig
from synq.evaluation.fidelity import OBJECTIVES, kl, logit_mse
from synq.evaluation.measure import Accuracy, Measure, evaluate, lost_and_gained
from synq.evaluation.teacher_logits import TeacherLogits, fidelity
from synq.quant.integer_form import integer_form
from synq.quant.student import observe_ranges, quantize_model
from synq.teacher.teacher import Teacher, load_teacher


class Echo(nn.Module):
    """Gives back its input as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


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


def test_nothing_to_count_is_rejected(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="at least one labeled image"):
        evaluate(Echo(), lambda rows: (rows, rows), torch.arange(0), batch_size=2, accelerator=accelerator)


def test_fidelity_by_hand(accelerator: Accelerator) -> None:
    reference_logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x == x.amax(1, keepdim=True), 0.0, math.log(3)).flip(1)

    got = _fidelity(Other(), reference_logits, 1, accelerator)
    # Image 1: (1/2, 1/2) against (1/2, 1/2). Image 2: (3/4, 1/4) against (3/4, 1/4).
    assert got["kl"] == pytest.approx(0.0, abs=1e-7)
    uniform = _fidelity(lambda_module(lambda x: 0 * x), reference_logits, 2, accelerator)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert uniform["kl"] == pytest.approx(expected / 2, rel=1e-6)
    assert uniform["logit_mse"] == pytest.approx((math.log(3) / 2) ** 2 / 2, rel=1e-6)


def _fidelity(student: nn.Module, images: Tensor, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    reference = TeacherLogits.compute(Echo(), images, batch_size=batch_size, accelerator=accelerator)
    return fidelity(reference, student, {"kl": kl, "logit_mse": logit_mse}, accelerator=accelerator)


def lambda_module(function: object) -> nn.Module:
    return type("Lambda", (nn.Module,), {"forward": lambda self, x: function(x)})()  # type: ignore[operator]


def test_measuring_has_no_side_effect(tiny_classifier: nn.Module, accelerator: Accelerator) -> None:
    before = {key: value.clone() for key, value in tiny_classifier.state_dict().items()}
    x = torch.randn(10, 3, 8, 8)
    reference = TeacherLogits.compute(tiny_classifier, x, batch_size=4, accelerator=accelerator)
    fidelity(reference, tiny_classifier, {"kl": kl}, accelerator=accelerator)
    assert all(torch.equal(value, before[key]) for key, value in tiny_classifier.state_dict().items())
    assert not [m for m in tiny_classifier.modules() if m._forward_hooks]


def test_selection_part_and_reported_part_are_disjoint(accelerator: Accelerator) -> None:
    teacher = load_teacher(TeacherConfig())
    measure = Measure.prepare(
        EvaluationConfig(objective="selection", selection_fraction=0.3), teacher, accelerator, quant=QuantConfig()
    )
    measure.hold_out(torch.randn(4, *teacher.input_size))
    assert measure.labeled is not None
    assert len(measure.chosen) + len(measure.reported) == len(measure.labeled)
    assert not set(measure.chosen.tolist()) & set(measure.reported.tolist())
    result = measure(teacher.graph)
    assert result.num_eval == len(measure.reported)
    assert result.objective == measure.objective(teacher.graph) > 90


def test_synthetic_objective_of_the_teacher_itself_is_zero(accelerator: Accelerator) -> None:
    teacher = load_teacher(TeacherConfig())
    measure = Measure.prepare(EvaluationConfig(dataset="none"), teacher, accelerator, quant=QuantConfig())
    measure.hold_out(torch.randn(4, *teacher.input_size))
    result = measure(teacher.graph)
    assert result.objective == pytest.approx(0.0, abs=1e-12) and result.fidelity["agreement"] == 100.0
    assert (result.top1, result.num_eval) == (None, None)


def test_selection_without_labels_is_rejected(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match=r"evaluation.objective.* must be synthetic"):
        Measure.prepare(
            EvaluationConfig(dataset="none", objective="selection"),
            load_teacher(TeacherConfig()),
            accelerator,
            quant=QuantConfig(),
        )


@pytest.fixture(scope="module")
def measured(accelerator: Accelerator) -> tuple[Measure, fx.GraphModule]:
    """A prepared measure without labels, and a 3-bit student."""
    teacher = load_teacher(TeacherConfig())
    images = torch.randn(30, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    student = quantize_model(teacher.graph, QuantConfig(weight_bits=3, act_bits=3))
    observe_ranges(student.net, images, act_range="mse")
    return _measure(accelerator, teacher, images), student.net


def _measure(accelerator: Accelerator, teacher: Teacher, images: Tensor, **settings: object) -> Measure:
    measure = Measure.prepare(EvaluationConfig(dataset="none", **settings), teacher, accelerator, quant=QuantConfig())  # type: ignore[arg-type]
    measure.hold_out(images)
    return measure


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_the_mean_of_its_measure(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator, name: str
) -> None:
    teacher, images, student = measured[0].teacher, measured[0].heldout, measured[1]
    measure = _measure(accelerator, teacher, images, fidelity_measure=name)
    with torch.no_grad():
        expected = float(OBJECTIVES[name](teacher.graph(images), integer_form(student)(images)).mean())
    value = measure.objective(student)
    assert value == pytest.approx(expected, rel=1e-5) and value > 0
    result = measure(student)
    assert result.objective == result.fidelity[name] == value
    assert set(result.fidelity) == {"kl", "agreement", "logit_mse", name}
    assert measure(teacher.graph).objective == pytest.approx(0.0, abs=1e-9), "a lossless student"


def test_a_student_in_float64_or_of_nan_is_measured_as_it_is(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator
) -> None:
    measure, student = measured
    exact, broken = copy.deepcopy(student), copy.deepcopy(student)
    next(broken.parameters()).data.fill_(float("nan"))
    assert math.isnan(measure.objective(broken))
    seen: list[torch.dtype] = []
    exact.double().register_forward_hook(lambda net, inputs, logits: seen.append(logits.dtype))
    measure.objective(exact)
    assert set(seen) == {torch.float64}


def test_objective_is_the_same_for_every_trial_and_batch_size(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator
) -> None:
    one, student = measured
    again = _measure(accelerator, one.teacher, one.heldout)
    assert again.objective(student) == one.objective(student)
    split = _measure(accelerator, one.teacher, one.heldout, batch_size=7)
    assert split.objective(student) == pytest.approx(one.objective(student), rel=1e-5)


def test_teacher_runs_once_and_again_after_a_new_set(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator
) -> None:
    """The objective is measured after every epoch: it may cost the student's forward passes, not the teacher's."""
    one, student = measured
    measure = _measure(accelerator, one.teacher, one.heldout)
    seen: list[int] = []
    hook = measure.teacher.graph.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    first = measure.objective(student)
    once = sum(seen)
    assert once == 30
    measure.objective(student)
    assert sum(seen) == once
    measure.hold_out(one.heldout.flip(0) * 0.5)
    assert measure.objective(student) != first and sum(seen) == 2 * once
    hook.remove()


def test_configuration_and_mathematics_know_the_same_measures() -> None:
    hint = typing.get_type_hints(EvaluationConfig)["fidelity_measure"]
    assert typing.get_args(hint) == FIDELITY_MEASURES == tuple(OBJECTIVES)


class Rank:
    """One of several processes; keeps what it would add to the others' sums."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes = index, count
        self.others: list[Tensor] = []
        self.mine: Tensor | None = None

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.mine = tensor
        return torch.stack([tensor, *self.others]).sum(0)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_images_and_sum(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator, count: int
) -> None:
    one, student = measured
    whole = fidelity(
        TeacherLogits.compute(one.teacher.graph, one.heldout, batch_size=8, accelerator=accelerator),
        student,
        {"kl": kl, "logit_mse": logit_mse},
        accelerator=accelerator,
    )
    others: list[Tensor] = []
    for index in range(count):
        rank = Rank(index, count)
        rank.others = others
        reference = TeacherLogits.compute(one.teacher.graph, one.heldout, batch_size=8, accelerator=rank)  # type: ignore[arg-type]
        got = fidelity(reference, student, {"kl": kl, "logit_mse": logit_mse}, accelerator=rank)  # type: ignore[arg-type]
        assert rank.mine is not None and rank.mine[-1] == 30 / count
        others = [*others, rank.mine]
    assert got == pytest.approx(whole, rel=1e-5), "the last process has everybody's sums"


def _evaluated(logits: Tensor, labels: Tensor, rows: Tensor, rank: object, batch_size: int = 7) -> Accuracy:
    return evaluate(
        Echo(),
        lambda part: (logits[part], labels[part]),
        rows,
        batch_size=batch_size,
        accelerator=rank,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("num_images", "count"), [(82, 1), (82, 2), (82, 3), (2, 3)])
def test_lost_and_gained_are_exact_on_any_number_of_processes(num_images: int, count: int) -> None:
    """Brute force, image by image; 82 does not divide by 3, and of 2 images the third process has none."""
    generator = torch.Generator().manual_seed(3)
    before, after = torch.randn(2, 200, 4, generator=generator)
    labels = torch.randint(0, 4, (200,), generator=generator)
    rows = torch.arange(200)[5 : 5 + num_images]  # row numbers are not positions
    pairs = [(int(before[i].argmax() == labels[i]), int(after[i].argmax() == labels[i])) for i in rows.tolist()]
    others: list[Tensor] = []
    for index in range(count):
        rank = Rank(index, count)
        rank.others = [torch.tensor([0, 0, 1])]  # the share of the others, who have seen something
        first, second = (_evaluated(logits, labels, rows, rank) for logits in (before, after))
        rank.others = others
        found = lost_and_gained(first, second, accelerator=rank)  # type: ignore[arg-type]
        assert rank.mine is not None
        others = [*others, rank.mine]
    assert found == (pairs.count((1, 0)), pairs.count((0, 1)))
    assert num_images < 10 or min(found) > 0


def test_a_measurement_is_compared_with_the_teacher_image_by_image(
    measured: tuple[Measure, fx.GraphModule], accelerator: Accelerator
) -> None:
    teacher, student = measured[0].teacher, measured[1]
    measure = Measure.prepare(
        EvaluationConfig(dataset="digits", batch_size=50), teacher, accelerator, quant=QuantConfig()
    )
    measure.hold_out(measured[0].heldout)
    result, own = measure(student), measure(teacher.graph)
    assert measure.labeled is not None
    images, labels = measure.labeled.batch(measure.reported)
    with torch.no_grad():
        right = [net(images).argmax(1) == labels for net in (teacher.graph, student)]
    pairs = list(zip(*(part.tolist() for part in right), strict=True))
    assert (result.lost, result.gained) == (pairs.count((True, False)), pairs.count((False, True)))
    assert result.lost is not None and result.gained is not None and result.lost > 0
    assert own.top1 is not None and result.top1 is not None and result.num_eval == len(pairs)
    assert own.top1 - result.top1 == pytest.approx(100 * (result.lost - result.gained) / len(pairs))
    assert (own.lost, own.gained) == (0, 0)
    assert (measured[0](student).lost, measured[0](student).gained) == (None, None), "without labels"
