"""The spec file of a sweep, in three steps: parsed, resolved, checked.

    parse_spec    mapping  -> SpecFile   known keys only, each value of its type; environment variables replaced in texts
    resolve_spec  SpecFile -> SweepSpec  paths absolute, one group per (model, bits), defaults and the number of trials filled in
    check_spec    SweepSpec              settings allowed at the edges of the space, points inside it, no group twice

`load_spec` does all three for a file, `spec_from_dict` for values that are already in memory.
"""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synq.config.file_kinds import read_as
from synq.config.identity import absolute_path
from synq.config.parsing import nearest, require
from synq.config.run import (
    RunConfig,
    TeacherConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    make_absolute,
    parse_bits,
    with_overrides,
)

from .points import Point, completed, grid_size, listed_dimensions, point_params
from .search_config import DEFAULT_TRIALS, LISTED, SearchConfig
from .space import BITS, DEFAULT_SPACE, Dimension, base_values, with_bits
from .spec import Group, SweepSpec
from .spec_tables import read_points, read_space, read_table
from .storage.addresses import is_address

DEMO_SPEC = Path(__file__).parent / "specs" / "demo.toml"
TABLES = ("models", "bits", "base", "space", "points")
"""Keys of a spec next to those of `SearchConfig`."""
MODEL_KEYS = ("name", "dataset", "base")
"""Keys of an entry of `models` next to those of `TeacherConfig`."""
OWN_KEYS = (
    (("teacher",), "models"),
    (("name",), "name"),
    (("evaluation", "objective"), "objective"),
    (("quant", "weight_bits"), "bits"),
    (("quant", "act_bits"), "bits"),
)
"""Settings of a run that a spec has at its top level: where [base] would hold them, and the spec's own key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One entry of `models`, as written."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pre-trained classifier."""
    name: str = ""
    """Name for groups and tables; "" derives it from the teacher."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of a run for this model alone, as tables: its `base` and its `dataset`. They win over the spec's [base]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecFile:
    """A spec as written: every key known and every value typed, nothing filled in but the defaults of absent keys."""

    search: SearchConfig
    """Budget, search and resources: all keys that are no table."""
    models: tuple[ModelEntry, ...] = (ModelEntry(),)
    """The classifiers to quantize."""
    bits: tuple[str, ...] = ("W4A4",)
    """Labels of the bit-widths."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings that all runs have in common, as tables; typed when a group's run is built from them."""
    space: tuple[Dimension, ...] | None = None
    """The search space; None where the spec has no [space]."""
    points: tuple[Point, ...] = ()
    """Settings to try first, as dotted overrides."""

    def __post_init__(self) -> None:
        search, only_points = self.search, self.search.sampler == "points"
        rule = "hold at least one table for sampler points"
        require("points", rule, list(self.points), bool(self.points) or not only_points)
        require("space", "be left out for sampler points", "one", not (only_points and self.space is not None))
        rule = "be left out for sampler grid or points, whose trials are known"
        require("warm_start", rule, list(search.warm_start), not search.warm_start or search.sampler not in LISTED)
        for name, entries in (("models", self.models), ("bits", self.bits)):
            require(name, "be a list with at least one entry", list(entries), len(entries) > 0)
        if not search.two_objectives:
            return
        named = not only_points or all(BITS in point for point in self.points)
        rule = "name `bits` in every entry, where there is a second_objective"
        require("points", rule, list(self.points), named)
        once = only_points or len(set(self.bits)) == len(self.bits)
        require("bits", "have no entry twice", list(self.bits), once)


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None, *, root: str | Path = "") -> SweepSpec:
    """Load a sweep from a spec file: parse, resolve and check it.

    Args:
        path: A .toml or .json file.
        overrides: Top-level keys that win over the file, for example {"num_trials": 2}.
        root: Folder against which a relative output_dir is taken; the current one by default.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: A key or a value is wrong; the message names the file and the cure.
    """
    content = load_config(path, "spec")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem).lstrip("._-") or "sweep"
    with read_as("sweep", content, path):
        return spec_from_dict({"name": name, **content, **(overrides or {})}, source=str(path), root=root)


def spec_from_dict(mapping: Mapping[str, Any], *, source: str = "", root: str | Path = "") -> SweepSpec:
    """Build a `SweepSpec` from plain values.

    Args:
        mapping: The keys of a spec.
        source: Where the mapping was read, for messages.
        root: Folder against which a relative output_dir is taken; the current one by default.

    Raises:
        ValueError: A key or a value is wrong.
    """
    try:
        spec = resolve_spec(parse_spec(mapping), root=root)
        check_spec(spec)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
    return spec


def parse_spec(mapping: Mapping[str, Any]) -> SpecFile:
    """Convert the plain values of a spec into a `SpecFile`.

    Environment variables are replaced first: only then does a text have its type.

    Raises:
        ValueError: A key is unknown (the nearest one is named), a value has another type, a variable is not set, or two keys exclude
            each other.
    """
    known = (*TABLES, *SearchConfig.__dataclass_fields__)
    for key in mapping:
        if key not in known:
            raise ValueError(f"`{key}` must be a known key, but got an unknown one{nearest(key, known)}")
    content = _expand(mapping, "")
    search = config_from_dict(SearchConfig, {key: value for key, value in content.items() if key not in TABLES})
    tables: dict[str, Any] = {}
    if "base" in content:
        tables["base"] = _read_base(content["base"], "base")
    if "points" in content:
        tables["points"] = read_points(content["points"], two_objectives=search.two_objectives)
    if "space" in content:
        tables["space"] = read_space(content["space"])
    if "models" in content:
        tables["models"] = tuple(_read_model(entry) for entry in _entries(content["models"], "models"))
    if "bits" in content:
        tables["bits"] = tuple(_read_label(label) for label in _entries(content["bits"], "bits"))
    return SpecFile(search=search, **tables)


def resolve_spec(written: SpecFile, *, root: str | Path = "") -> SweepSpec:
    """Fill in what a spec leaves open: absolute paths, the default space, one run per group, the number of trials.

    Args:
        written: The spec as written.
        root: Folder against which a relative output_dir is taken; the current one by default.

    Raises:
        ValueError: The settings of a group do not form a run, or a grid has a range without steps.
    """
    search, base, points = _absolute(written.search, root), written.base, written.points
    space = written.space or ()
    if written.space is None and search.sampler != "points":
        space, base = default_space(base)
    labels = written.bits[:1] if search.two_objectives else written.bits
    groups = [_group(search, base, model, label) for model, label in itertools.product(written.models, labels)]
    whole = max(DEFAULT_TRIALS, len(points))
    if search.sampler == "points":
        space = listed_dimensions([point for group in groups for point in completed(points, group.base)])
        whole = len(points)
    elif search.two_objectives:
        space = (Dimension(name=BITS, type="choice", values=written.bits), *space)
    if search.sampler == "grid":
        whole = grid_size(space)
    search = replace(search, num_trials=search.num_trials or whole)
    return SweepSpec(search=search, groups=tuple(groups), dimensions=space, points=points)


def check_spec(spec: SweepSpec) -> None:
    """Check a resolved spec: no group twice, every edge of the space allowed in every group, every point inside the space.

    Raises:
        ValueError: One of these does not hold.
    """
    keys = [group.key for group in spec.groups]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(
            f"`models` must have different names (set `name`) and `bits` no entry twice, but got {double} twice"
        )
    for group, dimension in itertools.product(spec.groups, spec.dimensions):
        for value in dimension.edges():
            try:
                with_overrides(group.base, with_bits({dimension.name: value}))
            except ValueError as error:
                raise ValueError(f"`space.{dimension.name}` must stay where the setting is allowed: {error}") from None
    for group in spec.groups:
        base = base_values(spec.dimensions, group.base)
        for number, point in enumerate(spec.points, start=1):
            if point_params(spec.dimensions, {**base, **point}) is None:
                raise ValueError(f"`points` must lie in the search space, but got {point!r} (number {number})")


def _expand(value: Any, name: str) -> Any:
    """Replace environment variables ($NAME, ${NAME}) in every text; one that is not set is rejected by name."""
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


def _entries(value: Any, name: str) -> list[Any]:
    require(name, "be a list with at least one entry", value, isinstance(value, list))
    return list(value)


def _read_base(value: Any, name: str) -> dict[str, Any]:
    """Read the settings of a run; those that a spec has at its top level are rejected here."""
    base = read_table(value, name)
    for path, instead in OWN_KEYS:
        table: Any = base
        for part in path[:-1]:
            table = table.get(part)
        if isinstance(table, Mapping) and path[-1] in table:
            rule = f"be left out (the spec's own `{instead}` sets it)"
            raise ValueError(f"`base.{'.'.join(path)}` must {rule}, but got {table[path[-1]]!r}")
    return base


def _read_model(value: Any) -> ModelEntry:
    """Read an entry of `models`: the name of a teacher, or a table of `TeacherConfig` and MODEL_KEYS."""
    table = {"spec": value} if isinstance(value, str) else read_table(value, "models")
    own = {key: table.pop(key) for key in MODEL_KEYS if key in table}
    settings = _read_base(own.get("base", {}), "models.base")
    if "dataset" in own:
        settings = _merge(settings, {"evaluation": {"dataset": own["dataset"]}})
    teacher = config_from_dict(RunConfig, {"teacher": table}).teacher  # so that messages have the key's full name
    return ModelEntry(teacher=teacher, name=_identifier(str(own["name"])) if "name" in own else "", settings=settings)


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "model"


def _read_label(label: Any) -> str:
    parse_bits(label if isinstance(label, str) else repr(label))
    return str(label)


def default_space(base: Mapping[str, Any]) -> tuple[tuple[Dimension, ...], dict[str, Any]]:
    """Return the space of a spec without [space], and [base] with the unit in which that space has the cutoff.

    Raises:
        ValueError: [base] sets another unit.
    """
    finetune = read_table(base.get("finetune", {}), "base.finetune")
    unit = finetune.setdefault("lowpass_unit", "nyquist")
    rule = "be nyquist with the default search space (or give a [space] of your own)"
    require("base.finetune.lowpass_unit", rule, unit, unit == "nyquist")
    return read_space(DEFAULT_SPACE), {**base, "finetune": finetune}


def _absolute(search: SearchConfig, root: str | Path) -> SearchConfig:
    """Return the search with absolute paths; without an output_dir the sweep goes to runs/NAME."""
    folder = os.path.join("runs", search.name) if search.output_dir == "none" else search.output_dir
    if not is_address(folder):
        folder = os.path.abspath(os.path.join(root, os.path.expanduser(folder)))
    return replace(search, output_dir=folder, warm_start=tuple(map(absolute_path, search.warm_start)))


def _group(search: SearchConfig, base: dict[str, Any], model: ModelEntry, label: str) -> Group:
    """Return a group: the run of a model at one bit-width before any searched setting is put in."""
    weight_bits, act_bits = parse_bits(label)
    own = {"quant": {"weight_bits": weight_bits, "act_bits": act_bits}, "evaluation": {"objective": search.objective}}
    merged = _merge(_merge(base, model.settings), {"teacher": config_to_dict(model.teacher), **own})
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
    name = model.name or _identifier(spec.removeprefix("bundled:"))
    return Group(model=name, base=config, named=model.name, all_bits=search.two_objectives)


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
