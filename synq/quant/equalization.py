"""Cross-layer equalization: scale the channels between two layers so that their ranges are similar.

The function of the network does not change: relu(x / s) = relu(x) / s for s > 0, so a factor can be moved from the
output channels of one layer to the weights of the next. With one range for a whole activation, the channel of the
largest values determines the scale of all others; with one range for the weights of an output channel, the input
channel of the largest weights does.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.op_traits import is_passive, node_module, traits_of, value_inputs
from synq.network.tracing import tensor_inputs
from synq.quant.keep_best import Synchronize, keep_closest
from synq.quant.layers import ActQuantizer

STRENGTHS = (0.5, 1.0)
"""Candidate exponents of the scales."""
LARGEST = 256.0
"""Largest ratio of a scale to the median of its layer: a nearly dead channel must not grow without bound."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers with only positively homogeneous or shape operations between them, so that channel scales can move.

    Attributes:
        producer: Name of the module whose output channels are scaled: a batch norm, convolution or linear layer.
        consumer: Name of the convolution or linear layer that is their only reader.
        node: Name of the node whose activation range is used: the quantized one, otherwise the input of the consumer.
        quantized: Whether that node is quantized.
        channels: Number of scales C.
    """

    producer: str
    consumer: str
    node: str
    quantized: bool
    channels: int


def find_pairs(traced: fx.GraphModule, quantized: Collection[str] = ()) -> list[Pair]:
    """Find the pairs of layers whose common channels can be scaled, in order of execution of the consumers.

    The search goes backwards from a consumer, through pooling, dropout and flattening (a channel becomes h * w
    consecutive values), ReLU, LeakyReLU and PReLU, to a batch norm, convolution or linear layer. Every tensor on the
    path has one reader; both layers are called once and share no parameter.

    Args:
        traced: A graph from ``trace_classifier``, with recorded shapes.
        quantized: Names of the nodes whose output is quantized in the student.
    """
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr"))
    tensors = [*traced.named_parameters(remove_duplicate=False), *traced.named_buffers(remove_duplicate=False)]
    readers = Counter(id(tensor) for name, tensor in tensors for _ in range(1 + calls[name]))

    def is_unshared(node: fx.Node, layer: nn.Module) -> bool:
        """Return whether the layer is called once and nothing else reads its weight and bias."""
        own = [getattr(layer, field) for field in ("weight", "bias") if getattr(layer, field, None) is not None]
        return calls[str(node.target)] == 1 and all(readers[id(tensor)] == 1 for tensor in own)

    found = []
    for node in traced.graph.nodes:
        consumer = node_module(traced, node)
        if not isinstance(consumer, (nn.Conv2d, nn.Linear)) or not is_unshared(node, consumer):
            continue
        path = _path_to_producer(traced, node)
        if not path:
            continue
        producer, shape = node_module(traced, path[-1]), path[-1].meta["shape"]
        channels = 0 if producer is None or not is_unshared(path[-1], producer) else _out_channels(producer)
        in_channels = consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features
        read_dim = 4 if isinstance(consumer, nn.Conv2d) else 2
        fits = len(path[0].meta["shape"]) == read_dim and channels > 0 and in_channels % channels == 0
        if not fits or len(shape) not in (2, 4) or shape[1] != channels:
            continue
        if isinstance(producer, nn.Linear) and len(shape) != 2:  # on a map its channels are the last axis
            continue
        quantized_nodes = [step.name for step in reversed(path) if step.name in quantized]
        found.append(
            Pair(
                producer=str(path[-1].target),
                consumer=str(node.target),
                node=quantized_nodes[0] if quantized_nodes else path[0].name,
                quantized=bool(quantized_nodes),
                channels=channels,
            )
        )
    return found


def _path_to_producer(traced: fx.GraphModule, consumer: fx.Node) -> list[fx.Node]:
    """Return the nodes from the consumer's input back to the producer, or [] if a tensor has another reader."""
    (node, *_) = tensor_inputs(consumer)
    path = []
    while len(node.users) == 1 and node.op in ("call_module", "call_function", "call_method"):
        path.append(node)
        if not _commutes_with_scales(node):
            return path
        (node,) = value_inputs(node)
    return []


def _commutes_with_scales(node: fx.Node) -> bool:
    sources, shape = value_inputs(node), node.meta["shape"]
    if len(sources) != 1 or shape is None:
        return False
    before = sources[0].meta["shape"]
    # Where the order of values is kept, a channel becomes consecutive values of the image's row.
    one_row = is_passive(node) and len(shape) == 2 and shape[0] == before[0]
    return one_row or traits_of(node).positively_homogeneous


def _out_channels(layer: nn.Module) -> int:
    """Return the number of output channels that the parameters of ``layer`` can scale; 0 if there are none."""
    if isinstance(layer, _BatchNorm):
        return layer.num_features if layer.affine else 0
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else 0


@torch.no_grad()
def channel_ranges(traced: fx.GraphModule, pairs: Sequence[Pair], images: Tensor, batch_size: int = 64) -> list[Tensor]:
    """Return a_c, the largest |activation| of each channel over images and positions, (C,) for each pair.

    Args:
        traced: The float network in which the pairs were found.
        pairs: From `find_pairs`.
        images: (N, C, H, W) on the device of ``traced``.
        batch_size: Images per forward pass.
    """
    recorder = _MaxAbsRecorder(traced, {pair.node: pair.channels for pair in pairs})
    for batch in images.split(batch_size):
        recorder.run(batch)
    return [recorder.largest[pair.node] for pair in pairs]


class _MaxAbsRecorder(fx.Interpreter):
    def __init__(self, net: fx.GraphModule, channels: dict[str, int]) -> None:
        super().__init__(net)
        self.channels = channels
        self.largest: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.channels:
            largest = value.abs().reshape(len(value), self.channels[n.name], -1).amax((0, 2))
            known = self.largest.get(n.name)
            self.largest[n.name] = largest if known is None else torch.maximum(known, largest)
        return value


def _by_channel(layer: nn.Module, channels: int) -> Tensor:
    """View the weight of a consumer as (G, C_out / G, C / G, n), n weights per input and output channel, G groups."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(groups, weight.shape[0] // groups, channels // groups, -1)


def weight_ranges(layer: nn.Module, channels: int) -> Tensor:
    """Return w_c, the largest |weight| of input channel c relative to that of its output channel, in [0, 1], (C,).

    Relative, because each output channel has a separate scale, and a following batch norm may have made it large or
    small.
    """
    weight = _by_channel(layer, channels).abs().amax(3)
    rows = weight.amax(2, keepdim=True)
    return (weight / torch.where(rows > 0, rows, 1)).amax(1).flatten()


def channel_scales(activations: Tensor | None, weights: Tensor | None, strength: float = 1.0) -> Tensor:
    """Return the scales s_c > 0 that divide activations and multiply weights; the median of ln s_c is 0.

    s_c = sqrt(a_c / w_c)^strength: a_c / s_c and w_c s_c then have the same ratios between channels. If only one of the
    two shares a range between channels, its ranges are equalized: s_c = a_c, or s_c = 1 / w_c. A dead channel (a range
    of 0) keeps 1.

    Ranges (8, 2) and (1, 1) give (2, 1) up to a common factor.

    Args:
        activations: a_c, (C,), or None if the activation is not quantized.
        weights: w_c, (C,), or None if every input channel has a separate range (a depthwise convolution).
        strength: Exponent; 0 changes nothing.

    Returns:
        (C,), within a factor of `LARGEST` of the median.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section
    4.1. There both sides are weights quantized per tensor; here the producer's weights are quantized per channel, and
    its activation is equalized instead.
    """
    sides = [side.double() for side in (activations, weights) if side is not None]
    assert sides, "the activation or the weight must share a range between channels"
    alive = torch.stack([torch.isfinite(side) & (side > 0) for side in sides]).all(0)
    scales = torch.ones_like(sides[0])
    if alive.any():
        power = strength / len(sides)
        logs = [side[alive].log() for side in sides]
        log_scales = power * (logs[0] if activations is not None else -logs[0])
        if len(sides) == 2:
            log_scales = log_scales - power * logs[1]
        bound = math.log(LARGEST)
        scales[alive] = (log_scales - log_scales.median()).clamp(-bound, bound).exp()
    return scales


@torch.no_grad()
def scale_pair(net: fx.GraphModule, pair: Pair, scales: Tensor) -> None:
    """Divide the producer's output channels by ``scales`` (C,), and multiply the consumer's inputs, in place."""
    producer, consumer = net.get_submodule(pair.producer), net.get_submodule(pair.consumer)
    for parameter in (producer.weight, producer.bias):
        if parameter is not None:
            assert isinstance(parameter, Tensor)
            parameter.div_(scales.to(parameter).view(-1, *[1] * (parameter.dim() - 1)))
    weight = consumer.weight
    assert isinstance(weight, Tensor)
    by_channel = _by_channel(consumer, pair.channels)
    factors = scales.to(weight).view(by_channel.shape[0], 1, by_channel.shape[2], 1)
    weight.copy_((by_channel * factors).reshape(weight.shape))


def equalize(
    net: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    observe: Callable[[fx.GraphModule], object],
    synchronize: Synchronize = dict,
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Equalize a quantized student, in place, with the strength that gives the smallest KL divergence from the teacher.

    Candidates are no change and each of `STRENGTHS`; the one with the smallest mean KL(teacher || student) on
    ``images``, measured with newly observed ranges, is kept.

    Args:
        net: Network of a student from ``quantize_model(teacher, ...)``.
        teacher: Graph of its teacher; not modified.
        images: (N, C, H, W) synthetic images on the device of both.
        observe: Sets the ranges of ``net``, from whatever they are.
        synchronize: Makes metrics the same on all processes.

    Returns:
        The float network that the student approximates tensor by tensor: the teacher, or a copy with the same scales,
        whose logits are the same up to rounding errors. And a report with "kept" (the choice), "kl" (mean KL of each
        choice, in nats) and "pairs": for each pair the ratio of the largest to the smallest channel range, of the
        activation and of the weights, before and after.

    Source: as `channel_scales`.
    """
    quantized = {n.all_input_nodes[0].name for n in net.graph.nodes if isinstance(node_module(net, n), ActQuantizer)}
    pairs = [
        pair for pair in find_pairs(teacher, quantized) if pair.quantized or not _is_depthwise(teacher, pair.consumer)
    ]
    activations = channel_ranges(teacher, pairs, images)
    weights = [weight_ranges(teacher.get_submodule(pair.consumer), pair.channels) for pair in pairs]
    sides = [
        (a if pair.quantized else None, None if _is_depthwise(teacher, pair.consumer) else w)
        for pair, a, w in zip(pairs, activations, weights, strict=True)
    ]
    scales = {"none": [torch.ones_like(a) for a in activations]}
    scales |= {str(strength): [channel_scales(*side, strength) for side in sides] for strength in STRENGTHS if pairs}

    def change(name: str) -> None:
        _scale(net, pairs, scales[name])
        observe(net)

    changes = {name: partial(change, name) for name in scales}
    kept, costs = keep_closest(net, teacher, images, changes, synchronize)
    reference = teacher if kept == "none" else _scale(copy.deepcopy(teacher), pairs, scales[kept])
    rows = [
        {
            "producer": pair.producer,
            "consumer": pair.consumer,
            "activation": [_spread(a), _spread(a / s.to(a))],
            "weight": [_spread(w), _spread(weight_ranges(reference.get_submodule(pair.consumer), pair.channels))],
        }
        for pair, a, w, s in zip(pairs, activations, weights, scales[kept], strict=True)
    ]
    return reference, {"kept": kept, "kl": costs, "pairs": rows}


def _scale(net: fx.GraphModule, pairs: Sequence[Pair], scales: Sequence[Tensor]) -> fx.GraphModule:
    for pair, factors in zip(pairs, scales, strict=True):
        scale_pair(net, pair, factors)
    return net


def _is_depthwise(net: fx.GraphModule, name: str) -> bool:
    layer = net.get_submodule(name)
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels


def _spread(ranges: Tensor) -> float:
    """Return the ratio of the largest to the smallest range of the channels that are not dead; 1 if all are."""
    alive = ranges[ranges > 0]
    return float(alive.max() / alive.min()) if len(alive) else 1.0
