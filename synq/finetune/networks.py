"""Preparation of teacher and student for fine-tuning: placement on the device, calibration, tapped outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, fx

from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.run import RunConfig
from synq.finetune.checkpoints import read_state, restore_prepared, save_prepared
from synq.finetune.responses import TappedNetwork
from synq.network.attention.locations import locate_attention
from synq.network.blocks import block_ends
from synq.network.tracing import with_features
from synq.quant.fusion import fuse_rectified
from synq.quant.prepare import prepare_student
from synq.quant.student import Student
from synq.runtime import exists_on_main, place, same_metrics, synchronize_parameters
from synq.teacher.teacher import Teacher


def prepare_networks(
    config: RunConfig,
    teacher: Teacher,
    student: Student,
    images: Tensor,
    accelerator: Accelerator,
    *,
    prepared: Path,
    identity: str,
) -> tuple[TappedNetwork, TappedNetwork, dict[str, Any]]:
    """Move teacher and student to the device, calibrate the student, and tap the outputs that the loss compares.

    Args:
        config: The run.
        teacher: Its graph is moved to the device, in place.
        student: From `build_student`; moved and calibrated in place.
        images: (N, C, H, W) synthetic images, low-pass filtered as for fine-tuning.
        accelerator: Process group; the student is the same on every process afterwards.
        prepared: File of a calibrated student, read if it exists; written if more was done than rounding to nearest.
        identity: Digests of teacher and images; a file with another identity is rejected.

    Returns:
        (teacher, student, report of `prepare_student`).

    Raises:
        ValueError: As `prepare_student`, or `prepared` has another identity. One that is damaged is made again.
    """
    for net in (teacher.graph, student.net):
        place(net, config.runtime, accelerator.device, teacher.input_size)
    found = _prepared_before(prepared, identity, student, teacher, accelerator) if exists_on_main(prepared) else None
    if found is not None:
        reference, report = found
    else:
        reference, report = prepare_student(
            student.net,
            teacher.graph,
            images,
            config,
            accelerator.device,
            image_range=teacher.pixel_range(),
            synchronize=same_metrics,
            progress=config.runtime.progress and accelerator.is_main_process,
        )
        if report and accelerator.is_main_process:
            save_prepared(prepared, identity, student.net, None if reference is teacher.graph else reference, report)
    synchronize_parameters(student.net)  # GPUs may have summed the ranges in different orders
    return *_tapped(config, teacher, reference, student), report


def _prepared_before(
    path: Path, identity: str, student: Student, teacher: Teacher, accelerator: Accelerator
) -> tuple[fx.GraphModule, dict[str, Any]] | None:
    """Load a calibrated student; None, with a notice, if the file is damaged, on all processes if it is for one."""
    state, reasons = None, [""]
    try:
        state = read_state(path, identity)
    except DamagedFileError as error:
        reasons = [str(error)]
    reason = next(filter(None, gather_object(reasons) if accelerator.num_processes > 1 else reasons), "")
    if reason or state is None:
        print_notice(f"warning: {reason}; the student is calibrated again")
        return None
    return restore_prepared(state, path, student.net, teacher.graph)


def aligned_blocks(config: RunConfig, teacher: Teacher) -> list[str]:
    """Return the names of the teacher's nodes whose outputs the feature loss compares, without the logits.

    Raises:
        ValueError: If the feature loss is enabled, but there is no block before the logits.
    """
    is_enabled = config.finetune.feature_weight > 0
    blocks = [node.name for node in block_ends(teacher.graph)[:-1]] if is_enabled else []
    if is_enabled and not blocks:
        raise ValueError("finetune.feature_weight must be 0 for this teacher, which has no block before its logits")
    return blocks


def _tapped(
    config: RunConfig, teacher: Teacher, reference: fx.GraphModule, student: Student
) -> tuple[TappedNetwork, TappedNetwork]:
    """Return teacher and student with the CAM's feature map and the aligned blocks among their outputs."""
    cam, student_node = teacher.cam, student.cam_node
    if cam.kind == "none":  # the tap still needs a tensor: the input image costs nothing and is never read
        cam, student_node = replace(cam, node=_input_node(teacher.graph)), _input_node(student.net)
    attentions = tuple(locate_attention(teacher.graph)) if config.finetune.attention_weight > 0 else ()
    others = [*aligned_blocks(config, teacher), *(attention.gathered for attention in attentions)]
    teacher_net = with_features(reference, cam.node, others)
    student_net = with_features(student.net, student_node, [student.taps.get(name, name) for name in others])
    fuse_rectified(student_net)
    return (
        TappedNetwork(net=teacher_net, cam_site=cam, attentions=attentions),
        TappedNetwork(net=student_net, cam_site=cam, attentions=attentions),
    )


def _input_node(net: fx.GraphModule) -> str:
    return str(next(node.name for node in net.graph.nodes if node.op == "placeholder"))
