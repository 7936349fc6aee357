"""Exports of networks that people use, at the widths that they ask for, in ONNX Runtime with its default options."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.configs import TeacherConfig
from synq.integer_form import integer_form
from synq.onnx_file import Container, write_onnx
from synq.students import observe_ranges, quantize_model
from synq.teachers import Teacher, load_teacher
from synq.verification import compare, engine_of, open_session

SIDE = 64
MARGIN = 0.02
"""Images count whose two largest logits differ by more than this share of the logits' deviation: with random weights most are ties."""


def random_teacher(spec: str) -> Teacher:
    return load_teacher(
        TeacherConfig(
            spec=spec, weights="random", input_size=(3, SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
        )
    )


def noise(count: int) -> Tensor:
    """Blobs rather than pixels, so that random weights answer differently."""
    small = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:regnety_002"])
@pytest.mark.parametrize(("bits", "container"), [(8, "int8"), (4, "int4"), (3, "int4")])
def test_decided_images_get_the_students_class(spec: str, bits: int, container: Container) -> None:
    teacher, sample = random_teacher(spec), noise(200)
    student = quantize_model(teacher.graph, weight_bits=bits, act_bits=bits, act_points="inputs")
    observe_ranges(student.net, sample[:64], act_range="mse")
    form = integer_form(student.net, bias_place="layer" if bits == 8 else "apart")
    with torch.no_grad():
        wanted = torch.cat([student.net(part) for part in sample.split(50)])
    engine = engine_of(open_session(write_onnx(form, teacher.input_size, container)))
    batches = zip(wanted.split(50), sample.split(50), [None] * 4, strict=True)
    found = compare(engine, batches, source="noise", margin=MARGIN * float(wanted.std()))
    print(f"{spec} W{bits}A{bits}: {found}")
    assert found.decided >= 20, "enough to speak of"
    assert found.agreement >= 99.9 or round(found.decided * (100 - found.agreement) / 100) <= 1, found
