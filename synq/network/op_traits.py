"""Describe every operation that a traced network may contain, in one table.

`OPERATIONS` has one row per operation: every spelling of it (module classes, functions, tensor methods, bare names) and
its traits. Tracing, classification, block boundaries, the CAM location, cross-layer equalization and the cost account
query this table and have no lists themselves.

To add an operation, add one `OpTraits` row to `OPERATIONS`, or one more spelling to the row of the same operation, and
extend the table of expectations in `tests/network/test_op_traits.py`. `classify` rejects an operation without a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class OpKind(Enum):
    """Role of an operation in quantization; each operation has exactly one kind."""

    LAYER = "layer"
    """Convolution or linear layer, whose weight is quantized."""
    NORM = "norm"
    """Batch normalization."""
    NONLINEAR = "nonlinear"
    """Non-linearity: its output is a new set of values, a quantization point."""
    STRUCTURAL = "structural"
    """Linear or value-preserving: its output is a sum or a selection of values that were quantized before."""
    PRODUCT = "product"
    """Multiplication: non-linear when two activations meet, else a scale."""
    QUOTIENT = "quotient"
    """Division: non-linear when an activation is the divisor, else a scale."""
    PASSIVE = "passive"
    """Only reshapes or returns its one tensor input (in evaluation mode); the order of the values in memory stays."""
    NUMBER = "number"
    """Returns a size, an attribute or nothing, and no tensor."""
    UNKNOWN = "unknown"
    """Not in the table."""


@dataclass(frozen=True, eq=False)
class OpTraits:
    """One operation: its spellings, its kind and its properties.

    Attributes:
        name: Name of the operation, unique in the table.
        kind: Its role in quantization.
        modules: Module classes; a subclass without a row has the traits of its nearest base class.
        functions: Functions, matched by identity: one of the same name from another library is another operation.
        methods: Names of tensor methods.
        names: Bare names of functions and methods, of whatever library.
        keeps_values: Selects or moves values (or fills in zeros): the output is on the quantization grid of the input.
        joins: Its output contains the values of several inputs.
        returns_tuple: May return a tuple: parts of an activation, or sizes.
        positively_homogeneous: f(s x) = s f(x) for scales s_c > 0 per channel.
        averages: Mean over a window of positions of each channel, whose derivative is the same at each position.
        resamples: Changes the resolution of a feature map and computes no feature, so that a block does not end at it.
        reduces_dims: Reduces the axes given by its argument ``dim``; its other traits are valid for H and W only.
    """

    name: str
    kind: OpKind
    _: KW_ONLY
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    keeps_values: bool = False
    joins: bool = False
    returns_tuple: bool = False
    positively_homogeneous: bool = False
    averages: bool = False
    resamples: bool = False
    reduces_dims: bool = False

    def spellings(self) -> Iterator[object]:
        """Yield the keys under which `traits_of` finds this row."""
        yield from self.modules
        yield from self.functions
        yield from (_method_key(name) for name in self.methods)
        yield from (_name_key(name) for name in self.names)


UNKNOWN = OpTraits("unknown", OpKind.UNKNOWN)
"""Traits of an operation without a row."""

_LAYERS = (
    OpTraits("conv2d", OpKind.LAYER, modules=(nn.Conv2d,)),
    OpTraits("linear", OpKind.LAYER, modules=(nn.Linear,)),
    OpTraits(
        "batch_norm", OpKind.NORM, modules=(nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm), names=("batch_norm",)
    ),
)

RELU = OpTraits("relu", OpKind.NONLINEAR, modules=(nn.ReLU,), names=("relu",), positively_homogeneous=True)
"""max(x, 0)."""
_NONLINEARITIES = (
    RELU,
    OpTraits(
        "leaky_relu", OpKind.NONLINEAR, modules=(nn.LeakyReLU,), names=("leaky_relu",), positively_homogeneous=True
    ),
    OpTraits("prelu", OpKind.NONLINEAR, modules=(nn.PReLU,), names=("prelu",), positively_homogeneous=True),
    OpTraits("relu6", OpKind.NONLINEAR, modules=(nn.ReLU6,), names=("relu6",)),
    OpTraits("hardtanh", OpKind.NONLINEAR, modules=(nn.Hardtanh,), names=("hardtanh",)),
    OpTraits("elu", OpKind.NONLINEAR, modules=(nn.ELU,), names=("elu",)),
    OpTraits("selu", OpKind.NONLINEAR, modules=(nn.SELU,), names=("selu",)),
    OpTraits("celu", OpKind.NONLINEAR, modules=(nn.CELU,), names=("celu",)),
    OpTraits("gelu", OpKind.NONLINEAR, modules=(nn.GELU,), names=("gelu",)),
    OpTraits("silu", OpKind.NONLINEAR, modules=(nn.SiLU,), names=("silu",)),
    OpTraits("mish", OpKind.NONLINEAR, modules=(nn.Mish,), names=("mish",)),
    OpTraits("hardswish", OpKind.NONLINEAR, modules=(nn.Hardswish,), names=("hardswish",)),
    OpTraits("hardsigmoid", OpKind.NONLINEAR, modules=(nn.Hardsigmoid,), names=("hardsigmoid",)),
    OpTraits("sigmoid", OpKind.NONLINEAR, modules=(nn.Sigmoid,), names=("sigmoid",)),
    OpTraits("tanh", OpKind.NONLINEAR, modules=(nn.Tanh,), names=("tanh",)),
    OpTraits("softplus", OpKind.NONLINEAR, modules=(nn.Softplus,), names=("softplus",)),
    OpTraits("softmax", OpKind.NONLINEAR, modules=(nn.Softmax,), names=("softmax",)),
    OpTraits("clamp", OpKind.NONLINEAR, names=("clamp", "clip", "clamp_min")),
    OpTraits("abs", OpKind.NONLINEAR, names=("abs",)),
    OpTraits("power", OpKind.NONLINEAR, names=("square", "pow", "sqrt")),
    OpTraits("exp", OpKind.NONLINEAR, names=("exp",)),
)

_ARITHMETIC = (
    OpTraits("mul", OpKind.PRODUCT, names=("mul", "multiply")),
    OpTraits("div", OpKind.QUOTIENT, names=("truediv", "div", "divide", "true_divide")),
    # Also of tuples: ``x.shape[:2] + (1, 1)``.
    OpTraits("add", OpKind.STRUCTURAL, names=("add",), returns_tuple=True),
    OpTraits("sub", OpKind.STRUCTURAL, names=("sub",)),
    OpTraits("neg", OpKind.STRUCTURAL, names=("neg",)),
    # Positively homogeneous as the mean is, but no rule has needed it.
    OpTraits("sum", OpKind.STRUCTURAL, names=("sum",)),
)

_POOLING = (
    OpTraits(
        "max_pool",
        OpKind.STRUCTURAL,
        modules=(nn.MaxPool2d, nn.AdaptiveMaxPool2d),
        names=("max_pool2d", "adaptive_max_pool2d"),
        keeps_values=True,
        positively_homogeneous=True,
        resamples=True,
    ),
    # A mean lies between the grid's values: unlike the maximum it does not keep them.
    OpTraits(
        "avg_pool",
        OpKind.STRUCTURAL,
        modules=(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool1d),
        functions=(F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_avg_pool1d),
        names=("avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"),
        positively_homogeneous=True,
        averages=True,
        resamples=True,
    ),
    OpTraits(
        "mean",
        OpKind.STRUCTURAL,
        functions=(torch.mean,),
        names=("mean",),
        positively_homogeneous=True,
        averages=True,
        resamples=True,
        reduces_dims=True,
    ),
    OpTraits("upsample", OpKind.STRUCTURAL, modules=(nn.Upsample,), names=("interpolate",), resamples=True),
    # Subclasses of nn.Upsample that compute the same. Without `resamples`, because a block currently ends at them.
    OpTraits("upsampling", OpKind.STRUCTURAL, modules=(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)),
)

_MOVES = (
    OpTraits("cat", OpKind.STRUCTURAL, names=("cat", "concat"), joins=True),
    OpTraits("stack", OpKind.STRUCTURAL, names=("stack",), joins=True),
    # ``x[index] = value`` in normal form (normal_form.py).
    OpTraits("assigned", OpKind.STRUCTURAL, names=("assigned",), joins=True),
    OpTraits(
        "split", OpKind.STRUCTURAL, names=("chunk", "split", "unbind", "getitem"), keeps_values=True, returns_tuple=True
    ),
    OpTraits(
        "pad_layer",
        OpKind.STRUCTURAL,
        modules=(nn.ZeroPad2d, nn.ReflectionPad2d),
        keeps_values=True,
        positively_homogeneous=True,
    ),
    # As a function it may fill in any constant, which no scale may change.
    OpTraits("pad", OpKind.STRUCTURAL, names=("pad",), keeps_values=True),
    OpTraits(
        "pixel_shuffle",
        OpKind.STRUCTURAL,
        modules=(nn.PixelShuffle, nn.PixelUnshuffle),
        names=("pixel_shuffle",),
        keeps_values=True,
    ),
    OpTraits(
        "channel_shuffle",
        OpKind.STRUCTURAL,
        modules=(nn.ChannelShuffle,),
        names=("channel_shuffle",),
        keeps_values=True,
    ),
    OpTraits("permute", OpKind.STRUCTURAL, names=("transpose", "permute", "t", "movedim"), keeps_values=True),
    OpTraits("roll", OpKind.STRUCTURAL, names=("roll", "flip"), keeps_values=True),
    OpTraits("narrow", OpKind.STRUCTURAL, names=("narrow",), keeps_values=True),
    OpTraits("expand", OpKind.STRUCTURAL, names=("unsqueeze", "expand"), keeps_values=True),
    OpTraits("copy", OpKind.STRUCTURAL, names=("clone", "detach", "type_as"), keeps_values=True),
    # The module nn.Unflatten is passive, the method is not: the CAM's search walks through the former only.
    OpTraits("unflatten", OpKind.STRUCTURAL, names=("unflatten",), keeps_values=True),
    OpTraits("sequential", OpKind.STRUCTURAL, modules=(nn.Sequential,)),
)

_PASSIVE = (
    OpTraits(
        "flatten",
        OpKind.PASSIVE,
        modules=(nn.Flatten,),
        functions=(torch.flatten,),
        methods=("flatten",),
        keeps_values=True,
    ),
    OpTraits("unflatten_layer", OpKind.PASSIVE, modules=(nn.Unflatten,), keeps_values=True),
    OpTraits("reshape", OpKind.PASSIVE, functions=(torch.reshape,), methods=("view", "reshape"), keeps_values=True),
    OpTraits("squeeze", OpKind.PASSIVE, functions=(torch.squeeze,), methods=("squeeze",), keeps_values=True),
    OpTraits(
        "identity", OpKind.PASSIVE, modules=(nn.Identity,), methods=("contiguous", "to", "float"), keeps_values=True
    ),
    OpTraits(
        "dropout",
        OpKind.PASSIVE,
        modules=(nn.Dropout, nn.Dropout2d, nn.AlphaDropout),
        functions=(F.dropout, F.dropout2d),
        names=("stochastic_depth",),  # torchvision's, which is not imported here
        keeps_values=True,
    ),
)

_NUMBERS = (
    OpTraits(
        "number", OpKind.NUMBER, names=("getattr", "size", "dim", "ndimension", "numel", "stride", "shape", "_assert")
    ),
)

OPERATIONS: tuple[OpTraits, ...] = (
    *_LAYERS,
    *_NONLINEARITIES,
    *_ARITHMETIC,
    *_POOLING,
    *_MOVES,
    *_PASSIVE,
    *_NUMBERS,
)
"""The table."""


def traits_of(net: fx.GraphModule, node: fx.Node) -> OpTraits:
    """Return the row of the operation that ``node`` calls, else `UNKNOWN` (also for inputs, parameters, the output)."""
    keys: tuple[object, ...] = ()
    if node.op == "call_module":
        keys = type(node_module(net, node)).__mro__
    elif node.op == "call_function":
        keys = (node.target, _name_key(operation_name(node)))
    elif node.op == "call_method":
        keys = (_method_key(str(node.target)), _name_key(str(node.target)))
    rows = _rows_by_spelling(OPERATIONS)
    return next((rows[key] for key in keys if key in rows), UNKNOWN)


def is_passive(net: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether ``node`` only reshapes or returns its one tensor input (in evaluation mode)."""
    return traits_of(net, node).kind is OpKind.PASSIVE


def is_average_pool(net: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether ``node`` averages positions of each channel.

    PyTorch's functions only: one of the same name from another library may weight the positions differently.
    """
    traits = traits_of(net, node)
    return traits.averages and (node.op != "call_function" or node.target in traits.functions)


def node_module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the submodule that a ``call_module`` node calls, else None."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def operation_name(node: fx.Node) -> str:
    """Return the bare name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


@cache
def _rows_by_spelling(rows: tuple[OpTraits, ...]) -> dict[object, OpTraits]:
    return {spelling: row for row in rows for spelling in row.spellings()}


def _method_key(name: str) -> tuple[str, str]:
    return "method", name


def _name_key(name: str) -> tuple[str, str]:
    return "name", name
