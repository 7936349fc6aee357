"""Learn how the weights are rounded, block by block, so that each block of the student gives what the teacher's gives.

For a block with weights w, steps s and codes round(w / s) + zero_point, every rounding becomes a number h(V) in [0, 1]:

    w^(V) = s clamp(floor(w / s) + h(V), quant_min - zero_point, quant_max - zero_point),  h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    loss  = mean over images and positions of sum over channels (y_student - y_teacher)^2 + rounding_weight sum (1 - |2 h - 1|^beta)

V starts where h is the fraction cut off by floor, so that w^ starts as w. The second term begins after ``warmup``; beta falls linearly,
which drives each h to 0 or 1. Then h is rounded and the weight moves into the cell of its learned code, to where it was or to the nearest
place near the middle (``soft_rounding.py``): rounding it to nearest gives the learned code, as long as its scale is a stored one
(``quant_layers.py``), and fine-tuning can still carry it over an edge. In the middles hardly any weight would change its code any more.

While a block is learned, each activation inside it is left unquantized, and each value of its input is the teacher's, with probability
``drop_prob``, element by element (QDrop): the rounding then does not lean on one pattern of activation errors. Batch norms belong to the
block and stay in evaluation mode. A layer with weights that stand in several blocks is learned in the first.

Source: AdaRound (Nagel et al., ICML 2020), sections 3.2 and 3.3; blocks and the sum over channels from BRECQ (Li et al., ICLR 2021); QDrop
(Wei et al., ICLR 2022). Ours: a block keeps what it learned only where its error fell.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.common.progress import visible
from synq.common.seeding import make_generator
from synq.config.run import ReconstructionConfig
from synq.finetune.optimizers import keep_positive
from synq.network.blocks import block_ends, segment
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer, QuantConv2d, QuantLinear
from synq.quant.lsq import fake_quantize_learned
from synq.quant.soft_rounding import SoftRounding

CACHE_BATCH = 128
"""Images per pass where nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What came of one block.

    Attributes:
        block: Node of the teacher's graph that the block ends with.
        error_before: Mean over images and positions of the sum over channels of the squared distance to the teacher's output, with all
            activations quantized, weights rounded to nearest and ranges as observed.
        error_after: The same with the learned rounding (and steps).
        changed: Share (0..1) of the block's codes that differ from those of rounding to nearest.
        kept: Whether the learned rounding and steps were kept: error_after < error_before.
    """

    block: str
    error_before: float
    error_after: float
    changed: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """The blocks in order of execution."""

    blocks: tuple[BlockResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return the blocks as plain values."""
        return [asdict(block) for block in self.blocks]


def reconstruct(
    student_net: fx.GraphModule,
    teacher_graph: fx.GraphModule,
    images: Tensor,
    config: ReconstructionConfig,
    *,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> ReconstructionReport:
    """Learn the rounding of ``student_net``, in place, on synthetic images. Every process of a group computes the same.

    Steps of activations are learned along where ``step_lr`` > 0, whether or not the fine-tuning trains them later. The student's and the
    teacher's activations at two successive block ends are kept on the device, for ``config.images`` images.

    Args:
        student_net: Network of a student with ``rounding="adaround"``, its ranges observed, on ``device``.
        teacher_graph: The graph that it was made from, on ``device``; not touched.
        images: (N, C, H, W) synthetic images, filtered as those of the fine-tuning; the first ``config.images`` are used.
        config: Steps, batch, learning rates, and the annealing.
        seed: Seed of the batches and of what is dropped.
        device: Where it runs.
        progress: Whether to show a progress bar.

    Returns:
        Errors of each block before and after.

    Raises:
        ValueError: If there are no images, or a weight's scale is not stored: its grid would move with the rounded weights.
    """
    if len(images) == 0:
        raise ValueError("reconstruction.images must be >= 1, but got no image")
    for name, module in student_net.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)) and not module.weight_quantizer.has_range:
            raise ValueError(
                f"quant.rounding must be adaround for a student to be reconstructed, but {name} has no stored scale"
            )
    ends = block_ends(teacher_graph)
    starts, cuts = [_image(teacher_graph), *ends], student_cuts(student_net, ends)
    teacher_in = student_in = images[: config.images].to(device)
    results: list[BlockResult] = []
    done: set[Tensor] = set()
    bar = tqdm(total=len(ends) * config.iterations, desc="rounding", unit="step", **visible(progress, leave=None))
    for number, end in enumerate(ends):
        part = segment(student_net, cuts[number], cuts[number + 1])
        target = _outputs(segment(teacher_graph, starts[number], end), teacher_in)
        block = _Block(part, done)
        generators = (make_generator("rounding", seed, number), make_generator("drop", seed, number, device=device))
        results.append(_learn(end.name, block, teacher_in, student_in, target, config, generators, bar.update))
        done.update(block.roundings)
        teacher_in = target  # first, so that its predecessor is free before the next is made
        student_in = _outputs(part, student_in)
    bar.close()
    return ReconstructionReport(blocks=tuple(results))


class _Block:
    """A block of the student, with what can be learned in it.

    Attributes:
        part: The block alone.
        roundings: By weight; those in ``done`` are not learned again.
        quantizers: Activation quantizers by name.
        steps: Their steps, as leaves of their own.
    """

    def __init__(self, part: fx.GraphModule, done: set[Tensor]) -> None:
        self.part = part
        layers = [m for m in part.modules() if isinstance(m, (QuantConv2d, QuantLinear))]
        self.roundings = {m.weight: SoftRounding(m) for m in layers if m.weight not in done}
        self.quantizers = {name: m for name, m in part.named_modules() if isinstance(m, ActQuantizer)}
        self.steps = {name: q.scale.detach().clone().requires_grad_() for name, q in self.quantizers.items()}

    def changed(self) -> float:
        """Return the share of codes that differ from those of rounding to nearest."""
        moved = [(r.codes() != r.nearest).sum() for r in self.roundings.values()]
        total = sum(r.nearest.numel() for r in self.roundings.values())
        return float(sum(moved)) / total if total else 0.0

    @torch.no_grad()
    def settle(self) -> Callable[[], None]:
        """Write hard-rounded weights and steps into the student; returns what takes it back."""
        written: list[tuple[Tensor, Tensor]] = [(w, r.settled()) for w, r in self.roundings.items()]
        written += [(self.quantizers[name].scale, step) for name, step in self.steps.items()]
        before = [(place, place.detach().clone()) for place, _ in written]

        @torch.no_grad()
        def put(values: list[tuple[Tensor, Tensor]]) -> None:
            for place, value in values:
                place.copy_(value)

        put(written)
        return lambda: put(before)


class _Learning(fx.Interpreter):
    """Runs a block with soft weights, learned steps and dropped quantization."""

    def __init__(self, block: _Block, drop: Callable[[Tensor, Tensor], Tensor], learn_steps: bool) -> None:
        super().__init__(block.part)
        self.block, self.drop, self.learn_steps = block, drop, learn_steps

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, ActQuantizer):
            return self.drop(args[0], self._quantized(target, module, args[0]))
        if isinstance(module, (QuantConv2d, QuantLinear)) and module.weight in self.block.roundings:
            weight = self.block.roundings[module.weight].weight()
            if isinstance(module, QuantConv2d):
                return module.convolve(args[0], weight)
            return F.linear(args[0], weight, module.bias)
        return super().call_module(target, args, kwargs)

    def _quantized(self, name: str, module: ActQuantizer, x: Tensor) -> Tensor:
        if not self.learn_steps:
            return module(x)
        bounds = (module.quant_min, module.quant_max)  # no factor of the gradient: Adam would undo it
        return fake_quantize_learned(x, self.block.steps[name].float(), module.zero_point, *bounds)


def _learn(
    name: str,
    block: _Block,
    teacher_in: Tensor,
    student_in: Tensor,
    target: Tensor,
    config: ReconstructionConfig,
    generators: tuple[torch.Generator, torch.Generator],
    tick: Callable[[], object],
) -> BlockResult:
    """Learn one block and keep the result where the error fell."""
    before = _error(block.part, student_in, target)
    order, chance = generators

    def drop(whole: Tensor, quantized: Tensor) -> Tensor:
        return drop_back(whole, quantized, config.drop_prob, chance)

    runner = _Learning(block, drop, config.step_lr > 0)
    logits = [rounding.logits for rounding in block.roundings.values()]
    steps = list(block.steps.values()) if config.step_lr > 0 else []
    learned = [*logits, *steps]
    if not learned:
        return BlockResult(block=name, error_before=before, error_after=before, changed=0.0, kept=False)
    groups: list[dict[str, Any]] = [{"params": logits, "lr": config.rounding_lr}] if logits else []
    if steps:
        groups.append({"params": steps, "lr": config.step_lr})
    optimizer = torch.optim.Adam(groups)
    keep_positive(optimizer, steps)
    for step in range(config.iterations):
        rows = torch.randperm(len(target), generator=order)[: config.batch_size].to(target.device)
        with torch.enable_grad():
            same = teacher_in is student_in  # the images: nothing to mix
            output = runner.run(student_in[rows] if same else drop(teacher_in[rows], student_in[rows]))
            loss = _distance(output, target[rows])
            beta = _beta(step, config)
            if beta is not None:
                shares = (rounding.share() for rounding in block.roundings.values())
                loss = loss + config.rounding_weight * sum((1 - (2 * h - 1).abs().pow(beta)).sum() for h in shares)
        for leaf, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            leaf.grad = gradient
        if steps:
            optimizer.param_groups[-1]["lr"] = config.step_lr * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
        optimizer.step()
        tick()
    changed, take_back = block.changed(), block.settle()
    after = _error(block.part, student_in, target)
    kept = after < before
    if not kept:
        take_back()
    return BlockResult(block=name, error_before=before, error_after=after, changed=changed if kept else 0.0, kept=kept)


def drop_back(whole: Tensor, quantized: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Take each value from ``whole`` with ``probability``, else from ``quantized`` (same shape; its memory layout is kept).

    The draw does not depend on the layout.
    """
    if probability == 0.0:
        return quantized
    draw = torch.rand(whole.shape, generator=generator, device=whole.device) < probability
    return torch.where(torch.empty_like(quantized, dtype=torch.bool).copy_(draw), whole, quantized)


def _beta(step: int, config: ReconstructionConfig) -> float | None:
    """Return the exponent of the rounding term at a step, or None while it is off."""
    first = config.warmup * config.iterations
    if step < first:
        return None
    way = (step - first) / max(config.iterations - first, 1)
    return config.beta_start + (config.beta_end - config.beta_start) * way


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance, summed over channels (N, C, ...), mean over the rest."""
    return (output - target).square().sum(1).mean()


@torch.no_grad()
def _error(part: nn.Module, inputs: Tensor, target: Tensor) -> float:
    pairs = zip(inputs.split(CACHE_BATCH), target.split(CACHE_BATCH), strict=True)
    sums = [_distance(part(x), wanted).double() * len(x) for x, wanted in pairs]
    return float(torch.stack(sums).sum()) / len(inputs)


@torch.no_grad()
def _outputs(part: nn.Module, inputs: Tensor) -> Tensor:
    """Return what ``part`` makes of ``inputs`` (N, ...), in its own layout and without a second copy in pieces."""
    whole = None
    for rows in torch.arange(len(inputs)).split(CACHE_BATCH):
        found = part(inputs[rows[0] : rows[-1] + 1])
        if whole is None:
            like = found[:1].expand(len(inputs), *found.shape[1:])
            last = (
                found.dim() == 4
                and not found.is_contiguous()
                and found.is_contiguous(memory_format=torch.channels_last)
            )
            whole = torch.empty_like(like, memory_format=torch.channels_last if last else torch.contiguous_format)
        whole[rows[0] : rows[-1] + 1] = found
    assert whole is not None
    return whole


def student_cuts(student_net: fx.GraphModule, ends: list[fx.Node]) -> list[fx.Node]:
    """Return the image and the nodes of a student that end its blocks.

    A quantizer behind the end of a block belongs to the block where all the rest of the network reads it alone; where a shortcut reads
    the unquantized tensor as well, it belongs to the next.

    Args:
        student_net: Network of a student.
        ends: ``block_ends`` of its teacher's graph; the student's nodes have the same names.
    """
    by_name = {node.name: node for node in student_net.graph.nodes}
    cuts = [_image(student_net)]
    for end in ends:
        node = by_name[end.name]
        users = list(node.users)
        quantized = len(users) == 1 and str(users[0].target) == f"{ACT_QUANTIZERS}{end.name}"
        cuts.append(users[0] if quantized else node)
    return cuts


def _image(net: fx.GraphModule) -> fx.Node:
    return next(node for node in net.graph.nodes if node.op == "placeholder")
