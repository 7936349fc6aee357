"""Selection of the best of several changes of a student, by its KL divergence from the teacher."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from synq.losses import kd_kl
from synq.network.logits import logits_of

Synchronize = Callable[[dict[str, float]], dict[str, float]]
"""Returns the same metrics on all processes, so that they choose the same; ``dict`` for a single process."""


def mean_kl(teacher_logits: Tensor, net: nn.Module, images: Tensor, batch_size: int = 64) -> float:
    """Return the mean over images of KL(teacher || net) at T = 1, in nats; infinity if it is not finite.

    Args:
        teacher_logits: (N, K), for the same images.
        net: (N, C, H, W) -> logits (N, K).
        images: (N, C, H, W).
        batch_size: Images per forward pass.
    """
    student_logits = logits_of(net, images, batch_size)
    divergence = float(kd_kl(student_logits.double(), teacher_logits.double(), 1.0).mean())
    return divergence if math.isfinite(divergence) else math.inf


def keep_best(
    net: nn.Module,
    changes: Mapping[str, Callable[[], object]],
    cost: Callable[[], float],
    synchronize: Synchronize = dict,
) -> tuple[str, dict[str, float]]:
    """Apply each change of ``net`` to its current state, and keep the one with the lowest cost.

    Args:
        net: Changed in place, parameters and buffers only.
        changes: Functions that change ``net``, by name. Of equal costs the first wins.
        cost: Evaluates ``net``; lower is better.
        synchronize: Returns the same costs on all processes.

    Returns:
        (name of the change that is kept, all costs by name).
    """
    initial, costs, states = _copied(net), {}, {}
    for name, change in changes.items():
        net.load_state_dict(initial)
        change()
        costs[name], states[name] = cost(), _copied(net)
    costs = synchronize(costs)
    best = min(costs, key=costs.__getitem__)
    net.load_state_dict(states[best])
    return best, costs


def keep_closest(
    net: nn.Module,
    reference: nn.Module,
    images: Tensor,
    changes: Mapping[str, Callable[[], object]],
    synchronize: Synchronize = dict,
    batch_size: int = 64,
) -> tuple[str, dict[str, float]]:
    """Keep the change of ``net`` with the smallest mean KL(reference || net) on images, see `keep_best`.

    Args:
        net: Changed in place, parameters and buffers only.
        reference: Float network, (N, C, H, W) -> logits (N, K); not modified.
        images: (N, C, H, W) on the device of both.
        changes: Functions that change ``net``, by name.
        synchronize: Returns the same costs on all processes.
        batch_size: Images per forward pass.

    Returns:
        (name of the change that is kept, mean KL of each in nats, by name).
    """
    wanted = logits_of(reference, images, batch_size)
    return keep_best(net, changes, lambda: mean_kl(wanted, net, images, batch_size), synchronize)


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
