"""Whether the reason that the product gives for a rejection is one line, and true of the network."""

import re
from collections.abc import Callable

import torch
from torch import nn

from fuzz.networks import Network


class DifferenceError(AssertionError):
    """Two ways to one result disagree, or a rejection is not true."""


_NODE = re.compile(r"node '[^']*' is (\w+)")
_ONE_LINE = 600
"""Largest length of a reason."""
OPERATORS = {
    "matmul": (" @ ",),
    "gt": (" > ",),
    "lt": (" < ",),
    "eq": (" == ",),
    "mod": (" % ",),
    "log_sigmoid": ("logsigmoid", "LogSigmoid"),
}
"""Operators by the name that torch.fx gives them."""


def _is_in(operation: str, source: str) -> bool:
    """Return whether a source has an operation under its name, its operator or a spelling that PyTorch translates."""
    name = operation.strip("_").lower()
    plain = source.lower()
    return name in plain or name in plain.replace("_", "") or any(sign in source for sign in OPERATORS.get(name, ()))


@torch.no_grad()
def _keeps_one_image(network: Network, module: nn.Module) -> bool:
    return module(torch.zeros(1, *network.size)).ndim == 2


@torch.no_grad()
def _are_probabilities(network: Network, module: nn.Module) -> bool:
    found = module(torch.randn(64, *network.size))
    return bool((found >= 0).all()) and bool((found <= 1).all())


TRUTHS: tuple[tuple[str, Callable[[Network, nn.Module], bool]], ...] = (
    ("control flow", lambda network, _: "value_flow" in network.pieces),
    ("softmax", lambda network, _: "softmax" in network.source.lower()),
    ("sigmoid", lambda network, _: "sigmoid" in network.source.lower()),
    ("returned probabilities", _are_probabilities),
    ("classify each image by itself", lambda network, _: False),
    ("return the same logits", lambda network, _: False),
    ("must accept images", lambda network, _: False),
    ("deterministic", lambda network, _: "Fractional" in network.source),
    ("for one image", lambda network, module: not _keeps_one_image(network, module)),
    ("any batch size", lambda network, _: False),
)
"""Words of a reason, and whether it is true of a network."""


def checked_rejection(network: Network, module: nn.Module, error: ValueError) -> str:
    """Return the reason of a rejection that is true, else raise DifferenceError."""
    reason = str(error)
    if "\n" in reason.strip() or len(reason) > _ONE_LINE or "\x1b" in reason:
        raise DifferenceError(f"the reason of a rejection is not one clear line: {reason[:1000]!r}") from error
    named = _NODE.search(reason)
    if named and not _is_in(named[1], network.source):
        raise DifferenceError(f"the reason names {named[1]}, which is not in the network: {reason}") from error
    for words, is_true in TRUTHS:
        if words in reason and not is_true(network, module):
            raise DifferenceError(f"the reason is not true: {reason}") from error
    if not any(words in reason for words in network.rejectable):
        raise DifferenceError(f"it must be accepted, but: {reason}") from error
    return reason
