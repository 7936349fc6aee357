"""Recognition of classifiers that return probabilities: the losses take logits, and would compare them wrongly."""

import torch
from torch import Tensor, fx

from synq.network.op_traits import OpKind, traits_of

CONTRASTS = (1.0, 0.0, 10.0, 100.0)
"""Factors of the noise on which a suspicion is confirmed: with the contrast, logits leave every fixed range."""
ROUNDING = 1e-4
"""Largest relative difference of sums of a row that count as equal."""


@torch.no_grad()
def check_no_probabilities(graph: fx.GraphModule, noise: Tensor) -> None:
    """Raise ValueError if a classifier returns probabilities or log-probabilities, decided by the values it returns.

    The last operation would not tell: behind a softmax there may be a reshape, a factor or a selection, and a clamp or
    a comparison may take its place.

    Args:
        graph: The traced classifier, without a log-softmax at its end.
        noise: (N, C, H, W) normalized images, N >= 2.

    Raises:
        ValueError: Naming the last non-linear operation.
    """
    if not probabilities(graph(noise.clone())):
        return
    outputs = torch.cat([graph(contrast * noise) for contrast in CONTRASTS])
    found = probabilities(outputs[torch.isfinite(outputs).all(1)])  # noise of a high contrast may overflow
    if found:
        nonlinear = [node.name for node in graph.graph.nodes if traits_of(node).kind is OpKind.NONLINEAR]
        last = f", computed by {nonlinear[-1]!r}" if nonlinear else ""
        raise ValueError(f"teacher must return logits, but returned {found}{last}: return what they are computed from")


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
