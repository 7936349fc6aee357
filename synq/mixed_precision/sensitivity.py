"""How much each tensor's rounding costs by itself. No data but synthetic images.

    one tensor at b bits, all else float -> KL(teacher || that)        for every weight and activation; of several students, every width

Source: ZeroQ (arXiv 2001.00281), section 3.2, measures layers so. What is chosen from it: ``width_choice.py``.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.common.progress import visible
from synq.evaluation.fidelity import kl
from synq.network.tracing import node_module
from synq.quant.bit_patterns import Role
from synq.quant.layers import (
    ACT_QUANTIZERS,
    ActQuantizer,
    QuantConv2d,
    QuantLinear,
    WeightQuantizer,
    quantizers_bypassed,
)

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
    role: Role
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


def scan_quantizers(
    net: fx.GraphModule,
    images: Tensor,
    reference: Tensor,
    *,
    roles: Collection[Role] = ("weight", "activation"),
    batch_size: int = 64,
    progress: bool = False,
) -> list[Score]:
    """Measure every quantizer of a student alone, as it is, in the order of its modules.

    What stands before a quantizer is as in the float network, which is computed once a batch: half of the work.

    Args:
        net: Network of a student, its ranges observed; unchanged afterwards.
        images: (N, C, H, W).
        reference: The teacher's logits (N, K) on them.
        roles: Which are measured.
        batch_size: Images at a time; every tensor between layers is kept for so many.
        progress: Whether a terminal shows a progress bar.
    """
    found: list[tuple[str, Role, nn.Module, Quantizer]] = []
    for name, module in net.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)) and "weight" in roles:
            found.append((name, "weight", module, module.weight_quantizer))
        elif isinstance(module, ActQuantizer) and "activation" in roles:
            found.append((name.removeprefix(ACT_QUANTIZERS), "activation", module, module))
    logits: list[list[Tensor]] = [[] for _ in found]
    batches = images.split(batch_size)
    with tqdm(total=len(batches) * len(found), desc="tensors", **visible(progress, leave=False)) as bar:
        for batch in batches:
            behind = _Behind(net, batch)
            for parts, (_, _, module, quantizer) in zip(logits, found, strict=True):
                with _alone(net, quantizer):
                    parts.append(behind(module))
                bar.update()
    return [
        Score(
            name=name,
            role=role,
            bits=quantizer.bits,
            kl=float(kl(reference, torch.cat(parts)).mean()),
            sqnr_db=sqnr_db(reference, torch.cat(parts)),
        )
        for parts, (name, role, _, quantizer) in zip(logits, found, strict=True)
    ]


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


@contextmanager
def _alone(net: fx.GraphModule, quantizer: Quantizer) -> Iterator[None]:
    with quantizers_bypassed(net):
        quantizer.enabled = True
        yield
