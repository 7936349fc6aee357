"""Exported files compute what the student computes, on every engine and with every setting of an operation."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import helper

from support.export_nets import Averages, Divided, Exact
from support.integer_students import images, student
from support.onnx_graphs import graph_of
from support.small_nets import Residual, plain
from synq.export.exactness import inexact_steps
from synq.export.onnx_graph import Container, write_container
from synq.export.verify import Comparison, Engine, compare, engine_of, open_session
from synq.quant.integer_form import integer_form

ROWS = 64


def leaky() -> nn.Module:
    return Averages(activation=lambda: nn.LeakyReLU(0.3))  # type: ignore[arg-type]


def compared(form: fx.GraphModule, engine: Engine) -> Comparison:
    sample = images(ROWS)
    with torch.no_grad():
        return compare(engine, [(form(sample), sample, None)], source="x")


@pytest.mark.parametrize("container", ["int8", "int4", "matmul"])
def test_l_1_every_row_of_an_exact_student_is_equal(container: Container) -> None:
    form, graph = graph_of(Exact, 4, "inputs")
    assert inexact_steps(form) == []
    found = compared(form, engine_of(open_session(write_container(graph, container))))
    assert (found.identical, found.max_difference) == (ROWS, 0)


@pytest.mark.parametrize(
    ("make", "bits", "act_points"),
    [
        (Divided, 4, "inputs"),
        (Averages, 8, "relu"),
        pytest.param(Averages, 4, "inputs", marks=pytest.mark.slow),
        pytest.param(leaky, 8, "relu", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_l_1_pools_with_divisors_and_padding_are_those_of_the_student(
    make: Callable[[], nn.Module], bits: int, act_points: Literal["relu", "inputs"]
) -> None:
    form, graph = graph_of(make, bits, act_points)
    assert inexact_steps(form)
    found = compared(form, engine_of(open_session(write_container(graph, "int8"))))
    assert found.mean_difference < 1e-3 and found.agreement_all == 100
    assert found.identical > 0.9 * ROWS or act_points == "relu"


@pytest.mark.parametrize(("make", "bits", "act_points"), [(Averages, 8, "relu"), (Exact, 4, "inputs")])
def test_l_2_no_pool_is_left_to_the_engines_rules(
    make: Callable[[], nn.Module], bits: int, act_points: Literal["relu", "inputs"]
) -> None:
    pools = [node for node in graph_of(make, bits, act_points)[1].graph.node if node.op_type.endswith("Pool")]
    settings = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in pools]
    assert len(settings) >= 6
    for pool in settings:
        assert not pool.get("count_include_pad") or not any(pool.get("pads", ()))
        if tuple(pool.get("dilations", ())) != (2, 2):  # its padding would be larger than its kernel
            assert not pool.get("ceil_mode")


@pytest.mark.parametrize(
    ("make", "bits", "act_points"),
    [
        (Averages, 8, "relu"),
        (Exact, 4, "inputs"),
        pytest.param(leaky, 8, "relu", marks=pytest.mark.slow),
        pytest.param(Averages, 4, "inputs", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_l_2_openvino_runs_the_same_network(
    make: Callable[[], nn.Module], bits: int, act_points: Literal["relu", "inputs"], tmp_path: object
) -> None:
    openvino = pytest.importorskip("openvino")
    form, graph = graph_of(make, bits, act_points)
    (path := tmp_path / "model.onnx").write_bytes(write_container(graph, "int8"))  # type: ignore[operator]
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def engine(sample: Tensor) -> Tensor:
        return torch.from_numpy(compiled(sample.numpy())[0])

    found = compared(form, engine)
    # Before a linear layer OpenVINO rounds pooled codes to 8 bits again: 0.011 for a pool without any padding.
    assert found.mean_difference < 0.02 and found.agreement_all > 95, found


class Shares(nn.Module):
    """A convolution whose sums may be larger than float32 can represent exactly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.wide, self.fc = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 4, 3), nn.Linear(4, 5)
        self.wide.weight.data.uniform_(0.9, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.conv(x))))
        return self.fc(torch.max_pool2d(x, 12).flatten(1))


@pytest.mark.parametrize(
    ("make", "bits", "act_points", "steps"),
    [
        (Exact, 3, "inputs", []),
        (Residual, 4, "inputs", ["adaptive_avg_pool2d"]),
        (Residual, 4, "relu", ["conv1", "adaptive_avg_pool2d", "fc"]),
        (plain, 8, "inputs", ["_5"]),
        (lambda: Shares(8), 8, "inputs", []),
        (lambda: Shares(64), 8, "inputs", ["wide"]),
        (lambda: Shares(64), 7, "inputs", []),
    ],
)  # fmt: skip
def test_steps_that_engines_may_compute_differently_are_known(
    make: Callable[[], nn.Module], bits: int, act_points: Literal["relu", "inputs"], steps: list[str]
) -> None:
    form = integer_form(student(make(), bits, act_points).net)
    assert inexact_steps(form) == steps
