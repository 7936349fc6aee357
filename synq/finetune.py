"""Synthesis-aware fine-tuning of a quantized student, on 1..n processes.

One pass: a step costs one student forward and one backward. The images are filtered before; the teacher's logits and
maps are computed once where the images stay as they are; the class-activation maps come from the features of those very
forwards (SynQ, section 4; the closed form of the CAM weights is ours).
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.augment import flip_shift
from synq.cam_site import CamSite
from synq.checkpoints import check_same_epoch, load_checkpoint, save_checkpoint
from synq.configs import FinetuneConfig
from synq.gradcam import autograd_weights, cam_map, closed_form_weights
from synq.losses import synq_loss
from synq.optimizers import make_optimizer
from synq.quant_layers import effective_weight, step_parameters
from synq.seeding import make_generator
from synq.timetable import epoch_batches, local_batch_size, lr_at
from synq.tracing import batchnorm_parameters

Epoch = dict[str, float]
CACHE_BATCH = 128
"""Images per teacher forward when its outputs are computed once; independent of the training batch."""


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient stopped being a finite number; the message names it."""


@dataclass(frozen=True, kw_only=True)
class CamNetwork:
    """A network that gives (logits, features) in one pass, and what its class-activation map needs.

    Attributes:
        net: From ``with_features``; the features are A of ``site``.
        site: Where and how the map is taken.
    """

    net: fx.GraphModule
    site: CamSite

    def map(self, logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Return the class-activation maps (N, H, W) of ``labels``; the channel weights are detached."""
        site = self.site
        if site.kind == "autograd":
            alpha = autograd_weights(logits, features, labels, retain_graph=True)
        else:
            weight = effective_weight(self.net.get_submodule(site.linear or "")).flatten(1)
            alpha = closed_form_weights(weight, labels, site.channels, site.cells, site.height * site.width)
        return cam_map(features, alpha)


def teacher_view(teacher: CamNetwork, images: Tensor, labels: Tensor, with_cam: bool) -> tuple[Tensor, Tensor | None]:
    """Return the frozen teacher's (logits (N, K), maps (N, H, W) or None), detached, in float32 or wider."""
    with torch.set_grad_enabled(with_cam and teacher.site.kind == "autograd"):
        logits, features = teacher.net(images)
        cam = teacher.map(logits, features, labels) if with_cam else None
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.detach().to(wide), None if cam is None else cam.detach().to(wide)


def training_loss(
    model: nn.Module,
    student: CamNetwork,
    view: tuple[Tensor, Tensor | None],
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass of the student and the loss of SynQ on it.

    Args:
        model: ``student.net`` as prepared for this process group: its forward is the one that is reduced.
        student: Gives the maps.
        view: The teacher's logits and maps of these very images.
        images: (N, C, H, W), filtered; N is the share of this process.
        labels: (N,) assigned labels.
        config: Weights, temperature and threshold.

    Returns:
        (mean over the N images, terms by name). All shares being equal, the mean over processes is the global one.
    """
    logits, features = model(images)
    teacher_logits, teacher_map = view
    student_map = None if teacher_map is None else student.map(logits, features, labels)
    loss, terms = synq_loss(
        logits,
        student_map,
        teacher_logits,
        teacher_map,
        labels,
        temperature=config.kd_temperature,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        cam_weight=config.cam_weight,
        difficulty_threshold=config.difficulty_threshold,
    )
    if config.kd_weight == 0 and config.ce_weight == 0:  # DDP waits for a gradient of every parameter, the head's too
        loss = loss + 0.0 * logits.sum()
    return loss, terms


def finetune(
    student: CamNetwork,
    teacher: CamNetwork,
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
    parameters = _trainable(student.net, config.train_bn)
    for ranges in (*student.net.buffers(), *step_parameters(student.net)):
        broadcast(ranges.detach())  # what a GPU summed in another order on each process would differ for the whole run
    optimizer: torch.optim.Optimizer = make_optimizer(student.net, config)
    with warnings.catch_warnings():  # of PyTorch 2.14, whose new word for this Accelerate does not know yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        model, optimizer = accelerator.prepare(student.net, optimizer)
    if compiled:
        model.compile()
    history = load_checkpoint(checkpoint, identity, student.net, optimizer)
    check_same_epoch(len(history), checkpoint, accelerator)
    with_cam = config.cam_weight > 0 and student.site.kind != "none"
    live = config.augment != "none"
    autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
    images, labels = _near(images, accelerator.device), _near(labels, accelerator.device)
    cached = None
    if not live and len(history) < config.epochs:
        cached = _teacher_cache(teacher, images, labels, with_cam, accelerator.device, autocast)

    bar = tqdm(
        total=config.epochs * steps_per_epoch,
        initial=len(history) * steps_per_epoch,
        desc="fine-tune",
        unit="step",
        disable=None if progress and accelerator.is_main_process else True,
    )
    for epoch in range(len(history), config.epochs):
        meter, started = _Meter(epoch), time.perf_counter()
        generator = make_generator("augment", seed, epoch)
        for step, batch in enumerate(epoch_batches(len(images), config.batch_size, seed, epoch)):
            rows = batch[accelerator.process_index * share :][:share]
            x, y = _take(images, rows, accelerator.device), _take(labels, rows, accelerator.device)
            if live:
                x = flip_shift(x, generator, offset=accelerator.process_index * share, total=config.batch_size)
            with autocast():
                view = cached(rows) if cached is not None else teacher_view(teacher, x, y, with_cam)
                loss, terms = training_loss(model, student, view, x, y, config)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_factor"] * lr_at(epoch * steps_per_epoch + step, steps_per_epoch, config)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            meter.add({"loss": loss.detach(), **terms, "gradient norm": torch.as_tensor(norm)})
            # One host synchronisation in log_every steps; the last step of an epoch is read before its weights are saved.
            if (step + 1) % config.log_every == 0 or step + 1 == steps_per_epoch:
                bar.set_postfix_str(meter.check())
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
        history.append(meter.means(accelerator) | {"epoch": epoch + 1.0, "seconds": time.perf_counter() - started})
        if on_epoch is not None:
            on_epoch(history[-1])
        if checkpoint is not None and accelerator.is_main_process:
            save_checkpoint(checkpoint, identity, student.net, optimizer, history)
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
        return " ".join(f"{name} {means[name]:.4g}" for name in ("loss", "kd", "ce", "cam", "kept") if name in means)

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


def _teacher_cache(
    teacher: CamNetwork,
    images: Tensor,
    labels: Tensor,
    with_cam: bool,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Compute the teacher's view of all images once; returns the rows of it that a batch needs."""
    all_logits, all_maps = None, None
    for rows in torch.arange(len(images)).split(CACHE_BATCH):
        x, y = _take(images, rows, device), _take(labels, rows, device)
        with autocast():
            logits, maps = teacher_view(teacher, x, y, with_cam)
        if (
            all_logits is None
        ):  # at once in full size: small pieces between large passing ones would keep the heap from shrinking
            all_logits = logits.new_empty(len(images), *logits.shape[1:])
            all_maps = None if maps is None else maps.new_empty(len(images), *maps.shape[1:])
        all_logits[rows[0] : rows[-1] + 1] = logits
        if all_maps is not None and maps is not None:
            all_maps[rows[0] : rows[-1] + 1] = maps
    assert all_logits is not None

    def view(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        assert all_logits is not None
        rows = rows.to(all_logits.device, non_blocking=True)
        return all_logits[rows], None if all_maps is None else all_maps[rows]

    return view


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
