"""Each fidelity measure against its slow twin, and its limits."""

import math

import pytest
import torch
from torch import Tensor

from support import reference
from synq.evaluation.fidelity import sqnr_db
from synq.sweeps.studies.fidelity_study import MEASURES

pytestmark = pytest.mark.usefixtures("torch_rng_untouched")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("classes", [2, 7])
def test_measure_equals_its_twin(name: str, classes: int) -> None:
    teacher, student = 3 * draw(20, classes), 3 * draw(20, classes, seed=1)
    got = MEASURES[name](teacher, student)
    expected = [
        reference.fidelity_measures(t, s)[name] for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_measure_of_certain_answers_is_finite_and_of_equal_ones_is_least(name: str) -> None:
    """A certain teacher has probabilities that are 0 in float32: 0 log 0 must not be NaN."""
    logits = torch.tensor([[400.0, 0.0, 0.0], [0.0, 400.0, 1.0], [3.0, 2.0, 1.0]])
    same, other = MEASURES[name](logits, logits), MEASURES[name](logits, logits.flip(1))
    assert torch.isfinite(same).all() and torch.isfinite(other).all()
    assert same.mean() < other.mean()
    if name != "hard_cross_entropy":
        assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def test_scale_and_shift_blindness() -> None:
    teacher, student = draw(30, 5), draw(30, 5, seed=1)
    for name in MEASURES:
        shifted = MEASURES[name](teacher, student + 5)
        assert torch.allclose(shifted, MEASURES[name](teacher, student), atol=1e-4), f"{name}: a constant moves it"
        if name in ("logit_angle", "disagreement"):
            assert torch.allclose(MEASURES[name](teacher, 9 * student), MEASURES[name](teacher, student), atol=1e-6)


def test_sqnr_is_that_of_its_formula() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    assert sqnr_db(reference, torch.tensor([[3.0, 3.5]])) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db(reference, reference) == math.inf
