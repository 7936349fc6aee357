"""What a sweep is: models x bit-widths, a search space, a budget. Read from TOML or JSON and checked before anything starts.

A *group* is one (model, weight bits, activation bits): it has its own search, its own rungs and its own budget of trials, because a
3-bit student must never be compared with, or stopped on account of, an 8-bit one. Only a search for two objectives at once, which
stops no trial, goes over the widths of a model: its group is the model.
"""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synq.config.file_kinds import read_as
from synq.config.identity import absolute_path
from synq.config.parsing import nearest, require
from synq.config.run import RunConfig, config_from_dict, load_config, make_absolute, parse_bits, with_overrides

from .points import completed, grid_size, listed_dimensions, point_params, read_points
from .search_config import DEFAULT_TRIALS, LISTED, SearchConfig
from .space import BITS, Dimension, base_values, read_space, read_table, with_bits
from .storage.addresses import is_address, local_copy

DEMO_SPEC = Path(__file__).parent / "specs" / "demo.toml"
TABLES = ("models", "bits", "base", "space", "points")
MODEL_KEYS = ("name", "dataset", "base")
OWN_KEYS = (
    ("evaluation", "objective", "objective"),
    ("quant", "weight_bits", "bits"),
    ("quant", "act_bits", "bits"),
)
"""Settings of a run that the spec says at its top: (part, key, where)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One (model, weight bits, activation bits) with the run that its trials vary."""

    model: str
    """Short name of the model."""
    base: RunConfig
    """The run before any searched setting is put in; paths absolute."""
    named: str = ""
    """The model's name where the spec gives one: it stands in the tables; else the teacher's own does."""
    all_bits: bool = False
    """Whether the search goes over the bit-widths too (two objectives)."""

    @property
    def key(self) -> str:
        """Name of the group, for example digits_resnet8-W4A4."""
        return self.model if self.all_bits else f"{self.model}-{self.base.quant.label}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A checked sweep."""

    search: SearchConfig
    """Budget, search and resources."""
    groups: tuple[Group, ...]
    """In the order of the spec: models outside, bit-widths inside."""
    dimensions: tuple[Dimension, ...]
    """The search space, the same for every group."""
    points: tuple[dict[str, Any], ...] = ()
    """Settings that are tried first, in this order, as dotted overrides; what a point does not name is as in the base."""

    @property
    def output_dir(self) -> Path:
        """The sweep's folder on this machine, absolute; for an address, a copy of it."""
        folder = self.search.output_dir
        return local_copy(folder) if is_address(folder) else Path(folder)

    @property
    def num_widths(self) -> int:
        """Bit-widths that each search goes over: one, unless it has two objectives."""
        return next((len(dimension.values) for dimension in self.dimensions if dimension.name == BITS), 1)

    @property
    def address(self) -> str:
        """Where the sweep lies, when that is not a folder that all machines see; else ""."""
        return self.search.output_dir if is_address(self.search.output_dir) else ""


def run_config(
    spec: SweepSpec, group: Group, overrides: Mapping[str, Any], *, seeds: tuple[int, int] | None = None
) -> RunConfig:
    """Return the run of one trial: the group's base with the point put in.

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


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None, *, root: str | Path = "") -> SweepSpec:
    """Read and check a sweep spec.

    Args:
        path: A .toml or .json file.
        overrides: Top-level keys that win over the file, for example {"num_trials": 2}.
        root: Folder against which a relative output_dir is taken; the current one by default.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: A key or a value is wrong; the message names the file and the cure.
    """
    mapping, name = load_config(path, "spec"), Path(path).stem
    with read_as("sweep", mapping, path):
        return spec_from_dict({**mapping, **(overrides or {})}, source=str(path), default_name=name, root=root)


def spec_from_dict(
    mapping: Mapping[str, Any], *, source: str = "", default_name: str = "sweep", root: str | Path = ""
) -> SweepSpec:
    """Build a `SweepSpec` from plain values. See `load_spec`."""
    try:
        return _build_spec(mapping, default_name, root)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def _build_spec(mapping: Mapping[str, Any], default_name: str, root: str | Path) -> SweepSpec:
    known = (*TABLES, *SearchConfig.__dataclass_fields__)
    for key in mapping:
        if key not in known:
            raise ValueError(f"`{key}` must be a known key, but got an unknown one{nearest(key, known)}")
    mapping = _expand(mapping, "")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", default_name).lstrip("._-") or "sweep"
    search = config_from_dict(SearchConfig, {"name": slug, **{k: v for k, v in mapping.items() if k not in TABLES}})
    folder = os.path.join("runs", search.name) if search.output_dir == "none" else search.output_dir
    if not is_address(folder):
        folder = os.path.abspath(os.path.join(root, os.path.expanduser(folder)))
    search = replace(search, output_dir=folder, warm_start=tuple(map(absolute_path, search.warm_start)))
    base = read_table(mapping.get("base", {}), "base")
    points = read_points(mapping.get("points", []), search)
    only_points = search.sampler == "points"
    require("space", "be left out for sampler points", "one", not (only_points and "space" in mapping))
    rule = "be left out for sampler grid or points, whose trials are known"
    require("warm_start", rule, list(search.warm_start), not search.warm_start or search.sampler not in LISTED)
    named = all(BITS in point for point in points) or not (only_points and search.two_objectives)
    require("points", "name `bits` in every entry, where there is a second_objective", points, named)
    dimensions = () if only_points else read_space(mapping, base)
    models = mapping.get("models", ["bundled:digits_resnet8"])
    bits = mapping.get("bits", ["W4A4"])
    for name, value in (("models", models), ("bits", bits)):
        require(name, "be a list with at least one entry", value, isinstance(value, list) and len(value) > 0)
    shown = bits[:1] if search.two_objectives else bits
    groups = [_group(search, base, model, label) for model, label in itertools.product(models, shown)]
    if only_points:
        dimensions = listed_dimensions([point for group in groups for point in completed(points, group.base)])
    elif search.two_objectives:
        labels = [_label(label) for label in bits]
        require("bits", "have no entry twice", bits, len(set(labels)) == len(labels))
        dimensions = (Dimension(name=BITS, type="choice", values=tuple(labels)), *dimensions)
    keys = [group.key for group in groups]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(
            f"`models` must have different names (set `name`) and `bits` no entry twice, but got {double} twice"
        )
    for group, dimension in itertools.product(groups, dimensions):
        for value in dimension.edges():
            try:
                with_overrides(group.base, with_bits({dimension.name: value}))
            except ValueError as error:
                raise ValueError(f"`space.{dimension.name}` must stay where the setting is allowed: {error}") from None
    return _with_points(SweepSpec(search=search, groups=tuple(groups), dimensions=dimensions), points)


def _with_points(spec: SweepSpec, points: list[dict[str, Any]]) -> SweepSpec:
    """Put the listed points into a spec, check that the space holds them, and settle how many trials there are."""
    for group in spec.groups:
        base = base_values(spec.dimensions, group.base)
        for number, point in enumerate(points, start=1):
            if point_params(spec.dimensions, {**base, **point}) is None:
                raise ValueError(f"`points` must lie in the search space, but got {point!r} (number {number})")
    search = spec.search
    if search.sampler == "grid":
        whole = grid_size(spec.dimensions)
    else:
        whole = len(points) if search.sampler == "points" else max(DEFAULT_TRIALS, len(points))
    return replace(spec, search=replace(search, num_trials=search.num_trials or whole), points=tuple(points))


def _label(label: Any) -> str:
    weight_bits, act_bits = parse_bits(label if isinstance(label, str) else repr(label))
    return f"W{weight_bits}A{act_bits}"


def _group(search: SearchConfig, base: dict[str, Any], model: Any, label: Any) -> Group:
    table = {"spec": model} if isinstance(model, str) else read_table(model, "models")
    extra = {key: table.pop(key) for key in MODEL_KEYS if key in table}
    merged = _merge(base, read_table(extra.get("base", {}), "models.base"))
    for part, instead in (("teacher", "models"), ("name", "name")):
        if part in merged:
            raise ValueError(
                f"`base.{part}` must be left out (the spec's own `{instead}` says it), but got {merged[part]!r}"
            )
    for part, key, instead in OWN_KEYS:
        table_there = merged.get(part)
        if isinstance(table_there, Mapping) and key in table_there:
            raise ValueError(
                f"`base.{part}.{key}` must be left out (the spec's own `{instead}` says it), but got {table_there[key]!r}"
            )
    weight_bits, act_bits = parse_bits(_label(label))
    merged = _merge(merged, {"teacher": table, "quant": {"weight_bits": weight_bits, "act_bits": act_bits}})
    evaluation = {"objective": search.objective, **({"dataset": extra["dataset"]} if "dataset" in extra else {})}
    merged = _merge(merged, {"evaluation": evaluation})
    config = config_from_dict(RunConfig, merged)
    if config.runtime.store_dir is not None:
        rule = "be a folder path (synthetic sets go with `output_dir`, which may be an address)"
        require("runtime.store_dir", rule, config.runtime.store_dir, not is_address(config.runtime.store_dir))
    if config.evaluation.data_dir is None:  # a trial runs in a scratch folder, where ./data would be another one
        data_dir = os.environ.get("SYNQ_DATA_DIR") or "data"
        config = replace(config, evaluation=replace(config.evaluation, data_dir=data_dir))
    config = make_absolute(config)
    spec = config.teacher.spec
    if ".py:" in spec:
        spec = spec.rpartition(":")[2]
    name = str(extra.get("name", spec.removeprefix("bundled:")))
    model = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "model"
    return Group(model=model, base=config, named=model if "name" in extra else "", all_bits=search.two_objectives)


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return `low` with the values of `high` put over it, parts merged."""
    merged = dict(low)
    for key, value in high.items():
        tables = {isinstance(part, Mapping) for part in (value, merged.get(key, value))}
        if len(tables) > 1:
            raise ValueError(
                f"`{key}` must be a table of keys or one value everywhere, but got {merged[key]!r} and {value!r}"
            )
        merged[key] = _merge(merged.get(key, {}), value) if tables == {True} else value
    return merged


def _expand(value: Any, name: str) -> Any:
    """Put environment variables ($NAME, ${NAME}) into every text; an unset one is refused by name."""
    if isinstance(value, Mapping):
        return {key: _expand(part, f"{name}.{key}" if name else key) for key, part in value.items()}
    if isinstance(value, list):
        return [_expand(part, name) for part in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    full = os.path.expandvars(value)
    missing = re.search(r"\$\{?(\w+)\}?", full)
    if missing:
        raise ValueError(f"`{name}` must name set environment variables, but got {value!r} (set {missing[1]})")
    return full
