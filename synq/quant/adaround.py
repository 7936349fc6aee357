"""Learn the rounding of weights block by block, so that each block of the student reproduces its block of the teacher.

For a block with weights w, scales s and integer codes round(w / s) + zero_point, the rounding of each weight becomes a
variable h(V) in [0, 1]:

    w^(V) = s clamp(floor(w / s) + h(V), quant_min - zero_point, quant_max - zero_point)
    h(V)  = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    loss  = mean over images and positions of sum over channels (y_student - y_teacher)^2
            + rounding_weight sum (1 - |2 h - 1|^beta)              channels and positions: ``block_metric.py``

V is initialized so that h is the fractional part of w / s, hence w^ = w. The second term is added after ``warmup``;
beta decreases linearly, which drives each h to 0 or 1. Finally h is rounded, and the weight is moved within ``REACH``
of the center of the cell of its learned code (``soft_rounding.py``): rounding it to nearest then gives the learned
code, as long as its scale is stored (``layers.py``), and fine-tuning can still move it to another code. From the center
of the cell hardly any weight would change its code.

While a block is optimized, its activations stay unquantized, and its input is taken from the teacher, each value with
probability ``drop_prob`` (QDrop), so that the rounding does not overfit to one pattern of activation errors. Batch
norms are part of the block and stay in evaluation mode. A layer that occurs in several blocks is optimized in the first
one.

Source: AdaRound (Nagel et al., ICML 2020), sections 3.2 and 3.3; blocks and the sum over channels from BRECQ (Li et
al., ICLR 2021); QDrop (Wei et al., ICLR 2022). Ours: a block keeps its learned rounding only if its error decreased.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.common.progress import Bar, visible
from synq.common.seeding import make_generator
from synq.config.run import ReconstructionConfig
from synq.network.blocks import block_ends, segment
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer, QuantConv2d, QuantLinear
from synq.quant.lsq import keep_positive
from synq.quant.soft_rounding import SoftRounding
from synq.quant.transformer.block_metric import BlockMetric, block_metrics

CACHE_BATCH = 128
"""Images per forward pass without gradients."""


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """Reconstruction errors of one block, before and after its rounding was learned.

    Attributes:
        block: Name of the last node of the block in the teacher's graph.
        error_before: Squared distance to the teacher's output, summed over channels and averaged over images and
            positions, with all activations quantized, weights rounded to nearest and the observed ranges.
        error_after: The same with the learned rounding (and activation scales).
        changed: Fraction (0..1) of the block's codes that differ from rounding to nearest.
        kept: Whether the learned rounding and scales were kept: error_after < error_before.
    """

    block: str
    error_before: float
    error_after: float
    changed: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """Results of all blocks, in order of execution."""

    blocks: tuple[BlockResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return the results as JSON-serializable dictionaries, one per block."""
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
    """Learn the rounding of the weights of ``student_net``, in place, on synthetic images (AdaRound).

    Every process of a group computes the same result. Activation scales are learned too if ``step_lr`` > 0, whether or
    not fine-tuning trains them later. The student's and the teacher's activations at two successive block boundaries
    are kept on the device, for ``config.images`` images.

    Args:
        student_net: Network of a student with ``rounding="adaround"`` and observed ranges, on ``device``.
        teacher_graph: The graph that it was made from, on ``device``; not modified.
        images: (N, C, H, W) synthetic images, filtered as for fine-tuning; the first ``config.images`` are used.
        config: Number of iterations, batch size, learning rates, and the annealing of beta.
        seed: Seed of the batches and of QDrop.
        device: Device of the computation.
        progress: Whether to show a progress bar.

    Returns:
        Errors of each block before and after.

    Raises:
        ValueError: If there are no images, or a weight's scale is not stored: its quantization grid would move with the
            rounded weights.
    """
    if len(images) == 0:
        raise ValueError("`reconstruction.images` must be >= 1, but got no image")
    for name, module in student_net.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear)) and not module.weight_quantizer.has_range:
            raise ValueError(
                f"`quant.rounding` must be adaround to learn the rounding of a student, but {name} has no stored scale"
            )
    ends = block_ends(teacher_graph)
    starts, cuts = [_input_node(teacher_graph), *ends], student_cuts(student_net, ends)
    teacher_in = student_in = images[: config.images].to(device)
    results: list[BlockResult] = []
    done: set[Tensor] = set()
    bar = Bar(total=len(ends) * config.iterations, desc="rounding", unit="step", **visible(progress, leave=None))
    metrics = block_metrics(teacher_graph, ends)
    for number, (end, metric) in enumerate(zip(ends, metrics, strict=True)):
        part = segment(student_net, cuts[number], cuts[number + 1])
        target = _run_batched(segment(teacher_graph, starts[number], end), teacher_in)
        block = _Block(part, done)
        generators = (make_generator("rounding", seed, number), make_generator("drop", seed, number, device=device))
        learned = _learn(end.name, block, teacher_in, student_in, target, metric, config, generators, bar.update)
        results.append(learned)
        done.update(block.roundings)
        teacher_in = target  # first, so that the previous tensor is freed before the next one is allocated
        student_in = _run_batched(part, student_in)
    bar.close()
    return ReconstructionReport(blocks=tuple(results))


class _Block:
    """A block of the student and its learnable variables.

    Attributes:
        part: The subgraph of the block.
        roundings: Soft rounding of each weight, except for those in ``done``, which an earlier block has learned.
        quantizers: Activation quantizers by name.
        steps: Copies of their scales, as leaf tensors with gradients.
    """

    def __init__(self, part: fx.GraphModule, done: set[Tensor]) -> None:
        self.part = part
        layers = [m for m in part.modules() if isinstance(m, (QuantConv2d, QuantLinear))]
        self.roundings = {m.weight: SoftRounding(m) for m in layers if m.weight not in done}
        self.quantizers = {name: m for name, m in part.named_modules() if isinstance(m, ActQuantizer)}
        self.steps = {name: q.scale.detach().clone().requires_grad_() for name, q in self.quantizers.items()}

    def changed(self) -> float:
        """Return the fraction (0..1) of codes that differ from rounding to nearest."""
        moved = [(r.codes() != r.nearest).sum() for r in self.roundings.values()]
        total = sum(r.nearest.numel() for r in self.roundings.values())
        return float(sum(moved)) / total if total else 0.0

    @torch.no_grad()
    def apply(self) -> Callable[[], None]:
        """Write the hard-rounded weights and the learned scales into the student; return a function that undoes it."""
        learned: list[tuple[Tensor, Tensor]] = [(w, r.hard_weight()) for w, r in self.roundings.items()]
        learned += [(self.quantizers[name].scale, step) for name, step in self.steps.items()]
        previous = [(tensor, tensor.detach().clone()) for tensor, _ in learned]

        @torch.no_grad()
        def write(values: list[tuple[Tensor, Tensor]]) -> None:
            for tensor, value in values:
                tensor.copy_(value)

        write(learned)
        return lambda: write(previous)


class _SoftBlockRunner(fx.Interpreter):
    """Run a block with softly rounded weights, learned activation scales and QDrop."""

    def __init__(self, block: _Block, drop: Callable[[Tensor, Tensor], Tensor], learn_steps: bool) -> None:
        super().__init__(block.part)
        self.block, self.drop, self.learn_steps = block, drop, learn_steps

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, ActQuantizer):
            return self.drop(args[0], self._fake_quantized(target, module, args[0]))
        if isinstance(module, (QuantConv2d, QuantLinear)) and module.weight in self.block.roundings:
            weight = self.block.roundings[module.weight].weight()
            if isinstance(module, QuantConv2d):
                return module.convolve(args[0], weight)
            return F.linear(args[0], weight, module.bias)
        return super().call_module(target, args, kwargs)

    def _fake_quantized(self, name: str, module: ActQuantizer, x: Tensor) -> Tensor:
        if not self.learn_steps:
            return module(x)
        return module.with_scale(x, self.block.steps[name])  # no gradient factor: Adam is invariant to it


def _learn(
    name: str,
    block: _Block,
    teacher_in: Tensor,
    student_in: Tensor,
    target: Tensor,
    metric: BlockMetric,
    config: ReconstructionConfig,
    generators: tuple[torch.Generator, torch.Generator],
    tick: Callable[[], object],
) -> BlockResult:
    """Optimize one block, and keep the result if its error decreased."""
    before = _error(block.part, student_in, target, metric)
    order, chance = generators

    def drop(whole: Tensor, quantized: Tensor) -> Tensor:
        return drop_back(whole, quantized, config.drop_prob, chance)

    runner = _SoftBlockRunner(block, drop, config.step_lr > 0)
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
            same = teacher_in is student_in  # the first block reads the images: nothing to mix
            output = runner.run(student_in[rows] if same else drop(teacher_in[rows], student_in[rows]))
            loss = metric(output, target[rows])
            beta = _beta(step, config)
            if beta is not None:
                variables = (rounding.soft_rounding() for rounding in block.roundings.values())
                loss = loss + config.rounding_weight * sum((1 - (2 * h - 1).abs().pow(beta)).sum() for h in variables)
        for leaf, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            leaf.grad = gradient
        if steps:
            optimizer.param_groups[-1]["lr"] = config.step_lr * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
        optimizer.step()
        tick()
    changed, undo = block.changed(), block.apply()
    after = _error(block.part, student_in, target, metric)
    kept = after < before
    if not kept:
        undo()
    return BlockResult(block=name, error_before=before, error_after=after, changed=changed if kept else 0.0, kept=kept)


def drop_back(whole: Tensor, quantized: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return ``quantized`` with each value replaced by that of ``whole`` with ``probability`` (QDrop).

    The random draw does not depend on the memory layout. A byte decides for each value, so that the probability is
    rounded to a multiple of 1 / 256; drawing floats and `torch.where` took a third of a step on a CPU.

    Args:
        whole: Unquantized tensor, any shape, finite.
        quantized: Quantized tensor of the same shape, finite; the result has its memory layout.
        probability: In [0, 1].
        generator: On the device of both.
    """
    limit = round(256 * probability)
    if limit == 0:
        return quantized
    count, bounds = whole.numel(), torch.iinfo(torch.int64)
    draws = torch.randint(bounds.min, bounds.max, (-(-count // 8),), generator=generator, device=whole.device)
    chosen = draws.view(torch.uint8)[:count] <= limit - 1
    if whole.dim() == 4:  # in the order in which images lie in memory
        n, c, h, w = whole.shape
        chosen = chosen.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        chosen = chosen.view(whole.shape)
    return quantized.lerp(whole, chosen.to(whole.dtype))  # exact for weights of 0 and 1


def _beta(step: int, config: ReconstructionConfig) -> float | None:
    """Return the exponent beta of the rounding term at iteration ``step``, or None during the warm-up."""
    first = config.warmup * config.iterations
    if step < first:
        return None
    progress = (step - first) / max(config.iterations - first, 1)
    return config.beta_start + (config.beta_end - config.beta_start) * progress


@torch.no_grad()
def _error(part: nn.Module, inputs: Tensor, target: Tensor, metric: BlockMetric) -> float:
    pairs = zip(inputs.split(CACHE_BATCH), target.split(CACHE_BATCH), strict=True)
    sums = [metric(part(x), y).double() * len(x) for x, y in pairs]
    return float(torch.stack(sums).sum()) / len(inputs)


@torch.no_grad()
def _run_batched(part: nn.Module, inputs: Tensor) -> Tensor:
    """Return the output of ``part`` for ``inputs`` (N, ...), in the memory layout in which ``part`` produces it.

    Batches are written into one preallocated tensor; ``torch.cat`` would hold all of them twice.
    """
    outputs = None
    for rows in torch.arange(len(inputs)).split(CACHE_BATCH):
        batch = part(inputs[rows[0] : rows[-1] + 1])
        if outputs is None:
            like = batch[:1].expand(len(inputs), *batch.shape[1:])
            last = (
                batch.dim() == 4
                and not batch.is_contiguous()
                and batch.is_contiguous(memory_format=torch.channels_last)
            )
            outputs = torch.empty_like(like, memory_format=torch.channels_last if last else torch.contiguous_format)
        outputs[rows[0] : rows[-1] + 1] = batch
    assert outputs is not None
    return outputs


def student_cuts(student_net: fx.GraphModule, ends: list[fx.Node]) -> list[fx.Node]:
    """Return the block boundaries of a student: its input node, and the last node of each block.

    A quantizer of a block's output is part of that block if it is the only user of the output; if a shortcut reads the
    unquantized tensor too, the quantizer is part of the next block.

    Args:
        student_net: Network of a student.
        ends: ``block_ends`` of its teacher's graph; the student's nodes have the same names.

    Returns:
        Nodes of ``student_net``, one more than ``ends``.
    """
    by_name = {node.name: node for node in student_net.graph.nodes}
    cuts = [_input_node(student_net)]
    for end in ends:
        node = by_name[end.name]
        users = list(node.users)
        quantized = len(users) == 1 and str(users[0].target) == f"{ACT_QUANTIZERS}{end.name}"
        cuts.append(users[0] if quantized else node)
    return cuts


def _input_node(net: fx.GraphModule) -> fx.Node:
    return next(node for node in net.graph.nodes if node.op == "placeholder")
