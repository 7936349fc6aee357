"""Scale shift: give all channels of a LayerNorm's output one range, by its affine and the weights of its readers.

    y = x_hat * gamma + beta, read by linear layers W y + bias             x_hat: normalized input

    y' = (y + b) / r        gamma' = gamma / r,  beta' = (beta + b) / r    r > 0 and b, per channel
    W' = W diag(r)          bias' = bias - W b                             so W' y' + bias' = W y + bias

The function of the network does not change. LayerNorm does not equalize its channels: the largest has often ten times
the range of the median, and with one scale for the whole tensor it leaves the others a few codes. After the change all
have the same center and the same width; the ratios are in the columns of W then, whose rows have a scale each.

Source: RepQ-ViT (Li et al., ICCV 2023), section 3.2. There r and b follow from per-channel scales and zero points of
one bit-width; here from the ranges, which is the same without the rounding of the zero points. Ours: a smaller exponent
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
from synq.quant.keep_best import Synchronize, keep_best, mean_kl

STRENGTHS = (0.5, 1.0)
"""Candidate exponents of the factors r."""
LARGEST = 256.0
"""Largest ratio of a factor to the median of its LayerNorm: a nearly dead channel must not grow without bound."""
SAME = 1e-4
"""Largest change of a logit, relative to the largest logit, that counts as rounding errors of float32."""


@dataclass(frozen=True, kw_only=True)
class NormSite:
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


def find_sites(traced: fx.GraphModule) -> list[NormSite]:
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
            NormSite(
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
    traced: fx.GraphModule, sites: Sequence[NormSite], images: Tensor, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Return the smallest and largest value of each channel over images and positions, each (C,), for each site.

    Args:
        traced: The float network in which the sites were found.
        sites: From `find_sites`.
        images: (N, C, H, W) on the device of ``traced``.
        batch_size: Images per forward pass.
    """
    recorder = _RangeRecorder(traced, {site.node for site in sites})
    for batch in images.split(batch_size):
        recorder.run(batch)
    return [recorder.ranges[site.node] for site in sites]


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

    factor r_c = (width_c / median width)^strength, and offset b_c such that all centers of (y + b) / r are the mean of
    the centers of y / r. Without ``shifts`` b is 0, and width_c is that of the range extended to zero, which every grid
    represents. A channel that is constant keeps the factor 1.

    Ranges [0, 2] and [-4, 0], strength 1: widths 2 and 4, their median in logarithms 2.83, so r is (0.71, 1.41); y / r
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
    widths = high - low
    alive = torch.isfinite(widths) & (widths > 0)
    factor = torch.ones_like(widths)
    if alive.any():
        logs = strength * widths[alive].log()
        middle = logs.sort().values[[(len(logs) - 1) // 2, len(logs) // 2]].mean()
        bound = math.log(LARGEST)
        factor[alive] = (logs - middle).clamp(-bound, bound).exp()
    centers = (low + high) / 2 / factor
    offset = (centers.mean() - centers) * factor if shifts else torch.zeros_like(factor)
    return Shift(factor=factor, offset=offset)


@torch.no_grad()
def shift_site(net: fx.GraphModule, site: NormSite, shift: Shift) -> None:
    """Move scale and shift of one site from the LayerNorm to its readers, in place, computed in float64."""
    norm = net.get_submodule(site.norm)
    assert isinstance(norm, nn.LayerNorm)
    norm.weight.copy_(norm.weight.double() / shift.factor.to(norm.weight.device))
    if site.shifts:
        norm.bias.copy_((norm.bias.double() + shift.offset.to(norm.bias.device)) / shift.factor.to(norm.bias.device))
    elif norm.bias is not None:
        norm.bias.copy_(norm.bias.double() / shift.factor.to(norm.bias.device))
    for name in site.consumers:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.double()
        if site.shifts:
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
    ``images``, measured with newly observed ranges, is kept. A site at which the float network does not stay the same
    (within `SAME`) is left out.

    Args:
        net: Network of a student from ``quantize_model(teacher, ...)``.
        teacher: Graph of the float network that it approximates; not modified.
        images: (N, C, H, W) synthetic images on the device of both.
        observe: Sets the ranges of ``net``, from whatever they are.
        synchronize: Makes metrics the same on all processes.

    Returns:
        The float network that the student approximates tensor by tensor: the teacher, or a copy with the same changes,
        whose logits are the same up to rounding errors. And a report with "kept" (the choice), "kl" (mean KL of each
        choice, in nats), "left_out" (names of LayerNorms whose change was not exact) and "norms": for each site the
        ratio of the largest to the median width of its channels, before.
    """
    sites = find_sites(teacher)
    ranges = dict(zip(sites, norm_ranges(teacher, sites, images), strict=True))
    few, all_sites = images[:8], sites
    sites = [site for site in all_sites if _is_exact(teacher, site, shift_of(*ranges[site], shifts=site.shifts), few)]
    choices: dict[str, list[Shift]] = {"none": []}
    for strength in STRENGTHS if sites else ():
        choices[str(strength)] = [shift_of(*ranges[site], strength, shifts=site.shifts) for site in sites]

    def change(name: str) -> None:
        _shift(net, sites, choices[name])
        observe(net)

    wanted = logits_of(teacher, images)
    kept, costs = keep_best(
        net, {name: partial(change, name) for name in choices}, lambda: mean_kl(wanted, net, images), synchronize
    )
    reference = teacher if kept == "none" else _shift(copy.deepcopy(teacher), sites, choices[kept])
    return reference, {
        "kept": kept,
        "kl": costs,
        "left_out": [site.norm for site in all_sites if site not in sites],
        "norms": [{"norm": site.norm, "spread": _spread(*ranges[site])} for site in sites],
    }


def _shift(net: fx.GraphModule, sites: Sequence[NormSite], shifts: Sequence[Shift]) -> fx.GraphModule:
    for site, shift in zip(sites, shifts, strict=bool(shifts)):
        shift_site(net, site, shift)
    return net


def _is_exact(teacher: fx.GraphModule, site: NormSite, shift: Shift, images: Tensor) -> bool:
    """Return whether a copy of the network with one site changed has the same logits for ``images``."""
    wanted = logits_of(teacher, images)
    found = logits_of(_shift(copy.deepcopy(teacher), [site], [shift]), images)
    return float((found - wanted).abs().max()) <= SAME * float(wanted.abs().max())


def _spread(low: Tensor, high: Tensor) -> float:
    """Return the ratio of the largest to the median width of channels; 1 if all are constant."""
    widths = high - low
    return float(widths.max() / widths.median()) if bool(widths.median() > 0) else 1.0
