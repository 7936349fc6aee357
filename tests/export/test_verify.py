"""Comparisons computed by hand, and differences that exceed the tolerance."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from synq.export.verify import Comparison, Tolerance, compare

LOGITS = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 0.9], [4.0, 0.0]])


def compared(found: Tensor, labels: Tensor | None = None, margin: float = 0.0) -> Comparison:
    parts = [
        (LOGITS[:3], LOGITS[:3], None if labels is None else labels[:3]),
        (LOGITS[3:], LOGITS[3:], None if labels is None else labels[3:]),
    ]
    answers = iter([found[:3], found[3:]])
    return compare(lambda images: next(answers), parts, source="synthetic", margin=margin)


def test_a_comparison_by_hand() -> None:
    found = LOGITS.clone()
    found[2] = torch.tensor([0.8, 0.9])
    result = compared(found, torch.tensor([0, 0, 0, 0]))
    assert (result.images, result.decided, result.agreement, result.agreement_all) == (4, 4, 75.0, 75.0)
    assert result.max_difference == pytest.approx(0.2) and result.identical == 3
    assert result.mean_difference == pytest.approx(0.2 / 8 / float(LOGITS.std()))
    assert (result.student_top1, result.file_top1) == (75.0, 50.0)
    near = compared(found, margin=0.15)
    assert (near.margin, near.decided, near.agreement, near.agreement_all, near.student_top1) == (
        0.15,
        3,
        100.0,
        75.0,
        None,
    )


def test_no_images_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="at least one image, but there are no labeled images"):
        compare(lambda images: images, [], source="labeled")


def result(differing: int, decided: int, mean_difference: float = 0.0) -> Comparison:
    agreement = 100 * (1 - differing / decided)
    return Comparison(
        source="labeled",
        images=decided,
        margin=0.0,
        decided=decided,
        agreement=agreement,
        agreement_all=agreement,
        mean_difference=mean_difference,
        max_difference=1.0,
        identical=decided - differing,
    )


@pytest.mark.parametrize(
    ("differing", "decided", "good"),
    [(0, 10, True), (1, 10, True), (2, 10, False), (1, 1000, True), (2, 1000, False), (4, 4990, True), (5, 4990, False),
    (5, 5000, True)],
)  # fmt: skip
def test_one_image_in_a_thousand_may_differ(differing: int, decided: int, good: bool) -> None:
    violation = Tolerance().violation(result(differing, decided))
    assert (violation == "") is good
    assert good or f"for {differing} of {decided} labeled images" in violation


def test_logits_must_be_near_and_finite() -> None:
    assert Tolerance().violation(result(0, 10, 0.05)) == ""
    assert "logits differ from the student's by 0.06" in Tolerance().violation(result(0, 10, 0.06))
    assert "by nan" in Tolerance().violation(result(0, 10, math.nan))


def test_a_file_may_differ_twice_as_much_as_the_simulation() -> None:
    own = result(3, 1000, 0.04)
    assert Tolerance().violation(result(6, 1000, 0.08), own) == ""
    violation = Tolerance().violation(result(7, 1000), own)
    assert "for 7 of 1000" in violation and "with float sums the student differs for 3)" in violation
    assert "but by at most 0.08 is allowed" in Tolerance().violation(result(0, 1000, 0.09), own)
    sure = result(0, 1000)
    assert Tolerance().violation(result(1, 1000), sure) == "" and Tolerance().violation(result(2, 1000), sure)


def test_what_cannot_be_checked() -> None:
    shaky = result(101, 1000)
    assert "cannot be verified: with float sums the student" in Tolerance().violation(result(50, 1000), shaky)
    assert Tolerance().violation(result(50, 1000), result(100, 1000)) == "", "a tenth is not too much"
    assert Tolerance().violation(result(1, 1000), shaky) == "", "it agrees all the same"
    nothing = replace(result(0, 100), decided=0, margin=7.0, identical=99)
    assert "for none of 100 labeled images" in Tolerance().violation(nothing)
    assert Tolerance().violation(replace(nothing, identical=100)) == "", "bit-identical logits need no margin"


def test_l_1_exact_students_need_bit_identical_logits() -> None:
    """5 % of the deviation hides a pool that is divided by another number."""
    found = LOGITS.clone()
    found[3, 1] = 1e-6
    almost = compared(found)
    assert (almost.identical, almost.images) == (3, 4)
    assert Tolerance().violation(almost) == ""
    violation = Tolerance(agreement=0, mean_difference=9).violation(almost, exact=True)
    assert "differ from the student's for 1 of 4 synthetic images, by up to 1e-06" in violation
    assert Tolerance().violation(compared(LOGITS.clone()), exact=True) == ""
    broken = LOGITS.clone()
    broken[0] = math.nan
    assert Tolerance(agreement=0).violation(compared(broken), exact=True)
