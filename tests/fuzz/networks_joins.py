"""Pieces of random networks in which several tensors meet: sums, gates, concatenations, shared layers, nested ones."""

from fuzz.networks import Draft, common_divisor
from fuzz.networks_layers import conv_expression, width

ADD = (
    *(
        "{a} + {b}",
        "{a} + {b}",
        "torch.add({a}, {b})",
        "{a}.add({b})",
        "{a}.add_({b})",
        "torch.add({a}, {b}, alpha=0.5)",
    ),
    *("torch.add(input={a}, other={b})", "sum([{a}, {b}])", "torch.stack([{a}, {b}]).sum(0)"),
)
SUBTRACT = ("{a} - {b}", "torch.sub({a}, {b})", "{a}.sub({b})", "{a} - 0.5 * {b}", "{a} + -{b}", "{a} + {b}.neg()")
MULTIPLY = ("{a} * {b}", "torch.mul({a}, {b})", "{a}.mul({b})", "{a}.mul_({b})", "torch.multiply({a}, {b})")
GATES = ("torch.sigmoid({x})", "{x}.sigmoid()", "F.hardsigmoid({x})", "torch.tanh({x})", "F.relu6({x} + 3) / 6")


def same_size_conv(b: Draft, outputs: int | None = None) -> str:
    """Add a convolution that keeps height and width, and return how it is called."""
    return b.module("conv", conv_expression(b, b.channels, outputs or b.channels, keeps_size=True))


def residual(b: Draft) -> None:
    """A shortcut around one or two convolutions."""
    shortcut = b.name("s")
    b.line(f"{shortcut} = {b.pick('x', 'x', 'x.clone()', 'x.contiguous()')}")
    before, c = b.x.shape, b.channels
    if b.chance(0.5):
        body = b.module(
            "body",
            f"nn.Sequential({conv_expression(b, c, c, keeps_size=True)}, nn.BatchNorm2d({c}), "
            f"{b.pick('nn.ReLU()', 'nn.ReLU(True)', 'nn.SiLU()', 'nn.Hardtanh()')}, "
            f"{conv_expression(b, c, c, keeps_size=True)})",
        )
        b.line(f"x = {body}(x)")
    else:
        b.line(f"x = {same_size_conv(b)}(x)")
    assert b.x.shape == before
    form = b.pick(*ADD, *SUBTRACT, "in place", "scaled")
    if form == "in place":
        b.line(f"x {b.pick('+=', '-=')} {shortcut}")
    elif form == "scaled":
        gamma = b.module("gamma", f"nn.Parameter(torch.full(({c}, 1, 1), 0.4))")
        b.line(f"x = {shortcut} + {gamma} * x")
    else:
        first, second = b.pick(("x", shortcut), (shortcut, "x"))
        b.line(f"x = {form.format(a=first, b=second)}")
    if b.chance(0.6):
        b.line(f"x = {b.pick('F.relu(x)', 'F.relu_(x)', 'x.relu()', 'F.hardswish(x)')}")


def projected_residual(b: Draft) -> None:
    """A block that halves the map, with a convolution, a pool or zeros in the shortcut."""
    c, outputs = b.channels, b.channels * 2
    shortcut, body = b.name("s"), b.module("conv", f"nn.Conv2d({c}, {outputs}, 3, 2, 1)")
    kind = b.pick("conv", "pool", "zeros", "zeros of size", "pad", "new zeros", "slice")
    if kind == "conv":
        b.line(f"{shortcut} = {b.module('down', f'nn.Conv2d({c}, {outputs}, 1, 2)')}(x)")
    elif kind == "pool":
        b.line(
            f"{shortcut} = {b.module('down', f'nn.Conv2d({c}, {outputs}, 1)')}(F.avg_pool2d(x, 2, 2, ceil_mode=True))"
        )
    else:
        small = b.name("s")
        b.line(f"{small} = {b.pick('x[:, :, ::2, ::2]', 'F.max_pool2d(x, 1, 2)', 'F.avg_pool2d(x, 1, stride=2)')}")
        zeros = {
            "zeros": f"torch.cat([{small}, torch.zeros_like({small})], 1)",
            "zeros of size": f"torch.cat([{small}, torch.zeros({small}.size(0), {c}, *{small}.shape[2:])], dim=1)",
            "pad": f"F.pad({small}, (0, 0, 0, 0, {c // 2}, {c - c // 2}))",
            "new zeros": f"torch.cat(({small}, {small}.new_zeros({small}.shape)), 1)",
            "slice": f"torch.cat([{small}, {small} * 0.0], 1)",
        }
        b.line(f"{shortcut} = {zeros[kind]}")
    b.line(f"x = {body}(x)", f"x = {b.pick(*ADD).format(a='x', b=shortcut)}")
    b.line(f"x = {b.pick('F.relu(x)', 'F.leaky_relu(x)', 'x')}")


def concatenation(b: Draft) -> None:
    """Two branches, concatenated."""
    first, second = b.name("a"), b.name("a")
    b.line(f"{first} = {b.pick('F.relu({0}(x))', '{0}(x)').format(same_size_conv(b, width(b)))}")
    b.line(f"{second} = {b.pick('F.silu({0}(x))', '{0}(x)', 'x').format(same_size_conv(b, width(b)))}")
    spelling = b.pick(
        *("torch.cat([{a}, {b}], 1)", "torch.cat(({a}, {b}), dim=1)", "torch.concat([{a}, {b}], dim=-3)"),
        *("torch.cat(tensors=[{a}, {b}], dim=1)", "torch.cat([{a}, {b}], axis=1)", "torch.cat([{a}, {b}, {a}], 1)"),
        *("torch.concatenate([{a}, {b}], 1)", "torch.hstack([{a}, {b}])", "torch.cat([{a}, {b}], 2)"),
    )
    if b.scope[first].shape[1] == b.scope[second].shape[1] and b.chance(0.5):
        spelling = b.pick(
            *("torch.stack([{a}, {b}], 2).flatten(1, 2)", "torch.stack(({a}, {b}), dim=1).mean(1)"),
            *("torch.stack([{a}, {b}], 1).amax(1)", "torch.maximum({a}, {b})", "torch.max({a}, {b})"),
            *("torch.stack([{a}, {b}], 1).max(dim=1)[0]", "torch.stack([{a}, {b}], 1).max(1).values"),
            *("torch.stack([{a}, {b}], 4).mean(-1)", "torch.lerp({a}, {b}, 0.3)", "torch.stack([{a}, {b}])[1]"),
        )
        b.may_be_rejected("operations whose quantization is known")
    b.line(f"x = {spelling.format(a=first, b=second)}")


def squeeze_excitation(b: Draft) -> None:
    """A gate per channel, from the pooled map."""
    c, g = b.channels, b.name("g")
    pooled = b.pick(
        "x.mean((2, 3))",
        "F.adaptive_avg_pool2d(x, 1).flatten(1)",
        "x.mean([2, 3], keepdim=True)",
        "F.adaptive_avg_pool2d(x, (1, 1))",
        "F.avg_pool2d(x, x.shape[2:])",
        "x.amax((2, 3))",
        "x.view(x.size(0), x.size(1), -1).mean(2)",
    )
    b.line(f"{g} = {pooled}")
    if b.scope[g].ndim == 2:
        one, two = b.module("fc", f"nn.Linear({c}, 4)"), b.module("fc", f"nn.Linear(4, {c})")
    else:
        one, two = b.module("fc", f"nn.Conv2d({c}, 4, 1)"), b.module("fc", f"nn.Conv2d(4, {c}, 1, bias=False)")
    b.line(f"{g} = {b.pick('F.relu', 'F.silu', 'torch.tanh')}({one}({g}))")
    b.line(f"{g} = {b.pick(*GATES).format(x=f'{two}({g})')}")
    if b.scope[g].ndim == 2:
        shape = b.pick(
            "{g}[:, :, None, None]",
            "{g}.view({g}.size(0), {g}.size(1), 1, 1)",
            "{g}.unsqueeze(-1).unsqueeze(-1)",
            "{g}.view(*{g}.shape, 1, 1)",
            "{g}.reshape(-1, {c}, 1, 1)",
            "{g}.view(len(x), -1, 1, 1)",
            "{g}[..., None, None]",
            "torch.unsqueeze({g}, 2).unsqueeze(3)",
            "{g}.unflatten(1, ({c}, 1, 1))",
            "{g}.view({g}.shape + (1, 1))",
        )
        b.line(f"{g} = {shape.format(g=g, c=c)}")
    if b.chance(0.3):
        form = b.pick("{g}.expand_as(x)", "{g}.expand(-1, -1, x.size(2), x.size(3))", "{g}.expand(x.shape)").format(g=g)
        b.line(f"{g} = {form}")
    b.line(f"x = {b.pick(*MULTIPLY, '{a} + {b}', '{a} / (1.0 + {b})').format(a='x', b=g)}")


def spatial_gate(b: Draft) -> None:
    """A gate per position, from mean and maximum over the channels."""
    highest = b.pick(
        "torch.max(x, 1, keepdim=True)[0]",
        "x.max(dim=1, keepdim=True).values",
        "x.amax(1, keepdim=True)",
        "x.max(1, keepdim=True)[0]",
        "torch.amax(x, dim=1, keepdim=True)",
        "x.min(1, keepdim=True)[0]",
    )
    mean = b.pick("x.mean(1, keepdim=True)", "torch.mean(x, dim=1, keepdim=True)", "x.sum(1, keepdim=True)")
    g, layer = b.name("g"), b.module("gate", "nn.Conv2d(2, 1, 3, padding=1)")
    b.line(f"{g} = torch.cat([{mean}, {highest}], 1)")
    b.line(f"{g} = {b.pick(*GATES).format(x=f'{layer}({g})')}")
    b.line(f"x = {b.pick(*MULTIPLY).format(a='x', b=g)}")


def gated_branch(b: Draft) -> None:
    """A product of two branches."""
    first, second = b.name("a"), b.name("a")
    b.line(f"{first} = {same_size_conv(b)}(x)", f"{second} = {same_size_conv(b)}(x)")
    b.line(f"x = {b.pick(*MULTIPLY).format(a=first, b=b.pick(*GATES).format(x=second))}")


def split_and_join(b: Draft) -> None:
    """A map in parts, of which some are computed upon."""
    c = b.channels
    first, second = b.name("a"), b.name("a")
    half = c // 2
    parts = b.pick(
        "x.chunk(2, 1)",
        "torch.chunk(x, 2, dim=1)",
        f"x.split({half}, 1)",
        f"torch.split(x, [{half}, {c - half}], dim=1)",
        f"x.split([{half}, {c - half}], dim=1)",
        f"(x[:, :{half}], x[:, {half}:])",
        "x.tensor_split(2, dim=1)",
        f"(x.narrow(1, 0, {half}), x.narrow(1, {half}, {c - half}))",
        "(x[:, ::2], x[:, 1::2])",
        "x.split(x.size(1) // 2, dim=1)",
        f"x.view(x.size(0), 2, {half}, x.size(2), x.size(3)).unbind(1)",
        "x.reshape(x.shape[0], 2, -1, *x.shape[2:]).transpose(0, 1)",
        "torch.tensor_split(x, 2, 1)",
    )
    b.line(f"{first}, {second} = {parts}")
    size = b.scope[first].shape[1]
    layer = b.module("conv", conv_expression(b, size, size, keeps_size=True))
    b.line(f"{first} = {b.pick('F.relu({l}({a}))', '{l}({a})', 'F.hardswish({l}({a}))').format(l=layer, a=first)}")
    if size == b.scope[second].shape[1] and b.chance(0.4):
        b.line(f"x = {b.pick(*ADD, *MULTIPLY, *SUBTRACT).format(a=first, b=second)}")
    else:
        b.line(f"x = torch.cat({b.pick(f'[{first}, {second}]', f'({second}, {first})')}, {b.pick('1', 'dim=1')})")


def shared_layer(b: Draft) -> None:
    """One layer that is called twice, or two that share their weight."""
    c, layer = b.channels, same_size_conv(b)
    kind = b.pick("twice", "norm twice", "act twice", "tied", "tied bias", "branches", "loop", "same function")
    if kind == "twice":
        b.line(f"x = F.relu({layer}(x))", f"x = {layer}(x)")
    elif kind == "norm twice":
        bn = b.module("bn", f"nn.BatchNorm2d({c})")
        b.line(f"x = F.relu({bn}({layer}(x)))", f"x = {bn}(x)")
    elif kind == "act twice":
        act = b.module("act", b.pick("nn.ReLU(inplace=True)", "nn.SiLU(True)", f"nn.PReLU({c})"))
        b.line(f"x = {act}({layer}(x))", f"x = {act}({same_size_conv(b)}(x) - 0.2)")
    elif kind in ("tied", "tied bias"):
        other = b.module("conv", f"nn.Conv2d({c}, {c}, 3, padding=1, bias={kind == 'tied bias'})")
        tied = b.module("conv", f"nn.Conv2d({c}, {c}, 3, padding=1, bias={kind == 'tied bias'})")
        b.run(f"{tied}.weight = {other}.weight", b.init)
        if kind == "tied bias":
            b.run(f"{tied}.bias = {other}.bias", b.init)
        b.line(f"x = F.relu({other}(x))", f"x = {tied}(x)")
    elif kind == "branches":
        first, second = b.name("a"), b.name("a")
        b.line(f"{first} = {layer}(x)", f"{second} = {layer}({b.pick('x.flip(3)', 'F.relu(x)', 'x.roll(1, 2)')})")
        b.line(f"x = {b.pick(*ADD).format(a=first, b=second)}")
    elif kind == "loop":
        b.line(f"for _ in range({b.pick(2, 3)}):\n    x = F.hardtanh({layer}(x))")
    else:
        b.line(f"x = F.conv2d(x, {layer}.weight, {layer}.bias, padding={layer}.padding, groups={layer}.groups)")
        b.line(f"x = F.relu(F.conv2d(x, {layer}.weight, {layer}.bias, padding={layer}.padding, groups={layer}.groups))")


def nested(b: Draft) -> None:
    """Blocks of their own class, in a list, a sequence or a dictionary."""
    c, name, g = b.channels, b.name("Block"), common_divisor(b.rng, b.channels)
    call, out = (
        b.pick("self.conv(x)", "self.conv(input=x)"),
        b.pick("y", "y", "y + x", "y * self.scale", "x + self.scale * y"),
    )
    b.block(f"""
class {name}(nn.Module):
    def __init__(self, channels, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = {b.pick("nn.ReLU(inplace=True)", "nn.GELU()", "nn.ReLU6()", "nn.Identity()", "nn.Hardswish()")}
        self.scale = {b.pick("0.5", "nn.Parameter(torch.ones(channels, 1, 1))", "2")}

    def forward(self, x{b.pick("", ", shift=0.0", ", residual=None", ", *, gate=False")}):
        y = self.act(self.bn({call}))
        return {out}
""")
    kind = b.pick("list", "sequence", "one", "twice", "dict", "enumerate", "index")
    make = f"{name}({c}, {g})"
    if kind == "list":
        blocks = b.module("blocks", f"nn.ModuleList([{make} for _ in range(2)])")
        b.line(f"for block in {blocks}:\n    x = block(x)")
    elif kind == "sequence":
        b.line(f"x = {b.module('blocks', f'nn.Sequential({make}, {name}({c}))')}(x)")
    elif kind == "dict":
        blocks = b.module("blocks", f'nn.ModuleDict({{"first": {make}, "second": {name}({c})}})')
        b.line(f'x = {blocks}["second"]({blocks}["first"](x=x))')
    elif kind == "enumerate":
        blocks = b.module("blocks", f"nn.ModuleList([{make}, nn.ReLU(), {name}({c})])")
        b.line(f"for i, block in enumerate({blocks}):\n    x = block(x) if i != 1 else block(x) + x")
    elif kind == "index":
        blocks = b.module("blocks", f"nn.ModuleList([{make}, {name}({c})])")
        b.line(f"x = {blocks}[1]({blocks}[0](x)) + {blocks}[0](x)")
    else:
        block = b.module("block", make)
        b.line(f"x = {block}(x)", *([f"x = {block}(x=x)"] if kind == "twice" else []))


def split_attention(b: Draft) -> None:
    """Weights over positions or branches by a softmax."""
    _, c, h, w = b.x.shape
    kind = b.pick("branches", "positions", "attention")
    if kind == "branches":
        first, second, weights = b.name("a"), b.name("a"), b.name("w")
        layer = b.module("fc", f"nn.Linear({c}, {2 * c})")
        b.line(f"{first} = {same_size_conv(b)}(x)", f"{second} = {same_size_conv(b)}(x)")
        b.line(f"{weights} = {layer}(({first} + {second}).mean((2, 3))).view(-1, 2, {c}, 1, 1).softmax(1)")
        b.line(f"x = {first} * {weights}[:, 0] + {second} * {weights}[:, 1]")
    elif kind == "positions":
        weights, layer = b.name("w"), b.module("mask", f"nn.Conv2d({c}, 1, 1)")
        b.line(
            f"{weights} = {layer}(x).flatten(2).softmax(-1).view(x.size(0), 1, {h}, {w})", f"x = x * {weights} * 8.0"
        )
    else:
        b.line("n, c, h, w = x.shape", "q = x.flatten(2)")
        b.line(
            f"x = {b.pick('torch.bmm', 'torch.matmul')}(q, (q.transpose(1, 2) @ q / 8).softmax(-1)).view(n, c, h, w)"
        )
        b.may_be_rejected("operations whose quantization is known")
