"""Recognition of classifiers that return probabilities: the losses take logits, and would compare them wrongly."""

from typing import Any

import torch
from torch import Tensor, fx

from synq.network.op_traits import OpKind, traits_of

SIZES = (1.0, 1e3, 1e6)
"""Standard deviations of the outputs of the layers on which a suspicion is confirmed."""
DRAWS = 4
"""Number of times that each is drawn: a gate of large random numbers may be closed for all images."""
ROUNDING = 1e-4
"""Largest relative difference of sums of a row that count as equal."""


@torch.no_grad()
def check_no_probabilities(graph: fx.GraphModule, noise: Tensor) -> None:
    """Raise ValueError if a classifier returns probabilities or log-probabilities, decided by the values it returns.

    The last operation does not decide: after a softmax there may be a reshape, a factor or a selection, and a clamp or
    a comparison may take its place. Logits of an untrained network may lie in [0, 1] by chance, but not for any output
    of its layers: a suspicion is confirmed with random numbers in their place.

    Args:
        graph: The traced classifier, without a log-softmax at its end.
        noise: (N, C, H, W) normalized images, N >= 2.

    Raises:
        ValueError: Naming the last non-linear operation.
    """
    outputs = graph(noise.clone())
    if not probabilities(outputs):
        return
    draws = [_WithRandomLogits(graph, size, seed).run(noise.clone()) for size in SIZES for seed in range(DRAWS)]
    outputs = torch.cat([outputs, *draws])
    found = probabilities(outputs[torch.isfinite(outputs).all(1)])  # exponentials of large numbers overflow
    if found:
        nonlinear = [node.name for node in graph.graph.nodes if traits_of(node).kind is OpKind.NONLINEAR]
        last = f", computed by {nonlinear[-1]!r}" if nonlinear else ""
        raise ValueError(f"teacher must return logits, but returned {found}{last}: return what they are computed from")


class _WithRandomLogits(fx.Interpreter):
    """Run a classifier with random numbers of one size in place of the output of each layer.

    Of each, not of the last one in its code: that may be the gate of a squeeze-and-excitation block.
    """

    def __init__(self, graph: fx.GraphModule, size: float, seed: int) -> None:
        super().__init__(graph)
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if traits_of(n).kind is not OpKind.LAYER:
            return value
        random = torch.randn(value.shape, generator=self.generator)
        return self.size * random.to(value)


def probabilities(outputs: Tensor) -> str:
    """Describe the outputs of a classifier if they are probabilities, or their logarithms, and no logits.

    Probabilities are not negative and sum to the same number for all images (percentages, too), or are all in [0, 1].
    Outputs that are the same for all images prove nothing unless they sum to 1.

    Args:
        outputs: (N, K), finite.

    Returns:
        What they are, with the evidence; "" if nothing speaks against logits.
    """
    if are_log_probabilities(outputs):
        return "log-probabilities (the exponentials of each row sum to 1)"
    if bool((outputs < 0).any()):
        return ""
    sums = outputs.double().sum(1)
    total = float(sums.mean())
    same_sum = bool(((sums - total).abs() <= ROUNDING * total).all())
    differ = bool((outputs != outputs[0]).any())
    if same_sum and (differ or abs(total - 1) <= ROUNDING):
        return f"probabilities (no value is negative, and each row sums to {total:.4g})"
    return "probabilities (all values are in [0, 1])" if differ and bool((outputs <= 1).all()) else ""


def are_log_probabilities(outputs: Tensor) -> bool:
    """Return whether the exponentials of each row of (N, K) outputs sum to 1, up to rounding."""
    return bool((outputs.double().logsumexp(1).abs() <= ROUNDING).all())
