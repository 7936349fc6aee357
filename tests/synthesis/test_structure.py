"""Terms of networks without batch-norm statistics: closed forms against plain loops, what they tap, what they lower."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import SynthesisConfig
from synq.network.attention.locations import locate_attention
from synq.network.bn_stats import bn_targets
from synq.network.tracing import trace_classifier
from synq.synthesis.inversion import invert
from synq.synthesis.structure import (
    C1,
    C2,
    LEAST_VARIANCE,
    StructureTerms,
    StructureWeights,
    check_method,
    head_disagreement,
    negative_entropy,
    recolored,
    structure_weights,
    variation,
)
from synq.teacher.pixel_range import PixelRange

SIZE = (1, 12, 12)
ALL = StructureWeights(heads=0.05, entropy=0.05, variation=0.002)


class Attention(nn.Module):
    """A class token and nine patches; one attention of two heads, then a head that reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.head((x + mixed.transpose(1, 2).flatten(2))[:, 0])


class Grouped(nn.Module):
    """Convolutions with GroupNorm and a residual sum, without attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.conv(x)).mean((2, 3)))


def _terms(net: nn.Module, weights: StructureWeights = ALL) -> StructureTerms:
    graph = trace_classifier(net.eval(), SIZE).requires_grad_(False)
    return StructureTerms(graph, weights, torch.Generator().manual_seed(0))


def test_head_disagreement_is_that_of_a_plain_loop() -> None:
    scores = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for image, query in itertools.product(range(2), range(4)):
        maps = []
        for head in range(3):
            row = scores[image, head, query]
            maps.append((row - row.min()) / (row.max() - row.min() + 1e-6))
        for first, second in itertools.combinations(maps, 2):
            covariance = ((first - first.mean()) * (second - second.mean())).mean()
            luminance = (2 * first.mean() * second.mean() + C1) / (first.mean() ** 2 + second.mean() ** 2 + C1)
            spread = first.var(correction=0) + second.var(correction=0)
            values.append(1 - (luminance * (2 * covariance + C2) / (spread + C2)) ** 2)
    assert torch.allclose(head_disagreement(scores), torch.stack(values).mean())


def test_heads_that_look_the_same_agree_and_opposite_ones_nearly() -> None:
    one = torch.rand(2, 1, 4, 16, generator=torch.Generator().manual_seed(0))
    assert float(head_disagreement(torch.cat([one, 3 * one + 1], 1))) == pytest.approx(0, abs=1e-4)
    other = torch.rand(2, 1, 4, 16, generator=torch.Generator().manual_seed(1))
    assert float(head_disagreement(torch.cat([one, other], 1))) > 0.5
    assert float(head_disagreement(torch.cat([one, -one], 1))) < 0.2


def test_entropy_is_that_of_a_plain_loop_and_falls_with_groups_of_tokens() -> None:
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = []
    for image in tokens:
        cosines = torch.stack([F.cosine_similarity(a, b, dim=0) for a in image for b in image])
        expected.append(-0.5 * math.log(2 * math.pi * math.e * (float(cosines.var(correction=0)) + LEAST_VARIANCE)))
    assert float(negative_entropy(tokens)) == pytest.approx(sum(expected) / 2)
    equal_tokens = torch.ones(1, 6, 4) + 0.01 * torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    grouped = torch.eye(2).repeat_interleave(3, 0).repeat(1, 2)[None]
    assert float(negative_entropy(grouped)) < float(negative_entropy(equal_tokens)) - 1


def test_variation_of_known_images() -> None:
    assert float(variation(torch.full((2, 1, 5, 5), 3.0))) == pytest.approx(0, abs=1e-5)
    stripes = torch.tensor([0.0, 1.0]).repeat(1, 1, 4, 2)
    assert float(variation(stripes)) == pytest.approx(3.0, abs=1e-4), "right and both diagonals differ by 1, below by 0"
    assert float(variation(torch.zeros(1, 1, 1, 4))) == pytest.approx(0, abs=1e-5), "no neighbors below"


def test_colors_fade_and_are_one_factor_per_channel() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert recolored(images, 0.0, torch.Generator()) is images
    changed = recolored(images, 1.0, torch.Generator().manual_seed(0))
    contrast = changed.std((0, 2, 3)) / images.std((0, 2, 3))
    assert len(contrast.unique()) == 3
    again = recolored(images, 0.1, torch.Generator().manual_seed(0))
    assert float((again - images).abs().mean()) < 0.3 * float((changed - images).abs().mean())


def test_attention_is_found_with_its_class_token() -> None:
    (attention,) = locate_attention(trace_classifier(Attention().eval(), SIZE))
    assert (attention.heads, attention.tokens, attention.extra) == (2, 10, 1)


@pytest.mark.parametrize("net", [Attention, Grouped])
def test_terms_come_with_the_logits_of_the_network(net: type[nn.Module]) -> None:
    module = net().eval()
    images = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(3))
    terms = _terms(module)
    logits, found = terms(images.requires_grad_())
    assert torch.allclose(logits, module(images), atol=1e-5)
    assert set(found) == {"heads", "entropy", "prior", "variation"}
    heads, entropy = (float(found[name].detach()) for name in ("heads", "entropy"))
    assert (heads > 0) == (net is Attention) and entropy != 0
    (gradient,) = torch.autograd.grad(terms.total(found), images)
    assert bool(gradient.abs().sum() > 0)
    assert terms.attentions == ([] if net is Grouped else terms.attentions) and bool(terms.maps) == (net is Grouped)


def test_a_term_of_weight_0_is_not_computed() -> None:
    terms = _terms(Attention(), StructureWeights(heads=0.0, entropy=0.0, variation=1.0))
    _, found = terms(torch.randn(2, *SIZE))
    assert float(found["heads"]) == float(found["entropy"]) == 0 and float(found["variation"]) > 0
    assert not terms.attentions and not terms.maps


def test_weights_follow_the_structure_unless_given() -> None:
    assert not structure_weights(SynthesisConfig(), True).any
    chosen = structure_weights(SynthesisConfig(entropy_weight=0.0), False)
    assert chosen.entropy == 0 and chosen.heads > 0 and chosen.variation > 0
    assert structure_weights(SynthesisConfig(head_weight=0.3), True).heads == 0.3


@pytest.mark.parametrize(
    ("settings", "message"), [({"method": "zeroq"}, "must not be zeroq"), ({"calib_centers": True}, "must be false")]
)
def test_settings_that_need_statistics_are_rejected(settings: dict[str, object], message: str) -> None:
    config = SynthesisConfig(**settings)  # type: ignore[arg-type]
    check_method(config, True, "net")
    with pytest.raises(ValueError, match=f"{message}.*net"):
        check_method(config, False, "net")


@pytest.mark.parametrize("net", [Attention, Grouped])
def test_synthesis_lowers_the_terms_and_finds_the_classes(net: type[nn.Module]) -> None:
    module = net().eval().requires_grad_(False)
    labels = torch.arange(10) % 5
    bounds = PixelRange(torch.full((1, 1, 1, 1), -2.0), torch.full((1, 1, 1, 1), 2.0))
    made = {}
    for iterations in (0, 60):
        made[iterations] = invert(
            module,
            labels,
            SIZE,
            bn_targets(module),
            config=SynthesisConfig(iterations=iterations, inception_weight=0.2),
            generator=torch.Generator().manual_seed(0),
            pixel_range=bounds,
            structure=_terms(module),
        )
    before, after = made[0], made[60]
    assert after.terms["total"] < before.terms["total"] - 0.02 and after.terms["bns"] == 0
    assert after.terms["inception"] < before.terms["inception"] - 0.2
    assert after.terms["entropy"] < before.terms["entropy"]
    assert float(after.images.abs().max()) <= 2.0
