"""A tiny model in a user's file, beside factories that are refused, and its weights as after training."""

from collections.abc import Callable

import torch
from torch import nn

SIZE = (3, 12, 12)
HALF = (0.5, 0.5, 0.5)
MODEL_FILE = '''
import torch
from torch import nn


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )


def no_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def not_a_module():
    return 3


def wants_argument(width):
    return width


class Ignored(nn.Module):
    """Relies on an in-place module whose result it throws away, `times` times."""

    def __init__(self, times=1):
        super().__init__()
        self.body = tiny()
        self.act = nn.ReLU(inplace=True)
        self.times = times

    def forward(self, x):
        x = self.body[0](x)
        if self.times == 2:
            self.act(x)
        x = self.body[1](x)
        self.act(x)
        return self.body[5](x.mean((2, 3)))


def reused():
    return Ignored(2)


class Drops(nn.Module):
    """Dropout that no mode switches off."""

    def __init__(self):
        super().__init__()
        self.body = tiny()

    def forward(self, x):
        return self.body(torch.nn.functional.dropout(x))


class InPlaceInput(Drops):
    def forward(self, x):
        return self.body(x.sub_(0.5))


def weight_normed():
    model = tiny()
    torch.nn.utils.parametrizations.weight_norm(model[5])
    return model


def divides():
    return 1 / 0
'''


def trained_state() -> dict[str, torch.Tensor]:
    """The tiny model's state dict with statistics that have moved."""
    namespace: dict[str, Callable[[], nn.Module]] = {}
    exec(MODEL_FILE, namespace)
    state = namespace["tiny"]().state_dict()
    state["1.running_mean"] = torch.linspace(-0.5, 0.5, 4)
    state["1.running_var"] = torch.linspace(0.5, 2, 4)
    return state
