"""Distance between the outputs of a block of teacher and student, for feature maps and for tokens.

    mean over images and positions of sum over channels (y_student - y_teacher)^2

The channels of a feature map (N, C, H, W) are axis 1, those of tokens (N, T, C) or (N, H, W, C) the last. Where a class
token is classified, the logits do not depend on the other tokens that leave the last block: only positions on which
they depend count, so that the rounding is not learned for outputs that nothing reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from synq.network.attention.token_map import channels_are_last, slopes
from synq.network.op_traits import is_passive


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMetric:
    """How far two outputs of a block are from each other.

    Attributes:
        channel_axis: Axis of the channels.
        is_read: Positions on which the logits depend, bool, of the shape of one output without batch and channels; None
            if all are.
    """

    channel_axis: int = 1
    is_read: Tensor | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the squared distance of two tensors (N, ...), summed over channels and averaged over the rest."""
        distances = (output - target).square().sum(self.channel_axis)
        return distances.mean() if self.is_read is None else distances[:, self.is_read].mean()


def block_metrics(traced: fx.GraphModule, ends: Sequence[fx.Node]) -> list[BlockMetric]:
    """Return the metric of each block of a teacher, by the node at its end.

    Args:
        traced: A graph from ``trace_classifier``.
        ends: Nodes of ``block_ends``.
    """
    token_ends = [end for end in ends if _has_tokens(traced, end)]
    slope_of = slopes(traced, token_ends)
    metrics = []
    for end in ends:
        if end not in slope_of:
            metrics.append(BlockMetric())
            continue
        reads = (slope_of[end] != 0).any(-1)
        is_read = reads[0]
        # Positions that differ between images are chosen by their values, as by a largest value: each is read by some.
        some = bool((reads == is_read).all()) and bool(is_read.any()) and not bool(is_read.all())
        metrics.append(BlockMetric(channel_axis=-1, is_read=is_read if some else None))
    return metrics


def _has_tokens(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether the channels of a node are its last axis, perhaps known from a LayerNorm after a reshape."""
    shape = node.meta["shape"]
    if len(shape) != 4:
        return len(shape) == 3
    pending = [node]
    while pending:
        current = pending.pop()
        if channels_are_last(traced, current):
            return True
        pending += [user for user in current.users if is_passive(user) and user.meta["shape"][-1:] == shape[-1:]]
    return False
