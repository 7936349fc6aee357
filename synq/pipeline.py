"""One run from a pre-trained classifier and no data to a measured low-bit student: the stages in a row.

    load_teacher -> synthesize -> store -> low-pass filter -> quantize_model -> prepare_student (ranges; rounding, where it is more than
                 to the nearest) -> finetune -> evaluate -> record

Labelled images enter in `Measure` alone, and only to be counted.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, fx

from synq.common.scratch import check_space, scratch_tensor
from synq.config.run import QuantConfig, RunConfig, SynthesisConfig, config_digest, config_to_dict, make_absolute
from synq.evaluation.measure import Measure
from synq.finetune.checkpoints import load_prepared, save_prepared
from synq.finetune.loop import Epoch, NonFiniteLossError, finetune
from synq.finetune.responses import TappedNetwork
from synq.finetune.schedule import local_batch_size
from synq.network.blocks import block_ends
from synq.network.tracing import with_features
from synq.quant.fusion import fuse_rectified
from synq.quant.prepare import prepare_student
from synq.quant.student import Student, quantize_model, share_changed, weight_codes
from synq.runs.lifecycle import blank_record, complete_record, finished_record
from synq.runs.record import RunRecord, check_writable, write_bytes_atomic, write_json_atomic, write_record
from synq.runs.tracking import RunLog
from synq.runtime import check_compilable, dtype_of, main_sees, make_accelerator, make_equal, place, same_figures
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.generate import ensure_set
from synq.synthesis.lowpass import cutoff_in_bins, gaussian_lowpass
from synq.synthesis.store import Purpose, SetStore
from synq.teacher.teacher import Teacher, load_teacher

LARGE_SET_BYTES = 2**28
"""Size from which filtered images are kept on disk: 21,845 images of 32 pixels, 446 of 224."""
FILTER_BATCH = 64
"""Images of a large set that are filtered at a time."""
HELDOUT_SEED = 0
"""Held-out sets are drawn from a stream of their own ("heldout"); one seed for ever, so that all runs of a teacher share one."""


def run(
    config: RunConfig,
    *,
    accelerator: Accelerator | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    teacher: Teacher | None = None,
) -> RunRecord:
    """Do one run, or the rest of one that was stopped; a finished one is returned as it stands.

    Files go to `<output_dir>/<name>-<digest>/`: `config.json`, `prepared.pt` (where more was done than rounding to nearest),
    `checkpoint.pt` (last finished epoch), `student.safetensors`, `record.json` (last).

    Args:
        config: The run.
        accelerator: Process group; None makes one from `config.runtime`.
        on_epoch: Called on every process after every epoch with epoch, epochs, objective_value and the loss terms.
        on_checkpoint: Called on the main process with the path of every checkpoint that has been written.
        teacher: What `load_teacher(config.teacher)` gives, where it is there already; its graph is placed on the run's device. None loads it.

    Returns:
        The record, on every process.

    Raises:
        ValueError, OSError: Bad input, before anything is written.
        NonFiniteLossError: Fine-tuning diverged; a record with status "failed" was written.
    """
    config = make_absolute(config)
    accelerator = accelerator or make_accelerator(config.runtime)
    with RunLog(config, run_folder(config), accelerator) as log:
        return _run(config, accelerator, log, teacher, on_epoch, on_checkpoint)


def _run(
    config: RunConfig,
    accelerator: Accelerator,
    log: RunLog,
    teacher: Teacher | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
    on_checkpoint: Callable[[Path], None] | None,
) -> RunRecord:
    local_batch_size(config.finetune.batch_size, accelerator.num_processes)
    folder = run_folder(config)
    clock, started = _Clock(), datetime.now(UTC)

    with clock("teacher"):
        teacher, measure, student = _open(config, accelerator, teacher)
    finished = finished_record(folder / "record.json", teacher, measure.labels_digest, accelerator)
    if finished is not None:
        return finished
    check_writable(folder)
    _check_space(folder, config, teacher, accelerator)
    log.start()
    with clock("synthesis"):
        train_set, heldout = _synthetic_sets(config, teacher, accelerator)
    measure.hold_out(heldout.images)

    identity = f"{teacher.digest} {train_set.digest}"
    with clock("quantize"):
        images = low_pass(train_set.images, config, folder).to(dtype_of(config.runtime))
        teacher_net, student_net, rounding = _networks(
            config, teacher, student, images, accelerator, folder / "prepared.pt", identity
        )
    with clock("measure"):
        reference = measure(teacher.graph)
        rounded = measure(student.net)

    def after_epoch(epoch: Epoch) -> None:
        if on_epoch is not None or config.evaluation.every_epoch:
            epoch["objective_value"] = measure.objective(student.net)  # stands in the record's loss_history
        log.epoch(epoch)
        if on_epoch is not None:
            on_epoch({**epoch, "epochs": config.finetune.epochs})

    codes = weight_codes(student.net)
    blank = blank_record(config, teacher, student, train_set, heldout, measure.labels_digest, accelerator, started)
    record = replace(blank, rounding=rounding)
    if accelerator.is_main_process:
        write_json_atomic(folder / "config.json", config_to_dict(config))
    try:
        history = finetune(
            student_net,
            teacher_net,
            images,
            train_set.labels,
            config.finetune,
            accelerator=accelerator,
            seed=config.seed,
            bf16=config.runtime.precision == "bf16",
            compiled=config.runtime.compile,
            checkpoint=folder / "checkpoint.pt",
            identity=identity,
            on_epoch=after_epoch,
            on_checkpoint=on_checkpoint,
            progress=config.runtime.progress,
        )
    except NonFiniteLossError as error:
        if accelerator.is_main_process:
            write_record(folder / "record.json", replace(record, status="failed", reason=str(error)))
        raise
    clock.seconds["finetune"] = sum(epoch["seconds"] for epoch in history)

    with clock("measure"):
        final = measure(student.net)
    changed = share_changed(codes, weight_codes(student.net))
    record = complete_record(record, reference, rounded, final, history, clock.seconds, changed)
    if accelerator.is_main_process:
        write_bytes_atomic(folder / "student.safetensors", safetensors.torch.save(_state(student.net)))
        write_record(folder / "record.json", record)
    log.end(record)
    accelerator.wait_for_everyone()
    return record


def check(config: RunConfig, *, accelerator: Accelerator | None = None) -> tuple[Teacher, Measure]:
    """Open everything a run needs besides its images, so that what cannot work is said before hours of synthesis.

    Returns:
        The teacher, and what it is measured on.

    Raises:
        ValueError, OSError: As `run`.
    """
    config = make_absolute(config)
    return _open(config, accelerator or make_accelerator(config.runtime), None)[:2]


def prepare(config: RunConfig, *, accelerator: Accelerator | None = None) -> tuple[SyntheticSet, SyntheticSet]:
    """Make the synthetic sets of a run, training and held-out, where the store does not have them yet."""
    config = make_absolute(config)
    accelerator = accelerator or make_accelerator(config.runtime)
    return _synthetic_sets(config, _open(config, accelerator, None)[0], accelerator)


def set_store(config: RunConfig) -> SetStore:
    """Return the store of a run's synthetic sets."""
    return SetStore(config.runtime.store_dir or Path(config.runtime.output_dir) / "store")


def set_names(config: RunConfig, teacher: Teacher | None = None) -> list[str]:
    """Return the names that a run's training and held-out set have in the store, made or not."""
    config = make_absolute(config)
    teacher = teacher or load_teacher(config.teacher)
    return [
        set_store(config).key(teacher.digest, settings, seed, input_size=teacher.input_size, purpose=purpose)
        for settings, seed, purpose in _set_requests(config)
    ]


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run: its name and the digest of what decides its result."""
    return Path(config.runtime.output_dir) / f"{config.name}-{config_digest(config)}"


def low_pass(images: Tensor, config: RunConfig, folder: Path | None = None) -> Tensor:
    """Filter images (N, C, H, W) once, before everything that sees them; without a cutoff they stay as they are.

    From `LARGE_SET_BYTES` on the result lies in a nameless file in `folder`, where there is one, and not in memory.
    """
    settings = config.finetune
    if settings.lowpass_cutoff is None:
        return images
    height, width = images.shape[-2:]
    bins = cutoff_in_bins(settings.lowpass_cutoff, settings.lowpass_unit, height, width)
    if folder is None or images.nbytes < LARGE_SET_BYTES:
        return gaussian_lowpass(images, bins)
    return gaussian_lowpass(images, bins, FILTER_BATCH, scratch_tensor(tuple(images.shape), images.dtype, folder))


def build_student(teacher: Teacher, quant: QuantConfig) -> Student:
    """Round the teacher to the widths of a configuration; ranges are still to be observed."""
    return quantize_model(
        teacher.graph,
        weight_bits=quant.weight_bits,
        act_bits=quant.act_bits,
        act_points=quant.act_points,
        first_bits=quant.first_bits,
        last_bits=quant.last_bits,
        last_bits_for_input=quant.last_bits_for_input,
        layer_weight_bits=quant.layer_weight_bits,
        layer_act_bits=quant.layer_act_bits,
        cam_node=teacher.cam.node,
        learned_steps=quant.learned_steps,
        rounding=quant.rounding,
    )


def _open(config: RunConfig, accelerator: Accelerator, teacher: Teacher | None) -> tuple[Teacher, Measure, Student]:
    """Load the teacher, open the labelled images, build the student: everything that can be refused before the work."""
    teacher = teacher or load_teacher(config.teacher)
    if broadcast_object_list([teacher.digest])[0] != teacher.digest:
        raise ValueError("teacher.spec must give every process the same network, but its weights differ between them")
    check_compilable(config, teacher.cam, accelerator.device)
    _aligned_blocks(config, teacher)
    measure = Measure.prepare(config.evaluation, teacher, accelerator, progress=config.runtime.progress)
    return teacher, measure, build_student(teacher, config.quant)


def _networks(
    config: RunConfig,
    teacher: Teacher,
    student: Student,
    images: Tensor,
    accelerator: Accelerator,
    prepared: Path,
    identity: str,
) -> tuple[TappedNetwork, TappedNetwork, dict[str, Any]]:
    """Place both networks, set the student's ranges and rounding, tap the features of both; also returns what was done."""
    for net in (teacher.graph, student.net):
        place(net, config.runtime, accelerator.device, teacher.input_size)
    if main_sees(prepared):
        reference, rounding = load_prepared(prepared, identity, student.net, teacher.graph)
    else:
        reference, rounding = prepare_student(
            student.net,
            teacher.graph,
            images,
            config,
            accelerator.device,
            image_range=teacher.pixel_range(),
            agree=same_figures,
            progress=config.runtime.progress and accelerator.is_main_process,
        )
        if rounding and accelerator.is_main_process:
            save_prepared(prepared, identity, student.net, None if reference is teacher.graph else reference, rounding)
    make_equal(student.net)  # what is measured from here on is one student
    cam, student_node = teacher.cam, student.cam_node
    if cam.kind == "none":  # the tap still needs a tensor; the image itself costs nothing and is never read
        cam, student_node = replace(cam, node=_input_node(teacher.graph)), _input_node(student.net)
    blocks = _aligned_blocks(config, teacher)
    teacher_net = with_features(reference, cam.node, blocks)
    student_net = with_features(student.net, student_node, [student.taps.get(name, name) for name in blocks])
    fuse_rectified(student_net)
    return TappedNetwork(net=teacher_net, site=cam), TappedNetwork(net=student_net, site=cam), rounding


def _aligned_blocks(config: RunConfig, teacher: Teacher) -> list[str]:
    """Return the nodes whose outputs are aligned; the logits have a loss of their own."""
    wanted = config.finetune.feature_weight > 0
    blocks = [node.name for node in block_ends(teacher.graph)[:-1]] if wanted else []
    if wanted and not blocks:
        raise ValueError("finetune.feature_weight must be 0 for this teacher, which has no block before its logits")
    return blocks


def _synthetic_sets(config: RunConfig, teacher: Teacher, accelerator: Accelerator) -> tuple[SyntheticSet, SyntheticSet]:
    store, progress = set_store(config), config.runtime.progress
    train_set, heldout = (
        ensure_set(teacher, settings, seed, store, accelerator=accelerator, purpose=purpose, progress=progress)
        for settings, seed, purpose in _set_requests(config)
    )
    return train_set, heldout


def _set_requests(
    config: RunConfig,
) -> tuple[tuple[SynthesisConfig, int, Purpose], tuple[SynthesisConfig, int, Purpose]]:
    """Settings, seed and purpose of a run's training set and of its held-out set.

    The latter is made of optimised pixels whatever makes the former, so that methods, and noise, are measured on the same images.
    """
    number = config.evaluation.heldout_images
    heldout = replace(config.synthesis, num_images=number, method="inversion", swing_conv=None)
    return (config.synthesis, config.data_seed, "train"), (heldout, HELDOUT_SEED, "heldout")


@dataclass
class _Clock:
    """Seconds of each stage of this process."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _check_space(folder: Path, config: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    """Refuse, before the synthesis, a disk that cannot take the filtered images of this machine's processes."""
    size = 4 * config.synthesis.num_images * math.prod(teacher.input_size)
    if config.finetune.lowpass_cutoff is not None and size >= LARGE_SET_BYTES:
        check_space(folder, size, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def _input_node(net: fx.GraphModule) -> str:
    return str(next(node.name for node in net.graph.nodes if node.op == "placeholder"))


def _state(net: fx.GraphModule) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in net.state_dict().items()}
