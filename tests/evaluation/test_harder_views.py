"""Blends of held-out images: within their range, the same for every network, and counted as the formulas define."""

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.evaluation.fidelity import kl
from synq.evaluation.harder_views import MAX_IMAGES, MAX_REPEATED_SIDE, MIN_IMAGES, VIEWS, HarderViews
from synq.sweeps.studies.fidelity_study import VIEWS as STUDIED
from synq.sweeps.studies.fidelity_study import make_generator

pytestmark = pytest.mark.usefixtures("torch_rng_untouched")


def _set(count: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.rand((count, 1, 6, 6), generator=generator) / 2
    images[torch.arange(count), 0, labels, labels] = 3.0
    return images, labels


class Diagonal(nn.Module):
    """The first pixels of the diagonal as logits, after a change."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x[:, 0].diagonal(dim1=1, dim2=2)[:, :4])


def test_views_stay_in_the_range_of_the_images_and_never_change() -> None:
    images, labels = _set()
    views = HarderViews(images, labels)
    for name in VIEWS:
        view = views.view(name)
        assert view.shape == images.shape and images.min() <= view.min() and view.max() <= images.max()
        assert not torch.equal(view, images) and torch.equal(view, HarderViews(images, labels).view(name))


def test_they_are_those_that_the_prediction_was_calibrated_on() -> None:
    images, labels = _set()
    for name in VIEWS:
        studied = STUDIED[name](images, labels, Diagonal(), make_generator("fidelity study", name))
        assert torch.equal(HarderViews(images, labels).view(name), studied)


def test_a_larger_set_costs_no_more() -> None:
    images, labels = _set(MAX_IMAGES + 5)
    assert HarderViews(images, labels).view("mixup_0.5").shape[0] == MAX_IMAGES


def test_images_of_a_small_set_are_blended_with_several_partners() -> None:
    images, labels = _set(MIN_IMAGES)
    view = HarderViews(images, labels).view("mixup_0.5")
    assert len(view) == MAX_IMAGES
    assert len({tuple(image.flatten().tolist()) for image in view}) > 2 * MIN_IMAGES
    assert len(HarderViews(images[1:], labels[1:]).view("mixup_0.5")) == MIN_IMAGES - 1
    large = torch.zeros(MIN_IMAGES, 1, 2, MAX_REPEATED_SIDE + 1)
    assert len(HarderViews(large, labels).view("mixup_0.5")) == MIN_IMAGES


@pytest.mark.parametrize("batch_size", [7, 256])
def test_agreement_and_kl_are_means_over_the_views(accelerator: Accelerator, batch_size: int) -> None:
    images, labels = _set()
    teacher, swapped = Diagonal(), Diagonal(lambda logits: logits[:, [1, 0, 2, 3]])
    views = HarderViews(images, labels)
    same = views.fidelity(teacher, Diagonal(), batch_size=batch_size, accelerator=accelerator)
    assert same["agreement"] == 100 and same["kl"] == pytest.approx(0, abs=1e-12)
    found = views.fidelity(teacher, swapped, batch_size=batch_size, accelerator=accelerator)
    pairs = [(teacher(views.view(name)), swapped(views.view(name))) for name in VIEWS]
    agreements = [100 * float((t.argmax(1) == s.argmax(1)).double().mean()) for t, s in pairs]
    assert found["agreement"] == pytest.approx(sum(agreements) / len(VIEWS)) and 20 < found["agreement"] < 90
    certain = [float(t.double().softmax(1).amax(1).mean()) for t, _ in pairs]
    assert found["confidence"] == same["confidence"] == pytest.approx(100 * sum(certain) / len(VIEWS))
    assert found["kl"] == pytest.approx(sum(float(kl(t, s).mean()) for t, s in pairs) / len(VIEWS))


def test_the_teacher_runs_once_per_view(accelerator: Accelerator) -> None:
    calls: list[int] = []
    teacher = Diagonal(lambda logits: (calls.append(len(logits)), logits)[1])
    views = HarderViews(*_set())
    for _ in range(3):
        views.fidelity(teacher, Diagonal(), batch_size=256, accelerator=accelerator)
    assert calls == [40] * len(VIEWS)
