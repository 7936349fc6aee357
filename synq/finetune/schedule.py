"""Data order and learning-rate schedule of fine-tuning: pure functions, so a resumed run needs no state."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from synq.common.seeding import make_generator
from synq.config.run import FinetuneConfig


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the row numbers (B,) of each global batch of an epoch; B is at most the number of images.

    Every image is in the epoch. An incomplete last batch is filled up with the first images of the epoch's own order,
    none of them twice in it: every batch has the same size, so that processes have equal shares, as the mean of their
    gradients needs, and every step the same weight; a smaller last batch would have neither.
    Every process draws the same order and takes a slice of each batch, so 1 and n processes see the same samples.
    """
    order = torch.randperm(num_images, generator=make_generator("order", seed, epoch))
    order = torch.cat([order, order[: -num_images % batch_size]])
    yield from order.split(batch_size)


def num_steps(num_images: int, batch_size: int) -> int:
    """Return the number of batches of an epoch, see `epoch_batches`."""
    return -(-num_images // batch_size)


def local_batch_size(batch_size: int, num_processes: int) -> int:
    """Return the number of images per process and step.

    Raises:
        ValueError: If the global batch is not divisible: with unequal shares the averaged gradient would differ.
    """
    share, rest = divmod(batch_size, num_processes)
    if rest:
        raise ValueError(
            f"finetune.batch_size must be divisible by the number of processes ({num_processes}), but got {batch_size}"
        )
    return share


def lr_at(step: int, steps_per_epoch: int, config: FinetuneConfig) -> float:
    """Return the learning rate of a step; steps are counted over all epochs, from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        total = config.epochs * steps_per_epoch - warmup
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
    if config.schedule == "step":
        return config.lr * config.step_factor ** (step // (config.step_epochs * steps_per_epoch))
    return config.lr
