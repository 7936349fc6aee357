"""Pieces of random networks that pool, move, repeat or choose values, and that read sizes."""

from fuzz.networks import Draft, divisor


def max_pool(b: Draft) -> None:
    """The largest of a window."""
    form = b.pick(
        *(
            "nn.MaxPool2d(2)",
            "nn.MaxPool2d(3, 2, 1)",
            "nn.MaxPool2d(2, stride=1)",
            "nn.MaxPool2d(3, 2, ceil_mode=True)",
        ),
        *("nn.MaxPool2d((2, 1))", "nn.MaxPool2d(2, padding=1)", "nn.MaxPool2d(2, dilation=2)", "nn.MaxPool2d(3, 1, 1)"),
        *(
            "F.max_pool2d(x, 2)",
            "F.max_pool2d(x, kernel_size=3, stride=2, padding=1)",
            "F.max_pool2d(x, (1, 2), ceil_mode=True)",
        ),
        *("F.max_pool2d(input=x, kernel_size=2)", "torch.max_pool2d(x, 2)", "F.adaptive_max_pool2d(x, (3, 2))"),
        *(
            "nn.AdaptiveMaxPool2d(3)",
            "nn.AdaptiveMaxPool2d((5, None))",
            "F.adaptive_max_pool2d(x, 4)",
            "-F.max_pool2d(-x, 2)",
        ),
        *(
            "F.max_pool2d(x, 2, 2, 0, 1, False, False)",
            "nn.AdaptiveMaxPool2d((7, 5))",
            "nn.MaxPool2d(3, 2, 1, 1, False, True)",
        ),
        *(
            "F.max_pool2d(x, x.shape[2] // 3)",
            "nn.FractionalMaxPool2d(2, output_ratio=0.5)",
            "F.max_pool2d(x, 2, return_indices=True)[0]",
        ),
    )
    if "Fractional" in form or "indices" in form:
        b.may_be_rejected("operations whose quantization is known", "deterministic")
    if "adaptive_max" in form or "AdaptiveMax" in form:  # windows of different sizes
        b.may_be_rejected("adaptive_max_pool2d", "AdaptiveMaxPool2d")
    b.apply(form, "pool")


def avg_pool(b: Draft) -> None:
    """The mean of a window."""
    form = b.pick(
        *(
            "nn.AvgPool2d(2)",
            "nn.AvgPool2d(3, 2, 1)",
            "nn.AvgPool2d(3, 1, 1, count_include_pad=False)",
            "nn.AvgPool2d((2, 1))",
        ),
        *(
            "nn.AvgPool2d(3, 2, ceil_mode=True)",
            "nn.AvgPool2d(3, 2, 1, ceil_mode=True)",
            "nn.AvgPool2d(2, divisor_override=3)",
        ),
        *("nn.AvgPool2d(3, 2, 1, True, False)", "nn.AvgPool2d(3, 2, 1, divisor_override=8)", "F.avg_pool2d(x, 2)"),
        *(
            "F.avg_pool2d(x, 3, stride=2, padding=1)",
            "F.avg_pool2d(x, 3, 1, 1, False, False)",
            "F.avg_pool2d(input=x, kernel_size=2)",
        ),
        *("F.avg_pool2d(x, (2, 3), ceil_mode=True, count_include_pad=False)", "F.avg_pool2d(x, 2, divisor_override=2)"),
        *(
            "nn.AdaptiveAvgPool2d(4)",
            "nn.AdaptiveAvgPool2d((3, None))",
            "F.adaptive_avg_pool2d(x, (5, 3))",
            "nn.AdaptiveAvgPool2d(2)",
        ),
        *(
            "F.adaptive_avg_pool2d(x, output_size=3)",
            "nn.LPPool2d(2, 2)",
            "F.lp_pool2d(x, 2.0, 2)",
            "F.avg_pool2d(x, x.size(2) // 2)",
        ),
        *("F.avg_pool2d(x, 3, 2, 1, True, True)", "nn.AvgPool2d(2, ceil_mode=True)", "F.avg_pool2d(x, 1, 2)"),
    )
    if "LP" in form or "lp_" in form:
        b.may_be_rejected("operations whose quantization is known")
    b.apply(form, "pool")


def upsample(b: Draft) -> None:
    """A larger map."""
    form = b.pick(
        *("nn.Upsample(scale_factor=2)", "nn.Upsample(size=(9, 11))", 'nn.Upsample(scale_factor=2, mode="bilinear")'),
        *(
            "F.interpolate(x, scale_factor=2)",
            "F.interpolate(x, size=x.shape[2:])",
            "nn.UpsamplingNearest2d(scale_factor=2)",
        ),
        *(
            'F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)',
            "nn.UpsamplingBilinear2d(scale_factor=2)",
        ),
        *(
            'F.interpolate(x, size=(5, 7), mode="nearest")',
            'F.interpolate(x, (10, 10), mode="bilinear", align_corners=True)',
        ),
        *('F.interpolate(x, scale_factor=1.5, mode="nearest")', 'F.interpolate(x, scale_factor=0.5, mode="bicubic")'),
        *('F.interpolate(x, size=6, mode="area")', 'F.interpolate(x, size=(9, 9), mode="nearest-exact")'),
        *(
            'F.interpolate(x, scale_factor=(2, 1), mode="bilinear")',
            'F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)',
        ),
        *("x.repeat_interleave(2, 2)", "torch.repeat_interleave(x, 2, dim=3)"),
    )
    b.may_be_rejected("cannot be exported to ONNX")
    b.apply(form, "up")


def move(b: Draft) -> None:
    """Values in other places, repeated or chosen; nothing is computed."""
    c = b.channels
    g, half = divisor(b.rng, c, 8), max(c // 2, 1)
    parts, whole = f"x.size(0), {g}, {c // g}, x.size(2), x.size(3)", f"x.size(0), {c}, x.size(2), x.size(3)"
    shuffled = f"x.view({parts}).transpose(1, 2).reshape({whole})"
    form = b.pick(
        *(
            "x.permute(0, 1, 3, 2)",
            "x.transpose(2, 3)",
            "torch.transpose(x, -1, -2)",
            "x.mT",
            "x.swapaxes(2, 3)",
            "torch.permute(x, [0, 1, 3, 2])",
        ),
        *(
            "x.flip(1)",
            "x.flip([2, 3])",
            "torch.flip(x, (3,))",
            "x.roll(1, 1)",
            "torch.roll(x, (1, 2), (2, 3))",
            "x.roll(shifts=-1, dims=3)",
        ),
        *(
            shuffled,
            f"nn.ChannelShuffle({g})",
            f"F.channel_shuffle(x, {g})",
            "nn.PixelUnshuffle(2)",
            "F.pixel_unshuffle(x, 2)",
        ),
        *(
            "nn.PixelShuffle(2)",
            "F.pixel_shuffle(x, 2)",
            "F.pixel_shuffle(input=x, upscale_factor=2)",
            "x.contiguous()",
            "x.clone()",
            "x.detach()",
        ),
        *(
            "nn.ZeroPad2d(1)",
            "nn.ReflectionPad2d(1)",
            "nn.ReplicationPad2d((1, 0, 1, 0))",
            "nn.ConstantPad2d(1, 0.5)",
            "nn.CircularPad2d(1)",
        ),
        *(
            "F.pad(x, (1, 1, 0, 1))",
            "F.pad(x, (0, 1), value=0.3)",
            'F.pad(x, [1, 1, 1, 1], mode="reflect")',
            'F.pad(x, (1, 0, 0, 1), "replicate")',
        ),
        *(
            "F.pad(x, (0, -1, 0, -1))",
            "F.pad(x, (0, 0, 0, 0, 1, 1))",
            "F.pad(input=x, pad=(1, 1))",
            'F.pad(x, (1, 1, 1, 1), mode="circular")',
        ),
        *(
            "x[:, :, 1:]",
            "x[..., :-1]",
            "x[:, :, ::2, ::2]",
            f"x[:, {half}:]",
            "x[:, :, 1:-1, 1:-1]",
            f"x[:, torch.arange({c} - 1, -1, -1)]",
        ),
        *(
            f"x[:, [{', '.join(str(c - 1 - i) for i in range(c))}]]",
            "x.narrow(2, 0, 3)",
            f"torch.narrow(x, 1, 0, {half})",
            "x[:, :-1]",
        ),
        *(
            f"x.index_select(1, torch.tensor([{', '.join(str(i) for i in range(c - 1, -1, -1))}]))",
            "x.repeat(1, 2, 1, 1)",
            "x.tile(1, 1, 1, 2)",
        ),
        *(
            "torch.tile(x, (1, 2, 1, 1))",
            "x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2)",
            "x.to(torch.float32)",
            "x.float()",
            "x.cpu()",
        ),
        *(
            "x.type(torch.float32)",
            "x.type_as(x)",
            "x.to(x.dtype)",
            "x.to(x)",
            'x.to("cpu")',
            "x.contiguous(memory_format=torch.channels_last)",
        ),
        *(
            "torch.rot90(x, 1, (2, 3))",
            "x.unfold(2, 2, 2)[..., 0]",
            "x.fliplr()",
            "x.diagonal(dim1=2, dim2=3).unsqueeze(2).repeat(1, 1, 4, 1)",
        ),
        *(
            "x.unsqueeze(2).squeeze(2)",
            "x.unflatten(1, (-1, 1)).flatten(1, 2)",
            "nn.Unflatten(2, (-1, 1)).forward(x).flatten(2, 3)",
        ),
        *(
            "torch.reshape(x, (-1, *x.shape[1:]))",
            "x.flatten(2).unflatten(2, x.shape[2:])",
            "x.view(x.shape)",
            "x.view_as(x)",
            "x.reshape_as(x)",
        ),
        *(
            "torch.cat([x, x.flip(1)], 1)",
            "torch.movedim(x, 2, 3)",
            "x.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape)",
            "x.bool().float() + x",
        ),
        *(
            "F.unfold(x, 2, stride=2).view(x.size(0), -1, x.size(2) // 2, x.size(3) // 2)",
            "x.masked_select(x == x).view(x.shape)",
        ),
        *(
            "torch.take_along_dim(x, torch.zeros_like(x, dtype=torch.long), 1) + x",
            "x.gather(1, x.argmax(1, keepdim=True)) + x",
            "x.double().float()",
            "x.half().float()",
        ),
        *(
            "torch.zeros_like(x) + x",
            "torch.ones_like(x) * x",
            "x.new_zeros(x.shape) + x",
            "x + torch.zeros(x.shape[1], 1, 1)",
            "x.new_full((1,), 2.0) * x",
            "torch.empty_like(x).fill_(0.5) * x",
        ),
    )
    b.may_be_rejected("operations whose quantization is known", "cannot be exported to ONNX")
    b.apply(form, "move")


def sizes(b: Draft) -> None:
    """Code that reads sizes, branches on them, or asserts them."""
    _, c, h, _ = b.x.shape
    forms = (
        ("n, c, h, w = x.shape", "x = x.view(n, c, h * w).view(n, c, h, w)"),
        ("n, c = x.size()[:2]", "x = x.reshape(n, c, *x.shape[2:])"),
        ("if x.shape[2] > 4:\n    x = F.max_pool2d(x, 2)",),
        ("if x.size(3) % 2:\n    x = F.pad(x, (0, 1))",),
        ("x = x[:, :, : x.size(2) - 1]",),
        ("x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))", "x = F.avg_pool2d(x, 2)"),
        (f"assert x.shape[1] == {c}",),
        (f'torch._assert(x.shape[2] == {h}, "height")',),
        ("b = len(x)", "x = x.view(b, x.shape[1], -1).view(b, -1, x.shape[2], x.shape[3])"),
        ("x = x + torch.zeros(x.size(0), 1, x.size(2), x.size(3))",),
        ("x = torch.cat([x, torch.zeros(len(x), 1, *x.shape[2:])], 1)",),
        ("x = torch.cat([x, x.new_ones(x.shape[0], 1, x.shape[2], x.shape[3])], 1)",),
        ("x = x.view(-1, x.shape[1] * x.shape[2], x.shape[3]).view(-1, *x.shape[1:])",),
        ("s = x.shape[-2:]", "x = F.interpolate(F.avg_pool2d(x, 2), size=s)"),
        ("x = F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))",),
        ("x = x.view(x.size(0), -1, x.size(2), x.size(3))",),
        ("x = x.reshape(len(x), -1).reshape(x.size())",),
        ("x = x * (1.0 / x.numel() * x.shape[0] * 100)",),
        ("if x.dim() == 4:\n    x = x.flip(3)",),
        ("x = x if x.ndim == 4 else x.unsqueeze(0)",),
        ("if self.training:\n    x = x + torch.randn_like(x)",),
        ("n = x.shape[0]", "x = x.view(n, -1).view(n, *x.shape[1:])"),
        ("for i in range(x.shape[1] // 4):\n    x = x.roll(i, 1)",),
        ("k = min(x.shape[2], x.shape[3], 2)", "x = F.max_pool2d(x, k)"),
        ("x = x / x.shape[1]",),
        ("x = x.expand(x.size(0), -1, -1, -1)",),
        ("h = int(x.shape[2] / 2)", "x = torch.cat([x[:, :, h:], x[:, :, :h]], 2)"),
        ("x = torch.arange(x.shape[3]).to(x) * 0.1 + x",),
        (
            "y = torch.linspace(-1, 1, x.shape[2])[:, None].expand(x.size(0), 1, -1, x.shape[3])",
            "x = torch.cat([x, y], 1)",
        ),
        ("i = torch.arange(x.size(0))", "x = x[i]"),
    )
    b.line(*b.pick(*forms))
