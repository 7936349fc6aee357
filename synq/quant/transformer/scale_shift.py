"""Scale shift: give all channels of a LayerNorm's output one range, by its affine and the weights of its readers.

    y = x_hat * gamma + beta, read by linear layers W y + bias             x_hat: normalized input

    y' = (y + b) / r        gamma' = gamma / r,  beta' = (beta + b) / r    r > 0 and b, per channel
    W' = W diag(r)          bias' = bias - W b                             so W' y' + bias' = W y + bias

The function of the network does not change. LayerNorm does not equalize its channels: the largest has often ten times
the range of the median, and with one scale for the whole tensor it leaves the others a few codes. After the change all
have the same center and the same span; the ratios are in the columns of W then, whose rows have a scale each.

Source: RepQ-ViT (Li et al., ICCV 2023), section 3.2. There r and b follow from per-channel scales and zero points of
one bit-span; here from the ranges, which is the same without the rounding of the zero points. Ours: a smaller exponent
as a further candidate, the choice by the KL divergence, and the check that the function stays the same.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from synq.network.logits import logits_of
from synq.network.op_traits import OpKind, node_module, traits_of, value_inputs
from synq.quant.keep_best import Synchronize, keep_closest

STRENGTHS = (0.5, 1.0)
"""Candidate exponents of the factors r."""
LARGEST = 256.0
"""Largest ratio of a factor to the median of its LayerNorm: a nearly dead channel must not grow without bound."""
SAME = 1e-4
"""Largest change of a logit, relative to the largest logit, that counts as rounding errors of float32."""


@dataclass(frozen=True, kw_only=True)
class NormLocation:
    """A LayerNorm whose output only linear layers read.

    Attributes:
        norm: Name of the module of the LayerNorm, over the last axis.
        node: Name of its node.
        consumers: Names of the linear layers.
        shifts: Whether each of these and the LayerNorm have a bias, so that channels can be shifted too.
    """

    norm: str
    node: str
    consumers: tuple[str, ...]
    shifts: bool


@dataclass(frozen=True, kw_only=True)
class Shift:
    """The change of one LayerNorm's output: y' = (y + offset) / factor, each (C,)."""

    factor: Tensor
    offset: Tensor


def locate_norms(traced: fx.GraphModule) -> list[NormLocation]:
    """Return the LayerNorms whose output can be scaled and shifted, in order of execution.

    Between a LayerNorm and its readers are only operations that move values and keep the channels as the last axis. All
    layers are called once and share no parameter.

    Args:
        traced: A graph from ``trace_classifier``.
    """
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr"))
    tensors = [*traced.named_parameters(remove_duplicate=False), *traced.named_buffers(remove_duplicate=False)]
    readers = Counter(id(tensor) for name, tensor in tensors for _ in range(1 + calls[name]))

    def is_unshared(node: fx.Node, layer: nn.Module) -> bool:
        return calls[str(node.target)] == 1 and all(readers[id(tensor)] == 1 for tensor in layer.parameters(False))

    found = []
    for node in traced.graph.nodes:
        norm = node_module(traced, node)
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or norm.weight is None:
            continue
        layers = _linear_readers(traced, node, norm.normalized_shape[0])
        if not layers or not is_unshared(node, norm) or not all(is_unshared(n, layer) for n, layer in layers.items()):
            continue
        found.append(
            NormLocation(
                norm=str(node.target),
                node=node.name,
                consumers=tuple(str(reader.target) for reader in layers),
                shifts=norm.bias is not None and all(layer.bias is not None for layer in layers.values()),
            )
        )
    return found


def _linear_readers(traced: fx.GraphModule, norm: fx.Node, channels: int) -> dict[fx.Node, nn.Linear]:
    """Return the linear layers that read a tensor with the channels as last axis; none if anything else reads it."""
    found: dict[fx.Node, nn.Linear] = {}
    pending = [norm]
    while pending:
        source = pending.pop()
        for reader in source.users:
            traits, layer = traits_of(reader), node_module(traced, reader)
            if traits.kind is OpKind.NUMBER:  # a size
                continue
            if isinstance(layer, nn.Linear) and layer.in_features == channels:
                found[reader] = layer
                continue
            shape = reader.meta.get("shape")
            moves = traits.kind in (OpKind.PASSIVE, OpKind.STRUCTURAL) and traits.keeps_values
            if not moves or value_inputs(reader) != [source] or not shape or shape[-1] != channels:
                return {}
            pending.append(reader)
    return found


@torch.no_grad()
def norm_ranges(
    traced: fx.GraphModule, locations: Sequence[NormLocation], images: Tensor, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Return the smallest and largest value of each channel over images and positions, each (C,), for each location.

    Args:
        traced: The float network in which the locations were found.
        locations: From `locate_norms`.
        images: (N, C, H, W) on the device of ``traced``.
        batch_size: Images per forward pass.
    """
    recorder = _RangeRecorder(traced, {location.node for location in locations})
    for batch in images.split(batch_size):
        recorder.run(batch)
    return [recorder.ranges[location.node] for location in locations]


class _RangeRecorder(fx.Interpreter):
    def __init__(self, net: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(net)
        self.nodes = nodes
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            low, high = value.flatten(0, -2).aminmax(dim=0)
            if n.name in self.ranges:
                low, high = torch.minimum(low, self.ranges[n.name][0]), torch.maximum(high, self.ranges[n.name][1])
            self.ranges[n.name] = (low, high)
        return value


def shift_of(low: Tensor, high: Tensor, strength: float = 1.0, *, shifts: bool = True) -> Shift:
    """Return factor and offset that give channels with the ranges [low, high] one range.

    factor r_c = (span_c / median span)^strength, and offset b_c such that all centers of (y + b) / r are the mean of
    the centers of y / r. Without ``shifts`` b is 0, and span_c is that of the range extended to zero, which every grid
    represents. A channel that is constant keeps the factor 1.

    Ranges [0, 2] and [-4, 0], strength 1: spans 2 and 4, their median in logarithms 2.83, so r is (0.71, 1.41); y / r
    has the centers 1.41 and -1.41, so b is (-1, 2): both are [-1.41, 1.41] then.

    Args:
        low, high: (C,), finite.
        strength: Exponent; 0 keeps all factors at 1.
        shifts: Whether offsets are possible.

    Returns:
        In float64; factors within `LARGEST` of their median, which is 1.
    """
    low, high = low.double(), high.double()
    if not shifts:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    spans = high - low
    alive = torch.isfinite(spans) & (spans > 0)
    factor = torch.ones_like(spans)
    if alive.any():
        logs = strength * spans[alive].log()
        middle = logs.sort().values[[(len(logs) - 1) // 2, len(logs) // 2]].mean()
        bound = math.log(LARGEST)
        factor[alive] = (logs - middle).clamp(-bound, bound).exp()
    centers = (low + high) / 2 / factor
    offset = (centers.mean() - centers) * factor if shifts else torch.zeros_like(factor)
    return Shift(factor=factor, offset=offset)


@torch.no_grad()
def shift_norm(net: fx.GraphModule, location: NormLocation, shift: Shift) -> None:
    """Move scale and shift of one location from the LayerNorm to its readers, in place, computed in float64."""
    norm = net.get_submodule(location.norm)
    assert isinstance(norm, nn.LayerNorm)
    norm.weight.copy_(norm.weight.double() / shift.factor.to(norm.weight.device))
    if location.shifts:
        norm.bias.copy_((norm.bias.double() + shift.offset.to(norm.bias.device)) / shift.factor.to(norm.bias.device))
    elif norm.bias is not None:
        norm.bias.copy_(norm.bias.double() / shift.factor.to(norm.bias.device))
    for name in location.consumers:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.double()
        if location.shifts:
            layer.bias.copy_(layer.bias.double() - weight @ shift.offset.to(weight.device))
        layer.weight.copy_(weight * shift.factor.to(weight.device))


def scale_shift(
    net: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    observe: Callable[[fx.GraphModule], object],
    synchronize: Synchronize = dict,
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Scale and shift the LayerNorms of a quantized student, in place, where that brings it closer to the teacher.

    Candidates are no change and each of `STRENGTHS`; the one with the smallest mean KL(teacher || student) on
    ``images``, measured with newly observed ranges, is kept. A LayerNorm at which the float network does not stay the
    same (within `SAME`) is left out.

    Args:
        net: Network of a student from ``quantize_model(teacher, ...)``.
        teacher: Graph of the float network that it approximates; not modified.
        images: (N, C, H, W) synthetic images on the device of both.
        observe: Sets the ranges of ``net``, from whatever they are.
        synchronize: Makes metrics the same on all processes.

    Returns:
        The float network that the student approximates tensor by tensor: the teacher, or a copy with the same changes,
        whose logits are the same up to rounding errors. And a report with "kept" (the choice), "kl" (mean KL of each
        choice, in nats), "left_out" (names of LayerNorms whose change was not exact) and "norms": for each location the
        ratio of the largest to the median span of its channels, before.
    """
    found = locate_norms(teacher)
    ranges = dict(zip(found, norm_ranges(teacher, found, images), strict=True))

    def shifts(location: NormLocation, strength: float) -> Shift:
        return shift_of(*ranges[location], strength, shifts=location.shifts)

    locations = [location for location in found if _is_exact(teacher, location, shifts(location, 1.0), images[:8])]
    choices: dict[str, list[Shift]] = {"none": []}
    for strength in STRENGTHS if locations else ():
        choices[str(strength)] = [shifts(location, strength) for location in locations]

    def change(name: str) -> None:
        _shift(net, locations, choices[name])
        observe(net)

    changes = {name: partial(change, name) for name in choices}
    kept, costs = keep_closest(net, teacher, images, changes, synchronize)
    reference = teacher if kept == "none" else _shift(copy.deepcopy(teacher), locations, choices[kept])
    return reference, {
        "kept": kept,
        "kl": costs,
        "left_out": [location.norm for location in found if location not in locations],
        "norms": [{"norm": location.norm, "spread": _spread(*ranges[location])} for location in locations],
    }


def _shift(net: fx.GraphModule, locations: Sequence[NormLocation], shifts: Sequence[Shift]) -> fx.GraphModule:
    for location, shift in zip(locations, shifts, strict=bool(shifts)):
        shift_norm(net, location, shift)
    return net


def _is_exact(teacher: fx.GraphModule, location: NormLocation, shift: Shift, images: Tensor) -> bool:
    """Return whether a copy of the network with one location changed has the same logits for ``images``."""
    wanted = logits_of(teacher, images)
    found = logits_of(_shift(copy.deepcopy(teacher), [location], [shift]), images)
    return float((found - wanted).abs().max()) <= SAME * float(wanted.abs().max())


def _spread(low: Tensor, high: Tensor) -> float:
    """Return the ratio of the largest to the median span of channels; 1 if all are constant."""
    spans = high - low
    return float(spans.max() / spans.median()) if bool(spans.median() > 0) else 1.0
