"""Forecast of a run before its work: minutes, memory and disk, from a probe of some seconds."""

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from synq.common.files import nearest_existing
from synq.common.seeding import make_generator
from synq.common.text_tables import duration
from synq.config.run import RunConfig
from synq.finetune.schedule import num_steps
from synq.quant.student import Student, observe_ranges
from synq.synthesis.run_sets import set_requests, set_store
from synq.synthesis.step_probe import QUICK_SECONDS, StepCost, num_passes, probe_synthesis, saved_bytes
from synq.teacher.teacher import Teacher

LONG_SECONDS = 7200.0
"""Seconds of a run from which on a smaller budget is proposed."""
SHORT_SECONDS = 1800.0
"""Seconds that the proposed budget takes at most, if a smaller number of images achieves it."""
FEWEST_IMAGES = 128
"""Smallest number of training images that is proposed."""
LEARNED_ROUNDING = 2.0
"""Ratio of a step of learned rounding, over all blocks, to a training step; runs of two ResNets had 2 to 2.5."""
FLOAT = 4
"""Bytes of a float32."""
WORKING = 1.5
"""Ratio of the peak memory to what the backward pass needs: gradients and workspaces of single layers."""
BASE_BYTES = 600 * 2**20
"""Memory of the interpreter with PyTorch, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run is expected to take on this machine."""

    synthesis: float
    """Seconds of the synthetic sets that the store lacks."""
    rounding: float
    """Seconds of the learned rounding."""
    finetune: float
    """Seconds of the fine-tuning."""
    measure: float
    """Seconds of the measurements."""
    memory: float
    """Peak memory of each process in bytes."""
    disk: float
    """Bytes that the run writes."""
    free: float
    """Free bytes of the disk of the run's folder."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.synthesis + self.rounding + self.finetune + self.measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What parts of a run cost on this machine, whatever their number."""

    synthesis: StepCost
    """One pass of the synthesis for one image."""
    training: StepCost
    """One training step for one image."""
    inference: float
    """Seconds of one image in a measurement."""


def forecast(
    config: RunConfig, teacher: Teacher, student: Student, num_labeled: int, accelerator: Accelerator
) -> Forecast:
    """Return a forecast of a run from a probe of some seconds; nothing is changed.

    Args:
        config: The run.
        teacher: Its teacher.
        student: Its student, not calibrated.
        num_labeled: Number of labeled images.
        accelerator: Process group, which shares the work.
    """
    costs = probe(config, teacher, student, accelerator)
    return estimate(config, teacher, student, num_labeled, accelerator, costs)


def probe(config: RunConfig, teacher: Teacher, student: Student, accelerator: Accelerator) -> Costs:
    """Measure what an image costs in each part of a run; it takes some seconds and changes nothing.

    Args:
        config: The run.
        teacher: Its teacher.
        student: Its student, not calibrated.
        accelerator: Process group, which gives the device.
    """
    synthesis = probe_synthesis(teacher, config.synthesis, accelerator.device)
    training, inference = _probe_student(config, teacher, student, accelerator.device)
    return Costs(synthesis=synthesis, training=training, inference=inference)


def estimate(
    config: RunConfig, teacher: Teacher, student: Student, num_labeled: int, accelerator: Accelerator, costs: Costs
) -> Forecast:
    """Return the forecast of a run from what its parts cost.

    Args:
        config: The run.
        teacher: Its teacher.
        student: Its student, not calibrated.
        num_labeled: Number of labeled images.
        accelerator: Process group, which shares the work.
        costs: From `probe`, of a run that differs in number of images, iterations and epochs at most.
    """
    processes, step, training, inference = accelerator.num_processes, costs.synthesis, costs.training, costs.inference
    store, passes, images = set_store(config), 0, 0
    for settings, seed, purpose in set_requests(config):
        key = store.key(
            teacher.digest,
            settings,
            seed,
            input_size=teacher.input_size,
            purpose=purpose,
            pixel_range=teacher.pixel_range(),
        )
        if not store.is_complete(key):
            passes += num_passes(settings, settings.num_images, teacher.input_size, teacher.num_classes)
            images += settings.num_images
    finetune, evaluation = config.finetune, config.evaluation
    trained = num_steps(config.synthesis.num_images, finetune.batch_size) * finetune.batch_size * finetune.epochs
    teachers = inference if finetune.augment != "none" else 0.0  # the teacher's logits of each batch
    measured = 3 * (num_labeled + evaluation.heldout_images)
    measured += evaluation.heldout_images * finetune.epochs if evaluation.every_epoch else 0
    pixels = FLOAT * teacher.input_size[0] * teacher.input_size[1] * teacher.input_size[2]
    at_once = max(
        step.saved_bytes * min(config.synthesis.shard_size, config.synthesis.num_images) if passes else 0.0,
        training.saved_bytes * finetune.batch_size / processes if finetune.epochs else 0.0,
    )
    weights = FLOAT * sum(tensor.numel() for tensor in student.net.state_dict().values())
    return Forecast(
        synthesis=step.seconds * passes / processes,
        rounding=_rounding_seconds(config, training.seconds),
        finetune=(training.seconds + teachers) * trained / processes,
        measure=inference * measured / processes,
        memory=BASE_BYTES + WORKING * at_once + 8 * weights + pixels * config.synthesis.num_images,
        disk=2 * pixels * images + 5 * weights,  # a set is assembled from its shards; a checkpoint has the moments, too
        free=float(shutil.disk_usage(nearest_existing(Path(config.runtime.output_dir))).free),
    )


def _rounding_seconds(config: RunConfig, training: float) -> float:
    """Return the seconds of learned rounding, which every process does for itself.

    Args:
        config: The run.
        training: Seconds of a training step for one image.
    """
    settings = config.reconstruction
    if config.quant.rounding == "nearest":
        return 0.0
    batch = min(settings.batch_size, settings.images, config.synthesis.num_images)
    return LEARNED_ROUNDING * training * settings.iterations * batch


def forecast_line(config: RunConfig, found: Forecast) -> str:
    """Return the forecast in one line, with a smaller budget where the run takes hours."""
    parts = [
        f"{name} {duration(seconds)}"
        for name, seconds in (
            ("synthesis", found.synthesis),
            ("learned rounding", found.rounding),
            ("fine-tuning", found.finetune),
            ("measurement", found.measure),
        )
        if seconds >= 1
    ]
    detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    line = (
        f"about {duration(found.seconds)}{detail}, {_gib(found.memory)} of memory per process, "
        f"{_gib(found.disk)} of disk ({_gib(found.free)} free)"
    )
    line += f"; without the synthesis by {config.synthesis.method}" if config.synthesis.is_added else ""
    return line + _smaller(config, found)


def _smaller(config: RunConfig, found: Forecast) -> str:
    """Return the proposal of a smaller budget; "" if the run is short or cannot be made much shorter."""
    number = config.synthesis.num_images
    if found.seconds < LONG_SECONDS or number <= FEWEST_IMAGES:
        return ""
    scaled = found.synthesis + found.finetune
    share = max(0.0, SHORT_SECONDS - found.rounding) / scaled if scaled else 1.0
    images = max(FEWEST_IMAGES, int(number * share) // FEWEST_IMAGES * FEWEST_IMAGES)
    images = max(images, min(number, config.finetune.batch_size))
    part = images / number
    seconds = scaled * part + found.rounding + found.measure
    if images >= number or seconds > found.seconds / 2:
        return ""
    return f"; `--synthesis.num_images {images}` takes about {duration(seconds)}, for a first result"


def _probe_student(
    config: RunConfig, teacher: Teacher, student: Student, device: torch.device
) -> tuple[StepCost, float]:
    """Return the cost of a training step of one image, and the seconds of one image in a measurement."""
    net = copy.deepcopy(student.net).to(device)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    images = min(4, config.finetune.batch_size)
    steps, plain = 0.0, 0.0
    saved = 0.0
    for number in (images, min(32, config.finetune.batch_size)):
        generator = make_generator("forecast", number)  # the state of the process's own stays as it is
        x = torch.randn(number, *teacher.input_size, generator=generator).to(device, memory_format=torch.channels_last)
        if steps == 0.0:
            observe_ranges(net, x, act_range="minmax")
        with saved_bytes() as count:
            net(x).logsumexp(1).sum().backward()  # also warms up
        saved = count[0] / number
        started = _now(device)
        net(x).logsumexp(1).sum().backward()
        steps = (_now(device) - started) / number
        started = _now(device)
        with torch.no_grad():
            net(x)
        plain = (_now(device) - started) / number
        if steps * number > QUICK_SECONDS:
            break
    return StepCost(seconds=steps, saved_bytes=saved), plain


def _now(device: torch.device) -> float:
    """Return the time in seconds, after everything that a GPU was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 / 10 else f"{max(1.0, number / 2**20):.0f} MB"
