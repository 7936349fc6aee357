"""Attention in traced networks: the logits of fused operations, and products with two activations."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.attention.locations import locate_attention
from synq.network.cam_site import locate_cam
from synq.network.op_traits import OpKind, traits_of
from synq.network.ops import classify, products
from synq.network.tracing import trace_classifier, with_features

SIZE = (3, 16, 16)
WIDTH, HEADS, TOKENS = 16, 4, 16
Attention = Callable[[nn.Module, Tensor], Tensor]


class Hybrid(nn.Module):
    """A convolution with BatchNorm, one attention over its 16 positions, and a class token if there is one."""

    def __init__(
        self, attention: Attention, parts: dict[str, nn.Module] | None = None, class_token: bool = False
    ) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp, self.fc = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), nn.Linear(WIDTH, 5)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH)) if class_token else None
        for name, part in (parts or {}).items():
            self.add_module(name, part)
        self.attention = attention

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(2, (HEADS, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images))).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1)
        x = x + self.attention(self, x)
        x = x + self.mlp(x)
        return self.fc(x.mean(1) if self.token is None else x[:, 0])


def joined(net: nn.Module, x: Tensor, **options: object) -> Tensor:
    q, k, v = net.heads(x)  # type: ignore[operator]
    mixed = F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    return net.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[operator]


def shared_keys(net: nn.Module, x: Tensor) -> Tensor:
    q, k, v = net.heads(x)  # type: ignore[operator]
    return net.proj(F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True).transpose(1, 2).flatten(2))  # type: ignore[operator]


FUSED: dict[str, Attention] = {
    "plain": joined,
    "scale": lambda net, x: joined(net, x, scale=0.3),
    "causal": lambda net, x: joined(net, x, is_causal=True),
    "float mask": lambda net, x: joined(net, x, attn_mask=torch.linspace(-3, 3, TOKENS * TOKENS).view(TOKENS, TOKENS)),
    "mask": lambda net, x: joined(net, x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1)),
    "shared keys": shared_keys,
}


def traced(net: nn.Module) -> fx.GraphModule:
    torch.manual_seed(1)
    net = net.train()
    net(torch.randn(4, *SIZE))
    graph = trace_classifier(net.eval(), SIZE)
    images = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert torch.allclose(graph(images), net(images), rtol=1e-4, atol=1e-5)
    return graph


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_attention_is_two_products_and_a_softmax(name: str) -> None:
    graph = traced(Hybrid(FUSED[name]))
    assert len(products(graph)) == 2
    assert all(len(traits_of(node).reads) == 2 for node in products(graph))
    classify(graph)  # every operation is known


MODULES: dict[str, tuple[Attention, dict[str, nn.Module]]] = {
    "self": (lambda net, x: net.mha(x, x, x)[0], {"mha": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}),
    "tokens first": (
        lambda net, x: net.mha(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)[
            0
        ].transpose(0, 1),
        {"mha": nn.MultiheadAttention(WIDTH, HEADS)},
    ),
    "no bias": (
        lambda net, x: net.mha(x, x, x, need_weights=False)[0],
        {"mha": nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)},
    ),
    "other keys": (
        lambda net, x: net.mha(x, net.proj(x)[..., :8], x)[0],
        {"mha": nn.MultiheadAttention(WIDTH, HEADS, kdim=8, batch_first=True)},
    ),
    "mask of PyTorch": (
        lambda net, x: net.mha(x, x, x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(2))[0],
        {"mha": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)},
    ),
    "weights": (
        lambda net, x: net.mha(x, x, x)[1] @ x,
        {"mha": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)},
    ),
    "twice": (
        lambda net, x: net.mha(x, x, x)[0] + net.mha(x, net.proj(x), x)[0],
        {"mha": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)},
    ),
    "layer": (
        lambda net, x: net.layer(x),
        {"layer": nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True)},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_an_attention_module_is_layers_and_products(name: str) -> None:
    attention, parts = MODULES[name]
    graph = traced(Hybrid(attention, parts))
    assert products(graph) and not any(isinstance(part, nn.MultiheadAttention) for part in graph.modules())
    layers, _ = classify(graph)
    assert any("in_proj" in str(node.target) or "q_proj" in str(node.target) for node in layers)


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}])
def test_an_attention_module_without_a_form_is_rejected_in_one_line(options: dict[str, bool]) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)  # type: ignore[arg-type]
    net = Hybrid(lambda net, x: net.mha(x, x, x)[0], {"mha": module})
    with pytest.raises(ValueError, match=r"attention 'mha' adds a key and a value.*write it with torch"):
        trace_classifier(net, SIZE)


def test_what_computes_the_inputs_of_a_product_in_one_operation_is_unknown() -> None:
    def chained(net: nn.Module, x: Tensor) -> Tensor:
        return torch.linalg.multi_dot([x[0], x[0].T, x[0]]).unsqueeze(0).expand_as(x)

    graph = trace_classifier(Hybrid(chained).eval(), SIZE)
    assert any(traits_of(node).kind is OpKind.UNKNOWN for node in graph.graph.nodes if node.op == "call_function")


@fx.wrap
def wrapped_attention(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """An attention that torch.fx records as one operation, as torchvision's of Swin."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in F.linear(x, weight, bias).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_function_that_its_library_wraps_is_looked_into() -> None:
    graph = traced(Hybrid(lambda net, x: wrapped_attention(x, net.qkv.weight, net.qkv.bias, HEADS)))
    assert len(products(graph)) == 2
    assert any(str(node.target) == "qkv" for node in classify(graph)[0])


def test_weights_and_biases_computed_from_parameters_are_those_of_a_layer() -> None:
    def computed(net: nn.Module, x: Tensor) -> Tensor:
        weight = net.qkv.weight - net.qkv.weight.mean(1, keepdim=True)  # type: ignore[union-attr, operator]
        bias = torch.cat([net.qkv.bias[:32], torch.zeros(16)])  # type: ignore[index]
        return F.linear(x, weight, bias)[..., :16] + F.linear(x, net.qkv.weight, bias)[..., 16:32]  # type: ignore[arg-type]

    net = Hybrid(computed)
    graph = traced(net)
    made = {name: part for name, part in graph.named_modules() if name.endswith("_layer")}
    assert len(made) == 2
    first = next(iter(made.values()))
    assert torch.equal(first.weight, net.qkv.weight - net.qkv.weight.mean(1, keepdim=True))  # type: ignore[arg-type]
    assert not first.bias[32:].any()  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize("class_token", [False, True])
def test_the_map_of_tokens_is_that_of_the_last_sum_on_which_the_logits_depend(class_token: bool) -> None:
    graph = traced(Hybrid(joined, class_token=class_token))
    site = locate_cam(graph)
    assert (site.channels, site.height, site.width, site.kind) == (WIDTH, 4, 4, "autograd")
    sums = [node.name for node in graph.graph.nodes if traits_of(node).operators == ("add",)]
    if class_token:  # the positions that leave the only block have no gradient, and no sum enters it
        assert site.node not in sums
        return
    assert site.node == sums[-1]
    images = torch.randn(2, *SIZE)
    with torch.enable_grad():
        logits, features = with_features(graph, site.node)(images)
        (slope,) = torch.autograd.grad(logits[:, 1].sum(), features)
    assert features.shape == (2, WIDTH, 4, 4) and torch.allclose(logits, graph(images), atol=1e-6)
    weight = graph.get_submodule("fc").weight[1]
    assert torch.allclose(slope, (weight / 16).view(1, -1, 1, 1).expand_as(slope), atol=1e-6)  # type: ignore[operator, union-attr]


def talking(net: nn.Module, x: Tensor) -> Tensor:
    """Attention whose heads are mixed before and after the softmax, as in CaiT."""
    q, k, v = net.heads(x)  # type: ignore[operator]
    scores = net.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[operator]
    mixed = net.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[operator]
    return net.proj((mixed @ v).transpose(1, 2).flatten(2))  # type: ignore[operator]


def test_attention_whose_heads_are_mixed_is_found() -> None:
    parts: dict[str, nn.Module] = {name: nn.Linear(HEADS, HEADS) for name in ("before", "after")}
    graph = traced(Hybrid(talking, parts, class_token=True))
    (found,) = locate_attention(graph)
    scores, gathered = products(graph)
    assert (found.scores, found.gathered) == (scores.name, gathered.name)
    assert (found.heads, found.tokens, found.extra) == (HEADS, TOKENS + 1, 1)
    names = {node.name: node for node in graph.graph.nodes}
    assert "_softmax" in traits_of(names[found.probabilities]).operators


def test_a_classifier_of_zeros_hides_no_tokens() -> None:
    net = Hybrid(joined)
    nn.init.zeros_(net.fc.weight)
    graph = traced(net)
    sums = [node.name for node in graph.graph.nodes if traits_of(node).operators == ("add",)]
    assert locate_cam(graph).node == sums[-1]
