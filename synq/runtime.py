"""Where a run computes: process group, device, dtype, memory format, compilation."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
    broadcast_object_list,
    is_mlflow_available,
    is_tensorboard_available,
    is_wandb_available,
)
from torch import nn

from synq.config.run import RunConfig, RuntimeConfig
from synq.network.cam_site import CamSite
from synq.quant.layers import quantizers_bypassed

TRACKER_PACKAGES = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "mlflow": is_mlflow_available}
"""Tests whether the package of a tracker is installed. Accelerate itself only warns, and tracks nothing."""


def check_tracker(tracker: str) -> None:
    """Raise if the package of a tracker is not installed.

    Raises:
        ValueError: It is not; the message names the command that installs it.
    """
    if tracker != "none" and not TRACKER_PACKAGES[tracker]():
        raise ValueError(
            f"`runtime.tracker` must be one whose package is installed, but got {tracker}: pip install {tracker}"
        )


def make_accelerator(runtime: RuntimeConfig) -> Accelerator:
    """Return the process group and precision of a run.

    Raises:
        ValueError: If the device or the tracker's package is not there, or several processes were started but did not
            join.
    """
    check_tracker(runtime.tracker)
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device must be one that is present, but got cuda and PyTorch sees no GPU")
    on_cpu = runtime.device == "cpu" or not torch.cuda.is_available()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:  # a process may do several runs; Accelerate would keep the first one's device and precision
        AcceleratorState._reset_state(reset_partial_state=True)
    # Precision is handled where the networks run: Accelerate's own would cut the CAM's features off the logits' graph.
    # Buffers (ranges, running statistics) are synchronized once, by the fine-tuning, and never change afterwards.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        kwargs_handlers=[ddp],
        log_with=None if runtime.tracker == "none" else runtime.tracker,
        project_dir=runtime.output_dir,
    )
    if accelerator.gradient_accumulation_steps != 1:  # from the launcher's configuration; it would rescale every loss
        raise ValueError(
            "accelerate's gradient_accumulation_steps must be 1 (finetune.batch_size is the whole batch), "
            f"but got {accelerator.gradient_accumulation_steps}"
        )
    if accelerator.num_processes != started:
        raise ValueError(
            f"accelerate must join all {started} processes, but this one sees {accelerator.num_processes}; "
            "on CPU use launch/accelerate_cpu2.yaml"
        )
    return accelerator


def dtype_of(runtime: RuntimeConfig) -> torch.dtype:
    """Return the dtype of weights and images; bf16 is autocast over float32."""
    return torch.float64 if runtime.precision == "fp64" else torch.float32


def layout_of(runtime: RuntimeConfig, device: torch.device) -> torch.memory_format:
    """Return the memory format of weights; convolutions pass it on to the activations after them.

    "auto": channels_last on CPU, where it was measured to win (docs/results/BENCHMARKS.md), and under bf16, for which the
    GPU's kernels are written; contiguous for float32 on a GPU.
    """
    chosen = runtime.memory_format
    if chosen == "auto":
        chosen = "channels_last" if device.type == "cpu" or runtime.precision == "bf16" else "contiguous"
    return torch.channels_last if chosen == "channels_last" else torch.contiguous_format


def place(net: nn.Module, runtime: RuntimeConfig, device: torch.device, input_size: tuple[int, int, int]) -> None:
    """Move a network, in place, to the device, dtype and memory format of a run."""
    net.to(device, dtype_of(runtime))
    to_layout(net, layout_of(runtime, device), input_size)


@torch.no_grad()
def to_layout(net: nn.Module, layout: torch.memory_format, input_size: tuple[int, int, int]) -> torch.memory_format:
    """Convert a network's weights to a memory format, in place; fall back to contiguous if it cannot run otherwise.

    A network that flattens a map of several cells by ``x.view(n, -1)`` fails in channels_last.
    """
    net.to(memory_format=layout)  # type: ignore[call-overload]
    if layout is torch.channels_last:
        like = next(net.parameters())
        try:
            with quantizers_bypassed(net):
                net(torch.zeros(2, *input_size, device=like.device, dtype=like.dtype))
        except RuntimeError:
            layout = torch.contiguous_format
            net.to(memory_format=layout)  # type: ignore[call-overload]
    return layout


def check_compilable(config: RunConfig, cam: CamSite, device: torch.device) -> None:
    """Raise for what torch.compile would only report in the first step, hours later.

    Raises:
        ValueError: If the student's map needs the graph between its features and logits, which compilation hides, or
            there is no compiler for the device.
    """
    if not config.runtime.compile:
        return
    if cam.differentiates(config.finetune.cam_method) and config.finetune.cam_weight > 0:
        raise ValueError(
            "runtime.compile must be false for this teacher and finetune.cam_method: its class-activation map is taken "
            "by differentiation inside the network, which a compiled network hides. Switch it off, or set "
            "finetune.cam_weight to 0"
        )
    try:
        torch.compile(lambda x: (x * 2).relu())(torch.ones(4, device=device))
    except Exception as error:  # whatever a compiler's absence looks like; a CPU wants g++, a GPU wants Triton and gcc
        text = str(error).strip().splitlines()
        raise ValueError(
            f"runtime.compile must be false here, because torch.compile fails: {text[0] if text else error!r}"
        ) from error


def synchronize_parameters(net: nn.Module) -> None:
    """Broadcast the main process's parameters and buffers, learned steps and ranges among them.

    GPUs sum in different orders: what follows from a sum would otherwise differ between processes for the whole run.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        broadcast(tensor.detach())


def exists_on_main(path: Path) -> bool:
    """Return whether the main process finds a file: processes that disagreed would wait for one another forever."""
    return bool(broadcast_object_list([path.exists()])[0])


def same_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of the main process on all processes: a choice by them must be the same everywhere."""
    return dict(broadcast_object_list([metrics])[0])
