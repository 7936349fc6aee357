"""Correct the batch norms and biases of a student so that its activations have the statistics of its teacher.

Quantization errors shift and spread the inputs of a layer, while a batch norm in evaluation mode still subtracts the
teacher's mean. The running statistics stay the teacher's; only the affine parameters and biases change.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.bn_stats import channel_moments, pool_statistics
from synq.network.op_traits import node_module
from synq.quant.keep_best import Synchronize, keep_closest

LARGEST_RATIO = 2.0
"""Largest factor by which the scale of a batch norm grows or shrinks."""
DEAD_VARIANCE = 1e-6
"""A channel is dead, and keeps its scale, if its variance is below this fraction of its running variance."""
_Moments = tuple[Tensor, Tensor]


def correct_statistics(
    net: fx.GraphModule,
    reference: fx.GraphModule,
    images: Tensor,
    *,
    batch_size: int = 64,
    synchronize: Synchronize = dict,
) -> dict[str, Any]:
    """Correct the batch norms and biases of a student, in place, if that reduces the KL divergence from its teacher.

    For a batch norm of running mean m, variance v, scale g and shift b, whose inputs have mean and standard deviation
    (mu_t, sigma_t) in the teacher and (mu_s, sigma_s) in the student, with all quantizers enabled and all preceding
    layers corrected:

        g' = g r,  b' = b + (g (mu_t - m) - g' (mu_s - m)) / sqrt(v + eps),  r = sigma_t / sigma_s or 1

    so that its output has the mean, or the mean and the standard deviation, of the teacher's. A convolution or linear
    layer with a bias and no following batch norm adds the difference of the mean outputs to its bias. The statistics
    are measured on one half of the images; of "none", "mean" and "mean and deviation", the choice with the smallest
    mean KL(teacher || student) on the other half is kept.

    Example: m = 0, v + eps = 1, g = 1, b = 0, teacher (1, 2), student (3, 4): g' = 1/2, b' = 1 - 3/2 = -1/2.

    Args:
        net: A student with observed ranges, in evaluation mode.
        reference: The float network with the same node names: the teacher, or the network returned by ``equalize``.
        images: (N, C, H, W) synthetic images on the device of both.
        batch_size: Images per forward pass. All activations that are still needed are kept, of all images of the half.
        synchronize: Makes metrics the same on all processes.

    Returns:
        Report with "kept" (the choice), "kl" (mean KL of each choice, in nats), and the numbers of correctable
        "batch_norms" and "biases".

    Source: bias correction of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, section 4.2, with measured statistics. Ours: the standard deviation, and keeping the best choice.
    """
    norms, biased = correctable(net)
    report: dict[str, Any] = {"kept": "none", "kl": {}, "batch_norms": len(norms), "biases": len(biased)}
    if len(images) < 2 or not (norms or biased):
        return report
    # A fixed permutation, because the classes may alternate, so that each half would have only some of them.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    measured, judged = images[order[: (len(images) + 1) // 2]], images[order[(len(images) + 1) // 2 :]]
    targets = _reference_moments(reference, norms | biased, measured.split(batch_size))
    changes = {"none": lambda: None}
    for name, with_deviation in (("mean", False), ("mean and deviation", True)):
        changes[name] = partial(correct_layers, net, targets, measured.split(batch_size), with_deviation=with_deviation)
    kept, costs = keep_closest(net, reference, judged, changes, synchronize, batch_size)
    return {**report, "kept": kept, "kl": costs}


def correctable(net: fx.GraphModule) -> tuple[set[str], set[str]]:
    """Return the names of the correctable nodes: batch norms, and layers with a bias but no following batch norm.

    Each is called once and shares none of its parameters. Batch norms without running statistics or affine parameters
    are excluded.
    """
    calls = Counter(str(node.target) for node in net.graph.nodes if node.op in ("call_module", "get_attr"))
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    readers = Counter(id(tensor) for name, tensor in tensors for _ in range(1 + calls[name]))
    norms, biased = set(), set()
    for node in net.graph.nodes:
        module = node_module(net, node)
        if module is None or calls[str(node.target)] > 1:
            continue
        if isinstance(module, _BatchNorm):
            unshared = module.affine and all(readers[id(part)] == 1 for part in (module.weight, module.bias))
            if unshared and module.running_mean is not None:
                norms.add(node.name)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            before_norm = any(isinstance(node_module(net, user), _BatchNorm) for user in node.users)
            channels_second = len(node.meta["shape"]) == (4 if isinstance(module, nn.Conv2d) else 2)
            if readers[id(module.bias)] == 1 and channels_second and not before_norm:
                biased.add(node.name)
    return norms, biased


class _NodewiseRunner:
    """Run several batches through a network node by node; values are freed after their last use."""

    def __init__(self, net: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.runs = [fx.Interpreter(net, garbage_collect_values=False) for _ in batches]
        self.batches = batches
        self.last_use: dict[fx.Node, fx.Node] = {}
        for node in net.graph.nodes:
            self.last_use.update(dict.fromkeys(node.all_input_nodes, node))

    def step(self, node: fx.Node) -> None:
        """Compute ``node`` for all batches."""
        for run, batch in zip(self.runs, self.batches, strict=True):
            run.env[node] = batch if node.op == "placeholder" else run.run_node(node)
            for source in node.all_input_nodes:
                if self.last_use[source] is node:
                    del run.env[source]

    def moments(self, node: fx.Node) -> _Moments:
        """Return the per-channel mean and biased variance of the output of ``node``, each (C,), float64."""
        values = [run.env[node] for run in self.runs]
        means, variances = zip(*(channel_moments(value) for value in values), strict=True)
        counts = torch.tensor([value.numel() // value.shape[1] for value in values], device=means[0].device)
        return pool_statistics(torch.stack(means).double(), torch.stack(variances).double(), counts)

    def add(self, node: fx.Node, shift: Tensor) -> None:
        """Add ``shift`` (C,) to the output of ``node``, for all batches."""
        for run in self.runs:
            value = run.env[node]
            run.env[node] = value + shift.to(value).view(1, -1, *[1] * (value.dim() - 2))


@torch.no_grad()
def _reference_moments(net: fx.GraphModule, names: set[str], batches: Sequence[Tensor]) -> dict[str, _Moments]:
    """Return the mean and variance for each named node: of the input of a batch norm, of the output of other layers."""
    moments = {}
    forward = _NodewiseRunner(net, batches)
    for node in net.graph.nodes:
        is_norm = isinstance(node_module(net, node), _BatchNorm)
        if node.name in names and is_norm:
            moments[node.name] = forward.moments(node.all_input_nodes[0])
        if node.op != "output":
            forward.step(node)
        if node.name in names and not is_norm:
            moments[node.name] = forward.moments(node)
    return moments


@torch.no_grad()
def correct_layers(
    net: fx.GraphModule, targets: dict[str, _Moments], batches: Sequence[Tensor], *, with_deviation: bool
) -> None:
    """Correct every layer of ``net`` that has target moments, in order of execution, in one forward pass.

    Args:
        net: The student, in evaluation mode; changed in place.
        targets: By node name, mean and biased variance (C,) in the teacher: of the input of a batch norm, of the output
            of other layers.
        batches: (n, C, H, W) each; the images on which the targets were measured.
        with_deviation: Whether batch norms match the standard deviation too.
    """
    forward = _NodewiseRunner(net, batches)
    for node in net.graph.nodes:
        module, target = node_module(net, node), targets.get(node.name)
        if target is not None and isinstance(module, _BatchNorm):
            _correct_norm(module, target, forward.moments(node.all_input_nodes[0]), with_deviation)
        if node.op != "output":
            forward.step(node)
        if target is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            shift = target[0] - forward.moments(node)[0]
            assert module.bias is not None
            module.bias.add_(shift.to(module.bias))
            forward.add(node, shift)


def _correct_norm(norm: _BatchNorm, target: _Moments, current: _Moments, with_deviation: bool) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
    scale, ratio = norm.weight.double(), torch.ones_like(mean)
    if with_deviation:
        alive = torch.minimum(target[1], current[1]) > DEAD_VARIANCE * variance
        ratio[alive] = (target[1][alive] / current[1][alive]).sqrt().clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    new_scale = scale * ratio
    shift = (scale * (target[0] - mean) - new_scale * (current[0] - mean)) / variance.sqrt()
    norm.weight.copy_(new_scale)
    norm.bias.copy_(norm.bias.double() + shift)
