"""Exports of networks that people use, at the widths that they ask for, in ONNX Runtime with its default options."""

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.configs import TeacherConfig
from synq.integer_form import integer_form
from synq.onnx_file import Container, write_onnx
from synq.students import observe_ranges, quantize_model
from synq.teacher_sources import build_source
from synq.tracing import trace_classifier
from synq.verification import compare, engine_of, open_session

SIDE = 64
MARGIN = 0.3
"""Images count whose two largest logits differ by more than this share of the logits' deviation: with random weights most are ties."""


def network(spec: str) -> fx.GraphModule:
    """Random weights, with batch-norm statistics of what really flows: untouched ones let a deep network fade to a constant."""
    net = build_source(TeacherConfig(spec=spec, weights="random")).module
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        net.train()(noise(64))
    return trace_classifier(net.eval().requires_grad_(False), (3, SIDE, SIDE))


def noise(count: int) -> Tensor:
    """Blobs rather than pixels, so that random weights answer differently."""
    small = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:regnety_002"])
@pytest.mark.parametrize(("bits", "container"), [(8, "int8"), (4, "int4"), (3, "int4")])
def test_decided_images_get_the_students_class(spec: str, bits: int, container: Container) -> None:
    sample = noise(200)
    student = quantize_model(network(spec), weight_bits=bits, act_bits=bits, act_points="inputs")
    observe_ranges(student.net, sample[:64], act_range="mse")
    form = integer_form(student.net, bias_place="apart")
    with torch.no_grad():
        wanted = torch.cat([student.net(part) for part in sample.split(50)])
    engine = engine_of(open_session(write_onnx(form, (3, SIDE, SIDE), container)))
    batches = zip(wanted.split(50), sample.split(50), [None] * 4, strict=True)
    found = compare(engine, batches, source="noise", margin=MARGIN * float(wanted.std()))
    print(f"{spec} W{bits}A{bits}: {found}")
    assert found.decided >= 20, "enough to speak of"
    assert found.agreement >= 99.9 or round(found.decided * (100 - found.agreement) / 100) <= 1, found
