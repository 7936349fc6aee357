"""Location of a network's class activation map, found by the structure of the head."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from synq.network.attention.token_map import TOKEN_MAP, channels_are_last, locate_tokens
from synq.network.gradcam import CamMethod, autograd_weights, closed_form_weights
from synq.network.op_traits import (
    OpKind,
    is_activation,
    is_average_pool,
    is_passive,
    node_module,
    traits_of,
    value_inputs,
)
from synq.network.ops import products
from synq.network.tracing import with_features

_TRANSPOSING = {"permute", "transpose", "t"}
"""Operators after which the channels are no longer the second axis."""


@dataclass(frozen=True, kw_only=True)
class CamSite:
    """The layer whose output the class activation map weights, and how the channel weights are computed.

    Attributes:
        node: Name of the graph node whose output is A, the (N, C, H, W) feature map; empty when ``kind`` is "none".
        kind: "closed_form" if the head is average pooling, flatten and one linear layer; "autograd" for any other
            head; "none" if the network has no spatial feature before its classifier.
        channels, height, width: Size of A.
        cells: Number of pooled cells per channel that the classifier reads (1 for a global average pool).
        linear: Module name of the classifier, for "closed_form".
        reason: One sentence on why this kind was chosen.
    """

    node: str
    kind: Literal["closed_form", "autograd", "none"]
    channels: int = 0
    height: int = 0
    width: int = 0
    cells: int = 1
    linear: str | None = None
    reason: str = ""

    def differentiates(self, method: CamMethod) -> bool:
        """Return whether a map of ``method`` needs a backward pass through the head.

        Grad-CAM++ reads the gradient at each position, which the closed form gives only for a global average pool.
        """
        return self.kind == "autograd" or (self.kind == "closed_form" and method == "gradcam++" and self.cells > 1)


def locate_cam(traced: fx.GraphModule, override: str | None = None) -> CamSite:
    """Return the last spatial feature before the classifier and how its CAM weights are computed.

    The head is everything after the feature map. It may scale the logits, pool the map in several ways at once, or
    apply functions before it pools (the power of a generalized mean): these belong to the pool, and the map is the
    output of the non-linearity before them. Where the head reads several maps, the one of the most channels
    is taken, of equals the last.

    The head is read from the structure and then checked numerically: "closed_form" is returned only if the closed form
    equals autograd on this network.

    Args:
        traced: A graph from :func:`trace_classifier`.
        override: Node or module name of A, chosen by the user; None finds it by structure.

    Returns:
        The location; its ``kind`` is "none" if no spatial feature precedes the classifier.

    Raises:
        ValueError: If ``override`` names no node with an (N, C, H, W) output on the path from the image to the logits.
    """
    maps = _maps(traced)
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    tokens = None if override is not None else locate_tokens(traced)
    # A map after the last tokens, or after the last attention, is nearer to the logits.
    multiplied = products(traced)
    last = order[multiplied[-1]] if multiplied else order[tokens[0]] if tokens else -1
    if tokens is not None and not any(order[node] > last for node in maps):
        node, token_map = tokens
        node.meta[TOKEN_MAP] = token_map
        channels = node.meta["shape"][-1]
        return CamSite(
            node=node.name,
            kind="autograd",
            channels=channels,
            height=token_map.height,
            width=token_map.width,
            reason=f"tokens, without the first {token_map.extra}" if token_map.extra else "tokens",
        )
    # An attention map, of one channel, weights the positions of the map that is computed from the image.
    feature = max(reversed(maps), key=lambda node: node.meta["shape"][1], default=None)
    linear = None if feature is None else _only_classifier(traced, feature)
    if override is not None:
        chosen = _find_node(traced, override)
        if chosen is not feature:
            linear = None
        feature = chosen
    if feature is None:
        return CamSite(node="", kind="none", reason="no spatial feature precedes the classifier")
    _, channels, height, width = feature.meta["shape"]
    size = {"channels": channels, "height": height, "width": width}
    if linear is None:
        reason = "the head is not one linear layer"
        if override is None and len(maps) > 1:
            names = ", ".join(node.name for node in maps)
            reason = f"the head reads several maps ({names}); `teacher.cam_layer` names another"
        return CamSite(node=feature.name, kind="autograd", reason=reason, **size)
    weight = _weight_of(traced.get_submodule(linear)).flatten(1)
    cells, rest = divmod(weight.shape[1], channels)
    if rest or (height * width) % cells:
        return CamSite(node=feature.name, kind="autograd", reason="pooled cells do not tile the map", **size)
    location = CamSite(
        node=feature.name, kind="closed_form", cells=cells, linear=linear, reason="pool, flatten, linear", **size
    )
    if not _closed_form_holds(traced, location):
        return CamSite(node=feature.name, kind="autograd", reason="the head is not linear in its features", **size)
    return location


def _maps(traced: fx.GraphModule) -> list[fx.Node]:
    """Return the spatial features that the head reads, in order of execution: walk back from the logits to each."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [node for node in traced.graph.nodes if node.op == "output"]
    while pending:
        for source in value_inputs(pending.pop()):
            if source in seen or source.op == "placeholder":
                continue
            seen.add(source)
            if len(source.meta.get("shape") or ()) == 4 and channels_are_last(traced, source):
                # Tokens (N, H, W, C), which `locate_tokens` finds; after a global pool a row, on the way to the map.
                if source.meta["shape"][1] * source.meta["shape"][2] == 1:
                    pending.append(source)
            elif _is_map(source):
                found.add(_before_pool(source))
            else:
                pending.append(source)
    return [node for node in traced.graph.nodes if node in found]


def _is_map(node: fx.Node) -> bool:
    """Return whether a node on the way back from the logits is the feature map, and not yet a part of its pool."""
    shape: tuple[int, ...] = node.meta.get("shape") or ()
    if len(shape) != 4 or _TRANSPOSING.intersection(traits_of(node).operators):
        return False
    pooled = any(is_average_pool(user) for user in node.users)
    if is_average_pool(node):  # of one axis after another, the first
        before = value_inputs(node)[0].meta["shape"]
        return pooled and (min(shape[2:]) > 1 or min(before[2:], default=1) == 1)
    return pooled or (shape[2] * shape[3] > 1 and not is_passive(node))


def _before_pool(node: fx.Node) -> fx.Node:
    """Return the first of several element-wise non-linearities in a row, of which the others belong to the pool."""
    first, previous = node, node
    while traits_of(previous).kind in (OpKind.NONLINEAR, OpKind.STRUCTURAL, OpKind.PASSIVE):
        inputs = value_inputs(previous)
        if len(inputs) != 1 or not traits_of(previous).elementwise or inputs[0].meta.get("shape") != node.meta["shape"]:
            break
        (previous,) = inputs
        nonlinear = all(traits_of(each).kind is OpKind.NONLINEAR for each in (previous, node))
        if nonlinear and traits_of(previous).elementwise:  # a normalization is none of the pool's functions
            first = previous
    return first


def _only_classifier(traced: fx.GraphModule, feature: fx.Node) -> str | None:
    """Return the name of the head's linear layer if the rest of the head only averages and reshapes, else None."""
    found: list[str] = []
    node = next(n for n in traced.graph.nodes if n.op == "output")
    while True:
        inputs = value_inputs(node)
        if len(inputs) != 1:
            return None
        (node,) = inputs
        if node is feature:
            return found[0] if len(found) == 1 else None
        module = node_module(traced, node)
        is_pixelwise = isinstance(module, nn.Conv2d) and node.meta["shape"][2:] == (1, 1)
        if isinstance(module, nn.Linear) or is_pixelwise:
            found.append(str(node.target))
        elif not is_average_pool(node) and not is_passive(node):
            return None


def _closed_form_holds(traced: fx.GraphModule, location: CamSite) -> bool:
    """Compare both forms of alpha on random images: equal for a linear head, far apart for any other."""
    network = with_features(traced, location.node)
    placeholder = next(n for n in traced.graph.nodes if n.op == "placeholder")
    weight = _weight_of(traced.get_submodule(location.linear or ""))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *placeholder.meta["shape"][1:], generator=generator).to(weight)
    labels = torch.arange(4, device=weight.device) % weight.shape[0]
    with torch.enable_grad():
        logits, features = network(images)
        by_autograd = autograd_weights(logits, features, labels, retain_graph=False)
    closed = closed_form_weights(
        weight.detach().flatten(1), labels, location.channels, location.cells, location.height * location.width
    )
    return torch.allclose(closed, by_autograd, rtol=1e-3, atol=1e-6 * float(by_autograd.abs().max() + 1e-12) + 1e-9)


def _find_node(traced: fx.GraphModule, name: str) -> fx.Node:
    used: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if node.op == "output" or node in used:
            used.update(node.all_input_nodes)
    spatial = [n for n in traced.graph.nodes if n in used and is_activation(n) and len(n.meta.get("shape") or ()) == 4]
    for node in spatial:
        if name in (node.name, str(node.target)):
            return node
    last = ", ".join(n.name for n in spatial[-5:])
    raise ValueError(
        "teacher.cam_layer must name a node with a (N, C, H, W) output on the way to the logits, "
        f"but got {name!r} (the last: {last})"
    )


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
