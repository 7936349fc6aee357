"""Pieces of random networks: numbers and parameters that meet the map, and code that no graph can hold."""

from fuzz.networks import Draft


def scale_and_shift(b: Draft) -> None:
    """Numbers, parameters and buffers that meet the map."""
    c = b.channels
    parameter = b.pick(
        f"nn.Parameter(torch.rand({c}, 1, 1) + 0.5)",
        "nn.Parameter(torch.tensor(0.7))",
        f"nn.Parameter(torch.rand(1, {c}, 1, 1) + 0.5)",
    )
    kind = b.pick("number", "parameter", "buffer", "constant", "reshaped", "softplus", "sum of channels")
    if kind == "number":
        forms = (
            "x * 0.5",
            "x / 3",
            "2 * x",
            "x + 1",
            "1 - x",
            "x - 0.3",
            "-x",
            "x.mul(0.7)",
            "torch.mul(x, 1.5)",
            "x.div_(2.0)",
            "x.add_(0.1)",
            "torch.div(x, 2)",
            "x / x.shape[1] ** 0.5",
            "x * (x.size(2) / 8)",
            "x.sub(1.0)",
            "torch.rsub(x, 1.0)",
            "1.5 / (x.abs() + 1)",
        )
        b.line(f"x = {b.pick(*forms)}")
    elif kind in ("parameter", "softplus"):
        p = b.module("p", parameter)
        p = f"F.softplus({p})" if kind == "softplus" else p
        form = b.pick(
            "x * {p}",
            "{p} * x",
            "x + {p}",
            "x - {p}",
            "x / {p}",
            "{p} - x",
            "x.mul({p}).add({p})",
            "torch.addcmul(x, x, {p})",
        ).format(p=p)
        b.line(f"x = {form}")
    elif kind == "buffer":
        p = b.name("p")
        b.run(f'self.register_buffer("{p}", torch.rand({c}, 1, 1) + 0.5{b.pick("", ", persistent=False")})', b.init)
        b.line(f"x = {b.pick('x * self.{p}', '(x - self.{p}) / self.{p}', 'self.{p} + x').format(p=p)}")
    elif kind == "constant":
        form = b.pick(
            "torch.ones(1, 1, 1, 1)",
            "torch.full((1,), 0.5)",
            "torch.tensor(0.5)",
            f"torch.linspace(0.5, 1, {c}).view(-1, 1, 1)",
            f"torch.arange(1.0, {c} + 1.0).view(1, -1, 1, 1) / {c}",
        )
        b.line(f"x = x * {form}")
    elif kind == "reshaped":
        p = b.module("p", f"nn.Parameter(torch.rand({c}) + 0.5)")
        form = b.pick(
            ".view(1, -1, 1, 1)",
            "[:, None, None]",
            "[None, :, None, None]",
            ".reshape(-1, 1, 1)",
            ".unsqueeze(-1).unsqueeze(-1)",
        )
        b.line(f"x = x * {p}{form}")
    else:
        form = b.pick("x.sum(1, keepdim=True)", "x.mean((2, 3), keepdim=True)", "x.mean(1, True)", "x[:, :1]")
        b.line(f"x = x + {form}")


def coordinates(b: Draft) -> None:
    """One more channel of constants: a buffer, a parameter or a tensor of the code, for each image or broadcast."""
    h, w = b.x.shape[2:]
    p = b.name("p")
    if b.chance(0.6):
        kept = b.pick("self.register_buffer('{p}', {t})", "self.{p} = {t}", "self.{p} = nn.Parameter({t})")
        b.run(kept.format(p=p, t=f"torch.linspace(-1, 1, {h * w}).view(1, 1, {h}, {w})"), b.init)
        one = f"self.{p}"
    else:
        one = b.pick(
            f"torch.linspace(-1, 1, {h}).view(1, 1, -1, 1).repeat(1, 1, 1, {w})",
            "torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1).repeat(1, 1, 1, x.shape[3])",
            "torch.arange(x.size(3)).float().div(x.size(3)).expand(1, 1, x.size(2), -1)",
            f"torch.full((1, 1, {h}, {w}), 0.5)",
            "torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(3)), indexing='ij')[0][None, None] * 0.1",
        )
    n = b.pick("x.size(0)", "x.shape[0]", "len(x)")
    form = b.pick(
        f"{one}.expand({n}, -1, -1, -1)",
        f"{one}.expand({n}, 1, x.shape[2], x.shape[3])",
        f"{one}.repeat({n}, 1, 1, 1)",
        f"{one}.expand(64, -1, -1, -1)[:{n}]",
        f"torch.broadcast_to({one}, ({n}, 1, {h}, {w}))",
        f"{one}.expand_as(x[:, :1])",
        f"{one}.new_ones({n}, 1, {h}, {w}) * {one}",
        f"{one}[0].expand({n}, -1, -1, -1).to(x)",
    )
    if b.chance(0.3):
        b.line("if x.shape[2] > 3:\n    x = x.flip(3)")
    b.line(b.pick(f"x = torch.cat([x, {form}], 1)", f"x = x + {form}", f"x = torch.concat(({form}, x), dim=1)"))
    b.may_be_rejected("cannot be exported to ONNX")


def written_views(b: Draft) -> None:
    """A view is overwritten; the tensor is read by its other names."""
    forms = (
        ("x.transpose(2, 3).add_(0.1)",),
        ("y = x.flatten(2)", "x[:, :, 1:].mul_(0.5)", "x = x + y.view_as(x)"),
        ("y, z = x.chunk(2, 1)", "y.mul_(2.0)", "x = torch.cat([z, x], 1)"),
        ("x.permute(0, 2, 3, 1)[..., 0].neg_()",),
        ("y = x[:, :1]", "x.mT[:, :, 0] = 0.5", "x = x * 2 + y"),
        ("y = x.unsqueeze(1)", "x.narrow(2, 1, 2).copy_(x[:, :, :2] * 0.5)", "x = x + y.squeeze(1)"),
        ("F.relu(x[:, :1], inplace=True)",),
    )
    b.line(*b.pick(*forms))
    b.may_be_rejected("cannot be exported to ONNX")


def value_flow(b: Draft) -> None:
    """Control flow that depends on values, or a write to a part: no graph can hold the first."""
    b.line(
        b.pick(
            "if x.sum() > 1e9:\n    x = -x",
            "x = x if x.max() < 1e9 else -x",
            "x[:, 0] = x[:, 1]",
            "x[:, :1] *= 2",
            "x.data.mul_(0.5)",
            "x = x * float(x.abs().max() < 1e9)",
            "for _ in range(int(x.std() < 1e9)):\n    x = x.neg()",
            "with torch.no_grad():\n    x = x.neg()",
            "x = x.neg() if bool((x == x).all()) else x",
        )
    )
    b.may_be_rejected("must be traceable", "operations whose quantization is known", "part of", "in place", "assign")
