"""One run, from a pre-trained classifier and no data to a measured low-bit student: the stages in order.

    load_teacher -> synthesize -> low-pass filter -> quantize and calibrate -> finetune -> evaluate -> record

Labeled images enter in `Measure` alone, and only to count correct predictions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from synq.common.files import check_writable
from synq.common.notices import print_notice
from synq.common.progress import Progress
from synq.config.plugins import check_version, settings_in
from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.engines.deployed import check_deployable
from synq.evaluation.measure import Measure
from synq.finetune.attention_settings import attention_note
from synq.finetune.loop import Epoch, finetune
from synq.finetune.networks import aligned_blocks, prepare_networks
from synq.finetune.own_term import check_own_term
from synq.finetune.responses import TappedNetwork
from synq.finetune.schedule import local_batch_size
from synq.own_images import check_own_images, ensure_own_images
from synq.quant.student import Student, build_student, share_changed, weight_codes
from synq.runs.forecast import forecast, forecast_line
from synq.runs.lifecycle import (
    StageTimer,
    blank_record,
    complete_record,
    failure_recorded,
    finished_record,
    held_out_facts,
    repair_config,
    save,
)
from synq.runs.record import RunRecord, run_folder, write_config
from synq.runs.reuse import finished_student, take_student
from synq.runs.tracking import RunLog
from synq.runtime import check_compilable, dtype_of, exists_on_main, make_accelerator
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.own_method import own_method
from synq.synthesis.run_sets import check_space, ensure_sets, low_pass
from synq.teacher.architecture import statistics_note
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher, load_teacher


def run(
    config: RunConfig,
    *,
    accelerator: Accelerator | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    teacher: Teacher | None = None,
    budget: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Run all stages, or resume an interrupted run; return the record of a completed run unchanged.

    The student of a completed run in `<output_dir>` that differs in `evaluation` only is not trained again: it is
    loaded and measured, unless every epoch is to be measured.

    Writes to `<output_dir>/<name>-<digest>/`: `config.json`, `prepared.pt` (the calibrated student, if more was done
    than rounding to nearest), `checkpoint.pt` (last finished epoch), `student.safetensors`, and last `record.json`.

    Args:
        config: The run.
        accelerator: Process group; None makes one from `config.runtime`.
        on_epoch: Called on every process after every epoch with epoch, epochs, objective_value and the loss terms.
        on_checkpoint: Called on the main process with the path of each written checkpoint.
        on_progress: Called on the main process when a stage begins, and after the checkpoint of each epoch, which is
            not measured for it.
        teacher: The result of `load_teacher(config.teacher)` if already loaded; its graph is moved to the run's device.
            None loads it.
        budget: How the settings were chosen, for the record: what `Budget.values` returns; None where the user did.

    Returns:
        The record, on every process.

    Raises:
        ValueError: Invalid input, before anything is written.
        OSError: A file cannot be read or written.
        NonFiniteLossError: Fine-tuning diverged; a record with status "diverged" was written.
    """
    config = make_absolute(config)
    accelerator = accelerator or make_accelerator(config.runtime)
    show = on_progress if on_progress is not None and accelerator.is_main_process else lambda _: None
    folder, timer = run_folder(config), StageTimer(lambda stage: show(Progress(stage=stage)))
    with RunLog(config, folder, accelerator) as log:
        local_batch_size(config.finetune.batch_size, accelerator.num_processes)
        with timer("teacher"):
            teacher, measure, student = open_inputs(config, accelerator, teacher)
            check_own_images(config, teacher)
        finished = finished_record(folder / "record.json", teacher, measure.has_labels_of, accelerator)
        if finished is not None:
            repair_config(folder, config, accelerator)
            return finished
        check_writable(folder)
        check_space(folder, config, teacher, accelerator)
        log.start()
        trained = _trained_before(config, teacher, student, measure, accelerator) if on_epoch is None else None

        with timer("synthesis"):
            ensure_own_images(config, teacher, accelerator)
            train_set, heldout = ensure_sets(config, teacher, accelerator)
        folder.mkdir(parents=True, exist_ok=True)
        measure.hold_out(heldout.images, heldout.labels)
        trained = trained if _is_of(trained, train_set, accelerator) else None
        source = folder if trained is None else trained[0]
        prepared = (source if exists_on_main(source / "prepared.pt") else folder) / "prepared.pt"
        identity = f"{teacher.digest} {train_set.digest}"

        with timer("quantize"):
            pixels = teacher.pixel_range()
            images = low_pass(train_set.images, config, folder, pixel_range=pixels).to(dtype_of(config.runtime))
            teacher_net, student_net, rounding = prepare_networks(
                config, teacher, student, images, accelerator, prepared=prepared, identity=identity
            )
        with timer("measure"):
            reference, rounded = measure(teacher.graph), measure(student.net)
        codes = weight_codes(student.net)
        eval_digest, started = measure.labels_digest, timer.started
        record = blank_record(
            config,
            teacher,
            student,
            train_set,
            heldout,
            eval_digest,
            accelerator,
            started=started,
            rounding=rounding,
            rounded=rounded,
        )
        described = {} if measure.labeled is None else measure.labeled.describe()
        record = replace(record, evaluation=described, budget=dict(budget or {}))
        if accelerator.is_main_process:
            write_config(folder / "config.json", config)

        if trained is None:
            show(Progress(stage="finetune", total=config.finetune.epochs))
            calls = _epoch_callbacks(config, measure, student, log, on_epoch, on_checkpoint, show)
            with failure_recorded(folder, record, accelerator):
                history = _finetune(
                    config, student_net, teacher_net, images, train_set, pixels, accelerator, identity, *calls
                )
        else:
            record = replace(record, student_of=trained[1].student_of or source.name)
            history = take_student(source, trained[1], student.net, accelerator)
        timer.seconds["finetune"] = sum(epoch["seconds"] for epoch in history)

        with timer("measure"):
            final = measure(student.net)
        changed = share_changed(codes, weight_codes(student.net))
        facts = held_out_facts(heldout, teacher)
        record = complete_record(record, reference, rounded, final, history, timer.seconds, changed, facts)
        record = save(folder, record, student.net, accelerator)
        log.end(record)
        accelerator.wait_for_everyone()
        return record


def _trained_before(
    config: RunConfig, teacher: Teacher, student: Student, measure: Measure, accelerator: Accelerator
) -> tuple[Path, RunRecord] | None:
    """Return folder and record of a completed run with the same student, if any, and log the forecast of this run."""
    failure: Exception | None = None
    resumes = exists_on_main(run_folder(config) / "checkpoint.pt")
    found = None if resumes or config.evaluation.every_epoch else finished_student(config, teacher.digest, accelerator)
    if config.runtime.progress and accelerator.is_main_process and not resumes:
        rest = config if found is None else with_overrides(config, {"finetune.epochs": 0})
        number = len(measure.reported) + len(measure.chosen)
        try:
            if note := statistics_note(teacher.module):
                print_notice(note)
            print_notice(forecast_line(config, forecast(rest, teacher, student, number, accelerator)))
        except Exception as error:  # a probe may fail as any training step, for want of memory for example
            failure = error
    if broadcast_object_list([failure is not None])[0]:  # the other processes would wait for this one
        raise failure or RuntimeError("the forecast of this run failed on the main process")
    return found


def _is_of(found: tuple[Path, RunRecord] | None, train_set: SyntheticSet, accelerator: Accelerator) -> bool:
    """Return whether a finished student was trained on these images; log that it is not trained again."""
    if found is None or found[1].set_digest != train_set.digest:
        return False
    if accelerator.is_main_process:
        print_notice(
            f"the student of {found[0]}, which differs in name or evaluation only, is measured and not trained again"
        )
    return True


def check(
    config: RunConfig, *, accelerator: Accelerator | None = None, teacher: Teacher | None = None
) -> tuple[Teacher, Measure]:
    """Load everything a run needs except its synthetic images, to report invalid input before hours of synthesis.

    Args:
        config: The run.
        accelerator: Process group; None makes one from `config.runtime`.
        teacher: As for `run`.

    Returns:
        The teacher, and the measurement with its labeled images.

    Raises:
        ValueError: As `run`.
        OSError: As `run`.
    """
    config = make_absolute(config)
    return open_inputs(config, accelerator or make_accelerator(config.runtime), teacher)[:2]


def prepare(
    config: RunConfig, *, accelerator: Accelerator | None = None, teacher: Teacher | None = None
) -> tuple[SyntheticSet, SyntheticSet]:
    """Return the training and the held-out set of a run, synthesized first unless the store has them.

    Args:
        config: The run.
        accelerator: Process group; None makes one from `config.runtime`.
        teacher: As for `run`.
    """
    config = make_absolute(config)
    accelerator = accelerator or make_accelerator(config.runtime)
    teacher = open_inputs(config, accelerator, teacher)[0]
    ensure_own_images(config, teacher, accelerator)
    return ensure_sets(config, teacher, accelerator)


def open_inputs(
    config: RunConfig, accelerator: Accelerator, teacher: Teacher | None
) -> tuple[Teacher, Measure, Student]:
    """Load the teacher, open the labeled images and build the student, which checks all input.

    Args:
        config: The run, with absolute paths.
        accelerator: Process group.
        teacher: As for `run`.

    Raises:
        ValueError: As `run`.
        OSError: As `run`.
    """
    teacher = teacher or load_teacher(config.teacher)
    if broadcast_object_list([teacher.digest])[0] != teacher.digest:
        raise ValueError("teacher.spec must give all processes the same network, but its weights differ between them")
    for kind, value in settings_in(config):
        check_version(kind, value)
    own_method(config.synthesis)
    check_compilable(config, teacher.cam, accelerator.device)
    check_own_term(
        config.finetune, teacher.num_classes, device=accelerator.device, with_maps=teacher.cam.kind != "none"
    )
    aligned_blocks(config, teacher)
    if note := attention_note(config, teacher.graph, teacher.name):
        print_notice(note)
    measure = Measure.prepare(
        config.evaluation, teacher, accelerator, quant=config.quant, progress=config.runtime.progress
    )
    student = build_student(teacher, config.quant)
    check_deployable(student.net, config.quant, teacher.input_size)
    return teacher, measure, student


def _finetune(
    config: RunConfig,
    student: TappedNetwork,
    teacher: TappedNetwork,
    images: Tensor,
    train_set: SyntheticSet,
    pixel_range: PixelRange,
    accelerator: Accelerator,
    identity: str,
    on_epoch: Callable[[Epoch], None],
    on_checkpoint: Callable[[Path], None] | None,
) -> list[Epoch]:
    """Fine-tune the student, or resume from the run's checkpoint if it is of the same teacher and images."""
    return finetune(
        student,
        teacher,
        images,
        train_set.labels,
        config.finetune,
        accelerator=accelerator,
        seed=config.seed,
        pixel_range=pixel_range,
        bf16=config.runtime.precision == "bf16",
        compiled=config.runtime.compile,
        checkpoint=run_folder(config) / "checkpoint.pt",
        identity=identity,
        on_epoch=on_epoch,
        on_checkpoint=on_checkpoint,
        progress=config.runtime.progress,
    )


def _epoch_callbacks(
    config: RunConfig,
    measure: Measure,
    student: Student,
    log: RunLog,
    on_epoch: Callable[[dict[str, float]], None] | None,
    on_checkpoint: Callable[[Path], None] | None,
    show: Callable[[Progress], None],
) -> tuple[Callable[[Epoch], None], Callable[[Path], None]]:
    """Return the callbacks for the end of an epoch and for its checkpoint.

    The first one measures the objective if configured, logs and calls `on_epoch`; the second one calls `on_checkpoint`
    and `show`.
    """
    epochs: list[Epoch] = []

    def after_epoch(epoch: Epoch) -> None:
        if on_epoch is not None or config.evaluation.every_epoch:
            epoch["objective_value"] = measure.objective(student.net)  # part of the record's loss_history
        log.epoch(epoch)
        if on_epoch is not None:
            on_epoch({**epoch, "epochs": config.finetune.epochs})
        epochs.append(epoch)

    def after_checkpoint(path: Path) -> None:
        if on_checkpoint is not None:
            on_checkpoint(path)
        terms = {name: value for name, value in epochs[-1].items() if name != "epoch"}
        show(Progress(stage="finetune", done=int(epochs[-1]["epoch"]), total=config.finetune.epochs, terms=terms))

    return after_epoch, after_checkpoint
