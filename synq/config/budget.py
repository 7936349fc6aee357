"""The ladder of budgets that a quality chooses from: numbers of images, iterations and epochs. Standard library only.

The choice itself, which needs the network, is `synq.budget`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from synq.config.key_tables import nested_keys

BUDGET_KEYS = (
    "synthesis.num_images",
    "synthesis.iterations",
    "finetune.epochs",
    "finetune.batch_size",
    "evaluation.heldout_images",
)
"""Settings that a quality chooses, and that decide whether there is one: giving one of them is choosing a budget."""
RANGE_KEY, ROUNDING_KEY = "quant.weight_range", "quant.rounding"
BLEND_KEY = "finetune.augment"
ROUNDING_KEYS = (
    RANGE_KEY,
    ROUNDING_KEY,
    "reconstruction.iterations",
    "reconstruction.batch_size",
    "reconstruction.images",
    "reconstruction.step_lr",
)
"""Settings of the rounding that a quality chooses, too, each unless it was given."""
PLANNED_KEYS = (*BUDGET_KEYS, *ROUNDING_KEYS, BLEND_KEY)
"""All settings that a quality chooses."""
HELDOUT_IMAGES = 64
"""Held-out images of every rung: the smallest training set is as large, so they cost at most half of the synthesis."""


NOTHING_LOST = 0.02
"""KL in nats of the rounded student up to which more images gain nothing: W8A8 has 0.001, W4A8 0.15."""


BLENDED_ABOVE = 1.0
"""KL in nats of the rounded student above which 40 epochs want blended batches: CIFAR's W4A4 has 0.3, its W3A3 2."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A step of the ladder."""

    num_images: int
    """Training images."""
    iterations: int
    """Iterations of the synthesis."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images per optimizer step: with few images the number of steps decides, and 16 give four times those of 64."""
    rounding_steps: int
    """Optimizer steps for each block of the learned rounding, of 32 images; 0 rounds to nearest."""
    blends: bool
    """Whether batches are blended (mixup) where rounding alone loses more than `BLENDED_ABOVE`."""
    enough_for: float
    """Largest KL in nats of the rounded student for which `standard` chooses this rung."""


LADDER = (
    Rung(64, 50, 15, 16, 0, False, NOTHING_LOST),
    Rung(128, 50, 15, 16, 0, False, NOTHING_LOST),
    Rung(1024, 100, 15, 64, 200, False, math.inf),
    Rung(1024, 100, 40, 64, 500, True, math.inf),
)
"""Budgets from cheap to costly. The CIFAR-10 ResNet-20 at W4A4 drops 1.16 points with the second and 0.82 with the next
(three seeds), at a seventh of the processor time; what was tried between them was not better than the second.
"""
QUALITIES = {"draft": -1, "standard": 0, "best": 1}
"""Name of a quality, and how many rungs above `standard` it is."""
DEFAULT_QUALITY = "standard"


def planned_keys(*given: Mapping[str, Any]) -> set[str]:
    """Return those of `PLANNED_KEYS` that tables of settings have, nested or by dotted key.

    Args:
        given: Tables of settings as a user wrote them.
    """
    tables = [nested_keys(part, "settings") for part in given]
    return {key for key in PLANNED_KEYS if any(_has(table, key.split(".")) for table in tables)}


def _has(table: Mapping[str, Any], parts: Iterable[str]) -> bool:
    first, *rest = parts
    below = table.get(first)
    return first in table if not rest else isinstance(below, Mapping) and _has(below, rest)
