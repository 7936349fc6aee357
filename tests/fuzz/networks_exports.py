"""Exports of a random network: each file, in its engine, computes what the integer form computes."""

import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.exc import UserError

from fuzz.networks_checks import close, equal
from fuzz.networks_rejections import DifferenceError
from fuzz.networks_targets import file_fault
from synq.export.onnx_graph import INT4_BITS, onnx_graph, write_container
from synq.export.packed import load_packed, save_packed
from synq.export.verify import Tolerance, compare, engine_of, open_session
from synq.quant.integer_form import integer_form
from synq.quant.student import Student
from synq.teacher.teacher import Teacher


@torch.no_grad()
def check_exports(teacher: Teacher, student: Student, images: Tensor, where: str, rng: random.Random) -> int:
    """Export the float classifier and its student to every format, and compare each with what it was made from.

    Args:
        teacher: The classifier.
        student: Its student, with observed ranges.
        images: (N, C, H, W) the images to compare on.
        where: Bits and points, for messages.
        rng: Chooses between the float graph and the program, so that each network costs a second less.

    Returns:
        The number of files.

    Raises:
        DifferenceError: If one differs.
        ValueError: If one cannot be written.
    """
    form, size, files = integer_form(student.net), teacher.input_size, 1
    logits = form(images.clone())
    if rng.random() < 0.5:
        check_float_onnx(teacher, images)
        files += 1
    simulation = compare(student.net, [(logits, images.clone(), None)], source="random")
    graph = onnx_graph(integer_form(student.net, operations="onnx"), size)
    bits = min(row.bits for row in student.rows)
    for container in ("int8", "matmul", *(("int4",) if bits <= INT4_BITS else ())):
        engine = engine_of(open_session(write_container(graph, container)))  # type: ignore[arg-type]
        check_file(engine, logits, images, f"{where}: ONNX {container}", simulation)
        files += 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(path, form, {"input_size": list(size)})
        equal(load_packed(path, student.net)(images.clone()), logits, f"{where}: packed file, integer form")
    if rng.random() < 0.5:
        try:
            program = torch.export.export(
                integer_form(student.net, operations="torch"),
                (torch.zeros(2, *size),),
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            )
        except UserError as error:
            if "Dim('N', max=" in str(error):  # the network's constants suffice for some number of images only
                return files
            raise
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        engine = torch.export.load(io.BytesIO(buffer.getvalue())).module()
        check_file(engine, logits, images, f"{where}: program", simulation)
        files += 1
    fault, count = file_fault(teacher, rng, images)
    if fault:
        raise DifferenceError(fault)
    return files + count


def check_float_onnx(teacher: Teacher, images: Tensor) -> None:
    """Export the float classifier, whose logits leave no room for a difference in meaning."""
    model = write_container(onnx_graph(integer_form(teacher.graph, operations="onnx"), teacher.input_size), "int8")
    engine, expected = engine_of(open_session(model)), teacher.graph(images.clone())
    close(engine(images), expected, "float ONNX, traced network", scale=10)
    close(engine(images[:1]), expected[:1], "float ONNX of one image, traced network", scale=10)


def check_file(
    engine: Callable[[Tensor], Tensor], logits: Tensor, images: Tensor, what: str, simulation: object
) -> None:
    """Compare a file with the integer form: within the export's own limit, and on one image as on many."""
    found = engine(images.clone())
    if found.shape != logits.shape:
        raise DifferenceError(f"{what}: shapes {tuple(found.shape)} and {tuple(logits.shape)}")
    one = engine(images[:1].clone())
    if one.shape != logits[:1].shape:
        raise DifferenceError(f"{what}: shape {tuple(one.shape)} for one image")
    comparison = compare(lambda _: found, [(logits, images, None)], source="random")
    violation = Tolerance().violation(comparison, simulation)  # type: ignore[arg-type]
    # Differences are in units of the deviation of the logits, which is that of rounding where all are the same.
    constant = float(logits.std()) <= 1e-5 * float(logits.abs().max())
    if violation and comparison.mean_difference > 0.02 and not constant:
        raise DifferenceError(f"{what}: {violation}")
