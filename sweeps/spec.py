"""What a sweep is: models x bit-widths, a search space, a budget. Read from TOML or JSON and checked before anything starts.

A *group* is one (model, weight bits, activation bits): it has its own search, its own rungs and its own budget of trials, because a
3-bit student must never be compared with, or stopped on account of, an 8-bit one.
"""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sweeps.space import Dimension, read_space, read_table
from synq.config_io import between, nearest, one_of, require
from synq.configs import RunConfig, config_from_dict, load_config, make_absolute, parse_bits, with_overrides

DEMO_SPEC = Path(__file__).parent / "specs" / "demo.toml"
TABLES = ("models", "bits", "base", "space")
MODEL_KEYS = ("name", "dataset", "base")
OWN_KEYS = (
    ("evaluation", "objective", "objective"),
    ("quant", "weight_bits", "bits"),
    ("quant", "act_bits", "bits"),
)
"""Settings of a run that the spec says at its top: (part, key, where)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How a sweep spends its time."""

    name: str = "sweep"
    """Name of the sweep."""
    output_dir: str = "none"
    """Folder of the sweep; none is runs/NAME."""
    num_trials: int = 8
    """Trials of each group, pruned and failed ones included; re-runs on further seeds come on top."""
    objective: Literal["synthetic", "selection"] = "synthetic"
    """What is optimised: synthetic (mean KL to the teacher, lower is better) or selection (top-1 on a part of the labels, higher is better)."""
    seeds: tuple[int, ...] = ()
    """Seeds (of fine-tuning and of the synthetic set, together) on which the best settings of each group are run after the search."""
    final_top_k: int = 1
    """How many of the best settings of each group are run on `seeds`."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How settings are proposed."""
    sampler_seed: int = 0
    """Seed of the proposals."""
    scheduler: Literal["asha", "none"] = "asha"
    """Whether weak trials are stopped early (successive halving within their group)."""
    grace_epochs: int = 1
    """Epochs before which no trial is stopped."""
    reduction_factor: float = 3.0
    """About one in this many trials passes each rung."""
    max_concurrent: int | None = None
    """Most trials at one time; none is as many as the machines hold."""
    max_failures: int = 3
    """How often a trial whose worker died is started again from its last epoch."""
    cpus_per_trial: float = 1.0
    """CPU cores of one trial; also its number of threads."""
    gpus_per_trial: float = 0.0
    """GPUs of one trial; parts such as 0.25 share a device, 0 keeps trials on the CPU unless the run names a device."""
    journal: bool = False
    """Whether the searches are also kept as optuna.journal in the sweep's folder, for optuna-dashboard."""

    def __post_init__(self) -> None:
        slug = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require("name", "be letters, digits, dots, dashes and underscores (it names a folder)", self.name, slug)
        for name, low in (
            ("num_trials", 1),
            ("final_top_k", 1),
            ("grace_epochs", 1),
            ("max_failures", 0),
            ("sampler_seed", 0),
        ):
            between(name, getattr(self, name), low)
        if self.max_concurrent is not None:
            between("max_concurrent", self.max_concurrent, 1)
        between("reduction_factor", self.reduction_factor, 1, open_low=True)
        between("cpus_per_trial", self.cpus_per_trial, 0, open_low=True)
        between("gpus_per_trial", self.gpus_per_trial, 0)
        require(
            "gpus_per_trial", "be a part of one GPU or a whole number", self.gpus_per_trial, self.gpus_per_trial <= 1
        )
        require(
            "cpus_per_trial",
            "be < 1 or a whole number",
            self.cpus_per_trial,
            self.cpus_per_trial < 1 or self.cpus_per_trial % 1 == 0,
        )
        require(
            "seeds",
            "be different numbers >= 0",
            self.seeds,
            len(set(self.seeds)) == len(self.seeds) and all(s >= 0 for s in self.seeds),
        )
        for name, choices in (
            ("objective", ("synthetic", "selection")),
            ("sampler", ("tpe", "random")),
            ("scheduler", ("asha", "none")),
        ):
            one_of(name, getattr(self, name), choices)

    @property
    def minimise(self) -> bool:
        """Whether a lower objective is better."""
        return self.objective == "synthetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One (model, weight bits, activation bits) with the run that its trials vary."""

    model: str
    """Short name of the model."""
    base: RunConfig
    """The run before any searched setting is put in; paths absolute."""
    named: str = ""
    """The model's name where the spec gives one: it stands in the tables; else the teacher's own does."""

    @property
    def key(self) -> str:
        """Name of the group, for example digits_resnet8-W4A4."""
        return f"{self.model}-{self.base.quant.label}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A checked sweep."""

    search: SearchConfig
    """Budget, search and resources."""
    groups: tuple[Group, ...]
    """In the order of the spec: models outside, bit-widths inside."""
    dimensions: tuple[Dimension, ...]
    """The search space, the same for every group."""

    @property
    def output_dir(self) -> Path:
        """The sweep's folder, absolute."""
        return Path(self.search.output_dir)


def run_config(
    spec: SweepSpec, group: Group, overrides: Mapping[str, Any], *, seeds: tuple[int, int] | None = None
) -> RunConfig:
    """Return the run of one trial: the group's base with the point put in.

    Args:
        spec: The sweep.
        group: The trial's group.
        overrides: Dotted names and values, as from `sample`.
        seeds: (seed, data_seed); None keeps the base's own.
    """
    config = with_overrides(group.base, overrides) if overrides else group.base
    seed, data_seed = seeds if seeds is not None else (config.seed, config.data_seed)
    threads = max(1, int(spec.search.cpus_per_trial))
    store = config.runtime.store_dir or str(spec.output_dir / "store")
    device = config.runtime.device
    runtime = replace(
        config.runtime,
        output_dir=str(spec.output_dir / "runs"),
        store_dir=store,
        num_threads=threads,
        progress=False,
        device="cpu" if device == "auto" and not spec.search.gpus_per_trial else device,  # else all trials take one GPU
    )
    return replace(config, name=group.key, seed=seed, data_seed=data_seed, runtime=runtime)


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
    try:
        mapping = load_config(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"`spec` must name an existing file, but got {str(path)!r}") from None
    return spec_from_dict({**mapping, **(overrides or {})}, source=str(path), default_name=Path(path).stem, root=root)


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
    _refuse_address("output_dir", folder)
    search = replace(search, output_dir=os.path.abspath(os.path.join(root, os.path.expanduser(folder))))
    base = read_table(mapping.get("base", {}), "base")
    dimensions = read_space(mapping, base)
    groups = []
    models = mapping.get("models", ["bundled:digits_resnet8"])
    bits = mapping.get("bits", ["W4A4"])
    for name, value in (("models", models), ("bits", bits)):
        require(name, "be a list with at least one entry", value, isinstance(value, list) and len(value) > 0)
    for model, label in itertools.product(models, bits):
        groups.append(_group(search, base, model, label))
    keys = [group.key for group in groups]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(
            f"`models` must have different names (set `name`) and `bits` no entry twice, but got {double} twice"
        )
    for group, dimension in itertools.product(groups, dimensions):
        for value in dimension.edges():
            try:
                with_overrides(group.base, {dimension.name: value})
            except ValueError as error:
                raise ValueError(f"`space.{dimension.name}` must stay where the setting is allowed: {error}") from None
    return SweepSpec(search=search, groups=tuple(groups), dimensions=dimensions)


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
    weight_bits, act_bits = parse_bits(label if isinstance(label, str) else repr(label))
    merged = _merge(merged, {"teacher": table, "quant": {"weight_bits": weight_bits, "act_bits": act_bits}})
    evaluation = {"objective": search.objective, **({"dataset": extra["dataset"]} if "dataset" in extra else {})}
    merged = _merge(merged, {"evaluation": evaluation})
    config = config_from_dict(RunConfig, merged)
    if config.runtime.store_dir is not None:
        _refuse_address("runtime.store_dir", config.runtime.store_dir)
    if config.evaluation.data_dir is None:  # a trial runs in a scratch folder, where ./data would be another one
        data_dir = os.environ.get("SYNQ_DATA_DIR") or "data"
        config = replace(config, evaluation=replace(config.evaluation, data_dir=data_dir))
    config = make_absolute(config)
    spec = config.teacher.spec
    if ".py:" in spec:
        spec = spec.rpartition(":")[2]
    name = str(extra.get("name", spec.removeprefix("bundled:")))
    model = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "model"
    return Group(model=model, base=config, named=model if "name" in extra else "")


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


def _refuse_address(name: str, folder: str) -> None:
    require(name, "be a folder path (a shared file system, not an address)", folder, "://" not in folder)


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
