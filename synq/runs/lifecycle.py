"""The record of a run over its lifetime: created before fine-tuning, completed and written after it or on failure."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from synq.common.environment import environment
from synq.common.files import DamagedFileError, write_bytes_atomic
from synq.common.notices import print_notice
from synq.common.statistics import drop_of
from synq.common.text_tables import plural
from synq.config.run import FinetuneConfig, RunConfig, config_digest, config_to_dict, load_run
from synq.evaluation.harder_views import MAX_IMAGES, VIEWS
from synq.evaluation.measure import Measurement
from synq.finetune.loop import Epoch, NonFiniteLossError
from synq.quant.student import Student
from synq.runs.expected_agreement import HeldOut, expected_agreement, poor_warnings, worse_warnings
from synq.runs.record import RunRecord, read_record, write_config, write_record
from synq.runs.reuse import STUDENT_FILE, check_student
from synq.runs.tuning_effect import harm_warnings, rounding_warnings, tuning_changes
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.run_sets import set_warnings
from synq.teacher.teacher import Teacher
from synq.teacher.trust import code_mark

LARGE_KL = 0.5
"""KL to the teacher, in nats, from which on mixed precision is suggested."""


class StageTimer:
    """Wall-clock seconds of each stage of a run, on this process.

    Attributes:
        started: Start of the run, UTC.
        seconds: Seconds by stage, summed if a stage is entered several times.
    """

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        """Start the clock.

        Args:
            on_stage: Called with the name of each stage when it begins.
        """
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time until the end of the context to `stage`."""
        if self._on_stage is not None:
            self._on_stage(stage)
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def blank_record(
    config: RunConfig,
    teacher: Teacher,
    student: Student,
    train_set: SyntheticSet,
    heldout: SyntheticSet,
    eval_digest: str,
    accelerator: Accelerator,
    *,
    started: datetime,
    rounding: dict[str, Any],
    rounded: Measurement,
) -> RunRecord:
    """Return the record with everything that is known before fine-tuning; print what makes it doubtful at once.

    Args:
        config: The run.
        teacher: The teacher.
        student: The student.
        train_set: Synthetic training set.
        heldout: Held-out synthetic set.
        eval_digest: Digest of the labeled images, "" without labels.
        accelerator: Process group.
        started: Start of the run, UTC.
        rounding: Report of `prepare_student`.
        rounded: Measurement of the student before fine-tuning.
    """
    cam = teacher.cam
    teacher_fields: dict[str, Any] = {
        "spec": teacher.spec,
        "digest": teacher.digest,
        "name": teacher.name,
        "num_classes": teacher.num_classes,
        "input_size": list(teacher.input_size),
        "mean": list(teacher.mean),
        "std": list(teacher.std),
        "preprocessing": None if teacher.preprocessing is None else asdict(teacher.preprocessing),
        **({"code": mark} if (mark := code_mark(teacher.spec)) else {}),
        "cam": {"node": cam.node, "kind": cam.kind, "reason": cam.reason},
    }
    warnings = []
    if cam.kind == "none" and config.finetune.uses_cam:
        warnings.append(f"the CAM term is off: {cam.reason}")
    warnings += set_warnings(config.synthesis, train_set, heldout)
    quant = config.quant
    ends = (bits for bits in quant.end_bits if bits is not None)
    all_bits = (
        quant.weight_bits,
        quant.act_bits,
        *ends,
        *quant.layer_weight_bits.values(),
        *quant.layer_act_bits.values(),
    )
    doubts = rounding_warnings(min(all_bits), rounded.fidelity, quant.act_range)
    if accelerator.is_main_process:
        for text in doubts:
            print_notice(f"warning: {text}")
    warnings += doubts
    return RunRecord(
        name=config.name,
        config=config_to_dict(config),
        config_digest=config_digest(config),
        seed=config.seed,
        data_seed=config.data_seed,
        teacher=teacher_fields,
        model=teacher.name,
        weight_bits=config.quant.weight_bits,
        act_bits=config.quant.act_bits,
        protocol=config.protocol,
        act_points=config.quant.points,
        objective=config.evaluation.objective,
        size_bytes=student.size_bytes,
        bitops=student.bitops,
        set_digest=train_set.digest,
        heldout_digest=heldout.digest,
        eval_digest=eval_digest,
        layers=[asdict(row) for row in student.rows],
        warnings=warnings,
        device=_device_name(accelerator),
        started=started.isoformat(timespec="seconds"),
        rounding=rounding,
        set_seconds=train_set.manifest["seconds"] + heldout.manifest["seconds"],
        **environment(),
    )


@contextmanager
def failure_recorded(folder: Path, record: RunRecord, accelerator: Accelerator) -> Iterator[None]:
    """Write a record of status "diverged" if fine-tuning in the ``with`` block diverges, and raise the error again."""
    try:
        yield
    except NonFiniteLossError as error:
        if accelerator.is_main_process:
            write_record(folder / "record.json", replace(record, status="diverged", reason=str(error)))
        raise


def save(folder: Path, record: RunRecord, student: nn.Module, accelerator: Accelerator) -> RunRecord:
    """Write the student's `state_dict` and then the record, on the main process; return it, with the digest of it."""
    digests: list[dict[str, str]] = [{}]
    if accelerator.is_main_process:
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.state_dict().items()}
        content = safetensors.torch.save(state)
        digests = [{STUDENT_FILE: hashlib.sha256(content).hexdigest()}]
        write_bytes_atomic(folder / STUDENT_FILE, content)
        write_record(folder / "record.json", replace(record, files=digests[0]))
    return replace(record, files=broadcast_object_list(digests)[0])


def complete_record(
    record: RunRecord,
    teacher: Measurement,
    rounded: Measurement,
    final: Measurement,
    history: list[Epoch],
    seconds: dict[str, float],
    codes_changed: float,
    heldout: HeldOut,
) -> RunRecord:
    """Return ``record`` with the results of a finished run.

    Args:
        record: From `blank_record`.
        teacher: Measurement of the teacher.
        rounded: Measurement of the student before fine-tuning.
        final: Measurement of the student after the last epoch.
        history: Mean loss terms of each epoch.
        seconds: Seconds by stage.
        codes_changed: Share (0..1) of the integer weights that fine-tuning changed.
        heldout: From `held_out_facts`.
    """
    expected = expected_agreement(rounded.harder, final.harder, heldout, len(VIEWS), final.fidelity.get("agreement"))
    changes = tuning_changes(rounded.top1, final.top1, rounded.fidelity, final.fidelity)
    return replace(
        record,
        objective_value=final.objective,
        fidelity=final.fidelity,
        teacher_top1=teacher.top1,
        rtn_top1=rounded.top1,
        rtn_fidelity=rounded.fidelity,
        top1=final.top1,
        top5=final.top5,
        drop=drop_of(final.lost, final.gained, final.num_eval),
        num_eval=final.num_eval,
        rtn_lost=rounded.lost,
        rtn_gained=rounded.gained,
        lost=final.lost,
        gained=final.gained,
        kept_share=history[-1]["kept"] if history else None,
        loss_history=list(history),
        warnings=[
            *record.warnings,
            *_mask_warnings(record.config["finetune"], history),
            *(harm_warnings(changes) if history else []),
            *(worse_warnings(expected) if history else []),
            *poor_warnings(expected),
            *_distance_warnings(record.config["quant"], final),
        ],
        seconds=seconds,
        total_seconds=sum(seconds.values()),
        codes_changed=codes_changed,
        expected_agreement=expected,
    )


def held_out_facts(heldout: SyntheticSet, teacher: Teacher) -> HeldOut:
    """Return what decides whether the agreement on real images can be predicted from a held-out set."""
    images, side = min(len(heldout.labels), MAX_IMAGES), max(teacher.input_size[1:])
    return HeldOut(images=images, classes=teacher.num_classes, side=side, shown=heldout.manifest["agreement"])


def _mask_warnings(settings: dict[str, Any], history: list[Epoch]) -> list[str]:
    """Warn if nearly no image keeps its hard label, or nearly all of them do and the user chose the threshold.

    At the default threshold the latter is what fitted images give: nothing to mend, and in the record as `kept_share`.
    """
    tau = settings["difficulty_threshold"]
    if not history or settings["ce_weight"] == 0 or tau >= 1:
        return []
    share = history[-1]["kept"]
    if 0.01 <= share <= 0.99 or (share > 0.99 and tau == FinetuneConfig().difficulty_threshold):
        return []
    if share > 0.99:
        remedy = "this is no error, but a stronger low-pass filter makes more images difficult"
    else:
        remedy = "raise it, or weaken the low-pass filter, to use hard labels"
    effect = "has no effect" if share > 0.99 else "switches hard labels off"
    return [f"difficulty_threshold {tau} {effect}: {100 * share:.1f} % of the images keep their hard label; {remedy}"]


def _distance_warnings(quant: dict[str, Any], final: Measurement) -> list[str]:
    """Suggest mixed precision when the final KL is large and bit-widths are uniform."""
    kl = final.fidelity["kl"]
    at_minimum = quant["weight_bits"] == 2  # no weight can have fewer bits to compensate for tensors with more
    if kl is None or not kl >= LARGE_KL or at_minimum or quant["layer_weight_bits"] or quant["layer_act_bits"]:
        return []
    return [
        f"the student is far from its teacher: KL {kl:.2g} on held-out synthetic images; "
        "`synq mixed-precision --activations` with the same settings finds the most sensitive tensors, and bit-widths "
        "for them at the same size and number of bit operations"
    ]


def _device_name(accelerator: Accelerator) -> str:
    processes = f" x {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device) + processes
    return f"cpu, {plural(torch.get_num_threads(), 'thread')}{processes}"


def finished_record(
    path: Path, teacher: Teacher, has_labels_of: Callable[[str], bool], accelerator: Accelerator
) -> RunRecord | None:
    """Return the record of a completed run, as read by the main process, on all processes; None if there is none.

    A run with a damaged record or student has none: a notice names the file, and it is made again from what is intact.

    Args:
        path: The record.
        teacher: The run's teacher.
        has_labels_of: Takes the digest of labeled images; returns whether it is that of the run's.
        accelerator: Process group.

    Raises:
        ValueError: If the record belongs to another teacher or other labeled images.
    """
    found = [_intact_record(path) if accelerator.is_main_process and path.exists() else None]
    record = broadcast_object_list(found)[0]
    if record is None:
        return None
    for what, same in (
        ("teachers", record.teacher.get("digest") == teacher.digest),
        ("labeled sets", has_labels_of(record.eval_digest)),
    ):
        if not same:
            raise ValueError(
                f"runtime.output_dir must not mix {what}: {path} was made with different {what} of the same name. "
                "Choose another output_dir or name"
            )
    return record if record.status == "completed" else None


def _intact_record(path: Path) -> RunRecord | None:
    try:
        record = read_record(path)
        if record.status == "completed":
            check_student(path.parent, record)
    except DamagedFileError as error:
        print_notice(f"warning: {error}; the run goes on from its last intact state, and writes it again")
        return None
    return record


def repair_config(folder: Path, config: RunConfig, accelerator: Accelerator) -> None:
    """Write the settings of a finished run again, with a notice, if their file is damaged or missing."""
    path = folder / "config.json"
    if not accelerator.is_main_process:
        return
    try:
        load_run(path)
    except (ValueError, OSError) as error:
        print_notice(f"warning: {error}; it is written again")
        write_config(path, config)
