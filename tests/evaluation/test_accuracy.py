"""Top-1 and top-5 have one rule, also where logits are equal or not numbers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.evaluation.accuracy import top_hits
from synq.evaluation.measure import evaluate
from synq.export.verify import compare


class Constant(nn.Module):
    """Returns the same logits for every image, as a collapsed student does."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def _rows(images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return images[rows], labels[rows]


TIE = [0.0, 1.0, 2.0, 5.0, 1.0, 0.0, 3.0, 5.0, 1.0, 2.0]
NAN = math.nan
COLLAPSED = {
    "two equal": TIE,
    "all zero": [0.0] * 10,
    "all equal but one": [1.0] * 9 + [2.0],
    "six equal": [0.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 1.0, 2.0],
    "infinite": [0.0, math.inf, 1.0, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, -math.inf],
    "nan": [NAN] * 10,
    "one nan": [0.0, NAN, *range(8)],
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_l_5_top1_is_that_of_the_comparison_and_of_numpy(name: str, accelerator: Accelerator) -> None:
    net = Constant(COLLAPSED[name])
    images = torch.zeros(8, 1)
    for label in range(10):
        labels = torch.full((8,), label)
        fetch = partial(_rows, images, labels)
        found = evaluate(net, fetch, torch.arange(8), batch_size=3, accelerator=accelerator)
        compared = compare(net, [(net(images), images, labels)], source="x")
        numpy_top1 = 100.0 * float((np.argmax(net(images).numpy(), 1) == label).mean())
        assert found.top1 == compared.student_top1 == compared.file_top1 == numpy_top1
        assert found.hits.tolist() == [found.top1 == 100] * 8 and found.top5 >= found.top1


def test_l_5_top5_counts_larger_logits() -> None:
    def five(logits: list[float]) -> list[int]:
        return [label for label in range(10) if top_hits(torch.tensor([logits]), torch.tensor([label]))[1]]

    assert five(TIE) == [2, 3, 6, 7, 9]
    assert five(COLLAPSED["six equal"]) == [1, 2, 3, 4, 5, 6], "none of six equal logits is better than another"
    assert five(COLLAPSED["all zero"]) == list(range(10))
    assert five(COLLAPSED["nan"]) == [0], "a student of NaN is not right five times out of ten"
    few = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    assert top_hits(few, torch.arange(3))[1].all(), "of at most five classes each is among the first five"
