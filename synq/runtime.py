"""The runtime of a run: process group, device, dtype, memory format, compilation."""

import copy
import os
from pathlib import Path
from typing import TypeVar

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

from synq.common.allocator import keep_buffers
from synq.config.run import RunConfig, RuntimeConfig
from synq.network.cam_site import CamSite
from synq.quant.layers import quantizers_bypassed

TRACKER_PACKAGES = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "mlflow": is_mlflow_available}
"""Tracker -> function that returns whether its package is installed. Accelerate would only warn, and log nothing."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_tracker(tracker: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        ValueError: It is not; the message has the command that installs it.
    """
    if tracker != "none" and not TRACKER_PACKAGES[tracker]():
        raise ValueError(
            f"`runtime.tracker` must be one whose package is installed, but got {tracker}: pip install {tracker}"
        )


def make_accelerator(runtime: RuntimeConfig) -> Accelerator:
    """Return the process group of a run, after setting the number of threads.

    Raises:
        ValueError: If the device or the tracker's package is missing, Accelerate is configured to accumulate gradients,
            or several processes were started but did not join.
    """
    check_tracker(runtime.tracker)
    keep_buffers()
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device must be one that is present, but got cuda and PyTorch sees no GPU")
    on_cpu = runtime.device == "cpu" or not torch.cuda.is_available()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:  # a process may do several runs; Accelerate would keep the device and precision of the first
        AcceleratorState._reset_state(reset_partial_state=True)
    # Autocast is applied around the networks: Accelerate's would detach the CAM's features from the logits' graph.
    # Buffers (ranges, running statistics) are synchronized once, before fine-tuning, and are constant afterwards.
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
    """Return the memory format of weights; convolutions propagate it to their outputs.

    "auto": channels_last on CPU, where it was measured to be faster (docs/results/BENCHMARKS.md), and under bf16, for
    which GPU kernels expect it; contiguous for float32 on a GPU.
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
    """Convert a network's weights to a memory format, in place; fall back to contiguous if its forward pass fails.

    A network that flattens a feature map by ``x.view(n, -1)`` fails in channels_last.

    Returns:
        The memory format that the network has now.
    """
    _arrange(net, layout)
    if layout is torch.channels_last:
        like = next(net.parameters())
        try:
            with quantizers_bypassed(net):
                net(torch.zeros(2, *input_size, device=like.device, dtype=like.dtype))
        except RuntimeError:
            layout = torch.contiguous_format
            _arrange(net, layout)
    return layout


def _arrange(net: nn.Module, layout: torch.memory_format) -> None:
    """Convert the tensors of four axes; `Module.to` fails at those of five, such as the masks of windows."""
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def placed_copy(module: ModuleT, device: torch.device, input_size: tuple[int, int, int]) -> ModuleT:
    """Return a frozen copy of a network on a device, in eval mode and the layout that is faster there.

    Args:
        module: The network; it stays where and as it is.
        device: Device of the copy.
        input_size: (C, H, W).
    """
    placed = copy.deepcopy(module).eval().requires_grad_(False).to(device)
    to_layout(placed, torch.channels_last, input_size)
    return placed


def check_compilable(config: RunConfig, cam: CamSite, device: torch.device) -> None:
    """Check that torch.compile can be used, before hours of synthesis.

    Raises:
        ValueError: If the student's map needs the graph between its features and logits, which compilation hides, or
            there is no compiler for the device.
    """
    if not config.runtime.compile:
        return
    if config.finetune.uses_cam and cam.differentiates(config.finetune.cam_method):
        raise ValueError(
            "runtime.compile must be false for this teacher and finetune.cam_method: its class activation map needs a "
            "gradient inside the network, which a compiled network hides. Disable compilation, or set "
            "finetune.cam_weight to 0"
        )
    try:
        torch.compile(lambda x: (x * 2).relu())(torch.ones(4, device=device))
    except Exception as error:  # a missing compiler has many types: a CPU needs g++, a GPU needs Triton and gcc
        text = str(error).strip().splitlines()
        raise ValueError(
            f"runtime.compile must be false here, because torch.compile fails: {text[0] if text else error!r}"
        ) from error


def synchronize_parameters(net: nn.Module) -> None:
    """Broadcast the main process's parameters and buffers, which include learned step sizes and ranges.

    GPUs sum in different orders, so values computed on each process may differ; they must be equal for the whole run.
    Modules that hold a buffer as a Python number, too, read it again as from a file.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        broadcast(tensor.detach())
    net.load_state_dict(net.state_dict())


def exists_on_main(path: Path) -> bool:
    """Return, on all processes, whether a file exists for the main process.

    Processes with different results would wait for one another forever.
    """
    return bool(broadcast_object_list([path.exists()])[0])


def same_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the main process's metrics on all processes, so that decisions based on them agree."""
    return dict(broadcast_object_list([metrics])[0])
