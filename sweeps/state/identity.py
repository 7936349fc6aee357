"""The content of sweep.json: by what a folder is that of a sweep, and how it is made again from plans and records."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from synq.common.error_text import some_of
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.run import config_digest, config_to_dict
from synq.runs.record import RunRecord

from ..constraints import constraint_values
from ..search_config import SearchConfig
from ..space import dimension_values
from ..spec import SweepSpec
from .plans import FORMAT, Plan, read_sweep_file
from .recovery import folder_of, misfits


def stored_identity(root: Path) -> tuple[dict[str, Any], str]:
    """Return the content of sweep.json, and the reason if it is missing or damaged."""
    path = root / "sweep.json"
    try:
        stored = read_sweep_file(path)
    except DamagedFileError as error:
        return {}, str(error)
    return stored, "" if stored else f"`{path}` is missing"


def rebuilt_identity(
    plans: dict[str, Plan], records: dict[str, RunRecord], spec: SweepSpec, reason: str
) -> dict[str, Any]:
    """Return what sweep.json had, as far as plans and records show it, if all of them fit the spec.

    Raises:
        ValueError: One does not.
    """
    if wrong := misfits(plans, records, spec):
        raise ValueError(
            f"`output_dir` must be new or hold the same sweep, but {reason}, and {some_of(wrong)} in {folder_of(spec)} "
            "are none of this sweep: start the spec that they are of, move them out, or choose another `--output-dir`"
        )
    print_notice(f"warning: {reason}; all {len(plans)} plans and their records fit the spec, so it is made again")
    numbers = Counter(plan.group for plan in plans.values() if plan.stage == "search")
    number = max(numbers.values(), default=0)
    finished = {"finished": number} if all(trial in records for trial in plans) else {}
    return {"search": {"num_trials": number}, **finished}


def expected_identity(spec: SweepSpec) -> dict[str, Any]:
    """Return the part of sweep.json by which a folder is that of this sweep."""
    groups = {}
    for group in spec.groups:
        values = config_to_dict(group.base)
        digest = config_digest(group.base)
        groups[group.key] = {
            "config_digest": digest,
            "teacher": values["teacher"]["spec"],
            "weights": values["teacher"]["weights"],
        }
        quant = group.base.quant
        wide = quant.last_bits and quant.last_bits_for_input and quant.points == "relu"
        if wide and spec.search.two_objectives:
            # The bit-widths are searched, and at those of the base this setting may have no effect.
            groups[group.key]["last_input"] = "wide"
    search = spec.search
    space: list[Any] = [dimension_values(dimension) for dimension in spec.dimensions]
    if search.sampler == "points":  # more points may extend the ranges
        space = sorted(dimension.name for dimension in spec.dimensions)
    both = [search.objective, search.second_objective] if search.two_objectives else search.objective
    expected: dict[str, Any] = json.loads(
        json.dumps({"format": FORMAT, "objective": both, "groups": groups, "space": space})
    )
    return expected


def check_identity(stored: Mapping[str, Any], spec: SweepSpec) -> None:
    """Reject a folder that has another sweep, whose trials would be mixed with these.

    Raises:
        ValueError: The folder has another sweep.
    """
    expected = expected_identity(spec)
    for key in ("objective", "groups", "space"):
        if _comparable(stored.get(key)) != _comparable(expected[key]):
            raise ValueError(
                f"`output_dir` must be new or hold the same sweep, but {folder_of(spec)} holds one with other {key}; "
                "another `name` in the spec, or `--output-dir`, begins a new one"
            )


def settled_budget(search: SearchConfig, stored: Mapping[str, Any]) -> SearchConfig:
    """Resolve "N more trials" to a number of trials; an interrupted extension is finished first, not extended.

    Args:
        search: Settings of the search, with `more_trials`.
        stored: Content of the folder's sweep.json; {} for a new sweep.

    Raises:
        ValueError: More trials are requested for a new sweep.
    """
    if not search.more_trials:
        return search
    before = stored.get("search", {}).get("num_trials")
    if before is None:
        raise ValueError(f"`num_trials` must be a whole number for a new sweep, but got +{search.more_trials}")
    number = before + (search.more_trials if stored.get("finished") == before else 0)
    return replace(search, num_trials=number, more_trials=0)


def settled_identity(spec: SweepSpec, stored: Mapping[str, Any]) -> tuple[SweepSpec, dict[str, Any]]:
    """Return the sweep with its resolved number of trials, and the content of its sweep.json.

    Args:
        spec: The sweep.
        stored: Content of sweep.json until now; {} for a new sweep.

    Raises:
        ValueError: As `settled_budget`.
    """
    spec = replace(spec, search=settled_budget(spec.search, stored))
    finished = {"finished": stored["finished"]} if "finished" in stored else {}
    number = max(spec.search.trials, stored.get("search", {}).get("num_trials") or 0)
    ended = stopped_groups(spec.search, stored)
    stopped = {"stopped": ended} if ended else {}
    # The two addresses may contain a password.
    search = {**asdict(spec.search), "num_trials": number, "output_dir": "", "study_storage": ""}
    bounds = {"constraints": constraint_values(spec.constraints)} if spec.constraints else {}
    return spec, {**expected_identity(spec), **bounds, **finished, **stopped, "search": search}


def stopped_groups(search: SearchConfig, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the groups whose search `stop_when` has ended, without decisions that do not count (any more).

    Args:
        search: Settings of the search; one without `stop_when`, or with a larger budget, goes on.
        stored: Content of sweep.json; {} for a new sweep.
    """
    known = {} if search.stop_when == "budget" else stored.get("stopped", {})
    return {key: one for key, one in known.items() if one["num_trials"] >= search.trials}


def merged_identity(agreed: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return one content of sweep.json of that in the database and that in the folder, with the larger numbers."""
    found = [one for one in (agreed, stored) if one]
    if not found:
        return {}
    number = max(one.get("search", {}).get("num_trials") or 0 for one in found)
    finished = [one["finished"] for one in found if "finished" in one]
    merged = {**found[0], "search": {**found[0].get("search", {}), "num_trials": number}}
    return {**merged, **({"finished": max(finished)} if finished else {})}


def _comparable(value: Any) -> Any:
    """Return a value with each path reduced to its last part, so that a moved folder of weights is the same sweep.

    The digest of the weights covers their content.
    """
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value
