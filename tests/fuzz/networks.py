"""Random small classifiers as source code: each is one integer seed, and a file that anyone can run.

`draft` adds piece after piece to a forward pass (`networks_pieces.py` is the grammar), a head (`networks_heads.py`) at
the end. Every line is run on two images as it is written, so that shapes need no rules of their own: a piece that
fails, overflows or grows too large is taken back. A piece has a random generator of its own, so that leaving out some
of them (`skip`, to make a failing network short) leaves the others as they are.
"""

import math
import random
import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_VALUES = 8192
"""Largest number of values of one image's feature map."""
MAX_MAGNITUDE = 1e4
"""Largest value of a feature map: beyond it sums of floats say little."""
HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
"""
MAKE = """\


def make():
    torch.manual_seed({seed})
    net = Net()
    for part in net.modules():  # values as after training
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 1.5)
        if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return net.eval()
"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier as source code.

    Attributes:
        seed: Its seed.
        size: (C, H, W) of an image.
        source: A Python file with a function `make`, which returns the classifier in evaluation mode.
        pieces: Names of its pieces in order; the last is the head.
        rejectable: Words of which one must be in the reason if the network is rejected, empty if it must be accepted.
    """

    seed: int
    size: tuple[int, int, int]
    source: str
    pieces: tuple[str, ...]
    rejectable: tuple[str, ...]

    def build(self) -> nn.Module:
        """Return the classifier."""
        scope: dict[str, Any] = {"__name__": "fuzzed"}
        exec(compile(self.source, f"<network {self.seed}>", "exec"), scope)
        made: nn.Module = scope["make"]()
        return made


class Draft:
    """A forward pass in the making; pieces call `module`, `line` and `block`.

    Attributes:
        rng: Random generator of the current piece.
        size: (C, H, W) of an image.
        rejectable: See `Network`.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        side = rng.choice((7, 8, 9, 11, 12, 13, 16))
        self.size = (rng.choice((3, 3, 3, 1, 4)), side, side if rng.random() < 0.6 else rng.choice((6, 10, 15)))
        self.root = nn.Module()
        sample = torch.randn(2, *self.size, generator=torch.Generator().manual_seed(1))
        self.scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.root, "x": sample}
        self.init: list[str] = []
        self.body: list[str] = []
        self.blocks: list[str] = []
        self.arguments: list[str] = []
        self.rejectable: list[str] = []
        self.count = 0

    @property
    def x(self) -> Tensor:
        """Return the current value, of two images."""
        value = self.scope["x"]
        assert isinstance(value, Tensor)
        return value

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    def pick(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.rng.random() < probability

    def name(self, stem: str) -> str:
        """Return a new name."""
        self.count += 1
        return f"{stem}{self.count}"

    def module(self, stem: str, expression: str) -> str:
        """Add an attribute to the network, and return how forward spells it."""
        name = self.name(stem)
        self.run(f"self.{name} = {expression}", self.init)
        part = getattr(self.root, name)
        if isinstance(part, nn.Module):
            part.eval()
        return f"self.{name}"

    def line(self, *lines: str) -> None:
        """Add statements to forward; an indented continuation is part of the same string."""
        for line in lines:
            self.run(line, self.body)

    def apply(self, form: str, stem: str) -> None:
        """Replace ``x`` by a layer or an expression of it."""
        if form.startswith("nn.") and ".forward" not in form:
            layer = self.module(stem, form)
            form = self.pick(f"{layer}(x)", f"{layer}(x)", f"{layer}(input=x)")
        self.line(f"x = {form}")

    def block(self, source: str) -> None:
        """Add a class to the file."""
        self.run(textwrap.dedent(source).strip(), self.blocks)

    def argument(self, text: str) -> None:
        """Add a further argument with a default to forward."""
        name, default = (part.strip() for part in text.split("="))
        self.scope[name.split(":")[0]] = eval(default, self.scope)
        self.arguments.append(text)

    def may_be_rejected(self, *words: str) -> None:
        """Accept a rejection whose reason has one of the words."""
        self.rejectable.extend(words)

    def run(self, line: str, into: list[str]) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's remarks on slow settings
            exec(line, self.scope)
        into.append(line)

    def attempt(self, piece: Callable[["Draft"], None], is_valid: Callable[[Tensor], bool]) -> bool:
        """Add a piece, or nothing at all if it cannot be added."""
        lists = (self.init, self.body, self.blocks, self.arguments, self.rejectable)
        before, scope, count = [list(part) for part in lists], dict(self.scope), self.count
        scope["x"] = self.x.clone()
        try:
            piece(self)
            if isinstance(self.scope["x"], Tensor) and is_valid(self.x):
                return True
        except Exception:  # whatever a module or function says of a shape that it does not take
            pass
        for line in self.init[len(before[0]) :]:
            name = line.removeprefix("self.").split(" =")[0]
            if "." not in name:  # a weight tied to another layer's goes with its layer
                delattr(self.root, name)
        for part, kept in zip(lists, before, strict=True):
            part[:] = kept
        self.scope, self.count = scope, count
        return False

    def source(self, seed: int) -> str:
        """Return the file."""
        arguments = ", ".join(["self", "x", *self.arguments])
        init = textwrap.indent("\n".join(["super().__init__()", *self.init]), " " * 8)
        body = textwrap.indent("\n".join([*self.body, "return x"]), " " * 8)
        net = f"\n\nclass Net(nn.Module):\n    def __init__(self):\n{init}\n\n    def forward({arguments}):\n{body}\n"
        return HEADER + "".join(f"\n\n{block}\n" for block in self.blocks) + net + MAKE.format(seed=seed)


def is_map(x: Tensor) -> bool:
    """Return whether a value is a usable feature map (2, C, H, W)."""
    return x.ndim == 4 and x.shape[2] * x.shape[3] >= 4 and x[0].numel() <= MAX_VALUES and is_usable(x)


def is_usable(x: Tensor) -> bool:
    """Return whether values are those of two different images, finite and not all the same."""
    if x.dtype != torch.float32 or x.shape[0] != 2 or not bool(torch.isfinite(x).all()):
        return False
    return float(x.abs().max()) < MAX_MAGNITUDE and not torch.equal(x[0], x[1]) and float(x.std()) > 1e-3


def draft(seed: int, skip: Collection[int] = ()) -> Network:
    """Return the network of a seed.

    Args:
        seed: Any integer.
        skip: Numbers of the pieces to leave out.
    """
    from fuzz.networks_heads import HEADS
    from fuzz.networks_pieces import FIRST, PIECES, arguments

    rng = random.Random(f"network {seed}")
    state, made = Draft(rng), []
    count = rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 8))
    groups: list[Sequence[tuple[float, Callable[[Draft], None]]]] = [FIRST, *[PIECES] * count]
    for number, group in enumerate(groups):
        if number in skip:
            continue
        for attempt in range(4):
            state.rng = random.Random(f"piece {seed} {number} {attempt}")
            piece = weighted(state.rng, group)
            if state.attempt(piece, is_map):
                made.append(piece.__name__)
                break
    state.rng = random.Random(f"arguments {seed}")
    if state.rng.random() < 0.2 and -1 not in skip:
        state.attempt(arguments, is_map)
    for attempt in range(50):
        state.rng = random.Random(f"head {seed} {attempt}")
        piece = weighted(state.rng, HEADS)
        if state.attempt(piece, lambda x: x.ndim == 2 and 2 <= x.shape[1] <= 64 and is_usable(x)):
            made.append(piece.__name__)
            break
    else:
        raise AssertionError(f"seed {seed} has no head:\n{state.source(seed)}")
    return Network(
        seed=seed,
        size=state.size,
        source=state.source(seed),
        pieces=tuple(made),
        rejectable=tuple(dict.fromkeys(state.rejectable)),
    )


def weighted(rng: random.Random, choices: Sequence[tuple[float, Callable[[Draft], None]]]) -> Callable[[Draft], None]:
    """Return one of the pieces, by weight."""
    return rng.choices([piece for _, piece in choices], [weight for weight, _ in choices])[0]


def divisor(rng: random.Random, number: int, largest: int = 64) -> int:
    """Return a random divisor of a number."""
    return rng.choice([d for d in range(1, min(number, largest) + 1) if number % d == 0])


def common_divisor(rng: random.Random, *numbers: int) -> int:
    """Return a random common divisor of numbers."""
    return divisor(rng, math.gcd(*numbers))
