"""The budget of a run: how many images, iterations and steps it takes, chosen from what rounding alone loses.

At W8A8 rounding loses nothing, and a few images do; below that, more images and steps win back more of what was lost
(measured in docs/results/LOG.md). So a run of a
`quality` first makes its held-out images, rounds the student to nearest, and measures its KL to the teacher on them;
that chooses a rung of `LADDER`. Nothing here reads a label, and the same settings choose the same rung again.
"""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from synq.common.notices import print_notice
from synq.common.text_tables import duration
from synq.config.budget import DEFAULT_QUALITY, HELDOUT_IMAGES, LADDER, QUALITIES
from synq.config.parsing import between, one_of
from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.config.synthesis import OWN_IMAGES
from synq.evaluation.fidelity import kl
from synq.pipeline import check
from synq.quant.student import Student, build_student, observe_ranges
from synq.runs.forecast import Forecast, estimate, probe
from synq.runtime import make_accelerator, place
from synq.synthesis.generate import ensure_set
from synq.synthesis.run_sets import low_pass, set_requests, set_store
from synq.teacher.teacher import Teacher, load_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What was chosen for a run, and why.

    Attributes:
        config: The settings of the run with the chosen ones among them.
        quality: Name of the quality.
        rung: Index in `LADDER`.
        rounded_kl: KL in nats of the student that is only rounded, on the held-out images.
        shortened: Whether a time limit chose a lower rung than the quality.
    """

    config: RunConfig
    quality: str
    rung: int
    rounded_kl: float
    shortened: bool = False

    def values(self) -> dict[str, Any]:
        """Return the evidence as a record has it."""
        return {
            "quality": self.quality,
            "rung": self.rung,
            "rounded_kl": self.rounded_kl,
            "shortened": self.shortened,
        }

    def line(self) -> str:
        """Return the choice and its reason in one line."""
        config = self.config
        loses = f"rounding alone has a KL of {self.rounded_kl:.3g}"
        chosen = (
            f"{config.synthesis.num_images} images x {config.synthesis.iterations} iterations, "
            f"{config.finetune.epochs} epochs"
        )
        limit = ", as many as the time limit allows" if self.shortened else ""
        return f"quality {self.quality}: {loses}, so {chosen}{limit}"


def plan_budget(
    config: RunConfig,
    quality: str = DEFAULT_QUALITY,
    *,
    max_minutes: float | None = None,
    given: Collection[str] = (),
    accelerator: Accelerator,
    teacher: Teacher | None = None,
) -> Budget:
    """Choose images, iterations and epochs of a run; a collective call of all processes.

    The held-out images are made if the store lacks them; the run uses the same ones if it has as many iterations.

    Args:
        config: The run.
        quality: draft, standard or best.
        max_minutes: Longest time of the run, by its forecast on this machine; None for no limit. It makes the choice
            depend on the machine.
        given: Settings of `BUDGET_KEYS`, by dotted key, that keep their values.
        accelerator: Process group.
        teacher: The result of `load_teacher(config.teacher)` if already loaded; None loads it.

    Raises:
        ValueError: Invalid input, or even the smallest budget takes longer than `max_minutes`.
        OSError: A file cannot be read or written.
    """
    one_of("quality", quality, tuple(QUALITIES))
    if max_minutes is not None:
        between("max_minutes", max_minutes, 0, open_low=True)
    config = make_absolute(config)
    kept = {*given, *(("synthesis.num_images",) if config.synthesis.method == OWN_IMAGES else ())}
    teacher = teacher or load_teacher(config.teacher)
    first = _on_rung(config, 0, kept, accelerator)
    _, measure = check(first, accelerator=accelerator, teacher=teacher)
    student = build_student(teacher, config.quant)
    lost = _rounded_kl(first, teacher, student, accelerator)
    enough = next(index for index, rung in enumerate(LADDER) if lost <= rung.enough_for)
    wanted = max(0, min(len(LADDER) - 1, enough + QUALITIES[quality]))
    chosen = wanted
    if max_minutes is not None:
        number = len(measure.reported) + len(measure.chosen)
        chosen = _within(max_minutes, config, wanted, kept, teacher, student, number, accelerator)
    return Budget(
        config=_on_rung(config, chosen, kept, accelerator),
        quality=quality,
        rung=chosen,
        rounded_kl=lost,
        shortened=chosen < wanted,
    )


def budgeted(
    config: RunConfig,
    quality: str | None,
    max_minutes: float | None,
    given: Collection[str],
    *,
    accelerator: Accelerator | None = None,
    teacher: Teacher | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the settings of a run with its budget, and the evidence for its record; print the choice.

    Args:
        config: The settings.
        quality: Name of the quality; None takes the default one, or none where a key of `BUDGET_KEYS` was given.
        max_minutes: As for `plan_budget`.
        given: As for `plan_budget`.
        accelerator: Process group; None makes one from `config.runtime`.
        teacher: As for `plan_budget`.

    Raises:
        ValueError, OSError: As `plan_budget`.
    """
    if given and quality is None and max_minutes is None:
        return config, {}
    accelerator = accelerator or make_accelerator(config.runtime)
    budget = plan_budget(
        config,
        quality or DEFAULT_QUALITY,
        max_minutes=max_minutes,
        given=given,
        accelerator=accelerator,
        teacher=teacher,
    )
    if accelerator.is_main_process:
        print_notice(budget.line())
    return budget.config, budget.values()


def _on_rung(config: RunConfig, index: int, kept: Collection[str], accelerator: Accelerator) -> RunConfig:
    """Return the settings of a run on a rung of the ladder."""
    rung, processes = LADDER[index], accelerator.num_processes
    values: Mapping[str, Any] = {
        "synthesis.num_images": rung.num_images,
        "synthesis.iterations": rung.iterations,
        "finetune.epochs": rung.epochs,
        "finetune.batch_size": math.ceil(rung.batch_size / processes) * processes,
        "evaluation.heldout_images": HELDOUT_IMAGES,
    }
    chosen = {key: value for key, value in values.items() if key not in kept}
    if "synthesis.num_images" in kept and "finetune.batch_size" in chosen:  # a batch has no image twice
        chosen["finetune.batch_size"] = min(chosen["finetune.batch_size"], config.synthesis.num_images)
    return with_overrides(config, chosen)


def _rounded_kl(config: RunConfig, teacher: Teacher, student: Student, accelerator: Accelerator) -> float:
    """Return the mean KL in nats of the student, rounded to nearest, on the held-out images that calibrate it, too."""
    settings, seed, purpose = set_requests(config)[1]
    heldout = ensure_set(
        teacher,
        settings,
        seed,
        set_store(config),
        purpose=purpose,
        accelerator=accelerator,
        progress=config.runtime.progress,
    )
    images = low_pass(heldout.images, config, pixel_range=teacher.pixel_range()).to(accelerator.device)
    net, reference = copy.deepcopy(student.net), copy.deepcopy(teacher.graph)
    for part in (net, reference):
        place(part, config.runtime, accelerator.device, teacher.input_size)
    quant = config.quant
    observe_ranges(net, images, act_range=quant.act_range, weight_range=quant.weight_range, norm=quant.mse_norm)
    with torch.no_grad():
        value = float(kl(reference(images), net(images)).double().mean())
    value = broadcast_object_list([value if math.isfinite(value) else math.inf])[0]  # one choice for all processes
    return max(0.0, value)


def _within(
    max_minutes: float,
    config: RunConfig,
    wanted: int,
    kept: Collection[str],
    teacher: Teacher,
    student: Student,
    num_labeled: int,
    accelerator: Accelerator,
) -> int:
    """Return the highest rung up to `wanted` whose forecast takes at most `max_minutes`."""
    costs = probe(config, teacher, student, accelerator)

    def seconds(index: int) -> float:
        found: Forecast = estimate(
            _on_rung(config, index, kept, accelerator), teacher, student, num_labeled, accelerator, costs
        )
        return found.seconds

    fits = [index for index in range(wanted + 1) if seconds(index) <= 60 * max_minutes]
    chosen, least = broadcast_object_list([max(fits, default=None), None if fits else seconds(0)])
    if chosen is None:
        raise ValueError(
            f"`max_minutes` must leave time for the smallest budget, about {duration(least)}, but got {max_minutes:g}"
        )
    return int(chosen)
