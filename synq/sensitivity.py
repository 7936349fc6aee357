"""How much each tensor's rounding costs by itself, and which widths cost least under a budget. No data but synthetic images.

    scan: one layer at b bits, all else float -> KL(teacher || that)         for every layer and width
    choose_widths: one width a layer, least sum of these under a size        a knapsack with choices, solved exactly

Source: ZeroQ (arXiv 2001.00281), section 3.2, measures layers so and takes the sum for the whole; there the front is found by dynamic
programming, here by an integer program.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.accounting import TensorRow
from synq.configs import QuantConfig
from synq.fidelity import kl
from synq.observers import mse_weight_ratio
from synq.quant_layers import ActQuantizer, QuantConv2d, QuantLinear, WeightQuantizer, quantizers_bypassed
from synq.tracing import node_module
from synq.width_patterns import WidthPatterns, layer_names

Cost = Literal["bytes", "bitops"]
Quantizer = WeightQuantizer | ActQuantizer


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one tensor's rounding does to the logits while everything else is float.

    Attributes:
        name: Module of the layer, or of the activation's quantizer.
        role: "weight" or "activation".
        bits: Its width.
        kl: Mean KL(teacher || student) at T = 1 in nats.
        sqnr_db: 10 log10 of the power of the teacher's logits over that of the difference; infinite where there is none.
    """

    name: str
    role: Literal["weight", "activation"]
    bits: int
    kl: float
    sqnr_db: float


def sqnr_db(reference: Tensor, found: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of ``found`` in dB, 10 log10(sum r^2 / sum (r - f)^2); infinite where they are equal."""
    signal, noise = reference.double().square().sum(), (reference.double() - found.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(signal / noise))


@torch.no_grad()
def logits_of(net: fx.GraphModule, images: Tensor, batch_size: int = 64) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), in batches."""
    like = next(net.parameters())
    return torch.cat([net(batch.to(like)) for batch in images.split(batch_size)])


def scan_quantizers(net: fx.GraphModule, images: Tensor, reference: Tensor) -> list[Score]:
    """Measure every quantizer of a student alone, as it is, in the order of its modules.

    What stands before a quantizer is as in the float network, which is computed once: half of the work.

    Args:
        net: Network of a student, its ranges observed; unchanged afterwards.
        images: (N, C, H, W), few, because every tensor between layers is kept.
        reference: The teacher's logits (N, K) on them.
    """
    behind = _Behind(net, images)
    scores = []
    for name, module in net.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)):
            with _alone(net, module.weight_quantizer) as quantizer:
                scores.append(_score(name, "weight", quantizer, behind(module), reference))
        elif isinstance(module, ActQuantizer):
            with _alone(net, module) as quantizer:
                scores.append(_score(name, "activation", quantizer, behind(module), reference))
    return scores


def scan_widths(
    net: fx.GraphModule,
    images: Tensor,
    reference: Tensor,
    candidates: Sequence[int],
    *,
    weight_range: Literal["minmax", "mse"] = "minmax",
    norm: float = 2.4,
    progress: bool = False,
) -> list[Score]:
    """Measure the weights of every layer alone at every width.

    Args:
        net: Network of a student; unchanged afterwards.
        images: (N, C, H, W), as the student will be trained on.
        reference: The teacher's logits (N, K) on them.
        candidates: Widths, 2..8.
        weight_range: How ranges are found, as for the student.
        norm: Exponent of the error that "mse" minimises.
        progress: Whether a terminal shows a progress bar.
    """
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))]
    scores = []
    for name, layer in tqdm(layers, desc="layers", disable=None if progress else True, leave=False):
        own = layer.weight_quantizer
        try:
            for bits in candidates:
                quantizer = WeightQuantizer(layer.weight.shape[0], bits).to(layer.weight.device)
                if weight_range == "mse":
                    quantizer.clip_ratio.copy_(mse_weight_ratio(layer.weight.detach().float(), bits, norm))
                layer.weight_quantizer = quantizer
                with _alone(net, quantizer):
                    scores.append(_score(name, "weight", quantizer, logits_of(net, images), reference))
        finally:
            layer.weight_quantizer = own
    return scores


def width_costs(rows: Sequence[TensorRow], candidates: Sequence[int], cost: Cost) -> dict[str, dict[int, int]]:
    """Return what the weights of every layer cost at every width: packed bytes of the codes, or bit operations an image."""
    weights = [row for row in rows if row.role == "weight"]
    if cost == "bytes":
        return {row.name: {bits: math.ceil(row.numel * bits / 8) for bits in candidates} for row in weights}
    return {row.name: {bits: row.bitops // row.bits * bits for bits in candidates} for row in weights}


def named_layers(layers: Sequence[str], quant: QuantConfig) -> set[str]:
    """Return those of ``layers``, in order of execution, whose width a configuration gives by name or by their place."""
    patterns = WidthPatterns(quant.layer_weight_bits, "quant.layer_weight_bits")
    named = {name for name in layers if patterns.width(*layer_names(name)) is not None}
    ends = ((quant.first_bits, layers[0]), (quant.last_bits, layers[-1]))
    return named | {name for bits, name in ends if bits is not None}


def choose_widths(
    losses: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, int]], budget: float
) -> dict[str, int]:
    """Return the width of every layer for which the sum of the losses is least and the sum of the costs at most ``budget``.

    Args:
        losses: By layer and width; finite.
        costs: The same layers and widths.
        budget: Largest sum of the costs.

    Raises:
        ValueError: If the least widths already cost more.
    """
    choices = [(name, bits) for name, by_bits in losses.items() for bits in by_bits]
    least = sum(min(costs[name].values()) for name in losses)
    if least > budget:
        raise ValueError(f"`budget` must be at least {least}, what the least widths cost, but got {budget:g}")
    one_each = np.array([[float(name == layer) for name, _ in choices] for layer in losses])
    price = np.array([costs[name][bits] for name, bits in choices], dtype=float)
    loss = np.array([losses[name][bits] for name, bits in choices])
    limit = 1.0
    while True:
        # In shares of the largest loss and of the budget: the solver's tolerances are absolute.
        found = optimize.milp(
            loss / (loss.max() or 1.0),
            integrality=np.ones(len(choices)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(price[None] / budget, -np.inf, limit),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise RuntimeError(f"no widths were found: {found.message}")
        chosen = {name: bits for (name, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5}
        over = sum(costs[name][bits] for name, bits in chosen.items()) - budget
        if over <= 0:
            return chosen
        limit -= 2 * over / budget  # within the solver's tolerance of the budget, but above it


class _Behind:
    """Computes anew what stands behind one module of a network, the rest is as it was in a pass in float.

    Args:
        net: Network of a student.
        images: (N, C, H, W).
    """

    @torch.no_grad()
    def __init__(self, net: fx.GraphModule, images: Tensor) -> None:
        self.net, self.images = net, images.to(next(net.parameters()))
        kept = fx.Interpreter(net, garbage_collect_values=False)
        with quantizers_bypassed(net):
            kept.run(self.images)
        self.values = kept.env
        self.again = fx.Interpreter(net)

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Tensor:
        """Return the logits (N, K) with ``module`` as it is now."""
        before: dict[fx.Node, Any] = {}
        for node in self.net.graph.nodes:
            if node_module(self.net, node) is module:
                break
            before[node] = self.values[node]
        logits: Tensor = self.again.run(self.images, initial_env=before)
        return logits


def _score(
    name: str,
    role: Literal["weight", "activation"],
    quantizer: Quantizer,
    found: Tensor,
    reference: Tensor,
) -> Score:
    return Score(
        name=name.removeprefix("act_quantizers."),
        role=role,
        bits=quantizer.bits,
        kl=float(kl(reference, found).mean()),
        sqnr_db=sqnr_db(reference, found),
    )


@contextmanager
def _alone(net: fx.GraphModule, quantizer: Quantizer) -> Iterator[Quantizer]:
    with quantizers_bypassed(net):
        quantizer.enabled = True
        yield quantizer
