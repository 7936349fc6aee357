"""Sensitivity of a student to the quantization of each tensor, on synthetic images.

    one tensor at b bits, everything else in float -> KL(teacher || student)        for every weight and activation

``ilp.py`` chooses bit-widths by it. Source: ZeroQ (arXiv 2001.00281), section 3.2.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from synq.common.progress import Bar, visible
from synq.evaluation.fidelity import kl, sqnr_db
from synq.network.op_traits import node_module
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
    """Sensitivity of the logits to the quantization of one tensor, with everything else in float.

    Attributes:
        name: Module of the layer, or of the activation's quantizer.
        role: "weight" or "activation".
        bits: Its bit-width.
        kl: Mean KL(teacher || student) at T = 1 in nats.
        sqnr_db: 10 log10 of the power of the teacher's logits over that of the difference; infinite without a
            difference.
    """

    name: str
    role: Role
    bits: int
    kl: float
    sqnr_db: float


def scan_quantizers(
    net: fx.GraphModule,
    images: Tensor,
    reference: Tensor,
    *,
    roles: Collection[Role] = ("weight", "activation"),
    batch_size: int = 64,
    progress: bool = False,
) -> list[Score]:
    """Measure every quantizer of a student with all others bypassed, in the order of its modules.

    Everything before a quantizer is float, and computed once per batch for all of them: this halves the work.

    Args:
        net: Network of a student with calibrated ranges; unchanged afterwards.
        images: (N, C, H, W).
        reference: The teacher's logits (N, K) for these images.
        roles: Roles of the tensors to measure.
        batch_size: Images per batch; the outputs of all layers are kept in memory for one batch.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        One score per quantizer.
    """
    found: list[tuple[str, Role, nn.Module, Quantizer]] = []
    for name, module in net.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)) and "weight" in roles:
            found.append((name, "weight", module, module.weight_quantizer))
        elif isinstance(module, ActQuantizer) and "activation" in roles:
            found.append((name.removeprefix(ACT_QUANTIZERS), "activation", module, module))
    logits: list[list[Tensor]] = [[] for _ in found]
    batches = images.split(batch_size)
    with Bar(total=len(batches) * len(found), desc="tensors", **visible(progress, leave=False)) as bar:
        for batch in batches:
            suffix = SuffixRunner(net, batch)
            for parts, (_, _, module, quantizer) in zip(logits, found, strict=True):
                with only_quantizer(net, quantizer):
                    parts.append(suffix(module))
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


class SuffixRunner:
    """Run the part of a network from one module on; everything before it is reused from one forward pass in float.

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
        self.interpreter = fx.Interpreter(net)

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Tensor:
        """Return the logits (N, K), computed from ``module`` on with the currently enabled quantizers."""
        before: dict[fx.Node, Any] = {}
        for node in self.net.graph.nodes:
            if node_module(self.net, node) is module:
                break
            before[node] = self.values[node]
        logits: Tensor = self.interpreter.run(self.images, initial_env=before)
        return logits


@contextmanager
def only_quantizer(net: fx.GraphModule, quantizer: Quantizer) -> Iterator[None]:
    """Bypass every quantizer of a network but one in the ``with`` block."""
    with quantizers_bypassed(net):
        quantizer.enabled = True
        yield
