"""Students of engines for the tests of programs: quantizers behind every operation that makes new values."""

import torch
from torch import Tensor, fx, nn

from synq.network.functional_layers import replace_layer
from synq.network.op_traits import OpKind, node_module, traits_of
from synq.network.tracing import trace_classifier
from synq.quant.fake_quant import SCALE_EPS
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer, QuantConv2d, QuantLinear
from synq.quant.student import observe_ranges

CLAMPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "threshold"}


def placed(
    module: nn.Module,
    size: tuple[int, int, int],
    images: Tensor,
    target: str = "onnxruntime",
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
) -> fx.GraphModule:
    """Return the student of a network for a target, with its ranges observed on ``images``."""
    net = trace_classifier(module.eval().requires_grad_(False), size)
    quantize_weights(net, weight_bits)
    float_logits = _float_tail(net) if target in ("onnxruntime", "openvino") else set()
    for node in list(net.graph.nodes):
        if node not in float_logits and _is_point(net, node):
            _insert(net, node, act_bits)
    net.graph.lint()
    net.recompile()
    observe_ranges(net, images, act_range="minmax")
    return net


def quantize_weights(net: fx.GraphModule, bits: int) -> None:
    """Replace the layers by quantized ones with symmetric codes."""
    for node in net.graph.nodes:
        layer = node_module(net, node)
        if isinstance(layer, QuantConv2d | QuantLinear) or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        made = kind.from_float(layer, bits, "stored").eval()  # type: ignore[arg-type]
        replace_layer(net, str(node.target), made)
        quantizer = made.weight_quantizer
        quantizer.quant_min = -quantizer.quant_max
        quantizer._live_qparams = _Symmetric(quantizer.quant_max)  # type: ignore[method-assign]


class _Symmetric:
    def __init__(self, quant_max: int) -> None:
        self.quant_max = quant_max

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = (weight.detach().flatten(1).abs().amax(1) / self.quant_max).clamp(min=SCALE_EPS)
        return scale, torch.zeros_like(scale, dtype=torch.int32)


def _is_point(net: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "placeholder":
        return True
    if not node.op.startswith("call_"):
        return False
    traits = traits_of(node)
    joins = "cat" in traits.operators and len(traits.reads) > 1
    if traits.kind < OpKind.STRUCTURAL or (traits.keeps_values and not joins and not _clamps(node)):
        return False
    if len(node.users) == 1:
        (user,) = node.users
        is_norm = traits.kind is OpKind.LAYER and traits_of(user).kind is OpKind.NORM
        fits = isinstance(node_module(net, node), nn.Conv2d) or len(node.meta["shape"]) == 2
        if (is_norm and fits) or _clamps(user):
            return False
    return True


def _clamps(node: fx.Node) -> bool:
    return bool({*traits_of(node).operators} & CLAMPS)


def _float_tail(net: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes between the last operation that makes new values and the logits."""
    node = net.graph.output_node().args[0]
    tail: set[fx.Node] = set()
    assert isinstance(node, fx.Node)
    while traits_of(node).kind is OpKind.PASSIVE:
        tail.add(node)
        node = node.all_input_nodes[0]
    return {*tail, node}


def _insert(net: fx.GraphModule, node: fx.Node, bits: int) -> None:
    users, name = list(node.users), f"{ACT_QUANTIZERS}{node.name}"
    net.add_submodule(name, ActQuantizer(bits).eval())
    with net.graph.inserting_after(node):
        quantized = net.graph.call_module(name, (node,))
    quantized.meta["shape"] = node.meta["shape"]
    for user in users:
        user.replace_input_with(node, quantized)
