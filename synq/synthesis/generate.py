"""Synthesis of the images of a teacher, in shards that several processes share and that an interrupted run resumes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synq.common.digests import read_sealed_json, report_unsealed, write_sealed_json
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.common.progress import Bar, note, visible
from synq.common.seeding import make_generator
from synq.config.run import SynthesisConfig
from synq.config.synthesis import OWN_IMAGES
from synq.network.bn_stats import ChannelStatistics, bn_targets
from synq.runtime import placed_copy
from synq.synthesis.centers import center_targets, pack_statistics, split_evenly, unpack_statistics
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.inversion import Inversion, invert
from synq.synthesis.own_method import given_images
from synq.synthesis.recovery import intact_set, try_lock, without_damage
from synq.synthesis.start_noise import WHITE, StartNoise, fit_start
from synq.synthesis.store import Purpose, SetStore, set_identity
from synq.synthesis.structure import StructureTerms, check_method, structure_weights
from synq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

POLL_SECONDS = 0.2
START_FILE = "start.json"
"""File with the initial noise of all shards of an unfinished set."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
SHOW_EVERY = 5
"""Steps between two updates of the progress bar; each reads the loss and so waits for the device."""


def balanced_labels(num_images: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Draw balanced labels: concatenated random permutations of all classes, truncated to `num_images`.

    Each class occurs floor or ceil of num_images / num_classes times. The same is true of each range of the labels
    that starts at a multiple of num_classes.

    Args:
        num_images: Number of labels.
        num_classes: Number of classes K.
        generator: CPU generator.

    Returns:
        Shape (num_images,), int64, in [0, K).
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
    """Return the synthetic set of these settings; synthesize it first if it is not in the store.

    All processes that need the set call this function, those of one run as well as those of other runs. Each process
    repeatedly locks a shard that is neither finished nor locked, synthesizes it and writes it by an atomic rename. The
    processes share the work without communication, the shards of a killed process are taken over, and a finished shard
    is never synthesized again. Shard i is seeded by (seed, purpose, i), so the set does not depend on which process
    synthesizes which shard; on the same kind of device it is bitwise reproducible.

    Calibration centers are always pixels optimized for statistics and labels, whatever the method of the images: a
    center must represent its class, which neither statistics alone nor noise achieve, and one image per class is too
    little to train a generator.

    Args:
        teacher: The classifier, on the CPU; not changed.
        config: Settings of the synthesis. For a held-out set the caller sets `num_images`.
        seed: Seed of the set (`data_seed`).
        store: Store of the sets; all processes must share its folder.
        purpose: train, or heldout for a set of other random streams that is used for measurements.
        accelerator: Process group, which gives the device and the first shard of each process; None for one process.
        device: Device to compute on if there is no accelerator; None means the CPU.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a set or shard in the store is damaged, the optimization diverges, or memory does not suffice.
        OSError: If the store cannot be written.
        FileNotFoundError: If the finished set is removed during the run.
    """
    pixels, size = teacher.pixel_range(), teacher.input_size
    key = store.key(teacher.digest, config, seed, input_size=size, purpose=purpose, pixel_range=pixels)
    found = intact_set(store, key)
    if found is None:
        if config.method == OWN_IMAGES:
            raise ValueError(f"`synthesis.source` must be read before its images are used, but {config.source} was not")
        _SetBuilder(teacher, config, seed, store, key, purpose, accelerator, device, progress).build()
        found = store.load(key)
        if found is None:
            raise FileNotFoundError(f"`{store.path(key)}` must stay in place during the run, but it was removed")
    store.remove_stale_parts(key)
    return found


class _SetBuilder:
    """Synthesizes one set together with the other processes."""

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
        if config.method == "gaussian":
            # The other settings are not part of the key, so they must not change the loss terms in the manifest.
            config = SynthesisConfig(method="gaussian", num_images=config.num_images, shard_size=config.shard_size)
        self.teacher, self.config, self.seed, self.purpose = teacher, config, seed, purpose
        self.store, self.key, self.pixel_range = store, key, teacher.pixel_range()
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world_size: int = accelerator.num_processes if accelerator else 1
        self.device = accelerator.device if accelerator else (device or torch.device("cpu"))
        self.is_shown: bool = progress and (accelerator is None or accelerator.is_local_main_process)
        self.module = placed_copy(teacher.module, self.device, teacher.input_size)
        self.targets = bn_targets(self.module)
        check_method(config, bool(self.targets), teacher.name)
        weights = structure_weights(config, bool(self.targets))
        self._graph = placed_copy(teacher.graph, self.device, teacher.input_size) if weights.any else None
        self._weights = weights
        self._fitted: StartNoise | None = None

    def build(self) -> None:
        """Synthesize calibration centers and shards with the other processes, and assemble the set."""
        config, classes = self.config, self.teacher.num_classes
        deep_targets: dict[str, ChannelStatistics] | None = None
        if config.calib_centers:
            batches = split_evenly(classes, config.shard_size)
            center_config = replace(
                config, method="inversion", swing_conv=config.swings, iterations=config.center_iterations
            )
            files = self._files("centers", len(batches))

            def build_centers(index: int, bar: Bar) -> None:
                labels = torch.arange(batches[index].start, batches[index].stop)
                inversion, info = self._invert("centers", index, labels, center_config, None, bar)
                self.store.write_part(files[index], pack_statistics(inversion.statistics), info)

            def read_centers() -> list[dict[str, ChannelStatistics]]:
                self._build_parts(files, build_centers, [len(batch) for batch in batches], f"{self.purpose} centers")
                if self.store.is_complete(self.key):
                    return []
                return [unpack_statistics(self.store.read_part(file)[0]) for file in files]

            try:
                parts = without_damage(read_centers, files)
                if self.store.is_complete(self.key):
                    return
            except FileNotFoundError:
                if self.store.is_complete(self.key):  # Another process has just finished the set and removed its parts.
                    return
                raise
            deep_targets = {
                name: part._replace(mean=part.mean.to(self.device), variance=part.variance.to(self.device))
                for name, part in center_targets(parts, config.center_depth).items()
            }
        generator = make_generator("synthesis", self.seed, self.purpose, "labels")
        labels = balanced_labels(config.num_images, classes, generator)
        shards = split_evenly(config.num_images, config.shard_size)
        files = self._files("shard", len(shards))

        def build_shard(index: int, bar: Bar) -> None:
            part = labels[shards[index].start : shards[index].stop]
            inversion, info = self._invert("shard", index, part, config, deep_targets, bar)
            self.store.write_part(files[index], {"images": inversion.images, "labels": inversion.labels}, info)

        def assemble() -> None:
            self._build_parts(files, build_shard, [len(shard) for shard in shards], f"{self.purpose} images")
            with self.store.lock(self.key, "set"):
                if not self.store.is_complete(self.key):
                    self.store.assemble(self.key, files, self._describe)

        without_damage(assemble, files)

    def _start(self, config: SynthesisConfig) -> StartNoise:
        """Return the initial noise; the first process fits and stores it, all others read it, so it is one per set."""
        if not config.fits_start or not self.targets:
            return WHITE
        if self._fitted is None:
            path = self.store.partial(self.key) / START_FILE
            with self.store.lock(self.key, "start"):
                if path.exists():
                    self._fitted = self._stored_start(path)
                if self._fitted is None:
                    fitted = fit_start(
                        self.module,
                        self.teacher.input_size,
                        self.targets,
                        config.bns_form,
                        generator=make_generator("synthesis", self.seed, self.purpose, "start"),
                        num_probes=config.shard_size,
                        pixel_range=self.pixel_range,
                        device=self.device,
                    )
                    write_sealed_json(path, asdict(fitted))
                    self._fitted = self._stored_start(path)
        return self._fitted or WHITE

    def _stored_start(self, path: Path) -> StartNoise | None:
        """Read the initial noise that was stored; None, with a notice, if its file is damaged."""
        try:
            values, is_sealed = read_sealed_json(path)
        except DamagedFileError as error:
            print_notice(f"warning: {error}; the initial noise is fitted again")
            return None
        if not is_sealed:
            report_unsealed(path)
        return StartNoise.from_values(values)

    def _files(self, kind: str, count: int) -> list[Path]:
        return [self.store.partial(self.key) / f"{kind}-{index:05d}.safetensors" for index in range(count)]

    def _invert(
        self,
        kind: str,
        index: int,
        labels: Tensor,
        config: SynthesisConfig,
        deep_targets: dict[str, ChannelStatistics] | None,
        bar: Bar,
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
            if config.fits_start and self.targets and self._fitted is None:
                note(bar, "fitting the initial noise")
            start = self._start(config)
            generator = make_generator("synthesis", self.seed, self.purpose, kind, index)
            given, labels = given_images(self.teacher, self.module, labels, config, generator, self.device, bar)
            inversion = invert(
                self.module,
                labels,
                self.teacher.input_size,
                self.targets,
                config=config,
                generator=generator,
                given=given,
                center_targets=deep_targets,
                start=start,
                pixel_range=self.pixel_range,
                structure=None if self._graph is None else StructureTerms(self._graph, self._weights, generator),
                device=self.device,
                on_iteration=None if bar.disable else show,
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"`synthesis.shard_size` must fit into the memory of {self.device}, but got {self.config.shard_size}; "
                "lower it"
            ) from None
        info = {
            "terms": inversion.terms,
            "agreement": inversion.num_agree / len(labels),
            **({"start_noise": asdict(start)} if config.fits_start else {}),
            "seconds": round(time.perf_counter() - started, 3),
            "device": str(self.device),
            "torch": torch.__version__,
        }
        return inversion, info

    def _build_parts(self, files: list[Path], build: Callable[[int, Bar], None], sizes: list[int], title: str) -> None:
        """Build the missing parts together with the other processes, and return when all exist.

        Args:
            files: File of each part.
            build: Builds and writes the part of an index; it advances the bar by the number of images.
            sizes: Number of images of each part.
            title: Description of the progress bar.
        """
        first = list(range(self.rank % len(files), len(files), self.world_size)) if files else []
        order = first + [index for index in range(len(files)) if index not in first]
        bar: Bar = Bar(
            total=sum(sizes),
            desc=title,
            unit="image",
            **visible(self.is_shown, leave=None, bar_format=BAR),
        )
        with bar:
            while order:
                waiting = []
                for index in order:
                    if self.store.is_complete(self.key):  # Another process has assembled the set in the meantime.
                        return
                    if files[index].exists():
                        if not bar.disable:
                            bar.initial += sizes[index]  # Not built here, so it must not count in the rate.
                            bar.update(sizes[index])
                        continue
                    with try_lock(self.store, self.key, files[index].stem) as acquired:
                        # Checked again under the lock: its last holder may have finished the shard or the whole set.
                        if acquired and not files[index].exists() and not self.store.is_complete(self.key):
                            build(index, bar)
                        else:
                            waiting.append(index)
                if len(waiting) == len(order):
                    time.sleep(POLL_SECONDS)
                order = waiting

    def _describe(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        counts = [entry["stop"] - entry["start"] for entry in entries]

        def mean_of(values: list[float]) -> float:
            return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

        teacher = self.teacher
        identity = set_identity(
            teacher.digest, teacher.input_size, self.config, self.seed, self.purpose, self.pixel_range
        )
        return {
            **identity,
            "teacher_name": teacher.name,
            "num_images": sum(counts),
            "num_classes": teacher.num_classes,
            "terms": {name: mean_of([entry["terms"][name] for entry in entries]) for name in entries[0]["terms"]},
            "agreement": mean_of([entry["agreement"] for entry in entries]),
            **({"start_noise": entries[0]["start_noise"]} if self.config.fits_start else {}),
            "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        }
