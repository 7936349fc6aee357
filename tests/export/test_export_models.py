"""Exports of common networks at common bit-widths, in ONNX Runtime with its default options."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.config.run import QuantConfig, TeacherConfig
from synq.export.onnx_graph import Container, write_onnx
from synq.export.verify import Comparison, Engine, compare, engine_of, open_session
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form
from synq.quant.student import observe_ranges, quantize_model
from synq.teacher.sources import build_source

SIDE = 64
MARGIN = 0.3
"""Images count whose two largest logits differ by more than this share of the logits' deviation: with random
weights most are ties.
"""


def network(spec: str) -> fx.GraphModule:
    """Random weights, with batch-norm statistics of what really flows: untouched ones let a deep network fade to a
    constant.
    """
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
    """Blobs rather than pixels, so that networks with random weights give different logits."""
    small = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")


WIDTHS = pytest.mark.parametrize(("bits", "container"), [(8, "int8"), (4, "int4"), (3, "int4")])


def exported(net: fx.GraphModule, sample: Tensor, bits: int, container: Container) -> tuple[Tensor, Engine, nn.Module]:
    """Return the logits of ``sample`` of the student's integer form, what runs its file, and the student."""
    student = quantize_model(net, QuantConfig(weight_bits=bits, act_bits=bits, act_points="inputs"))
    observe_ranges(student.net, sample[:64], act_range="mse")
    with torch.no_grad():
        form = integer_form(student.net)
        wanted = torch.cat([form(part) for part in sample.split(50)])
    content = write_onnx(integer_form(student.net, operations="onnx"), tuple(sample.shape[1:]), container)
    return wanted, engine_of(open_session(content)), student.net


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:regnety_002"])
@WIDTHS
def test_decided_images_get_the_students_class(spec: str, bits: int, container: Container) -> None:
    sample = noise(200)
    wanted, engine, _ = exported(network(spec), sample, bits, container)
    batches = zip(wanted.split(50), sample.split(50), [None] * 4, strict=True)
    found = compare(engine, batches, source="noise", margin=MARGIN * float(wanted.std()))
    print(f"{spec} W{bits}A{bits}: {found}")
    assert found.decided >= 20, "enough to speak of"
    assert found.agreement >= 99.9 or round(found.decided * (100 - found.agreement) / 100) <= 1, found


@pytest.fixture(scope="module")
def digits() -> tuple[fx.GraphModule, Tensor]:
    """MobileNetV2, its first stride 1, after three passes over 8 x 8 digits at 32 pixels; and the digits."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    small = images.float().reshape(-1, 1, 8, 8).div(8).sub(1).expand(-1, 3, -1, -1)
    sample = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    torch.manual_seed(0)
    net = build_source(TeacherConfig(spec="torchvision:mobilenet_v2", weights="random", num_classes=10)).module
    net.features[0][0].stride = (1, 1)  # type: ignore[index, union-attr, operator]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    net.train()
    for _ in range(3):
        for rows in torch.randperm(len(sample)).split(64):
            loss = torch.nn.functional.cross_entropy(net(sample[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trace_classifier(net.eval().requires_grad_(False), (3, 32, 32)), sample


@pytest.mark.slow
@pytest.mark.long
@WIDTHS
def test_a_trained_mobilenet_v2_and_what_it_leaves_open(
    digits: tuple[fx.GraphModule, Tensor], bits: int, container: Container
) -> None:
    """Errors propagate through 52 layers: with float sums, the student does not always agree with its integer form."""
    net, sample = digits
    wanted, engine, student = exported(net, sample, bits, container)

    def compared(engine: Engine) -> Comparison:
        batches = ((a, x, None) for a, x in zip(wanted.split(50), sample.split(50), strict=True))
        return compare(engine, batches, source="digits")

    found, simulated = compared(engine), compared(student)
    print(f"W{bits}A{bits}: {found}; simulated: {simulated}")
    # Nothing but the order in which the average pool adds, which may move a code of the last layer.
    assert found.agreement == 100 and found.mean_difference < 1e-4
    assert simulated.agreement > 99
