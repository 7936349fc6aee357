"""Smoke run: the whole pipeline in miniature, from synthetic images to exported files.

    load_teacher [-> statistics of noise] -> exact? -> W8A8 -> W4A4 run (synthesis, fine-tuning, evaluation) -> export

Its metrics show whether everything works, not how well: eight images, two iterations. A network with random weights
first gets batch-norm statistics of noise; without them the activations of a deep network vanish or explode, and no
comparison would be meaningful.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.common.notices import muted
from synq.config.quant import RESEARCH
from synq.config.run import (
    EvaluationConfig,
    FinetuneConfig,
    QuantConfig,
    ReconstructionConfig,
    RunConfig,
    SynthesisConfig,
    TeacherConfig,
)
from synq.engines.deployed import check_deployable
from synq.evaluation.fidelity import sqnr_db
from synq.export.export import ExportOptions, export_run
from synq.export.operation_check import unexportable_operations
from synq.export.targets.formats import missing_note
from synq.mixed_precision.sensitivity import scan_quantizers
from synq.network.bn_stats import bn_targets
from synq.network.logits import logits_of
from synq.network.ops import products
from synq.pipeline import run
from synq.quant.integer_form import integer_form
from synq.quant.layers import quantizers_bypassed
from synq.quant.student import build_student, observe_ranges
from synq.runs.record import run_folder
from synq.synthesis.run_sets import set_names, set_store
from synq.teacher.sources import RANDOM
from synq.teacher.teacher import Teacher, load_teacher

ROUNDING = 1e-4
"""Largest difference of logits, relative to the largest, that another order of summation makes."""
IMAGES, ITERATIONS, STEPS = 8, 2, 2
NOISE_IMAGES = 16
"""Noise images from which networks with random weights get their batch-norm statistics."""
GOOD_DB = 20.0
"""SQNR of the logits at W8A8 in dB below which the worst tensor is reported."""
SCANNED = 1
"""Images for the search for the worst tensor: there are hundreds of tensors, and only a name is reported."""
OK, REJECTED, FAILED = "works", "rejected", "fails"


def smoke_run(
    config: RunConfig,
    folder: Path,
    on_stage: Callable[[str], None] = lambda stage: None,
    formats: Sequence[str] = ("onnx", "packed"),
) -> dict[str, Any]:
    """Run the whole pipeline in miniature and export the student.

    Args:
        config: Only `teacher`, `quant` and `runtime` are used.
        folder: An empty folder for all files.
        on_stage: Called with the name of each stage as it begins.
        formats: Formats to export under target research; writing and verifying ONNX takes longer than everything else.
            For an engine its one file is written and verified, if the engine is installed.

    Returns:
        teacher, status ("works", "rejected" before any work, "fails" later), reason, seconds; for the stages that were
        reached also input, classes, parameters, layers, batch_norms, cam, exact (with quantizers bypassed, the
        student's logits equal the teacher's bit for bit, with attention those of the traced graph), sqnr_db and
        agreement (percent) at W8A8, loss, bits, export, note; and error, the exception that caused the failure.

    Raises:
        ValueError: A format is unknown, or its packages are missing.
    """
    is_research = config.quant.target == RESEARCH
    options = ExportOptions(formats=formats if is_research else (), rounds=0, with_float=False)
    started = time.perf_counter()
    row: dict[str, Any] = {"teacher": config.teacher.spec, "status": REJECTED, "reason": ""}
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    try:
        on_stage("load")
        teacher = load_teacher(config.teacher)
        row |= _teacher_properties(teacher)
        student = build_student(teacher, config.quant)
        check_deployable(student.net, config.quant, teacher.input_size)
        exported_as = formats if is_research else ()  # those formats are not an engine's
        if "onnx" in exported_as and (lines := unexportable_operations(integer_form(student.net, empty=True))):
            raise ValueError(f"`formats` must not have onnx for this network: {'; '.join(lines)}")
        row["status"] = FAILED
        if config.teacher.weights == RANDOM:
            on_stage("statistics of noise for random weights")
            config = replace(config, teacher=_with_statistics(teacher, config.teacher, folder / "weights.safetensors"))
            teacher = load_teacher(config.teacher)
        on_stage("compare with the teacher bit for bit")
        row["exact"] = _is_exact(teacher, config.quant)
        on_stage("synthesis, fine-tuning, evaluation")
        small = _miniature(config, folder)
        placed = replace(teacher, graph=copy.deepcopy(teacher.graph))  # the run moves it to its device
        with muted():  # eight images of two steps are unfinished on purpose: advice about them would mislead
            record = run(small, teacher=placed)
        row |= {"bits": config.quant.label, "loss": record.loss_history[-1]["loss"]}
        on_stage("W8A8")
        row |= _at_eight_bits(teacher, config.quant, _images(small, teacher))
        note = "" if is_research else missing_note(config.quant.target)
        if note:
            row["export"] = f"not tried: {note}"
        elif exported_as or not is_research:
            on_stage("export")
            with muted():
                _, exported = export_run(run_folder(small), options=options, teacher=teacher)
            row["export"] = ", ".join(file["container"] or file["format"] for file in exported.deployment["files"])
        if not row["exact"]:
            row["reason"] = "with quantizers bypassed, the student differs from the teacher"
        elif not math.isfinite(row["loss"]):
            row["reason"] = "the fine-tuning loss is not finite"
        row["status"] = FAILED if row["reason"] else OK
    except Exception as error:  # any error of a user's network is a result
        row |= {"reason": " ".join(str(error).split()) or type(error).__name__, "error": error}
    row["seconds"] = time.perf_counter() - started
    return row


def _teacher_properties(teacher: Teacher) -> dict[str, Any]:
    cam = teacher.cam
    return {
        "input": " x ".join(map(str, teacher.input_size)),
        "classes": teacher.num_classes,
        "parameters": sum(parameter.numel() for parameter in teacher.graph.parameters()),
        "layers": sum(isinstance(module, nn.Conv2d | nn.Linear) for module in teacher.graph.modules()),
        "batch_norms": len(bn_targets(teacher.graph)),
        "cam": f"{cam.kind} {cam.node} ({cam.channels} x {cam.height} x {cam.width})" if cam.node else "none",
    }


def _with_statistics(teacher: Teacher, config: TeacherConfig, path: Path) -> TeacherConfig:
    """Set all batch-norm statistics of a teacher to those of noise and save its weights as a user would."""
    module = teacher.module
    noise = torch.randn(NOISE_IMAGES, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative instead of exponential moving average
            norm.train()
    with torch.no_grad():
        module(noise)
    state = {name: tensor.contiguous().clone() for name, tensor in module.eval().state_dict().items()}
    safetensors.torch.save_file(state, path)
    properties = {"num_classes": teacher.num_classes, "input_size": teacher.input_size}
    return replace(config, weights=str(path), mean=teacher.mean, std=teacher.std, **properties)  # type: ignore[arg-type]


def _images(config: RunConfig, teacher: Teacher) -> Tensor:
    stored = set_store(config).load(set_names(config, teacher)[0])
    assert stored is not None
    return stored.images


def _is_exact(teacher: Teacher, quant: QuantConfig) -> bool:
    """Return whether the student with its quantizers bypassed is the network, bit for bit.

    Attention of one operation is computed in its steps, in another order of summation: there the traced graph must be
    equal, and the network within rounding.
    """
    student = build_student(teacher, quant).net
    noise = torch.randn(2, *teacher.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), quantizers_bypassed(student):
        logits, returned = student(noise.clone()), teacher.module(noise.clone())
        if torch.equal(logits, returned) or torch.equal(logits.log_softmax(1), returned):
            return True
        is_graph = bool(products(teacher.graph)) and torch.equal(logits, teacher.graph(noise.clone()))
    return is_graph and bool((logits - returned).abs().max() <= ROUNDING * returned.abs().max())


def _miniature(config: RunConfig, folder: Path) -> RunConfig:
    return replace(
        config,
        name="smoke-run",
        synthesis=SynthesisConfig(num_images=IMAGES, shard_size=IMAGES, iterations=ITERATIONS, start="white"),
        reconstruction=ReconstructionConfig(iterations=STEPS, images=IMAGES, batch_size=IMAGES // STEPS),
        finetune=FinetuneConfig(epochs=1, batch_size=IMAGES // STEPS),
        evaluation=EvaluationConfig(dataset="none", heldout_images=IMAGES),
        runtime=replace(config.runtime, output_dir=str(folder), store_dir=None, progress=False),
    )


def _at_eight_bits(teacher: Teacher, quant: QuantConfig, images: Tensor) -> dict[str, Any]:
    """Compare logits of teacher and W8A8 student; report the worst tensor if their SQNR is below GOOD_DB."""
    net = build_student(teacher, quant.at_uniform_bits(8)).net
    observe_ranges(net, images, act_range="minmax")
    reference, logits = logits_of(teacher.graph, images), logits_of(net, images)
    row: dict[str, Any] = {"sqnr_db": sqnr_db(reference, logits)}
    row["agreement"] = 100 * float((reference.argmax(1) == logits.argmax(1)).double().mean())
    if row["sqnr_db"] < GOOD_DB:
        few = slice(SCANNED)
        worst = min(scan_quantizers(net, images[few], reference[few]), key=lambda score: score.sqnr_db)
        row["note"] = f"worst tensor at W8A8: {worst.role} {worst.name}, {worst.sqnr_db:.1f} dB"
    return row
