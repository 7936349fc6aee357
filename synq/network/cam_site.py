"""Location of a network's class activation map, found by the structure of the head."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from synq.network.gradcam import CamMethod, autograd_weights, closed_form_weights
from synq.network.op_traits import is_average_pool, is_passive, node_module
from synq.network.tracing import tensor_inputs, with_features


@dataclass(frozen=True, kw_only=True)
class CamSite:
    """The layer whose output the class activation map weights, and how the channel weights are computed.

    Attributes:
        node: Name of the graph node whose output is A, the (N, C, H, W) feature map; empty when ``kind`` is "none".
        kind: "closed_form" if the head is average pooling, flatten and one linear layer; "autograd" if the head is not
            linear in A; "none" if the network has no spatial feature before its classifier.
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
    feature, linear = _walk_head(traced)
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
        return CamSite(node=feature.name, kind="autograd", reason="the head is not one linear layer", **size)
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


def _walk_head(traced: fx.GraphModule) -> tuple[fx.Node | None, str | None]:
    """Walk from the output back to A; return A or None, and the classifier's name if the head has exactly one layer."""
    node: fx.Node = next(n for n in traced.graph.nodes if n.op == "output")
    linear: str | None = None
    plain = True
    while True:
        sources = tensor_inputs(node)
        if len(sources) != 1:
            return None, None
        node = sources[0]
        shape = node.meta["shape"]
        if node.op in ("placeholder", "get_attr"):
            return None, None
        if is_average_pool(traced, node):
            source = tensor_inputs(node)[0]
            if len(source.meta["shape"]) == 4:
                return source, linear if plain else None
            continue  # one axis after another, or flattened pixels: A is further up
        if is_passive(traced, node):
            continue
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            return node, linear if plain else None
        module = node_module(traced, node)
        is_classifier = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and shape[2:] == (1, 1))
        plain = plain and is_classifier and linear is None
        linear = str(node.target) if is_classifier else linear


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
    spatial = [
        n for n in traced.graph.nodes if n in used and n.op != "get_attr" and len(n.meta.get("shape") or ()) == 4
    ]
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
