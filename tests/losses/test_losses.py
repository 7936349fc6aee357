import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from support import reference
from synq.losses import (
    LossWeights,
    cam_loss,
    difficulty,
    feature_loss,
    inception_loss,
    kd_kl,
    masked_cross_entropy,
    synq_loss,
    top2_cross_entropy,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(num_images: int = 8, classes: int = 4) -> dict[str, Tensor]:
    """A batch whose first half is easy for the teacher and whose second half is hard."""
    labels = torch.arange(num_images) % classes
    teacher = randn(num_images, classes)
    teacher[torch.arange(num_images), labels] += torch.where(torch.arange(num_images) < num_images // 2, 6.0, -3.0)
    return {
        "student_logits": randn(num_images, classes, seed=1),
        "student_map": randn(num_images, 3, 5, seed=2).relu(),
        "teacher_logits": teacher,
        "teacher_map": randn(num_images, 3, 5, seed=3).relu(),
        "labels": labels,
    }


WEIGHTS = LossWeights(kd_temperature=4.0, kd_weight=1.5, ce_weight=0.1, cam_weight=20.0, difficulty_threshold=0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_against_twin(temperature: float) -> None:
    student, teacher = randn(5, 7) * 3, randn(5, 7, seed=1) * 3
    got = kd_kl(student, teacher, temperature)
    want = [reference.kd_kl(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(kd_kl(teacher, teacher, temperature), torch.zeros(5, dtype=torch.float64))


def test_kd_is_directed_and_scaled() -> None:
    # KL(teacher || student) punishes a student that rules out what the teacher allows; T^2 keeps the gradient's size
    # over T.
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(kd_kl(sure, unsure, 1.0)) > 3 > 1 > float(kd_kl(unsure, sure, 1.0))
    sizes = []
    for temperature in (10.0, 40.0):
        student = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
        (gradient,) = torch.autograd.grad(kd_kl(student, torch.tensor([[1.0, 0.0, -1.0]]), temperature).sum(), student)
        sizes.append(float(gradient.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    with pytest.raises(ValueError, match="`kd_temperature` must be > 0"):
        kd_kl(sure, unsure, 0.0)


@given(st.lists(st.floats(-40, 40), min_size=2, max_size=6), st.integers(0, 5), st.booleans())
def test_difficulty_against_twin(logits: list[float], label: int, single: bool) -> None:
    y = label % len(logits)
    x = torch.tensor([logits], dtype=torch.float32 if single else torch.float64)
    got = float(difficulty(x, torch.tensor([y])))
    assert got == pytest.approx(reference.one_minus_p(x[0].tolist(), y), rel=2e-5, abs=1e-30)
    assert 0.0 <= got <= 1.0


def test_difficulty_keeps_its_digits_near_certainty() -> None:
    logits = torch.tensor([[20.0, 0.0]])
    assert float(difficulty(logits, torch.tensor([0]))) == pytest.approx(2.0611536e-9, rel=1e-5)
    assert float(difficulty(logits, torch.tensor([1]))) == 1.0
    assert 1.0 - float(logits.softmax(1)[0, 0]) == 0.0  # the plain subtraction says "no doubt at all"


def test_threshold_one_keeps_all_and_half_keeps_only_what_the_teacher_gets_right() -> None:
    x = batch()
    hopeless = dict(x, teacher_logits=torch.full((8, 4), 50.0).scatter(1, x["labels"][:, None], -50.0))
    assert float(synq_loss(**hopeless, weights=replace(WEIGHTS, difficulty_threshold=1.0))[1]["kept"]) == 1.0
    assert float(synq_loss(**hopeless, weights=WEIGHTS)[1]["kept"]) == 0.0
    kept = difficulty(x["teacher_logits"], x["labels"]) < 0.5
    assert 0 < int(kept.sum()) < 8
    assert torch.equal(x["teacher_logits"].argmax(1)[kept], x["labels"][kept])


def test_difficulty_never_exceeds_one() -> None:
    # Rounding may push the sum of the other probabilities above 1; a threshold of 1 would then drop the image.
    logits = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = -60.0
    labels = torch.zeros(2000, dtype=torch.int64)
    assert float(logits.softmax(1)[:, 1:].sum(1).max()) > 1.0
    assert float(difficulty(logits, labels).max()) == 1.0


def test_masked_images_cost_nothing() -> None:
    logits = randn(4, 3).requires_grad_()
    labels, keep = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, False])
    loss = masked_cross_entropy(logits, labels, keep)
    want = [reference.cross_entropy(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx([want[0], 0.0, want[2], 0.0])
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((gradient[1] == 0).all() and (gradient[3] == 0).all() and (gradient[0] != 0).all())


def test_masking_all_gives_zero_and_no_nan() -> None:
    # A mean over the kept images would be 0 / 0 here.
    x = batch()
    loss, terms = synq_loss(**x, weights=replace(WEIGHTS, difficulty_threshold=0.0))
    assert float(terms["kept"]) == 0.0 and float(terms["ce"]) == 0.0 and bool(torch.isfinite(loss))


def test_whole_loss_against_twin() -> None:
    x = batch()
    loss, terms = synq_loss(**x, weights=WEIGHTS)
    names = ("student_logits", "student_map", "teacher_logits", "teacher_map", "labels")
    want = reference.synq_loss(*(x[name].tolist() for name in names), 4.0, 1.5, 0.1, 20.0, 0.5)
    assert float(loss) == pytest.approx(want, rel=1e-12)
    assert float(terms["kept"]) == 0.5
    total = 1.5 * terms["kd"] + 0.1 * terms["ce"] + 20.0 * terms["cam"]
    assert float(loss) == pytest.approx(float(total), rel=1e-12)
    assert all(not term.requires_grad for term in terms.values())


@pytest.mark.parametrize("threshold", [0.5, 0.02, 1.0])
def test_mean_of_two_halves_is_the_whole(threshold: float) -> None:
    # Trap 6: the halves keep different shares; a denominator of kept images would make another loss and another
    # gradient.
    x = batch()
    x["student_logits"].requires_grad_()
    weights = replace(WEIGHTS, difficulty_threshold=threshold)
    whole, terms = synq_loss(**x, weights=weights)
    (gradient,) = torch.autograd.grad(whole, x["student_logits"])
    parts = [synq_loss(**{k: v[rows] for k, v in x.items()}, weights=weights) for rows in (slice(0, 4), slice(4, 8))]
    if threshold == 0.5:
        assert [float(p[1]["kept"]) for p in parts] == [1.0, 0.0]
    halves = (parts[0][0] + parts[1][0]) / 2
    assert halves.item() == pytest.approx(whole.item(), rel=1e-12)
    (halves_gradient,) = torch.autograd.grad(halves, x["student_logits"])
    torch.testing.assert_close(halves_gradient, gradient, atol=1e-15, rtol=1e-12)
    for name in ("kd", "ce", "cam", "kept"):
        assert float((parts[0][1][name] + parts[1][1][name]) / 2) == pytest.approx(float(terms[name]), rel=1e-12)


def test_teacher_side_gets_no_gradient() -> None:
    x = batch()
    for name in ("student_logits", "student_map", "teacher_logits", "teacher_map"):
        x[name].requires_grad_()
    synq_loss(**x, weights=WEIGHTS)[0].backward()
    assert x["teacher_logits"].grad is None and x["teacher_map"].grad is None
    assert x["student_logits"].grad is not None and x["student_map"].grad is not None


def test_terms_of_weight_zero_and_absent_maps() -> None:
    x = batch()
    with_maps, terms = synq_loss(**x, weights=replace(WEIGHTS, cam_weight=0.0))
    without, bare = synq_loss(**dict(x, student_map=None, teacher_map=None), weights=WEIGHTS)
    assert float(with_maps) == float(without)
    assert float(terms["cam"]) > 0 and float(bare["cam"]) == 0
    broken = dict(x, student_map=x["student_map"] * float("nan"))
    assert bool(torch.isfinite(synq_loss(**broken, weights=replace(WEIGHTS, cam_weight=0.0))[0]))
    assert bool(torch.isnan(synq_loss(**broken, weights=WEIGHTS)[0]))  # a NaN that counts is never hidden
    with pytest.raises(ValueError, match="must both be given"):
        synq_loss(**dict(x, teacher_map=None), weights=WEIGHTS)


def test_half_precision_logits_are_widened() -> None:
    x = {k: v if k == "labels" else v.bfloat16() for k, v in batch().items()}
    loss, terms = synq_loss(**x, weights=WEIGHTS)
    assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in terms.values())
    wide = synq_loss(**{k: v if k == "labels" else v.float() for k, v in x.items()}, weights=WEIGHTS)[0]
    assert float(loss) == pytest.approx(float(wide), rel=1e-6)


def test_cam_loss_is_the_squared_frobenius_norm() -> None:
    a, b = randn(3, 4, 5), randn(3, 4, 5, seed=1)
    torch.testing.assert_close(cam_loss(a, b), torch.linalg.matrix_norm(a - b) ** 2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_inception_loss_against_twin(gamma: float) -> None:
    logits, labels = randn(6, 5) * 3, torch.tensor([0, 1, 2, 3, 4, 0])
    got = inception_loss(logits, labels, gamma)
    want = [reference.inception_loss(z, y, gamma) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    if gamma == 0:
        torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [5.0, 15.0, 17.0, 20.0, 100.0, 1e4])
def test_inception_gradient_is_finite_up_to_certainty(gamma: float, margin: float) -> None:
    # Trap 3. From a margin of about 17 on, float32 says p == 1 exactly; (1 - p)^0.5 has an infinite slope there.
    logits = torch.tensor([[margin, 0.0, 0.0], [0.0, margin, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    if margin >= 20:
        assert logits.detach().softmax(1)[0, 0].item() == 1.0
    loss = inception_loss(logits, labels, gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())
    # The weight is at most 1 and the slope of the sure image small: it must not throw the others of its batch about.
    plain = inception_loss(logits, labels, 0.0)
    assert bool((loss <= plain + 1e-6).all())
    assert float(gradient[0].abs().max()) <= 1.0


def test_inception_gradient_against_float64() -> None:
    for gamma in (0.5, 1.0, 2.0):
        for margin in (0.0, 2.0, 8.0):
            slopes = []
            for dtype in (torch.float32, torch.float64):
                logits = torch.tensor([[margin, 0.0, -1.0]], dtype=dtype, requires_grad=True)
                (gradient,) = torch.autograd.grad(inception_loss(logits, torch.tensor([0]), gamma).sum(), logits)
                slopes.append(gradient.double())
            torch.testing.assert_close(slopes[0], slopes[1], rtol=2e-3, atol=1e-9)


def test_inception_refuses_negative_gamma() -> None:
    with pytest.raises(ValueError, match="`hard_sample_gamma` must be >= 0"):
        inception_loss(torch.zeros(1, 2), torch.tensor([0]), -1.0)


def test_feature_loss_is_relative_and_averages_blocks() -> None:
    teacher = [torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]]), torch.ones(2, 1, 1, 4)]
    student = [torch.tensor([[[[3.0, 0.0]]], [[[0.0, 3.0]]]]), torch.zeros(2, 1, 1, 4)]
    torch.testing.assert_close(feature_loss(student, teacher), torch.tensor([(16 / 25 + 1) / 2, (1 / 4 + 1) / 2]))
    scaled = feature_loss([10 * part for part in student], [10 * part for part in teacher])
    torch.testing.assert_close(scaled, feature_loss(student, teacher))
    dead = torch.ones(1, 1, 1, 2).requires_grad_()  # where the teacher is silent there is no measure, and no infinity
    loss = feature_loss([dead], [torch.zeros(1, 1, 1, 2)])
    (slope,) = torch.autograd.grad(loss.sum(), dead)
    assert float(loss.detach()) == 0.0 and not slope.any()
    with pytest.raises(
        ValueError, match="as many blocks of the student as of the teacher, at least one, but got 1 and 2"
    ):
        feature_loss(student[:1], teacher)


def test_top2_takes_the_teachers_two_likeliest_classes() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).log()
    student = torch.tensor([[0.2, 0.5, 0.3]]).log()
    want = -(2 / 3 * math.log(0.2) + 1 / 3 * math.log(0.5))
    assert float(top2_cross_entropy(student, teacher)) == pytest.approx(want, rel=1e-5)


def test_difficult_images_get_two_labels_in_place_of_none() -> None:
    x = {
        "student_logits": torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]),
        "student_map": None,
        "teacher_logits": torch.tensor([[5.0, 0.0, 0.0], [1.0, 2.0, 0.5]]),
        "teacher_map": None,
        "labels": torch.tensor([0, 0]),  # easy for the teacher, difficult for it
    }
    dropped, two = (synq_loss(**x, weights=replace(WEIGHTS, top2=top2))[1]["ce"] for top2 in (False, True))
    extra = top2_cross_entropy(x["student_logits"], x["teacher_logits"])[1] / 2
    torch.testing.assert_close(two - dropped, extra)


def test_block_terms_enter_the_loss_by_their_weight() -> None:
    blocks = ([torch.zeros(4, 1, 2, 2)], [torch.ones(4, 1, 2, 2)])
    x = {"student_logits": torch.randn(4, 3), "teacher_logits": torch.randn(4, 3), "labels": torch.zeros(4).long()}
    x |= {"student_map": None, "teacher_map": None}
    plain = synq_loss(**x, weights=WEIGHTS)[0]
    loss, terms = synq_loss(
        **x, weights=replace(WEIGHTS, feature_weight=3.0), student_blocks=blocks[0], teacher_blocks=blocks[1]
    )
    assert float(terms["features"]) == 1.0
    torch.testing.assert_close(loss - plain, torch.tensor(3.0))


def test_the_defaults_of_the_weights_are_the_papers_equation() -> None:
    plain = LossWeights(ce_weight=0.1, cam_weight=20.0, difficulty_threshold=0.5)
    assert (plain.kd_weight, plain.kd_temperature, plain.feature_weight, plain.top2) == (1.0, 1.0, 0.0, False)


def test_the_floor_of_the_difficulty_is_the_spacing_at_one() -> None:
    labels = torch.tensor([0])
    assert float(inception_loss(torch.tensor([[200.0, 0.0]]), labels, 0.5)) == 0.0
    # 1 - p = 4.1e-8 is below the floor of 1e-7.
    found = float(inception_loss(torch.tensor([[17.0, 0.0]], dtype=torch.float64), labels, 0.5))
    assert found == pytest.approx(1e-7**0.5 * math.log1p(math.exp(-17)), rel=1e-3, abs=0)
    even = torch.tensor([[0.0, 0.0]])
    assert float(inception_loss(even, labels, 0.5) / F.cross_entropy(even, labels)) == pytest.approx(0.5**0.5)
