"""Make the synthetic set of a teacher, or find it in the store: shards, divided over whoever takes part, resumed where a run stopped."""

import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor, nn
from tqdm import tqdm

from synq.common.progress import remark, visible
from synq.common.seeding import make_generator
from synq.config.run import SynthesisConfig
from synq.network.bn_stats import ChannelStatistics, bn_targets
from synq.runs.record import read_json, write_bytes_atomic, write_json_atomic
from synq.runtime import to_layout
from synq.synthesis.centers import center_targets, pack_statistics, split_evenly, unpack_statistics
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.inversion import TERMS, Inversion, invert
from synq.synthesis.start_noise import WHITE, StartNoise, fit_start
from synq.synthesis.store import Purpose, SetStore, set_identity
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

POLL_SECONDS = 0.2
START_FILE = "start.json"
"""The noise that the shards of an unfinished set begin as."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
SHOW_EVERY = 5
"""Steps between two readings of the loss for the progress bar; each reading waits for the device."""


def balanced_labels(num_images: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return labels, shape (num_images,), int64: one random order of all classes after another.

    Every class occurs floor or ceil of num_images / num_classes times, in the whole and, to within one, in every stretch of it that
    starts at a multiple of num_classes.
    """
    num_rounds = math.ceil(num_images / num_classes)
    rounds = [torch.randperm(num_classes, generator=generator) for _ in range(num_rounds)]
    return torch.cat(rounds)[:num_images]


def ensure_set(
    teacher: Teacher,
    config: SynthesisConfig,
    seed: int,
    store: SetStore,
    *,
    purpose: Purpose = "train",
    accelerator: "Accelerator | None" = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> SyntheticSet:
    """Return the synthetic set of these settings; make it first if the store has it not. Every method makes it this way.

    Every process that wants the set calls this: the processes of one run, and other runs too. Each takes a shard that nobody is
    making (a lock tells), makes it, writes it by rename and looks for the next one; so the work is divided without a message between
    processes, what a killed process leaves is taken over, and a finished shard is never made again. Shard i is seeded by (seed,
    purpose, i): the set does not depend on who makes it. On one kind of device it is equal bit by bit.

    Calibration centers are pixels optimised for statistics and labels, whatever method makes the images behind them: a center has to
    show its class, which statistics alone and noise do not ask for, and one image a class is too little to train a generator.

    Args:
        teacher: The classifier, on the CPU; it is not changed.
        config: How the images are made. For a held-out set the caller sets `num_images`.
        seed: Seed of the set (`data_seed`).
        store: Where sets are kept; all processes must see the same folder.
        purpose: train, or heldout: images of other random streams, for measuring.
        accelerator: Tells the device, and at which shard a process begins; None for one process.
        device: Where to compute, if there is no accelerator; None is the CPU.
        progress: Whether a terminal shows a progress bar.

    Raises:
        ValueError: A set or shard in the store is damaged, the optimisation diverged, or memory did not suffice.
        OSError: The store cannot be written.
    """
    key = store.key(teacher.digest, config, seed, input_size=teacher.input_size, purpose=purpose)
    found = store.load(key)
    if found is None:
        maker = _Maker(teacher, config, seed, store, key, purpose, accelerator, device, progress)
        maker.make()
        found = store.load(key)
        if found is None:
            raise FileNotFoundError(f"`{store.path(key)}` must stay in place during the run, but it was removed")
    store.discard_leftovers(key)
    return found


class _Maker:
    """One process's share in making one set."""

    def __init__(
        self,
        teacher: Teacher,
        config: SynthesisConfig,
        seed: int,
        store: SetStore,
        key: str,
        purpose: Purpose,
        accelerator: "Accelerator | None",
        device: torch.device | None,
        progress: bool,
    ) -> None:
        if (
            config.method == "gaussian"
        ):  # the rest is not in the set's name, so it must not show in the manifest's terms
            config = SynthesisConfig(method="gaussian", num_images=config.num_images, shard_size=config.shard_size)
        self.teacher, self.config, self.seed, self.purpose = teacher, config, seed, purpose
        self.store, self.key = store, key
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.device = accelerator.device if accelerator else (device or torch.device("cpu"))
        self.is_shown: bool = progress and (accelerator is None or accelerator.is_local_main_process)
        # A copy, because the teacher stays where it is; channels_last is the faster layout of convolutions on CPU and GPU.
        module: nn.Module = copy.deepcopy(teacher.module)
        self.module = module.eval().requires_grad_(False).to(self.device)
        to_layout(self.module, torch.channels_last, teacher.input_size)
        self.targets = bn_targets(self.module)
        self._fitted: StartNoise | None = None

    def make(self) -> None:
        config, classes = self.config, self.teacher.num_classes
        deep: dict[str, ChannelStatistics] | None = None
        if config.calib_centers:
            batches = split_evenly(classes, config.shard_size)
            by_pixels = replace(
                config, method="inversion", swing_conv=config.swings, iterations=config.center_iterations
            )
            files = self._files("centers", len(batches))

            def make_centers(index: int, bar: tqdm) -> None:
                labels = torch.arange(batches[index].start, batches[index].stop)
                made, info = self._invert("centers", index, labels, by_pixels, None, bar)
                self.store.write_part(files[index], pack_statistics(made.statistics), info)

            self._share(files, make_centers, [len(batch) for batch in batches], f"{self.purpose} centers")
            if self.store.is_complete(self.key):
                return
            try:
                parts = [unpack_statistics(self.store.read_part(file)[0]) for file in files]
            except FileNotFoundError:
                if self.store.is_complete(self.key):  # Another process finished just now and cleared the parts away.
                    return
                raise
            deep = {
                name: part._replace(mean=part.mean.to(self.device), variance=part.variance.to(self.device))
                for name, part in center_targets(parts, config.center_depth).items()
            }
        generator = make_generator("synthesis", self.seed, self.purpose, "labels")
        labels = balanced_labels(config.num_images, classes, generator)
        shards = split_evenly(config.num_images, config.shard_size)
        files = self._files("shard", len(shards))

        def make_shard(index: int, bar: tqdm) -> None:
            part = labels[shards[index].start : shards[index].stop]
            made, info = self._invert("shard", index, part, config, deep, bar)
            self.store.write_part(files[index], {"images": made.images, "labels": made.labels}, info)

        self._share(files, make_shard, [len(shard) for shard in shards], f"{self.purpose} images")
        with self.store.lock(self.key, "set"):
            if not self.store.is_complete(self.key):
                self.store.assemble(self.key, files, self._describe)

    def _start(self, config: SynthesisConfig) -> StartNoise:
        """Return the noise that pixels begin as: fitted by whoever comes first, read by everybody else, so that a set has one."""
        if not config.fits_start:
            return WHITE
        if self._fitted is None:
            path = self.store.partial(self.key) / START_FILE
            with self.store.lock(self.key, "start"):
                if not path.exists():
                    fitted = fit_start(
                        self.module,
                        self.teacher.input_size,
                        self.targets,
                        config.bns_form,
                        generator=make_generator("synthesis", self.seed, self.purpose, "start"),
                        num_probes=config.shard_size,
                        device=self.device,
                    )
                    write_json_atomic(path, asdict(fitted))
                self._fitted = StartNoise.from_values(read_json(path))
        return self._fitted

    def _files(self, kind: str, count: int) -> list[Path]:
        return [self.store.partial(self.key) / f"{kind}-{index:05d}.safetensors" for index in range(count)]

    def _invert(
        self,
        kind: str,
        index: int,
        labels: Tensor,
        config: SynthesisConfig,
        deep: dict[str, ChannelStatistics] | None,
        bar: tqdm,
    ) -> tuple[Inversion, dict[str, Any]]:
        shown = 0

        def show(done: int, loss: Tensor) -> None:
            nonlocal shown
            if done % SHOW_EVERY == 0 or done == config.iterations:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update((done - shown) * len(labels) / config.iterations)
                shown = done

        started = time.perf_counter()
        try:
            if config.fits_start and self._fitted is None:
                remark(bar, "fitting the noise that they begin as")
            start = self._start(config)
            made = invert(
                self.module,
                labels,
                self.teacher.input_size,
                self.targets,
                config=config,
                generator=make_generator("synthesis", self.seed, self.purpose, kind, index),
                center_targets=deep,
                start=start,
                device=self.device,
                on_iteration=None if bar.disable else show,
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"`synthesis.shard_size` must fit into the memory of {self.device}, but got {self.config.shard_size}; lower it"
            ) from None
        info = {
            "terms": made.terms,
            "agreement": made.num_agree / len(labels),
            **({"start_noise": asdict(start)} if config.fits_start else {}),
            "seconds": round(time.perf_counter() - started, 3),
            "device": str(self.device),
            "torch": torch.__version__,
        }
        return made, info

    def _share(self, files: list[Path], make: Callable[[int, tqdm], None], sizes: list[int], title: str) -> None:
        """Make what is missing of `files`, together with every other process that does the same, until all exist."""
        own = list(range(self.rank % len(files), len(files), self.world)) if files else []
        order = own + [index for index in range(len(files)) if index not in own]
        bar: tqdm = tqdm(
            total=sum(sizes),
            desc=title,
            unit="image",
            **visible(self.is_shown, leave=None, bar_format=BAR),
        )
        with bar:
            while order:
                waiting = []
                for index in order:
                    if self.store.is_complete(self.key):  # Others put it together while this process looked on.
                        return
                    if files[index].exists():
                        if not bar.disable:
                            bar.initial += sizes[index]  # Not made here, so it must not count as speed.
                            bar.update(sizes[index])
                        continue
                    with _try_lock(self.store, self.key, files[index].stem) as mine:
                        # Looked at again under the lock: its last holder may have finished the shard or the whole set.
                        if mine and not files[index].exists() and not self.store.is_complete(self.key):
                            make(index, bar)
                        else:
                            waiting.append(index)
                if len(waiting) == len(order):
                    time.sleep(POLL_SECONDS)
                order = waiting

    def _describe(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        counts = [entry["stop"] - entry["start"] for entry in entries]

        def mean_of(values: list[float]) -> float:
            return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

        identity = set_identity(self.teacher.digest, self.teacher.input_size, self.config, self.seed, self.purpose)
        return {
            **identity,
            "teacher_name": self.teacher.name,
            "num_images": sum(counts),
            "num_classes": self.teacher.num_classes,
            "terms": {name: mean_of([entry["terms"][name] for entry in entries]) for name in TERMS},
            "agreement": mean_of([entry["agreement"] for entry in entries]),
            **({"start_noise": entries[0]["start_noise"]} if self.config.fits_start else {}),
            "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        }


@contextmanager
def _try_lock(store: SetStore, key: str, part: str) -> Iterator[bool]:
    """Hold the lock of one part if it is free; say whether it is held."""
    lock = store.lock(key, part)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_npz(path: str | Path, made: SyntheticSet, teacher: Teacher) -> None:
    """Write a synthetic set for other tools, by rename: `images` (N, C, H, W) float32, normalised as the network takes them, `labels` (N,)
    int64, and the `mean` and `std` of the normalisation.

    Raises:
        OSError: The disk refuses.
    """
    buffer = io.BytesIO()
    mean, std = (np.asarray(values, np.float32) for values in (teacher.mean, teacher.std))
    np.savez(buffer, images=made.images.float().numpy(), labels=made.labels.numpy(), mean=mean, std=std)
    write_bytes_atomic(path, buffer.getvalue())
