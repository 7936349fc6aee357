"""Students of engines for the tests of programs."""

from torch import Tensor, fx, nn

from synq.config.quant import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.student import observe_ranges, quantize_model


def placed(
    module: nn.Module,
    size: tuple[int, int, int],
    images: Tensor,
    target: str = "onnxruntime",
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    portable: bool = False,
) -> fx.GraphModule:
    """Return the student of a network for a target, with its ranges observed on ``images``.

    With ``portable`` the engine computes the same on processors without VNNI.
    """
    traced = trace_classifier(module.eval().requires_grad_(False), size)
    return placed_graph(traced, images, target, weight_bits=weight_bits, act_bits=act_bits, portable=portable)


def placed_graph(
    traced: fx.GraphModule,
    images: Tensor,
    target: str = "onnxruntime",
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    portable: bool = False,
) -> fx.GraphModule:
    """Return the student of a traced network, which stays as it is: see `placed`."""
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    quant = QuantConfig(target=target, portable=portable, **bits)  # type: ignore[arg-type]
    net = quantize_model(traced, quant).net
    observe_ranges(net, images, act_range="minmax")
    return net
