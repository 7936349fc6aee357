"""Heads of random networks: from a map to logits."""

from fuzz.networks import Draft

POOLED = (
    *(
        "x.mean((2, 3))",
        "x.mean([-2, -1])",
        "torch.mean(x, dim=(2, 3))",
        "x.mean(dim=[2, 3])",
        "x.mean(3).mean(2)",
        "x.mean(-1).mean(-1)",
    ),
    *(
        "F.adaptive_avg_pool2d(x, 1).flatten(1)",
        "torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)",
        "F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)",
    ),
    *(
        "F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]",
        "F.adaptive_avg_pool2d(x, output_size=1).view(x.size(0), -1)",
        "F.avg_pool2d(x, x.shape[2:]).flatten(1)",
    ),
    *(
        "F.avg_pool2d(x, (x.size(2), x.size(3))).view(x.shape[0], x.shape[1])",
        "x.flatten(2).mean(2)",
        "x.view(x.size(0), x.size(1), -1).mean(dim=-1)",
    ),
    *(
        "x.sum((2, 3)) / (x.shape[2] * x.shape[3])",
        "x.amax((2, 3))",
        "F.adaptive_max_pool2d(x, 1).flatten(1)",
        "x.flatten(2).max(2)[0]",
        "x.flatten(2).max(dim=-1).values",
    ),
    *(
        "x.mean((2, 3), keepdim=True).flatten(1)",
        "F.adaptive_avg_pool2d(x, 1).squeeze()",
        "x.mean((2, 3)).squeeze()",
        "F.adaptive_avg_pool2d(x, 1).reshape(len(x), -1)",
    ),
    *(
        "x.mean((-1, -2))",
        "x.mean(dim=(2, 3), keepdim=False)",
        "F.adaptive_avg_pool2d(x, 1).view(len(x), -1)",
        "F.adaptive_avg_pool2d(x, 1).squeeze((2, 3))",
    ),
    *(
        "x.permute(0, 2, 3, 1).mean((1, 2))",
        "x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)",
        "F.adaptive_avg_pool1d(x.flatten(2), 1).squeeze(2)",
        "x.flatten(2).transpose(1, 2).mean(1)",
    ),
    *(
        "x.logsumexp((2, 3))",
        "x.std((2, 3))",
        "x.norm(dim=(2, 3))",
        "x.sum([2, 3])",
        "x[:, :, 1, 1]",
        "x.clamp(min=1e-4).pow(3).mean((2, 3)).pow(1 / 3)",
        "F.avg_pool2d(x.clamp(min=1e-4) ** 3.0, x.shape[2:]).pow(1.0 / 3.0).flatten(1)",
        "(x.abs() + 0.1).log().mean((2, 3)).exp()",
        "torch.squeeze(torch.squeeze(F.adaptive_avg_pool2d(x, 1), 3), 2)",
    ),
    *(
        "F.adaptive_avg_pool2d(x, 1).reshape(-1, x.shape[1])",
        "torch.einsum('nchw->nc', x) / 9",
        "F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1)",
        "x.reshape(x.shape[:2] + (-1,)).mean(-1)",
    ),
)


def pooled(b: Draft) -> None:
    """Reduce the map to a vector per image."""
    form = b.pick(*POOLED)
    layer = b.pick("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveAvgPool2d((1, 1))", "nn.AdaptiveMaxPool2d(1)")
    if b.chance(0.3):
        flat = b.pick(
            "torch.flatten({x}, 1)",
            "{x}.flatten(1)",
            "{x}.flatten(start_dim=1)",
            "{x}.view({x}.size(0), -1)",
            "torch.flatten({x}, start_dim=1)",
            "{x}.squeeze(3).squeeze(2)",
        )
        b.line(f"x = {b.module('pool', layer)}(x)", f"x = {flat.format(x='x')}")
    else:
        b.line(f"x = {form}")
    if any(word in form for word in ("logsumexp", "std", "norm", "einsum", "squeeze()")):
        b.may_be_rejected("operations whose quantization is known", "for one image", "cannot be exported to ONNX")


def classes(b: Draft) -> int:
    return b.pick(2, 3, 5, 10, 17)


def logits(b: Draft) -> None:
    """One linear layer, in one of its spellings."""
    layer = b.module("fc", f"nn.Linear({b.channels}, {classes(b)}{b.pick('', '', ', bias=False')})")
    call = b.pick(
        f"{layer}(x)",
        f"{layer}(x)",
        f"{layer}(input=x)",
        f"F.linear(x, {layer}.weight, {layer}.bias)",
        f"F.linear(input=x, weight={layer}.weight, bias={layer}.bias)",
    )
    b.line(f"x = {call}")


def finish(b: Draft) -> None:
    """What some networks do with their logits."""
    c = b.channels
    kind = b.pick(
        "none",
        "none",
        "none",
        "none",
        "none",
        "temperature",
        "parameter",
        "bias",
        "norm",
        "drop",
        "view",
        "clamp",
        "probabilities",
        "tuple",
    )
    if kind == "temperature":
        b.line(f"x = {b.pick('x / 2.0', 'x * 0.5', '3 * x', 'x - 1', 'x.div(1.5)', '-x')}")
    elif kind == "parameter":
        p = b.module(
            "t",
            b.pick(
                "nn.Parameter(torch.tensor(2.5))",
                "nn.Parameter(torch.ones(1) * 1.5)",
                f"nn.Parameter(torch.rand({c}) + 0.5)",
            ),
        )
        b.line(f"x = {b.pick('x * {p}', 'x / {p}', '{p} * x', 'x * {p}.exp()', 'x / F.softplus({p})').format(p=p)}")
    elif kind == "bias":
        b.line(f"x = x + {b.module('p', f'nn.Parameter(torch.randn({c}))')}")
    elif kind == "norm":
        b.apply(f"nn.BatchNorm1d({c}{b.pick('', ', affine=False')})", "bn")
    elif kind == "drop":
        b.apply(b.pick("F.dropout(x, training=self.training)", "nn.Dropout(0.5)"), "drop")
    elif kind == "view":
        form = b.pick(
            "x.view(x.size(0), -1)",
            "x.flatten(1)",
            "x.contiguous()",
            "x.reshape(-1, x.shape[-1])",
            "x[:, 1:]",
            "x.float()",
            "x.flip(1)",
            "torch.cat([x, x[:, :1]], 1)",
        )
        b.line(f"x = {form}")
    elif kind == "clamp":
        b.line(f"x = {b.pick('x.clamp(-10, 10)', 'torch.tanh(x)', 'F.relu(x)', 'F.leaky_relu(x)')}")
        b.may_be_rejected("returned probabilities")  # if no logit is negative, or above one
    elif kind == "probabilities" and b.chance(0.5):
        form = b.pick(
            "F.softmax(x, 1)",
            "torch.sigmoid(x)",
            "F.log_softmax(x, dim=1)",
            "x.softmax(-1)",
            "F.softmax(x, dim=1) * 1.0",
            "x.sigmoid()",
        )
        b.line(f"x = {form}")
        b.may_be_rejected("logits", "probabilit", "softmax")


def pool_and_linear(b: Draft) -> None:
    """Global pool, one linear layer."""
    pooled(b)
    logits(b)
    finish(b)


def pool_and_mlp(b: Draft) -> None:
    """Global pool, two or three linear layers."""
    pooled(b)
    for _ in range(b.pick(1, 1, 2)):
        hidden = b.pick(6, 8, 16)
        layer = b.module("fc", f"nn.Linear({b.channels}, {hidden})")
        b.line(f"x = {layer}(x)")
        if b.chance(0.3):
            b.line(f"x = {b.module('bn', f'nn.BatchNorm1d({hidden})')}(x)")
        if b.chance(0.1):
            b.line(f"x = {b.module('ln', f'nn.LayerNorm({hidden})')}(x)")
            b.may_be_rejected("operations whose quantization is known")
        form = b.pick(
            "F.relu(x)",
            "F.hardswish(x)",
            "torch.tanh(x)",
            "F.gelu(x)",
            "x.relu_()",
            "F.dropout(F.relu(x), 0.5, self.training)",
        )
        b.line(f"x = {form}")
    logits(b)
    finish(b)


def cells_and_linear(b: Draft) -> None:
    """A map of a few cells, flattened."""
    size = b.pick("2", "(2, 1)", "(1, 3)", "3", "(7, 5)")
    kind = b.pick("adaptive", "adaptive", "all", "max", "pool")
    if kind == "adaptive":
        b.apply(b.pick(f"F.adaptive_avg_pool2d(x, {size})", f"nn.AdaptiveAvgPool2d({size})"), "pool")
    elif kind == "max":
        b.apply(b.pick(f"F.adaptive_max_pool2d(x, {size})", f"nn.AdaptiveMaxPool2d({size})"), "pool")
        b.may_be_rejected("ONNX")
    elif kind == "pool":
        b.line("x = F.avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))")
    if b.x[0].numel() > 2048:
        raise ValueError("too many")
    flat = b.pick(
        "x.flatten(1)",
        "torch.flatten(x, 1)",
        "x.view(x.size(0), -1)",
        "x.reshape(len(x), -1)",
        "x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)",
        "x.flatten(2).flatten(1)",
        f"x.view(-1, {b.x[0].numel()})",
    )
    b.apply(b.pick(flat, flat, flat, "nn.Flatten()"), "flat")
    logits(b)
    finish(b)


def conv_head(b: Draft) -> None:
    """A convolution gives the logits, before or behind the pool."""
    layer = b.module(
        "cls", f"nn.Conv2d({b.channels}, {classes(b)}, {b.pick('1', '1', '3, padding=1')}{b.pick('', ', bias=False')})"
    )
    if b.chance(0.5):
        b.line(f"x = {layer}(x)")
        pooled(b)
    else:
        pool = b.pick("F.adaptive_avg_pool2d(x, 1)", "x.mean((2, 3), keepdim=True)", "F.adaptive_max_pool2d(x, 1)")
        b.line(f"x = {pool}", f"x = {layer}(x)")
        form = b.pick(
            "x.flatten(1)",
            "x[:, :, 0, 0]",
            "x.squeeze(-1).squeeze(-1)",
            "x.view(x.size(0), -1)",
            "x.squeeze()",
            "x.squeeze(3).squeeze(2)",
            "x.mean((2, 3))",
            "x[..., 0, 0]",
        )
        b.line(f"x = {form}")
        if "squeeze()" in b.body[-1]:
            b.may_be_rejected("for one image")
    finish(b)


def two_pools(b: Draft) -> None:
    """Average and maximum side by side, or summed."""
    first, second = b.name("a"), b.name("a")
    b.line(
        f"{first} = {b.pick('F.adaptive_avg_pool2d(x, 1)', 'x.mean((2, 3), keepdim=True)')}",
        f"{second} = {b.pick('F.adaptive_max_pool2d(x, 1)', 'x.amax((2, 3), keepdim=True)')}",
    )
    b.line(
        f"x = {b.pick(f'torch.cat([{first}, {second}], 1)', f'{first} + {second}', f'0.5 * ({first} + {second})')}",
        "x = x.flatten(1)",
    )
    logits(b)
    finish(b)


def two_branches(b: Draft) -> None:
    """Logits of two heads, added, averaged or chosen."""
    vector, k = b.name("v"), classes(b)
    b.line(f"{vector} = {b.pick('x.mean((2, 3))', 'F.adaptive_avg_pool2d(x, 1).flatten(1)')}")
    one, two = (b.module("fc", f"nn.Linear({b.channels}, {k})") for _ in range(2))
    form = b.pick(
        "{o}({v}) + {t}({v})",
        "({o}({v}) + {t}({v})) / 2",
        "torch.stack([{o}({v}), {t}({v})]).mean(0)",
        "{o}({v}) * torch.sigmoid({t}({v}))",
        "torch.cat([{o}({v}), {t}({v})], 1)",
        "torch.maximum({o}({v}), {t}({v}))",
    ).format(o=one, t=two, v=vector)
    b.line(f"x = {form}")
    if "maximum" in b.body[-1]:
        b.may_be_rejected("operations whose quantization is known")


def only_pool(b: Draft) -> None:
    """The channels of the last map are the logits."""
    pooled(b)
    b.may_be_rejected("returned probabilities")  # for example the maximum of a negated hard swish
    finish(b)


HEADS = (
    (5, pool_and_linear),
    (2, pool_and_mlp),
    (2, cells_and_linear),
    (2, conv_head),
    (1, two_pools),
    (0.7, two_branches),
    (0.5, only_pool),
)
