"""Pieces of random networks: convolutions, linear layers, norms and activations in all their spellings."""

from fuzz.networks import Draft, common_divisor

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": (
        *("nn.ReLU()", "nn.ReLU(inplace=True)", "F.relu({x})", "F.relu({x}, inplace=True)", "F.relu_({x})"),
        *("{x}.relu()", "{x}.relu_()", "torch.relu({x})", "torch.relu_({x})", "F.relu(input={x})"),
        *("F.threshold({x}, 0.0, 0.0)", "torch.maximum({x}, torch.zeros_like({x}))"),
    ),
    "leaky_relu": (
        *("nn.LeakyReLU(0.1)", "nn.LeakyReLU(0.3, inplace=True)", "F.leaky_relu({x}, 0.2)", "F.leaky_relu_({x})"),
        *("F.leaky_relu({x}, negative_slope=0.05, inplace=True)", "F.leaky_relu(input={x}, negative_slope=0.2)"),
    ),
    "prelu": ("nn.PReLU()", "nn.PReLU({c}, 0.2)", "F.prelu({x}, {p})", "torch.prelu({x}, {p})", "{x}.prelu({p})"),
    "relu6": ("nn.ReLU6()", "nn.ReLU6(inplace=True)", "F.relu6({x})", "F.relu6({x}, inplace=True)"),
    "hardtanh": (
        *("nn.Hardtanh()", "nn.Hardtanh(-0.5, 2.0)", "F.hardtanh({x}, -1.0, 3.0)", "F.hardtanh_({x})"),
        "nn.Hardtanh(min_val=0.0, max_val=4.0, inplace=True)",
    ),
    "elu": ("nn.ELU()", "nn.ELU(0.7, inplace=True)", "F.elu({x})", "F.elu({x}, alpha=0.5)", "F.elu_({x})"),
    "selu": ("nn.SELU()", "F.selu({x})", "torch.selu({x})", "torch.selu_({x})", "nn.SELU(inplace=True)"),
    "celu": ("nn.CELU(0.8)", "F.celu({x})", "torch.celu({x})", "torch.celu_({x}, 1.2)"),
    "gelu": ("nn.GELU()", 'nn.GELU("tanh")', "F.gelu({x})", 'F.gelu({x}, approximate="tanh")'),
    "silu": ("nn.SiLU()", "nn.SiLU(inplace=True)", "F.silu({x})", "F.silu({x}, inplace=True)", "{x} * {x}.sigmoid()"),
    "mish": ("nn.Mish()", "F.mish({x})", "{x} * torch.tanh(F.softplus({x}))"),
    "hardswish": (
        *("nn.Hardswish()", "nn.Hardswish(inplace=True)", "F.hardswish({x})", "{x} * F.relu6({x} + 3) / 6"),
        *("{x} * F.hardsigmoid({x})", "{x} * (F.relu6({x} + 3.0) * 0.25)"),
    ),
    "hardsigmoid": ("nn.Hardsigmoid()", "F.hardsigmoid({x})", "F.hardsigmoid({x}, inplace=True)"),
    "sigmoid": ("nn.Sigmoid()", "torch.sigmoid({x})", "{x}.sigmoid()", "F.sigmoid({x})", "{x}.sigmoid_()"),
    "tanh": ("nn.Tanh()", "torch.tanh({x})", "{x}.tanh()", "F.tanh({x})", "{x}.tanh_()"),
    "softplus": ("nn.Softplus()", "F.softplus({x})", "F.softplus({x}, beta=2)"),
    "softmax": ("nn.Softmax(dim=1)", "F.softmax({x}, dim=1)", "{x}.softmax(1)", "torch.softmax({x}, 1)"),
    "clamp": (
        *("torch.clamp({x}, -1.0, 2.0)", "{x}.clamp(min=0)", "{x}.clamp_(0, 6)", "{x}.clip(-2, 2)"),
        *("torch.clamp({x}, max=1.5)", "torch.clamp_min({x}, 0.0)", "{x}.clamp_min(-0.1)", "{x}.clamp_max(1.0)"),
        *("torch.clamp(input={x}, min=-0.5)", "torch.clip({x}, 0.0, 3.0)"),
    ),
    "abs": ("{x}.abs()", "torch.abs({x})", "abs({x})", "{x}.abs_()", "torch.absolute({x})"),
    "power": (
        *("{x}.square()", "torch.square({x})", "{x}.pow(2)", "{x} ** 2", "torch.pow({x}, 2.0)"),
        *(
            "{x}.abs().add(0.1).sqrt()",
            "({x} * {x} + 0.1).sqrt()",
            "torch.sqrt(F.relu({x}) + 0.01)",
            "{x}.pow(exponent=2)",
        ),
    ),
    "exp": ("torch.exp(-{x}.abs())", "({x}.clamp(max=1.0)).exp()"),
}
"""Spellings of activations whose quantization is known; `{x}` is the input, `{c}` its channels, `{p}` a parameter."""
RARE = {
    "rare": (
        *("nn.Softsign()", "F.softsign({x})", "nn.LogSigmoid()", "F.logsigmoid({x})", "nn.Tanhshrink()"),
        *("nn.Hardshrink(0.1)", "F.softshrink({x}, 0.1)", "torch.sin({x})", "{x}.cos()", "torch.log1p({x}.abs())"),
        *("{x}.sign()", "{x}.round()", "torch.floor({x})", "torch.reciprocal({x}.abs() + 1.0)"),
        *("({x}.abs() + 1.0).rsqrt()", "torch.erf({x})", "torch.where({x} > 0, {x}, 0.1 * {x})", "nn.RReLU()"),
        *(
            "torch.minimum({x}, -{x})",
            "{x}.masked_fill({x} < 0, 0.0)",
            "{x} * ({x} > 0)",
            "torch.exp2({x}.clamp(max=1))",
        ),
        *("{x}.cumsum(2)", "torch.sort({x}, dim=1)[0]", "F.normalize({x}, dim=1)", "nn.GLU(1)", "torch.atan({x})"),
        *(
            "{x} / ({x}.norm(dim=1, keepdim=True) + 1.0)",
            "{x}.heaviside({x}.new_zeros(1)) * {x}",
            "nn.Threshold(0.1, 0.0)",
        ),
        *("torch.nan_to_num({x})", "F.local_response_norm({x}, 3)", "torch.logaddexp({x}, -{x})", "{x} % 2.0"),
        *("{x} - {x}.mean((2, 3), keepdim=True)", "{x} / {x}.std(dim=1, keepdim=True).add(1.0)", "{x}.log_softmax(1)"),
    ),
}
"""Further functions: a rejection that names them is right, too."""


def activate(b: Draft, x: str, spelling: str) -> str:
    """Return an expression that applies a spelling of an activation to ``x``."""
    if spelling.startswith("nn."):
        layer = b.module("act", spelling.format(c=b.channels))
        return b.pick(f"{layer}({x})", f"{layer}({x})", f"{layer}(input={x})")
    slope = b.module("slope", f"nn.Parameter(torch.full(({b.channels},), 0.15))") if "{p}" in spelling else ""
    return spelling.format(x=x, p=slope)


def activation(b: Draft) -> None:
    """Any known activation in any spelling."""
    kind = b.pick("relu", "relu", *ACTIVATIONS)
    b.line(f"x = {activate(b, 'x', b.pick(*ACTIVATIONS[kind]))}")
    if kind in ("softmax", "tanh", "sigmoid", "hardsigmoid", "hardtanh", "clamp", "exp"):
        b.may_be_rejected("returned probabilities")  # averages of them may be in [0, 1] for any input


def rare_activation(b: Draft) -> None:
    """A function that may be unknown."""
    spelling = b.pick(*RARE["rare"])
    b.line(f"x = {activate(b, 'x', spelling)}")
    b.may_be_rejected("operations whose quantization is known", "cannot be exported to ONNX", "must have a gradient")


def conv_expression(b: Draft, inputs: int, outputs: int, *, keeps_size: bool = False) -> str:
    """Return the expression of a random convolution."""
    kernel = b.pick(3, 3, 3, 1, 1, 5, 2, (1, 3), (3, 1), (3, 2))
    words = []
    if keeps_size:
        kernel = b.pick(1, 3, 3, 5, (1, 3))
        words.append('padding="same"' if b.chance(0.2) else f"padding={_half(kernel)}")
    else:
        stride, padding = (
            b.pick(1, 1, 2, (2, 1), 3),
            b.pick(_half(kernel), _half(kernel), 0, 1, (0, 1), "same", "valid"),
        )
        dilation = b.pick(1, 1, 1, 2, (1, 2))
        stride = 1 if padding == "same" else stride
        words += [f"stride={stride}"] if stride != 1 else []
        words += [f"padding={padding!r}"] if padding != 0 else []
        words += [f"dilation={dilation}"] if dilation != 1 else []
    if b.chance(0.35):
        words.append(f"groups={common_divisor(b.rng, inputs, outputs)}")
    if b.chance(0.5):
        words.append("bias=False")
    if b.chance(0.15):
        words.append(f"padding_mode={b.pick('reflect', 'replicate', 'circular')!r}")
    return f"nn.Conv2d({', '.join([str(inputs), str(outputs), str(kernel), *words])})"


def _half(kernel: int | tuple[int, int]) -> int | tuple[int, ...]:
    return kernel // 2 if isinstance(kernel, int) else tuple(size // 2 for size in kernel)


def width(b: Draft) -> int:
    """Return a random number of channels."""
    return b.pick(4, 6, 8, 8, 12, 16, 16, b.channels, 2 * b.channels)


def conv(b: Draft) -> None:
    """A convolution, called in one of the ways of PyTorch."""
    inputs = b.channels
    outputs = b.pick(width(b), inputs) if inputs > 1 else width(b)
    layer = b.module("conv", conv_expression(b, inputs, outputs))
    style = b.pick("call", "call", "call", "keyword", "function", "function keyword", "forward", "bias after")
    if style == "call":
        b.line(f"x = {layer}(x)")
    elif style == "keyword":
        b.line(f"x = {layer}(input=x)")
    elif style == "function":
        tail = f"{layer}.stride, {layer}.padding, {layer}.dilation, {layer}.groups"
        b.line(f"x = F.conv2d(x, {layer}.weight, {layer}.bias, {tail})")
    elif style == "function keyword":
        b.line(f"x = F.conv2d(input=x, weight={layer}.weight, bias={layer}.bias, groups={layer}.groups)")
    elif style == "forward":
        b.line(f"x = {layer}.forward(x)")
    else:
        shift = b.module("bias", f"nn.Parameter(0.3 * torch.randn({outputs}, 1, 1))")
        b.line(f"x = {layer}(x) {b.pick('+', '-')} {shift}")


def norm(b: Draft) -> None:
    """A batch norm, as a layer or as a function."""
    c = b.channels
    options = b.pick("", "", ", affine=False", ", eps=1e-3", ", momentum=None", ", eps=0.1, affine=False")
    layer = b.module("bn", f"nn.{b.pick('BatchNorm2d', 'BatchNorm2d', 'BatchNorm2d', 'SyncBatchNorm')}({c}{options})")
    stats = f"{layer}.running_mean, {layer}.running_var, {layer}.weight, {layer}.bias"
    keywords = ", ".join(f"{key}={layer}.{key}" for key in ("running_mean", "running_var", "weight", "bias"))
    style = b.pick("call", "call", "call", "keyword", "function", "function training", "function keyword")
    if style == "call":
        b.line(f"x = {layer}(x)")
    elif style == "keyword":
        b.line(f"x = {layer}(input=x)")
    elif style == "function":
        b.line(f"x = F.batch_norm(x, {stats}, False, 0.0, {layer}.eps)")
    elif style == "function training":
        b.line(f"x = F.batch_norm(x, {stats}, training=self.training, eps={layer}.eps)")
    else:
        b.line(f"x = F.batch_norm(input=x, {keywords}, eps={layer}.eps)")


def other_norm(b: Draft) -> None:
    """A norm that computes its statistics from the image: it may be unknown."""
    _, c, h, w = b.x.shape
    group = common_divisor(b.rng, c)
    kind = b.pick("layer last", "layer map", "group", "instance", "instance tracked", "function")
    if kind == "layer last":
        layer = b.module("ln", f"nn.LayerNorm({c})")
        b.line("x = x.permute(0, 2, 3, 1)", f"x = {layer}(x)", "x = x.permute(0, 3, 1, 2)")
    elif kind == "layer map":
        b.line(f"x = {b.module('ln', f'nn.LayerNorm([{c}, {h}, {w}])')}(x)")
    elif kind == "group":
        b.line(f"x = {b.module('gn', f'nn.GroupNorm({group}, {c})')}(x)")
    elif kind == "instance":
        b.line(f"x = {b.module('norm', f'nn.InstanceNorm2d({c}, affine=True)')}(x)")
    elif kind == "instance tracked":
        b.line(f"x = {b.module('norm', f'nn.InstanceNorm2d({c}, track_running_stats=True)')}(x)")
    else:
        b.line(f"x = F.{b.pick('layer_norm(x, x.shape[1:])', f'group_norm(x, {group})', 'instance_norm(x)')}")
    b.may_be_rejected("operations whose quantization is known")


def conv_norm_act(b: Draft) -> None:
    """The usual three in a row, as a Sequential or one by one."""
    outputs, spelling = (
        width(b),
        b.pick(*ACTIVATIONS[b.pick("relu", "relu", "relu6", "silu", "leaky_relu", "hardswish")]),
    )
    expression, inplace = conv_expression(b, b.channels, outputs), b.pick("", "inplace=True")
    if b.chance(0.5):
        block = b.module("block", f"nn.Sequential({expression}, nn.BatchNorm2d({outputs}), nn.ReLU({inplace}))")
        b.line(f"x = {block}(x)")
        return
    conv_, bn = b.module("conv", expression), b.module("bn", f"nn.BatchNorm2d({outputs})")
    if "{c}" in spelling or "{p}" in spelling:
        spelling = "F.relu({x})"
    if b.chance(0.5) and not spelling.startswith("nn.") and spelling.count("{x}") == 1:
        b.line(f"x = {spelling.format(x=f'{bn}({conv_}(x))')}")
    else:
        b.line(f"x = {conv_}(x)", f"x = {bn}(x)")
        b.line(f"x = {activate(b, 'x', spelling)}")


def linear_on_map(b: Draft) -> None:
    """A linear layer over the channels of every position."""
    c, outputs = b.channels, width(b)
    layer = b.module("lin", f"nn.Linear({c}, {outputs}{b.pick('', ', bias=False')})")
    call = b.pick(
        f"{layer}(x)", f"{layer}(input=x)", f"F.linear(x, {layer}.weight, {layer}.bias)", f"{layer}.forward(x)"
    )
    forth, back = b.pick(
        ("x.permute(0, 2, 3, 1)", "x.permute(0, 3, 1, 2)"),
        ("x.permute((0, 2, 3, 1)).contiguous()", "x.permute((0, 3, 1, 2)).contiguous()"),
        ("x.movedim(1, -1)", "x.movedim(-1, 1)"),
        ("torch.permute(x, (0, 2, 3, 1))", "torch.permute(x, dims=(0, 3, 1, 2))"),
        ("x.transpose(1, 3)", "x.transpose(1, 3)"),
        ("x.transpose(1, 2).transpose(2, 3)", "x.transpose(-1, -2).transpose(1, 2)"),
    )
    b.line(f"x = {forth}", f"x = {call}")
    if b.chance(0.3):
        b.line("x = F.gelu(x)")
    b.line(f"x = {back}")


def linear_on_positions(b: Draft) -> None:
    """A linear layer over the positions of every channel, or over one axis."""
    _, _, h, w = b.x.shape
    if b.chance(0.5):
        layer = b.module("lin", f"nn.Linear({w}, {w})")
        b.line(f"x = {layer}(x)")
        return
    layer = b.module("lin", f"nn.Linear({h * w}, {h * w})")
    b.line("n, c, h, w = x.shape", f"x = {layer}(x.flatten(2)).view(n, c, h, w)")


def dropout(b: Draft) -> None:
    """Regularization, which does nothing in evaluation mode."""
    spelling = b.pick(
        *("nn.Dropout(0.3)", "nn.Dropout2d(0.2)", "nn.Dropout(inplace=True)", "nn.Identity()", "nn.AlphaDropout(0.1)"),
        *(
            "nn.FeatureAlphaDropout(0.1)",
            "F.dropout({x}, 0.2, self.training)",
            "F.dropout2d({x}, training=self.training)",
        ),
        "F.dropout({x}, p=0.1, training=False)",
    )
    b.line(f"x = {activate(b, 'x', spelling)}")
