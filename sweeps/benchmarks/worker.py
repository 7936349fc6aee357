"""A benchmark worker: fine-tune and print JSON on the last line (`python -m synq.sweeps.benchmarks.worker ...`).

A separate process is needed to measure peak memory from a clean start, and several processes at once.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, option
from synq.config.run import FinetuneConfig, RunConfig, RuntimeConfig
from synq.finetune.loop import Epoch, finetune
from synq.runtime import make_accelerator
from synq.synthesis.dataset import read_tensors
from synq.synthesis.run_sets import low_pass

from .subjects import TINY, build_subject

SAMPLE_SECONDS = 0.05


def own_memory() -> int:
    """Return the resident bytes of this process, without file-backed pages, which the system can reclaim."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class Watch(threading.Thread):
    """A thread that tracks the peak of `own_memory` until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._end = own_memory(), threading.Event()

    def run(self) -> None:
        """Update the peak until the thread is stopped."""
        while not self._end.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, own_memory())

    def stop(self) -> int:
        """Stop the thread and return the peak, in bytes."""
        self._end.set()
        self.join()
        return max(self.peak, own_memory())


def stored_images(count: int, size: tuple[int, ...], folder: Path) -> Tensor:
    """Write random images in chunks in the format of the store and return them memory-mapped.

    Args:
        count: Number of images.
        size: (C, H, W).
        folder: Folder of the file.
    """
    pixels = count * size[0] * size[1] * size[2] * 4
    header = json.dumps({"images": {"dtype": "F32", "shape": [count, *size], "data_offsets": [0, pixels]}}).encode()
    header += b" " * (-len(header) % 8)
    file = folder / "images.safetensors"
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, count, 1024):
            out.write(torch.randn(min(1024, count - start), *size).numpy().tobytes())
    return read_tensors(file)[0]["images"]


@click.command("worker", cls=Command)
@option("--tiny", is_flag=True, help="train a network so small that the memory of the images is visible")
@option("--images", type=INT, default=256, help="random images (default: 256)")
@option("--epochs", type=INT, default=1, help="epochs (default: 1)")
@option("--batch", type=INT, default=64, help="images a step, over all processes (default: 64)")
@option("--threads", type=INT, default=1, help="CPU threads (default: 1)")
@option("--device", type=OneOf("auto", "cpu", "cuda"), default="auto", metavar="DEVICE", help="auto, cpu or cuda")
def command(
    tiny: bool, images: int, epochs: int, batch: int, threads: int, device: Literal["auto", "cpu", "cuda"]
) -> None:
    """Fine-tune on random images and print time and memory."""
    accelerator = make_accelerator(RuntimeConfig(device=device, num_threads=threads))
    subject = build_subject(TINY if tiny else "resnet20", accelerator.device, 0, 16)
    size = tuple(subject.images.shape[1:])
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory(prefix="synq-bench-") as name:
        pixels = low_pass(stored_images(images, size, Path(name)), RunConfig(), Path(name))
        labels = torch.arange(images) % 10
        stamps: list[tuple[float, int]] = []

        def after_epoch(_: Epoch) -> None:
            stamps.append((time.time(), own_memory()))
            watch.peak = max(watch.peak, stamps[-1][1])

        config = FinetuneConfig(epochs=epochs, batch_size=batch, lr=1e-6, augment="none")
        started = time.time()
        history = finetune(
            subject.student,
            subject.teacher,
            pixels,
            labels,
            config,
            accelerator=accelerator,
            seed=0,
            on_epoch=after_epoch,
        )
        seconds = time.time() - started
    found: dict[str, Any] = {
        "seconds": seconds,
        "epoch_seconds": [epoch["seconds"] for epoch in history],
        "memory_after_epoch": [memory for _, memory in stamps],
        "peak": watch.stop(),
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    code = command.run()
    sys.stdout.flush()
    os._exit(code)  # gloo aborts now and then in the interpreter's own exit
