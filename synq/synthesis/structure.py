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
from synq.network.attention.locations import AttentionNodes, locate_attention
from synq.network.blocks import block_ends
from synq.network.op_traits import BATCH, traits_of, value_inputs
from synq.network.tracing import with_outputs
from synq.synthesis.attention_prior import AttentionPrior

HEAD_WEIGHT, ENTROPY_WEIGHT, VARIATION_WEIGHT = 0.05, 0.05, 0.002
"""Weights where a network has no batch-norm statistics, next to an `inception_weight` of 0.05."""
MOST_QUERIES, MOST_TOKENS = 16, 64
"""Number of tokens, chosen at random in each step, whose maps are compared, and whose similarities are."""
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
    prior: float = 0.0

    @property
    def any(self) -> bool:
        """Whether a term is on."""
        return max(self.heads, self.entropy, self.variation, self.prior) > 0


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
        prior=config.prior_weight or 0.0,
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
        attentions: The attention that is looked at.
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
        self.attentions = locate_attention(graph) if weights.heads or weights.entropy else []
        self.maps = [] if self.attentions or not weights.entropy else _maps(graph)
        self._compared = [attention for attention in self.attentions if attention.heads > 1] if weights.heads else []
        factors = [name for attention in self._compared for name in (attention.factors or (attention.scores,))]
        gathered = [attention.gathered for attention in self.attentions] if weights.entropy else []
        self._num_factors = len(factors)
        self._prior = AttentionPrior(graph, generator) if weights.prior else None
        prior = self._prior.names if self._prior is not None else []
        self._num_prior = len(prior)
        self.module: nn.Module = with_outputs(graph, [*prior, *factors, *gathered, *self.maps])

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (N, K) and the terms, scalars with gradient: heads, entropy, prior, variation.

        Args:
            images: (N, C, H, W), of which `variation` is computed, too.
        """
        logits, *outputs = self.module(images)
        probabilities, taps = outputs[: self._num_prior], outputs[self._num_prior :]
        factors, tokens = iter(taps[: self._num_factors]), taps[self._num_factors :]
        zero = logits.new_zeros(())
        disagreements = [
            self._disagreement([next(factors) for _ in attention.factors or (attention.scores,)], attention)
            for attention in self._compared
        ]
        attentions: list[AttentionNodes | None] = [*self.attentions] if self.attentions else [None] * len(tokens)
        entropies = [
            self._negative_entropy(values, attention) for values, attention in zip(tokens, attentions, strict=False)
        ]
        terms = {
            "heads": torch.stack(disagreements).mean() if disagreements else zero,
            "entropy": torch.stack(entropies).mean() if entropies else zero,
            "prior": self._prior(probabilities) if self._prior is not None and probabilities else zero,
            "variation": variation(images) if self.weights.variation else zero,
        }
        return logits, terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms."""
        weights = self.weights
        weighted = weights.heads * terms["heads"] + weights.entropy * terms["entropy"] + weights.prior * terms["prior"]
        return weighted + weights.variation * terms["variation"]

    def _disagreement(self, factors: list[Tensor], attention: AttentionNodes) -> Tensor:
        """Return the mean of 1 - SSIM^2 over pairs of heads, for some queries and all keys.

        Only the scores of these queries are computed, from queries and keys: a second reader of all scores would cost
        as much as the attention itself.
        """
        windows = self._windows(attention)
        first, *rest = (_of_windows(factor, windows, attention) for factor in factors)
        chosen = self._choice(attention.tokens - attention.extra, MOST_QUERIES)
        rows = first.index_select(-2, (chosen + attention.extra).to(first.device))
        return head_disagreement((rows @ rest[0] if rest else rows)[..., attention.extra :])

    def _negative_entropy(self, values: Tensor, attention: AttentionNodes | None) -> Tensor:
        """Return the negative entropy of the similarities of some tokens."""
        if attention is None:
            tokens = values.flatten(2).transpose(1, 2) if values.dim() == 4 else values
        else:
            values = _of_windows(values, self._windows(attention), attention)
            tokens = values.mean(-3)[..., attention.extra :, :]
        chosen = self._choice(tokens.shape[-2], MOST_TOKENS)
        return negative_entropy(tokens if len(chosen) == tokens.shape[-2] else tokens[..., chosen.to(tokens.device), :])

    def _windows(self, attention: AttentionNodes) -> Tensor | None:
        """Return the chosen windows of an image, None for attention over all of it."""
        if attention.windows < 2:
            return None
        return torch.randperm(attention.windows, generator=self._generator)[:MOST_WINDOWS]

    def _choice(self, tokens: int, most: int) -> Tensor:
        return torch.randperm(tokens, generator=self._generator)[:most]


def _of_windows(values: Tensor, windows: Tensor | None, attention: AttentionNodes) -> Tensor:
    """Return (N, windows, heads, ...) of a tensor of an attention with some of its windows, all for None."""
    by_image = attention.by_image(values)
    return by_image if windows is None else by_image[:, windows.to(values.device)]


def head_disagreement(scores: Tensor) -> Tensor:
    """Return the mean of 1 - SSIM^2 over all pairs of different heads: 0 if they look the same, or opposite.

    The scores of a query are scaled to [0, 1] over its keys and compared, as one picture, with those of other heads.

    Args:
        scores: (..., heads, queries, keys), at least two heads.

    Source: MimiQ (arXiv 2407.20021), with SSIM of Wang et al. (IEEE TIP 2004) over the whole map.
    """
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    maps = (scores - low) / (high - low + 1e-6)
    mean = maps.mean(-1, keepdim=True)
    centered = maps - mean
    mean, variance = mean.squeeze(-1), centered.square().mean(-1)  # (..., heads, queries)
    heads = scores.shape[-3]
    first, second = torch.triu_indices(heads, heads, 1, device=maps.device)

    def of(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return values.index_select(dim, first), values.index_select(dim, second)

    # Products of pairs: a matrix product over so few heads is several times slower on a CPU.
    one, other = of(centered, -3)
    covariance = (one * other).mean(-1)
    (mean_1, mean_2), (variance_1, variance_2) = of(mean, -2), of(variance, -2)
    luminance = (2 * mean_1 * mean_2 + C1) / (mean_1.square() + mean_2.square() + C1)
    return 1 - (luminance * (2 * covariance + C2) / (variance_1 + variance_2 + C2)).square().mean()


def negative_entropy(tokens: Tensor) -> Tensor:
    """Return the mean of -0.5 log(2 pi e Var(s)) over images, s the cosines of all pairs of tokens.

    It is the negative differential entropy of a normal distribution of that variance: low where tokens of an image form
    groups, as on a photograph, high where all are equal, as on noise.

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
    """Return the nodes whose positions take the place of tokens: residual sums, or the outputs of blocks.

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
    shape: tuple[int, ...] = node.meta.get("shape") or ()
    if shape[:1] != (BATCH,):
        return False
    return (len(shape) == 4 and shape[2] * shape[3] > 3) or (len(shape) == 3 and shape[1] > 3)
