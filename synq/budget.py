"""The budget of a run: how many images, iterations and steps it takes, chosen from what rounding alone loses.

At W8A8 rounding loses nothing, and a few images do; below that, more images and steps win back more of what was lost
(measured in docs/results/LOG.md). So a run of a `quality` first makes its held-out images, rounds the student to
nearest, and measures its KL to the teacher on them; that chooses a rung of `LADDER`. Nothing here reads a label, and
the same settings choose the same rung again.
"""

import copy
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from synq.common.digests import read_sealed_json, write_sealed_json
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.common.text_tables import duration
from synq.config.budget import (
    BLEND_KEY,
    BLENDED_ABOVE,
    BUDGET_KEYS,
    DEFAULT_QUALITY,
    HELDOUT_IMAGES,
    LADDER,
    QUALITIES,
    RANGE_KEY,
    ROUNDING_KEY,
    Rung,
)
from synq.config.parsing import between, one_of
from synq.config.quant import WEIGHT_RANGES
from synq.config.run import RunConfig, config_digest, make_absolute, with_overrides
from synq.config.synthesis import OWN_IMAGES
from synq.evaluation.fidelity import kl
from synq.evaluation.teacher_logits import TeacherLogits, fidelity
from synq.finetune.schedule import local_batch_size
from synq.own_images import check_own_images, ensure_own_images
from synq.pipeline import open_inputs
from synq.quant.student import Student, observe_ranges
from synq.runs.forecast import Forecast, estimate, probe
from synq.runtime import dtype_of, make_accelerator, place
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
        weight_range: Range of the weights that has this KL: the better one, unless it was given.
        shortened: Whether a time limit chose a lower rung than the quality.
    """

    config: RunConfig
    quality: str
    rung: int
    rounded_kl: float
    weight_range: str
    shortened: bool = False

    def values(self) -> dict[str, Any]:
        """Return the evidence as a record has it."""
        return {name: getattr(self, name) for name in _evidence()}

    def line(self) -> str:
        """Return the choice and its reason in one line."""
        config = self.config
        loses = f"rounding alone has a KL of {self.rounded_kl:.3g}"
        chosen = (
            f"{config.synthesis.num_images} images x {config.synthesis.iterations} iterations, "
            f"{config.finetune.epochs} epochs"
        )
        limit = ", as many as the time limit allows" if self.shortened else ""
        learned = ""
        if config.quant.rounding == "adaround" and LADDER[self.rung].rounding_steps:
            learned = ", and learned rounding (protocol B; `--quant.rounding nearest` leaves it out)"
        blended = ""
        if config.finetune.augment == "mixup" and _blends(self.rung, self.rounded_kl):
            blended = " of blended images (`--finetune.augment none` leaves that out)"
        return f"quality {self.quality}: {loses}, so {chosen}{blended}{limit}{learned}"


def _blends(rung: int, rounded_kl: float) -> bool:
    """Return whether the batches of a run on a rung are blended, unless its augmentation was given."""
    return LADDER[rung].blends and rounded_kl > BLENDED_ABOVE


def _evidence() -> list[str]:
    return [part.name for part in fields(Budget) if part.name != "config"]


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

    The held-out images are made if the store lacks them; the run uses the same ones if it has as many iterations. The
    choice is kept in ``budgets/`` of the output folder, so that the same command resumes its run: under a time limit,
    images that are there already would allow another one.

    Args:
        config: The run.
        quality: draft, standard or best.
        max_minutes: Longest time of the run, by its forecast on this machine; None for no limit. It makes the choice
            depend on the machine.
        given: Settings of `PLANNED_KEYS`, by dotted key, that keep their values.
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
    rungs = [index for index, rung in enumerate(LADDER) if _holds_batch(config, rung, kept)] or [len(LADDER) - 1]
    file = _file(config, f"{quality} {max_minutes} {sorted(kept)} {teacher.digest} {LADDER}")
    if (known := _chosen_before(file, accelerator)) is not None:
        return _planned(config, known, kept, accelerator, teacher)
    lowest = _on_rung(config, rungs[0], kept, accelerator, teacher)
    local_batch_size(lowest.finetune.batch_size, accelerator.num_processes)
    check_own_images(lowest, teacher)
    _, measure, student = open_inputs(replace(lowest, quant=config.quant), accelerator, teacher)  # rounded to nearest
    ensure_own_images(lowest, teacher, accelerator)
    if max_minutes is not None:
        number = len(measure.reported) + len(measure.chosen)
        allowed = _within(max_minutes, config, rungs, kept, teacher, student, number, accelerator)
    else:
        allowed = rungs
    probed = {"synthesis.iterations": LADDER[0].iterations, "evaluation.heldout_images": HELDOUT_IMAGES}
    probed = {key: value for key, value in probed.items() if key not in kept}
    ranges = {config.quant.weight_range} if RANGE_KEY in kept else WEIGHT_RANGES
    losses = {
        name: _rounded_kl(with_overrides(config, {**probed, RANGE_KEY: name}), teacher, student, accelerator)
        for name in ranges
    }
    weight_range = min(losses, key=losses.__getitem__)
    config, lost = with_overrides(config, {RANGE_KEY: weight_range}), losses[weight_range]
    enough = next(index for index, rung in enumerate(LADDER) if lost <= rung.enough_for)
    wanted = max(0, min(len(LADDER) - 1, enough + QUALITIES[quality]))
    wanted = next((index for index in rungs if index >= wanted), rungs[-1])
    chosen = max(index for index in allowed if index <= max(wanted, allowed[0]))
    values: dict[str, Any] = {"quality": quality, "rung": chosen, "rounded_kl": lost, "shortened": chosen < wanted}
    values["weight_range"] = weight_range
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed_json(file, values)
    return _planned(config, values, kept, accelerator, teacher)


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
    if quality is None and max_minutes is None and not {*BUDGET_KEYS}.isdisjoint(given):
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


def _planned(
    config: RunConfig, values: Mapping[str, Any], kept: Set[str], accelerator: Accelerator, teacher: Teacher
) -> Budget:
    """Return the budget that evidence chooses."""
    config = with_overrides(config, {RANGE_KEY: values["weight_range"]})
    blends = BLEND_KEY not in kept and _blends(values["rung"], values["rounded_kl"])
    planned = _on_rung(config, values["rung"], kept, accelerator, teacher)
    return Budget(config=with_overrides(planned, {BLEND_KEY: "mixup"} if blends else {}), **values)


def _on_rung(config: RunConfig, index: int, kept: Set[str], accelerator: Accelerator, teacher: Teacher) -> RunConfig:
    """Return the settings of a run on a rung of the ladder."""
    rung, processes = LADDER[index], accelerator.num_processes
    values: Mapping[str, Any] = {
        "synthesis.num_images": rung.num_images,
        "synthesis.iterations": rung.iterations,
        "finetune.epochs": rung.epochs,
        "finetune.batch_size": math.ceil(rung.batch_size / processes) * processes,
        "evaluation.heldout_images": HELDOUT_IMAGES,
        **(_learned_rounding(rung, teacher) if ROUNDING_KEY not in kept and _wants_it(config, rung, teacher) else {}),
    }
    chosen = {key: value for key, value in values.items() if key not in kept}
    if "synthesis.num_images" in kept and "finetune.batch_size" in chosen:  # a batch has no image twice
        most = config.synthesis.num_images // processes * processes
        chosen["finetune.batch_size"] = max(processes, min(chosen["finetune.batch_size"], most))
    return with_overrides(config, chosen)


def _wants_it(config: RunConfig, rung: Rung, teacher: Teacher) -> bool:
    """Return whether a run on a rung learns its rounding, which is what fine-tuning repairs badly.

    Measured (docs/results/LOG.md): weights of 2 bits, where it is most of what was lost, and depthwise convolutions,
    whose few weights each move a whole channel. A ResNet at 3 and 4 bits gains nothing.
    """
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in teacher.graph.modules())
    return rung.rounding_steps > 0 and (config.quant.weight_bits == 2 or depthwise)


def _learned_rounding(rung: Rung, teacher: Teacher) -> dict[str, Any]:
    """Return the settings of learned rounding, by dotted key, as the recipes have them but for the number of steps."""
    _, height, width = teacher.input_size
    return {
        "quant.rounding": "adaround",
        "reconstruction.iterations": rung.rounding_steps,
        "reconstruction.step_lr": 1e-3,
        # Outputs of a block are kept for all of them: as many floats as for the recipes' images of 32 pixels.
        "reconstruction.images": min(1024, max(64, 1024 * 32 * 32 // (height * width))),
    }


def _holds_batch(config: RunConfig, rung: Rung, kept: Collection[str]) -> bool:
    """Return whether a rung has as many images as a batch that was given."""
    given = "finetune.batch_size" in kept and "synthesis.num_images" not in kept
    return not given or rung.num_images >= config.finetune.batch_size


def _file(config: RunConfig, choice: str) -> Path:
    """Return the path of the file that keeps a choice for these settings."""
    digest = hashlib.sha256(f"{config_digest(config)} {choice}".encode()).hexdigest()[:16]
    return Path(config.runtime.output_dir) / "budgets" / f"{digest}.json"


def _chosen_before(file: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return a choice that was kept, on every process; None if there is none, or its file is damaged."""
    found: dict[str, Any] | None = None
    if accelerator.is_main_process and file.exists():
        try:
            found, _ = read_sealed_json(file)
        except DamagedFileError as error:
            print_notice(f"warning: {error}; the budget is chosen again")
    (found,) = broadcast_object_list([found])
    if found is None:
        return None
    values = {name: found[name] for name in _evidence()}
    return {**values, "rounded_kl": math.inf} if values["rounded_kl"] is None else values  # JSON has no infinity


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
    images = low_pass(heldout.images, config, pixel_range=teacher.pixel_range())
    images = images.to(accelerator.device, dtype_of(config.runtime))
    net, reference = copy.deepcopy(student.net), copy.deepcopy(teacher.graph)
    for part in (net, reference):
        place(part, config.runtime, accelerator.device, teacher.input_size)
    quant = config.quant
    observe_ranges(net, images, act_range=quant.act_range, weight_range=quant.weight_range, norm=quant.mse_norm)
    size = config.evaluation.batch_size
    logits = TeacherLogits.compute(reference, images, batch_size=size, accelerator=accelerator)
    value = fidelity(logits, net, {"kl": kl}, accelerator=accelerator)["kl"]
    value = broadcast_object_list([value if math.isfinite(value) else math.inf])[0]  # one choice for all processes
    return max(0.0, value)


def _within(
    max_minutes: float,
    config: RunConfig,
    rungs: Sequence[int],
    kept: Set[str],
    teacher: Teacher,
    student: Student,
    num_labeled: int,
    accelerator: Accelerator,
) -> list[int]:
    """Return those of `rungs` whose forecast takes at most `max_minutes`, without the held-out images of the choice."""
    costs = probe(config, teacher, student, accelerator)

    def seconds(index: int) -> float:
        most = _on_rung(config, index, kept, accelerator, teacher)
        if LADDER[index].blends and BLEND_KEY not in kept:  # as it may be chosen once the KL is known
            most = with_overrides(most, {BLEND_KEY: "mixup"})
        found: Forecast = estimate(most, teacher, student, num_labeled, accelerator, costs)
        return found.seconds

    allowed = [index for index in rungs if seconds(index) <= 60 * max_minutes]
    allowed, least = broadcast_object_list([allowed, seconds(rungs[0])])
    if not allowed:
        raise ValueError(
            f"`max_minutes` must leave time for the smallest budget, about {duration(least)}, but got {max_minutes:g}"
        )
    return list(allowed)
