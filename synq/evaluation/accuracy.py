"""Whether a classification is correct: the one rule for top-1 and top-5, which also holds for equal logits."""

from torch import Tensor


def top_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image whether its label is the predicted class, and whether it is among the five largest logits.

    The predicted class is the argmax, of equal logits the first, as for every engine that runs an exported file. A
    label is among the five largest if fewer than five logits are larger: those equal to its logit do not count. A top-1
    hit is a top-5 hit; NaN counts as larger than every number, also than itself.

    Args:
        logits: (N, K).
        labels: (N,) int64, in [0, K - 1].

    Returns:
        (top-1 hits, top-5 hits), each (N,) bool.
    """
    first = logits.argmax(1) == labels
    own = logits.gather(1, labels[:, None])
    return first, first | ((~(logits <= own)).sum(1) < 5)
