"""Cost of a student: bit-width of every tensor, multiply-accumulates (MACs), bit operations (BitOps), packed size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.op_traits import is_activation, node_module, operation_name, traits_of, value_inputs
from synq.network.tracing import tensor_inputs
from synq.quant.bit_patterns import Role
from synq.quant.integer_form import foldable_batch_norm
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer, QuantConv2d, QuantLinear

FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """Bit-width, size and operations of one weight or activation tensor.

    Attributes:
        name: Module name of a weight, node name of an activation.
        role: "weight" or "activation".
        kind: Layer type or operation.
        bits: Bit-width; 32 means float.
        numel: Number of values (of one image, for an activation).
        macs: Multiply-accumulates per image, for a weight.
        bitops: MACs x weight bits x input bits per image, for a weight; a float operand counts 32 bits.
        note: Why the tensor is float, or what else is special about it; "" if it is quantized.
    """

    name: str
    role: Role
    kind: str
    bits: int
    numel: int
    macs: int = 0
    bitops: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of a layer, from which its BitOps follow: MACs x weight bits x the largest bit-width of its inputs.

    Attributes:
        layer: Module name of the layer.
        macs: Multiply-accumulates per image.
        inputs: Quantized activations that its input consists of, several if they were concatenated; empty if one is
            float.
    """

    layer: str
    macs: int
    inputs: tuple[str, ...]


def layer_calls(net: fx.GraphModule) -> tuple[LayerCall, ...]:
    """Return every call of a quantized layer of a student's network, in order of execution."""
    calls = [node for node in net.graph.nodes if isinstance(node_module(net, node), (QuantConv2d, QuantLinear))]
    return tuple(
        LayerCall(layer=str(call.target), macs=_macs(net, call), inputs=_activations_of(net, tensor_inputs(call)[0]))
        for call in calls
    )


def account(
    net: fx.GraphModule, points: Mapping[fx.Node, int], notes: Mapping[fx.Node, str] = MappingProxyType({})
) -> tuple[TensorRow, ...]:
    """Return the bit-width and cost of every weight and activation of a student, in order of execution.

    Args:
        net: The student's graph, with recorded shapes.
        points: Bit-width of each quantized activation.
        notes: Notes on activations.
    """
    rows: list[TensorRow] = []
    calls: dict[str, list[LayerCall]] = {}
    for call in layer_calls(net):
        calls.setdefault(call.layer, []).append(call)
    for node in net.graph.nodes:
        shape = node.meta.get("shape")
        module = node_module(net, node)
        if isinstance(module, (QuantConv2d, QuantLinear)) and (called := calls.pop(str(node.target), None)):
            bits = module.weight_quantizer.bits
            rows.append(
                TensorRow(
                    name=str(node.target),
                    role="weight",
                    kind=type(module).__name__.removeprefix("Quant"),
                    bits=bits,
                    numel=module.weight.numel(),
                    macs=sum(call.macs for call in called),
                    bitops=sum(call.macs * bits * _input_bits(net, call) for call in called),
                )
            )
        if shape is None or isinstance(module, ActQuantizer) or node.op == "output" or not is_activation(node):
            continue
        kind = type(module).__name__.removeprefix("Quant") if module is not None else operation_name(node)
        bits = points.get(node, FLOAT_BITS)
        note = notes.get(node, "" if node in points else "float: not a quantization point")
        size = math.prod(shape[1:])
        rows.append(TensorRow(name=node.name, role="activation", kind=kind, bits=bits, numel=size, note=note))
    return tuple(rows)


def _macs(net: fx.GraphModule, node: fx.Node) -> int:
    """Return the multiply-accumulates per image of one call of a layer."""
    weight = node_module(net, node).weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    return math.prod(node.meta["shape"][1:]) * (weight.numel() // weight.shape[0])


def _input_bits(net: fx.GraphModule, call: LayerCall) -> int:
    quantizers = [net.get_submodule(ACT_QUANTIZERS + name) for name in call.inputs]
    return max((module.bits for module in quantizers if isinstance(module, ActQuantizer)), default=FLOAT_BITS)


def _activations_of(net: fx.GraphModule, node: fx.Node) -> tuple[str, ...]:
    """Return the quantized activations whose values ``node`` consists of; empty if it is float.

    Operations that only select or move values are followed back to their inputs.
    """
    if isinstance(node_module(net, node), ActQuantizer):
        return (str(node.target).removeprefix(ACT_QUANTIZERS),)
    if not traits_of(node).keeps_values:
        return ()
    parts = [_activations_of(net, source) for source in value_inputs(node)]  # each has a separate scale
    return tuple(dict.fromkeys(chain(*parts))) if all(parts) else ()


def packed_bytes(net: fx.GraphModule) -> int:
    """Return the size of the tensors of the packed student in bytes (`packed.py`).

    Counted are, per layer, the integer codes, a one-byte zero_point and a float32 gain for each channel, and a float32
    shift for each channel of a layer with a bias or a folded batch norm; gain and shift of the other batch norms; and
    all remaining float32 tensors of the network.
    """
    calls = [str(node.target) for node in net.graph.nodes if node.op == "call_module"]
    merged: set[nn.Module | None] = set()
    size, counted = 0, set[nn.Module]()
    for node in net.graph.nodes:
        module = node_module(net, node)
        if module is None or module in counted:
            continue
        counted.add(module)
        if isinstance(module, (QuantConv2d, QuantLinear)):
            norm = foldable_batch_norm(net, node, calls)
            merged.add(None if norm is None else node_module(net, norm))
            shifted = module.bias is not None or norm is not None
            channels = module.weight.shape[0]
            size += math.ceil(module.weight.numel() * module.weight_quantizer.bits / 8)
            size += channels * (1 + 4 + (4 if shifted else 0))
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            size += 0 if module in merged else 8 * module.num_features
        elif not isinstance(module, ActQuantizer):
            size += float_bytes(module)
    return size


def float_bytes(module: nn.Module) -> int:
    """Return the size of the float32 parameters and batch-norm statistics of ``module`` in bytes."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return 4 * sum(t.numel() for t in tensors)
