"""Synthesis-aware fine-tuning of a quantized student, on 1..n processes.

One pass: a step costs one student forward and one backward. The images are filtered before; the teacher's logits and
maps are computed once where the images stay as they are; the class-activation maps come from the features of those very
forwards (SynQ, section 4; the closed form of the CAM weights is ours).
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.common.progress import remark, visible
from synq.common.seeding import make_generator
from synq.config.run import FinetuneConfig
from synq.finetune.augment import random_views
from synq.finetune.checkpoints import check_same_epoch, load_checkpoint, save_checkpoint
from synq.finetune.ema import WeightAverage
from synq.finetune.optimizers import clip_relative, make_optimizer
from synq.finetune.responses import Response, TappedNetwork, cached_responses, teacher_response
from synq.finetune.schedule import epoch_batches, local_batch_size, lr_at
from synq.losses import kd_kl, synq_loss
from synq.network.tracing import batchnorm_parameters
from synq.runtime import make_equal

Epoch = dict[str, float]


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient stopped being a finite number; the message names it."""


def training_loss(
    model: nn.Module,
    student: TappedNetwork,
    goal: Response,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    harder: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass of the student and the loss of SynQ on it.

    Args:
        model: ``student.net`` as prepared for this process group: its forward is the one that is reduced.
        student: Gives the maps.
        goal: The teacher's answer to these very images.
        images: (N, C, H, W), filtered; N is the share of this process.
        labels: (N,) assigned labels.
        config: Weights, temperature and threshold.
        harder: From ``harder_images``, where `perturb_weight` is above 0.

    Returns:
        (mean over the N images, terms by name). All shares being equal, the mean over processes is the global one.
    """
    count = len(images)
    # One forward pass for both, or DDP would reduce half of the gradient.
    outputs = model(images if harder is None else torch.cat([images, harder[0]]))
    own = outputs if harder is None else tuple(output[:count] for output in outputs)
    answer = student.response(own, labels)
    loss, terms = synq_loss(
        answer.logits,
        answer.cam,
        goal.logits,
        goal.cam,
        labels,
        temperature=config.kd_temperature,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        cam_weight=config.cam_weight,
        difficulty_threshold=config.difficulty_threshold,
        student_blocks=answer.blocks,
        teacher_blocks=goal.blocks,
        feature_weight=config.feature_weight,
        top2=config.hard_labels == "top2",
    )
    if harder is not None:
        perturbed = kd_kl(outputs[0][count:], harder[1], config.kd_temperature).mean()
        loss, terms["perturbed"] = loss + config.perturb_weight * perturbed, perturbed.detach()
    if config.kd_weight == 0 and config.ce_weight == 0:  # DDP waits for a gradient of every parameter, the head's too
        loss = loss + 0.0 * outputs[0].sum()
    return loss, terms


def harder_images(
    student: TappedNetwork, teacher: TappedNetwork, images: Tensor, labels: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) that are more difficult for the student, and the teacher's logits (N, K) of them.

    x + size * sign(d CE(student(x), label) / d x); the gradient is taken beside DDP's reducer and reaches no parameter.

    Source: sample difficulty promotion of HAST (CVPR 2023); the difficulty 1 - p_label rises where the cross-entropy does.
    """
    with torch.enable_grad():
        seen = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(student.net(seen)[0], labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, seen)
    harder = (images + size * gradient.sign()).detach()
    with torch.no_grad():
        return harder, teacher.net(harder)[0]


def finetune(
    student: TappedNetwork,
    teacher: TappedNetwork,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    accelerator: Accelerator,
    seed: int,
    bf16: bool = False,
    compiled: bool = False,
    checkpoint: Path | None = None,
    identity: str = "",
    on_epoch: Callable[[Epoch], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    progress: bool = False,
) -> list[Epoch]:
    """Train the student's float weights behind its fake quantizers, in place; the last epoch is the result.

    BatchNorm statistics and activation ranges stay as they are; networks stay in evaluation mode. Killed and called
    again with the same ``checkpoint``, it goes on after the last finished epoch and ends bit-equal.

    Args:
        student: The quantized network with observed ranges, on the device of ``accelerator``.
        teacher: The frozen teacher, on the same device.
        images: (N, C, H, W) filtered synthetic images, the same on every process.
        labels: (N,) int64 assigned labels.
        config: Epochs, *global* batch size, optimiser, loss.
        accelerator: Process group.
        seed: Seed of the order of the images and of their augmentation.
        bf16: Run both networks under autocast to bfloat16; weights, losses and maps stay float32.
        compiled: Let torch.compile build the student's passes; not where its map is taken by "autograd".
        checkpoint: File of the last finished epoch; None keeps none.
        identity: What the checkpoint belongs to (teacher and images); another one in the file is refused.
        on_epoch: Called on every process after every epoch, before its checkpoint, with the epoch's mean terms; what it
            adds to them is kept.
        on_checkpoint: Called on the main process with the path of each checkpoint, once it is written.
        progress: Whether to show a progress bar (on the main process).

    Returns:
        Mean loss terms of each epoch, in order.

    Raises:
        ValueError: If the batch size is not divisible by the number of processes or exceeds the images, or the checkpoint
            is damaged or another run's.
        NonFiniteLossError: If a term or the gradient norm is not finite.
    """
    share = local_batch_size(config.batch_size, accelerator.num_processes)
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0 and config.epochs > 0:
        raise ValueError(f"finetune.batch_size must be <= the {len(images)} images, but got {config.batch_size}")
    with_cam = config.cam_weight > 0 and student.site.kind != "none"
    student, teacher = (replace(part, method=config.cam_method, with_cam=with_cam) for part in (student, teacher))
    parameters = _trainable(student.net, config.train_bn)
    make_equal(student.net)
    optimizer: torch.optim.Optimizer = make_optimizer(student.net, config)
    with warnings.catch_warnings():  # of PyTorch 2.14, whose new word for this Accelerate does not know yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        model, optimizer = accelerator.prepare(student.net, optimizer)
    if compiled:
        model.compile()
    average = WeightAverage(parameters, config.ema_decay)
    history = load_checkpoint(checkpoint, identity, student.net, optimizer, average)
    check_same_epoch(len(history), checkpoint, accelerator)
    autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
    images, labels = _near(images, accelerator.device), _near(labels, accelerator.device)

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _take(images, rows, accelerator.device), _take(labels, rows, accelerator.device)

    cached, is_shown = None, progress and accelerator.is_main_process
    if config.augment == "none" and len(history) < config.epochs:
        cached = cached_responses(teacher, take, len(images), autocast, progress=is_shown)

    bar = tqdm(
        total=config.epochs * steps_per_epoch,
        initial=len(history) * steps_per_epoch,
        desc="fine-tune",
        unit="step",
        **visible(is_shown, leave=None),  # it stays where it is a run's own, not below a bar over runs
    )
    for epoch in range(len(history), config.epochs):
        meter, started = _Meter(epoch), time.perf_counter()
        generator = make_generator("augment", seed, epoch)
        for step, batch in enumerate(epoch_batches(len(images), config.batch_size, seed, epoch)):
            own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
            x, y = take(batch[own])
            x = random_views(x, batch, own, take, config.augment, generator)
            with autocast():
                goal = cached(batch[own]) if cached is not None else teacher_response(teacher, x, y)
                harder = (
                    harder_images(student, teacher, x, y, config.perturb_size) if config.perturb_weight > 0 else None
                )
                loss, terms = training_loss(model, student, goal, x, y, config, harder)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_factor"] * lr_at(epoch * steps_per_epoch + step, steps_per_epoch, config)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            clip_relative(parameters, config.grad_clip_relative)
            meter.add({"loss": loss.detach(), **terms, "gradient norm": torch.as_tensor(norm)})
            # One host synchronisation in log_every steps; the last step of an epoch is read before its weights are saved.
            if (step + 1) % config.log_every == 0 or step + 1 == steps_per_epoch:
                remark(bar, meter.check())
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            bar.update()
        history.append(meter.means(accelerator) | {"epoch": epoch + 1.0, "seconds": time.perf_counter() - started})
        with average.in_place(for_good=epoch + 1 == config.epochs):
            if on_epoch is not None:
                on_epoch(history[-1])
        if checkpoint is not None and accelerator.is_main_process:
            save_checkpoint(checkpoint, identity, student.net, optimizer, average, history)
            if on_checkpoint is not None:
                on_checkpoint(checkpoint)
    bar.close()
    return history


class _Meter:
    """Sums of the terms of an epoch, kept on the device; reading them is the only host synchronisation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in terms.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def check(self) -> str:
        """Return "name value" of the running means; raise if a sum is not finite (a NaN once added never leaves)."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        for name, value in sorted(means.items(), key=lambda item: item[0] == "loss"):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} became {value} in epoch {self.epoch + 1}, step <= {self.steps}. "
                    "Lower finetune.lr, or the weight of this term"
                )
        return " ".join(
            f"{name} {means[name]:.4g}"
            for name in ("loss", "kd")  # what a narrow terminal can hold: a figure that is cut off is a false one
            if name in means
        )

    def means(self, accelerator: Accelerator) -> Epoch:
        """Return the means over steps and processes."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].to(accelerator.device) for name in names]) / self.steps
        values = accelerator.reduce(values, reduction="mean")
        return dict(zip(names, values.tolist(), strict=True))


def _near(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on the GPU where it takes at most a quarter of the free memory, else as it is (rows travel)."""
    if device.type != "cuda" or tensor.numel() * tensor.element_size() > torch.cuda.mem_get_info(device)[0] // 4:
        return tensor
    return tensor.to(device)


def _take(tensor: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    taken = tensor[rows.to(tensor.device)]
    if device.type == "cuda" and taken.device.type == "cpu":
        taken = taken.pin_memory()  # only from pinned memory does a copy run beside the device's work
    return taken.to(device, non_blocking=True)


def _trainable(net: fx.GraphModule, train_bn: bool) -> list[nn.Parameter]:
    """Set which parameters learn, and return them."""
    frozen = set() if train_bn else {id(parameter) for parameter in batchnorm_parameters(net)}
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
