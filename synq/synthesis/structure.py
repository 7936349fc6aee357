"""Terms for networks without batch-norm statistics: heads that agree, tokens that differ, pixels that are smooth.

LayerNorm and GroupNorm store nothing of the training images, so that there are no statistics to match. What remains
known of a trained network is how it looks at an image: on a real one the heads of an attention see the same structure,
and the tokens of different things differ; on noise neither is true. Without attention the positions of the maps take
the place of the tokens.

Source: structural agreement of heads: MimiQ (arXiv 2407.20021); entropy of the similarity of tokens: PSAQ-ViT (ECCV
2022), here in closed form for a normal distribution; shift and colors: plug-in inversion (ICML 2022).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from synq.config.synthesis import SynthesisConfig
from synq.network.attention.sites import AttentionSite, attention_sites
from synq.network.blocks import block_ends
from synq.network.op_traits import BATCH, traits_of, value_inputs
from synq.network.tracing import with_outputs

HEAD_WEIGHT, ENTROPY_WEIGHT, VARIATION_WEIGHT = 0.05, 0.05, 0.002
"""Weights where a network has no batch-norm statistics, next to an `inception_weight` of 0.05."""
MOST_TOKENS = 64
"""Number of tokens, chosen at random in each step, whose maps and similarities are compared."""
MOST_WINDOWS = 2
"""Number of windows of an image, chosen at random in each step, where attention is in windows."""
C1, C2 = 1e-4, 9e-4
"""Constants of SSIM for values in [0, 1]: (0.01)^2 and (0.03)^2."""
LEAST_VARIANCE = 1e-6
"""Added to variances, whose logarithm has no bound."""
COLOR_OFFSET = 0.5
"""Standard deviation of the offset of a channel in the first step, in normalized units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureWeights:
    """Weights of the terms, each >= 0."""

    heads: float
    entropy: float
    variation: float

    @property
    def any(self) -> bool:
        """Whether a term is on."""
        return max(self.heads, self.entropy, self.variation) > 0


def structure_weights(config: SynthesisConfig, has_statistics: bool) -> StructureWeights:
    """Return the weights of the terms for a network.

    Args:
        config: Settings of the synthesis; a weight that is None is chosen here.
        has_statistics: Whether the network has batch-norm statistics, which the images match instead.
    """
    return StructureWeights(
        heads=_chosen(config.head_weight, HEAD_WEIGHT, has_statistics),
        entropy=_chosen(config.entropy_weight, ENTROPY_WEIGHT, has_statistics),
        variation=_chosen(config.variation_weight, VARIATION_WEIGHT, has_statistics),
    )


def check_method(config: SynthesisConfig, has_statistics: bool, name: str) -> None:
    """Reject settings that need batch-norm statistics for a network without.

    Args:
        config: Settings of the synthesis.
        has_statistics: Whether the network has batch-norm statistics.
        name: Name of the network, for messages.

    Raises:
        ValueError: A setting needs them; the message names it and what to use instead.
    """
    if has_statistics:
        return
    if config.method == "zeroq":
        raise ValueError(
            "`synthesis.method` must not be zeroq, which matches BatchNorm statistics alone, for a network without "
            f"them, but {name} has none; use inversion"
        )
    if config.calib_centers:
        raise ValueError(
            "`synthesis.calib_centers` must be false for a network without BatchNorm statistics, which centers give a "
            f"second target, but got true for {name}"
        )


def _chosen(given: float | None, default: float, has_statistics: bool) -> float:
    if given is not None:
        return given
    return 0.0 if has_statistics else default


class StructureTerms:
    """Network that returns logits and the terms of its structure in one forward pass.

    Attributes:
        module: Takes images (N, C, H, W); returns logits and the tapped tensors.
        sites: The attention that is looked at.
        maps: Names of the nodes whose positions are looked at instead, where there is no attention.
    """

    def __init__(self, graph: fx.GraphModule, weights: StructureWeights, generator: torch.Generator) -> None:
        """Tap a traced network, whose tensors are shared.

        Args:
            graph: A graph from ``trace_classifier``.
            weights: Weights of the terms; what has the weight 0 is not computed.
            generator: CPU generator that chooses tokens.
        """
        self.weights, self._generator = weights, generator
        self.sites = attention_sites(graph) if weights.heads or weights.entropy else []
        self.maps = [] if self.sites or not weights.entropy else _maps(graph)
        scores = [site.scores for site in self.sites] if weights.heads else []
        gathered = [site.gathered for site in self.sites] if weights.entropy else []
        self._num_scores = len(scores)
        self.module: nn.Module = with_outputs(graph, [*scores, *gathered, *self.maps])

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (N, K) and the terms, scalars with gradient: heads, entropy, variation.

        Args:
            images: (N, C, H, W), of which `variation` is computed, too.
        """
        logits, *taps = self.module(images)
        scores, tokens = taps[: self._num_scores], taps[self._num_scores :]
        zero = logits.new_zeros(())
        with_heads = [site for site in self.sites if site.heads > 1] if scores else []
        disagreements = [
            self._disagreement(values, site, len(images))
            for values, site in zip(scores, self.sites, strict=False)
            if site in with_heads
        ]
        sites: list[AttentionSite | None] = [*self.sites] if self.sites else [None] * len(tokens)
        entropies = [
            self._negative_entropy(values, site, len(images)) for values, site in zip(tokens, sites, strict=False)
        ]
        terms = {
            "heads": torch.stack(disagreements).mean() if disagreements else zero,
            "entropy": torch.stack(entropies).mean() if entropies else zero,
            "variation": variation(images) if self.weights.variation else zero,
        }
        return logits, terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms."""
        weights = self.weights
        weighted = weights.heads * terms["heads"] + weights.entropy * terms["entropy"]
        return weighted + weights.variation * terms["variation"]

    def _disagreement(self, scores: Tensor, site: AttentionSite, count: int) -> Tensor:
        """Return the mean of 1 - SSIM^2 over pairs of heads, for some queries and all keys."""
        scores = self._some_windows(scores, count)[..., site.extra :, site.extra :]
        return head_disagreement(scores[..., self._choice(scores.shape[-2], scores.device), :])

    def _negative_entropy(self, values: Tensor, site: AttentionSite | None, count: int) -> Tensor:
        """Return the negative entropy of the similarities of some tokens."""
        if site is None:
            tokens = values.flatten(2).transpose(1, 2) if values.dim() == 4 else values
        else:
            values = self._some_windows(values, count)
            tokens = values.mean(-3)[..., site.extra :, :] if values.dim() > 3 else values[..., site.extra :, :]
        return negative_entropy(tokens[..., self._choice(tokens.shape[-2], tokens.device), :])

    def _some_windows(self, values: Tensor, count: int) -> Tensor:
        """Return (N, windows, ...), or (N, ...), of a tensor whose first axis counts the windows of all images."""
        windows, rest = divmod(len(values), count)
        if windows < 2 or rest:
            return values
        whole = values.unflatten(0, (count, windows))
        chosen = torch.randperm(windows, generator=self._generator)[:MOST_WINDOWS]
        return whole[:, chosen.to(values.device)]

    def _choice(self, tokens: int, device: torch.device) -> Tensor | slice:
        if tokens <= MOST_TOKENS:
            return slice(None)
        return torch.randperm(tokens, generator=self._generator)[:MOST_TOKENS].to(device)


def head_disagreement(scores: Tensor) -> Tensor:
    """Return the mean of 1 - SSIM^2 over all pairs of different heads: 0 if they look alike, or opposite.

    The scores of a query are scaled to [0, 1] over its keys and compared, as one picture, with those of other heads.

    Args:
        scores: (..., heads, queries, keys), at least two heads.

    Source: MimiQ (arXiv 2407.20021), with SSIM of Wang et al. (IEEE TIP 2004) over the whole map.
    """
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    maps = ((scores - low) / (high - low + 1e-6)).transpose(-2, -3)  # (..., queries, heads, keys)
    mean = maps.mean(-1, keepdim=True)
    centered = maps - mean
    covariance = centered @ centered.transpose(-2, -1) / maps.shape[-1]
    variance = covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    across = mean.transpose(-2, -1)
    luminance = (2 * mean * across + C1) / (mean.square() + across.square() + C1)
    structure = (2 * covariance + C2) / (variance + variance.transpose(-2, -1) + C2)
    heads = maps.shape[-2]
    first, second = torch.triu_indices(heads, heads, 1, device=maps.device)
    return 1 - (luminance * structure)[..., first, second].square().mean()


def negative_entropy(tokens: Tensor) -> Tensor:
    """Return the mean of -0.5 log(2 pi e Var(s)) over images, s the cosines of all pairs of tokens.

    It is the negative differential entropy of a normal distribution of that variance: low where tokens of an image form
    groups, as on a photograph, high where all are alike, as on noise.

    Args:
        tokens: (..., T, D), at least two.
    """
    normed = nn.functional.normalize(tokens, dim=-1)
    similarities = (normed @ normed.transpose(-2, -1)).flatten(-2)
    variance = similarities.var(-1, correction=0) + LEAST_VARIANCE
    return -0.5 * (2 * math.pi * math.e * variance).log().mean()


def variation(images: Tensor) -> Tensor:
    """Return the total variation of images (N, C, H, W): the root mean squares of the differences of neighbors, summed.

    The neighbors are those to the right, below, and on both diagonals.
    """
    total = images.new_zeros(())
    for below, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = images[..., : images.shape[-2] - below, max(0, -right) : images.shape[-1] - max(0, right)]
        other = images[..., below:, max(0, right) : images.shape[-1] - max(0, -right)]
        if one.numel():
            total = total + ((one - other).square().mean() + 1e-12).sqrt()
    return total


def recolored(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return images with random colors: an offset per image and channel, then (x - m) / exp(s) with common m and s.

    Args:
        images: (N, C, H, W), normalized.
        strength: In [0, 1]; 0 returns the images.
        generator: CPU generator.
    """
    if strength <= 0:
        return images
    count, channels = images.shape[:2]
    offsets = COLOR_OFFSET * strength * torch.randn(count, channels, 1, 1, generator=generator)
    shift, scale = (strength * (2 * torch.rand(1, channels, 1, 1, generator=generator) - 1) for _ in range(2))
    factor = torch.exp(-scale)
    return images * factor.to(images.device) + ((offsets - shift) * factor).to(images.device)


def _maps(graph: fx.GraphModule) -> list[str]:
    """Return the nodes whose positions take the place of tokens: residual sums, or the ends of blocks.

    Where none has positions, none is returned.
    """
    sums = [
        node
        for node in graph.graph.nodes
        if node.op.startswith("call_")
        and traits_of(node).operators in (("add",), ("add_",))
        and len(value_inputs(node)) == 2
        and _has_positions(node)
    ]
    return [node.name for node in sums or [node for node in block_ends(graph) if _has_positions(node)]]


def _has_positions(node: fx.Node) -> bool:
    shape = node.meta.get("shape") or ()
    if shape[:1] != (BATCH,):
        return False
    return (len(shape) == 4 and shape[2] * shape[3] > 3) or (len(shape) == 3 and shape[1] > 3)
