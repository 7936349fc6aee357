"""Give a rounded student the statistics its teacher has on the same images, layer by layer, by batch-norm scale and shift and by biases.

Rounding shifts and spreads what arrives at a layer, and a batch norm in evaluation mode still subtracts the teacher's mean. Its running
statistics stay the teacher's; what changes is its affine part.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.bn_stats import channel_moments, pool_statistics
from synq.network.tracing import node_module
from synq.quant.keep_best import Agree, answers, keep_best, mean_kl

LARGEST_RATIO = 2.0
"""A scale changes by this factor at most, up or down."""
DEAD = 1e-6
"""Share of its running variance below which a channel's variance is that of a dead channel, whose scale is left alone."""
_Moments = tuple[Tensor, Tensor]


def correct_statistics(
    net: fx.GraphModule, reference: fx.GraphModule, images: Tensor, *, batch_size: int = 64, agree: Agree = dict
) -> dict[str, Any]:
    """Correct a student's batch norms and biases, in place, where that brings it nearer to its teacher.

    For a batch norm of running mean m, variance v, scale g and shift b, whose inputs have mean and deviation (mu_t, sigma_t) in the
    teacher and (mu_s, sigma_s) in the student, with its quantizers on and all layers before it corrected:

        g' = g r,  b' = b + (g (mu_t - m) - g' (mu_s - m)) / sqrt(v + eps),  r = sigma_t / sigma_s or 1

    so that its output has the mean, or the mean and deviation, that the teacher's has. A convolution or linear layer with a bias and no
    batch norm behind it gets the difference of its mean outputs. The statistics are of one half of the images; of "none", "mean" and
    "mean and deviation", the one with the least mean KL(teacher || student) on the other half stays.

    Example: m = 0, v + eps = 1, g = 1, b = 0, teacher (1, 2), student (3, 4): g' = 1/2, b' = 1 - 3/2 = -1/2.

    Args:
        net: A student with its ranges observed, in evaluation mode.
        reference: The float network that its layers imitate, of the same names: the teacher, or what ``equalize`` returned.
        images: (N, C, H, W) synthetic images on the device of both.
        batch_size: Images per forward pass. All activations that are still needed are kept, of all images of the half.
        agree: Makes figures the same on all processes.

    Returns:
        What was kept, the KL of each choice, and the numbers of corrected batch norms and biases.

    Source: bias correction as in Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
    section 4.2, with measured statistics; the deviation and the guard are ours.
    """
    norms, biased = correctable(net)
    report: dict[str, Any] = {"kept": "none", "kl": {}, "batch_norms": len(norms), "biases": len(biased)}
    if len(images) < 2 or not (norms or biased):
        return report
    # A fixed permutation, because the images' classes may come in turns.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    measured, judged = images[order[: (len(images) + 1) // 2]], images[order[(len(images) + 1) // 2 :]]
    targets = _reference_moments(reference, norms | biased, measured.split(batch_size))
    changes = {"none": lambda: None}
    for name, with_deviation in (("mean", False), ("mean and deviation", True)):
        changes[name] = partial(correct_layers, net, targets, measured.split(batch_size), with_deviation=with_deviation)
    wanted = answers(reference, judged, batch_size)
    kept, costs = keep_best(net, changes, lambda: mean_kl(wanted, net, judged, batch_size), agree)
    return {**report, "kept": kept, "kl": costs}


def correctable(net: fx.GraphModule) -> tuple[set[str], set[str]]:
    """Return the names of the nodes that can be corrected: batch norms, and layers with a bias of which a batch norm is no reader.

    Each runs once and shares neither scale, shift nor bias. Batch norms without running statistics or affine part are none.
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
            own = module.affine and all(readers[id(part)] == 1 for part in (module.weight, module.bias))
            if own and module.running_mean is not None:
                norms.add(node.name)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            before_norm = any(isinstance(node_module(net, user), _BatchNorm) for user in node.users)
            channels_second = len(node.meta["shape"]) == (4 if isinstance(module, nn.Conv2d) else 2)
            if readers[id(module.bias)] == 1 and channels_second and not before_norm:
                biased.add(node.name)
    return norms, biased


class _Pass:
    """One forward pass of several batches side by side, node by node; values are dropped after their last use."""

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
        """Return mean and biased variance per channel of the values of ``node``, each (C,), float64."""
        values = [run.env[node] for run in self.runs]
        means, variances = zip(*(channel_moments(value) for value in values), strict=True)
        counts = torch.tensor([value.numel() // value.shape[1] for value in values], device=means[0].device)
        return pool_statistics(torch.stack(means).double(), torch.stack(variances).double(), counts)

    def add(self, node: fx.Node, shift: Tensor) -> None:
        """Add ``shift`` (C,) to the values of ``node``."""
        for run in self.runs:
            value = run.env[node]
            run.env[node] = value + shift.to(value).view(1, -1, *[1] * (value.dim() - 2))


@torch.no_grad()
def _reference_moments(net: fx.GraphModule, names: set[str], batches: Sequence[Tensor]) -> dict[str, _Moments]:
    """Return the moments of each named node: of a batch norm's input, of another layer's output."""
    found = {}
    forward = _Pass(net, batches)
    for node in net.graph.nodes:
        is_norm = isinstance(node_module(net, node), _BatchNorm)
        if node.name in names and is_norm:
            found[node.name] = forward.moments(node.all_input_nodes[0])
        if node.op != "output":
            forward.step(node)
        if node.name in names and not is_norm:
            found[node.name] = forward.moments(node)
    return found


@torch.no_grad()
def correct_layers(
    net: fx.GraphModule, targets: dict[str, _Moments], batches: Sequence[Tensor], *, with_deviation: bool
) -> None:
    """Correct every layer of ``net`` that has a target, in order of execution, in one forward pass.

    Args:
        net: The student, in evaluation mode.
        targets: By name of node, mean and biased variance (C,) that a batch norm's input, or another layer's output, has in the teacher.
        batches: (n, C, H, W) each; the images behind the targets.
        with_deviation: Whether batch norms are given the deviation too.
    """
    forward = _Pass(net, batches)
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


def _correct_norm(norm: _BatchNorm, wanted: _Moments, found: _Moments, with_deviation: bool) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
    scale, ratio = norm.weight.double(), torch.ones_like(mean)
    if with_deviation:
        alive = torch.minimum(wanted[1], found[1]) > DEAD * variance
        ratio[alive] = (wanted[1][alive] / found[1][alive]).sqrt().clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    new_scale = scale * ratio
    shift = (scale * (wanted[0] - mean) - new_scale * (found[0] - mean)) / variance.sqrt()
    norm.weight.copy_(new_scale)
    norm.bias.copy_(norm.bias.double() + shift)
