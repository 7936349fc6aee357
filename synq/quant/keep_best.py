"""Keep a change of a student only where it helps: several changes tried from one start, the one nearest to the teacher stays."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from synq.evaluation.fidelity import kl

Agree = Callable[[dict[str, float]], dict[str, float]]
"""How the processes of a run come to the same figures, and so to the same choice; ``dict`` where there is one process."""


@torch.no_grad()
def answers(net: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), on the device of both."""
    return torch.cat([net(batch) for batch in images.split(batch_size)])


def mean_kl(teacher_logits: Tensor, net: nn.Module, images: Tensor, batch_size: int = 64) -> float:
    """Return the mean over images of KL(teacher || net) at T = 1, in nats; infinity where it is not finite.

    Args:
        teacher_logits: (N, K), of the same images.
        net: Maps images to logits.
        images: (N, C, H, W).
        batch_size: Images per forward pass.
    """
    found = float(kl(teacher_logits, answers(net, images, batch_size)).mean())
    return found if math.isfinite(found) else math.inf


def keep_best(
    net: nn.Module, changes: Mapping[str, Callable[[], object]], cost: Callable[[], float], agree: Agree = dict
) -> tuple[str, dict[str, float]]:
    """Try changes of ``net``, each from the state it has now, and leave it in the one of least cost.

    Args:
        net: Changed in place, parameters and buffers only.
        changes: By name, each changes ``net`` when called. Of equal costs the first wins.
        cost: Value of ``net`` as it stands, lower is better.
        agree: Makes the costs the same on all processes.

    Returns:
        Name of the change that stays; all costs by name.
    """
    start, costs, ends = _copied(net), {}, {}
    for name, change in changes.items():
        net.load_state_dict(start)
        change()
        costs[name], ends[name] = cost(), _copied(net)
    costs = agree(costs)
    best = min(costs, key=costs.__getitem__)
    net.load_state_dict(ends[best])
    return best, costs


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
