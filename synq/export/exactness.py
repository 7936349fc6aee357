"""Steps of an integer form that engines may compute differently, in the last digit.

A sum of floats depends on its order, an exponential on the approximation of the engine. Everything else is one IEEE
operation per element, or a sum of integers below 2^24, which floats represent exactly: then every engine gives the same
codes, and a file that does not is wrong.
"""

from torch import Tensor, fx

from synq.network.aten_groups import CHOICES, MOVES, ORDER_STATISTICS, PASSIVE
from synq.network.op_traits import is_activation, node_module, traits_of
from synq.network.tracing import tensor_inputs
from synq.quant.integer_layers import ChannelAffine, DequantizedActivation, IntegerActivation, IntegerLayer

ARITHMETIC = frozenset({"mul", "div", "add", "sub", "rsub", "neg"})
EXACT = ARITHMETIC | {"relu", "leaky_relu", "_prelu_kernel", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs"}
"""Operators of PyTorch that are one IEEE operation per element. Operators that only move or choose values are exact,
too."""
EXACT_SUM = 2**24
"""Integers below it are exact in float32."""


def inexact_steps(form: fx.GraphModule) -> list[str]:
    """Return the names of the nodes whose results may differ between engines; empty: all files give the same logits.

    Args:
        form: A network from ``integer_form`` with the operations "plain", with recorded shapes.
    """
    return [node.name for node in form.graph.nodes if node.op != "output" and not _is_exact(form, node)]


def _is_exact(form: fx.GraphModule, node: fx.Node) -> bool:
    module, inputs = node_module(form, node), tensor_inputs(node)
    if not inputs or isinstance(module, IntegerActivation | DequantizedActivation | ChannelAffine):
        return True
    if isinstance(module, IntegerLayer):
        source = node_module(form, inputs[0])
        return isinstance(source, IntegerActivation) and _largest_sum(source, module) < EXACT_SUM
    if not is_activation(node):
        return True
    operators = {*traits_of(node).operators}
    if operators & ARITHMETIC and not {*node.kwargs} <= {"input", "other"}:  # `alpha`: a fused multiplication
        return False
    moves = PASSIVE | MOVES | ORDER_STATISTICS | CHOICES
    return traits_of(node).keeps_values or (bool(operators) and operators <= EXACT | moves)


def _largest_sum(activation: IntegerActivation, layer: IntegerLayer) -> float:
    """Return a bound on the absolute value of every partial sum of a layer."""
    largest = max(activation.zero_point, activation.quant_max - activation.zero_point)
    weights: Tensor = layer.integer_weight()
    return largest * float(weights.abs().flatten(1).double().sum(1).max())
