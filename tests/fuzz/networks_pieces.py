"""The grammar of random networks: which pieces there are, and how often."""

from collections.abc import Callable

from fuzz import networks_joins as joins
from fuzz import networks_layers as layers
from fuzz import networks_moves as moves
from fuzz import networks_scales as scales
from fuzz.networks import Draft

Choices = tuple[tuple[float, Callable[[Draft], None]], ...]


def stem(b: Draft) -> None:
    """Something harmless between the image and the first layer, then a convolution with a batch norm."""
    before = b.pick(
        *[""] * 8,
        "x = x.contiguous()",
        "x = (x - 0.1) / 0.9",
        "x = x.float()",
        "x = F.pad(x, (0, 1, 0, 1))",
        "x = x * 2 - 1",
        "x = x[:, [c for c in range(x.shape[1])][::-1]]",
        "x = x.flip(1)",
        "x = x.clone()",
        "x = F.avg_pool2d(x, 2, ceil_mode=True)",
        "x = torch.cat([x, x * 0.5], 1)",
        "x = x.repeat(1, 3, 1, 1)",
        "x = x.expand(-1, x.shape[1], -1, -1)",
        "x.sub_(0.1)",
        "x = F.relu(x)",
        "x -= 0.5",
    )
    if before:
        b.line(before)
    layers.conv_norm_act(b)


def deep_start(b: Draft) -> None:
    """A plain convolution, its norm somewhere later."""
    layers.conv(b)
    layers.norm(b)


FIRST: Choices = ((5, stem), (1, deep_start))
PIECES: Choices = (
    (3, layers.conv),
    (3, layers.conv_norm_act),
    (2, layers.norm),
    (4, layers.activation),
    (0.4, layers.rare_activation),
    (0.3, layers.other_norm),
    (1, layers.linear_on_map),
    (0.5, layers.linear_on_positions),
    (0.5, layers.dropout),
    (3, joins.residual),
    (1, joins.projected_residual),
    (1.5, joins.concatenation),
    (1.5, joins.squeeze_excitation),
    (0.7, joins.spatial_gate),
    (0.8, joins.gated_branch),
    (1.5, joins.split_and_join),
    (1.5, joins.shared_layer),
    (1, joins.nested),
    (0.5, joins.split_attention),
    (2, scales.scale_and_shift),
    (0.7, scales.coordinates),
    (0.5, scales.written_views),
    (1.2, moves.max_pool),
    (1.2, moves.avg_pool),
    (0.7, moves.upsample),
    (2.5, moves.move),
    (1.5, moves.sizes),
    (0.15, scales.value_flow),
)


def arguments(b: Draft) -> None:
    """Further arguments of forward, with defaults."""
    kind = b.pick("flag", "none", "number", "several", "annotated", "unused")
    if kind == "flag":
        b.argument("return_features=False")
        b.body.append("if return_features:\n    return x")
    elif kind == "none":
        b.argument("mask=None")
        b.line(b.pick("if mask is not None:\n    x = x * mask", "x = x if mask is None else x + mask"))
    elif kind == "number":
        b.argument("temperature=2.0")
        b.line(b.pick("x = x / temperature", "x = x * temperature", "x = x - temperature"))
    elif kind == "several":
        b.argument("first=True")
        b.argument('mode="mean"')
        b.line('x = x.neg() if first and mode == "mean" else x')
    elif kind == "annotated":
        b.argument("scale: float = 1.0")
        b.line("if scale != 1.0:\n    x = x * scale")
    else:
        b.argument("targets=None")
