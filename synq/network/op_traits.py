"""Traits of the operations of a traced network: what an operation does to the values that it reads.

`trace_classifier` runs every node once and records the operators of PyTorch that it executes (`op_recorder.py`); their
meaning (`aten_traits.py`) gives the node's traits. Two spellings of one operation (a module, a function, a method, an
operator of Python, a function of another library) execute the same operators, so no rule can know one and miss another.
Classification, block boundaries, the CAM location, cross-layer equalization and the cost account read these traits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import fx, nn

BATCH = 2
"""Number of images for which the shapes of a graph were recorded."""
TRAITS = "traits"
"""Key of a node's ``meta`` under which `trace_classifier` stores its `OpTraits`."""


class OpKind(IntEnum):
    """Role of an operation in quantization, each stronger than those before it: a sequence has its strongest kind."""

    CONSTANT = 0
    """Returns a tensor that does not depend on the image's values, such as ``zeros_like`` or a reshaped parameter."""
    NUMBER = 1
    """Returns a size, an attribute or nothing, and no tensor."""
    SELECTOR = 2
    """Returns indices or a mask computed from an activation: it selects values and is no activation itself."""
    PASSIVE = 3
    """Only reshapes or returns its one tensor input (in evaluation mode); the order of the values stays."""
    STRUCTURAL = 4
    """Linear or value-preserving: its output is a sum or a selection of values that were quantized before."""
    NORM = 5
    """Batch normalization with its running statistics."""
    LAYER = 6
    """Convolution or linear layer, whose weight is quantized."""
    NONLINEAR = 7
    """Non-linear function: its output is a new set of values, a quantization point."""
    PRODUCT = 8
    """Matrix product of two activations, as in attention, both of which are quantized."""
    UNKNOWN = 9
    """Cannot be quantized: a product with a weight that would stay float, random numbers, or an unknown operator."""


@dataclass(frozen=True, kw_only=True)
class OpTraits:
    """What one operation does to the values that it reads.

    Attributes:
        kind: Its role in quantization.
        operators: Names of PyTorch's operators that it executes on activations, in order.
        reads: Positions in ``node.all_input_nodes`` of the activations whose values reach the output. Not among them:
            parameters, and tensors of which only the shape, the type or the device is read (``x.expand_as(y)``).
        keeps_values: Every output value is a value of an input or zero: the output is on the inputs' quantization
            grids.
        chooses: Takes each output value from one of several tensors, as their values decide (``torch.maximum``).
        elementwise: Each output value is a function of the value at its place alone.
        positively_homogeneous: f(s x) = s f(x) for scales s_c > 0 per channel, where channels stay where they are.
        averages: Mean over a window of positions of each channel, whose derivative is the same at each position.
        resamples: Changes the resolution of a feature map and computes no feature, so that a block does not end at it.
        limits: Smallest and largest output of an operation that clamps one tensor by two numbers, infinite where it has
            no limit: (0, inf) is a ReLU, (0, 6) a ReLU6. None for any other.
        reason: For an unknown operation, why it cannot be quantized.
    """

    kind: OpKind
    operators: tuple[str, ...] = ()
    reads: tuple[int, ...] = ()
    keeps_values: bool = False
    chooses: bool = False
    elementwise: bool = False
    positively_homogeneous: bool = False
    averages: bool = False
    resamples: bool = False
    limits: tuple[float, float] | None = None
    reason: str = ""


UNKNOWN = OpTraits(kind=OpKind.UNKNOWN)
"""Traits of a node that was not recorded: an input, a parameter, the output, a quantizer inserted later."""


def traits_of(node: fx.Node) -> OpTraits:
    """Return the traits that ``trace_classifier`` recorded for ``node``, else `UNKNOWN`."""
    traits = node.meta.get(TRAITS, UNKNOWN)
    assert isinstance(traits, OpTraits)
    return traits


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values ``node`` computes its output from, in order; all inputs if it was not recorded.

    Parameters, sizes and selectors are not among them.
    """
    inputs = node.all_input_nodes
    if TRAITS not in node.meta:
        return [source for source in inputs if is_activation(source)]
    return [inputs[position] for position in traits_of(node).reads]


def is_activation(node: fx.Node) -> bool:
    """Return whether the values of ``node`` depend on the image; a selector (a mask, indices) is no activation."""
    if node.op in ("placeholder", "output") or TRAITS not in node.meta:
        return node.op != "get_attr"
    return traits_of(node).kind > OpKind.SELECTOR


def is_passive(node: fx.Node) -> bool:
    """Return whether ``node`` only reshapes or returns its one tensor input (in evaluation mode)."""
    return traits_of(node).kind is OpKind.PASSIVE


def is_average_pool(node: fx.Node) -> bool:
    """Return whether ``node`` averages positions of each channel, all with the same weight."""
    return traits_of(node).averages


def node_module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the submodule that a ``call_module`` node calls, else None."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def node_value(root: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the value of a node that is no input or output.

    Args:
        root: Module with the submodules and tensors of the graph.
        node: The node.
        values: Values of the nodes that it reads.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_function":
        return target(*args, **kwargs)
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value(*args, **kwargs) if node.op == "call_module" else value


def operation_name(node: fx.Node) -> str:
    """Return the bare name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
