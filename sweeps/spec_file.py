"""Loading of the spec file of a sweep in three steps: parse, resolve, check.

    parse_spec    mapping  -> SpecFile   known keys and types only; environment variables in texts are replaced
    resolve_spec  SpecFile -> SweepSpec  absolute paths, a group per (model, target, bits), defaults, number of trials
    check_spec    SweepSpec              settings valid at the edges of the space, points inside it, no group twice

`load_spec` does all three for a file, `spec_from_dict` for a mapping.
"""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synq.config.file_kinds import read_as
from synq.config.identity import absolute_path, map_spec_path, resolved
from synq.config.key_tables import nested_keys
from synq.config.nearest import unknown_key
from synq.config.parsing import dotted_keys, one_of, require, shown
from synq.config.plugins import SAMPLER, TEACHER_SOURCE, unversioned
from synq.config.quant import TARGETS
from synq.config.run import (
    MAX_NAME,
    RunConfig,
    TeacherConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    make_absolute,
    parse_bits,
)

from .constraints import Constraint, read_constraints
from .points import Point, completed, grid_size, listed_dimensions, point_params
from .search_config import DEFAULT_TRIALS, LISTED, SearchConfig
from .space import BITS, Dimension, base_values, existing, in_order
from .spec import Group, SweepSpec
from .spec_tables import (
    check_added,
    check_edges,
    default_space,
    expanded,
    read_points,
    read_space,
    read_table,
    resolved_points,
    resolved_space,
)
from .storage.addresses import is_address

DEMO_SPEC = Path(__file__).parent / "specs" / "demo.toml"
TABLES = ("models", "bits", "targets", "base", "space", "points", "constraints")
"""Keys of a spec in addition to those of `SearchConfig`."""
MODEL_KEYS = ("name", "dataset", "base")
"""Keys of an entry of `models` in addition to those of `TeacherConfig`."""
TOP_LEVEL_KEYS = (
    (("teacher",), "models"),
    (("name",), "name"),
    (("evaluation", "objective"), "objective"),
    (("quant", "weight_bits"), "bits"),
    (("quant", "act_bits"), "bits"),
)
"""Settings of a run that a spec has at its top level: their path in [base], and the top-level key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One entry of `models`, as written."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pre-trained classifier."""
    name: str = ""
    """Name for groups and tables; "" derives it from the teacher."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of a run for this model alone, as tables: its `base` and `dataset`. They override the spec's [base]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecFile:
    """A spec as written: known keys and typed values, with the defaults of missing keys."""

    search: SearchConfig
    """Budget, search and resources: all keys that are not tables."""
    models: tuple[ModelEntry, ...] = (ModelEntry(),)
    """The classifiers to quantize."""
    bits: tuple[str, ...] = ("W4A4",)
    """Labels of the bit-widths."""
    targets: tuple[str, ...] = ()
    """Values of `quant.target`; empty takes that of [base]."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings common to all runs, as tables; their types are checked when the run of a group is built."""
    space: tuple[Dimension, ...] | None = None
    """The search space; None if the spec has no [space]."""
    points: tuple[Point, ...] = ()
    """Settings to try first, as dotted overrides."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds on metrics of the students; settings that violate one are avoided, and ranked after all others."""

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
        rule = "name `bits` in every entry, if there is a second_objective"
        require("points", rule, list(self.points), named)
        are_distinct = only_points or len(set(self.bits)) == len(self.bits)
        require("bits", "have no entry twice", list(self.bits), are_distinct)


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None, *, root: str | Path = "") -> SweepSpec:
    """Load a sweep from a spec file: parse, resolve and check it.

    Args:
        path: A .toml or .json file.
        overrides: Top-level keys that override the file, for example {"num_trials": 2}.
        root: Base of a relative output_dir; the current folder by default.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A key or a value is invalid; the message names the file.
    """
    content = load_config(path, "spec")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem).lstrip("._-") or "sweep"
    with read_as("sweep", content, path):
        return spec_from_dict({"name": name, **content, **(overrides or {})}, source=str(path), root=root)


def spec_from_dict(mapping: Mapping[str, Any], *, source: str = "", root: str | Path = "") -> SweepSpec:
    """Build a `SweepSpec` from plain values.

    Args:
        mapping: The keys of a spec.
        source: Origin of the mapping, for messages.
        root: Base of a relative output_dir; the current folder by default.

    Raises:
        ValueError: A key or a value is invalid.
    """
    try:
        spec = resolve_spec(parse_spec(mapping), root=root)
        check_spec(spec)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
    return spec


def parse_spec(mapping: Mapping[str, Any]) -> SpecFile:
    """Convert the plain values of a spec into a `SpecFile`.

    Environment variables are replaced first, before types are checked.

    Raises:
        ValueError: A key is unknown (the message names the most similar one), a value has a wrong type, a variable is
            not set, or two keys exclude each other.
    """
    known = (*TABLES, *SearchConfig.__dataclass_fields__)
    for key in mapping:
        if key not in known:
            raise unknown_key(key, key, [*known, *(f"base.{setting}" for setting in dotted_keys(RunConfig))])
    content = expanded(mapping)
    search = config_from_dict(SearchConfig, {key: value for key, value in content.items() if key not in TABLES})
    tables: dict[str, Any] = {}
    if "base" in content:
        tables["base"] = _read_base(content["base"], "base")
    if "points" in content:
        tables["points"] = read_points(content["points"], two_objectives=search.two_objectives)
    if "constraints" in content:
        tables["constraints"] = read_constraints(content["constraints"])
    if "space" in content:
        tables["space"] = read_space(content["space"])
    if "models" in content:
        tables["models"] = tuple(_read_model(entry) for entry in _entries(content["models"], "models"))
    if "targets" in content:
        tables["targets"] = tuple(_entries(content["targets"], "targets"))
        require("targets", "be a list with at least one entry", content["targets"], bool(tables["targets"]))
        for target in tables["targets"]:
            one_of("targets", target, TARGETS)
    if "bits" in content:
        tables["bits"] = tuple(_read_label(label) for label in _entries(content["bits"], "bits"))
    return SpecFile(search=search, **tables)


def resolve_spec(written: SpecFile, *, root: str | Path = "") -> SweepSpec:
    """Resolve a spec: absolute paths, the default space, one run per group, the number of trials.

    Args:
        written: The spec as written.
        root: Base of a relative output_dir; the current folder by default.

    Raises:
        ValueError: The settings of a group are invalid, or a grid has a range without steps.
    """
    search, base, points = _absolute(written.search, root), written.base, resolved_points(written.points)
    space = resolved_space(written.space or ())
    if written.space is None and search.sampler != "points":
        space, base = default_space(base)
    labels = written.bits[:1] if search.two_objectives else written.bits
    kinds = itertools.product(written.models, written.targets or [""], labels)
    groups = [_group(search, base, model, target, label) for model, target, label in kinds]
    default_trials = max(DEFAULT_TRIALS, len(points))
    if search.sampler == "points":
        space = listed_dimensions([point for group in groups for point in completed(points, group.base)])
        default_trials = len(points)
    elif search.two_objectives:
        space = (Dimension(name=BITS, type="choice", values=written.bits), *space)
    space = in_order(space)
    if search.sampler == "grid":
        default_trials = grid_size(space)
    search = replace(search, num_trials=search.num_trials or default_trials)
    return SweepSpec(
        search=search, groups=tuple(groups), dimensions=space, points=points, constraints=written.constraints
    )


def check_spec(spec: SweepSpec) -> None:
    """Check a resolved spec: groups differ, trials can load its loss terms, edges and points of the space are valid.

    Raises:
        ValueError: A check fails.
    """
    keys = [group.key for group in spec.groups]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(
            "`models` must have different names (set `name`), `bits` and `targets` no entry twice, but got "
            f"{double} twice"
        )
    for group in spec.groups:
        require(
            "models.name", f"have at most {MAX_NAME // 2} characters", group.model, len(group.model) <= MAX_NAME // 2
        )
    check_added(spec)
    for group, dimension in itertools.product(spec.groups, spec.dimensions):
        check_edges(spec.dimensions, dimension, group.base)
    for group in spec.groups:
        base = base_values(spec.dimensions, group.base)
        for number, point in enumerate(spec.points, start=1):
            if point_params(spec.dimensions, {**base, **point}) is None:
                raise ValueError(f"`points` must lie in the search space, but got {shown(point)} (number {number})")
            known = existing(spec.dimensions, {**base, **point})
            if absent := sorted(name for name in point if name not in known and point[name] != base[name]):
                raise ValueError(
                    f"`points` must name settings that exist together, but got {absent[0]} where its `when` does not "
                    f"hold (number {number})"
                )


def _entries(value: Any, name: str) -> list[Any]:
    require(name, "be a list with at least one entry", value, isinstance(value, list))
    return list(value)


def _read_base(value: Any, name: str) -> dict[str, Any]:
    """Return the settings of a run as tables; raise ValueError for those that a spec has at its top level."""
    base = nested_keys(read_table(value, name), name)
    for path, instead in TOP_LEVEL_KEYS:
        table: Any = base
        for part in path[:-1]:
            table = table.get(part)
        if isinstance(table, Mapping) and path[-1] in table:
            rule = f"be left out (the spec's key `{instead}` sets it)"
            raise ValueError(f"`base.{'.'.join(path)}` must {rule}, but got {shown(table[path[-1]])}")
    return base


def _read_model(value: Any) -> ModelEntry:
    """Read an entry of `models`: the name of a teacher, or a table with keys of `TeacherConfig` and MODEL_KEYS."""
    table = {"spec": value} if isinstance(value, str) else read_table(value, "models")
    entry = {key: table.pop(key) for key in MODEL_KEYS if key in table}
    settings = _read_base(entry.get("base", {}), "models.base")
    if "dataset" in entry:
        settings = _merge(settings, {"evaluation": {"dataset": entry["dataset"]}})
    teacher = config_from_dict(RunConfig, {"teacher": table}).teacher  # so that messages have the key's full name
    name = _identifier(str(entry["name"])) if "name" in entry else ""
    return ModelEntry(teacher=teacher, name=name, settings=settings)


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "model"


def _read_label(label: Any) -> str:
    parse_bits(label if isinstance(label, str) else repr(label))
    return str(label)


def _absolute(search: SearchConfig, root: str | Path) -> SearchConfig:
    """Return the search with absolute paths; the default output_dir is runs/NAME."""
    folder = os.path.join("runs", search.name) if search.output_dir == "none" else search.output_dir
    if not is_address(folder):
        folder = os.path.abspath(os.path.join(root, os.path.expanduser(folder)))
    warm_start = tuple(map(absolute_path, search.warm_start))
    return replace(search, output_dir=folder, warm_start=warm_start, sampler=resolved(SAMPLER, search.sampler))


def _group(search: SearchConfig, base: dict[str, Any], model: ModelEntry, target: str, label: str) -> Group:
    """Return a group: the run of a model for one engine at one bit-width, without any searched setting."""
    weight_bits, act_bits = parse_bits(label)
    given = _merge(base, model.settings)
    quant: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits}
    if target:
        rule = "be left out (the spec's key `targets` sets it)"
        table = read_table(given.get("quant", {}), "base.quant")
        require("base.quant.target", rule, table.get("target"), "target" not in table)
        quant["target"] = target
    top = {"quant": quant, "evaluation": {"objective": search.objective}}
    merged = _merge(given, {"teacher": config_to_dict(model.teacher), **top})
    config = config_from_dict(RunConfig, merged)
    if config.runtime.store_dir is not None:
        rule = "be a folder path (synthetic sets go with `output_dir`, which may be an address)"
        require("runtime.store_dir", rule, config.runtime.store_dir, not is_address(config.runtime.store_dir))
    if config.evaluation.data_dir is None:  # a trial runs in a scratch folder, which has no ./data
        data_dir = os.environ.get("SYNQ_DATA_DIR") or "data"
        config = replace(config, evaluation=replace(config.evaluation, data_dir=data_dir))
    config = make_absolute(config)
    spec = map_spec_path(unversioned(TEACHER_SOURCE, config.teacher.spec), os.path.basename)
    spec = spec.rpartition(":")[2] if ".py:" in spec else spec.removeprefix("bundled:")
    name = model.name or _identifier(spec)
    return Group(model=name, base=config, named=model.name, all_bits=search.two_objectives)


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return `low` overridden by `high`, with tables merged recursively."""
    merged = dict(low)
    for key, value in high.items():
        tables = {isinstance(part, Mapping) for part in (value, merged.get(key, value))}
        if len(tables) > 1:
            raise ValueError(
                f"`{key}` must be a table of keys or one value everywhere, but got {shown(merged[key])} "
                f"and {shown(value)}"
            )
        merged[key] = _merge(merged.get(key, {}), value) if tables == {True} else value
    return merged
