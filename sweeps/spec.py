"""The specification of a sweep: models x targets x bit-widths, a search space, a budget. `spec_file.py` builds it.

A *group* is one (model, target, weight bits, activation bits). Each group has a separate search, separate rungs and a
separate budget of trials, because a 3-bit student must never be compared with, or stopped in favor of, an 8-bit one.
Only a search for two objectives, which stops no trial, covers all bit-widths: its group is the (model, target).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synq.config.parsing import require
from synq.config.run import RunConfig, with_overrides

from .constraints import Constraint
from .search_config import SearchConfig
from .space import BITS, Dimension, with_bits
from .storage.addresses import is_address, local_copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One (model, target, weight bits, activation bits), and the run whose settings its trials vary."""

    model: str
    """Short name of the model."""
    base: RunConfig
    """The run without any searched setting; its paths are absolute."""
    named: str = ""
    """Name of the model in the tables, if the spec sets one; "" uses the teacher's name."""
    all_bits: bool = False
    """Whether bit-widths are searched, too (with two objectives)."""

    @property
    def key(self) -> str:
        """Return the name of the group, for example digits_resnet8-W4A4 or digits_resnet8-W4A4-openvino."""
        quant = self.base.quant
        return f"{self.model}-{quant.group}".replace(f"-{quant.label}", "" if self.all_bits else f"-{quant.label}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A resolved and checked sweep."""

    search: SearchConfig
    """Budget, search and resources."""
    groups: tuple[Group, ...]
    """Groups in the order of the spec, bit-widths changing fastest, then targets."""
    dimensions: tuple[Dimension, ...]
    """The search space, the same for every group."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first, in this order, as dotted overrides; a setting missing in a point is that of the base."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds that settings must satisfy to be ranked among the first."""

    @property
    def output_dir(self) -> Path:
        """Return the absolute path of the sweep's folder on this machine; for an address, of the local copy."""
        folder = self.search.output_dir
        return local_copy(folder) if is_address(folder) else Path(folder)

    @property
    def num_bit_choices(self) -> int:
        """Return the number of bit-widths of each search: 1, unless it has two objectives."""
        return next((len(dimension.values) for dimension in self.dimensions if dimension.name == BITS), 1)

    @property
    def address(self) -> str:
        """Return the address of the sweep in an object store, "" for a folder."""
        return self.search.output_dir if is_address(self.search.output_dir) else ""


def run_config(
    spec: SweepSpec, group: Group, overrides: Mapping[str, Any], *, seeds: tuple[int, int] | None = None
) -> RunConfig:
    """Return the run of one trial: the group's base with the overrides of a point.

    Args:
        spec: The sweep.
        group: The trial's group.
        overrides: Values by dotted name, as from `sample`.
        seeds: (seed, data_seed); None keeps those of the base.

    Raises:
        ValueError: The settings are invalid together.
    """
    config = with_overrides(group.base, with_bits(overrides)) if overrides else group.base
    workers, size = spec.search.workers_per_trial, config.finetune.batch_size
    require("finetune.batch_size", f"be divisible by `workers_per_trial` ({workers})", size, size % workers == 0)
    seed, data_seed = seeds if seeds is not None else (config.seed, config.data_seed)
    threads = max(1, int(spec.search.cpus_per_worker))
    store = config.runtime.store_dir or str(spec.output_dir / "store")
    device = config.runtime.device
    if device == "auto" and not spec.search.gpus_per_worker:
        device = "cpu"  # otherwise all trials would use the same GPU
    runtime = replace(
        config.runtime,
        output_dir=str(spec.output_dir / "runs"),
        store_dir=store,
        num_threads=threads,
        progress=False,
        device=device,
    )
    return replace(config, name=f"{group.model}-{config.quant.group}", seed=seed, data_seed=data_seed, runtime=runtime)
