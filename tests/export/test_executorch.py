"""Files of ExecuTorch with its XNNPACK backend: every bit of every logit is the simulation's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch", reason="ExecuTorch is not installed (the extra `executorch`)")

from support.executorch_models import differing_logits
from support.mobile_nets import NETS, lowered
from support.placed_students import placed
from support.program_builder import ProgramBuilder
from support.random_programs import random_program
from synq.engines.lowering import lower
from synq.engines.program import AveragePool, Elementwise, Program
from synq.engines.simulation import Simulation
from synq.export.executorch import write_pte
from synq.export.mobile.quantized_module import FUNCTIONS, QuantizedModule

IMAGES = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(5))
PIECES = ("convolution", "depthwise", "sum", "two_branches", "gate", "product", "concatenation", "average_pool")
MOVES = ("reshape", "transpose", "shuffle", "slice", "pad")
# Third parties that we cannot mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def _random(seed: int, pieces: tuple[str, ...], bits: int) -> Program:
    program = random_program(
        seed, target="executorch", float_logits=False, pieces=pieces, weight_bits=bits, act_bits=bits
    )
    steps = (replace(step, count_padding=True) if isinstance(step, AveragePool) else step for step in program.steps)
    return replace(program, steps=tuple(steps))


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [PIECES, (*MOVES, "convolution")], ids=["arithmetic", "moves"])
@pytest.mark.parametrize("bits", [8, 4])
def test_random_programs(pieces: tuple[str, ...], bits: int) -> None:
    for seed in range(3):
        assert not differing_logits(_random(seed, pieces, bits), IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (4, 4)])
def test_whole_networks(net: str, weight_bits: int, act_bits: int) -> None:
    program, images = lowered(net, "executorch", weight_bits=weight_bits, act_bits=act_bits)
    assert Simulation(program)(images).unique().numel() > 4
    assert not differing_logits(program, images)


@pytest.mark.slow
def test_every_code_of_every_function() -> None:
    builder = ProgramBuilder((4, 16, 16), 0, weight_bits=8, act_bits=8)
    image = builder.quantize()
    arguments = {"affine": {"factor": -0.7, "offset": 0.3}, "leaky_relu": {"negative_slope": 0.1}}
    outputs = [builder.elementwise(image, name, **arguments.get(name, {})) for name in FUNCTIONS]
    program = builder.build(builder.dequantize(builder.flatten(builder.concatenation(outputs))), "executorch")
    grid = builder.grids[image]
    codes = torch.arange(1024).remainder(256).reshape(1, 4, 16, 16)
    assert not differing_logits(program, (codes - grid.zero_point) * grid.scale)


def test_a_network_is_one_delegate() -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    program, _ = lowered("resnet", "executorch")
    plan = deserialize_pte_binary(write_pte(program)).program.execution_plan[0]
    assert [delegate.id for delegate in plan.delegates] == ["XnnpackBackend"]


def test_pools_and_reshapes_run_on_codes() -> None:
    """Only the image and the logits are converted: an operator that XNNPACK runs in float has a conversion around."""
    program, _ = lowered("resnet", "executorch")
    module = QuantizedModule(program)
    exported = torch.export.export(module.eval(), (torch.zeros(1, *program.shapes[program.image]),), strict=True)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not any("relu" in name for name in called)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b, v: b.average_pool(v, (2, 2), (1, 1), (1, 0, 0, 0)), "an average pool that leaves out its padding"),
        (lambda b, v: b.max_pool(v, (2, 2), (1, 1), (1, 0, 0, 0)), "a maximum pool with the padding"),
        (lambda b, v: b.elementwise(v, "mish"), "the function mish: use one of "),
    ],
)
def test_what_the_engine_cannot_compute_exactly_is_rejected(make: object, message: str) -> None:
    builder = ProgramBuilder((3, 12, 11), 0, weight_bits=8, act_bits=8)
    value = make(builder, builder.quantize())  # type: ignore[operator]
    program = builder.build(builder.dequantize(builder.flatten(value)), "executorch")
    with pytest.raises(ValueError, match=f"`quant.target` executorch must .* but `layer.{value}` is {message}"):
        QuantizedModule(program)(IMAGES)


@pytest.mark.slow
def test_biases_beyond_24_bits() -> None:
    """The engine is given floats, so that large codes, of a layer after a dead one, lose digits: too few to be seen."""
    builder = ProgramBuilder((3, 12, 11), 0, weight_bits=8, act_bits=8)
    value = builder.convolution(builder.quantize(), 64, low=0, high=255)
    step = builder.steps[-1]
    bias = (torch.linspace(1, 2, 64) * 2 ** torch.linspace(18, 29, 64)).int()
    scale = 100 * builder.grids[value].scale / builder.grids[step.inputs[0]].scale / bias.float()
    builder.steps[-1] = replace(step, bias=bias, weight_scale=scale)  # type: ignore[call-arg]
    program = builder.build(builder.dequantize(builder.flatten(value)), "executorch")
    assert not differing_logits(program, IMAGES)


class _Separated(nn.Module):
    """A layer whose activation is not its only reader, so that both are rounded; the activation limits the codes."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.Hardtanh(0.0, largest)
        self.depth, self.head = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((self.depth(self.act(x)) + x).mean((2, 3)))


@pytest.mark.parametrize("largest", [6.0, 0.3])
def test_a_clamp_after_a_rounded_layer_is_not_fused_into_it(largest: float) -> None:
    """XNNPACK fuses a clamp into the layer before; then that layer's own rounding is lost."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    program = lower(placed(_Separated(largest), (3, 16, 16), images, "executorch"), "executorch", (3, 16, 16))
    assert any(isinstance(step, Elementwise) and step.function == "identity" for step in program.steps)
    assert not differing_logits(program, images)
