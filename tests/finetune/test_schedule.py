"""The timetable of a fine-tuning: batches of an epoch, the share of each process, learning rates."""

import pytest
import torch

from synq.config.run import FinetuneConfig
from synq.finetune.schedule import epoch_batches, local_batch_size, lr_at, num_steps


def test_every_image_is_in_an_epoch_and_every_batch_is_whole() -> None:
    batches = list(epoch_batches(21, 4, seed=5, epoch=2))
    rows = torch.cat(batches)
    assert [len(b) for b in batches] == [4] * num_steps(21, 4) == [4] * 6
    assert torch.equal(rows[:21].sort().values, torch.arange(21)), "each image once"
    assert torch.equal(rows[21:], rows[:3]), "the last batch begins with the rest and ends with the first of the order"
    assert all(len(batch.unique()) == 4 for batch in batches)
    halves = [torch.cat([batch[part::2] for batch in batches]) for part in (0, 1)]
    assert len(halves[0]) == len(halves[1]), "processes have equal shares"
    whole = torch.cat(list(epoch_batches(20, 4, seed=5, epoch=2)))
    assert len(whole) == len(whole.unique()) == 20 and num_steps(20, 4) == 5
    assert torch.equal(rows, torch.cat(list(epoch_batches(21, 4, seed=5, epoch=2))))
    assert not torch.equal(rows, torch.cat(list(epoch_batches(21, 4, seed=5, epoch=3))))
    assert not torch.equal(rows, torch.cat(list(epoch_batches(21, 4, seed=6, epoch=2))))


def test_global_batch_must_divide() -> None:
    assert local_batch_size(12, 4) == 3
    with pytest.raises(
        ValueError, match=r"finetune.batch_size must be divisible by the number of processes \(4\), but got 10"
    ):
        local_batch_size(10, 4)


def test_learning_rates() -> None:
    cosine = FinetuneConfig(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=1.0)
    assert lr_at(0, 4, cosine) == pytest.approx(0.2) and lr_at(3, 4, cosine) == pytest.approx(0.8)
    assert lr_at(4, 4, cosine) == pytest.approx(1.0) and lr_at(22, 4, cosine) == pytest.approx(0.5)
    assert 0 < lr_at(39, 4, cosine) < 0.01
    step = FinetuneConfig(epochs=10, lr=1.0, schedule="step", step_epochs=2, step_factor=0.5)
    assert [lr_at(s, 3, step) for s in (0, 5, 6, 12)] == [1.0, 1.0, 0.5, 0.25]
    assert lr_at(99, 3, FinetuneConfig(lr=0.3, schedule="constant")) == 0.3
