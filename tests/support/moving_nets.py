"""Small classifiers around one operation that moves, repeats or chooses values, or is the identity in evaluation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8


class Around(nn.Module):
    """A convolution with batch norm and ReLU, an operation on its (N, 8, 16, 16) map, and a convolution that reads it.

    Args:
        operation: Called with the network, for its parameters, and the map.
        channels: Channels of its result.
    """

    def __init__(self, operation: "Operation", channels: int = CHANNELS) -> None:
        super().__init__()
        self.operation = operation
        self.conv1, self.bn1 = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.gate = nn.Sequential(nn.Linear(CHANNELS, 4), nn.ReLU(), nn.Linear(4, CHANNELS), nn.Sigmoid())
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.drop1, self.drop3, self.alpha = nn.Dropout1d(0.5), nn.Dropout3d(0.5), nn.FeatureAlphaDropout(0.5)
        self.nearest, self.replicated = nn.UpsamplingNearest2d(scale_factor=2), nn.ReplicationPad2d(1)
        self.softmax = nn.Linear(CHANNELS, CHANNELS)  # a layer of this name is no softmax
        self.scale = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        self.fc = nn.Linear(CHANNELS, 5)
        self.register_buffer("index", torch.tensor([3, 1, 0, 2, 7, 7, 4, 5]))
        self.register_buffer("mask", torch.arange(CHANNELS).view(-1, 1, 1) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(self.operation(self, x))))
        return self.fc(x.mean((2, 3)))


def unpooled(found: tuple[Tensor, Tensor]) -> Tensor:
    return F.max_unpool2d(found[0], found[1], 2)


Operation = Callable[[Around, Tensor], Tensor]

MOVES: dict[str, tuple[Operation, int]] = {
    "squeeze-and-excitation by expand_as": (
        lambda net, x: x * net.gate(x.mean((2, 3)))[:, :, None, None].expand_as(x),
        8,
    ),
    "attention over positions, by max over channels": (
        lambda net, x: x * net.spatial(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)).sigmoid(),
        8,
    ),
    "attention over positions, by amax": (
        lambda net, x: x * net.spatial(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
        8,
    ),
    "repeat": (lambda net, x: x.repeat(1, 2, 1, 1), 16),
    "tile": (lambda net, x: torch.tile(x, (1, 2, 1, 1)), 16),
    "repeat_interleave": (lambda net, x: x.repeat_interleave(2, 1), 16),
    "shortcut with zeros_like": (lambda net, x: torch.cat([x, torch.zeros_like(x)], 1), 16),
    "shortcut with new_zeros": (lambda net, x: torch.cat([x, x.new_zeros(x.shape)], 1), 16),
    "shortcut with padded channels": (lambda net, x: F.pad(x, (0, 0, 0, 0, 4, 4)), 16),
    "shortcut with x * 0": (lambda net, x: torch.cat([x, x * 0], 1), 16),
    "index_select": (lambda net, x: x.index_select(1, net.index), 8),
    "index": (lambda net, x: x[:, net.index], 8),
    "gather": (lambda net, x: x.gather(1, net.index.view(1, -1, 1, 1).expand_as(x)), 8),
    "take_along_dim": (lambda net, x: torch.take_along_dim(x, net.index.view(1, -1, 1, 1), 1), 8),
    "topk": (lambda net, x: x.topk(4, 1)[0], 4),
    "sort": (lambda net, x: torch.sort(x, 1, descending=True).values, 8),
    "kthvalue": (lambda net, x: x.kthvalue(2, 1, keepdim=True)[0], 1),
    "median": (lambda net, x: x.median(1, keepdim=True).values, 1),
    "cummax": (lambda net, x: torch.cummax(x, 1)[0], 8),
    "aminmax": (lambda net, x: torch.cat(torch.aminmax(x, dim=1, keepdim=True), 1), 2),
    "maxout of a split": (lambda net, x: torch.maximum(x.chunk(2, 1)[0], x.chunk(2, 1)[1]), 4),
    "fmin": (lambda net, x: torch.fmin(x, x.flip(1)), 8),
    "where": (lambda net, x: torch.where(net.mask, x, x.flip(2)), 8),
    "where of its own values": (lambda net, x: torch.where(x > 1, x, x.roll(1, 1)), 8),
    "masked_fill": (lambda net, x: x.masked_fill(net.mask, 0.0), 8),
    "masked_fill by its own values": (lambda net, x: x.masked_fill(x > 1, 0.0), 8),
    "swapaxes": (lambda net, x: x.swapaxes(2, 3), 8),
    "moveaxis": (lambda net, x: torch.moveaxis(x, 3, 2), 8),
    "rot90": (lambda net, x: torch.rot90(x, 1, (2, 3)), 8),
    "select and unsqueeze": (lambda net, x: x.select(1, 3).unsqueeze(1), 1),
    "narrow": (lambda net, x: x.narrow(1, 2, 4), 4),
    "diagonal": (lambda net, x: x.diagonal(0, 2, 3).unsqueeze(3), 8),
    "unfold": (lambda net, x: x.unfold(1, 4, 2)[..., 0], 3),
    "nn.Unfold": (lambda net, x: F.unfold(x, 1).unflatten(2, (16, 16)), 8),
    "pixel_unshuffle": (lambda net, x: F.pixel_unshuffle(x, 2), 32),
    "ravel": (lambda net, x: x.ravel().view(x.shape), 8),
    "broadcast_to": (lambda net, x: torch.broadcast_to(x[:, :1], x.shape), 8),
    "vstack and hstack": (lambda net, x: torch.hstack(x.chunk(4, 1)[2:] + x.chunk(4, 1)[:2]), 8),
    "stack": (lambda net, x: torch.stack([x, x.flip(1)], 1).flatten(1, 2), 16),
    "tril": (lambda net, x: torch.tril(x), 8),
    "interpolate nearest": (lambda net, x: F.interpolate(x, scale_factor=2), 8),
    "UpsamplingNearest2d": (lambda net, x: net.nearest(x), 8),
    "pad circular": (lambda net, x: F.pad(x, (1, 1, 1, 1), mode="circular"), 8),
    "ReplicationPad2d": (lambda net, x: net.replicated(x), 8),
    "type": (lambda net, x: x.type(torch.float32), 8),
    "cpu": (lambda net, x: x.cpu(), 8),
    "nan_to_num": (lambda net, x: torch.nan_to_num(x), 8),
    "positive": (lambda net, x: +x, 8),
    "max_pool1d": (lambda net, x: F.max_pool1d(x.flatten(2), 2).unflatten(2, (8, 16)), 8),
    "max_unpool2d": (lambda net, x: unpooled(F.max_pool2d(x, 2, return_indices=True)), 8),
}
"""Operations whose results are values of the map (or zeros), so that they lie on its quantization grid."""

IDENTITIES: dict[str, Operation] = {
    "Dropout1d": lambda net, x: net.drop1(x.flatten(2)).unflatten(2, (16, 16)),
    "Dropout3d": lambda net, x: net.drop3(x),
    "FeatureAlphaDropout": lambda net, x: net.alpha(x),
    "alpha_dropout": lambda net, x: F.alpha_dropout(x, 0.5, net.training),
    "feature_alpha_dropout": lambda net, x: F.feature_alpha_dropout(x, 0.5, net.training),
    "dropout": lambda net, x: torch.dropout(x, 0.5, False),
    "to": lambda net, x: x.to("cpu").float().contiguous(),
    "clone": lambda net, x: x.clone(),
    "type_as": lambda net, x: x.type_as(net.scale),
    "view_as": lambda net, x: x.flatten(1).view_as(x),
    "expand of the same size": lambda net, x: x.expand(-1, -1, -1, -1),
    "slice of all": lambda net, x: x[:, :, :16],
}
"""Operations that return the map itself."""

NONLINEAR: dict[str, tuple[Operation, list[str]]] = {
    "reciprocal": (lambda net, x: (x + 1).reciprocal(), ["relu", "reciprocal", "relu_1"]),
    "rtruediv": (lambda net, x: 1 / (x + 1), ["relu", "truediv", "relu_1"]),
    "rsub of a scale": (lambda net, x: 2 - 3 * x, ["relu", "relu_1"]),
    "in place": (lambda net, x: (x * 1).add_(1).mul_(2).sub_(0.5).div_(3), ["relu", "relu_1"]),
    "sigmoid in place": (lambda net, x: (x * 1).sigmoid_(), ["relu", "sigmoid_", "relu_1"]),
    "erf": (lambda net, x: torch.special.erf(x), ["relu", "special_erf", "relu_1"]),
    "hardshrink": (lambda net, x: F.hardshrink(x, 0.2), ["relu", "hardshrink", "relu_1"]),
    "logsigmoid": (lambda net, x: F.logsigmoid(x), ["relu", "log_sigmoid", "relu_1"]),
    "threshold": (lambda net, x: F.threshold(x, 0.2, 0.1), ["relu", "_threshold", "relu_1"]),
    "normalize": (lambda net, x: F.normalize(x, dim=1), ["relu", "normalize", "relu_1"]),
    "standard deviation": (lambda net, x: x / (1 + x.std((2, 3), keepdim=True)), ["relu", "std", "truediv", "relu_1"]),
    "part of a tuple": (lambda net, x: x - torch.var_mean(x, (2, 3), keepdim=True)[0], ["relu", "getitem", "relu_1"]),
    "product with a mask": (lambda net, x: x * (x > 0.5), ["relu", "mul", "relu_1"]),
    "maximum of a constant": (lambda net, x: torch.maximum(x, net.scale.view(-1, 1, 1)), ["relu", "maximum", "relu_1"]),
    "maximum of layers": (lambda net, x: torch.maximum(net.conv1(x[:, :3]), x), ["relu", "maximum", "relu_1"]),
    "leaky relu by where": (lambda net, x: torch.where(x > 0.5, x, 0.1 * x), ["relu", "where", "relu_1"]),
    "softmin": (lambda net, x: F.softmin(x, 1), ["relu", "softmin", "relu_1"]),
    "glu": (lambda net, x: F.glu(torch.cat([x, x], 1), 1), ["relu", "glu", "relu_1"]),
    "a layer named softmax": (
        lambda net, x: net.softmax(x.transpose(1, 3)).transpose(1, 3),
        ["relu", "relu_1"],
    ),
}
"""Operations that compute new values, and the quantization points of the network under `relu`."""
