"""The synthetic sets of a run, training and held-out: keys in the store, synthesis if missing, low-pass filter."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from synq.common.notices import print_notice
from synq.config.run import RunConfig, SynthesisConfig, make_absolute
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.generate import ensure_set
from synq.synthesis.lowpass import check_lowpass_space, cutoff_in_bins, lowpass_set
from synq.synthesis.store import Purpose, SetStore
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher, load_teacher

HELDOUT_SEED = 0
"""Seed of every held-out set. One constant, so that all runs of a teacher share one set; its purpose, "heldout",
separates its random stream from that of training sets."""

OWN_CURE = (
    "{} makes images that do not show the classes that it was given; if it makes them for other classes, let it return "
    "(images, labels)"
)
"""What to do about images of a method of the user that do not show their class."""


def set_store(config: RunConfig) -> SetStore:
    """Return the store of a run's synthetic sets."""
    return SetStore(config.runtime.store_dir or Path(config.runtime.output_dir) / "store")


def set_names(config: RunConfig, teacher: Teacher | None = None) -> list[str]:
    """Return the keys of a run's training and held-out set in the store, whether or not the store has them.

    Args:
        config: The run.
        teacher: Its teacher if already loaded; None loads it.
    """
    config = make_absolute(config)
    teacher = teacher or load_teacher(config.teacher)
    return [
        set_store(config).key(
            teacher.digest,
            settings,
            seed,
            input_size=teacher.input_size,
            purpose=purpose,
            pixel_range=teacher.pixel_range(),
        )
        for settings, seed, purpose in set_requests(config)
    ]


def ensure_sets(config: RunConfig, teacher: Teacher, accelerator: Accelerator) -> tuple[SyntheticSet, SyntheticSet]:
    """Return the training and the held-out set of a run, synthesized first unless the store has them.

    A set whose images do not show their classes is reported at once, before anything is computed with it.

    Raises:
        ValueError, OSError: As `ensure_set`.
    """
    store, progress = set_store(config), config.runtime.progress
    sets: list[SyntheticSet] = []
    for settings, seed, purpose in set_requests(config):
        options: dict[str, Any] = {"accelerator": accelerator, "purpose": purpose, "progress": progress}
        sets.append(ensure_set(teacher, settings, seed, store, **options))
        if accelerator.is_main_process:
            for text in set_warnings(config.synthesis, *sets):
                print_notice(f"warning: {text}")
    train_set, heldout = sets
    return train_set, heldout


def set_warnings(config: SynthesisConfig, *sets: SyntheticSet) -> list[str]:
    """Return a warning, with what to do, about sets of which the teacher classifies few images as their class.

    Args:
        config: Settings of the synthesis.
        sets: The training set, or it and the held-out set.
    """
    names = ("", "held-out ")
    for number, part in enumerate(sets):
        # Held-out images are optimized pixels with assigned labels, whatever the method of the training images.
        assigned = config.assigns_labels or number == 1
        share, chance = part.manifest["agreement"], 1 / part.manifest["num_classes"]
        if assigned and share < (1 + chance) / 2:
            head = f"the teacher classifies only {100 * share:.0f} % of the {names[number]}synthetic images as their"
            is_own = config.is_added and number == 0
            return [f"{head} assigned class: {OWN_CURE.format(config.method) if is_own else _cure(config)}"]
    return []


def _cure(config: SynthesisConfig) -> str:
    if config.inception_weight == 0:
        return (
            "with `synthesis.inception_weight` 0 no image is made to show it; raise that, or switch the labels off by "
            "`finetune.ce_weight` 0"
        )
    more = [f"raise `synthesis.iterations` (now {config.iterations})"]
    if config.schedule == "plateau":
        more.append("use `synthesis.schedule` cosine")
    if config.start == "white":
        more.append("use `synthesis.start` fitted")
    more += [f"raise `synthesis.inception_weight` (now {config.inception_weight:g})", "try another `synthesis.lr`"]
    cure = ", or ".join(more)
    return f"synthesis has not converged, and what is trained or measured on such images means little; {cure}"


def low_pass(
    images: Tensor, config: RunConfig, folder: Path | None = None, *, pixel_range: PixelRange | None = None
) -> Tensor:
    """Return images (N, C, H, W) low-pass filtered at the cutoff of `config.finetune`, or unchanged if it has none.

    The filter overshoots at edges, so its result is clamped: teacher and student must see an image that can exist.

    Args:
        images: Normalized images, within ``pixel_range``.
        config: The run.
        folder: As for `lowpass_set`.
        pixel_range: Range of normalized pixels; None for no bounds.
    """
    settings = config.finetune
    if settings.lowpass_cutoff is None:
        return images
    height, width = images.shape[-2:]
    cutoff = cutoff_in_bins(settings.lowpass_cutoff, settings.lowpass_unit, height, width)
    filtered = lowpass_set(images, cutoff, folder)
    return filtered if pixel_range is None else pixel_range.clamp_(filtered)


def check_space(folder: Path, config: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    """Raise, before the synthesis, if the disk of `folder` cannot hold the filtered images of this machine's processes.

    Raises:
        OSError: As `check_lowpass_space`.
    """
    if config.finetune.lowpass_cutoff is not None:
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        check_lowpass_space(folder, config.synthesis.num_images, teacher.input_size, copies)


def set_requests(
    config: RunConfig,
) -> tuple[tuple[SynthesisConfig, int, Purpose], tuple[SynthesisConfig, int, Purpose]]:
    """Return settings, seed and purpose of a run's training set and of its held-out set.

    The held-out images are optimized pixels whatever method makes the training set, so that all methods are compared on
    the same images.
    """
    number = config.evaluation.heldout_images
    heldout = replace(config.synthesis, num_images=number, method="inversion", source=None, swing_conv=None)
    return (config.synthesis, config.data_seed, "train"), (heldout, HELDOUT_SEED, "heldout")
