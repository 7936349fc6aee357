"""Augmented views: pixels of the images themselves, one draw for the global batch."""

import torch
from torch import Tensor

from support.finetune_tools import images
from synq.common.seeding import make_generator
from synq.finetune.augment import flip_shift, random_views


def test_augmentation_is_one_draw_for_the_global_batch() -> None:
    x = images(8)
    whole = flip_shift(x, make_generator("a"))
    parts = [flip_shift(x[i : i + 4], make_generator("a"), offset=i, total=8) for i in (0, 4)]
    assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, x)


def test_augmentation_moves_and_mirrors_pixels_without_inventing_any() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen = set()
    generator = make_generator("b")
    for _ in range(64):
        y = flip_shift(x, generator, max_shift=0.25)
        assert set(y.flatten().tolist()) <= set(x.flatten().tolist())
        seen.add(tuple(y.flatten().tolist()))
    assert len(seen) == 2 * 3 * 3
    assert tuple(x.flatten().tolist()) in seen and tuple(x.flip(-1).flatten().tolist()) in seen


def test_mixed_views_keep_the_larger_part_and_are_one_draw_for_the_global_batch() -> None:
    x = torch.arange(8.0)[:, None, None, None].expand(8, 1, 8, 8).clone()  # image i is i everywhere
    batch = torch.arange(8)

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        return x[rows], rows

    for kind in ("mixup", "cutmix"):
        whole = random_views(x, batch, slice(0, 8), take, kind, make_generator("a"))
        parts = [random_views(x[i : i + 4], batch, slice(i, i + 4), take, kind, make_generator("a")) for i in (0, 4)]
        assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, x)
        assert whole.min() >= 0 and whole.max() <= 7
        if kind == "cutmix":
            own = (whole == x).float().mean(dim=(1, 2, 3))
            assert own.min() >= 0.4 and set(whole.unique().tolist()) <= set(range(8))
