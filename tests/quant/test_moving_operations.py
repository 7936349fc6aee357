"""Operations that move, repeat or choose values: the student computes the same, and its integer form and file too."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from support.integer_students import images, student
from support.moving_nets import IDENTITIES, MOVES, NONLINEAR, Around, Operation
from support.small_nets import SIZE
from synq.network.cam_site import locate_cam
from synq.network.op_traits import OpKind, traits_of
from synq.network.tracing import trace_classifier
from synq.quant.cost import layer_calls
from synq.quant.integer_form import integer_form
from synq.quant.layers import quantizers_bypassed

Points = Literal["relu", "inputs"]


def exact(net: nn.Module, act_points: Points) -> tuple[str, ...]:
    """Check student and integer form of a network, and return the names of the quantized activations."""
    made = student(net, 8, act_points)
    noise = images(4)
    with torch.no_grad(), quantizers_bypassed(made.net):
        assert torch.equal(made.net(noise), net(noise))
    with torch.no_grad():
        found, wanted = integer_form(made.net)(noise), made.net(noise)
    assert float(((found - wanted).abs() < 1e-3 * wanted.std()).float().mean()) > 0.9
    return tuple(row.name for row in made.rows if row.role == "activation" and row.bits == 8)


@pytest.mark.parametrize("name", MOVES)
def test_bugs_8_moved_and_chosen_values_stay_on_the_grid(name: str) -> None:
    operation, channels = MOVES[name]
    torch.manual_seed(0)
    points = exact(Around(operation, channels), "relu")
    assert points[0] == "relu" and points[-1] == "relu_1"
    made = student(Around(operation, channels), 4)
    # What the second convolution reads has the bits of the points that it comes from: nothing on the way is float.
    (second,) = (call for call in layer_calls(made.net) if call.layer == "conv2")
    gated = any(part in name for part in ("excitation", "attention"))
    assert second.inputs == (("mul",) if gated else ("relu",)) if "x * 0" not in name else not second.inputs
    exact(Around(operation, channels), "inputs")


@pytest.mark.parametrize("name", IDENTITIES)
def test_bugs_8_identities_in_evaluation_are_passive(name: str) -> None:
    torch.manual_seed(0)
    net = Around(IDENTITIES[name])
    assert exact(net, "relu") == ("relu", "relu_1")
    assert exact(net, "inputs")
    traced = trace_classifier(net, SIZE)
    between = [node for node in traced.graph.nodes if node.op.startswith("call_")]
    kinds = {traits_of(node).kind for node in between}
    assert kinds <= {OpKind.PASSIVE, OpKind.NUMBER, OpKind.CONSTANT, OpKind.LAYER, OpKind.NORM, OpKind.NONLINEAR} | (
        {OpKind.STRUCTURAL}  # the mean of the head
    )
    assert sum(traits_of(node).kind is OpKind.STRUCTURAL for node in between) == 1


@pytest.mark.parametrize("name", NONLINEAR)
def test_bugs_8_new_values_are_quantization_points_in_every_spelling(name: str) -> None:
    operation, points = NONLINEAR[name]
    torch.manual_seed(0)
    assert list(exact(Around(operation), "relu")) == points
    exact(Around(operation), "inputs")


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda net, x: torch.linalg.matrix_exp(x), "its tensors would stay float"),
        (lambda net, x: torch.einsum("nchw,dc->ndhw", x, net.softmax.weight), "is einsum: its tensors would stay"),
        (lambda net, x: x + torch.rand_like(x), "is rand_like: it draws random numbers"),
        (lambda net, x: nn.functional.dropout(x, 0.5, True), "is dropout: it draws random numbers"),
        (
            lambda net, x: torch.fft.rfft2(x).abs().sum(3, keepdim=True) + x,
            "is fft_rfft2: its tensors would stay float",
        ),
        (lambda net, x: x.masked_select(x > 0).sum() + x, "is masked_select: .* depends on the values of the image"),
    ],
)
def test_bugs_8_what_cannot_be_quantized_is_rejected_with_its_reason(operation: Operation, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        student(Around(operation))


@pytest.mark.parametrize("name", ["repeat", "shortcut with zeros_like", "index_select"])
def test_bugs_8_the_map_behind_the_operation_is_found(name: str) -> None:
    located = locate_cam(trace_classifier(Around(*MOVES[name]), SIZE))
    assert (located.kind, located.node, located.channels, located.height) == ("closed_form", "relu_1", 8, 16)


ONNX = [name for name in MOVES if name not in ("kthvalue", "cummax", "median", "max_unpool2d")]
"""Moves that PyTorch can write as ONNX."""
VERSIONED = ("fmin", "fmax", "take_along_dim", "gather")
"""Those that some versions cannot write, or for one number of images only: rejected then."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
def test_bugs_8_the_onnx_file_computes_the_same(name: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from synq.export.onnx_graph import onnx_graph, write_container
    from synq.export.verify import compare, engine_of, open_session

    made = student(Around(*MOVES[name]), 8, "inputs")
    try:
        graph = onnx_graph(integer_form(made.net, operations="onnx"), SIZE)
    except ValueError as error:
        reasons = ("an operation fixes the number of images at 2", f"{name}() of node {name} has no ONNX export")
        assert name in VERSIONED and any(reason in str(error) for reason in reasons)
        return
    model = write_container(graph, "int8")
    sample = images(8)
    with torch.no_grad():
        wanted: Tensor = integer_form(made.net)(sample)
    found = compare(engine_of(open_session(model)), [(wanted, sample, None)], source="x")
    assert found.mean_difference < 0.02


def test_every_spelling_of_one_move_has_the_same_traits() -> None:
    spellings: list[list[Callable[[Tensor], Tensor]]] = [
        [
            lambda x: x.max(1)[0],
            lambda x: torch.max(x, 1).values,
            lambda x: torch.max(x, dim=1)[0],
            lambda x: x.amax(1),
            lambda x: torch.amax(x, (1,)),
            lambda x: torch.ops.aten.amax(x, [1]),
        ],
        [
            lambda x: x.transpose(2, 3),
            lambda x: x.swapaxes(2, 3),
            lambda x: torch.swapdims(x, 2, 3),
            lambda x: x.permute(0, 1, 3, 2),
            lambda x: torch.movedim(x, 2, 3),
            lambda x: x.mT,
        ],
        [lambda x: 2 - x, lambda x: torch.rsub(x, 2), lambda x: -(x - 2), lambda x: (-x) + 2],
        [lambda x: x.repeat(1, 2, 1, 1), lambda x: x.tile((1, 2, 1, 1)), lambda x: torch.cat([x, x], 1)],
        [lambda x: x.sum((2, 3)), lambda x: torch.sum(x, (2, 3)), lambda x: x.sum(3).sum(2)],
        [lambda x: x.mean((2, 3)), lambda x: x.mean(3).mean(2), lambda x: nn.functional.adaptive_avg_pool2d(x, 1)],
    ]
    for same in spellings:
        found = set()
        for operation in same:
            traced = trace_classifier(
                nn.Sequential(nn.Conv2d(3, 4, 1), _Called(operation), nn.Flatten(), nn.LazyLinear(3)), (3, 4, 4)
            )
            nodes = [n for n in traced.graph.nodes if n.op.startswith("call_") and traits_of(n).kind < OpKind.LAYER]
            parts = [traits_of(n) for n in nodes if traits_of(n).kind is OpKind.STRUCTURAL]
            found.add(
                (
                    all(part.keeps_values for part in parts),
                    all(part.positively_homogeneous for part in parts),
                    all(part.averages for part in parts),
                    all(part.resamples for part in parts),
                )
            )
        assert len(found) == 1, (same, found)


class _Called(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)
