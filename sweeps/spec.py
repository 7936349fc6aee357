"""A sweep as a value: models x bit-widths, a search space, a budget. `sweeps/spec_file.py` builds and checks it.

A *group* is one (model, weight bits, activation bits). Each group has a separate search, separate rungs and a separate budget of trials,
because a 3-bit student must never be compared with, or stopped in favor of, an 8-bit one. Only a search for two objectives, which stops
no trial, covers all bit-widths of a model: its group is the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synq.config.parsing import require
from synq.config.run import RunConfig, with_overrides

from .search_config import SearchConfig
from .space import BITS, Dimension, with_bits
from .storage.addresses import is_address, local_copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One (model, weight bits, activation bits) with the run that its trials vary."""

    model: str
    """Short name of the model."""
    base: RunConfig
    """The run before any searched setting is put in; paths absolute."""
    named: str = ""
    """The model's name in the tables where the spec sets one; "" uses the teacher's name."""
    all_bits: bool = False
    """Whether the search goes over the bit-widths too (two objectives)."""

    @property
    def key(self) -> str:
        """Name of the group, for example digits_resnet8-W4A4."""
        return self.model if self.all_bits else f"{self.model}-{self.base.quant.label}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A resolved and checked sweep."""

    search: SearchConfig
    """Budget, search and resources."""
    groups: tuple[Group, ...]
    """In the order of the spec: models outside, bit-widths inside."""
    dimensions: tuple[Dimension, ...]
    """The search space, the same for every group."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first, in this order, as dotted overrides; a setting that a point does not name is the base's."""

    @property
    def output_dir(self) -> Path:
        """The sweep's folder on this machine, absolute; for an address, a copy of it."""
        folder = self.search.output_dir
        return local_copy(folder) if is_address(folder) else Path(folder)

    @property
    def num_bit_choices(self) -> int:
        """Bit-widths that each search goes over: one, unless it has two objectives."""
        return next((len(dimension.values) for dimension in self.dimensions if dimension.name == BITS), 1)

    @property
    def address(self) -> str:
        """Where the sweep lies, when that is not a folder that all machines see; else ""."""
        return self.search.output_dir if is_address(self.search.output_dir) else ""


def run_config(
    spec: SweepSpec, group: Group, overrides: Mapping[str, Any], *, seeds: tuple[int, int] | None = None
) -> RunConfig:
    """Return the run of one trial: the group's base with the overrides of a point applied.

    Args:
        spec: The sweep.
        group: The trial's group.
        overrides: Dotted names and values, as from `sample`.
        seeds: (seed, data_seed); None keeps the base's own.

    Raises:
        ValueError: The settings do not go together.
    """
    config = with_overrides(group.base, with_bits(overrides)) if overrides else group.base
    workers, size = spec.search.workers_per_trial, config.finetune.batch_size
    require("finetune.batch_size", f"be divisible by `workers_per_trial` ({workers})", size, size % workers == 0)
    seed, data_seed = seeds if seeds is not None else (config.seed, config.data_seed)
    threads = max(1, int(spec.search.cpus_per_worker))
    store = config.runtime.store_dir or str(spec.output_dir / "store")
    device = config.runtime.device
    runtime = replace(
        config.runtime,
        output_dir=str(spec.output_dir / "runs"),
        store_dir=store,
        num_threads=threads,
        progress=False,
        device="cpu"
        if device == "auto" and not spec.search.gpus_per_worker
        else device,  # else all trials take one GPU
    )
    return replace(config, name=f"{group.model}-{config.quant.label}", seed=seed, data_seed=data_seed, runtime=runtime)
